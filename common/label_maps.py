"""Masks on disk, and the label maps that are read from them. What is not plain is refused."""

from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from common.images import QUARTER_TURNS, Sample, as_array, image_size, opened, orientation_of
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.tasks import Task

IGNORE = 255  # label of pixels without a truth (VOC's outlines)
_NEARLY_BLACK = 16  # grey level up to which a mask's pixel counts as black
ASPECT_TOLERANCE = 0.02  # relative, of height / width, between an image and a mask of another size


def load_label_map(sample: Sample, task: Task, image_size: tuple[int, int]) -> np.ndarray:
    """The mask as a uint8 (H, W) label map: 0 is background and k the task's k-th text.

    image_size: (H, W) of `load_image(sample.image)`, in whose frame the label map is.

    A binary mask may have any picture mode. It is foreground above 127 of 255, or background there
    if the task says so; `_binary_label_map` says what else is read. VOC masks hold palette indices.
    `IGNORE` = 255 is where there is no truth. A mask of another scale is resized to the nearest
    label.

    If EXIF turns the photograph, the mask is taken to be drawn on the turned view if its size or
    aspect fits that. Otherwise it is taken to be drawn on the stored pixels, and is turned too.

    Raises UserError naming the mask if it cannot be read, has no usable values, or has another
    aspect than the image.
    """
    return read_mask(sample, task, image_size)[0]


def read_mask(sample: Sample, task: Task, image_size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """The label map of `load_label_map`, and how the mask was read: "0 and 255", for one."""
    with opened(sample.mask) as picture:
        if task.dataset == "voc":
            label_map, how = _voc_label_map(picture, sample, task), "palette indices"
        else:
            label_map, how = _binary_label_map(picture, sample), "0 and 255"
    if not task.white_is_foreground:
        label_map = np.where(label_map == IGNORE, IGNORE, 1 - label_map).astype(np.uint8)
    if label_map.shape == tuple(image_size):
        return label_map, how
    return _fit(label_map, sample, tuple(image_size)), how


class Checked(NamedTuple):
    """What `check_samples` learned of one sample."""

    size: tuple[int, int]  # (H, W) of the image
    how: str  # how its mask was read: "0 and 255", for one
    foreground: float  # share of foreground among the pixels that are not ignored; 0 if all are


def check_samples(samples: list[Sample], task: Task) -> list[Checked]:
    """Reads every mask once, before hours are spent on the images.

    Raises UserError that names all images and masks which cannot be used, the first ten of them
    with their faults, and the SKIP that leaves them out.
    """
    checked, faults, unusable = [], [], []
    for sample in tqdm(samples, "checking masks", leave=False, disable=distributed.RANK > 0):
        try:
            size = image_size(sample.image)
            label_map, how = read_mask(sample, task, size)
            known = label_map[label_map != IGNORE]
            checked.append(Checked(size, how, float((known > 0).mean()) if known.size else 0.0))
        except UserError as error:
            faults.append(str(error))
            unusable.append(sample.place)
    if len(faults) > 10:
        faults[10:] = [f"and {len(faults) - 10} more"]
    if faults:
        names = ",".join(sorted(unusable)[:10]) + (",..." if len(unusable) > 10 else "")
        raise UserError(f"{'; '.join(faults)}; or leave them out by SKIP={names}")
    return checked


def untrainable(label_map: np.ndarray) -> str | None:
    """Why a label map (H, W) cannot be trained on; None if it can.

    An episode starts from one positive and one negative point (paper, Algorithm 1), so it needs
    foreground and background.
    """
    present = np.setdiff1d(label_map, [IGNORE])
    if len(present) < 2:
        return "full (no background)" if present.any() else "empty (no foreground)"
    return None


def _binary_label_map(picture: Image.Image, sample: Sample) -> np.ndarray:
    """The label map of a binary mask, with 1 where the picture is white.

    Raises UserError, and guesses nothing, where a lossless mask is not white on black: where it
    holds class numbers or several colours, has no black, or has its shape in its transparency.
    """
    values = as_array(picture, "L", sample.mask)
    white = values > 127
    if picture.format == "JPEG":  # its levels are noisy, so nothing can be told from them
        return white.astype(np.uint8)
    if "A" in picture.getbands() or "transparency" in picture.info:
        opaque = np.asarray(picture.convert("RGBA"))[..., 3] > 127
        if (opaque != white).any() and not opaque.all():
            raise UserError(f"{sample.mask} has its shape in its transparency: save it as white on "
                            "black, without an alpha channel")
    if picture.mode == "P" and _is_colour_on_black(picture):  # as annotation tools write it
        return (values > 0).astype(np.uint8)
    levels, counts = np.unique(values, return_counts=True)
    if set(levels) <= {0, 1}:
        return values
    if set(levels) <= {0, 1, IGNORE} and 1 in levels:  # 0 and 1 beside a ring that is ignored
        return values
    if levels[-1] <= 127:
        raise UserError(f"the grey levels of {sample.mask} end at {levels[-1]}: save its "
                        "foreground as 255")
    if levels[0] > _NEARLY_BLACK and len(levels) > 1:
        raise UserError(f"{sample.mask} has no black, its darkest level is {levels[0]}: save its "
                        "background as 0 and its foreground as 255")
    large = levels[(counts >= 0.02 * values.size) & (levels > _NEARLY_BLACK)]
    if len(large) and int(large[-1]) - int(large[0]) > 2 * _NEARLY_BLACK:
        raise UserError(f"{sample.mask} holds more than black and white (the grey levels "
                        f"{some([str(level) for level in large])}): save one target as white on "
                        "black")
    return white.astype(np.uint8)


def _is_colour_on_black(picture: Image.Image) -> bool:
    """Whether a palette picture uses two colours, of which index 0 is black and the other dark."""
    indices = np.unique(np.asarray(picture))
    levels = np.unique(np.asarray(picture.convert("L")))
    return len(indices) == len(levels) == 2 and indices[0] == levels[0] == 0 and levels[1] > 1


def _voc_label_map(picture: Image.Image, sample: Sample, task: Task) -> np.ndarray:
    """The label map of a mask of palette indices; raises UserError if one is not a class."""
    if picture.mode not in ("P", "L"):
        raise UserError(f"{sample.mask} holds {picture.mode} pixels: save it as a PNG of palette "
                        "indices")
    label_map = np.array(picture)  # the indices of a palette picture; convert() would give colours
    wrong = np.setdiff1d(label_map, [*range(len(task.texts) + 1), IGNORE])
    if len(wrong):
        raise UserError(f"{sample.mask} holds the index {wrong[0]}, but {task.title} has the "
                        f"classes 1 to {len(task.texts)}, 0 for the background and {IGNORE} to "
                        "ignore")
    return label_map


def _fit(label_map: np.ndarray, sample: Sample, image_size: tuple[int, int]) -> np.ndarray:
    """A label map of another size at image_size (H, W), turned first if it fits only so."""
    mask = Image.fromarray(label_map)
    if label_map.shape == image_size[::-1] or not _same_aspect(label_map.shape, image_size):
        with opened(sample.image) as picture:
            orientation = orientation_of(picture)
        if orientation in QUARTER_TURNS:
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

