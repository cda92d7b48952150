"""Ctrl-C and SIGTERM as a wish that is heard, so that work ends at a place from which it goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def heeding_signals(hear: Callable[[str], None]) -> Iterator[None]:
    """Within this context the first Ctrl-C or SIGTERM is told to `hear` by its name; the second ends the program."""
    heard: list[int] = []

    def handle(number: int, frame: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        hear(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
