"""The data sets as their authors ship them: which files there are, how a picture and its mask are read."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from common.runtime import distributed
from common.runtime.errors import UserError
from common.tasks import Task

# No split is published with CUHK's 704 out-of-focus images; the literature tests on 100 of them.
CUHK_TEST_IMAGES = 100

IGNORE = 255  # label of pixels without a truth (VOC's outlines)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
ASPECT_TOLERANCE = 0.02  # of height / width, between an image and a mask of another size
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations whose view swaps height and width

# Layout: {split: (folder of the images, folder of the masks)} inside data_dir. CUHK is split by name.
_VOC = "VOCdevkit/VOC2012"
_VOC_LISTS = {"train": f"{_VOC}/ImageSets/Segmentation/train.txt",
              "test": f"{_VOC}/ImageSets/Segmentation/val.txt"}
FOLDERS = {
    "cuhk": {"both": ("image", "gt")},
    "sbu": {"train": ("SBUTrain4KRecoveredSmall/ShadowImages", "SBUTrain4KRecoveredSmall/ShadowMasks"),
            "test": ("SBU-Test/ShadowImages", "SBU-Test/ShadowMasks")},
    "msd": {"train": ("train/image", "train/mask"), "test": ("test/image", "test/mask")},
    "duts": {"train": ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
             "test": ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask")},
    "voc": {"both": (f"{_VOC}/JPEGImages", f"{_VOC}/SegmentationClass")},
    "folder": {"train": ("train/images", "train/masks"), "test": ("test/images", "test/masks")},
}


@dataclass(frozen=True)
class Sample:
    """One image and its mask; `name` is their common stem, unique within a split."""

    name: str
    image: Path
    mask: Path
    split: Literal["train", "test"]


def list_samples(task: Task, data_dir: str | Path) -> list[Sample]:
    """All samples of a task, training before test, each sorted by name; no picture is opened.

    data_dir: the folder that holds the folders of `FOLDERS[task.dataset]`.
    Raises UserError if folders are missing (naming them and where to get the data set), if an image has no
    mask or a mask no image (naming the files), or if a split is empty.
    """
    data_dir = Path(data_dir).expanduser()
    _check_layout(task, data_dir)
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
    """uint8 H x W x 3 RGB, turned as EXIF says; grey, palette, CMYK and 16-bit pictures are converted, alpha
    is dropped. Raises UserError naming a file that cannot be read, or whose range of values cannot be told."""
    with _opened(path) as picture:
        return _as_array(ImageOps.exif_transpose(picture), "RGB", path)


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of what `load_image` returns, without decoding a JPEG (Pillow reads a PNG whole to find its
    EXIF). Raises UserError naming a file that cannot be read."""
    with _opened(path) as picture:
        width, height = picture.size
        return (width, height) if _orientation(picture) in QUARTER_TURNS else (height, width)


def load_label_map(sample: Sample, task: Task, image_size: tuple[int, int]) -> np.ndarray:
    """uint8 H x W label map in the frame of `load_image(sample.image)`, whose (H, W) is image_size.

    0 is background and k the task's k-th text. Binary masks of any picture mode are foreground above 127 of
    255, or background where the task says so (a mask whose largest value is 1 is taken to hold 0 and 1, not
    grey levels, unless it is a JPEG); VOC masks hold palette indices, and `IGNORE` = 255 where there is no
    truth. A mask of another scale is resized, nearest.
    A photograph that EXIF turns: its mask is taken to be drawn on the turned view if its size or aspect fits
    that, else on the stored pixels, and is then turned likewise.
    Raises UserError naming the mask: unreadable, without usable values, or of another aspect than the image.
    """
    with _opened(sample.mask) as picture:
        if task.dataset == "voc":
            labels = _voc_labels(picture, sample, task)
        else:
            labels = _binary_labels(picture, sample)
    if not task.white_is_foreground:
        labels = 1 - labels
    return labels if labels.shape == tuple(image_size) else _fit(labels, sample, tuple(image_size))


def check_trainable(labels: np.ndarray, sample: Sample) -> None:
    """Raise UserError, naming the mask, if `labels` (H x W) holds no class or nothing but one: an episode
    starts from one positive and one negative point (paper, Algorithm 1)."""
    present = np.setdiff1d(labels, [IGNORE])
    if len(present) < 2:
        state = "full (no background)" if present.any() else "empty (no foreground)"
        raise UserError(f"{sample.mask} is {state}, which cannot be trained on: take it and "
                        f"{sample.image.name} out of the training images")


def draw_shots(samples: list[Sample], task: Task, count: int, seed: int) -> list[tuple[Sample, int]]:
    """`count` random training samples, (sample, text index) pairs; the first n of them are the draw of n.

    A binary task draws images; one whose mask cannot train (empty or full) is named and passed over. With several
    texts, images that hold each text beside something else are drawn in turn, as evenly over the texts as the data
    allow; an image is drawn for a second text only where no other is left, and never twice for one. Raises UserError
    where too few remain.
    """
    rng = np.random.default_rng(seed)
    training = [sample for sample in samples if sample.split == "train"]
    training = [training[index] for index in rng.permutation(len(training))]
    queues: dict[int, list[Sample]] = {text: [] for text in range(len(task.texts))}
    drawn: list[tuple[Sample, int]] = []
    if len(task.texts) > 1:  # which image holds which text is known only from its label map
        for sample in tqdm(training, "reading label maps", disable=distributed.RANK > 0):
            present = np.setdiff1d(load_label_map(sample, task, image_size(sample.image)), [IGNORE])
            for label in present[present > 0]:
                if len(present) > 1:  # else there is no background to start an episode from
                    queues[int(label) - 1].append(sample)
    else:
        for sample in training:
            if len(queues[0]) == count:
                break
            labels = load_label_map(sample, task, image_size(sample.image))
            try:
                check_trainable(labels, sample)
                queues[0].append(sample)
            except UserError as error:
                print(f"not drawn: {error}")
    order = [int(text) for text in rng.permutation(len(task.texts))]
    seen: set[Sample] = set()
    while len(drawn) < count and any(queues.values()):
        for text in order:
            if queues[text]:  # an image that was not drawn for another text, if there is one
                sample = next((sample for sample in queues[text] if sample not in seen), queues[text][0])
                queues[text].remove(sample)
                seen.add(sample)
                drawn.append((sample, text))
    if len(drawn) < count:
        mend = (f"set SHOTS={len(drawn)} or less" if len(drawn) > 1 else
                "add training images whose masks hold foreground and background, 2 at least")
        raise UserError(f"SHOTS={count} training samples are asked for and {task.name} has {len(drawn)} that can "
                        f"train: {mend}")
    return drawn[:count]


def _check_layout(task: Task, data_dir: Path) -> None:
    folders = [folder for pair in FOLDERS[task.dataset].values() for folder in pair]
    missing = [folder for folder in folders if not (data_dir / folder).is_dir()]
    lists = list(_VOC_LISTS.values()) if task.dataset == "voc" else []
    missing += [file for file in lists if not (data_dir / file).is_file()]
    if missing:
        source = "put your pictures there" if task.name == "folder" else "this project draws this data set"
        if task.home:
            source = f"get the data set from {task.home} and unpack it there"
        raise UserError(f"{task.title}: {data_dir} should hold {', '.join(folders + lists)}, but has no "
                        f"{', '.join(missing)}: {source}")


def _pictures(folder: Path, prefix: str = "") -> dict[str, Path]:
    """{stem: path} of the pictures in a folder, sorted by stem, without hidden files (`._x.png` of macOS)."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.stem, path.name)):
        if path.suffix.lower() in EXTENSIONS and path.stem.startswith(prefix) and path.name[0] != ".":
            if path.stem in found:
                raise UserError(f"{found[path.stem]} and {path.name} share a name, so that images and masks "
                                f"cannot be matched: rename or remove one")
            found[path.stem] = path
    return found


def _pairs(image_dir: Path, mask_dir: Path, prefix: str = "") -> list[tuple[str, Path, Path]]:
    images, masks = _pictures(image_dir, prefix), _pictures(mask_dir, prefix)
    faults = [f"{folder} has nothing for {_some(alone)}"
              for folder, found, others in ((mask_dir, masks, images), (image_dir, images, masks))
              if (alone := [path.name for name, path in others.items() if name not in found])]
    if faults:
        raise UserError(f"{' and '.join(faults)}: every image needs a mask of the same name, and every mask "
                        f"an image ({', '.join(EXTENSIONS)})")
    return [(name, images[name], masks[name]) for name in images]


def _cuhk(task: Task, data_dir: Path, image_dir: Path, mask_dir: Path) -> list[Sample]:
    """The out-of-focus images (`motion*` belongs to another task). Test: the names in data_dir/test.txt, else
    the last 100 by name, or the last seventh of a smaller data set; what was taken is printed."""
    pairs = _pairs(image_dir, mask_dir, prefix="out_of_focus")
    names = [name for name, _, _ in pairs]
    list_file = data_dir / "test.txt"
    if list_file.is_file():
        test, source = set(_read_list(list_file)), "named in test.txt"
        if unknown := sorted(test - set(names)):
            raise UserError(f"{list_file} names {_some(unknown)}, but {image_dir} has no such "
                            f"out-of-focus image")
    else:
        count = min(CUHK_TEST_IMAGES, max(1, round(len(names) / 7)))
        test, source = set(names[-count:]), "the last by name, as there is no test.txt"
    note = f"{task.title}: {len(names) - len(test)} training images, {len(test)} test images ({source})"
    if task.name == "cuhk":
        note += (f"; {'white' if task.white_is_foreground else 'black'} in the masks is taken to be blurred "
                 "(CUHK_WHITE_IS_BLURRED)")
    print(note)
    samples = [Sample(name, image, mask, "test" if name in test else "train") for name, image, mask in pairs]
    return sorted(samples, key=lambda sample: sample.split == "test")


def _voc(data_dir: Path, image_dir: Path, mask_dir: Path) -> list[Sample]:
    """Only the names of the lists: VOC ships many more images, for its other tasks."""
    images, masks = _pictures(image_dir), _pictures(mask_dir)
    names = {split: _read_list(data_dir / file) for split, file in _VOC_LISTS.items()}
    if shared := sorted(set(names["train"]) & set(names["test"])):
        raise UserError(f"{' and '.join(_VOC_LISTS.values())} in {data_dir} both name {_some(shared)}: "
                        f"take it out of one of them")
    faults = [f"{folder} has no {_some(missing)}"
              for folder, found in ((image_dir, images), (mask_dir, masks))
              if (missing := [name for split in names.values() for name in split if name not in found])]
    if faults:
        raise UserError(f"{' and '.join(faults)}: add them or take them out of {_VOC}/ImageSets/Segmentation")
    return [Sample(name, images[name], masks[name], split)
            for split in names for name in sorted(names[split])]


def _read_list(file: Path) -> list[str]:
    """The names in a list file, one a line, with or without folder and extension, each once."""
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    paths = [Path(line.strip()) for line in lines if line.strip()]
    names = (path.stem if path.suffix.lower() in EXTENSIONS else path.name for path in paths)
    return list(dict.fromkeys(names))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except UserError:
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
        raise UserError(f"cannot read {path} as a picture ({error}): replace it, or remove it, and the mask or image "
                        "that belongs to it if there is one") from error


def _orientation(picture: Image.Image) -> int:
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def _as_array(picture: Image.Image, mode: Literal["RGB", "L"], path: Path) -> np.ndarray:
    """uint8 array in that mode, of the picture in `path`. 16-bit pictures keep their upper byte, unless all their
    values fit into the lower one (Pillow itself would clip them to white). Raises UserError for floats, and for 10 or
    12 bits in 16: what is white in them is not told, and by either rule they would be black."""
    if picture.mode == "F":
        raise UserError(f"{path} holds floating-point numbers, which have no known white: save it with 8 bits a "
                        "channel")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if 255 < (top := values.max()) < 2**12:
            raise UserError(f"{path} has 16 bits or more and its values end at {top}, so that it would be read as "
                            "black: save it with 8 bits a channel")
        values = values if top <= 255 else values // 256
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return np.array(picture.convert(mode))


def _binary_labels(picture: Image.Image, sample: Sample) -> np.ndarray:
    values = _as_array(picture, "L", sample.mask)
    # A lossless mask that stays dark holds class numbers; on an empty JPEG mask that is noise, and no fault.
    top = 255 if picture.format == "JPEG" else values.max()
    if 1 < top <= 127:
        raise UserError(f"the grey levels of {sample.mask} end at {top}: save its foreground as 255")
    return (values > (0 if top == 1 else 127)).astype(np.uint8)


def _voc_labels(picture: Image.Image, sample: Sample, task: Task) -> np.ndarray:
    if picture.mode not in ("P", "L"):
        raise UserError(f"{sample.mask} holds {picture.mode} pixels: save it as a PNG of palette indices")
    labels = np.array(picture)  # of a palette picture: the indices, where convert() would give colours
    wrong = np.setdiff1d(labels, [*range(len(task.texts) + 1), IGNORE])
    if len(wrong):
        raise UserError(f"{sample.mask} holds the index {wrong[0]}, but {task.title} has the classes 1 to "
                        f"{len(task.texts)}, 0 for the background and {IGNORE} to ignore")
    return labels


def _fit(labels: np.ndarray, sample: Sample, image_size: tuple[int, int]) -> np.ndarray:
    """A label map of another size at image_size: turned with the image if it fits only so, then resized."""
    mask = Image.fromarray(labels)
    if labels.shape == image_size[::-1] or not _same_aspect(labels.shape, image_size):
        with _opened(sample.image) as picture:
            orientation = _orientation(picture)
        if orientation in QUARTER_TURNS:
            mask.getexif()[ExifTags.Base.Orientation] = orientation
            mask = ImageOps.exif_transpose(mask)
    if not _same_aspect((mask.height, mask.width), image_size):
        raise UserError(f"{sample.mask} is {labels.shape[1]} x {labels.shape[0]}, which does not fit "
                        f"{sample.image.name} of {image_size[1]} x {image_size[0]} (width x height): "
                        f"save the mask in the size of its image")
    return np.array(mask.resize(image_size[::-1], Image.Resampling.NEAREST))


def _same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) <= ASPECT_TOLERANCE
