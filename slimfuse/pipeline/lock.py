"""What a run depends on, as recipe.lock.yaml holds it, and what of that its files carry."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from slimfuse_export import Provenance

from slimfuse import __version__
from slimfuse.pipeline.common import BaseJob, ParentJob

HIDDEN = "…/"  # before the last name of a path of the machine that made the lock


def lock_text(job: BaseJob) -> str:
    """Return what recipe.lock.yaml holds."""
    return dumped(lock_of(job))


def dumped(values: dict[str, Any]) -> str:
    """Return plain values as YAML in blocks."""
    import io

    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(values, text)
    return text.getvalue()


def lock_of(job: BaseJob) -> dict[str, Any]:
    """Return everything a run depends on: the full recipe, versions, digests of the inputs."""
    return {
        "slimfuse": __version__,
        "recipe": without_machine_paths(job.recipe.to_lock()),
        "resolved": {
            "threads": job.threads,
            "precision": job.precision,
            "target": {k: getattr(job.family.shape(job.target), k) for k in _shape_keys(job)},
        },
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in (*job.libraries, "onnxruntime")},
        },
        "sha256": {
            "data": job.data.fingerprint,
            "parents": {
                p.name: p.sha256
                for p in (*job.parents, job.anchor)
                if p is not None and p.sha256 is not None
            },
        },
    }


def without_machine_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keep the last name of absolute paths: what they hold is known by its sha256."""
    for place, key in origins_in(recipe).values():
        path = Path(place[key] or "")
        if path.is_absolute() or path.parts[:1] == ("~",):
            place[key] = f"{HIDDEN}{path.name}"
    return recipe


def origins_in(recipe: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return where a locked recipe says that something is: by its key, the mapping and its key."""
    found = {f"data.{key}": (recipe["data"], key) for key in ("path", "tokenizer")}
    for i, parent in enumerate(recipe["parents"]):
        found[f"parents.{i}.from"] = (parent, "from")
        if (train := parent.get("train")) and train.get("start"):
            found[f"parents.{i}.train.start"] = (train, "start")
    protect = recipe["finetune"].get("protect") or {}
    if protect.get("data"):
        found["finetune.protect.data.path"] = (protect["data"], "path")
    for home, key in ((recipe["fuse"], "fuse"), (recipe["fuse"]["ot"], "fuse.ot")):
        if home.get("anchor") is not None:
            found[f"{key}.anchor.from"] = (home["anchor"], "from")
    return found


def _shape_keys(job: BaseJob) -> list[str]:
    return list(job.family.shape(job.target).__dataclass_fields__)


def provenance(job: BaseJob) -> Provenance:
    """Return what the ONNX files say of where the model comes from.

    The recipe is known by the sha256 of recipe.lock.yaml, a parent by that of its weights.
    """
    return Provenance(
        recipe=hashlib.sha256(lock_text(job).encode()).hexdigest(),
        parents={parent.name: _origin(parent) for parent in job.parents},
        licences={name: one.name for name, one in job.licences.found.items()},
    )


def _origin(parent: ParentJob) -> str:
    weights = f"sha256:{parent.sha256}" if parent.sha256 is not None else ""
    if parent.train is None:
        return weights
    return f"trained by the recipe, from {weights}" if weights else "trained by the recipe"
