"""One stage shared by the processes that torchrun starts on one machine.

In a single process all of this does nothing. Only small Python objects are exchanged, so the
backend is gloo, with and without GPUs. Every process computes what it would compute alone, and
only rank 0 prints, collects and writes.
"""

import contextlib
import datetime
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import distributed

from common.runtime.errors import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
SIZE = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
LOCAL_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if TORCHRUN else 1
# A dead process is noticed at once: its connections close. The timeout is for a process that hangs
# (a stuck disk, a stuck GPU). It must be longer than any normal wait, while rank 0 downloads or
# where the shares of the work differ.
TIMEOUT = datetime.timedelta(hours=6)
_store = None  # torchrun's own process keeps it, so it outlives every rank


def start() -> None:
    """Joins the other processes. Raises UserError if they are on several machines."""
    global _store
    if SIZE == 1:
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open as long as the process runs
    _store, *_ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    # A shared file system may lose bytes that two machines write side by side into the cache.
    if SIZE > LOCAL_SIZE:
        raise UserError("torchrun started processes on several machines: give it --nnodes=1")
    with _until_one_ends():
        distributed.init_process_group("gloo", store=_store, rank=RANK, world_size=SIZE,
                                       timeout=TIMEOUT)


def own(device: torch.device) -> torch.device:
    """The GPU of this process if `device` is "cuda" without a number; otherwise `device`.

    A GPU becomes torch's current one, of which torch answers questions that name none.
    Raises UserError if there are fewer GPUs than processes.
    """
    if device.type != "cuda" or (SIZE == 1 and device.index is None):
        return device
    if device.index is None:
        gpus = torch.cuda.device_count()
        if gpus <= RANK:
            raise UserError(f"torchrun started {SIZE} processes for {gpus} GPUs: give it "
                            f"--nproc_per_node={gpus}, or let them share one by DEVICE=cuda:0")
        device = torch.device("cuda", RANK)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Runs the block in rank 0 and then in the others, which find what rank 0 made there."""
    if RANK > 0:
        barrier()
    yield
    if RANK == 0:
        barrier()


def barrier() -> None:
    """Waits until every process is here."""
    if SIZE > 1:
        with _until_one_ends():
            distributed.barrier()


def share(items: Sequence) -> Sequence:
    """This process's share of rank 0's `items`: every SIZE-th one, from the RANK-th on."""
    if SIZE > 1:
        exchanged = [items]
        with _until_one_ends():
            distributed.broadcast_object_list(exchanged, src=0)
        items = exchanged[0]
    return items[RANK::SIZE]


def share_batches(items: Sequence, size: int) -> list:
    """This process's share, dealt as whole batches: they are the same as in one process."""
    starts = share(range(0, len(items), size))
    return [item for start in starts for item in items[start:start + size]]


def gather(items: list[tuple]) -> list[tuple]:
    """On rank 0 the items of all processes, sorted by their first entry; on the others nothing."""
    gathered = [items] * SIZE if RANK == 0 else None
    if SIZE > 1:
        with _until_one_ends():
            distributed.gather_object(items, gathered)
    if gathered is None:
        return []
    return sorted(chain.from_iterable(gathered), key=operator.itemgetter(0))


def last_words(sentence: str) -> str | int:
    """What `sys.exit` is given when a UserError ends this process.

    Without torchrun, that is the sentence. torchrun stops all processes as soon as one ends, so the
    first process prints its sentence here, and the others wait for this and then end silently.
    """
    if _store is None:
        return sentence
    if _store.add("ended", 1) == 1:
        print(sentence, file=sys.stderr, flush=True)
        _store.set("said", "")
    _store.wait(["said"])
    return 1


@contextlib.contextmanager
def _until_one_ends() -> Iterator[None]:
    """Raises UserError if another process ends, or hangs, while this one waits for it."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it for a closed connection and after TIMEOUT
        raise UserError("one of torchrun's processes ended, or hung: run the same command to "
                        "go on") from error
