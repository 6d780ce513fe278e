"""The data sets as their authors ship them: where the files are, and which ones are drawn."""

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.images import EXTENSIONS, Sample, composed, load_image
from common.label_maps import IGNORE, load_label_map, untrainable
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.runtime.files import expanded
from common.tasks import Task

# No split comes with CUHK's 704 out-of-focus images. The literature tests on these 100 of them, a
# list that D-DFFNet published and took from BTBNet.
CUHK_TEST_LIST = Path(__file__).with_name("cuhk_test.txt")

# Layout: {split: (folder of the images, folder of the masks)} inside data_dir. CUHK is split by
# the files' names and VOC by list files.
_VOC = "VOCdevkit/VOC2012"
_VOC_MASKS = f"{_VOC}/SegmentationClass"
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
    "voc": {"both": (f"{_VOC}/JPEGImages", _VOC_MASKS)},
    "folder": {"train": ("train/images", "train/masks"), "test": ("test/images", "test/masks")},
}
# Copies of DUTS made before 2018-01-22 hold masks twice, as .png and as .jpg. The .png is right,
# but of these three.
_DUTS_JPEG = ("n01532829_13482", "n04442312_17818", "ILSVRC2014_train_00023530")


def list_samples(task: Task, data_dir: str | Path, skip: Collection[str] = ()) -> list[Sample]:
    """All samples of a task, training before test, each sorted by name; no picture is opened.

    data_dir: the folder that holds the folders of `FOLDERS[task.dataset]`; one of them may have a
    like name (Images for image), which is said on stdout. The task "folder" may lack its test
    folders: then test samples are held out of the others, see `_hold_out`.
    skip: names, or split/names, of samples that will not be used. They are listed too, so that the
    draw of the others does not hang on them, but a file of theirs may be missing.
    Raises UserError if folders are missing (naming them and where to get the data set), if an
    image has no mask or a mask no image (naming the files), or if a split is empty.
    """
    given = expanded(data_dir)
    data_dir, found = _find_folders(task, given)
    folders = {split: (found[images], found[masks])
               for split, (images, masks) in FOLDERS[task.dataset].items() if images in found}
    in_either = _names_of("train", _names_of("test", skip))
    if task.dataset == "cuhk":
        samples = _cuhk(task, (given, data_dir), *folders["both"], in_either)
    elif task.dataset == "voc":
        lists = {split: found[file] for split, file in _VOC_LISTS.items()}
        samples = _voc(lists, *folders["both"], in_either)
    else:
        samples = [Sample(name, image, mask, split)
                   for split, (images, masks) in folders.items()
                   for name, image, mask in _pairs(images, masks, _names_of(split, skip),
                                                   of_duts=task.dataset == "duts")]
    if list(folders) == ["train"] and samples:
        samples = _hold_out(samples)
    for split in ("train", "test"):
        if not any(sample.split == split for sample in samples):
            raise UserError(f"{task.title}: no {split} images in {data_dir}, add some "
                            f"({', '.join(EXTENSIONS)}) with their masks")
    return samples


def _hold_out(samples: list[Sample]) -> list[Sample]:
    """A fifth of the samples, 2 at least and 100 at most, as test samples; said on stdout.

    They are drawn by a hash of their names: whichever training samples are drawn, the test samples
    are the same, and a sample more or less moves one of the others at most.
    Raises UserError where there are fewer than 4: 2 to train and 2 to test.
    """
    if len(samples) < 4:
        raise UserError(f"{samples[0].image.parent} holds {len(samples)} images with masks, and 4 "
                        "at least are needed: 2 to train and 2 to test")
    count = min(max(round(len(samples) / 5), 2), 100)
    by_hash = sorted(samples, key=lambda sample: hashlib.sha256(os.fsencode(sample.name)).digest())
    held_out = set(by_hash[:count])
    samples = [replace(sample, split="test") if sample in held_out else sample
               for sample in samples]
    names = [sample.name for sample in samples if sample.split == "test"]
    print(f"there is no test folder: {count} of {len(samples)} samples are held out to test on: "
          f"{some(names)}")
    if len(samples) < 10:
        print(f"a test on {count} images tells little: the next ones may well do much better or "
              "worse")
    return sorted(samples, key=lambda sample: sample.split == "test")


def read_list(file: Path) -> list[str]:
    """The names in a list file, each once; a line may hold a folder and an extension too.

    Of a line such as 1.bmp--out_of_focus0002, as copies of CUHK have it, the name is what follows.
    """
    paths = [Path(line.rpartition("--")[2].strip()) for line in _lines(file)]
    return list(dict.fromkeys(composed(_without_extension(path.name)) for path in paths))


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, without space around them."""
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _without_extension(name: str) -> str:
    base, dot, ending = name.rpartition(".")
    return base if f"{dot}{ending.lower()}" in EXTENSIONS else name


def read_skip(text: str) -> list[str]:
    """The items of the constant SKIP: name or split/name, and the names in its list files.

    text: names and paths of .txt files, joined by commas. A line of such a file may be a path: of
    its folders only a last one train or test counts.
    """
    items = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        if item.lower().endswith(".txt") and (file := expanded(item)).is_file():
            for path in map(Path, _lines(file)):
                split = path.parent.name
                items.append(f"{split}/{path.name}" if split in ("train", "test") else path.name)
        else:
            items.append(item)
    return [composed(_without_extension(item)) for item in items]


def left_out(skip: list[str], samples: list[Sample], cached: Collection[str] = ()) -> set[str]:
    """What `skip` (see `read_skip`) names, as `Sample.place`; it is said on stdout.

    cached: places of images that an earlier cache holds or left out; they may be gone from the
    disk. Raises UserError for an item that names no sample, or one in each split, and where no
    test image is left.
    """
    places = {sample.place for sample in samples} | set(cached)
    chosen = {item: {item, f"train/{item}", f"test/{item}"} & places for item in skip}
    if unknown := [item for item, found in chosen.items() if not found]:
        raise UserError(f"SKIP names {some(unknown)}, but there is no such sample (and no such "
                        "list file): give names of images without their folders")
    if twice := [item for item, found in chosen.items() if len(found) > 1]:
        raise UserError(f"SKIP names {some(twice)}, and both splits have it: write "
                        f"train/{twice[0]} or test/{twice[0]}")
    places = set().union(*chosen.values())
    if places.issuperset(sample.place for sample in samples if sample.split == "test"):
        raise UserError("SKIP leaves no test image: take some of its names out")
    if places:
        print(f"left out by SKIP: {some(sorted(places))}")
    return places


def _names_of(split: str, skip: Collection[str]) -> set[str]:
    """`skip` with plain names for what it leaves out of a split."""
    return {item.removeprefix(f"{split}/") for item in skip}


def draw_shots(samples: list[Sample], task: Task, count: int, seed: int,
               skip: Collection[str] = ()) -> list[tuple[Sample, int]]:
    """`count` random training samples as (sample, text index); the first n are the draw of n.

    A binary task draws images. One whose mask is empty or full, or that cannot be read, cannot
    train and is left out; the first ten are named on stdout. A task with several texts draws images
    that hold a text and something else, as evenly over the texts as the data allow. An image is
    drawn for a second text only if no other is left, and never twice for the same text.
    skip: places (`Sample.place`) that are not drawn; others take theirs.
    Raises UserError if there are too few; the task "folder" takes what it has, 2 at least, and
    says so.
    """
    rng = np.random.default_rng(seed)
    training = [sample for sample in samples if sample.split == "train"]
    training = [training[index] for index in rng.permutation(len(training))]
    training = [sample for sample in training if sample.place not in skip]
    unfit: list[str] = []
    if len(task.texts) > 1:
        candidates = _candidates_per_text(training, task, unfit)
    else:
        candidates = [_trainable(training, task, count, unfit)]
    for reason in unfit[:10]:
        print(f"not drawn: {reason}")
    if len(unfit) > 10:
        print(f"not drawn: {len(unfit) - 10} more")
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
    if task.name == "folder" and 2 <= len(drawn) < count:
        print(f"SHOTS={count}: all {len(drawn)} samples that can train are taken")
    elif len(drawn) < count:
        if len(drawn) > 1:
            mend = f"set SHOTS={len(drawn)} or less"
        else:
            mend = "add training images whose masks hold foreground and background, 2 at least"
        first = f"; the first of {len(unfit)} that cannot: {unfit[0]}" if unfit else ""
        raise UserError(f"SHOTS={count} training samples are asked for and {task.name} has "
                        f"{len(drawn)} that can train: {mend}{first}")
    return drawn[:count]


def _candidates_per_text(training: list[Sample], task: Task,
                         unfit: list[str]) -> list[list[Sample]]:
    """For each text of the task the samples that hold it and something else.

    unfit: takes a sentence for each that cannot be used.
    """
    candidates: list[list[Sample]] = [[] for _ in task.texts]
    for sample in tqdm(training, "reading label maps", disable=distributed.RANK > 0):
        label_map = _training_map(sample, task, unfit)
        if label_map is None or untrainable(label_map):
            continue
        for label in np.setdiff1d(label_map, [0, IGNORE]):
            candidates[int(label) - 1].append(sample)
    return candidates


def _trainable(training: list[Sample], task: Task, count: int, unfit: list[str]) -> list[Sample]:
    """The first `count` samples of a binary task that can; `unfit` takes why the others cannot."""
    found = []
    for sample in training:
        if len(found) == count:
            break
        label_map = _training_map(sample, task, unfit)
        if label_map is None:
            continue
        if reason := untrainable(label_map):
            unfit.append(f"{sample.mask} is {reason}, so it cannot be trained on")
        else:
            found.append(sample)
    return found


def _training_map(sample: Sample, task: Task, unfit: list[str]) -> np.ndarray | None:
    """The label map of a sample; None if its image or mask cannot be used, which `unfit` takes."""
    try:
        return load_label_map(sample, task, load_image(sample.image).shape[:2])
    except UserError as error:
        unfit.append(str(error))
        return None


def _find_folders(task: Task, data_dir: Path) -> tuple[Path, dict[str, Path]]:
    """The folder that holds the data set's own folders, and where each folder or list file lies.

    The first is data_dir, or, said on stdout, the one folder in it that holds them, as archives
    unpack, or a folder above it. Raises UserError if a folder or list file is missing.
    """
    folders = list(chain(*FOLDERS[task.dataset].values()))
    lists = list(_VOC_LISTS.values()) if task.dataset == "voc" else []

    def search(root: Path) -> dict[str, Path | list[str]]:
        found = {path: _find(root, path) for path in folders + lists}
        if task.name == "folder" and _find(root, "test") == []:  # it may be left out
            found = {path: place for path, place in found.items() if not path.startswith("test")}
        return found

    def is_whole(found: dict[str, Path | list[str]]) -> bool:
        return all(isinstance(path, Path) for path in found.values())

    root, found = data_dir, search(data_dir)
    if not is_whole(found):
        inside = []
        if data_dir.is_dir():  # a disk's lost+found is for nobody to look into
            inside = [path for path in data_dir.iterdir()
                      if path.is_dir() and os.access(path, os.R_OK | os.X_OK)]
        above = list(data_dir.resolve().parents)[:2] if task.dataset == "voc" else []
        others = [path for path in [*inside, *above] if is_whole(search(path))]
        if len(others) != 1:
            raise UserError(_missing(task, data_dir, found))
        root, found = others[0], search(others[0])
        print(f"{task.title}: the data set lies in {root}")
    for path, place in found.items():
        if place != root / path:
            print(f"{task.title}: {place.relative_to(root)} is taken for {path}")
    if task.dataset == "voc":
        _say_what_is_not_vocs(task, found)
    return root, found


def _find(root: Path, expected: str) -> Path | list[str]:
    """The folder or list file `expected`, a path in `root`, whose parts may have like names.

    If it is not there: the like names, where there are several to choose from.
    """
    place = root
    for part in Path(expected).parts:
        if not (place / part).exists():
            inside = sorted(place.iterdir()) if place.is_dir() else []
            alike = [path for path in inside if _rough(path.name) == _rough(part)]
            if len(alike) != 1:
                return [str(path.relative_to(root)) for path in alike]
            part = alike[0].name
        place = place / part
    is_there = place.is_file() if expected.endswith(".txt") else place.is_dir()
    return place if is_there else []


def _rough(name: str) -> str:
    """What folders of like names share: image, Images, imgs; mask, masks, gt, GroundTruth."""
    plain = re.sub(r"[-_ ]", "", composed(name).lower()).removesuffix("s")
    return re.sub("(gt|groundtruth|label)$", "mask", re.sub("(img|picture)$", "image", plain))


def _missing(task: Task, data_dir: Path, found: dict[str, Path | list[str]]) -> str:
    """The sentence for a data set that is not at `data_dir`; found: of `_find`."""
    needed, aug = ", ".join(found), data_dir / f"{_VOC}/SegmentationClassAug"
    if task.dataset == "voc" and aug.is_dir() and not isinstance(_find(data_dir, _VOC_MASKS), Path):
        source = (f"SegmentationClassAug holds other masks, so take SegmentationClass of the "
                  f"original tar, {task.home}")
    elif task.home:
        source = f"get the data set from {task.home} and unpack it there"
    elif task.name == "folder":
        source = ("put your pictures there (without a folder test, a fifth of the others is held "
                  "out)")
    else:
        source = "leave DATA_DIR empty for a task that is drawn here, or set TASK"
    if not data_dir.is_dir():
        fault = "is a file, not a folder" if data_dir.exists() else "does not exist"
        return (f"{task.title}: {data_dir} {fault}, and should hold {needed}: set DATA_DIR "
                f"to where the data set lies, or {source}")
    missing = {path: alike for path, alike in found.items() if not isinstance(alike, Path)}
    named = [path + (f" (but {' and '.join(alike)}: rename one of them)" if alike else "")
             for path, alike in missing.items()]
    return f"{task.title}: {data_dir} should hold {needed}, but has no {', '.join(named)}: {source}"


def _say_what_is_not_vocs(task: Task, found: dict[str, Path]) -> None:
    """Names on stdout the masks and the list that other projects add to VOC."""
    added = (found[_VOC_MASKS].with_name("SegmentationClassAug"),
             found[_VOC_LISTS["train"]].with_name("trainaug.txt"))
    if others := [path.name for path in added if path.exists()]:
        print(f"{task.title}: {' and '.join(others)} passed over; what counts is SegmentationClass "
              "of the original tar, with its train.txt and val.txt")


def _pictures(folder: Path, skip: Collection[str] = (), prefix: str = "",
              of_duts: bool = False) -> dict[str, Path]:
    """{name: path} of the pictures in a folder whose names start with `prefix`, sorted by name.

    A name is the stem in composed Unicode: macOS writes others. Hidden files, such as the `._x.png`
    of macOS, do not count. Other files are passed over, and named on stdout, and so is one of two
    masks of DUTS that have the same name.
    Raises UserError if other pictures than those of `skip` have the same name.
    """
    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "."
             and path.name.startswith(prefix)]
    others = [path.name for path in files if path.suffix.lower() not in EXTENSIONS]
    if others:
        print(f"passed over in {folder}, as no picture that is read: {some(others)}")
    named: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in EXTENSIONS:
            named.setdefault(composed(path.stem), []).append(path)
    wrong, shared = [], []
    for name, paths in named.items():
        if of_duts and [path.suffix.lower() for path in paths] == [".jpg", ".png"]:
            right = 0 if name in _DUTS_JPEG else 1
            wrong.append(paths.pop(1 - right).name)
        elif len(paths) > 1 and name not in skip:
            shared.append(" and ".join(path.name for path in paths))
    if wrong:
        print(f"passed over in {folder}, as the file of the same name is the right mask: "
              f"{some(wrong)}")
    if shared:
        raise UserError(f"files in {folder} share a name ({some(shared)}), so that images and "
                        "masks cannot be matched: rename or remove one of each")
    return {name: named[name][0] for name in sorted(named)}


def _pairs(image_dir: Path, mask_dir: Path, skip: Collection[str], prefix: str = "",
           of_duts: bool = False) -> list[tuple[str, Path, Path]]:
    """(name, image, mask) of all pictures; raises UserError if one is missing its partner.

    Of those in `skip` it may be missing.
    """
    images = _pictures(image_dir, skip, prefix)
    masks = _pictures(mask_dir, skip, prefix, of_duts)
    without_mask = [images[name].name for name in images.keys() - masks.keys() - skip]
    without_image = [masks[name].name for name in masks.keys() - images.keys() - skip]
    faults = []
    if without_mask:
        faults.append(f"{mask_dir} has nothing for {some(sorted(without_mask))}")
    if without_image:
        faults.append(f"{image_dir} has nothing for {some(sorted(without_image))}")
    if faults:
        raise UserError(f"{' and '.join(faults)}: every image needs a mask of the same name, and "
                        f"every mask an image ({', '.join(EXTENSIONS)}); SKIP leaves samples out")
    return [(name, images.get(name, image_dir / name), masks.get(name, mask_dir / name))
            for name in sorted(images.keys() | masks.keys())]


def _cuhk(task: Task, list_dirs: tuple[Path, ...], image_dir: Path, mask_dir: Path,
          skip: set[str]) -> list[Sample]:
    """The out-of-focus images of CUHK; its `motion*` images belong to another task.

    Test images are those named in test.txt, in the first of `list_dirs` that has one. Without that
    file they are the 100 of CUHK_TEST_LIST, or the last seventh by name where the folder does not
    hold all of these. What was taken is printed.
    """
    pairs = _pairs(image_dir, mask_dir, skip, prefix="out_of_focus")
    names = [name for name, _, _ in pairs]
    if not names:
        raise UserError(f"{image_dir} holds no out_of_focus*.jpg, CUHK's names of such images: "
                        "copies with other names (1.bmp, ...) are other data sets; put the "
                        "original there, or use TASK=folder")
    published = set(read_list(CUHK_TEST_LIST))
    lists = [file for folder in list_dirs if (file := folder / "test.txt").is_file()]
    if lists:
        list_file = lists[0]
        test, source = set(read_list(list_file)), "named in test.txt"
        unknown = sorted(test - set(names) - skip)
        if unknown:
            raise UserError(f"{list_file} names {some(unknown)}, but {image_dir} has no such "
                            "out-of-focus image")
    elif published < set(names) | skip:
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


def _voc(lists: dict[str, Path], image_dir: Path, mask_dir: Path,
         skip: set[str]) -> list[Sample]:
    """The images in VOC's lists; its folders hold many more images, for its other tasks."""
    images, masks = _pictures(image_dir, skip), _pictures(mask_dir, skip)
    names = {split: read_list(file) for split, file in lists.items()}
    shared = sorted(set(names["train"]) & set(names["test"]))
    if shared:
        raise UserError(f"{' and '.join(map(str, lists.values()))} both name {some(shared)}: take "
                        "it out of one of them")
    listed = [name for name in chain(*names.values()) if name not in skip]
    faults = []
    for folder, found in ((image_dir, images), (mask_dir, masks)):
        missing = [name for name in listed if name not in found]
        if missing:
            faults.append(f"{folder} has no {some(missing)}")
    if faults:
        raise UserError(f"{' and '.join(faults)}: add them, or leave the samples out by SKIP")
    return [Sample(name, images.get(name, image_dir / name), masks.get(name, mask_dir / name),
                   split)
            for split in names for name in sorted(names[split])]
