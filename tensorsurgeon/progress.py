"""Progress in bytes or other units, with the time left, on standard error and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]
"""Takes what was done since it was last called."""


@contextmanager
def progress_bar(total: int, label: str, quiet: bool = False, unit: str = "B") -> Iterator[Advance]:
    """Show a bar over `total` bytes, or other units, while the block runs; yield the function that advances it."""
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update
