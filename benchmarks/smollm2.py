"""SmolLM2-135M (Llama, grouped queries) to two thirds of its width: perplexity, memory, ONNX text.

Controls: a random start and a truncated one (subclone) with the same teacher and budget.
`--memory` runs the fuse alone, in a process of its own, and tells its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, write

from slimfuse.pipeline.deployment import Deployment
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

RECIPE = Path(__file__).parents[1] / "recipes" / "llama" / "smollm2.yaml"
STARTS = {"fused": "fused", "subclone": "truncated", "random-start": "random"}
RATES = {"fused": None, "subclone": 3e-4, "random-start": 1e-3}
"""Rates of finetuning; a start that is far from its goal needs a higher one than the recipe's."""
PROMPTS = ("The people who", "In the history of the", "A free society", "Work is")
TOKENS = 32
MEMORY = "Peak memory of the fuse"


def job_of(origin: str, changes: tuple[str, ...]) -> Job:
    """Return the recipe's job with the parent in a folder."""
    job = prepare(
        load_recipe(RECIPE, (f"parents.0.from={origin}", "baselines=[]", *changes)), RECIPE
    )  # type: ignore[arg-type]
    torch.set_num_threads(job.threads)
    return job


def fuse(origin: str, changes: tuple[str, ...], out: Path) -> None:
    """Make the fused model in `out`, which later runs find there."""
    job, store = job_of(origin, changes), Store(out)
    store.check_ours()
    with store.lock():
        Stages(job, store).start("fused")


def fuse_alone(arguments: argparse.Namespace, changes: tuple[str, ...]) -> tuple[float, float]:
    """Return the peak memory in GiB and the seconds of a fuse in a process of its own."""
    begun = time.monotonic()
    command = [sys.executable, __file__, "--memory", "--parent", arguments.parent]
    command += ["--out", str(arguments.out), *(w for c in changes for w in ("--set", c))]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = next(line for line in told.splitlines() if line.startswith(MEMORY))
    return float(peak.split(":")[1].split()[0]), time.monotonic() - begun


def generated(folder: Path, onnx: Path, threads: int) -> tuple[int, int, list[str]]:
    """Return in how many prompts onnxruntime and transformers write the same 32 tokens, of all."""
    import onnxruntime as ort
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(onnx), options)
    same, texts = 0, []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            wanted = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                eos_token_id=None,
            )[0].numpy()  # fmt: skip
        ids = inputs["input_ids"].numpy()
        for _ in range(TOKENS):
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            logits = session.run(["logits"], given)[0]
            ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
        same += int(np.array_equal(ids[0], wanted))
        texts.append(tokenizer.decode(wanted))
    return same, len(PROMPTS), texts


def main() -> None:
    """Measure and write benchmarks/results/smollm2.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default="runs/zoo/smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-smollm2"))
    parser.add_argument("--set", action="append", default=[], help="change of the recipe")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    quiet()
    arguments.parent = str(Path(arguments.parent).resolve())
    changes = tuple(arguments.set)
    if arguments.memory:
        fuse(arguments.parent, changes, arguments.out)
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        print(f"{MEMORY}: {int(peak.split()[1]) / 2**20:.2f} GiB")
        return
    fresh = not any(arguments.out.glob("stages/fused-*"))
    peak, seconds = fuse_alone(arguments, changes)
    job, store = job_of(arguments.parent, changes), Store(arguments.out)
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    content: dict[str, Any] = {"rows": rows, "conditions": machine()}
    if fresh:
        content["fuse"] = {"peak_gib": peak, "seconds": seconds}

    def note(name: str, stages: Stages, evidence: dict[str, torch.Tensor]) -> None:
        found = stages.figures(evidence)
        rows[name] = {key: (one.value, one.low, one.high) for key, one in found.items()}
        print(name, rows[name], flush=True)
        (RESULTS / "smollm2.json").write_text(json.dumps(content, indent=1) + "\n")

    with store.lock():
        stages = Stages(job, store)
        note("parent", stages, stages.outputs(job.parents[0]).test)
        for start, name in STARTS.items():
            note(f"{name}, before", stages, stages.evidence(stages.start(start)))
        for start, name in STARTS.items():
            rate = RATES[start]
            own = stages
            if rate is not None:
                changed = (*changes, f"finetune.lr={rate}")
                own = Stages(job_of(arguments.parent, changed), store, stages.shared)
            tuned = own.finetune(start)
            note(f"{name}, finetuned", own, own.evidence(tuned))
        tuned = stages.finetune("fused")
        exported, gap = Deployment(stages).export("child", tuned.path, tuned.key)
        same, count, texts = generated(tuned.path, exported.path / "model.onnx", job.threads)
    steps, length = stages.tuning.schedule.steps, job.opened.tokens(job.target)
    content["onnx"] = {"same": same, "prompts": count, "tokens": TOKENS, "parity": gap}
    content["texts"] = texts
    content["budget"] = {
        "rate": job.recipe.finetune.lr,
        "steps": steps,
        "tokens": steps * job.recipe.finetune.batch_size * length,
        "calibration": job.recipe.data.calibration.samples,
        "test_tokens": job.count("test") * (length - 1),
        "target": str(job.family.shape(job.target)),
        "threads": job.threads,
        "precision": job.precision,
    }
    write("smollm2", content, markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """Return the table."""
    budget = content["budget"]
    rates = ", ".join(f"{name} {RATES[s] or budget['rate']:g}" for s, name in STARTS.items())
    lines = [
        f"# SmolLM2-135M to {budget['target']}",
        "",
        f"Perplexity on {budget['test_tokens']:,} held-out tokens of English prose (95 % interval "
        f"over blocks, bootstrap), one seed. Finetuning: {budget['steps']} steps, "
        f"{budget['tokens']:,} tokens, the parent as teacher; the same for all starts but for the "
        f"rate ({rates}).",
        "",
        "| model | perplexity | right guesses |",
        "| --- | --- | --- |",
    ]
    for name, found in content["rows"].items():
        value, low, high = found["perplexity"]
        hits = found["token_accuracy"][0]
        lines.append(f"| {name} | {value:.4g} ({low:.4g} – {high:.4g}) | {hits:.1%} |")
    onnx = content["onnx"]
    lines += [
        "",
        f"ONNX: {onnx['same']} of {onnx['prompts']} prompts continue with the same "
        f"{onnx['tokens']} greedy tokens in onnxruntime as in transformers; largest difference of "
        f"logits {onnx['parity']:.1e}.",
    ]
    if "fuse" in content:
        fused = content["fuse"]
        lines += [
            "",
            f"Peak memory of the fuse in a process of its own: {fused['peak_gib']:.2f} GiB, "
            f"{fused['seconds']:.0f} s with the opening of parent and data.",
        ]
    told = "; ".join(f"{k} {v}" for k, v in content["conditions"].items())
    return "\n".join([*lines, "", f"Conditions: {told}; threads {budget['threads']}.", ""])


if __name__ == "__main__":
    main()
