"""What other packages make of the same models (`make bench-peers`).

Each runs in an environment of its own, made on this project's torch, by `peer_ways.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import machine, write
from parents import BERT_TINY, parent_folder
from peer_ways import WAYS, accuracy, named
from safetensors.torch import load_file, save_file

from slimfuse.batch import Batch
from slimfuse.families import FAMILIES
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.recipe import load_recipe

HERE, OUT = Path(__file__).parent, Path("runs/bench-peers")
TESTS, CALIBRATION = 2000, 256
NAME = "model.safetensors"


@dataclass(frozen=True)
class Environment:
    """Packages beside this project's: alone: without what they require; free: not held back."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


HUB = ("transformers", "tokenizers", "huggingface_hub", "peft", "datasets", "fsspec", "dill",
       "multiprocess", "pandas")  # fmt: skip
ENVIRONMENTS: Mapping[str, Environment] = {
    "now": Environment(
        ("nncf==3.4.0", "mergekit==0.1.5", "torch-kirigami==0.2.1", "optipfair==0.4.2",
         "lobotomizer==0.2.0", "sentence-transformers==6.2.0", "omegaconf==2.4.0", "pulp==3.3.2",
         "torchprofile==0.0.4",
         "wheel==0.48.0"),
        ("neural-compressor==3.10", "easysmallembeddingmodel==0.1.0", "textpruner==1.1.post2",
         "nn-pruning==0.1.2", "nvidia-modelopt==0.47.0"),
    ),
    "old": Environment(
        ("transformers==4.57.6", "wheel==0.48.0"), ("textpruner==1.1.post2", "nn-pruning==0.1.2"),
        HUB,
    ),
    "mct": Environment(
        ("model-compression-toolkit==2.6.1",),
        free=("networkx", "matplotlib", "pydantic", "pydantic_core"),
    ),
    "llm": Environment(("llmcompressor==0.14.0.1",), free=HUB),
}  # fmt: skip


PLAN: Mapping[str, tuple[str, ...]] = {
    "now": ("nncf", "neural-compressor", "torch-kirigami", "torch-kirigami, layers",
            "torch-kirigami, MLPs", "optipfair",
            "optipfair, depth", "lobotomizer", "easysmallembeddingmodel", "nvidia-modelopt",
            "textpruner", "nn-pruning", "mergekit", "mergekit, two widths"),
    "old": ("textpruner", "textpruner, MLPs", "nn-pruning"),
    "mct": ("model-compression-toolkit",),
    "llm": ("llmcompressor",),
}  # fmt: skip
Rows = dict[str, dict[str, Any]]
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A model: its recipe, its parents under runs/."""

    title: str
    recipe: Path
    parents: tuple[str, ...]


CASES = {
    "bert": Case(
        "BERT-tiny 2 × 128, WordNet", Path("recipes/bert/wordnet-minilm.yaml"),
        BERT_TINY,
    ),
    "vit": Case(
        "ViT 6 × 128, Fashion-MNIST", Path("recipes/vit/fashion-mnist.yaml"),
        ("zoo/fashion-0-a", "zoo/fashion-1-a"),
    ),
}  # fmt: skip


def python_of(name: str, folder: Path) -> Path:
    """Return the Python of an environment, making it where it isn't yet."""
    python = folder / name / "bin" / "python"
    if python.exists():
        return python
    wanted = ENVIRONMENTS[name]
    venv.create(folder / name, with_pip=True)
    site = next((folder / name / "lib").glob("python*")) / "site-packages"
    ours = sysconfig.get_paths()["purelib"]
    compat = (HERE.parent / "slimfuse" / "compat.py").resolve()  # lets torchvision be imported
    (site / "zz_ours.pth").write_text(
        f"import runpy, site, sys; site.addsitedir({ours!r}); 'mended' in vars(sys) or "
        f"setattr(sys, 'mended', runpy.run_path({str(compat)!r}))\n"
    )  # such a file is read twice
    held = folder / f"{name}.txt"
    held.write_text("".join(
        line + "\n" for line in Path("constraints.txt").read_text().splitlines()
        if line.partition("==")[0] not in wanted.free
    ))  # fmt: skip
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, "-c", held, *wanted.packages], check=True)
    if wanted.alone:
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", *wanted.alone], check=True)
    return python


def prepared(kind: str, parents: list[Path], out: Path) -> Path:
    """Return the folder of a case's samples, as what the model is called with."""
    folder = out / f"data-{kind}"
    if (folder / "test.safetensors").exists():
        return folder
    quiet()
    told = ", ".join(f"{{name: {n}, from: {p}}}" for n, p in zip("ab", parents, strict=True))
    overrides = (f"parents=[{told}]", "baselines=[]", "gates=[]",
                 f"data.limit={{train: {CALIBRATION}, test: {TESTS}}}")  # fmt: skip
    job = prepare(load_recipe(CASES[kind].recipe, overrides), CASES[kind].recipe)
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "calibration"), ("test", "test")):
        samples = job.samples(part)  # type: ignore[arg-type]
        inputs, labels = job.task.examples(samples, torch.arange(len(samples)), None)
        assert isinstance(inputs, Batch) and labels is not None
        tensors = {n: v.contiguous() for n, v in inputs.arguments.items()} | {"labels": labels}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def beside(way: str, kind: str, parents: list[Path], folder: Path) -> None:
    """Lay the second model of a merge where the way looks for it."""
    other = folder / "other"
    if not way.startswith("mergekit") or other.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if way == "mergekit":
        other.symlink_to(parents[1])
        return
    family = FAMILIES[kind]
    config = family.load(parents[0]).config
    config.hidden_size //= 2  # type: ignore[operator]
    family.build(config).save_pretrained(other)  # type: ignore[operator]


def loaded(said: dict[str, Any], model: Path, data: Path) -> None:
    """Note whether the stock class of this project's transformers loads a result as it is."""
    named = json.loads((model / "config.json").read_text())["architectures"][0]
    try:
        found, info = getattr(transformers, named).from_pretrained(model, output_loading_info=True)
    except Exception as error:  # whatever transformers raises is what is asked for
        said["loads"] = "no"
        said["loading"] = str(error).strip().splitlines()[0][:160]
        return
    said["loads"] = "no" if any(info.values()) else "yes"
    said["loading"] = {name: len(those) for name, those in info.items() if those}
    said["loaded accuracy"] = accuracy(found.eval(), load_file(data / "test.safetensors"))


def ran(kind: str, environment: str, parents: list[Path], arguments: argparse.Namespace) -> Rows:
    """Return what the ways of an environment said of a case, running those that haven't run yet."""
    ways = PLAN[environment]
    out, data = arguments.out / kind / environment, prepared(kind, parents, arguments.out)
    folders = {way: out / named(way) for way in ways}
    missing = [way for way, folder in folders.items() if not (folder / "said.json").exists()]
    if missing:
        for way in missing:
            beside(way, kind, parents, folders[way])
        python = python_of(environment, arguments.environments)
        subprocess.run(
            [python, HERE / "peer_ways.py", parents[0], data, out, *missing], check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
        )  # fmt: skip
    rows = {}
    for way, folder in folders.items():
        said = json.loads((folder / "said.json").read_text())
        if "accuracy" in said and "loads" not in said and (folder / "model").exists():
            loaded(said, folder / "model", data)
            (folder / "said.json").write_text(json.dumps(said, indent=1) + "\n")
        rows[way] = said
    return rows


def told(way: str, said: dict[str, Any]) -> str:
    """Return a row of the table."""
    package = WAYS[way][0]
    beside_it = f"transformers {said['versions']['transformers']}"
    first = f"| {way} | {said['versions'].get(package, '')} | {beside_it} "
    if "accuracy" not in said:
        return f"{first}| | | | | {said['failed']}: `{said['error'].replace('|', '/')}` |"
    share = said["parameters"] / said["parent"]["parameters"]
    loads = said.get("loads", f"not saved: `{said.get('error', '')}`")
    if loads == "no":
        why = said["loading"]
        loads += (
            f": {why}" if isinstance(why, str) else "".join(f", {n} {v}" for n, v in why.items())
        )
    loads += f", {100 * said['loaded accuracy']:.1f} %" if loads == "yes" else ""
    return (
        f"{first}| {said['stream']} | {100 * share:.0f} | {100 * said['zeros']:.0f} | "
        f"{100 * said['accuracy']:.1f} | {loads} |"
    )


def references(parents: list[Path], data: Path) -> Figures:
    """Return the accuracy of the parents and of the plain average of their weights."""
    architecture = json.loads((parents[0] / "config.json").read_text())["architectures"][0]
    load, test = getattr(transformers, architecture).from_pretrained, load_file(data)
    first, other = (load(p).eval() for p in parents)
    found = {"parent a": accuracy(first, test), "parent b": accuracy(other, test)}
    theirs = other.state_dict()
    first.load_state_dict({n: (v + theirs[n]) / 2 for n, v in first.state_dict().items()})
    return found | {"plain average": accuracy(first, test)}


def merged(parents: list[Path], file: Path) -> dict[str, float]:
    """Return how many tensors a linear merge has, of how many, and how far from the average."""
    first, other, merge = (load_file(f) for f in (*(p / NAME for p in parents), file))
    away = max(float((v - (first[n] + other[n]) / 2).abs().max()) for n, v in merge.items())
    return {"tensors": len(merge), "of the parent": len(first), "farthest from average": away}


def main() -> None:
    """Run what hasn't run yet and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the parents lie")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--environments", type=Path, default=OUT / "environments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    data: dict[str, Any] = {"machine": machine(), "tests": TESTS}
    lines = [
        "# Other packages on the same models", "",
        f"Accuracy in % on {TESTS:,} test samples, one-shot: no training after it, one model, one "
        f"try with a package's defaults at half of what it cuts; {CALIBRATION} labelled training "
        "samples where it asks for some. Stream: the width between the blocks, "
        "128 before. Left: parameters in % of the parent's, embeddings included. Zeros: % of the "
        "linear layers' weights. Loads: whether `from_pretrained` of the stock class in "
        f"transformers {transformers.__version__} takes what was saved without a missing, spare or "
        "misshapen tensor, and its accuracy then. Made by `make bench-peers`.", "",
    ]  # fmt: skip
    for kind, case in CASES.items():
        parents = [parent_folder(arguments.runs, p) for p in case.parents]
        rows = {e: ran(kind, e, parents, arguments) for e in PLAN}
        known = references(parents, arguments.out / f"data-{kind}" / "test.safetensors")
        merge = merged(parents, arguments.out / kind / "now" / "mergekit" / "model" / NAME)
        data[kind] = {"ways": rows, "references": known, "merge": merge}
        lines += [
            f"## {case.title}", "",
            ", ".join(f"{name} {100 * value:.1f}" for name, value in known.items())
            + f". Mergekit's linear merge has {merge['tensors']} of {merge['of the parent']} "
            f"tensors, at most {merge['farthest from average']:.1g} from the plain average.", "",
            "| way | version | beside | stream | left | zeros | accuracy | loads |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(told(way, said) for found in rows.values() for way, said in found.items()), "",
        ]  # fmt: skip
    lines += ["Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    write("peers-survey", data, "\n".join(lines))


if __name__ == "__main__":
    main()
