"""The service under load, and under requests that are wrong (`bench-serving`)."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import machine, settle, write
from serving_client import Load, Malformed, load, once, picture, request, serving, uploaded
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimfuse.batch import Batch
from slimfuse.families import Bert, Shape, ViT
from slimfuse.onnx import export_onnx
from slimfuse.pipeline.comparison import interval
from slimfuse.tasks import TASKS
from slimfuse.tasks.image_classification import make_processor

# half of MiniLM-L6, as its recipe makes it; random weights, since time does not depend on them
TEXTS = Shape(192, 6, 768, 6)
IMAGES = Shape(32, 4, 64, 4)
WORDS, LENGTHS = 2000, (4, 28)
BATCH, WAIT_MS = 16, 2.0
AT_ONCE = 16  # malformed requests under way
WARM = 1000  # of them, before memory is looked at: pools and caches fill up
FLAT = 1.1  # memory that counts as flat, of what it was
WANTED = 1.5  # throughput with batching over that without


def save_texts(folder: Path) -> None:
    """Save a BERT that sorts texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    kept = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    )
    config = Bert().new_config(
        TEXTS, vocab_size=len(words), positions=128, labels=["a", "b", "c", "d"]
    )
    model: Any = Bert().build(config, attention="eager").eval()
    model.save_pretrained(folder)
    TASKS["text-classification"].save(kept, folder)
    example = Batch(dict(kept(["w1 w2", "w3 w4 w5"], padding=True, return_tensors="pt")))
    (folder / "onnx").mkdir()
    export_onnx(Bert().stock_form(model), example, folder / "onnx" / "model.onnx", opset=20)


def save_images(folder: Path) -> None:
    """Save a ViT of the quickstart's shape."""
    config = ViT().new_config(IMAGES, patch_size=2, image_size=8, labels=list("0123456789"))
    model: Any = ViT().build(config, attention="eager").eval()
    model.save_pretrained(folder)
    make_processor(8, [0.3] * 3, [0.4] * 3).save_pretrained(folder)
    (folder / "onnx").mkdir()
    example = Batch({"pixel_values": torch.randn(2, 3, 8, 8)})
    export_onnx(ViT().stock_form(model), example, folder / "onnx" / "model.onnx", opset=20)


def texts(count: int = 512) -> list[bytes]:
    """Return requests of one text each, of different lengths."""
    drawn = random.Random(0)
    bodies = [
        {"inputs": " ".join(f"w{drawn.randrange(WORDS)}" for _ in range(drawn.randint(*LENGTHS)))}
        for _ in range(count)
    ]
    return [request("/predict", json.dumps(body).encode()) for body in bodies]


def measure(
    folder: Path, clients: int, seconds: float, rounds: int, threads: int
) -> dict[str, list[Load]]:
    """Ask a service with batching and one without in turns, each `seconds` in all."""
    ways = {"batching": str(BATCH), "one by one": "1"}
    raws = texts()
    found: dict[str, list[Load]] = {way: [] for way in ways}
    common = ("--threads", str(threads), "--max-wait-ms", str(WAIT_MS), "--max-queue", "1024")
    for turn in range(rounds):
        order = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for way in order:  # one service at a time: an idle one would still hold memory and threads
            with serving(folder, *common, "--max-batch", ways[way]) as service:
                asyncio.run(load(service.port, raws, clients, min(1.0, seconds)))  # warm
                each = asyncio.run(load(service.port, raws, clients, seconds / rounds))
                found[way].append(each)
                print(f"{way}: {each.rate:.0f} answers/s, {each.errors} errors")
    return found


async def misuse(port: int, count: int, seed: int, *, images: bool) -> Counter[tuple[str, int]]:
    """Send malformed requests, some at once, and return how many of each kind got which status."""
    made, found = Malformed(seed, images=images), Counter[tuple[str, int]]()
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            kind, raw = made.draw()
            found[kind, await once(port, raw)] += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return found


def endure(folder: Path, count: int, *, images: bool) -> dict[str, Any]:
    """Send a service malformed requests; return statuses, memory, and whether it still answers."""
    with serving(folder) as service:
        good = request("/predict/images", *uploaded(picture())) if images else texts(1)[0]
        assert asyncio.run(once(service.port, good)) == 200
        asyncio.run(misuse(service.port, min(WARM, count), 1, images=images))
        before = service.megabytes
        found = asyncio.run(misuse(service.port, count, 2, images=images))
        after = service.megabytes
        alive = asyncio.run(once(service.port, good)) == 200
    table: dict[str, dict[str, int]] = {}
    for (kind, status), n in sorted(found.items()):
        table.setdefault(kind, {})[str(status) if status else "closed"] = n
    print(f"{count} malformed: {before:.0f} → {after:.0f} MiB, still answers: {alive}")
    return {"statuses": table, "before": before, "after": after, "alive": alive, "count": count}


def page(data: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = "\n".join(
        f"| {way} | {d['rate']:.0f} | {d['p50']:.1f} | {d['p99']:.1f} | {d['requests']} "
        f"| {d['errors']} |"
        for way, d in data["load"].items()
    )
    low, high = data["speedup"]["low"], data["speedup"]["high"]
    spread = f"95 % interval {low:.2f} to {high:.2f}" if data["rounds"] > 1 else "one round"
    wrong = "\n".join(
        f"| {what} | {kind} | {', '.join(f'{n} × {s}' for s, n in statuses.items())} |"
        for what, d in data["malformed"].items()
        for kind, statuses in d["statuses"].items()
    )
    memory = "; ".join(
        f"{what}: {d['count']} requests, {d['before']:.0f} → {d['after']:.0f} MiB"
        for what, d in data["malformed"].items()
    )
    conditions = "; ".join(f"{k} {v}" for k, v in data["conditions"].items())
    return f"""\
# The service under load

`slimfuse-export serve` on loopback, {data["clients"]} clients on the same cores, one text of
{LENGTHS[0]} to {LENGTHS[1]} words a request; a BERT of 6 blocks, width 192, random weights. With
batching: up to {BATCH} texts, {WAIT_MS:g} ms. {data["rounds"]} rounds in turns, {data["seconds"]:g}
s in all for each way.

| way | answers/s | p50 ms | p99 ms | requests | errors |
| --- | --- | --- | --- | --- | --- |
{rows}

With batching over without, by rounds: {data["speedup"]["mean"]:.2f}× ({spread}).

## Malformed requests

Memory, looked at after {WARM} requests of warming up and at the end: {memory}. "closed" is a
connection that was closed without an answer.

| model | kind | answers |
| --- | --- | --- |
{wrong}

Conditions: {conditions}
"""


def main() -> None:
    """Run both parts and write benchmarks/results/serving.{json,md}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60, help="of load, for each way")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--smoke", action="store_true", help="write nothing")
    asked = parser.parse_args()
    rounds = asked.rounds if asked.seconds >= 2 * asked.rounds else 1
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        text, image = Path(root) / "texts", Path(root) / "images"
        save_texts(text)
        save_images(image)
        loads = measure(text, asked.clients, asked.seconds, rounds, asked.threads)
        half = asked.malformed // 2
        wrong = {
            "images": endure(image, asked.malformed - half, images=True),
            "texts": endure(text, half, images=False),
        }
    ratios = [a.rate / b.rate for a, b in zip(loads["batching"], loads["one by one"], strict=True)]
    middle, low, high = interval(ratios, 0)
    told = {}
    for way, each in loads.items():
        times = np.concatenate([one.milliseconds for one in each])
        told[way] = {
            "rate": mean(one.rate for one in each),
            "p50": float(np.percentile(times, 50)),
            "p99": float(np.percentile(times, 99)),
            "requests": len(times),
            "errors": sum(one.errors for one in each),
        }
    data = {
        "clients": asked.clients,
        "seconds": asked.seconds,
        "rounds": rounds,
        "load": told,
        "speedup": {"mean": middle, "low": low, "high": high},
        "malformed": wrong,
        "conditions": machine() | {"threads of the model": str(asked.threads)},
    }
    if asked.smoke:
        print(page(data))
    else:
        write("serving", data, page(data))
    statuses = [s for d in wrong.values() for kind in d["statuses"].values() for s in kind]
    settle(
        {
            "no request under load failed": all(d["errors"] == 0 for d in told.values()),
            f"batching answers {WANTED}× as many": middle >= WANTED,
            "no malformed request got a 5xx": not any(s.startswith("5") for s in statuses),
            "no malformed request was taken for a good one": "200" not in statuses,
            "the services still answered": all(d["alive"] for d in wrong.values()),
            f"memory stayed within {FLAT}×": all(
                d["after"] <= FLAT * d["before"] for d in wrong.values()
            ),
        }
    )


if __name__ == "__main__":
    main()
