"""KServe: an InferenceService that runs a model repository over the v2 protocol.

The files: inferenceservice.yaml; models/NAME, a Triton repository as KServe's Triton runtime takes
it, to be copied where `storage_uri` points.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from slimfuse_export.errors import ExportError
from slimfuse_export.packaging.triton import appearing, write_triton

_SCHEMES = ("pvc://", "s3://", "gs://", "https://", "hdfs://", "oci://")
_YAML = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: onnx
      protocolVersion: v2
      runtime: kserve-tritonserver
      storageUri: {storage}
      resources:
        requests: {{cpu: {cpu}, memory: {memory}}}
        limits: {{cpu: {cpu}, memory: {memory}}}
"""


def write_kserve(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    storage_uri: str,
    name: str | None = None,
    max_batch: int = 16,
    wait_ms: float = 2.0,
    int8: bool = False,
    cpu: str = "2",
) -> Path:
    """Write `target`/inferenceservice.yaml and `target`/models, and return the YAML's path.

    storage_uri: where `models` will be copied to, as pvc://CLAIM/PATH. cpu: that the service gets.
    The memory it asks for is three times the graph's size and half a GiB. The rest is as for
    `write_triton`.
    Raises: ExportError for another kind of URI, and as `write_triton` does.
    """
    if not storage_uri.startswith(_SCHEMES):
        raise ExportError(
            "KServe can't fetch models from there",
            where="storage_uri",
            got=storage_uri,
            allowed=", ".join(_SCHEMES),
        )
    target = Path(target)
    with appearing(target) as part:
        model = write_triton(
            folder, part / "models", name=name, max_batch=max_batch, wait_ms=wait_ms, int8=int8
        )
        size = sum(file.stat().st_size for file in (model / "1").iterdir())
        text = _YAML.format(
            name=json.dumps(model.name),  # JSON's strings are YAML's
            storage=json.dumps(storage_uri),
            cpu=json.dumps(cpu),
            memory=json.dumps(f"{512 + 3 * size // 2**20}Mi"),
        )
        (part / "inferenceservice.yaml").write_text(text, encoding="utf-8")
    return target / "inferenceservice.yaml"
