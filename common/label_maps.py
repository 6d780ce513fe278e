"""Masks on disk, and the label maps that are read from them. What is not plain is refused."""

import shlex
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from common.images import (
    QUARTER_TURNS,
    SAME_SHAPE,
    Sample,
    image_size,
    opened,
    orientation_of,
    stored_bits,
)
from common.masks import IGNORE, binary_mask, contradiction, refuse_few_bits
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.tasks import Task

ASPECT_TOLERANCE = 0.02  # relative, of height / width, between an image and a mask of another size


def load_label_map(sample: Sample, task: Task, image_size: tuple[int, int]) -> np.ndarray:
    """The mask as a uint8 (H, W) label map: 0 is background and k the task's k-th text.

    image_size: (H, W) of `load_image(sample.image)`, in whose frame the label map is.

    A binary mask may have any picture mode; `binary_mask` says what is read. White is foreground,
    or background if the task says so. VOC masks hold palette indices. `IGNORE` = 255 is where there
    is no truth. A mask of another scale is resized to the nearest label.

    If EXIF turns the photograph, the mask is taken to be drawn on the turned view if its size or
    aspect fits that. Otherwise it is taken to be drawn on the stored pixels, and is turned too. A
    mask with EXIF data of its own is turned by these alone.

    Raises UserError naming the mask if it cannot be read, has no usable values, or has another
    aspect than the image.
    """
    return read_mask(sample, task, image_size)[0]


def read_mask(sample: Sample, task: Task, image_size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """The label map of `load_label_map`, and how the mask was read: "0 and 255", for one."""
    with opened(sample.mask) as picture:
        bits = stored_bits(picture)  # first, as a PNG forgets them when its EXIF data are read
        has_own_turn = orientation_of(picture) != 1
        if task.dataset == "voc":
            label_map, how = palette_indices(picture, bits, sample.mask, task), "palette indices"
        else:
            label_map, how = binary_mask(picture, bits, sample.mask, task)
    if not task.white_is_foreground:
        label_map = np.where(label_map == IGNORE, IGNORE, 1 - label_map).astype(np.uint8)
    if label_map.shape == tuple(image_size):
        return label_map, how
    return _fit(label_map, sample, tuple(image_size), not has_own_turn), how


class Checked(NamedTuple):
    """What `check_samples` learned of one sample."""

    size: tuple[int, int]  # (H, W) of the image
    how: str  # how its mask was read: "0 and 255", for one
    foreground: float  # share of foreground among the pixels that are not ignored; 0 if all are
    crc: int  # CRC-32 of its label map, as a cache keeps it


def check_samples(samples: list[Sample], task: Task) -> list[Checked]:
    """Reads every mask once, before hours are spent on the images.

    Raises UserError that names all images and masks which cannot be used, the first ten of them
    with their faults, and the SKIP that leaves them out, or that says how masks of the task
    "folder" contradict each other. Images of that task which EXIF turns in a way that no mask's
    shape shows are named on stdout.
    """
    checked, faults, read_so, turned = [], {}, {}, []
    for sample in tqdm(samples, "checking masks", leave=False, disable=distributed.RANK > 0):
        try:
            size = image_size(sample.image)
            label_map, how = read_mask(sample, task, size)
            known = label_map[label_map != IGNORE]
            if not known.size and len(task.texts) == 1:
                raise UserError(f"{sample.mask} holds nothing but 255 (ignore)")
            share = float((known > 0).mean()) if known.size else 0.0
            checked.append(Checked(size, how, share, zlib.crc32(np.ascontiguousarray(label_map))))
            read_so.setdefault(how, sample.mask.name)
            if task.dataset == "folder":
                with opened(sample.image) as picture:
                    square = QUARTER_TURNS if size[0] == size[1] else ()
                    if orientation_of(picture) in (*SAME_SHAPE, *square):
                        turned.append(sample.image.name)
        except UserError as error:
            faults[sample.place] = str(error)
    said = [with_skip(faults)] if faults else []
    if task.dataset == "folder" and (fault := contradiction(read_so)):
        said.append(fault)
    if said:
        raise UserError("; ".join(said))
    if turned and distributed.RANK == 0:
        print(f"EXIF turns or mirrors {some(turned)}, which their shape does not show: a mask "
              "without EXIF data is taken to be drawn on that view; data.png shows some")
    return checked


def with_skip(faults: dict[str, str]) -> str:
    """What is wrong with ten samples at most, and the SKIP that leaves all of them out.

    faults: {`Sample.place`: what is wrong with it}; more than 100 are not listed in the SKIP.
    """
    sentences, skip = list(faults.values()), shlex.quote(",".join(sorted(faults)))
    if len(faults) > 100:
        skip = "names.txt, a list of their names"
    if len(faults) > 10:
        sentences[10:] = [f"and {len(faults) - 10} more"]
    return "; ".join([*sentences, f"or leave them out by SKIP={skip}"])


def untrainable(label_map: np.ndarray) -> str | None:
    """Why a label map (H, W) cannot be trained on; None if it can.

    An episode starts from one positive and one negative point (paper, Algorithm 1), so it needs
    foreground and background.
    """
    present = np.setdiff1d(label_map, [IGNORE])
    if len(present) < 2:
        return "full (no background)" if present.any() else "empty (no foreground)"
    return None


def palette_indices(picture: Image.Image, bits: int, path: Path, task: Task) -> np.ndarray:
    """The label map, uint8 (H, W), of the mask of palette indices in `path`.

    bits: `stored_bits(picture)`, taken before anything else was asked of the picture.
    Raises UserError, naming the mask, if it holds none or one that is not a class of the task.
    """
    if picture.mode not in ("P", "L"):
        raise UserError(f"{path} holds {picture.mode} pixels and no palette indices: save each "
                        "class as its number in a PNG of 8 bits, as VOC 2012's own archive has "
                        "them in SegmentationClass")
    if picture.format != "PNG":
        raise UserError(f"{path} is a {picture.format} inside, which may change the class "
                        "numbers: save it as a PNG of palette indices")
    refuse_few_bits(picture, bits, path)
    # the indices of a palette picture; convert() would give colours
    label_map = np.array(ImageOps.exif_transpose(picture))
    wrong = np.setdiff1d(label_map, [*range(len(task.texts) + 1), IGNORE])
    if len(wrong):
        raise UserError(f"{path} holds the index {wrong[0]}, but {task.title} has the "
                        f"classes 1 to {len(task.texts)}, 0 for the background and {IGNORE} to "
                        "ignore")
    return label_map


def _fit(label_map: np.ndarray, sample: Sample, image_size: tuple[int, int],
         may_turn: bool) -> np.ndarray:
    """A label map of another size at image_size (H, W), turned first if it fits only so."""
    mask = Image.fromarray(label_map)
    if label_map.shape == image_size[::-1] or not _same_aspect(label_map.shape, image_size):
        with opened(sample.image) as picture:
            orientation = orientation_of(picture)
        if may_turn and orientation in QUARTER_TURNS:
            mask.getexif()[ExifTags.Base.Orientation] = orientation
            mask = ImageOps.exif_transpose(mask)
    if not _same_aspect((mask.height, mask.width), image_size):
        (mask_height, mask_width), (height, width) = label_map.shape, image_size
        raise UserError(f"{sample.mask} is {mask_width} x {mask_height}, which does not fit "
                        f"{sample.image.name} of {width} x {height} (width x height): save the "
                        "mask in the size of its image")
    return np.array(mask.resize(image_size[::-1], Image.Resampling.NEAREST))


def _same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes (H, W) agree in height / width within ASPECT_TOLERANCE."""
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) <= ASPECT_TOLERANCE

