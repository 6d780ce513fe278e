"""Batches that fit into memory: the batch size is halved wherever it turns out to be too large."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from tqdm import tqdm

from common.runtime.errors import UserError

# What a lack of memory is called by CUDA, MPS, the CPU and cuBLAS.
PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED",
           "CUBLAS_STATUS_NOT_INITIALIZED")


def in_batches(items: Iterable, size: int, compute: Callable[[list], object],
               mend: str) -> Iterator[tuple[list, object]]:
    """Yields (batch, compute(batch)) over all items in their order, `size` items at a time.

    Where memory runs out, the size is halved for the rest of the run, a line on stderr says so,
    and the same items are tried again.
    mend: what the user should do if even one item does not fit; it ends the message.
    Raises UserError in that case.
    """
    items = iter(items)
    while waiting := list(islice(items, size)):
        while waiting:
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
            # The tensors of the failed attempt are released only here, after the `except` block.
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise UserError(f"out of memory at BATCH_SIZE=1: {mend}")
            size = len(batch) // 2
            tqdm.write(f"out of memory: from here on with BATCH_SIZE={size}", file=sys.stderr)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` means that memory ran out.

    On a CPU, and in CUDA's libraries, only the words of the message tell.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(phrase in str(error) for phrase in PHRASES)
