"""The data sets as their authors ship them: where the files are, and how they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from common.runtime import distributed
from common.runtime.errors import UserError
from common.tasks import Task

# No split comes with CUHK's 704 out-of-focus images. The literature tests on these 100 of them, a
# list that D-DFFNet published and took from BTBNet.
CUHK_TEST_LIST = Path(__file__).with_name("cuhk_test.txt")

IGNORE = 255  # label of pixels without a truth (VOC's outlines)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")  # in any case
_NEARLY_BLACK = 16  # grey level up to which a mask's pixel counts as black
ASPECT_TOLERANCE = 0.02  # relative, of height / width, between an image and a mask of another size
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations whose view swaps height and width

# Layout: {split: (folder of the images, folder of the masks)} inside data_dir. CUHK is split by
# the files' names and VOC by list files.
_VOC = "VOCdevkit/VOC2012"
_VOC_LISTS = {"train": f"{_VOC}/ImageSets/Segmentation/train.txt",
              "test": f"{_VOC}/ImageSets/Segmentation/val.txt"}
FOLDERS = {
    "cuhk": {"both": ("image", "gt")},
    "sbu": {"train": ("SBUTrain4KRecoveredSmall/ShadowImages",
                      "SBUTrain4KRecoveredSmall/ShadowMasks"),
            "test": ("SBU-Test/ShadowImages", "SBU-Test/ShadowMasks")},
    "msd": {"train": ("train/image", "train/mask"), "test": ("test/image", "test/mask")},
    "duts": {"train": ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
             "test": ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask")},
    "voc": {"both": (f"{_VOC}/JPEGImages", f"{_VOC}/SegmentationClass")},
    "folder": {"train": ("train/images", "train/masks"), "test": ("test/images", "test/masks")},
}


@dataclass(frozen=True)
class Sample:
    """One image and its mask; `name` is the stem of both files, unique within a split."""

    name: str
    image: Path
    mask: Path
    split: Literal["train", "test"]


def list_samples(task: Task, data_dir: str | Path) -> list[Sample]:
    """All samples of a task, training before test, each sorted by name; no picture is opened.

    data_dir: the folder that holds the folders of `FOLDERS[task.dataset]`.
    Raises UserError if folders are missing (naming them and where to get the data set), if an
    image has no mask or a mask no image (naming the files), or if a split is empty.
    """
    data_dir = _root(task, Path(data_dir).expanduser())
    folders = {split: (data_dir / images, data_dir / masks)
               for split, (images, masks) in FOLDERS[task.dataset].items()}
    if task.dataset == "cuhk":
        samples = _cuhk(task, data_dir, *folders["both"])
    elif task.dataset == "voc":
        samples = _voc(data_dir, *folders["both"])
    else:
        samples = [Sample(name, image, mask, split)
                   for split, (images, masks) in folders.items()
                   for name, image, mask in _pairs(images, masks)]
    for split in ("train", "test"):
        if not any(sample.split == split for sample in samples):
            raise UserError(f"{task.title}: no {split} images in {data_dir}, add some "
                            f"({', '.join(EXTENSIONS)}) with their masks")
    return samples


def load_image(path: Path) -> np.ndarray:
    """The picture as uint8 (H, W, 3) RGB, turned as its EXIF data say.

    Grey, palette, CMYK and 16-bit pictures are converted, and alpha is dropped.
    Raises UserError naming a file that cannot be read, or whose brightest value is not known.
    """
    with _opened(path) as picture:
        return _as_array(ImageOps.exif_transpose(picture), "RGB", path)


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of what `load_image` returns, without decoding a JPEG.

    Pillow reads a PNG to its end to find the EXIF data. Raises UserError naming a file that cannot
    be read.
    """
    with _opened(path) as picture:
        width, height = picture.size
        return (width, height) if _orientation(picture) in QUARTER_TURNS else (height, width)


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
    with _opened(sample.mask) as picture:
        if task.dataset == "voc":
            label_map = _voc_label_map(picture, sample, task)
        else:
            label_map = _binary_label_map(picture, sample)
    if not task.white_is_foreground:
        label_map = np.where(label_map == IGNORE, IGNORE, 1 - label_map).astype(np.uint8)
    if label_map.shape == tuple(image_size):
        return label_map
    return _fit(label_map, sample, tuple(image_size))


def check_samples(samples: list[Sample], task: Task) -> list[tuple[int, int]]:
    """The images' sizes (H, W); every mask is read once, before hours are spent on the images.

    Raises UserError that names all images and masks which cannot be used, the first ten of them
    with their faults.
    """
    sizes, faults = [], []
    for sample in tqdm(samples, "checking masks", leave=False, disable=distributed.RANK > 0):
        try:
            sizes.append(image_size(sample.image))
            load_label_map(sample, task, sizes[-1])
        except UserError as error:
            faults.append(str(error))
    if len(faults) > 10:
        faults[10:] = [f"and {len(faults) - 10} more"]
    if faults:
        raise UserError("; ".join(faults))
    return sizes


def untrainable(label_map: np.ndarray) -> str | None:
    """Why a label map (H, W) cannot be trained on; None if it can.

    An episode starts from one positive and one negative point (paper, Algorithm 1), so it needs
    foreground and background.
    """
    present = np.setdiff1d(label_map, [IGNORE])
    if len(present) < 2:
        return "full (no background)" if present.any() else "empty (no foreground)"
    return None


def draw_shots(samples: list[Sample], task: Task, count: int,
               seed: int) -> list[tuple[Sample, int]]:
    """`count` random training samples as (sample, text index); the first n are the draw of n.

    A binary task draws images. One whose mask is empty or full cannot train; it is named on stdout
    and left out. A task with several texts draws images that hold a text and something else, as
    evenly over the texts as the data allow. An image is drawn for a second text only if no other
    is left, and never twice for the same text.
    Raises UserError if there are too few.
    """
    rng = np.random.default_rng(seed)
    training = [sample for sample in samples if sample.split == "train"]
    training = [training[index] for index in rng.permutation(len(training))]
    if len(task.texts) > 1:
        candidates = _candidates_per_text(training, task)
    else:
        candidates = [_trainable(training, task, count)]
    order = [int(text) for text in rng.permutation(len(task.texts))]
    drawn: list[tuple[Sample, int]] = []
    seen: set[Sample] = set()
    while len(drawn) < count and any(candidates):
        for text in order:
            left = candidates[text]
            if not left:
                continue
            # an image that was not drawn for another text, if there is one
            sample = next((sample for sample in left if sample not in seen), left[0])
            left.remove(sample)
            seen.add(sample)
            drawn.append((sample, text))
    if len(drawn) < count:
        if len(drawn) > 1:
            mend = f"set SHOTS={len(drawn)} or less"
        else:
            mend = "add training images whose masks hold foreground and background, 2 at least"
        raise UserError(f"SHOTS={count} training samples are asked for and {task.name} has "
                        f"{len(drawn)} that can train: {mend}")
    return drawn[:count]


def _candidates_per_text(training: list[Sample], task: Task) -> list[list[Sample]]:
    """For each text of the task the samples that hold it and something else."""
    candidates: list[list[Sample]] = [[] for _ in task.texts]
    for sample in tqdm(training, "reading label maps", disable=distributed.RANK > 0):
        label_map = load_label_map(sample, task, image_size(sample.image))
        if untrainable(label_map):
            continue
        for label in np.setdiff1d(label_map, [0, IGNORE]):
            candidates[int(label) - 1].append(sample)
    return candidates


def _trainable(training: list[Sample], task: Task, count: int) -> list[Sample]:
    """The first `count` samples of a binary task that can train; names those that it leaves out."""
    found = []
    for sample in training:
        if len(found) == count:
            break
        label_map = load_label_map(sample, task, image_size(sample.image))
        if reason := untrainable(label_map):
            print(f"not drawn: {sample.mask} is {reason}, so it cannot be trained on")
        else:
            found.append(sample)
    return found


def _root(task: Task, data_dir: Path) -> Path:
    """The folder that holds the data set's own folders.

    That is data_dir, or, said on stdout, the one folder in it that holds them, as archives unpack,
    or a folder above it. Raises UserError if a folder or list file is missing.
    """
    folders = [folder for pair in FOLDERS[task.dataset].values() for folder in pair]
    lists = list(_VOC_LISTS.values()) if task.dataset == "voc" else []

    def missing_in(root: Path) -> list[str]:
        missing = [folder for folder in folders if not (root / folder).is_dir()]
        return missing + [file for file in lists if not (root / file).is_file()]

    missing = missing_in(data_dir)
    if not missing:
        return data_dir
    inside = [path for path in data_dir.iterdir() if path.is_dir()] if data_dir.is_dir() else []
    above = list(data_dir.resolve().parents)[:2] if task.dataset == "voc" else []
    found = [path for path in [*inside, *above] if not missing_in(path)]
    if len(found) == 1:
        print(f"{task.title}: the data set lies in {found[0]}")
        return found[0]
    if task.home:
        source = f"get the data set from {task.home} and unpack it there"
    elif task.name == "folder":
        source = "put your pictures there"
    else:
        source = "leave DATA_DIR empty for a task that is drawn here, or set TASK"
    needed = ", ".join(folders + lists)
    if not data_dir.is_dir():
        raise UserError(f"{task.title}: {data_dir} does not exist, and should hold {needed}: set "
                        f"DATA_DIR to where the data set lies, or {source}")
    raise UserError(f"{task.title}: {data_dir} should hold {needed}, but has no "
                    f"{', '.join(missing)}: {source}")


def _pictures(folder: Path, prefix: str = "") -> dict[str, Path]:
    """{stem: path} of the pictures in a folder whose names start with `prefix`, sorted by stem.

    Hidden files, such as the `._x.png` of macOS, do not count. Other files are passed over, and
    named on stdout. Raises UserError if two pictures have the same stem.
    """
    found: dict[str, Path] = {}
    others = [path.name for path in sorted(folder.iterdir()) if path.name[0] != "."
              and path.name.startswith(prefix) and path.suffix.lower() not in EXTENSIONS]
    if others:
        print(f"passed over in {folder}, as no picture that is read: {_some(others)}")
    for path in sorted(folder.iterdir(), key=lambda path: (path.stem, path.name)):
        is_picture = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        if not is_picture or not path.stem.startswith(prefix):
            continue
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path.name} share a name, so that images and "
                            "masks cannot be matched: rename or remove one")
        found[path.stem] = path
    return found


def _pairs(image_dir: Path, mask_dir: Path, prefix: str = "") -> list[tuple[str, Path, Path]]:
    """(stem, image, mask) of all pictures; raises UserError if one is missing its partner."""
    images, masks = _pictures(image_dir, prefix), _pictures(mask_dir, prefix)
    without_mask = [path.name for name, path in images.items() if name not in masks]
    without_image = [path.name for name, path in masks.items() if name not in images]
    faults = []
    if without_mask:
        faults.append(f"{mask_dir} has nothing for {_some(without_mask)}")
    if without_image:
        faults.append(f"{image_dir} has nothing for {_some(without_image)}")
    if faults:
        raise UserError(f"{' and '.join(faults)}: every image needs a mask of the same name, and "
                        f"every mask an image ({', '.join(EXTENSIONS)})")
    return [(name, images[name], masks[name]) for name in images]


def _cuhk(task: Task, data_dir: Path, image_dir: Path, mask_dir: Path) -> list[Sample]:
    """The out-of-focus images of CUHK; its `motion*` images belong to another task.

    Test images are those named in data_dir/test.txt. Without that file they are the 100 of
    CUHK_TEST_LIST, or the last seventh by name where the folder does not hold all of these. What
    was taken is printed.
    """
    pairs = _pairs(image_dir, mask_dir, prefix="out_of_focus")
    names = [name for name, _, _ in pairs]
    if not names:
        raise UserError(f"{image_dir} holds no out_of_focus*.jpg, CUHK's names of such images: "
                        "copies with other names (1.bmp, ...) are other data sets; put the "
                        "original there, or use TASK=folder")
    published = set(read_list(CUHK_TEST_LIST))
    list_file = data_dir / "test.txt"
    if list_file.is_file():
        test, source = set(read_list(list_file)), "named in test.txt"
        unknown = sorted(test - set(names))
        if unknown:
            raise UserError(f"{list_file} names {_some(unknown)}, but {image_dir} has no such "
                            "out-of-focus image")
    elif published < set(names):
        test, source = published, "those that the literature tests on; test.txt would change them"
    else:
        count = max(1, round(len(names) / 7))
        test, source = set(names[-count:]), ("the last by name, as there is no test.txt and the "
                                             "literature's 100 test images are not all here")
    note = (f"{task.title}: {len(names) - len(test)} training images, {len(test)} test images "
            f"({source})")
    if task.name == "cuhk":
        blurred = "white" if task.white_is_foreground else "black"
        note += f"; {blurred} in the masks is taken to be blurred (CUHK_WHITE_IS_BLURRED)"
    print(note)
    samples = [Sample(name, image, mask, "test" if name in test else "train")
               for name, image, mask in pairs]
    return sorted(samples, key=lambda sample: sample.split == "test")


def _voc(data_dir: Path, image_dir: Path, mask_dir: Path) -> list[Sample]:
    """The images in VOC's lists; its folders hold many more images, for its other tasks."""
    images, masks = _pictures(image_dir), _pictures(mask_dir)
    names = {split: read_list(data_dir / file) for split, file in _VOC_LISTS.items()}
    shared = sorted(set(names["train"]) & set(names["test"]))
    if shared:
        raise UserError(f"{' and '.join(_VOC_LISTS.values())} in {data_dir} both name "
                        f"{_some(shared)}: take it out of one of them")
    listed = [*names["train"], *names["test"]]
    faults = []
    for folder, found in ((image_dir, images), (mask_dir, masks)):
        missing = [name for name in listed if name not in found]
        if missing:
            faults.append(f"{folder} has no {_some(missing)}")
    if faults:
        raise UserError(f"{' and '.join(faults)}: add them or take them out of "
                        f"{_VOC}/ImageSets/Segmentation")
    return [Sample(name, images[name], masks[name], split)
            for split in names for name in sorted(names[split])]


def read_list(file: Path) -> list[str]:
    """The names in a list file, each once; a line may hold a folder and an extension too.

    Of a line such as 1.bmp--out_of_focus0002, as copies of CUHK have it, the name is what follows.
    """
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    paths = [Path(line.rpartition("--")[2].strip()) for line in lines if line.strip()]
    names = (path.stem if path.suffix.lower() in EXTENSIONS else path.name for path in paths)
    return list(dict.fromkeys(names))


def _some(names: list[str]) -> str:
    """The first ten of the names, for a message."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture at `path`; raises UserError, naming it, if it cannot be opened or decoded."""
    try:
        with Image.open(path) as picture:
            yield picture
    except UserError:
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
        raise UserError(f"cannot read {path} as a picture ({error}): replace it, or remove it, and "
                        "the mask or image that belongs to it if there is one") from error


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def _as_array(picture: Image.Image, mode: Literal["RGB", "L"], path: Path) -> np.ndarray:
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
        if 255 < top < 2**12:
            raise UserError(f"{path} has 16 bits or more and its values end at {top}, so that it "
                            "would be read as black: save it with 8 bits a channel")
        values = values if top <= 255 else values // 256
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return np.array(picture.convert(mode))


def _binary_label_map(picture: Image.Image, sample: Sample) -> np.ndarray:
    """The label map of a binary mask, with 1 where the picture is white.

    Raises UserError, and guesses nothing, where a lossless mask is not white on black: where it
    holds class numbers or several colours, has no black, or has its shape in its transparency.
    """
    values = _as_array(picture, "L", sample.mask)
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
                        f"{_some([str(level) for level in large])}): save one target as white on "
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
        with _opened(sample.image) as picture:
            orientation = _orientation(picture)
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
