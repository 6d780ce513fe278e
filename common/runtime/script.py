"""How every script starts and ends: errors as sentences, its device, its paths, the command that comes next."""

import errno
import math
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.runtime import distributed, settings
from common.runtime.errors import UserError

MENDS = {
    errno.ENOSPC: "there is no space left to write {}: free some disk space and run the same command again",
    errno.EDQUOT: "your disk quota does not let {} grow: free some space and run the same command again",
    errno.EFBIG: "{} may not grow that large: raise the limit (ulimit -f) or choose a folder on another file system, "
                 "and run the same command again",
    errno.EROFS: "{} lies on a read-only file system: choose a folder that can be written to",
    errno.EEXIST: "{} should be a folder, and a file has that name: move it away or choose another folder",
    errno.EISDIR: "{} should be a file, and a folder has that name: move it away or choose another folder",
    errno.ENOTDIR: "{} cannot be made, since a part of that path is a file: move it away or choose another folder",
    errno.EACCES: "there is no permission to open {}: change its permissions or choose another folder",
}


def run(main: Callable[[], None], constants: dict[str, object], shared: bool = False) -> None:
    """Put the command line's NAME=value into `constants` (the script's `globals()`), then call `main()`.

    What the user can mend ends as one sentence on stderr and exit status 1; Ctrl-C ends with status 130.
    shared: whether `main` shares its work with the other processes of torchrun.
    """
    try:
        distributed.start()
        settings.override(constants, sys.argv[1:])
        if not shared:
            require_one_process(Path(sys.argv[0]).name)
        main()
        distributed.barrier()  # a process that fails at the last moment makes all of them fail
    except UserError as error:
        sys.exit(distributed.last_words(f"error: {error}"))
    except KeyboardInterrupt:
        if distributed.RANK == 0:
            print("\nstopped; run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in MENDS:
            raise
        sentence = MENDS[error.errno].format(error.filename or "a file of this run")
        sys.exit(distributed.last_words(f"error: {sentence}"))


def require_one_process(what: str) -> None:
    """Raise UserError where torchrun started several processes for `what`."""
    if distributed.SIZE > 1:
        raise UserError(f"{what} works in one process: start it with python, not with torchrun")


def device(name: str) -> torch.device:
    """The device called `name`: "cuda", "cuda:1", "mps", "cpu", or "auto", the first there is of these."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, present in there.items() if present))
    kind, _, index = name.partition(":")
    present = there.get(kind, False) and (not index or index.isdecimal())
    if not present or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, present in there.items() if present)
        raise UserError(f"DEVICE={name} is not on this machine: use DEVICE=auto or one of {found}")
    return torch.device(name)


def run_dir(run_dir: str, task: str) -> Path:
    """The folder of a run's files: `run_dir`, or runs/<task> where that is empty. It is not made here."""
    return Path(run_dir).expanduser() if run_dir else Path("runs") / task


def cache_path(features: str, run_dir: Path) -> Path:
    """The path of the cache: `features`, or features.h5 in the run folder where it is empty."""
    return Path(features).expanduser() if features else run_dir / "features.h5"


def command(script: str, constants: dict[str, object], shared: tuple[str, ...] = ()) -> str:
    """What runs another stage of the same run, quoted for a shell and without "python": script and the constants that
    say which run it is, with those of `shared` that are not 0, which both stages must have alike."""
    given = [f"{name}={constants[name]}" for name in ("TASK", "RUN_DIR", "FEATURES", *shared) if constants[name]]
    return shlex.join([script, *given])


def goodbye(written: list[Path], next_command: str) -> None:
    """How a stage ends: prints what it wrote and the command that comes next."""
    print("wrote " + ", ".join(map(str, written)))
    print(f"next: python {next_command}")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices) global random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def require_finite(values: dict[str, float], where: str) -> None:
    """Raise UserError naming the first of these numbers that is NaN or infinite; `where` says what they came from."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name.replace('_', ' ')} is {value} {where}: lower LEARNING_RATE, or look at what goes "
                            "in; what was saved before is intact")
