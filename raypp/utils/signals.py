"""SIGTERM as a request: work ends once it has written what it keeps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal(stop: threading.Event, *signals: signal.Signals) -> Iterator[None]:
    """Have the first of these signals set ``stop``; a second one does what it ever did.

    In any thread but the main one, which no signal reaches, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def told(*_: object) -> None:
        stop.set()
        restore()

    for number in signals:
        signal.signal(number, told)
    try:
        yield
    finally:
        restore()
