"""Files that a kill cannot leave half written, folders that one process owns, and damage that is noticed."""

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from common.runtime import distributed
from common.runtime.errors import UserError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write(temporary path)` make a file beside `path` (same suffix), then put it in `path`'s place.

    A reader, or a run that goes on after a power cut, meets the old file or the new one, never half of one.
    On any failure the old file stays as it was and the temporary one is removed. OSErrors carry `path`.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # one name, so what a kill leaves is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # a folder that cannot be written to is an OSError from here, whatever `write` uses
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # gone already, or the folder itself is what failed
            temporary.unlink()


def lock(folder: Path) -> None:
    """Makes the folder and claims it until this process ends, however it ends. Raises UserError where another has it.

    The claim lies on the folder itself, so nothing is left behind. Where the system has no such locks, nothing is done.
    Under torchrun rank 0 claims it for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.RANK > 0:
        return
    try:
        import fcntl
    except ImportError:
        return
    handle = os.open(folder, os.O_RDONLY)  # never closed: the lock goes with the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is working in {folder}: wait until it ends, or name another "
                        "RUN_DIR") from None
    except OSError:  # a file system without locks
        pass


def require_intact(path: Path) -> None:
    """Raises ValueError or zipfile's errors where a part of the zip file `path` is not what was written.

    torch.save writes zip files, and torch.load does not look at their checksums. A file of another kind has none, and
    passes.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if broken := parts.testzip():
                raise ValueError(f"{broken} is not what was written")
