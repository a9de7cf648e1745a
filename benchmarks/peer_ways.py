"""Packages' ways to make a model smaller, run in an environment of theirs (see `peers_survey.py`).

`python benchmarks/peer_ways.py PARENT DATA OUT WAY…` imports nothing of slimfuse, so that it runs
beside an old transformers. Each way has a process of its own, and writes OUT/WAY/said.json, also
when it fails, and the model beside it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

Tensors = dict[str, torch.Tensor]
HALF = 0.5


class Given:
    """A parent, and its data as tensors.

    calibration, test: the model's arguments (samples, …) with `labels` (samples,).
    """

    def __init__(self, parent: Path, data: Path, out: Path) -> None:
        self.parent, self.out = parent, out
        kind = json.loads((parent / "config.json").read_text())["architectures"][0]
        self.kind: Any = getattr(transformers, kind)
        self.model = self.kind.from_pretrained(parent, attn_implementation="eager").eval()
        self.calibration = load_file(data / "calibration.safetensors")
        self.test = load_file(data / "test.safetensors")

    @property
    def main(self) -> str:
        """The name of the model's first argument."""
        return "pixel_values" if "pixel_values" in self.test else "input_ids"

    def example(self, count: int = 2) -> Tensors:
        """Return arguments of a few samples, without labels."""
        return {n: v[:count] for n, v in self.calibration.items() if n != "labels"}

    def batches(self, size: int = 32) -> Iterator[Tensors]:
        """Yield the calibration samples with their labels."""
        for start in range(0, len(self.calibration["labels"]), size):
            yield {n: v[start : start + size] for n, v in self.calibration.items()}


class OnlyLogits(nn.Module):
    """A model whose one argument and one answer are tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).logits


def textpruner(given: Given) -> Any:
    return _textpruner(given, given.model.config.num_attention_heads // 2)


def textpruner_ffn(given: Given) -> Any:
    """All heads stay, without which a stock class takes no result."""
    return _textpruner(given, given.model.config.num_attention_heads)


def _textpruner(given: Given, heads: int) -> Any:
    from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig

    pruner = TransformerPruner(
        given.model,
        TransformerPruningConfig(
            target_ffn_size=given.model.config.intermediate_size // 2,
            target_num_of_heads=heads,
            pruning_method="iterative",
            n_iters=4,
        ),
        GeneralConfig(use_device="cpu", output_dir=str(given.out)),
    )
    saved = Path(pruner.prune(dataloader=list(given.batches()), save_model=True))
    saved.rename(given.out / "model")
    return given.model


def nn_pruning(given: Given) -> Any:
    from nn_pruning.inference_model_patcher import optimize_model
    from nn_pruning.patch_coordinator import ModelPatchingCoordinator, SparseTrainingArguments

    arguments = SparseTrainingArguments(
        dense_pruning_method="topK:1d_alt",
        attention_pruning_method="topK",
        attention_block_rows=32,
        attention_block_cols=32,
        mask_init="constant",
        final_threshold=HALF,
    )
    coordinator = ModelPatchingCoordinator(arguments, "cpu", None, ["logits"], given.kind)
    coordinator.patch_model(given.model)
    coordinator.compile_model(given.model)
    return optimize_model(given.model, "dense")


def nncf(given: Given) -> Any:
    import nncf as package

    pruned = package.prune(
        given.model,
        mode=package.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL,
        ratio=HALF,
        examples_inputs=given.example(),
    )
    return package.strip(pruned, strip_format=package.StripFormat.IN_PLACE)


def neural_compressor(given: Given) -> Any:
    from neural_compressor.training import WeightPruningConfig, prepare_compression

    return prepare_compression(given.model, WeightPruningConfig(target_sparsity=HALF))


def model_compression_toolkit(given: Given) -> Any:
    import model_compression_toolkit as mct

    wrapped = OnlyLogits(given.model)
    size = sum(p.numel() for p in wrapped.parameters()) * 4
    first = given.example()[given.main]
    pruned, _ = mct.pruning.pytorch_pruning_experimental(
        model=wrapped,
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=size * HALF),
        representative_data_gen=lambda: iter([[first.numpy()]]),
    )
    return pruned


def llmcompressor(given: Given) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    data = Dataset.from_dict({n: v.tolist() for n, v in given.example(256).items()})
    oneshot(
        model=given.model,
        dataset=data.with_format("torch"),
        recipe=SparseGPTModifier(sparsity=HALF, targets=["Linear"], ignore=["re:.*classifier"]),
        num_calibration_samples=len(data),
        max_seq_length=32,
    )
    return given.model


def torch_kirigami(given: Given) -> Any:
    return _kirigami(given.model, given.example())


def torch_kirigami_layers(given: Given) -> Any:
    """Layer by layer."""
    stream = torch.randn(2, 9, given.model.config.hidden_size)
    for layer in _layers(given.model):
        _kirigami(layer, {"hidden_states": stream})
    return given.model


def torch_kirigami_mlps(given: Given) -> Any:
    """MLP by MLP, without the residuals around them."""
    config = given.model.config
    stream = torch.randn(2, 9, config.hidden_size)
    for layer in _layers(given.model):
        if hasattr(layer, "mlp"):
            _kirigami(layer.mlp, {"hidden_states": stream})
        else:
            _kirigami(nn.Sequential(layer.intermediate, layer.output.dense), {"input": stream})
    config.intermediate_size //= 2
    return given.model


def _layers(model: nn.Module) -> list[Any]:
    return [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1].isdigit()]


def _kirigami(model: nn.Module, example: Tensors) -> Any:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    graph = DependencyGraph.build(model, kwargs=dict(example))
    pruner = Pruner(model, graph=graph)
    pruned, _ = pruner.prune(
        pruner.discover_candidates(), budget=ChannelRatio(HALF), strategy=Greedy(GroupMagnitude())
    )
    return pruned


def optipfair_width(given: Given) -> Any:
    from optipfair import prune_model

    return prune_model(given.model, pruning_type="MLP_GLU", pruning_percentage=100 * HALF)


def optipfair_depth(given: Given) -> Any:
    from optipfair import prune_model

    inner = getattr(
        given.model, given.model.base_model_prefix
    )  # the layers aren't found from above
    prune_model(inner, pruning_type="DEPTH", depth_pruning_percentage=100 * HALF)
    return given.model


def lobotomizer(given: Given) -> Any:
    from lobotomizer import Pipeline
    from lobotomizer.stages.structured_prune import StructuredPrune

    return Pipeline([StructuredPrune(HALF)]).run(given.model).model


def nvidia_modelopt(given: Given) -> Any:
    import modelopt.torch.prune as mtp

    model, _ = mtp.prune(
        given.model,
        mode="fastnas",
        constraints={"params": "50%"},
        dummy_input=given.example()[given.main],
        config={
            "data_loader": list(given.batches()),
            "score_func": lambda m: 100 * accuracy(m, given.calibration),
            "checkpoint": str(given.out / "search.pth"),
        },
    )
    return model


def smallmodel(given: Given) -> Any:
    """It reduces encoders without a head: the head keeps the same first coordinates here."""
    from smallmodel.arch import reduce_hidden_dim

    prefix = given.model.base_model_prefix
    width = given.model.config.hidden_size // 2
    inner = reduce_hidden_dim(getattr(given.model, prefix), width, round(HALF * _wide(given)))
    config = inner.config
    whole = given.kind(config).eval()
    found = getattr(whole, prefix).load_state_dict(inner.state_dict(), strict=False)
    assert not found.missing_keys, found.missing_keys
    with torch.no_grad():
        whole.classifier.weight.copy_(given.model.classifier.weight[:, :width])
        whole.classifier.bias.copy_(given.model.classifier.bias)
    return whole


def _wide(given: Given) -> int:
    return int(given.model.config.intermediate_size)


def mergekit(given: Given) -> Any:
    """The linear merge, half and half, of the parent and of the one beside it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    other = (given.out / "other").resolve()
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": str(folder), "parameters": {"weight": HALF}}
            for folder in (given.parent.resolve(), other)
        ],
    }
    run_merge(MergeConfiguration.model_validate(recipe), str(given.out / "model"), MergeOptions())
    return given.kind.from_pretrained(given.out / "model").eval()


WAYS: dict[str, tuple[str, Callable[[Given], Any]]] = {
    "textpruner": ("textpruner", textpruner),
    "textpruner, MLPs": ("textpruner", textpruner_ffn),
    "nn-pruning": ("nn-pruning", nn_pruning),
    "nncf": ("nncf", nncf),
    "neural-compressor": ("neural-compressor", neural_compressor),
    "model-compression-toolkit": ("model-compression-toolkit", model_compression_toolkit),
    "llmcompressor": ("llmcompressor", llmcompressor),
    "torch-kirigami": ("torch-kirigami", torch_kirigami),
    "torch-kirigami, layers": ("torch-kirigami", torch_kirigami_layers),
    "torch-kirigami, MLPs": ("torch-kirigami", torch_kirigami_mlps),
    "optipfair": ("optipfair", optipfair_width),
    "optipfair, depth": ("optipfair", optipfair_depth),
    "lobotomizer": ("lobotomizer", lobotomizer),
    "nvidia-modelopt": ("nvidia-modelopt", nvidia_modelopt),
    "easysmallembeddingmodel": ("easysmallembeddingmodel", smallmodel),
    "mergekit": ("mergekit", mergekit),
    "mergekit, two widths": ("mergekit", mergekit),
}
"""Each way with its package's name."""


@torch.no_grad()
def accuracy(model: nn.Module, data: Tensors) -> float:
    """Return the share of samples whose label a model says."""
    right, labels = 0, data["labels"]
    for start in range(0, len(labels), 100):
        part = {n: v[start : start + 100] for n, v in data.items() if n != "labels"}
        said = model(*part.values()) if len(part) == 1 else model(**part)
        logits = said if isinstance(said, torch.Tensor) else said.logits
        right += int((logits.argmax(-1) == labels[start : start + 100]).sum())
    return right / len(labels)


def shape(model: nn.Module) -> dict[str, Any]:
    """Return what a model has left: parameters, zeros and the widths of its layers."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = [m.weight for m in layers.values()]
    stream = next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).weight
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "stream": stream.numel(),
        "layers": sorted({f"{m.in_features} to {m.out_features}" for m in layers.values()}),
    }


def reason(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def named(way: str) -> str:
    """Return the name of a way's folder."""
    return way.replace(", ", "-").replace(" ", "-")


def versions(package: str) -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    try:
        return {package: version(package)} | found
    except PackageNotFoundError:
        return found


def one(way: str, parent: Path, data: Path, out: Path) -> None:
    """Run one way and write down what it gave."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    package, run = WAYS[way]
    given = Given(parent, data, out)
    said: dict[str, Any] = {"versions": versions(package), "parent": shape(given.model)}
    step = "runs"
    try:
        model = run(given)
        said |= shape(model)
        step = "answers"
        said["accuracy"] = accuracy(model.eval(), given.test)
        step = "saves"
        if not (out / "model").exists():
            model.save_pretrained(out / "model")
    except Exception as error:  # whatever a package raises is what is asked for
        traceback.print_exc()
        said |= {"failed": step, "error": reason(error)}
    (out / "said.json").write_text(json.dumps(said, indent=1) + "\n")


def main() -> None:
    """Run the ways one after the other, each in a fork: packages change what they import."""
    parent, data, out = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    for way in sys.argv[4:]:
        print(f"== {way}", flush=True)
        child = os.fork()
        if not child:
            one(way, parent, data, out / named(way))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
