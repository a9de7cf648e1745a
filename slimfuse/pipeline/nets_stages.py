"""What the stages of plain nets make: pruned parents, and the starts of finetuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.nets import Classifier, NetFusion, fuse_nets, prune, reestimate, vanilla
from slimfuse.pipeline.common import ParentJob
from slimfuse.pipeline.fusion_record import save_fusion
from slimfuse.pipeline.nets_job import NetJob, NetParentJob
from slimfuse.pipeline.stages import BaseStages, config_values
from slimfuse.pipeline.starts import solver_of
from slimfuse.store import Stage
from slimfuse.tasks.image_classification import PIXELS

Record = dict[str, Any]


class NetStages(BaseStages):
    """The stages of a job of plain nets."""

    job: NetJob

    def parent(self, parent: ParentJob) -> tuple[Path, str]:
        """Return a parent's folder and what its content is known by, making it if asked."""
        cut = parent.pruned if isinstance(parent, NetParentJob) else None
        if cut is None:
            return super().parent(parent)
        dense, key = self.parent(next(p for p in self.job.parents if p.name == cut.of))
        inputs = self.base | {
            "pruned": cut.model_dump(mode="json"), "dense": key, "precision": self.job.precision,
        }  # fmt: skip

        def build(folder: Path) -> None:
            net = prune(self._net(dense), self.job.family.example, cut.ratio)
            model = Classifier(net, parent.config)
            if cut.train is None:
                self.save(model, folder)
            else:
                self.train(model, cut.train, folder, parent)

        stage = self.store.stage(f"parent-{parent.name}", inputs, build, together=True)
        return stage.path, stage.key

    def start(self, kind: str) -> Stage:
        """Return the model that finetuning starts from: `fused`, or a baseline by its row name."""
        job, recipe, method = self.job, self.job.recipe, self.method(kind)
        nets = {"vanilla": job.fused, "unfused": (job.base,), "ot": (*job.moved, job.base)}
        used = [(p, *self.parent(p)) for p in nets.get(method, ())]
        inputs = self.base | {
            "target": config_values(job.target),
            "method": method,
            "nets": [[p.name, p.weight, key] for p, _, key in used],
            "seed": recipe.runtime.seed,
        }
        if method in ("ot", "vanilla"):
            settings = {"recalibrate", "batch_size", *({"ot"} if method == "ot" else ())}
            inputs["fuse"] = recipe.fuse.model_dump(mode="json", include=settings)
            inputs["calibration"] = recipe.data.calibration.model_dump(mode="json")

        def build(folder: Path) -> None:
            torch.manual_seed(recipe.runtime.seed)
            model = job.family.build(job.target)
            assert isinstance(model, Classifier)
            loaded = [self._net(path) for _, path, _ in used]
            weights = [p.weight for p, _, _ in used]
            record = STARTS[method](self, model.net, loaded, weights)
            save_fusion(record | {"method": method}, folder)
            self.save(model, folder)

        return self.store.stage(kind, inputs, build)

    def batches(self) -> list[Tensor]:
        """Return the calibration images in batches."""
        samples, chunks = self.calibration()
        return [samples[chunk].arguments[PIXELS] for chunk in chunks]

    def _net(self, folder: Path) -> nn.Module:
        model = self.job.family.load(folder)
        assert isinstance(model, Classifier)
        return model.net


def _by_transport(
    stages: NetStages, target: nn.Module, nets: list[nn.Module], weights: list[float]
) -> Record:
    """Move all nets to the last one's units and average."""
    fuse, job = stages.job.recipe.fuse, stages.job
    fusion = fuse_nets(
        nets[:-1], nets[-1], target, stages.batches(), solver=solver_of(fuse.ot),
        cost=fuse.ot.cost, weights=weights, recalibrate=fuse.recalibrate,
    )  # fmt: skip
    return transported(fusion, [p.name for p in job.moved], job.base.name)


def _by_average(
    stages: NetStages, target: nn.Module, nets: list[nn.Module], weights: list[float]
) -> Record:
    """Average parameters of equal shape as they stand."""
    vanilla(nets, target, weights)
    if stages.job.recipe.fuse.recalibrate:
        reestimate(target, stages.batches())
    return {}


def _by_copy(
    stages: NetStages, target: nn.Module, nets: list[nn.Module], weights: list[float]
) -> Record:
    """Take the anchor as it is: what it is worth without the others."""
    target.load_state_dict(nets[0].state_dict())
    return {}


def _at_random(
    stages: NetStages, target: nn.Module, nets: list[nn.Module], weights: list[float]
) -> Record:
    """Leave the target as it was initialised."""
    return {}


STARTS: dict[str, Callable[[NetStages, nn.Module, list[nn.Module], list[float]], Record]] = {
    "ot": _by_transport,
    "vanilla": _by_average,
    "unfused": _by_copy,
    "random": _at_random,
}


def transported(fusion: NetFusion, moved: list[str], base: str) -> Record:
    """Return what every transport map says of itself, and the shares of the average."""
    maps = [
        {
            "parent": parent, "name": space.removeprefix("units.").replace(".", " "),
            "effective_units": one.effective_units, "entropy": one.entropy,
            "marginal_error": one.marginal_error, "converged": one.converged,
        }
        for parent, found in zip(moved, fusion.maps, strict=True)
        for space, one in found.items()
    ]  # fmt: skip
    *shares, own = fusion.weights
    return {"parents": [base, *moved], "weights": [own, *shares], "maps": maps}
