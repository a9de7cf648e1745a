"""`diagnose`: tables of saved models, or of a recipe's parents and child."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from slimfuse.errors import UserError, first_line
from slimfuse.families import TASK_FAMILIES
from slimfuse.pipeline.diagnosing import Diagnosing, subject
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.run import prepared, quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import Recipe, load_located
from slimfuse.recipe.diagnosing import Diagnose
from slimfuse.recipe.inputs import READY
from slimfuse.recipe.matching import IMAGE_FAMILIES
from slimfuse.report import Finding
from slimfuse.store import Store

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "masked-lm", "ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm",
}  # fmt: skip
"""Tasks by the ends of stock classes' names."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Diagnosis:
    """What was found: tables that each end in a decision."""

    tables: tuple[Finding, ...]


def diagnose(
    *models: str | Path,
    data: str | None = None,
    family: str | None = None,
    task: str | None = None,
    samples: int = 64,
    probes: int = 1,
    seconds: float = 300.0,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    out: str | Path | None = None,
) -> Diagnosis:
    """Diagnose saved models, or a recipe's parents and its finished child.

    models: one recipe; or folders or hub ids, the parent first: others are compared with it, and
    what stays in float is of the last. data: a source's name, or a folder with splits; family,
    task: read from config.json where left out. samples, probes, seconds: what each table may look
    at, and the time of all. overrides, out: of a recipe, see `compress`.
    Raises UserError for bad input.
    """
    quiet()
    spec = _spec(samples, probes, seconds, seed)
    if not models:
        raise UserError("nothing to diagnose", where="MODEL", allowed="a recipe, or saved models")
    recipe = Path(models[0])
    if recipe.suffix in SUFFIXES:
        given = {"--data": data, "--family": family, "--task": task}
        odd = [name for name, value in given.items() if value is not None]
        if odd or len(models) > 1:
            raise UserError(
                "a recipe stands alone", where=str(recipe),
                got=", ".join((*odd, *map(str, models[1:]))), allowed="--set, --out, --samples …",
            )  # fmt: skip
        return _of_recipe(recipe, spec, overrides, out)
    told = [*(("--set",) if overrides else ()), *(("--out",) if out is not None else ())]
    if told:
        raise UserError(
            "saved models have no recipe to change", where="MODEL", got=", ".join(told),
            hint="leave them out, or diagnose a recipe",
        )  # fmt: skip
    job = prepare(_recipe_of([str(m) for m in models], data, family, task), Path("diagnose.yaml"))
    torch.set_num_threads(job.threads)
    found = [subject(job, p.name, cast(Path, p.folder)) for p in job.parents]
    return Diagnosis(Diagnosing(job, spec, found).tables())


def _spec(samples: int, probes: int, seconds: float, seed: int) -> Diagnose:
    from pydantic import ValidationError

    try:
        return Diagnose(samples=samples, probes=probes, seconds=seconds, seed=seed)
    except ValidationError as error:
        one = error.errors()[0]
        where = f"--{one['loc'][0]}"
        raise UserError(
            "out of range", where=where, got=one["input"], allowed=one["msg"]
        ) from error


def _of_recipe(
    path: Path, spec: Diagnose, overrides: tuple[str, ...], out: str | Path | None
) -> Diagnosis:
    loaded = load_located(path, overrides)
    job = prepared(loaded, path)
    if not isinstance(job, Job):
        raise UserError(
            "plain nets have no such tables", where="family", got=loaded.recipe.family,
            allowed="a declared family",
        )  # fmt: skip
    torch.set_num_threads(job.threads)
    root = Path(out) if out is not None else Path("runs") / job.recipe.name
    store = Store(root)
    store.check_ours()
    with store.lock():
        stages = Stages(job, store)
        found = [subject(job, p.name, stages.parent(p)[0]) for p in job.parents]
        if (root / "model" / "model.safetensors").is_file():
            found.append(subject(job, "child", root / "model"))
        return Diagnosis(Diagnosing(job, spec, found).tables())


def _recipe_of(
    models: Sequence[str], data: str | None, family: str | None, task: str | None
) -> Recipe:
    """Return a recipe that opens some models and data."""
    config = _config(models[0])
    family = family or str(config.get("model_type", "")).replace("_", "-")
    task = task or _task(config)
    if data is None:
        raise UserError("no data", where="--data", allowed=f"a folder, or {', '.join(READY)}")
    source: dict[str, Any] = {"source": data}
    if data not in READY:
        if not Path(data).is_dir():
            raise UserError(
                "no such data", where="--data", got=data,
                allowed=f"a folder with train and test, or {', '.join(READY)}",
            )  # fmt: skip
        kind = "imagefolder" if family in IMAGE_FAMILIES else "textfolder"
        source = {"source": kind, "path": str(Path(data).resolve())}
    if not family and not task:  # neither a config told them nor flags
        raise UserError(
            "no model here", where="MODEL", got=models[0], allowed="a folder with config.json",
            hint="of a hub id say --family and --task",
        )  # fmt: skip
    if task not in TASK_FAMILIES or family not in TASK_FAMILIES[task]:
        known = "; ".join(f"{t}: {', '.join(f)}" for t, f in TASK_FAMILIES.items())
        raise UserError(
            "no such model and task", where="--family, --task", got=f"{family}, {task}",
            allowed=known,
        )  # fmt: skip
    names = ["parent", *(f"child-{i}" if len(models) > 2 else "child"
             for i in range(1, len(models)))]  # fmt: skip
    places = [{"name": n, "from": _place(m)} for n, m in zip(names, models, strict=True)]
    return Recipe.model_validate(
        {
            "version": 1, "name": "diagnose", "family": family, "task": task, "data": source,
            "parents": places, "target": {},
            "fuse": {"method": "keep", "parents": [names[0]]}, "baselines": [],
            "finetune": {"epochs": 0.0},
        }
    )  # fmt: skip


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _config(model: str) -> dict[str, Any]:
    """Return what a folder's config.json says, nothing of a hub id."""
    file = Path(model) / "config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError("not a config", where=str(file), got=first_line(error)) from error
    return found


def _task(config: dict[str, Any]) -> str | None:
    name = next(iter(config.get("architectures") or ()), "")
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)
