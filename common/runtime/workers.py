"""Threads of one core each, which compute independent parts side by side on a CPU.

Torch's own threads share every single operation and wait for each other after it. Where the work
falls into parts that need nothing from each other, it is faster to give whole parts to each core.
"""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def side_by_side(compute: Callable, parts: Iterable, device: torch.device) -> list:
    """[compute(part) for part in parts]; on a CPU, as many parts at a time as torch has threads.

    compute: runs without gradients, unless it enables them itself; changes nothing that parts
    share. What it raises is raised here. One thread computes a whole part, so the number of threads
    changes no bit of the results.
    """
    compute = torch.no_grad()(compute)  # gradient mode is each thread's own
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count == 1:
        return [compute(part) for part in parts]
    return list(_workers(count).map(compute, parts))


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """`count` threads in which torch uses one thread."""
    all_started = Barrier(count + 1)

    def use_one_thread() -> None:
        torch.get_num_threads()  # now torch gives this thread the number set last, and not later
        torch.set_num_threads(1)
        all_started.wait()

    workers = ThreadPoolExecutor(count, initializer=use_one_thread)
    for _ in range(count):
        workers.submit(int)  # starts one more thread, as those before still wait
    all_started.wait()
    torch.set_num_threads(count)  # the number set last again: for threads that start later
    return workers
