"""Actions on signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def on_signal(action: Callable[[], object], *signals: signal.Signals) -> Iterator[None]:
    """Call ``action`` on each of these signals, and restore their previous handlers at the end.

    Nothing changes in threads other than the main one, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.signal(number, lambda *_: action()) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signal(stop: threading.Event, *signals: signal.Signals) -> Iterator[None]:
    """Set ``stop`` on the first of these signals; a second one has its previous effect."""
    with ExitStack() as handlers:

        def request_stop() -> None:
            stop.set()
            handlers.close()

        handlers.enter_context(on_signal(request_stop, *signals))
        yield
