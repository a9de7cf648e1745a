"""What a run of plain nets will make and need, before any work."""

from __future__ import annotations

from slimfuse.nets import Config
from slimfuse.pipeline.nets_job import NetJob
from slimfuse.pipeline.planning import (
    RUNTIME_BYTES,
    Plan,
    Planned,
    child_steps,
    disk_bytes,
    steps_for,
    zeros_disk,
    zeros_memory,
    zeros_notes,
)

DOUBLE, FLOAT = 8, 4


def plan_nets(job: NetJob) -> Plan:
    """Return the plan of a job; counts are exact, memory and disk are estimates."""
    recipe = job.recipe
    needed = (*job.parents, *([job.anchor] if job.anchor and job.moves else []))
    models = [_planned(job, p.name, p.config, steps_for(job, p)) for p in needed]
    models.append(_planned(job, "child", job.target, child_steps(job)))
    largest = max(m.bytes for m in models)
    sizes = [job.family.footprint(p.config).activations for p in needed]
    batches = [p.train.batch_size for p in needed if p.train is not None]
    # a step keeps what the layers make, and what the way back makes of it
    training = 4 * largest + 2 * FLOAT * max(sizes) * max([recipe.finetune.batch_size, *batches])
    widths = [w for p in needed for w in p.config.widths]
    # all nets' rows of a batch, and the moments of every pair of spaces
    rows = DOUBLE * recipe.fuse.batch_size * sum(sizes)
    fusing = 4 * sum(m.bytes for m in models) + rows + 3 * DOUBLE * sum(w**2 for w in widths)
    spec, child = recipe.sparsify, models[-1].bytes
    peak = max(fusing, training, 6 * largest, zeros_memory(spec, child))
    memory = RUNTIME_BYTES + job.opened.cached_bytes + peak
    disk = disk_bytes(models) + zeros_disk(spec, child)
    return Plan(tuple(models), memory, disk, None, False, zeros_notes(spec))


def _planned(job: NetJob, name: str, config: Config, steps: int) -> Planned:
    cost = job.family.footprint(config)
    shape = str(job.family.shape(config))
    return Planned(name, shape, cost.params, cost.flops, FLOAT * cost.params, steps)
