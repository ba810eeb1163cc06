"""Stop on a signal after saving the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal(stop: threading.Event, *signals: signal.Signals) -> Iterator[None]:
    """Set ``stop`` on the first of these signals; a second one has its previous effect.

    Nothing changes in threads other than the main one, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def request_stop(*_: object) -> None:
        stop.set()
        restore()

    for number in signals:
        signal.signal(number, request_stop)
    try:
        yield
    finally:
        restore()
