"""Ctrl-C amid a training: it waits until the step is whole, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held(rescue: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back, and yield what raises the KeyboardInterrupt that has come since.

    A second one is raised at once; one that nobody asked for is raised at the end. rescue: called
    before a KeyboardInterrupt leaves. Where somebody else handles Ctrl-C, or in another thread
    than the main one, none is held back.
    """
    asked = False

    def wait(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def obey() -> None:
        if asked:
            raise KeyboardInterrupt

    usual = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is usual
    if ours:
        signal.signal(signal.SIGINT, wait)
    try:
        yield obey
    except KeyboardInterrupt:
        rescue()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)
    obey()
