"""A file that cannot be read, and why: only what a check has shown to be damaged is called so."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from common.runtime.batches import is_out_of_memory
from common.runtime.errors import UserError

LFS = b"version https://git-lfs"  # how a pointer begins that Git LFS leaves in a file's place
OF_THE_CONTENT = (None, errno.EINVAL)  # errors of libraries, and of a place that a file only claims


@contextlib.contextmanager
def reading(path: Path, missing: str) -> Iterator[None]:
    """Runs the block, which reads `path`; what it raises then tells of the file's content.

    missing: what to do where there is no such file; it ends the sentence.
    Raises UserError, before or after the block, where the file is missing, empty, a folder, a link
    to nothing or a pointer of Git LFS, and where permission, memory or a working disk is missing.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS))
        if not start:
            raise UserError(f"{path} is an empty file: delete it, and {missing}")
        if start == LFS:
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs "
                            "pull in its repository")
        yield
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: mend "
                            f"the link, or delete it and {missing}") from error
        raise UserError(f"{path} does not exist: {missing}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a file: name a file, or move it away and "
                        f"{missing}") from error
    except PermissionError as error:
        raise UserError(f"there is no permission to read {path}: change its permissions, or those "
                        "of its folder") from error
    except OSError as error:
        if error.errno in OF_THE_CONTENT:
            raise
        raise UserError(f"{path} cannot be read ({os.strerror(error.errno)}): look whether its "
                        "disk and network work, and run the same command again") from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        raise UserError(f"there is too little memory to read {path}: end other programs, or use a "
                        "machine with more") from error
