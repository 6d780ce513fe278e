"""What stages 2 and 3 keep on disk: weights, optimiser, random state, log and the settings that made them."""

import csv
import hashlib
from pathlib import Path

import torch

from common.errors import UserError
from common.settings import write_atomic


def save(path: Path, content: dict) -> None:
    """Writes `content` (tensors, numbers, strings, and lists and dicts of them) so that no reader meets half of it."""
    write_atomic(path, lambda temporary: torch.save(content, temporary))


def load(path: Path, stage: str) -> dict:
    """The content saved at `path`, on the CPU; no code in the file is run.

    Raises UserError where the file is missing (naming the `stage` command that makes it) or is not such a file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: run {stage} first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"], content["finished"]
    except Exception as error:  # which type it is depends on where in the file torch stumbles
        raise UserError(f"{path} is damaged or was not written by {stage}: delete it and run that again") from error
    return content


def require_same(path: Path, stored: dict, settings: dict) -> None:
    """Raises UserError naming the first of the present settings that contradicts those stored in `path`.

    "features" and "srm" are fingerprints of the files that `path` was made from; the others are constants.
    """
    for name, value in settings.items():
        if name in ("features", "srm") and stored.get(name) != value:
            raise UserError(f"{path} was made from another {name} file than the one there is now: delete it and run its "
                            "stage again, or name another RUN_DIR")
        if stored.get(name) != value:
            raise UserError(f"{path} was made with {name.upper()}={stored.get(name)}, and now it is {value}: set it back, "
                            "name another RUN_DIR, or delete the file")


def require_finished(path: Path, content: dict, stage: str) -> None:
    """Raises UserError where the stage that writes `path` was stopped before its end."""
    if not content["finished"]:
        raise UserError(f"{path} is from an unfinished run: run {stage} again, it goes on where it stopped")


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
    except (OSError, ValueError, TypeError):
        return []


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """16 hex digits over a state dict, to tell whether two runs stand on the same weights."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
