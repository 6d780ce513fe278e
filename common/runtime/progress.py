"""Progress bars on stderr that also say, once on stdout, how long the work is going to take."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from common.runtime import distributed

ENOUGH = 5  # seconds of work from which the rest is estimated; at least one item
WORTH_SAYING = 10  # seconds
Item = TypeVar("Item")


class Bar:
    """A bar over `total` items, of which `done` were done by an earlier call; a context manager.

    Rank 0 alone shows it.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.first, self.told = what, done, False
        self.start = time.monotonic()
        self.bar = tqdm(desc=what, total=total, initial=done, disable=distributed.RANK > 0)
        self.total, self.done = total, done

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def reach(self, done: int) -> None:
        """So many items are done now, those of earlier calls included."""
        self.bar.update(done - self.done)
        self.done, spent = done, time.monotonic() - self.start
        if self.told or spent < ENOUGH or not self.first < done < self.total:
            return
        self.told = True
        left = spent / (done - self.first) * (self.total - done)
        if distributed.RANK == 0 and left >= WORTH_SAYING:
            tqdm.write(f"{self.what}: about {duration(left)} left")


def progress(items: Iterable[Item], what: str, total: int, done: int = 0) -> Iterator[Item]:
    """The items, under a `Bar`."""
    with Bar(what, total, done) as bar:
        for number, item in enumerate(items, done + 1):
            yield item
            bar.reach(number)


def duration(seconds: float) -> str:
    """In the unit that a person would use: "40 seconds", "12 minutes", "3.5 hours"."""
    if seconds < 90:
        return f"{round(seconds)} seconds"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
