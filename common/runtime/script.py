"""How every script starts and ends: its device, its paths, its errors, and the next command."""

import errno
import math
import os
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.runtime import distributed, first, settings
from common.runtime.batches import is_out_of_memory
from common.runtime.errors import UserError
from common.runtime.files import expanded

MENDS = {  # the sentences for errors of the disk that the user can solve; {} is the path
    errno.ENOSPC: "there is no space left to write {}: free some disk space and run the same "
                  "command again",
    errno.EDQUOT: "your disk quota does not let {} grow: free some space and run the same command "
                  "again",
    errno.EFBIG: "{} may not grow that large: raise the limit (ulimit -f) or choose a folder on "
                 "another file system, and run the same command again",
    errno.EROFS: "{} is on a read-only file system: choose a folder that can be written to",
    errno.EEXIST: "{} should be a folder, and a file has that name: move it away or choose another "
                  "folder",
    errno.EISDIR: "{} should be a file, and a folder has that name: move it away or choose another "
                  "folder",
    errno.ENOTDIR: "{} cannot be made, since a part of that path is a file: move it away or choose "
                   "another folder",
    errno.EACCES: "there is no permission to open {}: change its permissions or choose another "
                  "folder",
}
OTHER_MEND = "{} cannot be used ({}): look at it, or choose another place"


def run(main: Callable[[], None], constants: dict[str, object], shared: bool = False) -> None:
    """Puts the command line's NAME=value into `constants`, says what is done, calls `main()`.

    An error that the user can solve ends the script with one sentence on stderr and exit status 1,
    Ctrl-C with status 130. If whoever reads stdout has gone, it ends without a word, as other
    programs do, with status 141.
    constants: the script's `globals()`.
    shared: whether `main` shares its work with the other processes of torchrun.
    """
    prepare_streams()
    try:
        first.imports_are_done()
        distributed.start()
        settings.override(constants, sys.argv[1:])
        if not shared:
            require_one_process(Path(sys.argv[0]).name)
        if constants.get("__doc__"):  # its first line
            of = f" TASK={constants['TASK']}" if "TASK" in constants else ""
            print(constants["__doc__"].partition("\n")[0] + of)
        main()
        distributed.barrier()  # so that all processes fail if one fails at the last moment
        sys.stdout.flush()
    except UserError as error:
        sys.exit(distributed.last_words(f"error: {error}"))
    except KeyboardInterrupt:
        if distributed.RANK == 0:
            print("\nstopped; run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(141)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        mend = MENDS.get(error.errno, OTHER_MEND.format("{}", os.strerror(error.errno)))
        sentence = mend.format(error.filename or "a file of this run")
        sys.exit(distributed.last_words(f"error: {sentence}"))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        sys.exit(distributed.last_words(
            "error: out of memory: set smaller sizes or batches, or DEVICE=cpu, or use a machine "
            "with more memory"))


def prepare_streams() -> None:
    """Output never fails for want of a character, nor where a daemon has closed the streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def require_one_process(what: str) -> None:
    """Raise UserError where torchrun started several processes for `what`."""
    if distributed.SIZE > 1:
        raise UserError(f"{what} works in one process: start it with python, not with torchrun")


def device(name: str) -> torch.device:
    """The device called `name`: "cuda", "cuda:1", "mps", "cpu", or "auto".

    "auto" is the first of cuda, mps and cpu that this machine has. Raises UserError if the named
    device is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    found = [kind for kind, is_present in present.items() if is_present]
    if name == "auto":
        return torch.device(found[0])
    counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": 1}
    names = [f"{kind}:{index}" for kind in found for index in range(counts[kind])]
    if name not in (*found, *names):
        raise UserError(f"DEVICE={name} is not on this machine: use DEVICE=auto or one of "
                        f"{', '.join(found)}")
    return torch.device(name)


def run_dir(run_dir: str, task: str) -> Path:
    """The folder of a run's files: `run_dir`, or runs/<task> if that is empty; it is not made."""
    return expanded(run_dir) if run_dir else Path("runs") / task


def cache_path(features: str, run_dir: Path) -> Path:
    """The path of the cache: `features`, or features.h5 in the run folder if that is empty."""
    return expanded(features) if features else run_dir / "features.h5"


def command(script: str, constants: dict[str, object], same: tuple[str, ...] = ()) -> str:
    """The command that runs another stage of the same run, quoted for a shell, without "python".

    It has the constants that say which run it is, as far as they are not empty, and those of
    `same` that are not 0 and not empty.
    same: names of constants that must be the same in both stages.
    """
    names = ("TASK", "RUN_DIR", "FEATURES", *same)
    given = [f"{name}={constants[name]}" for name in names if constants.get(name)]
    return shlex.join([script, *given])


def goodbye(written: list[Path], next_command: str) -> None:
    """Prints at the end of a stage which files it wrote and which command comes next."""
    print("wrote " + ", ".join(map(str, written)))
    print(f"next: python {next_command}")


def seed_everything(seed: int) -> None:
    """Seeds the global random generators of Python, NumPy and PyTorch (on all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def require_finite(values: dict[str, float], where: str, mend: str = "lower LEARNING_RATE and "
                   "delete what this stage has saved, or check the input") -> None:
    """Raises UserError naming the first of these numbers that is NaN or infinite.

    where: at which point of the training they were computed, and mend: what to do, for the message.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name.replace('_', ' ')} is {value} {where}: {mend}")
