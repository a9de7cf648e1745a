"""Ctrl-C and SIGTERM amid a training: they wait until the step is whole, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from slimfuse.errors import Terminated


def terminate(_signal: int, _frame: FrameType | None) -> None:
    """Raise Terminated: the handler of SIGTERM that a command line sets."""
    raise Terminated


USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
"""What the signals that are held do at other times, and what they raise."""


class Held:
    """The signals that were held back."""

    def __init__(self) -> None:
        self.came: list[signal.Signals] = []

    def obey(self, *, others: bool = False) -> None:
        """Raise the first that has come; others: as SIGTERM if one came to another process."""
        if self.came or others:
            number = self.came[0] if self.came else signal.SIGTERM
            USUAL[number](number, None)

    def wait(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; a second one is obeyed at once."""
        self.came.append(signal.Signals(number))
        if len(self.came) > 1:
            USUAL[self.came[-1]](number, frame)


@contextmanager
def held(rescue: Callable[[], None]) -> Iterator[Held]:
    """Hold Ctrl-C and SIGTERM back, and yield what has come since; at the end it is obeyed.

    rescue: called before a KeyboardInterrupt or Terminated leaves. A signal that somebody else
    handles, or all in another thread than the main one, isn't held back.
    """
    waiting = Held()
    main = threading.current_thread() is threading.main_thread()
    ours = [s for s, usual in USUAL.items() if main and signal.getsignal(s) is usual]
    for number in ours:
        signal.signal(number, waiting.wait)
    try:
        yield waiting
    except (KeyboardInterrupt, Terminated):
        rescue()
        raise
    finally:
        for number in ours:
            signal.signal(number, USUAL[number])
    waiting.obey()
