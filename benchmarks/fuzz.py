"""100 000 recipes nobody would write: each is valid or refused with one clear error (`make fuzz`).

Writes benchmarks/results/fuzz.{json,md}. One process, one core; the shares of what is made are in
fuzz_recipes.py. Whatever else happens to an example ends the script with its number.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType

from common import machine, settle, write
from fuzz_recipes import MAKERS, example, judge

HANGS = 30.0  # seconds of the processor's time after which an example counts as one that hangs


class Hangs(BaseException):
    """An example took too long."""


def stop(_signal: int, _frame: FrameType | None) -> None:
    raise Hangs


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--count", type=int, default=100_000)
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    faults: list[str] = []
    slowest = (0.0, 0)
    signal.signal(signal.SIGPROF, stop)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        for number in range(given.count):
            one = example(given.seed, number)
            signal.setitimer(signal.ITIMER_PROF, HANGS)
            start = time.process_time()
            try:
                answer = judge(one, path)
            except (Exception, Hangs) as error:
                answer = f"FAULT: {type(error).__name__}"
                faults.append(f"{number}: {one.kind}: {type(error).__name__}: {error}"[:300])
                print(faults[-1], file=sys.stderr)
            signal.setitimer(signal.ITIMER_PROF, 0)
            took = time.process_time() - start
            slowest = max(slowest, (took, number))
            answers[one.kind][answer] += 1
            seconds[one.kind] += took
        strangers = [entry.name for entry in Path(folder).iterdir() if entry != path]
    report(given.count, given.seed, answers, seconds, slowest)
    settle(
        {
            f"all {given.count} are valid or refused with one clear error": not faults,
            "reading a recipe writes nothing": not strangers,
        }
    )


def report(
    count: int,
    seed: int,
    answers: dict[str, Counter[str]],
    seconds: Counter[str],
    slowest: tuple[float, int],
) -> None:
    """Write the table of what was made and how it was answered."""
    every: Counter[str] = sum(answers.values(), Counter())
    faults = sum(n for answer, n in every.items() if answer.startswith("FAULT"))
    lines = [
        f"# {count:,} fuzzed recipes\n",
        f"Seed {seed}; `make fuzz`. Each is read by `load_recipe`, some with `--set` options, and "
        "must load, or be refused with one error that says what and where, on printable lines of "
        "at most 4,000 characters in all.\n",
        "| made | examples | valid | refused | anything else | CPU ms each |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for kind in MAKERS:
        found = answers[kind]
        total, odd = found.total(), sum(n for a, n in found.items() if a.startswith("FAULT"))
        lines.append(
            f"| {kind} | {total:,} | {found['valid']:,} | {total - odd - found['valid']:,} | {odd} "
            f"| {1e3 * seconds[kind] / max(1, total):.1f} |"
        )
    lines.append(
        f"| all | {every.total():,} | {every['valid']:,} | "
        f"{every.total() - faults - every['valid']:,} | {faults} "
        f"| {1e3 * seconds.total() / max(1, count):.1f} |"
    )
    lines.append(
        f"\nThe slowest took {slowest[0]:.1f} s of CPU (example {slowest[1]}); "
        f"{seconds.total():.0f} s for all. What the first line of a refusal says:\n"
    )
    lines += ["| refusal | examples |", "| --- | --: |"]
    common = [(a, n) for a, n in every.most_common() if a.startswith("refused")]
    lines += [f"| {answer.removeprefix('refused: ')} | {n:,} |" for answer, n in common[:20]]
    rest = sum(n for _, n in common[20:])
    lines.append(f"| {len(common) - 20} others | {rest:,} |" if rest else "")
    data = {
        "seed": seed, "count": count, "answers": {k: dict(v) for k, v in answers.items()},
        "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()},
        "slowest": {"cpu_seconds": round(slowest[0], 2), "example": slowest[1]},
        "machine": machine(),
    }  # fmt: skip
    write("fuzz", data, "\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
