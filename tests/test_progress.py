"""Lines that long work writes where there is no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from slimfuse import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_the_time_left_is_told_once_a_rate_is_known(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.track("measuring", 500) as tell:
        clock[0] += 40
        tell(256)  # work that says nothing before its first part is done
        clock[0] += 16
        tell(384, "loss 1")
        clock[0] += 1
        tell(400)  # too soon to be told
    told = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert told[0] == "measuring: 256/500"
    left = re.fullmatch(r"measuring: 384/500, about (\d+) s left loss 1", told[1])
    assert left is not None and int(left[1]) == round(16 / 128 * 116)
    assert len(told) == 2
