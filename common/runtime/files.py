"""Files that are never half written and replace none of the user's; paths as users write them;
folders that one process claims; checks for damage.
"""

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from common.runtime import distributed
from common.runtime.errors import UserError, some

PNG_MARK = ("Software", "AlignSAM")  # a text in every PNG that this project writes
_OURS = {  # {suffix: what the beginning of such a file holds where this project wrote it}
    ".png": rb"tEXtSoftware\0AlignSAM",
    ".html": rb"<title>AlignSAM report</title>",
    ".csv": rb"^(step,loss|episode,return)\b",  # of stages 2 and 3, and of peft
    # of stage 4, peft, the tables, the benchmark, the fault campaign
    ".json": rb'^\{\s*"(task|device|seed)": .*,\s*"(sam|models|torch|seconds)": ',
    ".md": rb"^# .+\n\nSAM .+, CLIP .+ branch, ",
    ".jsonl": rb'^\{"folder": ',
    ".safetensors": rb'(?s)^.{8}\{"',  # of the stand-ins' training, in places of its own
    ".pt": rb"^PK",  # more is looked at where a checkpoint is loaded
    ".part": rb'^(PK|\{"made_with": )',
}
_FOLDER = 0x10  # the mark of a folder among the attributes of a zip entry


def require_ours(*paths: Path) -> None:
    """Raises UserError that names all paths which are there and that this project did not write.

    What it wrote shows in the first bytes, see `_OURS`. An empty file may be replaced too.
    """
    others = [str(path) for path in paths if path.exists() and not _is_ours(path)]
    if others:
        raise UserError(f"{some(others)} was not written by AlignSAM, or by a version before it "
                        "marked its files, so it is not replaced: move it away, or write to "
                        "another place")


def _is_ours(path: Path) -> bool:
    if not path.is_file() or path.suffix not in _OURS:
        return False
    with open(path, "rb") as file:
        start = file.read(4096)
    return not start or re.search(_OURS[path.suffix], start) is not None


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write(temporary path)` make a file beside `path`, then puts that in `path`'s place.

    A reader, or a run that goes on after a power cut, finds the old file or the new one, and never
    half of one. On any failure the old file stays as it was and the temporary one is removed.
    The temporary path has the suffix of `path`. OSErrors name `path`. Raises UserError where
    `path` is a file of the user's, see `require_ours`.
    """
    require_ours(path)
    # The name is always the same, so that the next write replaces what a kill left behind. It is
    # one that only this project gives, and short, whatever the length of `path`'s own.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".alignsam-{digest}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # raises OSError in a folder without write access, whatever `write` uses
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # it was moved already, or the folder itself failed
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text in UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Adds a text in UTF-8 to the end of a file; a kill may leave a part of it there.

    OSErrors name `path`. Raises UserError where `path` is a file of the user's.
    """
    require_ours(path)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def expanded(path: str | Path) -> Path:
    """`path` with ~ and ~user written out. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with the home folder of a user who does not exist: write "
                        "the whole path") from error


def lock(folder: Path, mend: str = "name another RUN_DIR") -> None:
    """Makes the folder and claims it until this process ends, however it ends.

    The lock is on the folder itself, so that no file is left behind. On a system without such
    locks nothing is claimed. Under torchrun rank 0 claims the folder for all.
    Raises UserError if another process has claimed it; mend: what to do, other than to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.RANK > 0:
        return
    try:
        import fcntl
    except ImportError:
        return
    handle = os.open(folder, os.O_RDONLY)  # never closed: the lock ends with the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is working in {folder}: wait until it ends, or "
                        f"{mend}") from None
    except OSError:  # a file system without locks
        pass


def require_intact(path: Path) -> None:
    """Raises ValueError, or an error of zipfile, if a part of a zip file does not fit its checksum.

    torch.save writes zip files, and torch.load does not look at their checksums. It also skips a
    tensor whose zip entry is marked as a folder, so that mark counts as damage. Files that are not
    zip files have no checksums and are accepted.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
            folders = [part.filename for part in parts.infolist() if part.external_attr & _FOLDER]
        if broken or folders:
            raise ValueError(f"{broken or folders[0]} is not what was written")
