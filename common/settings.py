"""How every numbered script starts: constants from the command line, errors as sentences, safe writes."""

import ast
import contextlib
import difflib
import errno
import math
import os
import random
import shlex
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.errors import UserError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "values joined by commas",
    dict: "one value for all, or name:value pairs joined by commas",
}
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
        override(constants, sys.argv[1:])
        if distributed.SIZE > 1 and not shared:
            raise UserError(f"{Path(sys.argv[0]).name} works in one process: start it with python, not with torchrun")
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


def override(constants: dict[str, object], argv: list[str]) -> None:
    """Replace UPPER_CASE `constants` by the values in `argv`, each NAME=value read as its default's type.

    A tuple is given as 1,2,3; a dict as one value for all its keys, or as key:value,key:value, where keys
    that are left out keep their default. `help` prints the constants with their comments and exits. Names that start
    with an underscore, values of other types, and constants that the script imports, which would change for the script
    alone, cannot be given. Raises UserError, with nothing replaced.
    """
    own = _assigned(Path(constants["__file__"])) if "__file__" in constants else dict.fromkeys(constants, "")
    settable = {
        name: value
        for name, value in constants.items()
        if name.isupper() and name[0] != "_" and isinstance(value, tuple(KINDS)) and value not in ((), {})
        and name in own
    }
    if any(argument in ("help", "--help", "-h") for argument in argv):
        print((constants.get("__doc__") or "").strip())
        spec = constants.get("__spec__")  # there where python -m started it
        print(f"\nusage: python {f'-m {spec.name}' if spec else Path(sys.argv[0]).name} [NAME=value ...]\n")
        shown = {name: f"{name}={_show(value)}" for name, value in settable.items()}
        width = min(32, max(map(len, shown.values())))
        print("\n".join(f"  {shown[name]:{width}}  {own[name]}".rstrip() for name in settable))
        sys.exit(0)
    listed = "the constants are " + ", ".join(f"{name}={_show(value)}" for name, value in settable.items())
    given = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form NAME=value; {listed}")
        if name not in settable:
            near = difflib.get_close_matches(name.strip("-").replace("-", "_").upper(), settable, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"there is no constant {name}{hint}; {listed}")
        try:
            given[name] = _parse(text, settable[name])
        except (ValueError, KeyError):
            kind = KINDS[type(settable[name])]
            raise UserError(f"{argument} does not read as {kind}; {listed}") from None
    constants.update(given)


def _assigned(script: Path) -> dict[str, str]:
    """{name: the comment after it} of what a script assigns outside functions and classes."""
    source = script.read_text(encoding="utf-8")
    lines = source.splitlines()
    return {name.id: lines[statement.end_lineno - 1].partition("  # ")[2]
            for statement in ast.parse(source).body if isinstance(statement, ast.Assign)
            for target in statement.targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _parse(text: str, default: object) -> object:
    """`text` as a value of `default`'s type; ValueError or KeyError where it does not read as one."""
    if isinstance(default, bool):  # before int: a bool is an int
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, float):
        if not math.isfinite(float(text)):
            raise ValueError(text)
        return float(text)
    if isinstance(default, tuple):
        like = next((item for item in default if isinstance(item, float)), default[0])
        return tuple(_parse(part, like) for part in text.split(","))
    if isinstance(default, dict):
        if ":" not in text:
            return {key: _parse(text, value) for key, value in default.items()}
        keys = {str(key): key for key in default}
        pairs = (part.split(":", 1) for part in text.split(","))
        return default | {keys[key]: _parse(value, default[keys[key]]) for key, value in pairs}
    return type(default)(text)


def _show(value: object) -> str:
    """`value` as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    if isinstance(value, dict):
        return ",".join(f"{key}:{_show(item)}" for key, item in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def positive(constants: dict[str, object], /, *names: str) -> None:
    """Raise UserError naming the first of these constants that is not > 0; of a tuple or dict, all items."""
    for name in names:
        value = constants[name]
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if not all(item > 0 for item in items):
            raise UserError(f"{name}={_show(value)} must be greater than 0")


def not_negative(constants: dict[str, object], /, *names: str) -> None:
    """Raise UserError naming the first of these constants that is below 0 or, as a seed, too large for NumPy."""
    for name in names:
        if not 0 <= constants[name] < 2**32:
            raise UserError(f"{name}={constants[name]} must be 0 or more, and below 2^32")


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


def features(features: str, run_dir: Path) -> Path:
    """The path of the cache: `features`, or features.h5 in the run folder where it is empty."""
    return Path(features).expanduser() if features else run_dir / "features.h5"


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


def require_finite(values: dict[str, float], where: str) -> None:
    """Raise UserError naming the first of these numbers that is NaN or infinite; `where` says what they came from."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name.replace('_', ' ')} is {value} {where}: lower LEARNING_RATE, or look at what goes "
                            "in; what was saved before is intact")


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


def require_intact(path: Path) -> None:
    """Raises ValueError or zipfile's errors where a part of the zip file `path` is not what was written.

    torch.save writes zip files, and torch.load does not look at their checksums. A file of another kind has none, and
    passes.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if broken := parts.testzip():
                raise ValueError(f"{broken} is not what was written")
