"""The conditions a measurement was taken under."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # version 1 writes a huge number for none


def environment() -> dict[str, str | int | float | None]:
    """Return what sways latency on this machine, fit for JSON.

    cpu: model name. cores_allowed: cores the scheduler lets this process use. cpu_quota: cores'
    worth of time the control group grants, None without a limit. memory_limit: its memory in
    bytes, None without. The rest are versions.
    Holds no host name, user name or path.
    """
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores_allowed": cores_allowed(),
        "cpu_quota": cpu_quota(),
        "memory_limit": memory_limit(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "onnx": version("onnx"),
        "numpy": version("numpy"),
    }


def cpu_info() -> str:
    """Return /proc/cpuinfo, empty where there is none."""
    return _CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else ""


def cpu_field(text: str, *keys: str) -> str:
    """Return the first value in a cpuinfo text whose key is one of `keys`, else an empty string."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def cpu_model() -> str:
    """Return the CPU's model name, or what the platform calls it."""
    return cpu_field(cpu_info(), "model name", "Model", "Hardware") or (
        platform.processor() or platform.machine()
    )


def cores_allowed() -> int:
    """Return how many cores the scheduler lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the tightest CPU limit of this process's control groups in cores, None without one.

    root: where control groups are mounted. membership: the file naming this process's group.
    """
    limits: list[float] = []
    for group in _groups(root, membership):  # version 2: a limit of any ancestor holds
        limits += _limit(*_words(group / "cpu.max"))
    for name in ("cpu", "cpu,cpuacct"):  # version 1
        quota, period = (_words(root / name / f"cpu.cfs_{key}_us") for key in ("quota", "period"))
        limits += _limit(*quota, *period)
    return min(limits, default=None)


def memory_limit(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the tightest memory limit of this process's control groups in bytes, None without."""
    files = [group / "memory.max" for group in _groups(root, membership)]
    files.append(root / "memory" / "memory.limit_in_bytes")  # version 1
    limits = [int(word) for file in files for word in _words(file)[:1] if word.isdigit()]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _groups(root: Path, membership: Path) -> list[Path]:
    lines = membership.read_text().splitlines() if membership.is_file() else []
    relative = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    parts = [part for part in relative.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _limit(*words: str) -> list[float]:
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        return []  # "max", -1 or no such file: no limit
    return [int(words[0]) / int(words[1])]
