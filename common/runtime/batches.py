"""Batches that fit into memory: halved wherever one does not, so that their size is found and not guessed."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from tqdm import tqdm

from common.runtime.errors import UserError

PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA, MPS, CPU, cuBLAS


def in_batches(items: Iterable, size: int, compute: Callable[[list], object],
               mend: str) -> Iterator[tuple[list, object]]:
    """(batch, compute(batch)) over all items in their order, `size` at a time.

    Where memory runs out, the size is halved for good, this is said, and the same items are tried again. Raises
    UserError, saying `mend`, where there is no room for one.
    """
    items, waiting = iter(items), []
    while waiting := waiting or list(islice(items, size)):
        batch, result = waiting[:size], None
        try:
            result = compute(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if result is not None:
            yield batch, result
            waiting = waiting[size:]
            continue
        # only here, after the `except`, has the failed attempt let go of its tensors
        torch.cuda.empty_cache()
        if len(batch) == 1:
            raise UserError(f"out of memory at BATCH_SIZE=1: {mend}")
        size = len(batch) // 2
        tqdm.write(f"out of memory: from here on with BATCH_SIZE={size}", file=sys.stderr)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; on a CPU, and in CUDA's libraries, only the words tell."""
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in PHRASES)
