"""A progress bar that also says, once, how long the work is going to take."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from common.runtime import distributed

ENOUGH = 5  # seconds of work from which the rest is estimated; at least one item
Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int, done: int = 0) -> Iterator[Item]:
    """The items, under a bar on stderr; stdout gets one line with the time that is left.

    total: items in all, of which `done` were done by an earlier call. Rank 0 alone shows the bar.
    """
    bar = tqdm(items, what, initial=done, total=total, disable=distributed.RANK > 0)
    clock = Clock(what, total - done)
    for number, item in enumerate(bar, 1):
        yield item
        clock.tell(number)


class Clock:
    """Says once on stdout how long `count` items will take, as soon as enough of them are timed."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count, self.start, self.told = what, count, time.monotonic(), False

    def tell(self, finished: int) -> None:
        """To be called whenever items are finished. finished: how many since the start."""
        spent = time.monotonic() - self.start
        if self.told or spent < ENOUGH or not 0 < finished < self.count:
            return
        self.told = True
        if distributed.RANK == 0:
            left = spent / finished * (self.count - finished)
            tqdm.write(f"{self.what}: about {duration(left)} left")


def duration(seconds: float) -> str:
    """In the unit that a person would use: "40 seconds", "12 minutes", "3.5 hours"."""
    if seconds < 90:
        return f"{round(seconds)} seconds" if seconds >= 5 else "a few seconds"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
