"""Files as they must not be: damaged at random, of another kind, or claiming what they do not hold.

Each is read by the code that the stages read it with. It must load to sound values, or be refused with a UserError that
names it. What has checksums (cache, checkpoints) must moreover load to the very values that were written.
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
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from common.agent import Actor, Critic
from common.cache import Cache
from common.datasets import Sample, _read_list, image_size, load_image, load_label_map
from common.episode import patch_centres
from common.frozen.sam_weights import load_sam
from common.results import tables
from common.runtime import checkpoint
from common.runtime.errors import UserError
from common.srm import build_srm
from common.standin.scenes import write_scene
from common.tasks import DEMO_CLASSES, get_task
from tests.faults.stage_faults import Found

BATCH = 50  # cases in one process; one that is ended by a signal costs only itself
SECONDS = 60  # after which reading one file counts as hung
MASK_SIZE = 150, 200  # height, width of the data set's first mask
CPU = torch.device("cpu")


# ---- how the project reads each kind of file; each returns what it read, as something to compare ------------------


def read_image(path: Path) -> str:
    image = load_image(path)
    sound(image.dtype == np.uint8 and image.shape == (*image_size(path), 3), "a picture of another shape")
    return ""  # without checksums: a flipped bit in the pixels cannot be seen


def read_mask(path: Path) -> str:
    labels = load_label_map(Sample("0", path, path, "train"), get_task("folder", "thing"), MASK_SIZE)
    sound(labels.dtype == np.uint8 and labels.shape == MASK_SIZE and labels.max() <= 1, "labels of no sense")
    return ""


def read_palette(path: Path) -> str:
    task, size = get_task("demo_semantic"), (192, 192)
    labels = load_label_map(Sample("0", path, path, "train"), task, size)
    known = {*range(len(DEMO_CLASSES) + 1), 255}
    sound(labels.dtype == np.uint8 and labels.shape == size and set(np.unique(labels)) <= known, "labels of no sense")
    return ""


def read_names(path: Path) -> str:
    sound(all(isinstance(name, str) for name in _read_list(path)), "no names")
    return ""


def read_log(path: Path) -> str:
    rows = checkpoint.read_log(path)
    sound(all(isinstance(value, float) for row in rows for value in row.values()), "no numbers")
    return ""


def read_sam(path: Path) -> str:
    load_sam(str(path), CPU)
    return ""


def read_cache(path: Path) -> str:
    """All that stages 2 to 4 read."""
    features = Cache.open(path, "folder")
    attributes = {key: value for key, value in features.attrs.items() if key not in ("time", "versions")}
    centres = patch_centres(features.attrs["image_size"], features.attrs["patch_size"])
    shots, test = features.training_set(0, 3, CPU), features.samples("test")
    values = [shots.samples, shots.embeddings, shots.maps, shots.truth, shots.truth_centres, *shots.label_maps, test,
              features.embeddings(test), features.maps(test), features.truth_centres(test), features.truth_grid(test),
              *(features.label_map(sample) for sample in test), *(features.picture(sample) for sample in test)]
    values = [np.asarray(value) for value in values]
    sound(all(np.isfinite(value).all() for value in values), "values that are not finite")
    sound(shots.truth_centres.shape[1] == len(centres), "truth at other places than the centres")
    names = [features.name(sample) for sample in [*shots.samples, *test]]
    told = json.dumps([sorted(attributes.items()), names, [value.shape for value in values]])
    return hashlib.sha256(told.encode() + b"".join(value.tobytes() for value in values)).hexdigest()


def read_srm(path: Path) -> str:
    """As stage 2 goes on from it, and as stage 3 starts from it."""
    saved = checkpoint.load(path, "02_train_srm.py", step=int, **checkpoint.TRAINING)
    checkpoint.require_finished(path, saved, "02_train_srm.py")
    srm = build_srm(saved["settings"]["branch"], 64)
    checkpoint.restore(path, saved, srm=srm, optimizer=torch.optim.Adam(srm.parameters()), generator=torch.Generator())
    return told(saved)


def read_agent(path: Path) -> str:
    """As stage 3 goes on from it, and as stage 4 starts from it."""
    saved = checkpoint.load(path, "03_train_agent.py", **checkpoint.TRAINING)
    checkpoint.require_finished(path, saved, "03_train_agent.py")
    srm, actor, critic = build_srm(saved["settings"]["branch"], 64), Actor(64), Critic(64, scale=100)
    checkpoint.restore(path, saved, srm=srm, actor=actor, critic=critic, generator=torch.Generator(),
                       ppo=torch.optim.Adam([*actor.parameters(), *critic.parameters()]),
                       srm_optimizer=torch.optim.Adam(srm.parameters()))
    return told(saved)


def told(content: object) -> str:
    """Everything in a checkpoint, as a digest."""
    def parts(value: object):
        if isinstance(value, dict):
            for key, item in value.items():
                yield str(key)
                yield from parts(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from parts(item)
        else:
            yield value.numpy().tobytes().hex() if isinstance(value, torch.Tensor) else repr(value)
    return hashlib.sha256("\n".join(parts(content)).encode()).hexdigest()


def read_results(path: Path) -> str:
    results = tables.read_results(path, "folder", ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI"))
    tables.pooled([results])
    rounds = tables.rounds_of({"iterations": {"": [results]}})
    sound(all(np.isfinite(mean) for values in rounds.values() for mean, _ in values), "values that are not finite")
    sound(len(rounds["AlignSAM"]) == results["rounds"] + 1, "other rounds than it claims")
    sound(np.isfinite(results["foreground_rate_attainable"]), "values that are not finite")
    return ""


READERS = {
    "image.jpg": read_image, "image.png": read_image, "mask.png": read_mask, "palette.png": read_palette,
    "train.txt": read_names, "srm_log.csv": read_log, "sam.pth": read_sam, "features.h5": read_cache,
    "srm.pt": read_srm, "agent.pt": read_agent, "results.json": read_results,
}
SUMMED = ("features.h5", "srm.pt", "agent.pt")  # with checksums: any change in the values is seen


def sound(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(f"it loads to {otherwise}")


def gather(folder: Path, run_dir: Path, data: Path) -> Path:
    """One sound file of every kind, in a new folder."""
    folder.mkdir()
    for name in ("features.h5", "srm.pt", "agent.pt", "results.json", "srm_log.csv"):
        shutil.copy(run_dir / name, folder)
    shutil.copy(data / "train/images/0.jpg", folder / "image.jpg")
    shutil.copy(data / "train/masks/0.png", folder / "mask.png")
    Image.open(folder / "image.jpg").save(folder / "image.png")
    name = write_scene(("semantic", "train", 0, folder / "voc"))
    shutil.copy(next((folder / "voc").rglob(f"SegmentationClass/{name}.png")), folder / "palette.png")
    shutil.rmtree(folder / "voc")
    (folder / "train.txt").write_text("".join(f"2007_{number:06}\n" for number in range(40)))
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 8, 8, 96)}, folder / "sam.pth")  # no SAM: always refused
    return folder


# ---- random damage ------------------------------------------------------------------------------------------------


class RunsCode:
    """Pickles to a call that writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated(path: Path, rng: random.Random, sound_files: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def bits_flipped(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    # half of them in the first or last kilobytes, where formats keep their structure
    ranges = [(0, len(content)), (0, min(4096, len(content))), (max(0, len(content) - 4096), len(content))]
    for _ in range(rng.choice((1, 1, 3))):
        content[rng.randrange(*rng.choice([ranges[0], *ranges]))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def bytes_zeroed(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, length = rng.randrange(len(content)), rng.choice((4, 64, 4096))
    content[begin:begin + length] = bytes(len(content[begin:begin + length]))
    path.write_bytes(content)


def bytes_random(path: Path, rng: random.Random, sound_files: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, length = rng.randrange(len(content)), rng.choice((4, 64, 4096))
    content[begin:begin + length] = rng.randbytes(len(content[begin:begin + length]))
    path.write_bytes(content)


def another_kind(path: Path, rng: random.Random, sound_files: Path) -> None:
    """Nothing, text, a folder, another of the project's files, a zip of something, a pickle that would run code."""
    kind = rng.choice(("empty", "text", "json", "other", "other", "zip", "pickle", "torch",
                       *(["folder"] if path.name != "train.txt" else [])))  # the layout's check wants a file there
    path.unlink()
    if kind in ("empty", "text", "json"):
        json_text = rng.choice(("[]", "{}", "3", "null"))
        path.write_text({"empty": "", "text": "not what it should be\n" * 50, "json": json_text}[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "other":
        shutil.copy(sound_files / rng.choice([name for name in READERS if name != path.name]), path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("notes.txt", "nothing of use")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(path.parent / "it-ran"), protocol=rng.choice((2, 4))))
    else:
        torch.save({"settings": RunsCode(path.parent / "it-ran"), "finished": True}, path)


DAMAGES = (truncated, bits_flipped, bits_flipped, bits_flipped, bytes_zeroed, bytes_random, another_kind)


def try_one(name: str, change: Callable[[Path], object], sound_files: Path, expected: str | None) -> str | None:
    """Changes a copy of a sound file and reads it: None if all is as it should be, else what was violated.

    expected: what reading the sound file gives, for files with checksums; "refused" where it must not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        shutil.copy(sound_files / name, path)
        change(path)
        try:
            got = READERS[name](path)
        except UserError as error:
            if str(path) not in str(error):
                return f"the sentence does not name the file: {error}"
            return f"the sentence has more than one line: {error}" if "\n" in str(error) else None
        except AssertionError as error:
            return str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        finally:
            if (Path(folder) / "it-ran").exists():
                return "code in the file was run"
        if expected == "refused":
            return "it was taken"
        return "it loads to other values" if expected and got != expected else None


def in_processes(cases: list[tuple], sound_files: Path, found: Found) -> None:
    """`try_one` on every (case, name of the file, change, expected), in forks, so that no crash ends the campaign."""
    todo = list(cases)
    while todo:
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print their own complaints
            warnings.simplefilter("ignore")
            try:
                for _, name, change, expected in todo[:BATCH]:
                    signal.alarm(SECONDS)
                    answer = try_one(name, change, sound_files, expected)
                    os.write(write, json.dumps(answer and answer[:1000]).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as answers:
            given = [json.loads(line) for line in answers]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if len(given) < len(todo[:BATCH]):
            given.append("it hangs" if status == -signal.SIGALRM else f"the process ends with {status}")
        for (case, name, *_), answer in zip(todo, given):
            if answer is not None:
                found.violations.append((case, f"{name}: {answer}"))
        todo = todo[len(given):]


def damaged(sound_files: Path, count: int, seed: int, only: str) -> Found:
    """`count` files with random damage."""
    found, cases = Found(), []
    before = {name: READERS[name](sound_files / name) for name in SUMMED}
    for number in range(count):
        case = f"damage-{number}"
        rng = random.Random(f"{seed} {case}")
        name, damage = list(READERS)[number % len(READERS)], rng.choice(DAMAGES)
        if only in ("", case):
            found.count(f"{name}: {damage.__name__.replace('_', ' ')}")
            change = functools.partial(damage, rng=rng, sound_files=sound_files)
            cases.append((case, name, change, before.get(name)))
    in_processes(cases, sound_files, found)
    return found


# ---- claims that a file does not keep -----------------------------------------------------------------------------


def of_cache(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)
    return edit


def of_checkpoint(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return edit


def of_results(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return edit


def put(dataset: str, place: object, value: object) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        file[dataset][place] = value
    return of_cache(change)


def attribute(name: str, value: object) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value
    return of_cache(change)


def without(name: str) -> Callable[[Path], None]:
    return of_cache(lambda file: file.attrs.__delitem__(name))


def first_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(content: dict) -> None:
        name = next(iter(content["srm"]))
        content["srm"][name] = change(content["srm"][name])
    return of_checkpoint(edit)


def optimizer_of_another_shape(content: dict) -> None:
    content["optimizer" if "optimizer" in content else "ppo"]["state"][0]["exp_avg"] = torch.zeros(3)


NAN = float("nan")
ATTRIBUTES = ("task", "branch", "sam", "sam_fingerprint", "clip", "clip_fingerprint", "clip_size", "image_size",
              "precision", "frame", "patch_size", "texts", "embedding", "format")
SETTINGS = ("task", "branch", "seed", "shots", "rounds", "features")
CLAIMS: dict[str, list[tuple[str, Callable[[Path], object]]]] = {
    "features.h5": [
        *((f"no {name}", without(name)) for name in ATTRIBUTES),
        *((f"{name} is an array", attribute(name, np.zeros(2))) for name in ATTRIBUTES),
        *((f"{name} is of another type", attribute(name, 800.5)) for name in ATTRIBUTES),
        *((f"{name} = {value}", attribute(name, value)) for name in ("frame", "image_size", "patch_size")
          for value in (0, -80, 10**9)), ("clip_size = 0", attribute("clip_size", 0)),
        ("branch = both", attribute("branch", "both")), ("patch_size does not divide", attribute("patch_size", 70)),
        ("image_size is not frame", attribute("image_size", 400)), ("task = duts", attribute("task", "duts")),
        ("no text", attribute("texts", "[]")), ("too many texts", attribute("texts", '["a", "b"]')),
        ("texts are numbers", attribute("texts", "[3]")), ("texts are no JSON", attribute("texts", "thing")),
        ("texts are one text", attribute("texts", '"a"')),
        ("another embedding", attribute("embedding", "[64, 6, 6]")),
        ("embedding is no list", attribute("embedding", "64")),
        ("embedding of texts", attribute("embedding", '["a", "b", "c"]')),
        ("label_offsets negative", put("label_offsets", 1, -1)), ("label_offsets fall", put("label_offsets", 2, 1)),
        ("label_offsets too large", put("label_offsets", 3, 2**40)),
        ("last offset too large", put("label_offsets", -1, 2**40)),
        ("sizes negative", put("sizes", (0, 0), -200)), ("sizes zero", put("sizes", (0, 0), 0)),
        ("sizes do not fit", put("sizes", (1, 1), 33)), ("both sizes negative", put("sizes", 0, (-200, -150))),
        ("a shot beyond the images", put("shots", (0, 0), 99)), ("a shot before the images", put("shots", (0, 0), -1)),
        ("a shot beyond the texts", put("shots", (0, 1), 5)), ("a shot before the texts", put("shots", (0, 1), -1)),
        ("a shot among the test images", put("shots", (0, 0), 13)), ("a split of no name", put("split", 0, b"tset")),
        ("an image not done", put("done", 0, 0)), ("a flag of no sense", put("done", 0, 7)),
        ("no test image", put("split", slice(None), b"train")),
        ("a map not finite", put("maps", (0, 0, 0, 0), NAN)),
        ("an embedding not finite", put("embeddings", (13, 0, 0, 0), NAN)),
        ("truth not finite", put("truth_grid", (0, 0, 0, 0), NAN)),
        ("no dataset of maps", of_cache(lambda file: file.__delitem__("maps"))),
        ("a group in a dataset's place", of_cache(lambda file: (file.__delitem__("maps"), file.create_group("maps")))),
    ],
    **{name: [
        *((f"no {key} in the settings", of_checkpoint(lambda content, key=key: content["settings"].pop(key)))
          for key in SETTINGS),
        *((f"no {key}", of_checkpoint(lambda content, key=key: content.pop(key))) for key in keys),
        *((f"{key} is a text", of_checkpoint(lambda content, key=key: content.update({key: "x"}))) for key in keys),
        *((f"{key} is None", of_checkpoint(lambda content, key=key: content.update({key: None}))) for key in keys),
        ("another branch", of_checkpoint(lambda content: content["settings"].update(branch="implicit"))),
        ("a branch of no name", of_checkpoint(lambda content: content["settings"].update(branch="both"))),
        ("shots is a text", of_checkpoint(lambda content: content["settings"].update(shots="x"))),
        ("a weight not finite", first_weight(lambda weight: weight * NAN)),
        ("a weight of another shape", first_weight(lambda weight: weight[:1])),
        ("a weight of another type", first_weight(lambda weight: weight.tolist())),
        ("a weight missing", of_checkpoint(lambda content: content["srm"].popitem())),
        ("an optimiser of another shape", of_checkpoint(optimizer_of_another_shape)),
        ("a generator of another size", of_checkpoint(lambda content: content.update(generator=torch.ByteTensor(3)))),
        ("a log of texts", of_checkpoint(lambda content: content.update(log=["x"]))),
        ("an unfinished run", of_checkpoint(lambda content: content.update(finished=False))),
        ("a list", lambda path: torch.save([1, 2], path)), ("a tensor", lambda path: torch.save(torch.zeros(3), path)),
    ] for name, keys in {"srm.pt": ("settings", "finished", "srm", "optimizer", "step", "generator", "log"),
                         "agent.pt": ("settings", "finished", "srm", "actor", "critic", "ppo", "srm_optimizer",
                                      "generator", "log")}.items()},
    "results.json": [
        ("another task", of_results(lambda content: content.update(task="demo_blur"))),
        *((f"no {key}", of_results(lambda content, key=key: content.pop(key)))
          for key in ("sam", "clip", "branch", "samples", "rows", "iou_per_round", "foreground_rate_attainable")),
        *((f"{key} is None", of_results(lambda content, key=key: content.update({key: None})))
          for key in ("sam", "clip", "branch", "samples", "rows", "iou_per_round", "foreground_rate_attainable")),
        ("a row missing", of_results(lambda content: content["rows"].pop("w/o RL"))),
        ("a row of texts", of_results(lambda content: content["rows"]["w/o RL"].update(mIoU="high"))),
        ("a row not finite", of_results(lambda content: content["rows"]["w/o RL"].update(mIoU=NAN))),
        ("a row that is a number", of_results(lambda content: content["rows"].update({"w/o RL": 3}))),
        ("a metric missing", of_results(lambda content: content["rows"]["w/o RL"].pop("mIoU"))),
        ("rounds of texts", of_results(lambda content: content["iou_per_round"].update(AlignSAM=["x"]))),
        ("fewer rounds than it says", of_results(lambda content: content["iou_per_round"]["AlignSAM"].pop())),
        ("more rounds than it has", of_results(lambda content: content.update(rounds=20))),
        ("rounds not finite", of_results(lambda content: content["iou_per_round"].update(AlignSAM=[NAN]))),
    ],
}


def claims(sound_files: Path, only: str) -> Found:
    """Every file of `CLAIMS`: none may be taken."""
    found, cases = Found(), []
    for name, changes in CLAIMS.items():
        for what, change in changes:
            case = f"{name} with {what}"
            if only in ("", case):
                found.count(f"{name} that does not hold what it claims")
                cases.append((case, name, change, "refused"))
    in_processes(cases, sound_files, found)
    return found
