"""One stage shared by the processes that torchrun starts on one machine; in a single process all this does nothing.

Only small Python objects are exchanged, so the backend is gloo, with and without GPUs. Every process computes what it
would compute alone, and rank 0 alone prints, collects and writes.
"""

import contextlib
import datetime
import operator
import os
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import distributed

from common.runtime.errors import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, SIZE, LOCAL_SIZE = (int(os.environ[name]) if TORCHRUN else default
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
# A process that dies is noticed at once: its connections close. This is for one that hangs (a stuck disk, a stuck GPU),
# and longer than processes wait for each other otherwise: while rank 0 draws or downloads, and where shares differ.
TIMEOUT = datetime.timedelta(hours=6)
_store = None  # torchrun's own process keeps it, so it outlives any rank


def start() -> None:
    """Joins the other processes. Raises UserError where they are on several machines."""
    global _store
    if SIZE == 1:
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    _store, *_ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    if LOCAL_SIZE < SIZE:  # a shared file system may lose bytes that two machines write side by side into the cache
        raise UserError("torchrun started processes on several machines: give it --nnodes=1")
    with _until_one_ends():
        distributed.init_process_group("gloo", store=_store, rank=RANK, world_size=SIZE, timeout=TIMEOUT)


def own(device: torch.device) -> torch.device:
    """This process's GPU where `device` is "cuda" without a number. Raises UserError where there are too few."""
    if SIZE == 1 or device.type != "cuda":
        return device
    if device.index is None:
        if RANK >= torch.cuda.device_count():
            raise UserError(f"torchrun started {SIZE} processes for {torch.cuda.device_count()} GPUs: give it "
                            f"--nproc_per_node={torch.cuda.device_count()}, or let them share one by DEVICE=cuda:0")
        device = torch.device("cuda", RANK)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """The block is run by rank 0, and then by the others: what it downloads or creates there, they find."""
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
    """This process's share of rank 0's `items`, which are dealt in turn."""
    if SIZE > 1:
        dealt = [items]
        with _until_one_ends():
            distributed.broadcast_object_list(dealt, src=0)
        items = dealt[0]
    return items[RANK::SIZE]


def share_batches(items: Sequence, size: int) -> list:
    """This process's share, dealt as whole batches, so that each has the same neighbours as ever."""
    starts = share(range(0, len(items), size))
    return [item for start in starts for item in items[start:start + size]]


def gather(items: list[tuple]) -> list[tuple]:
    """On rank 0 the items of all processes, sorted by their first entry; on the others nothing."""
    everyone = [items] * SIZE if RANK == 0 else None
    if SIZE > 1:
        with _until_one_ends():
            distributed.gather_object(items, everyone)
    return sorted((item for its in everyone or () for item in its), key=operator.itemgetter(0))


def last_words(sentence: str) -> str | int:
    """What `sys.exit` is given where a UserError ends this process: the sentence; under torchrun 1.

    There the first process that ends says its sentence. The others end without theirs, and not before: torchrun stops
    all that are left as soon as one has ended.
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
    try:
        yield
    except RuntimeError as error:  # gloo's for a closed connection, and for TIMEOUT
        raise UserError("one of torchrun's processes ended, or hung: run the same command to go on") from error
