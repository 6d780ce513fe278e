"""Trains SAMed or MSA on the run's own training samples, and writes the test set's masks.

    python -m common.rivals.peft [NAME=value ...]   NAME is any constant below; `help` lists them

Both change a few weights of SAM and need gradients through its image encoder. So they read the
data set's pictures again, and from the cache only the names, the draw and the label maps. Killed
at any moment, the same command goes on where it stopped. `04_evaluate.py MASKS=...` scores the
masks.
"""

import common.runtime.first  # noqa: F401  before torch

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.datasets import list_samples
from common.frozen.sam import squash
from common.frozen.sam_weights import load_cached_sam
from common.images import image_size, load_image
from common.prepare import looks_like, open_task
from common.results.given_masks import LISTED
from common.results.own_images import name_files
from common.results.pictures import save_picture
from common.rivals import lora
from common.rivals.finetuned import METHODS, FineTuned, loss, low_resolution, turned
from common.runtime import checkpoint, files, script, settings
from common.runtime.errors import UserError, some
from common.runtime.progress import progress
from common.runtime.run import Run, open_run
from common.runtime.workers import side_by_side

# what is trained
TASK = "demo_saliency"  # as in stage 1
METHOD = "SAMed"  # or MSA
DATA_DIR = ""  # where the data set lies; empty = data/<TASK>
SEED = 0  # of weights, batches and views
SHOTS = 0  # train on the first SHOTS of the samples that stage 1 drew (Table 10); 0 = all

# how (common/README.md says what is the authors', and how the rest was chosen)
STEPS = 500  # optimiser steps
BATCH_SIZE = 4  # pictures a step; a GPU, or a core, sees them one by one
LEARNING_RATE = {"SAMed": 0.005, "MSA": 0.001}  # AdamW's, at the end of the warm-up
WEIGHT_DECAY = 0.1
WARM_UP = 250  # steps in which the rate rises; then it falls to 0 with power 0.9
AUGMENT = True  # show each picture in one of its eight views: flips and quarter turns
PRECISION = "auto"  # of SAM's encoder: bf16 on a GPU that has it, else fp32; or either by name

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
SAM = ""  # the cache's SAM, where its file lies elsewhere now; empty = where stage 1 found it
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is
SAVE_EVERY = 50  # steps that a kill may cost
LOG_EVERY = 10  # steps between rows of the log, each the mean of these

_POWER = 0.9  # of the rate's decay
_SETTINGS = {"task": str, "method": str, "features": str}


def learning_rate(step: int) -> float:
    """Of step 1 to STEPS: it rises for WARM_UP steps, and then falls."""
    if step <= WARM_UP:
        return LEARNING_RATE[METHOD] * step / WARM_UP
    return LEARNING_RATE[METHOD] * (1 - (step - WARM_UP) / (STEPS - WARM_UP + 1)) ** _POWER


def find_pictures(run: Run, rows: list[int]) -> dict[int, Path]:
    """{row of the cache: its image file}.

    Raises UserError where the data set is not there, and one that names all images which are gone
    or have another size than in the cache.
    """
    prompt = run.cache.texts[0] if len(run.cache.texts) == 1 else ""
    task, data_dir = open_task({
        "TASK": TASK, "DATA_DIR": DATA_DIR, "PROMPT": prompt, "FOREGROUND": "",
        "CUHK_WHITE_IS_BLURRED": True, "SAM": run.attributes["sam"],
        "CLIP": run.attributes["clip"]})
    samples = list_samples(task, data_dir, json.loads(run.cache.attrs.get("skip", "[]")))
    path_of = {sample.place: sample.image for sample in samples}
    found, gone = {}, []
    for row in rows:
        path = path_of.get(run.cache.place(row))
        if path is None or not path.exists() or image_size(path) != run.cache.size(row):
            gone.append(run.cache.place(row))
        else:
            found[row] = path
    if gone:
        raise UserError(f"{len(gone)} images of {run.cache.path} are not in {data_dir}, or have "
                        f"another size now ({some(gone)}): set DATA_DIR to the data set that stage "
                        "1 read, or run stage 1 again into another RUN_DIR")
    return found


def read_picture(path: Path, run: Run, row: int, side: int) -> np.ndarray:
    """The picture as SAM sees it, uint8 (side, side, 3). Raises UserError if it is another one."""
    image = load_image(path)
    if not looks_like(image, run.cache.picture((row, 0))):
        raise UserError(f"{path} is not the picture that {run.cache.path} was made from: set "
                        "DATA_DIR to the data set that stage 1 read, or run stage 1 again into "
                        "another RUN_DIR")
    return squash(image, side, run.frame)


def train(model: FineTuned, run: Run, paths: dict[int, Path], rows: list[int],
          made_with: dict) -> str:
    """Trains on the images `rows`, or goes on with it; returns the trained weights' fingerprint.

    paths: of the images. made_with: the settings, for the checkpoint. It writes <method>.pt and
    <method>_log.csv into the run folder.
    """
    path, log_path = (run.folder / f"{METHOD.lower()}{end}" for end in (".pt", "_log.csv"))
    optimizer = torch.optim.AdamW(model.trained().values(), weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(SEED)
    saved = checkpoint.resume(path, this_command(), made_with, {"step": int, "seconds": float},
                              _SETTINGS, weights=model, optimizer=optimizer, generator=generator)
    log, done, seconds = (saved["log"], saved["step"], saved["seconds"]) if saved else ([], 0, 0.0)
    side = model.sam.image_encoder.img_size
    size = tuple(4 * cells for cells in model.sam.prompt_encoder.image_embedding_size)
    pictures, targets = [], []
    if done < STEPS:
        pictures = [read_picture(paths[row], run, row, side) for row in rows]
        targets = [low_resolution(run.cache.every_label(row), size) for row in rows]

    started, losses = time.monotonic() - seconds, []
    for step in progress(range(done + 1, STEPS + 1), f"training {METHOD}", STEPS, done):
        batch = torch.randperm(len(rows), generator=generator)[:BATCH_SIZE].tolist()
        views = torch.randint(8, (len(batch),), generator=generator).tolist()
        shown = [(pictures[one], targets[one], view if AUGMENT else 0)
                 for one, view in zip(batch, views)]
        own, gradients = zip(*side_by_side(partial(gradients_of, model), shown, run.device))
        total = sum(own) / len(batch)
        for weight, parts in zip(model.trained().values(), zip(*gradients)):
            weight.grad = sum(parts) / len(batch)
        names = ", ".join(run.cache.name((rows[one], 0)) for one in batch)
        script.require_finite({"the loss": total}, f"in step {step} on the samples {names}")
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()

        losses.append(total)
        if step % LOG_EVERY == 0 or step == STEPS:
            log.append({"step": step, "loss": np.mean(losses).item(),
                        "learning_rate": learning_rate(step)})
            losses.clear()
        if step % SAVE_EVERY == 0 or step == STEPS:
            seconds = time.monotonic() - started
            checkpoint.save_training(
                path, made_with, log, finished=step == STEPS, step=step, seconds=seconds,
                weights=model, optimizer=optimizer, generator=generator)
    checkpoint.write_log(log_path, log)
    count = sum(weight.numel() for weight in model.trained().values())
    print(f"{METHOD}: {count} trained parameters, {len(rows)} training images, {seconds:.0f} "
          "seconds of training")
    return checkpoint.fingerprint(model.state_dict())


def gradients_of(model: FineTuned, shown: tuple[np.ndarray, np.ndarray, int]) -> tuple:
    """The loss of one picture, and its gradient by each trained weight.

    shown: the picture uint8 (s, s, 3), its label map at the size of the logits, and which of the
    eight views of both is taken.
    """
    picture, label_map, view = shown
    target = torch.from_numpy(turned(label_map, view)).to(model.sam.device)
    with torch.enable_grad():
        own = loss(model.logits(turned(picture, view)), target)
        return own.item(), torch.autograd.grad(own, list(model.trained().values()))


def write_masks(model: FineTuned, run: Run, paths: dict[int, Path], names: dict[int, list[str]],
                training: dict, weights: str, out: Path) -> None:
    """Writes a mask of each test sample into the folder `out`, white on black, as a PNG.

    names: {row of a test image: the names of its texts' masks, without suffix}. Only texts that the
    image holds have a mask: no other is scored. training: its settings, which stage 4 puts into its
    results. weights: the fingerprint of what is trained. Masks that the same weights have written
    are not made again.
    """
    listed = out / LISTED
    made_with = {"task": TASK, "sam": run.attributes["sam"], "weights": weights,
                 "training": training}
    done = count_of(listed, made_with)
    rows, samples = list(names), set(map(tuple, run.cache.samples("test").tolist()))
    for number, row in enumerate(progress(rows, f"masks of {METHOD}", len(rows)), 1):
        wanted = {text: out / f"{name}.png" for text, name in enumerate(names[row])
                  if (row, text) in samples}
        if number <= done and all(path.exists() for path in wanted.values()):
            continue
        side = model.sam.image_encoder.img_size
        labels = model.segment(read_picture(paths[row], run, row, side), run.cache.size(row))
        for text, path in wanted.items():
            save_picture(Image.fromarray((labels == text + 1).astype(np.uint8) * 255), path)
        files.write_text(listed, json.dumps(made_with | {"images": max(number, done)}))


def count_of(listed: Path, made_with: dict) -> int:
    """How many images' masks a stopped call has written; 0 if it had other weights."""
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        return int(content.pop("images")) if content.items() >= made_with.items() else 0
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0


def this_command() -> str:
    return "-m " + script.command("common.rivals.peft", globals(),
                                  ("METHOD", "DATA_DIR", "SHOTS", "SEED", "SAM"))


def check_constants() -> None:
    if METHOD not in METHODS:
        raise UserError(f"METHOD={METHOD} is unknown: set {' or '.join(METHODS)}")
    settings.positive(globals(), "STEPS", "BATCH_SIZE", "LEARNING_RATE", "SAVE_EVERY", "LOG_EVERY",
                      "WARM_UP")
    settings.not_negative(globals(), "SEED", "SHOTS", "WEIGHT_DECAY")
    if WARM_UP > STEPS:
        raise UserError(f"WARM_UP={WARM_UP} is more than STEPS={STEPS}: set it lower")


def main() -> None:
    check_constants()
    run = open_run(globals())
    shots = run.cache.drawn(SHOTS)[:, 0].tolist()
    shots = list(dict.fromkeys(shots))  # once, though drawn for two classes
    test = list(dict.fromkeys(run.cache.samples("test")[:, 0].tolist()))
    paths = find_pictures(run, [*shots, *test])
    out, texts = run.folder / f"{METHOD.lower()}_masks", run.cache.texts
    images = {row: Path(run.cache.name((row, 0)) + ".png") for row in test}
    stems = name_files(list(images.values()), list(texts) if len(texts) > 1 else [])
    names = {row: stems[image] for row, image in images.items()}
    files.require_ours(run.folder / f"{METHOD.lower()}_log.csv", out / LISTED,
                       *(out / f"{stem}.png" for row in test for stem in names[row]))
    files.lock(run.folder)

    script.seed_everything(SEED)
    sam = load_cached_sam(run.attributes, run.device)
    # a CPU's gradients take longer in bf16 than in fp32
    precision = "fp32" if PRECISION == "auto" and run.device.type == "cpu" else PRECISION
    model = FineTuned(sam, METHOD, len(texts), precision)
    made_with = {
        "task": TASK, "method": METHOD, "seed": SEED, "shots": SHOTS, "steps": STEPS,
        "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE[METHOD],
        "weight_decay": WEIGHT_DECAY, "warm_up": WARM_UP, "augment": AUGMENT,
        "precision": "bf16" if model.embedder.bf16 else "fp32",
        "features": run.cache.identity()}
    weights = train(model, run, paths, shots, made_with)
    lora.merge(sam)
    write_masks(model, run, paths, names, made_with, weights, out)
    scored = {"ROWS": "none", "MASKS": f"{METHOD}:{out}", "RESULTS": f"{METHOD.lower()}.json"}
    script.goodbye([run.folder / f"{METHOD.lower()}.pt", out], script.command(
        "04_evaluate.py", globals() | scored, ("SAM", *scored)))


if __name__ == "__main__":
    script.run(main, globals())
