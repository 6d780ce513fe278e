"""Stage 2: trains the semantic recalibration module (SRM) from the cache, with live prompting.

    python 02_train_srm.py [NAME=value ...]       NAME is any constant below; `help` lists them

The SRM must answer in every state that prompting meets: before any mask, after its own start at
test time, and after any number of points. Each step takes a batch of samples into one such state
with SAM's live decoder and learns there.
"""

import common.runtime.first  # noqa: F401  before torch

from functools import partial

import numpy as np
import torch
from torch import nn

from common.episode import Episode, random_pixels
from common.label_maps import IGNORE
from common.metrics import centre_accuracy
from common.results.pictures import plot_curves
from common.runtime import checkpoint, files, script, settings
from common.runtime.errors import UserError
from common.runtime.progress import progress
from common.runtime.run import Run, open_run
from common.srm import CHANNEL_DROP, HEADS, JOIN_KERNEL, build_srm, sample_at, train_step

# what is trained
TASK = "demo_saliency"  # as in stage 1
BRANCH = ""  # implicit or explicit (Table 4); empty = the task's own
SEED = 0  # of weights, states and batches

# how. The paper trains the SRM only inside Algorithm 1. This stage trains it before, so that the
# agent starts with useful labels.
SHOTS = 0  # train on the first SHOTS of the samples that stage 1 drew (Table 10); 0 = all
STEPS = 600  # optimiser steps
SRM_BATCH = 8  # samples a step
LEARNING_RATE = 1e-3  # Adam; stage 3 goes on at the paper's 1e-4
ROUNDS = 15  # T: states have up to this many points after the start points
STATES = {"no mask": 0.2, "test-time start": 0.3, "true start": 0.5}  # share of the steps in each
HELD_OUT = 100  # test samples, spread over the test set, on which accuracy is reported at the end

# beyond the paper: RESIDUAL=0.5 EVERY_TEXT=true make AlignSAM+; srm.pt tells stages 3 and 4
RESIDUAL = 0.0  # r in the state F * (r + (1 - r) M); 0 = the paper's F * M
EVERY_TEXT = False  # VOC: learn from every class labelled in a drawn image, not the drawn one alone

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
SAM = ""  # the cache's SAM, where its file lies elsewhere now; empty = where stage 1 found it
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is
SAVE_EVERY = 100  # steps that a kill may cost
LOG_EVERY = 10  # steps between rows of the log, each of one batch


def draw_kind(generator: torch.Generator) -> str:
    """A kind of state, drawn by the shares of STATES."""
    at, reached = float(torch.rand(1, generator=generator)), 0.0
    for kind, share in STATES.items():
        reached += share
        if at < reached:
            return kind
    return kind  # shares that sum to a little less than 1


def reach_state(kind: str, episode: Episode, srm: nn.Module, label_maps: list[np.ndarray],
                generator: torch.Generator) -> None:
    """Takes an episode into a state: no mask yet, or random patches prompted after a start.

    label_maps: ground truth of the episode's images, for the true start only.
    """
    if kind == "no mask":
        return  # M = 1: what the SRM sees when it has to find P_0
    if kind == "test-time start":
        episode.start_without_truth(srm)
    else:  # Algorithm 1's, in training
        episode.start_from_truth(random_pixels(label_maps, generator, episode.frame))
    count = int(torch.randint(0, ROUNDS + 1, (1,), generator=generator))
    if count:  # random patches, labelled by the SRM as the agent's are, though all at once
        order = torch.rand(episode.allowed.shape, generator=generator).to(episode.allowed.device)
        actions = (order * episode.allowed).topk(count).indices
        points = episode.centres[actions]
        foreground = sample_at(episode.foreground(srm), points, episode.frame) > 0.5
        episode.prompt(points, foreground.long())


def print_held_out_accuracy(run: Run, new_episode: partial, srm: nn.Module) -> None:
    """Accuracy at the patch centres of some test samples, in two kinds of state."""
    samples = run.cache.samples("test")
    spread = np.linspace(0, len(samples) - 1, min(HELD_OUT, len(samples)))
    samples = samples[spread.astype(int)]
    truth = run.cache.truth_centres(samples)
    for kind, name in (("no mask", "before any mask"),
                       ("test-time start", "test-time start and random points")):
        generator, labels = torch.Generator().manual_seed(0), []
        for some in np.array_split(samples, -(-len(samples) // 32)):  # all would fill a GPU
            episode = new_episode(run.cache.embeddings(some).to(run.device).float(),
                                  run.cache.maps(some).to(run.device))
            reach_state(kind, episode, srm, [], generator)
            labels.append(episode.labels_at_centres(srm).cpu())
        shares = zip(("foreground", "background"), centre_accuracy(torch.cat(labels), truth))
        told = [f"{side} " + (f"{share:.3f}" if share == share else "none there")  # not NaN
                for side, share in shares]
        print(f"held-out patch centres labelled right, {name}: {', '.join(told)} "
              f"({len(samples)} test samples)")


def check_constants() -> None:
    settings.positive(globals(), "STEPS", "SRM_BATCH", "LEARNING_RATE", "ROUNDS", "HELD_OUT",
                      "SAVE_EVERY", "LOG_EVERY")
    settings.not_negative(globals(), "SEED", "SHOTS")
    if {*STATES} != {"no mask", "test-time start", "true start"}:
        raise UserError(f"STATES={STATES} names another kind of state: keep the names of the three")
    if min(STATES.values()) < 0 or abs(sum(STATES.values()) - 1) > 1e-6:
        raise UserError(f"STATES={STATES} are no shares: set them to 0 or more, and to 1 in all")
    if not 0 <= RESIDUAL <= 1:
        raise UserError(f"RESIDUAL={RESIDUAL} is no share: set it between 0 and 1")


def main() -> None:
    check_constants()
    run = open_run(globals())
    new_episode = partial(Episode, run.load_prompter(), centres=run.centres, residual=RESIDUAL)
    shots = run.cache.training_set(SHOTS, ROUNDS, run.device)
    files.lock(run.folder)
    log_path, curves = run.folder / "srm_log.csv", run.folder / "srm_curves.png"
    files.require_ours(log_path, curves)

    # the SRM, fresh or from where a killed run stopped
    branch = BRANCH or run.cache.attrs["branch"]
    generator = torch.Generator().manual_seed(SEED)
    script.seed_everything(SEED)
    srm = build_srm(branch, shots.embeddings.shape[1]).to(run.device)
    optimizer = torch.optim.Adam(srm.parameters(), LEARNING_RATE)
    made_with = {
        "task": TASK, "branch": branch, "seed": SEED, "shots": SHOTS, "steps": STEPS,
        "srm_batch": SRM_BATCH, "learning_rate": LEARNING_RATE, "rounds": ROUNDS, "states": STATES,
        "channel_drop": CHANNEL_DROP, "heads": HEADS, "join_kernel": JOIN_KERNEL,
        "every_text": bool(EVERY_TEXT), "residual": float(RESIDUAL),
        "features": run.cache.identity()}
    path, this_stage = run.folder / "srm.pt", script.command("02_train_srm.py", globals())
    saved = checkpoint.resume(path, this_stage, made_with, {"step": int}, srm=srm,
                              optimizer=optimizer, generator=generator)
    log, done = (saved["log"], saved["step"]) if saved else ([], 0)

    steps = range(done + 1, STEPS + 1)
    for step in progress(steps, "training the SRM", STEPS, done):
        # a batch of samples, prompted into some state; ignored patches are never prompted
        rows = torch.randperm(len(shots.samples), generator=generator)[:SRM_BATCH]
        episode = new_episode(shots.embeddings[rows], shots.maps[rows],
                              allowed=shots.truth_centres[rows] != IGNORE)
        label_maps = [shots.label_maps[row] for row in rows]
        reach_state(draw_kind(generator), episode, srm, label_maps, generator)

        # Eqs. 11 to 13: y_r from s_c and s_t, Dice + BCE against y on the grid
        maps, y = shots.maps_and_truth(rows, EVERY_TEXT, generator)
        s_c, s_t = episode.semantic_state(maps=maps), episode.state()
        loss, _ = train_step(srm, optimizer, s_c, s_t, y, generator)
        names = ", ".join(run.cache.name(shots.samples[row]) for row in rows)
        where = f"in step {step} on the samples {names}"
        script.require_finite({"the SRM's loss": loss}, where)

        if step % LOG_EVERY == 0 or step == STEPS:
            labels = episode.labels_at_centres(srm)
            foreground, background = centre_accuracy(labels, shots.truth_centres[rows])
            log.append({"step": step, "loss": loss, "foreground_accuracy": foreground,
                        "background_accuracy": background})
        if step % SAVE_EVERY == 0 or step == STEPS:
            checkpoint.save_training(path, made_with, log, finished=step == STEPS, step=step,
                                     srm=srm, optimizer=optimizer, generator=generator)

    checkpoint.write_log(log_path, log)
    plot_curves(log, curves, f"{TASK}, stage 2: SRM ({branch} branch)")
    print_held_out_accuracy(run, new_episode, srm)
    stage_3 = script.command("03_train_agent.py", globals(), ("SHOTS", "SEED", "SAM"))
    script.goodbye([path, log_path, curves], stage_3)


if __name__ == "__main__":
    script.run(main, globals())
