"""HDF5's mark "open for writing", which stays in a file whose writer died.

HDF5 then refuses the file, though nothing else in it need have changed. The mark is a byte of the
superblock, the file's first 48 bytes, which end in a checksum. `h5clear -s` does the same as here.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from common.runtime.errors import UserError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK, VERSION, MARK = 48, 8, 11  # bytes of it, and where its version and the mark stand
IN_USE = "another process, perhaps a notebook, has {} open for writing: close the file there"


@contextlib.contextmanager
def unmarked(path: Path) -> Iterator[bool]:
    """Takes the mark out of a file for good, unless the block raises; yields whether it was there.

    The block has to check that the content is whole. Raises UserError where another process has
    the file open for writing, or where no lock can tell.
    """
    with open(path, "rb") as file:
        before = file.read(SUPERBLOCK)
    known = before[:VERSION] == SIGNATURE and before[VERSION] in (2, 3)
    if len(before) < SUPERBLOCK or not known or not before[MARK]:
        yield False
        return
    _require_unused(path)
    cleared = before[:MARK] + b"\0" + before[MARK + 1:-4]
    try:
        _put(path, cleared + struct.pack("<I", lookup3(cleared)))
    except PermissionError:
        raise UserError(f"{path} was left open by a program that died, and there is no permission "
                        f"to mend that: run h5clear -s {path} as its owner") from None
    try:
        yield True
    except BaseException:
        _put(path, before)
        raise
    print(f"{path} had been left open by a program that died; its content is whole, so it is used")


def _require_unused(path: Path) -> None:
    """Raises UserError unless a lock shows that no process has the file open for writing."""
    import fcntl  # not on Windows

    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(IN_USE.format(path)) from None
    except OSError as error:  # a file system without locks
        raise UserError(f"{path} is marked as open for writing, and its file system has no locks "
                        "that tell by whom: close it everywhere, and run "
                        f"h5clear -s {path}") from error


def _put(path: Path, superblock: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(superblock)
        file.flush()
        os.fsync(file.fileno())


def lookup3(data: bytes) -> int:
    """Jenkins's hash "lookup3", HDF5's checksum. len(data): a multiple of 4, not of 12."""
    words = struct.unpack(f"<{len(data) // 4}I", data)
    a = b = c = (0xDEADBEEF + len(data)) % 2**32

    def turned(word: int, bits: int) -> int:
        return (word << bits | word >> 32 - bits) % 2**32

    for at in range(0, len(words) - 3, 3):
        a, b, c = (one + word for one, word in zip((a, b, c), words[at:at + 3]))
        for bits in (4, 6, 8, 16, 19, 4):
            a = (a - c) % 2**32 ^ turned(c % 2**32, bits)
            a, b, c = b % 2**32, c + b, a
        a, b, c = a % 2**32, b % 2**32, c % 2**32
    rest = (*words[len(words) // 3 * 3:], 0, 0)
    a, b = (a + rest[0]) % 2**32, (b + rest[1]) % 2**32
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - turned(b, bits)) % 2**32
        a, b, c = b, c, a
    return b
