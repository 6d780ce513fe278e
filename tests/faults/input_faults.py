"""Files as they must not be: damaged at random, of another kind, or with content that is wrong.

Each one is read by the code with which the stages read it. It must load to sound values, or be
refused with a UserError that names it. Files with checksums (cache, checkpoints) must moreover load
to the same values that were written.
"""

import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from common.agent import Actor, Critic, Learner
from common.cache import Cache
from common.datasets import read_list
from common.episode import patch_centres
from common.frozen.sam_weights import load_sam
from common.images import Sample, image_size, load_image
from common.label_maps import load_label_map
from common.results import tables
from common.runtime import checkpoint
from common.runtime.errors import UserError
from common.srm import build_srm
from common.standin.scenes import write_scene
from common.tasks import DEMO_CLASSES, get_task
from tests.faults.stage_faults import Found

BATCH = 50  # cases in one process; if a signal ends it, only the case at hand is lost
SECONDS = 60  # after which the reading of one file counts as hung
MASK_SIZE = 150, 200  # height, width of the data set's first mask
CPU = torch.device("cpu")

Change = Callable[[Path], object]  # changes the file at that path
Case = tuple[str, str, Change, str]  # its name, the name of the file, the change, what to expect


# ---- how the project reads each kind of file ----------------------------------------------------
#
# Each function returns a digest of what it read, or "" where a changed value cannot be noticed,
# because the file has no checksum.


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(f"it loads to {otherwise}")


def read_image(path: Path) -> str:
    image = load_image(path)
    same_shape = image.shape == (*image_size(path), 3)
    require(image.dtype == np.uint8 and same_shape, "a picture of another shape")
    return ""


def read_mask(path: Path) -> str:
    check_label_map(path, "folder", "thing", MASK_SIZE, {0, 1})
    return ""


def read_palette(path: Path) -> str:
    classes = {*range(len(DEMO_CLASSES) + 1), 255}
    check_label_map(path, "demo_semantic", "", (192, 192), classes)
    return ""


def check_label_map(path: Path, task_name: str, prompt: str, size: tuple[int, int],
                    values: set[int]) -> None:
    """Loads a label map of that height and width, which may hold only those values."""
    label_map = load_label_map(Sample("0", path, path, "train"), get_task(task_name, prompt), size)
    require(label_map.dtype == np.uint8 and label_map.shape == size, "labels of another shape")
    require(set(np.unique(label_map)) <= values, "labels that do not exist")


def read_names(path: Path) -> str:
    require(all(isinstance(name, str) for name in read_list(path)), "no names")
    return ""


def read_log(path: Path) -> str:
    for row in checkpoint.read_log(path):
        require(all(isinstance(value, float) for value in row.values()), "no numbers")
    return ""


def read_sam(path: Path) -> str:
    load_sam(str(path), CPU)
    return ""


def read_cache(path: Path) -> str:
    """All that stages 2 to 4 read."""
    cache = Cache.open(path, "folder")
    shots, test = cache.training_set(0, 3, CPU), cache.samples("test")
    values = [shots.samples, shots.embeddings, shots.maps, shots.truth, shots.truth_centres]
    values += shots.label_maps
    values += [test, cache.embeddings(test), cache.maps(test), cache.truth_centres(test),
               cache.truth_grid(test)]
    values += [cache.label_map(sample) for sample in test]
    values += [cache.picture(sample) for sample in test]
    values = [np.asarray(value) for value in values]
    require(all(np.isfinite(value).all() for value in values), "values that are not finite")
    centres = patch_centres(cache.attrs["image_size"], cache.attrs["patch_size"])
    require(shots.truth_centres.shape[1] == len(centres), "truth at other places than the centres")

    attributes = {key: value for key, value in cache.attrs.items()
                  if key not in ("time", "versions")}
    names = [cache.name(sample) for sample in [*shots.samples, *test]]
    shapes = [value.shape for value in values]
    header = json.dumps([sorted(attributes.items()), names, shapes]).encode()
    return hashlib.sha256(header + b"".join(value.tobytes() for value in values)).hexdigest()


def read_srm(path: Path) -> str:
    """As stage 3 starts from it, and as stage 2 goes on from it."""
    stage = "02_train_srm.py"
    branch = checkpoint.load_finished(path, stage, {})["settings"]["branch"]
    srm = build_srm(branch, 64)
    saved = checkpoint.resume(path, stage, {}, {"step": int}, srm=srm,
                              optimizer=torch.optim.Adam(srm.parameters()),
                              generator=torch.Generator())
    return digest(saved)


def read_agent(path: Path) -> str:
    """As stage 4 starts from it, and as stage 3 goes on from it."""
    stage = "03_train_agent.py"
    branch = checkpoint.load_finished(path, stage, {})["settings"]["branch"]
    srm, actor, critic = build_srm(branch, 64), Actor(64), Critic(64, scale=100)
    ppo = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    learner = Learner(srm, actor, critic, ppo, torch.optim.Adam(srm.parameters()))
    saved = checkpoint.resume(path, stage, {}, {}, **learner._asdict(),
                              generator=torch.Generator())
    return digest(saved)


def digest(content: object) -> str:
    """SHA-256 of everything in a checkpoint."""
    return hashlib.sha256("\n".join(_parts(content)).encode()).hexdigest()


def _parts(value: object) -> Iterator[str]:
    """Keys, tensors and other values of nested dicts, lists and tuples, as strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, torch.Tensor):
        yield value.numpy().tobytes().hex()
    else:
        yield repr(value)


def read_results(path: Path) -> str:
    results = tables.read_results(path, "folder", ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI"))
    tables.over_seeds([results])
    rounds = tables.rounds_of([results])
    for values in rounds.values():
        require(all(np.isfinite(mean) for mean, _ in values), "values that are not finite")
    require(len(rounds["AlignSAM"]) == results["rounds"] + 1, "other rounds than it claims")
    require(np.isfinite(results["foreground_rate_attainable"]), "values that are not finite")
    return ""


READERS: dict[str, Callable[[Path], str]] = {
    "image.jpg": read_image, "image.png": read_image, "mask.png": read_mask,
    "palette.png": read_palette, "train.txt": read_names, "srm_log.csv": read_log,
    "sam.pth": read_sam, "features.h5": read_cache, "srm.pt": read_srm, "agent.pt": read_agent,
    "results.json": read_results,
}
REFUSED = "refused"  # expected of a file that must not load


def gather(folder: Path, run_dir: Path, data: Path) -> Path:
    """Puts one sound file of every kind into a new folder, and returns the folder."""
    folder.mkdir()
    for name in ("features.h5", "srm.pt", "agent.pt", "results.json", "srm_log.csv"):
        shutil.copy(run_dir / name, folder)
    shutil.copy(data / "train/images/0.jpg", folder / "image.jpg")
    shutil.copy(data / "train/masks/0.png", folder / "mask.png")
    Image.open(folder / "image.jpg").save(folder / "image.png")
    name = write_scene(("semantic", "train", 0, folder / "voc"))
    palette_mask = next((folder / "voc").rglob(f"SegmentationClass/{name}.png"))
    shutil.copy(palette_mask, folder / "palette.png")
    shutil.rmtree(folder / "voc")
    names = [f"2007_{number:06}\n" for number in range(40)]
    (folder / "train.txt").write_text("".join(names))
    no_sam = {"image_encoder.pos_embed": torch.zeros(1, 8, 8, 96)}  # so it is always refused
    torch.save(no_sam, folder / "sam.pth")
    return folder


# ---- random damage ------------------------------------------------------------------------------
#
# Each function changes the file at `path`. sound_files is the folder of `gather`.


class RunsCode:
    """Pickles to a call that makes a folder: if the folder is there, code in the file was run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated(path: Path, rng: random.Random, sound_files: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def bits_flipped(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    size = len(content)
    anywhere, first, last = (0, size), (0, min(4096, size)), (max(0, size - 4096), size)
    for _ in range(rng.choice((1, 1, 3))):
        # half of the time in the first or last kilobytes, where formats keep their structure
        begin, end = rng.choice([anywhere, anywhere, first, last])
        content[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def bytes_zeroed(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, length = rng.randrange(len(content)), rng.choice((4, 64, 4096))
    end = min(begin + length, len(content))
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)


def bytes_random(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, length = rng.randrange(len(content)), rng.choice((4, 64, 4096))
    end = min(begin + length, len(content))
    content[begin:end] = rng.randbytes(end - begin)
    path.write_bytes(content)


def another_kind(path: Path, rng: random.Random, sound_files: Path) -> None:
    """An empty file, text, JSON, a folder, another file of the project, a zip, or code to run."""
    kinds = ["empty", "text", "json", "other", "other", "zip", "pickle", "torch"]
    if path.name != "train.txt":  # there the data set's layout is checked for a file before
        kinds.append("folder")
    kind = rng.choice(kinds)
    runs_code = RunsCode(path.parent / "it-ran")
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not what it should be\n" * 50)
    elif kind == "json":
        path.write_text(rng.choice(("[]", "{}", "3", "null")))
    elif kind == "folder":
        path.mkdir()
    elif kind == "other":
        other_name = rng.choice([name for name in READERS if name != path.name])
        shutil.copy(sound_files / other_name, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("notes.txt", "nothing of use")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(runs_code, protocol=rng.choice((2, 4))))
    else:
        torch.save({"settings": runs_code, "finished": True}, path)


DAMAGES = (truncated, bits_flipped, bits_flipped, bits_flipped, bytes_zeroed, bytes_random,
           another_kind)


def damaged(sound_files: Path, count: int, seed: int, only: str) -> Found:
    """`count` files with random damage."""
    found, cases = Found(), []
    # all sound files must load, but for sam.pth, which is no whole SAM
    digests = {name: read(sound_files / name) for name, read in READERS.items()
               if name != "sam.pth"}
    for number in range(count):
        case = f"damage-{number}"
        rng = random.Random(f"{seed} {case}")
        name, damage = list(READERS)[number % len(READERS)], rng.choice(DAMAGES)
        if only in ("", case):
            found.count(f"{name}: {damage.__name__.replace('_', ' ')}")
            change = functools.partial(damage, rng=rng, sound_files=sound_files)
            cases.append((case, name, change, digests.get(name, REFUSED)))
    in_processes(cases, sound_files, found)
    return found


# ---- one case, and many -------------------------------------------------------------------------


def try_one(name: str, change: Change, sound_files: Path, expected: str) -> str | None:
    """Changes a copy of a sound file and reads it. Returns what was violated, or None.

    expected: the digest of the sound file, which the changed file must have too if it loads; "" if
    it may load to other values; REFUSED if it must not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        shutil.copy(sound_files / name, path)
        change(path)
        violation = violated_by_reading(path, expected)
        if (Path(folder) / "it-ran").exists():
            return "code in the file was run"
        return violation


def violated_by_reading(path: Path, expected: str) -> str | None:
    try:
        got = READERS[path.name](path)
    except UserError as error:
        if str(path) not in str(error):
            return f"the sentence does not name the file: {error}"
        return f"the sentence has more than one line: {error}" if "\n" in str(error) else None
    except AssertionError as error:
        return str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"{type(error).__name__}: {str(error)[:200]} ({where})"
    if expected == REFUSED:
        return "it was taken"
    return "it loads to other values" if expected and got != expected else None


def in_processes(cases: list[Case], sound_files: Path, found: Found) -> None:
    """Calls `try_one` for every case, in forks, so that a crash ends one case only."""
    todo = list(cases)
    while todo:
        batch = todo[:BATCH]
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            answer_cases(batch, sound_files, write)
        os.close(write)
        with open(read) as answers:
            given = [json.loads(line) for line in answers]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if len(given) < len(batch):
            hangs = status == -signal.SIGALRM
            given.append("it hangs" if hangs else f"the process ends with {status}")
        for (case, name, _, _), answer in zip(batch, given):
            if answer is not None:
                found.violations.append((case, f"{name}: {answer}"))
        todo = todo[len(given):]


def answer_cases(batch: list[Case], sound_files: Path, write: int) -> None:
    """The child's part: writes one line of JSON for each case to a pipe, and never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print their own complaints
        warnings.simplefilter("ignore")
        for _, name, change, expected in batch:
            signal.alarm(SECONDS)
            answer = try_one(name, change, sound_files, expected)
            line = json.dumps(answer and answer[:1000]) + "\n"
            os.write(write, line.encode())
    finally:
        os._exit(0)


# ---- false claims: content that is readable, but wrong ------------------------------------------


def of_cache(change: Callable[[h5py.File], object]) -> Change:
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)
    return edit


def of_checkpoint(change: Callable[[dict], object]) -> Change:
    def edit(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return edit


def of_results(change: Callable[[dict], object]) -> Change:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return edit


def put(dataset: str, place: object, value: object) -> Change:
    """Writes a value into a dataset of the cache."""
    def change(file: h5py.File) -> None:
        file[dataset][place] = value
    return of_cache(change)


def attribute(name: str, value: object) -> Change:
    """Replaces an attribute of the cache."""
    def change(file: h5py.File) -> None:
        file.attrs[name] = value
    return of_cache(change)


def without_attribute(name: str) -> Change:
    def change(file: h5py.File) -> None:
        del file.attrs[name]
    return of_cache(change)


def remove_maps(file: h5py.File) -> None:
    del file["maps"]


def group_for_maps(file: h5py.File) -> None:
    del file["maps"]
    file.create_group("maps")


def replace(value: object, *keys: str) -> Callable[[dict], None]:
    """Replaces content[key][...][last key]."""
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
    return change


def remove(*keys: str) -> Callable[[dict], None]:
    """Removes content[key][...][last key]."""
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]
    return change


def first_weight(new_value: Callable[[torch.Tensor], object]) -> Change:
    """Replaces the first weight of the SRM by a function of it."""
    def edit(content: dict) -> None:
        name = next(iter(content["srm"]))
        content["srm"][name] = new_value(content["srm"][name])
    return of_checkpoint(edit)


def not_finite(weight: torch.Tensor) -> torch.Tensor:
    return weight * NAN


def first_row(weight: torch.Tensor) -> torch.Tensor:
    return weight[:1]


def remove_last_weight(content: dict) -> None:
    content["srm"].popitem()


def optimizer_of_another_shape(content: dict) -> None:
    optimizer = content["optimizer" if "optimizer" in content else "ppo"]
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)


def remove_last_round(content: dict) -> None:
    content["iou_per_round"]["AlignSAM"].pop()


def only_a_list(path: Path) -> None:
    torch.save([1, 2], path)


def only_a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


NAN = float("nan")
THREE_BYTES = torch.zeros(3, dtype=torch.uint8)
Claims = list[tuple[str, Change]]  # what is wrong, and the change that makes it so


def cache_claims() -> Claims:
    claims = []
    for name in ("task", "branch", "sam", "sam_fingerprint", "clip", "clip_fingerprint",
                 "clip_size", "image_size", "precision", "frame", "patch_size", "texts",
                 "embedding", "format"):
        claims += [
            (f"no {name}", without_attribute(name)),
            (f"{name} is an array", attribute(name, np.zeros(2))),
            (f"{name} is of another type", attribute(name, 800.5)),
        ]
    for name in ("frame", "image_size", "patch_size"):
        for value in (0, -80, 10**9):
            claims.append((f"{name} = {value}", attribute(name, value)))
    return claims + [
        ("clip_size = 0", attribute("clip_size", 0)),
        ("branch = both", attribute("branch", "both")),
        ("patch_size does not divide", attribute("patch_size", 70)),
        ("image_size is not frame", attribute("image_size", 400)),
        ("task = duts", attribute("task", "duts")),
        ("no text", attribute("texts", "[]")),
        ("too many texts", attribute("texts", '["a", "b"]')),
        ("texts are numbers", attribute("texts", "[3]")),
        ("texts are no JSON", attribute("texts", "thing")),
        ("texts are one text", attribute("texts", '"a"')),
        ("another embedding", attribute("embedding", "[64, 6, 6]")),
        ("embedding is no list", attribute("embedding", "64")),
        ("embedding of texts", attribute("embedding", '["a", "b", "c"]')),
        ("label_offsets negative", put("label_offsets", 1, -1)),
        ("label_offsets fall", put("label_offsets", 2, 1)),
        ("label_offsets too large", put("label_offsets", 3, 2**40)),
        ("last offset too large", put("label_offsets", -1, 2**40)),
        ("sizes negative", put("sizes", (0, 0), -200)),
        ("sizes zero", put("sizes", (0, 0), 0)),
        ("sizes do not fit", put("sizes", (1, 1), 33)),
        ("both sizes negative", put("sizes", 0, (-200, -150))),
        ("a shot beyond the images", put("shots", (0, 0), 99)),
        ("a shot before the images", put("shots", (0, 0), -1)),
        ("a shot beyond the texts", put("shots", (0, 1), 5)),
        ("a shot before the texts", put("shots", (0, 1), -1)),
        ("a shot among the test images", put("shots", (0, 0), 13)),
        ("a split of no name", put("split", 0, b"tset")),
        ("an image not done", put("done", 0, 0)),
        ("a flag of no sense", put("done", 0, 7)),
        ("no test image", put("split", slice(None), b"train")),
        ("a map not finite", put("maps", (0, 0, 0, 0), NAN)),
        ("an embedding not finite", put("embeddings", (13, 0, 0, 0), NAN)),
        ("truth not finite", put("truth_grid", (0, 0, 0, 0), NAN)),
        ("no dataset of maps", of_cache(remove_maps)),
        ("a group in a dataset's place", of_cache(group_for_maps)),
    ]


def checkpoint_claims(*keys: str) -> Claims:
    """keys: all that the checkpoint must hold."""
    claims = []
    for key in ("task", "branch", "seed", "shots", "rounds", "features"):
        claims.append((f"no {key} in the settings", of_checkpoint(remove("settings", key))))
    for key in keys:
        claims += [
            (f"no {key}", of_checkpoint(remove(key))),
            (f"{key} is a text", of_checkpoint(replace("x", key))),
            (f"{key} is None", of_checkpoint(replace(None, key))),
        ]
    return claims + [
        ("another branch", of_checkpoint(replace("implicit", "settings", "branch"))),
        ("a branch of no name", of_checkpoint(replace("both", "settings", "branch"))),
        ("shots is a text", of_checkpoint(replace("x", "settings", "shots"))),
        ("a weight not finite", first_weight(not_finite)),
        ("a weight of another shape", first_weight(first_row)),
        ("a weight of another type", first_weight(torch.Tensor.tolist)),
        ("a weight missing", of_checkpoint(remove_last_weight)),
        ("an optimiser of another shape", of_checkpoint(optimizer_of_another_shape)),
        ("a generator of another size", of_checkpoint(replace(THREE_BYTES, "generator"))),
        ("a log of texts", of_checkpoint(replace(["x"], "log"))),
        ("an unfinished run", of_checkpoint(replace(False, "finished"))),
        ("a list", only_a_list),
        ("a tensor", only_a_tensor),
    ]


def results_claims() -> Claims:
    claims = [("another task", of_results(replace("demo_blur", "task")))]
    for key in ("sam", "clip", "branch", "samples", "rows", "iou_per_round",
                "foreground_rate_attainable"):
        claims += [
            (f"no {key}", of_results(remove(key))),
            (f"{key} is None", of_results(replace(None, key))),
        ]
    return claims + [
        ("a row missing", of_results(remove("rows", "w/o RL"))),
        ("a row of texts", of_results(replace("high", "rows", "w/o RL", "mIoU"))),
        ("a row not finite", of_results(replace(NAN, "rows", "w/o RL", "mIoU"))),
        ("a row that is a number", of_results(replace(3, "rows", "w/o RL"))),
        ("a metric missing", of_results(remove("rows", "w/o RL", "mIoU"))),
        ("rounds of texts", of_results(replace(["x"], "iou_per_round", "AlignSAM"))),
        ("fewer rounds than it says", of_results(remove_last_round)),
        ("more rounds than it has", of_results(replace(20, "rounds"))),
        ("rounds not finite", of_results(replace([NAN], "iou_per_round", "AlignSAM"))),
    ]


CLAIMS: dict[str, Claims] = {
    "features.h5": cache_claims(),
    "srm.pt": checkpoint_claims("settings", "finished", "srm", "optimizer", "step", "generator",
                                "log"),
    "agent.pt": checkpoint_claims("settings", "finished", "srm", "actor", "critic", "ppo",
                                  "srm_optimizer", "generator", "log"),
    "results.json": results_claims(),
}


def false_claims(sound_files: Path, only: str) -> Found:
    """Every change in CLAIMS: none of these files may be taken."""
    found, cases = Found(), []
    for name, changes in CLAIMS.items():
        for what, change in changes:
            case = f"{name} with {what}"
            if only in ("", case):
                found.count(f"{name} that does not hold what it claims")
                cases.append((case, name, change, REFUSED))
    in_processes(cases, sound_files, found)
    return found
