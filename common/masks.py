"""Binary masks as tools export them: which pixels they mean. What is not plain is refused."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from common.images import as_array, upper_bytes_alone
from common.runtime.errors import UserError, some
from common.tasks import Task

IGNORE = 255  # label of pixels without a truth (VOC's outlines)
WHITE, RING = "0 and 255", "0, 1 and 255 = ignored"  # ways to read 255, see `contradiction`
_NEAR = 16  # levels: so near to black, to the brightest level or to a colour is the same
_LOSSY_NEAR = 40  # the same after JPEG
_FEW = 8  # a lossless mask of so many levels or fewer has no soft edges
_PHOTOMETRIC = 262  # the tag of a TIFF that says whether 0 is black; it is white if the tag is 0


def binary_mask(picture: Image.Image, bits: int, path: Path,
                task: Task) -> tuple[np.ndarray, str]:
    """The label map of the binary mask in `path`, and how it was read, in a few words.

    bits: `stored_bits(picture)`, taken before anything else was asked of the picture.

    The label map is uint8 (H, W): 1 is foreground, 0 background, and `IGNORE` has no truth. These
    masks are read, and any other is refused with a UserError that names it and what it holds:

    - two levels, or levels near two: black, and a level above 127;
    - 0 and 1, as levels or as palette indices, with 255 beside them for pixels to ignore: in the
      task "folder", and as palette indices of other colours than a grey ramp's. The data sets of
      the paper ignore nothing, so in theirs a level of 1 beside 255 is noise;
    - one colour on black. A transparency of the same shape is no fault;
    - with `task.foreground`, a lossless mask of any levels, indices or colours.

    Between two levels there may be soft edges and, in a JPEG, noise.
    """
    is_grey_tiff = picture.format == "TIFF" and picture.mode != "1"
    if is_grey_tiff and picture.tag_v2.get(_PHOTOMETRIC) == 0:  # ImageJ's, with black targets
        raise UserError(f"{path} is a TIFF in which 0 is white, so that its target may be black: "
                        "save it as a PNG, white on black")
    lossy, file_format = _is_lossy(picture, path), picture.format
    if task.foreground is not None and lossy:
        raise UserError(f"{path} is compressed with loss, so that FOREGROUND cannot be told from "
                        "other levels: save it as a PNG")
    if isinstance(task.foreground, int):
        refuse_few_bits(picture, bits, path)
        if file_format == "GIF":
            raise UserError(f"{path} is a GIF, whose palette indices change when it is saved: set "
                            "FOREGROUND to a colour (#ff0000), or save it as a PNG")
    picture = ImageOps.exif_transpose(picture)
    alpha = np.asarray(picture.convert("RGBA"))[..., 3] if picture.has_transparency_data else None
    if alpha is not None and alpha.min() == 255:
        alpha = None

    if task.foreground is not None:
        label_map, how = _as_asked(picture, path, task.foreground)
        if alpha is not None:
            label_map[alpha <= 127] = 0
        return label_map, how
    if picture.mode == "P" and _counts_from_black(picture, path, task):
        label_map, colour = np.array(picture), _palette(picture)[1].astype(np.int32)
        how = f"{_hex(colour)} on black" if np.ptp(colour) > _NEAR else "palette indices 0 and 1"
        how += ", 255 = ignored" if IGNORE in label_map else ""
    else:
        rgb = as_array(picture, "RGB", path)
        if alpha is not None:
            rgb = (rgb * (alpha[..., None] / 255)).astype(np.uint8)
        levels, colour = _on_one_axis(rgb, lossy, path, task)
        if upper_bytes_alone(picture, bits) and levels.max() <= 1:
            raise UserError(f"{path} has 16 bits a channel and would be read as black: save it "
                            "with 8 bits a channel")
        split = _split_lossy if lossy else _split
        label_map, how = split(levels, path, task)
        how = f"{_hex(colour)} on black" if colour is not None and label_map.any() else how
    if alpha is not None:
        hidden = as_array(picture, "RGB", path)[alpha == 0]
        if hidden.any() or not label_map[alpha == 255].all():
            raise UserError(f"{path} has its shape in its transparency: save it as white on black, "
                            "without an alpha channel")
    return label_map, how


def contradiction(hows: dict[str, str]) -> str | None:
    """What contradicts itself among masks of one task that are plain one by one; None if nothing.

    hows: {how a mask was read: the name of one such mask}.
    """
    colours = {how[:7]: name for how, name in hows.items() if how[0] == "#"}
    if len(colours) > 1 or colours and WHITE in hows:
        colours |= {"white": hows[WHITE]} if WHITE in hows else {}
        found = some([f"{colour} in {name}" for colour, name in colours.items()])
        return (f"the masks mark their targets in several colours ({found}): set FOREGROUND to one "
                "of them (FOREGROUND=#ff0000, for one), or to any for all but black")
    if RING in hows and WHITE in hows:
        return (f"255 is ignored beside 0 and 1 in {hows[RING]}, and is all that {hows[WHITE]} "
                "marks: set FOREGROUND=1 if 255 is to be ignored")
    return None


def refuse_few_bits(picture: Image.Image, bits: int, path: Path) -> None:
    """Raises UserError for grey of 2 or 4 bits: Pillow scales its numbers to 0 to 255."""
    if bits < 8 and picture.mode == "L":
        raise UserError(f"{path} has fewer than 8 bits of grey, so that its numbers are not known: "
                        "save it with 8 bits a pixel")


def _is_lossy(picture: Image.Image, path: Path) -> bool:
    """Whether the format keeps no exact levels. Pillow does not tell for a WebP."""
    if picture.format == "WEBP":
        return re.search(rb"VP8[ L]", path.read_bytes()).group() == b"VP8 "
    compression = picture.info.get("compression")
    return (picture.format in ("JPEG", "MPO", "JPEG2000", "AVIF")
            or compression in ("jpeg", "tiff_jpeg", "webp"))


def _refused(path: Path, task: Task, found: str, example: str = "") -> UserError:
    """The error about a mask that holds what is `found`; example: a FOREGROUND that would help."""
    mend = "save one target as white on black"
    if task.name == "folder" and example:
        mend += (f", or say what is meant (FOREGROUND={example}, for one, or FOREGROUND=any for "
                 "all but black)")
    return UserError(f"{path} {found}: {mend}")


# ---- what FOREGROUND names -----------------------------------------------------------------------


def _as_asked(picture: Image.Image, path: Path,
              foreground: int | str) -> tuple[np.ndarray, str]:
    """The label map of what FOREGROUND names in a lossless picture."""
    said = f"FOREGROUND={foreground}"
    if str(foreground).startswith("#"):
        wanted = (as_array(picture, "RGB", path) == list(bytes.fromhex(foreground[1:]))).all(2)
        return wanted.astype(np.uint8), said if wanted.any() else f"{said} (not in it)"
    numbers = _numbers(picture, path)
    if numbers is None and foreground == "any":
        return as_array(picture, "RGB", path).any(2).astype(np.uint8), said
    if numbers is None:
        raise UserError(f"{path} holds colours, and {said} is a number: set it to a colour "
                        "(FOREGROUND=#ff0000, for one)")
    if picture.mode == "1":
        foreground = "any"  # 1 as well as 255 is the one that it has
    if numbers.min() < 0:
        raise UserError(f"{path} holds the number {numbers.min()}: save it with numbers from 0 on")
    label_map = (numbers != 0 if foreground == "any" else numbers == foreground).astype(np.uint8)
    said += "" if label_map.any() else " (not in it)"
    others = np.setdiff1d(numbers, [0, IGNORE])
    if foreground == IGNORE or numbers.max() != IGNORE or foreground == "any" and not len(others):
        return label_map, said
    if foreground == "any" and picture.mode != "P" and others[-1] >= 64:
        raise UserError(f"{path} holds the grey levels {some([str(level) for level in others])} "
                        "and 255, which may be to ignore or a target too: set FOREGROUND to a "
                        "level, or save the mask as 0 and 255")
    label_map[numbers == IGNORE] = IGNORE
    return label_map, f"{said}, 255 = ignored"


def _numbers(picture: Image.Image, path: Path) -> np.ndarray | None:
    """The palette indices (H, W) or grey levels of a lossless picture; None if it has colours."""
    if picture.mode == "P":
        indices, palette = np.asarray(picture), _palette(picture)
        if palette[0].any() and any(not palette[index].any() for index in np.unique(indices)):
            raise UserError(f"{path} has a palette whose black is not its index 0: set FOREGROUND "
                            "to a colour (#ff0000), or save it as white on black")
        return indices
    if picture.mode[0] == "I":
        return np.asarray(picture)
    rgb = as_array(picture, "RGB", path)
    return rgb[..., 0] if (rgb == rgb[..., :1]).all() else None


# ---- palettes and colours ------------------------------------------------------------------------


def _palette(picture: Image.Image) -> np.ndarray:
    """uint8 (256, 3), black where the palette ends."""
    colours = np.zeros(768, np.uint8)
    stored = picture.getpalette("RGB")
    colours[:len(stored)] = stored
    return colours.reshape(256, 3)


def _hex(colour: np.ndarray) -> str:
    return "#" + bytes(colour.astype(np.uint8)).hex()


def _counts_from_black(picture: Image.Image, path: Path, task: Task) -> bool:
    """Whether palette indices tell background, foreground and what to ignore: 0, 1 and 255.

    So labelme and VOC write them, with 0 in black. Raises UserError for other indices in such a
    palette, and for an inverted grey one, of which ImageJ's target is black.
    """
    palette, used = _palette(picture), np.unique(np.asarray(picture)).tolist()
    if (palette == np.arange(255, -1, -1)[:, None]).all():
        raise UserError(f"{path} has an inverted palette, in which 255 is black, so that its "
                        "target may be black: save it as white on black, without a palette")
    if palette[0].any():
        return False
    black = [index for index in used if index and not palette[index].any()]
    if black:
        raise _refused(path, task, f"holds the palette index {black[0]}, which is black like 0",
                       str(black[0]))
    if set(used) <= {0, 1, IGNORE} and 1 in used:
        return palette[1].max() > 1  # else the indices are grey levels, and read as such
    coloured = [index for index in used if np.ptp(palette[index].astype(int)) > _NEAR]
    if used[0] == 0 and len(used) == 2 and coloured:
        raise _refused(path, task, f"holds the palette index {used[1]} "
                       f"({_hex(palette[used[1]])}), which is not 1", str(used[1]))
    return False


def _on_one_axis(rgb: np.ndarray, lossy: bool, path: Path,
                 task: Task) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey levels, or how much there is of the one colour, uint8 (H, W); and that colour, or None.

    rgb: uint8 (H, W, 3). Raises UserError if it holds several colours, or one in a lossy file.
    """
    brightest = rgb.max(2)
    if (brightest - rgb.min(2)).max() <= (_LOSSY_NEAR if lossy else _NEAR):
        return brightest, None
    if lossy:
        raise UserError(f"{path} holds colours and is compressed with loss: save it as a PNG")
    place = rgb.sum(2, dtype=np.int32).argmax()
    colour = rgb.reshape(-1, 3)[place].astype(np.int32)
    share = brightest / colour.max()
    if (np.abs(rgb - share[..., None] * colour) > _NEAR).any():
        codes, counts = np.unique(rgb @ np.array([65536, 256, 1]), return_counts=True)
        colours = [f"#{code:06x}" for code in codes[counts.argsort()[::-1]] if code]
        raise _refused(path, task, f"holds several colours ({some(colours)})", colours[0])
    if brightest.min() > _NEAR:
        raise _refused(path, task, f"has no black, but {_hex(colour)} everywhere", _hex(colour))
    return np.rint(255 * share.clip(max=1)).astype(np.uint8), colour


# ---- levels --------------------------------------------------------------------------------------


def _split(levels: np.ndarray, path: Path, task: Task) -> tuple[np.ndarray, str]:
    """Foreground above 127, or 0 and 1 beside 255, of a lossless mask.

    levels: uint8 (H, W). Raises UserError if they are not near two.
    """
    found = np.unique(levels)
    base, top = int(found[0]), int(found[-1])
    if set(found) <= {0, 1}:
        return levels, " and ".join(map(str, found))
    if task.name == "folder" and set(found) == {0, 1, IGNORE}:
        if (levels == IGNORE).sum() > 4 * (levels == 1).sum():
            raise UserError(f"{path} holds 0, 1 and much more 255, which is ignored beside 1: set "
                            "FOREGROUND=1 if that is meant, or save the mask as 0 and 255")
        return levels, RING
    others = [str(level) for level in found if level]
    listed = f"the grey level{'s'[:len(others) > 1]} {some(others)}"
    if top <= 127:
        raise _refused(path, task, f"holds {listed} and nothing brighter", str(top))
    if base > _NEAR and len(found) > 1:
        raise _refused(path, task, f"has no black, its darkest level is {base}", str(top))
    noisy = any(top - _NEAR < level < top for level in found)
    between = (levels > (_NEAR if noisy else base)) & (levels < top - _NEAR)
    own = _levels_of_their_own(levels, between, noise=0)
    white = levels > 127
    # the published data sets have specks; among masks of one's own a few levels may be classes
    may_be_classes = task.name == "folder" and len(found) <= _FEW
    if own.sum() > (0 if may_be_classes else 0.02 * white.sum()):
        if len(found) > _FEW:  # no classes: FOREGROUND would not help
            raise UserError(f"{path} holds more than black and white ({listed}): save it with the "
                            "two levels 0 and 255")
        example = int(np.bincount(levels[own]).argmax())
        raise _refused(path, task, f"holds more than black and white ({listed})", str(example))
    if between.mean() > 0.5:
        raise _refused(path, task, "has all levels, like a photograph")
    ends = WHITE if top - base > 255 - 2 * _NEAR else f"{base} and {top}"
    return white.astype(np.uint8), ends if len(found) > 1 else str(top)


def _split_lossy(levels: np.ndarray, path: Path, task: Task) -> tuple[np.ndarray, str]:
    """Foreground above 127 of a mask that JPEG or WebP has made noisy.

    levels: uint8 (H, W). Raises UserError if they are not near black and near white.
    """
    top, white = int(levels.max()), levels > 127
    between = (levels > _LOSSY_NEAR) & (levels < 255 - _LOSSY_NEAR)
    if top <= _NEAR and levels.min() == top:
        return white.astype(np.uint8), "0 with loss"
    if top <= 127:
        raise _refused(path, task, f"is compressed with loss, and its levels end at {top}")
    own = _levels_of_their_own(levels, between, noise=24)
    if own.sum() > 0.02 * white.sum() or between.mean() > 0.5:
        raise _refused(path, task, "is compressed with loss, and holds more than black and white")
    return white.astype(np.uint8), "black and white with loss, parted at 127"


def _levels_of_their_own(levels: np.ndarray, between: np.ndarray, noise: int) -> np.ndarray:
    """Where a level between two is no edge: nothing near it is darker, or nothing is brighter.

    noise: differences up to it do not count. What lies beyond the picture's border may be both.
    """
    if not between.any():
        return between
    darkest = ndimage.minimum_filter(levels, 5, mode="constant", cval=0)
    brightest = ndimage.maximum_filter(levels, 5, mode="constant", cval=255)
    return between & ((levels - darkest <= noise) | (brightest - levels <= noise))
