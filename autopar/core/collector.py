"""When Python looks for cycles among the objects that planning makes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Loading, tracing and planning make many small objects and next to no cycles; a full collection walks all of torch's objects, up to half a second
    each. What is left at the end joins the oldest generation as it is: frozen and released at once, it is walked by the next full collection only."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()
