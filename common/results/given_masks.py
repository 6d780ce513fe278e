"""Rows of other systems, scored from the masks that these have made of the test images.

MASKS of stage 4 names rows and folders. A folder holds a PNG for each test image, named as IMAGES=
names its masks: photo.png, white on black, and for a task of several texts photo-<text>.png for
each text that the image truly holds, or one indexed photo.png: 0 = nothing, k = the task's k-th
text, 255 = no text. Other files in the folder are not used.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.cache import Cache
from common.images import as_array, composed, opened, stored_bits, upper_bytes_alone
from common.label_maps import palette_indices
from common.metrics import Score
from common.results.outputs import Drawing
from common.results.own_images import name_files
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.runtime.files import expanded
from common.runtime.progress import progress
from common.tasks import get_task

LISTED = "masks.json"  # beside masks that common.rivals.peft has written: what made them


@dataclass(frozen=True)
class GivenMasks:
    """The masks of one row."""

    row: str
    paths: list[Path]  # S, of the test samples in their order
    indexed: bool  # whether these are indexed pictures
    cache: Cache
    samples: np.ndarray  # the test samples, int (S, 2): image row, text index

    def read(self, number: int) -> np.ndarray:
        """The mask of the sample of that number as it was saved, bool (H', W')."""
        path, text = self.paths[number], int(self.samples[number][1])
        if not self.indexed:
            return read_binary(path)
        task = get_task(self.cache.attrs["task"], "-")
        with opened(path) as picture:
            return palette_indices(picture, stored_bits(picture), path, task) == 1 + text

    def score(self, numbers: Sequence[int], drawing: Drawing) -> list[Score]:
        """Scores and pictures of the samples of these numbers; there are no rounds and points."""
        scores = []
        for number in progress(numbers, self.row, len(numbers)):
            label_map = self.cache.label_map(self.samples[number])
            masks = fit(self.read(number), label_map.shape, self.paths[number])[None]
            score = Score.of(number, masks, label_map, chosen=0, hits=0)
            pictures = drawing.draw(self.row, score, masks, label_map, np.empty((0, 2)),
                                    np.empty(0))
            scores.append(score._replace(pictures=pictures))
        return scores


def open_all(given: str, own_rows: Collection[str], cache: Cache,
             samples: np.ndarray) -> tuple[dict[str, GivenMasks], dict[str, dict]]:
    """Reads every mask of every row once, and says on stdout what was found.

    given: the constant MASKS, see `split`. samples: the test samples, int (S, 2).
    Returns {row: its masks} and {row: its record}: the folder, a digest of all masks as they are
    scored, how many of them are resized, and how they were trained, where peft has written them.
    Raises UserError that names all masks which are missing or cannot be used, the first ten of them
    with their faults.
    """
    masks, records, faults = {}, {}, []
    for row, folder in split(given, own_rows).items():
        masks[row], missing, unused = find(row, folder, cache, samples)
        if missing:
            several = ", or each image an indexed picture" if len(cache.texts) > 1 else ""
            faults.append(f"{folder} has no {some(missing)}: each test sample needs its mask"
                          f"{several}")
            continue
        digest, resized, bad = hashlib.sha256(), 0, {}
        numbers = tqdm(range(len(samples)), f"checking the masks of {row}", leave=False,
                       disable=distributed.RANK > 0)
        for number in numbers:
            size, path = cache.label_map(samples[number]).shape, masks[row].paths[number]
            try:
                mask = masks[row].read(number)
                digest.update(np.packbits(fit(mask, size, path)))
                resized += mask.shape != size
            except UserError as error:
                bad[path] = str(error)  # once, if several samples share an indexed picture
        faults += bad.values()
        records[row] = {"folder": str(folder), "digest": digest.hexdigest()[:16],
                        "resized": resized, **training_of(folder)}
        said = f"{row}: {len(samples)} masks from {folder}"
        if resized:
            said += f", {resized} of them resized to their images (nearest pixel)"
        if unused:
            said += f"; other files, not used: {len(unused)} ({some(unused)})"
        print(said)
    if len(faults) > 10:
        faults[10:] = [f"and {len(faults) - 10} more"]
    if faults:
        raise UserError("; ".join(faults))
    return masks, records


def training_of(folder: Path) -> dict[str, dict]:
    """{"training": settings} of the program that has written these masks; empty if none says so."""
    try:
        content = json.loads((folder / LISTED).read_text(encoding="utf-8"))
        return {"training": dict(content["training"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def split(given: str, own_rows: Collection[str]) -> dict[str, Path]:
    """{row: folder} of "row:folder,row:folder"; empty where that is.

    Raises UserError where it does not read so, where a row has the name of one of `own_rows` or of
    another, or one that cannot stand in a table, and where a folder is none.
    """
    folders = {}
    for item in given.split(",") if given else ():
        row, _, folder = (part.strip() for part in item.partition(":"))
        if not row or not folder:
            raise UserError(f"MASKS holds {item!r}, which names no row and folder: write "
                            "row:folder, and commas between several")
        if row in own_rows or row in folders:
            raise UserError(f"MASKS names the row {row}, and there is another of that name: call "
                            "it otherwise")
        if "|" in row or not row.isprintable():
            raise UserError(f"MASKS names the row {row!r}, which cannot stand in a table: leave "
                            "out | and what cannot be printed")
        folders[row] = expanded(folder)
        if not folders[row].is_dir():
            raise UserError(f"MASKS names {folder} for {row}, which is no folder: name the one "
                            "that holds its masks")
    return folders


def find(row: str, folder: Path, cache: Cache,
         samples: np.ndarray) -> tuple[GivenMasks, list[str], list[str]]:
    """A row's files: its masks, names of files that are missing, and of others that are there.

    For a task of several texts the files are taken to be indexed pictures if a smaller share of
    these is missing than of the masks of single texts.
    """
    there = {composed(path.name): path for path in sorted(folder.iterdir()) if path.is_file()}
    images = [Path(f"{cache.name(sample)}.png") for sample in samples]
    wanted, indexed = [image.name for image in images], False
    if len(cache.texts) > 1:
        names = name_files(list(dict.fromkeys(images)), list(cache.texts))
        of_texts = [f"{names[image][text]}.png" for image, (_, text) in zip(images, samples)]
        indexed = share_missing(wanted, there) < share_missing(of_texts, there)
        wanted = wanted if indexed else of_texts
    missing = sorted({*wanted} - {*there})
    unused = sorted({*there} - {*wanted})
    paths = [there.get(name, folder / name) for name in wanted]
    return GivenMasks(row, paths, indexed, cache, samples), missing, unused


def share_missing(wanted: list[str], there: Collection[str]) -> float:
    """The share of the names that are not there; each counts once."""
    return len({*wanted} - {*there}) / len({*wanted})


def read_binary(path: Path) -> np.ndarray:
    """A mask that is white (or 1) on black, bool (H, W); it may be empty or full.

    Grey is refused and not parted at one half: a system's threshold is part of the system, and its
    authors may have chosen another. All rows are scored as binary masks.
    Raises UserError naming a file that cannot be read, or is not black and white.
    """
    with opened(path) as picture:
        cut = upper_bytes_alone(picture, stored_bits(picture))
        picture = ImageOps.exif_transpose(picture)
        see_through = (picture.has_transparency_data
                       and picture.convert("RGBA").getextrema()[3] != (255, 255))
        pixels = as_array(picture, "RGB", path)
    levels = np.unique(pixels).tolist()
    if cut or see_through or (pixels != pixels[..., :1]).any():
        raise UserError(f"{path} holds colours, transparency or 16 bits a channel: save it as "
                        "white on black with 8 bits a pixel")
    if not (set(levels) <= {0, 255} or set(levels) <= {0, 1}):
        raise UserError(f"{path} holds the grey levels {some([*map(str, levels)])}: threshold it "
                        "as its system does (a probability at 0.5, if nothing else is said) and "
                        "save it as 0 and 255")
    return pixels[..., 0] > 0


def fit(mask: np.ndarray, size: tuple[int, int], path: Path) -> np.ndarray:
    """A mask bool (H', W') at `size` (H, W), by the nearest pixel.

    Raises UserError, naming `path`, unless one of its sides is the rounded one that the other side
    and the image's aspect give.
    """
    (height, width), (its_height, its_width) = size, mask.shape
    if abs(its_height * width - its_width * height) >= max(height, width):
        raise UserError(f"{path} is {its_width} x {its_height}, which does not fit its image of "
                        f"{width} x {height} (width x height): save it in the size of its image")
    if mask.shape == size:
        return mask
    return np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
