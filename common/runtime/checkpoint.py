"""What stages 2 to 4 keep on disk: weights, optimiser, random state, log, rows, and the settings that made them."""

import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch

from common.runtime.errors import UserError
from common.runtime.files import require_intact, write_atomic
from common.runtime.settings import require_same

CONTENT = {"settings": dict, "finished": bool}  # of every such file,
TRAINING = {"generator": torch.Tensor, "log": list}  # and of one that training goes on from
SETTINGS = {"task": str, "branch": str, "seed": int, "shots": int, "rounds": int, "every_text": bool, "residual": float,
            "features": str}  # that stages read


def save(path: Path, content: dict) -> None:
    """Writes `content` (tensors, numbers, strings, and lists and dicts of them) so that no reader meets half of it."""
    buffer = io.BytesIO()  # given a path, torch.save reports a full disk as a RuntimeError without a reason
    torch.save(content, buffer)
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def save_training(path: Path, made_with: dict, log: list[dict], finished: bool, **parts) -> None:
    """Saves a training run as it is: what made it, its log, and `parts`, which `resume` puts back.

    parts: modules, optimisers, generators, or plain numbers, by name.
    """
    content = {"settings": made_with, "log": log, "finished": finished}
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            content[name] = part.get_state()
        else:
            content[name] = part.state_dict() if hasattr(part, "state_dict") else part
    save(path, content)


def load(path: Path, stage: str, **further: type) -> dict:
    """The content saved at `path`, on the CPU; no code in the file is run.

    further: names and types of what it must hold beside `CONTENT`.
    Raises UserError where the file is missing (naming the `stage` command that makes it), is not such a file, does not
    hold what it was written with, or holds numbers that are not finite.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: run {stage} first")
    try:
        require_intact(path)  # torch.load does not look at the checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
        for held, kinds in ((content, CONTENT | further), (content["settings"], SETTINGS)):
            if wrong := [name for name, kind in kinds.items() if not isinstance(held[name], kind)]:
                raise ValueError(f"{wrong[0]} is no {kinds[wrong[0]].__name__}")
        if content["settings"]["branch"] not in ("implicit", "explicit"):
            raise ValueError("it is of no branch")
        if not all(isinstance(value, (int, float)) for row in content.get("log", ()) for value in row.values()):
            raise ValueError("the log does not hold numbers")
        finite = all(tensor.isfinite().all() for tensor in _tensors(content))
    except Exception as error:  # which type it is depends on where in the file torch stumbles
        raise UserError(f"{path} is damaged or was not written by {stage}: delete it and run that again") from error
    if not finite:
        raise UserError(f"{path} holds NaN or infinite values: delete it and run {stage} again")
    return content


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Every tensor in `content`, however deep."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _tensors(item)


def restore(path: Path, content: dict, **parts: torch.nn.Module | torch.optim.Optimizer | torch.Generator) -> None:
    """Puts what `load` read from `path` under their names into modules, optimisers and generators.

    Raises UserError where it does not fit them.
    """
    try:
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(content[name])
                continue
            part.load_state_dict(content[name])
            if isinstance(part, torch.optim.Optimizer):  # which does not compare shapes itself
                for weight, state in part.state.items():
                    if any(value.shape not in ((), weight.shape) for value in state.values()):
                        raise ValueError(f"the state of {name} is of another shape")
    except Exception as error:  # PyTorch raises nearly anything here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the networks there are now ({type(error).__name__}: {reason}): delete it "
                        "and run its stage again, or name another RUN_DIR") from error


def load_finished(path: Path, stage: str, wanted: dict) -> dict:
    """The content of a file that training is done with; further raises UserError where it is not.

    stage: the command that writes `path`. wanted: settings that it must have been made with.
    """
    content = load(path, stage, **TRAINING)
    if not content["finished"]:
        raise UserError(f"{path} is from an unfinished run: run {stage} again, it goes on where it stopped")
    require_same(path, content["settings"], wanted)
    return content


def resume(path: Path, stage: str, made_with: dict, further: dict[str, type], **parts) -> dict | None:
    """Puts a stopped run's state back into `parts` (see `restore`); None where there is none yet.

    stage: the command that writes `path`. made_with: the settings that it must have been made with.
    further: names and types of what it must hold beside `CONTENT` and `TRAINING`. Returns the content.
    """
    if not path.exists():
        return None
    content = load(path, stage, **TRAINING, **further)
    require_same(path, content["settings"], made_with)
    restore(path, content, **parts)
    return content


def write_log(path: Path, rows: list[dict]) -> None:
    """The log so far as CSV, one column a quantity; nothing where it has no row yet."""
    if not rows:
        return
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    write_atomic(path, write)


def read_log(path: Path) -> list[dict[str, float]]:
    """What `write_log` wrote; empty where the file is missing or was not written by it."""
    try:
        with open(path, newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """16 hex digits over a state dict, to tell whether two runs stand on the same weights."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
