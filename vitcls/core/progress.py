"""Progress through items: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator

import jax
from tqdm import tqdm

_logger = logging.getLogger("vitcls")


def show_progress(items: Iterable, total: int, what: str, *, every: float = 10.0) -> Iterator:
    """Passes on `items`, `total` in number: a bar on a terminal, a line each `every` seconds elsewhere."""
    shown = jax.process_index() == 0
    if shown and sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, dynamic_ncols=True, delay=1.0)
        return
    begin = told = time.perf_counter()
    for done, item in enumerate(items):
        if shown and time.perf_counter() - told >= every:
            told = time.perf_counter()
            left = tqdm.format_interval((told - begin) / max(done, 1) * (total - done))
            _logger.info("%s: %s of %s, %s left", what, f"{done:,}", f"{total:,}", left)
        yield item
