"""The files in which stages 2 to 4, and the trainings of rivals and stand-ins, keep their progress.

Such a file holds the settings that made it, and weights, the optimiser's state, the random state,
the log, or the finished rows of the evaluation.
"""

import csv
import hashlib
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from common.runtime.errors import UserError
from common.runtime.files import require_intact, write_atomic
from common.runtime.reading import reading
from common.runtime.settings import require_same

# Names and types: of every such file, of one that training can go on from, and of the settings
# that the stages read from each other's files.
CONTENT = {"settings": dict, "finished": bool}
TRAINING = {"generator": torch.Tensor, "log": list}
SETTINGS = {"task": str, "branch": str, "seed": int, "shots": int, "rounds": int,
            "every_text": bool, "residual": float, "features": str}


def save(path: Path, content: dict) -> None:
    """Writes `content` to `path`, all of it or nothing.

    content: tensors, numbers, strings, and lists, tuples and dicts of them.
    """
    # Into memory first: given a path, torch.save reports a full disk as a RuntimeError that does
    # not say why.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def save_training(path: Path, made_with: dict, log: list[dict], finished: bool, **parts) -> None:
    """Saves the present state of a training run: its settings, its log, and its `parts`.

    parts: modules, optimisers, generators, or plain numbers, by name; `resume` puts them back.
    """
    content = {"settings": made_with, "log": log, "finished": finished}
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            content[name] = part.get_state()
        elif hasattr(part, "state_dict"):
            content[name] = part.state_dict()
        else:
            content[name] = part
    save(path, content)


def load(path: Path, stage: str, settings: dict[str, type] = SETTINGS, **further: type) -> dict:
    """The content saved at `path`, on the CPU; no code in the file is run.

    stage: the command that writes `path`. settings: names and types of settings that it must have.
    further: names and types of what it must hold beside `CONTENT`.
    Raises UserError if the file is missing, cannot be read, is of another kind, is damaged, or
    holds numbers that are not finite.
    """
    try:
        with reading(path, f"run {stage} first"):
            require_intact(path)  # torch.load does not look at the checksums
            content = torch.load(path, map_location="cpu", weights_only=True)
        _require_types(content, CONTENT | further)
        _require_types(content["settings"], settings)
        if "branch" in settings:
            if content["settings"]["branch"] not in ("implicit", "explicit"):
                raise ValueError("its branch is neither implicit nor explicit")
            content["settings"].setdefault("heads", 4)  # of files from before it was recorded
        for row in content.get("log", ()):
            if not all(isinstance(value, (int, float)) for value in row.values()):
                raise ValueError("its log holds something that is not a number")
        finite = all(tensor.isfinite().all() for tensor in _tensors(content))
    except UserError:
        raise
    except Exception as error:  # its type depends on where in the file torch fails
        raise UserError(f"{path} is damaged or was not written by {stage}: delete it and run that "
                        "again") from error
    if not finite:
        raise UserError(f"{path} holds NaN or infinite values: delete it and run {stage} again")
    return content


def _require_types(content: dict, types: dict[str, type]) -> None:
    """Raises KeyError or ValueError if `content` lacks one of the names or holds another type."""
    for name, kind in types.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} is not of type {kind.__name__}")


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Every tensor in `content`, at any depth of dicts and lists."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for item in content.values():
            yield from _tensors(item)
    elif isinstance(content, list):
        for item in content:
            yield from _tensors(item)


def restore(path: Path, content: dict, mend: str | None = None,
            **parts: torch.nn.Module | torch.optim.Optimizer | torch.Generator) -> None:
    """Puts the states in `content`, which `load` read from `path`, back into `parts` by name.

    mend: what the user should do, if not the usual. Raises UserError if a state does not fit.
    """
    try:
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(content[name])
                continue
            part.load_state_dict(content[name])
            if isinstance(part, torch.optim.Optimizer):
                _require_shapes(name, part)
    except Exception as error:  # PyTorch raises nearly anything here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the networks there are now "
                        f"({type(error).__name__}: {reason}): "
                        f"{mend or 'delete it and run its stage again, or name another RUN_DIR'}"
                        ) from error


def _require_shapes(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if a state does not fit its weight; PyTorch does not compare the shapes."""
    for weight, state in optimizer.state.items():
        if any(value.shape not in ((), weight.shape) for value in state.values()):
            raise ValueError(f"the state of {name} has another shape")


def load_finished(path: Path, stage: str, wanted: dict, read: Collection[str] = ()) -> dict:
    """The content of a finished training run.

    stage: the command that writes `path`. wanted: settings that it must have been made with.
    read: further settings that it must have.
    Raises UserError like `load`, and if the run is not finished or was made with other settings.
    """
    content = load(path, stage, SETTINGS | dict.fromkeys(read, object), **TRAINING)
    if not content["finished"]:
        raise UserError(f"{path} is from an unfinished run: run {stage} again, it goes on where it "
                        "stopped")
    require_same(path, content["settings"], wanted)
    return content


def resume(path: Path, stage: str, made_with: dict, further: dict[str, type],
           settings: dict[str, type] = SETTINGS, mend: str | None = None,
           **parts) -> dict | None:
    """Puts the state of a stopped run back into `parts` (see `restore`) and returns the content.

    stage: the command that writes `path`. made_with: the settings of the present run.
    further: names and types of what it must hold beside `CONTENT` and `TRAINING`.
    settings: as in `load`. mend: as in `require_same` and `restore`.
    Returns None if there is no such file yet. Raises UserError like `load` and `restore`, and if
    the file was made with other settings.
    """
    if not os.path.lexists(path):  # a link to nothing is refused below
        return None
    content = load(path, stage, settings, **TRAINING, **further)
    require_same(path, content["settings"], made_with, mend)
    restore(path, content, mend, **parts)
    return content


def write_log(path: Path, rows: list[dict]) -> None:
    """Writes the log so far as CSV, one column for each quantity; nothing if it has no row yet."""
    if not rows:
        return

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({name: f"{value:.6g}" for name, value in row.items()})

    write_atomic(path, write)


def read_log(path: Path) -> list[dict[str, float]]:
    """What `write_log` wrote; empty if the file is missing or was not written by it."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items()}
                    for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """16 hex digits that identify a state dict, to tell whether two runs used the same weights."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
