"""A script's constants: taken from the command line, checked, compared with those of a file."""

import ast
import difflib
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from common.runtime.errors import UserError

MEND = "set it back, name another RUN_DIR, or delete the file"
MEND_FILE = "run its stage in another RUN_DIR, or delete it"
FINGERPRINTS = ("features", "srm")  # settings that are fingerprints of files, not constants
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "values joined by commas",
    dict: "one value for all, or name:value pairs joined by commas",
}


def override(constants: dict[str, object], argv: list[str]) -> None:
    """Replaces UPPER_CASE `constants` by the values in `argv`, each given as NAME=value.

    A value is read as the type of the constant's default. A tuple is given as 1,2,3; a dict as one
    value for all its keys, or as key:value,key:value, where keys that are left out keep their
    default. `help` prints the constants with their comments and exits.

    Names that start with an underscore and values of other types cannot be given. Nor can
    constants that the script imports: they would change in the script alone.
    Raises UserError; then nothing is replaced.
    """
    if "__file__" in constants:
        comments = _comments(Path(constants["__file__"]))
    else:
        comments = dict.fromkeys(constants, "")
    settable = {name: value for name, value in constants.items()
                if name in comments and _is_settable(name, value)}
    if any(argument in ("help", "--help", "-h") for argument in argv):
        _print_help(constants, settable, comments)
        sys.exit(0)
    listed = "the constants are " + ", ".join(f"{name}={_show(value)}"
                                              for name, value in settable.items())
    given = {}
    for before, argument in zip(["", *argv], argv):
        name, equals, text = argument.partition("=")
        if not equals:
            quoted = before.replace("=", '="') + f' {argument}"'
            hint = f" (a value with spaces needs quotes: {quoted})" if before else ""
            raise UserError(f"{argument!r} is not of the form NAME=value{hint}; {listed}")
        if name not in settable:
            likely = name.strip("-").replace("-", "_").upper()
            near = difflib.get_close_matches(likely, settable, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"there is no constant {name}{hint}; {listed}")
        try:
            given[name] = _parse(text, settable[name])
        except (ValueError, KeyError):
            kind = KINDS[type(settable[name])]
            raise UserError(f"{argument} does not read as {kind}; {listed}") from None
    constants.update(given)


def _comments(script: Path) -> dict[str, str]:
    """{name: the comment after it} of all names assigned outside functions and classes."""
    source = script.read_text(encoding="utf-8")
    lines = source.splitlines()
    comments = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign):
            continue
        comment = lines[statement.end_lineno - 1].partition("  # ")[2]
        for target in statement.targets:
            names = (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
            comments |= dict.fromkeys(names, comment)
    return comments


def _is_settable(name: str, value: object) -> bool:
    """Whether a constant of this name and default can be given; an empty default has no type."""
    if not name.isupper() or name.startswith("_"):
        return False
    return isinstance(value, tuple(KINDS)) and value not in ((), {})


def _print_help(constants: dict[str, object], settable: dict[str, object],
                comments: dict[str, str]) -> None:
    """Prints the script's docstring, how it is called, and its constants with their comments."""
    print((constants.get("__doc__") or "").strip())
    spec = constants.get("__spec__")  # python -m sets it
    script = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    print(f"\nusage: python {script} [NAME=value ...]\n")
    shown = {name: f"{name}={_show(value)}" for name, value in settable.items()}
    width = min(32, max(map(len, shown.values())))
    for name in settable:
        print(f"  {shown[name]:{width}}  {comments[name]}".rstrip())


def _parse(text: str, default: object) -> object:
    """`text` read as a value of `default`'s type. Raises ValueError or KeyError if it is none."""
    if isinstance(default, bool):  # before int: a bool is an int
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, float):
        if not math.isfinite(float(text)):
            raise ValueError(text)
        return float(text)
    if isinstance(default, tuple):  # its items are floats if one of them is
        like = next((item for item in default if isinstance(item, float)), default[0])
        return tuple(_parse(part.strip(), like) for part in text.split(","))
    if isinstance(default, dict):
        if ":" not in text:
            return {key: _parse(text, value) for key, value in default.items()}
        keys = {str(key): key for key in default}
        value = dict(default)
        for pair in text.split(","):
            name, item = (part.strip() for part in pair.split(":", 1))
            value[keys[name]] = _parse(item, default[keys[name]])
        return value
    return type(default)(text)


def _show(value: object) -> str:
    """`value` as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    if isinstance(value, dict):
        return ",".join(f"{key}:{_show(item)}" for key, item in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def positive(constants: dict[str, object], /, *names: str) -> None:
    """Raises UserError naming the first of these constants that is not greater than 0.

    Of a tuple or a dict every item must be. Numbers of 2^31 and more are refused too: no stage
    has a use for them, and libraries overflow.
    """
    for name in names:
        value = constants[name]
        if isinstance(value, dict):
            items = value.values()
        else:
            items = value if isinstance(value, tuple) else (value,)
        if not all(item > 0 for item in items):
            raise UserError(f"{name}={_show(value)} must be greater than 0")
        if not all(item < 2**31 for item in items):
            raise UserError(f"{name}={_show(value)} must be below 2^31")


def not_negative(constants: dict[str, object], /, *names: str) -> None:
    """Raises UserError naming the first of these constants that is below 0, or above 2^32 - 1.

    NumPy takes no larger seed.
    """
    for name in names:
        if not 0 <= constants[name] < 2**32:
            raise UserError(f"{name}={constants[name]} must be 0 or more, and below 2^32")


def at_most(constants: dict[str, object], most: int, /, *names: str) -> None:
    """Raises UserError naming the first of these constants that is above `most`."""
    for name in names:
        if constants[name] > most:
            raise UserError(f"{name}={constants[name]} is more than any use or memory: set it to "
                            f"{most} or less")


def choose(name: str, wanted: tuple[str, ...], known: Iterable[str]) -> list[str]:
    """The names in `wanted`, the value of constant `name`, once each; ("all",) means all known.

    Raises UserError at the first that is not known.
    """
    known = list(known)
    if wanted == ("all",):
        return known
    if "all" in wanted:
        raise UserError(f"{name} names all and others: set it to all alone, or to some of: "
                        f"{', '.join(known)}")
    for one in wanted:
        if one not in known:
            raise UserError(f"{name} names {one!r}: set it to all, or to some of: "
                            f"{', '.join(known)}")
    return list(dict.fromkeys(wanted))


def require_same(path: Path, stored: dict, wanted: dict, mend: str | None = None) -> None:
    """Raises UserError at the first setting in which the file `path` differs from `wanted`.

    stored: what `path` was made with. wanted: values by the constants' names in lower case. Names
    in FINGERPRINTS stand for files that `path` was made from. mend: what the user should do, if
    not the usual; it ends the message.
    """
    for name, value in wanted.items():
        if stored.get(name) == value:
            continue
        if name in FINGERPRINTS:
            raise UserError(f"{path} was made from another {name} file than the one there is now: "
                            f"{mend or MEND_FILE}")
        was = stored.get(name, "empty")
        raise UserError(f"{path} was made with {name.upper()}={was}, and now it is {value}: "
                        f"{mend or MEND}")
