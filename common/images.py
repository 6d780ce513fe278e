"""Pictures on disk: how they are opened, turned and converted, whatever their format."""

import errno
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common.runtime.errors import UserError
from common.runtime.reading import OF_THE_CONTENT

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")  # in any case
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations whose view swaps height and width
SAME_SHAPE = (2, 3, 4)  # those that turn or mirror the view and keep its shape
_OF_THE_FILE = (*OF_THE_CONTENT, errno.ENOENT, errno.EISDIR)  # errors that another file would mend


@dataclass(frozen=True)
class Sample:
    """One image and its mask; `name` is the stem of both files, unique within a split."""

    name: str
    image: Path
    mask: Path
    split: Literal["train", "test"]

    @property
    def place(self) -> str:
        """split/name, which no other sample has."""
        return f"{self.split}/{self.name}"


def composed(name: str) -> str:
    """A name with accents as single characters; macOS may write letter and accent as two."""
    return unicodedata.normalize("NFC", name)


def load_image(path: Path, first_frame: bool = False) -> np.ndarray:
    """The picture as uint8 (H, W, 3) RGB, turned as its EXIF data say.

    Grey, palette, CMYK and 16-bit pictures are converted, and alpha is dropped.
    first_frame: reads the first of several frames or pages, instead of refusing such a file.
    Raises UserError naming a file that cannot be read, or whose brightest value is not known.
    """
    with opened(path, first_frame) as picture:
        bits = stored_bits(picture)  # first, as a PNG forgets them when its EXIF data are read
        image = as_array(ImageOps.exif_transpose(picture), "RGB", path)
        if upper_bytes_alone(picture, bits) and image.max() < 16:
            raise UserError(f"{path} has 16 bits a channel, of which it uses 12 at most, so that "
                            "it would be read as black: save it with 8 bits a channel")
        return image


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of what `load_image` returns, without decoding a JPEG.

    Pillow reads a PNG to its end to find the EXIF data, and turns a TIFF when it decodes it. Raises
    UserError naming a file that cannot be read.
    """
    with opened(path) as picture:
        if picture.format == "TIFF":
            picture.load()
        width, height = picture.size
        return (width, height) if orientation_of(picture) in QUARTER_TURNS else (height, width)


@contextmanager
def opened(path: Path, first_frame: bool = False) -> Iterator[Image.Image]:
    """The picture at `path`; raises UserError, naming it, if it cannot be opened or decoded.

    A file of several pages or frames is refused too, unless `first_frame` is asked for. Where not
    the file is at fault, but a permission, the disk or the memory, OSError or MemoryError is raised
    as it is: another picture would not help.
    """
    try:
        with Image.open(path) as picture:
            if _frames(picture) > 1 and not first_frame:
                raise UserError(f"{path} holds {picture.n_frames} pages or frames: save the one "
                                "that is meant as a file of its own")
            picture.filename = ""  # or Pillow maps the file, and garbles TIFFs that are turned
            yield picture
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            error.filename = error.filename or str(path)  # a disk or a permission is at fault
            raise
        raise UserError(f"cannot read {path} as a picture ({error}): replace it, or remove it, and "
                        "the mask or image that belongs to it if there is one") from error


def stored_bits(picture: Image.Image) -> int:
    """Bits a channel of a picture that is just opened: 2, 4 or 16; 8 stands for any other."""
    raw_mode = re.search(r";(2|4|16)", str(picture.tile))
    return int(raw_mode.group(1)) if raw_mode else 8


def upper_bytes_alone(picture: Image.Image, bits: int) -> bool:
    """Whether Pillow reads no more than the upper byte of 16 bits, as it does of all but grey.

    bits: `stored_bits(picture)`.
    """
    return bits == 16 and picture.mode[0] != "I"


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def as_array(picture: Image.Image, mode: Literal["RGB", "L"], path: Path) -> np.ndarray:
    """uint8 array in that mode of the picture in `path`.

    16-bit pictures keep their upper byte, unless all their values fit into the lower one (Pillow
    itself would clip them to white). Raises UserError for floats, and for 10 or 12 bits stored in
    16: these files do not say which value is white, and by either rule they would be black.
    """
    if picture.mode == "F":
        raise UserError(f"{path} holds floating-point numbers, which have no known white: save it "
                        "with 8 bits a channel")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        top = values.max()
        if values.min() < 0:
            raise UserError(f"{path} holds negative numbers: save it with 8 bits a channel")
        if 255 < top < 2**12:
            raise UserError(f"{path} has 16 bits or more and its values end at {top}, so that it "
                            "would be read as black: save it with 8 bits a channel")
        values = values if top <= 255 else values // 256
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return np.array(picture.convert(mode))


def frame_count(path: Path) -> int:
    """How many frames of an animation or pages of a document the file holds."""
    with opened(path, first_frame=True) as picture:
        return _frames(picture)


def _frames(picture: Image.Image) -> int:
    is_sequence = picture.format in ("GIF", "PNG", "TIFF", "WEBP")  # others hold previews
    return getattr(picture, "n_frames", 1) if is_sequence else 1


def register_heif() -> None:
    """Lets Pillow read HEIC and HEIF from now on, if the package pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
