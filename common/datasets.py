"""The data sets as their authors ship them: where the files are, and which ones are drawn."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.images import EXTENSIONS, Sample, image_size
from common.label_maps import IGNORE, load_label_map, untrainable
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.tasks import Task

# No split comes with CUHK's 704 out-of-focus images. The literature tests on these 100 of them, a
# list that D-DFFNet published and took from BTBNet.
CUHK_TEST_LIST = Path(__file__).with_name("cuhk_test.txt")

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


def read_list(file: Path) -> list[str]:
    """The names in a list file, each once; a line may hold a folder and an extension too.

    Of a line such as 1.bmp--out_of_focus0002, as copies of CUHK have it, the name is what follows.
    """
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    paths = [Path(line.rpartition("--")[2].strip()) for line in lines if line.strip()]
    names = (path.stem if path.suffix.lower() in EXTENSIONS else path.name for path in paths)
    return list(dict.fromkeys(names))


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
        print(f"passed over in {folder}, as no picture that is read: {some(others)}")
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
        faults.append(f"{mask_dir} has nothing for {some(without_mask)}")
    if without_image:
        faults.append(f"{image_dir} has nothing for {some(without_image)}")
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
            raise UserError(f"{list_file} names {some(unknown)}, but {image_dir} has no such "
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
                        f"{some(shared)}: take it out of one of them")
    listed = [*names["train"], *names["test"]]
    faults = []
    for folder, found in ((image_dir, images), (mask_dir, masks)):
        missing = [name for name in listed if name not in found]
        if missing:
            faults.append(f"{folder} has no {some(missing)}")
    if faults:
        raise UserError(f"{' and '.join(faults)}: add them or take them out of "
                        f"{_VOC}/ImageSets/Segmentation")
    return [Sample(name, images[name], masks[name], split)
            for split in names for name in sorted(names[split])]
