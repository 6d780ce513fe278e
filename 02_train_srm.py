"""Stage 2: the semantic recalibration module, trained from the cache on mask states reached by live prompting.

    python 02_train_srm.py [NAME=value ...]             NAME is any constant below; `help` lists them

The SRM must answer in every state that prompting meets: before any mask, after its own test-time start, and after any
number of points. Each step takes a batch of samples into one such state with SAM's live decoder and learns there.
"""

import numpy as np
import torch
from tqdm import tqdm

from common.cache import Cache
from common.episode import Episode, patch_centres, random_pixels
from common.frozen.sam import BatchedPrompter, load_decoder
from common.results.pictures import plot_curves
from common.runtime import checkpoint, files, script, settings
from common.runtime.errors import UserError
from common.srm import CHANNEL_DROP, JOIN_KERNEL, build_srm, sample_at, train_step

# what is trained
TASK = "demo_saliency"  # as in stage 1
BRANCH = ""  # implicit or explicit (Table 4); empty = the task's own
SEED = 0  # of weights, states and batches

# how (the paper trains the SRM inside Algorithm 1 only; this stage gives the agent a sensible one from the start)
SHOTS = 0  # of the samples that stage 1 drew, the first so many (Table 10); 0 = all
STEPS = 600  # optimiser steps
SRM_BATCH = 8  # samples a step
LEARNING_RATE = 1e-3  # Adam; stage 3 goes on at the paper's 1e-4
ROUNDS = 15  # states have up to this many points beyond the start (T)
STATES = {"no mask": 0.2, "test-time start": 0.3, "true start": 0.5}  # share of the steps in each kind of state
HELD_OUT = 100  # test samples, spread over the test set, on which accuracy is reported at the end

# beyond the paper: RESIDUAL=0.5 EVERY_TEXT=true make AlignSAM+; stages 3 and 4 read both from srm.pt
RESIDUAL = 0.0  # share r of F that a state keeps where the mask is empty, F * (r + (1 - r) M); 0 = the paper's F * M
EVERY_TEXT = False  # VOC: learn from every class labelled in a drawn image, not from the drawn one alone

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is
SAVE_EVERY = 100  # steps that a kill may cost
LOG_EVERY = 10  # steps between rows of the log, each of one batch


def draw_kind(generator: torch.Generator) -> str:
    """A kind of state, drawn by the shares of STATES."""
    at, reached = float(torch.rand(1, generator=generator)), 0.0
    for kind, share in STATES.items():
        reached += share
        if at < reached:
            break
    return kind


def reach_state(kind: str, episode: Episode, srm: torch.nn.Module, labels: list, generator: torch.Generator) -> None:
    """Takes an episode into a state of prompting: no mask yet, or random candidate points after one of both starts.

    labels: ground truth of the episode's images, for the true start only.
    """
    if kind == "no mask":
        return  # M = 1: what the SRM sees when it has to find P_0
    if kind == "test-time start":
        episode.start_without_truth(srm)
    else:  # Algorithm 1's, in training
        episode.prompt(random_pixels(labels, generator, episode.frame), torch.tensor([[1, 0]]).expand(len(labels), 2))
    count = int(torch.randint(0, ROUNDS + 1, (1,), generator=generator))
    if count:  # candidate points, labelled by the SRM as the agent's are, though all at once
        order = torch.rand(episode.allowed.shape, generator=generator).to(episode.allowed.device)
        chosen = (order * episode.allowed).topk(count).indices
        points = episode.centres[chosen]
        answers = sample_at(episode.foreground(srm), points, episode.frame) > 0.5
        episode.prompt(points, answers.long())


def accuracy(srm: torch.nn.Module, episode: Episode, truth: torch.Tensor) -> tuple[float, float]:
    """Share of candidate points labelled right, over foreground and over background points of truth (B, A)."""
    centres = episode.centres.expand(len(truth), -1, -1)
    right = (sample_at(episode.foreground(srm), centres, episode.frame) > 0.5) == (truth == 1)
    return right[truth == 1].float().mean().item(), right[truth == 0].float().mean().item()


def main() -> None:
    settings.positive(globals(), "STEPS", "SRM_BATCH", "LEARNING_RATE", "ROUNDS", "HELD_OUT", "SAVE_EVERY", "LOG_EVERY")
    settings.not_negative(globals(), "SEED", "SHOTS")
    if min(STATES.values()) < 0 or abs(sum(STATES.values()) - 1) > 1e-6:
        raise UserError(f"STATES={STATES} are no shares: set them to 0 or more, and to 1 in all")
    if not 0 <= RESIDUAL <= 1:
        raise UserError(f"RESIDUAL={RESIDUAL} is no share: set it between 0 and 1")
    device = script.device(DEVICE)
    run_dir = script.run_dir(RUN_DIR, TASK)
    features = Cache.open(script.cache_path(FEATURES, run_dir), TASK,
                          script.command("01_cache_features.py", globals()))
    frame, patch = features.attrs["image_size"], features.attrs["patch_size"]
    centres = patch_centres(frame, patch).to(device)
    prompter = BatchedPrompter(load_decoder(features.attrs, device), frame)
    shots = features.training_set(SHOTS, ROUNDS, device)

    files.lock(run_dir)

    # the SRM, fresh or from where a killed run stopped
    branch = BRANCH or features.attrs["branch"]
    generator = torch.Generator().manual_seed(SEED)
    script.seed_everything(SEED)
    srm = build_srm(branch, shots.embeddings.shape[1]).to(device)
    optimizer = torch.optim.Adam(srm.parameters(), LEARNING_RATE)
    path, log, step = run_dir / "srm.pt", [], 0
    chosen = {"task": TASK, "branch": branch, "seed": SEED, "shots": SHOTS, "steps": STEPS, "srm_batch": SRM_BATCH,
              "learning_rate": LEARNING_RATE, "rounds": ROUNDS, "states": STATES, "channel_drop": CHANNEL_DROP,
              "join_kernel": JOIN_KERNEL, "every_text": bool(EVERY_TEXT), "residual": float(RESIDUAL),
              "features": features.identity()}
    if path.exists():
        saved = checkpoint.load(path, script.command("02_train_srm.py", globals()), step=int,
                                **checkpoint.TRAINING)
        settings.require_same(path, saved["settings"], chosen)
        checkpoint.restore(path, saved, srm=srm, optimizer=optimizer, generator=generator)
        log, step = saved["log"], saved["step"]

    for step in tqdm(range(step + 1, STEPS + 1), "training the SRM", initial=step, total=STEPS):
        # a batch of samples, prompted into some state
        rows = torch.randperm(len(shots.samples), generator=generator)[:SRM_BATCH]
        episode = Episode(prompter, shots.embeddings[rows], shots.maps[rows], centres, shots.truth_centres[rows] != 255,
                          RESIDUAL)
        reach_state(draw_kind(generator), episode, srm, [shots.labels[row] for row in rows], generator)

        # Eqs. 11 to 13: y_r from s_c and s_t, Dice + BCE against y on the grid
        maps, truth = shots.targets(rows, EVERY_TEXT, generator)
        s_c = episode.semantic_state(maps=maps)
        loss, _ = train_step(srm, optimizer, s_c, episode.state(), truth, generator)
        script.require_finite({"the SRM's loss": loss}, f"in step {step} on " + ", ".join(
            features.name(shots.samples[row]) for row in rows))

        if step % LOG_EVERY == 0:
            foreground, background = accuracy(srm, episode, shots.truth_centres[rows])
            log.append({"step": step, "loss": loss, "foreground_accuracy": foreground,
                        "background_accuracy": background})
        if step % SAVE_EVERY == 0 or step == STEPS:
            checkpoint.save(path, {
                "settings": chosen, "srm": srm.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "generator": generator.get_state(), "log": log, "finished": step == STEPS})
    checkpoint.write_log(run_dir / "srm_log.csv", log)
    plot_curves(log, run_dir / "srm_curves.png", f"{TASK}, stage 2: SRM ({branch} branch)")

    # held-out accuracy at the candidate points, in two kinds of state
    held_out = features.samples("test")
    held_out = held_out[np.linspace(0, len(held_out) - 1, min(HELD_OUT, len(held_out))).astype(int)]
    embeddings, maps = features.embeddings(held_out).float().to(device), features.maps(held_out).to(device)
    truth_centres = features.truth_centres(held_out).to(device)
    for kind, name in (("no mask", "before any mask"), ("test-time start", "test-time start and random points")):
        episode = Episode(prompter, embeddings, maps, centres, residual=RESIDUAL)
        reach_state(kind, episode, srm, [], torch.Generator().manual_seed(0))
        foreground, background = accuracy(srm, episode, truth_centres)
        print(f"held-out candidate points labelled right, {name}: foreground {foreground:.3f}, "
              f"background {background:.3f} ({len(held_out)} test samples)")

    script.goodbye([path, run_dir / "srm_log.csv", run_dir / "srm_curves.png"],
                     script.command("03_train_agent.py", globals(), ("SHOTS", "SEED")))


if __name__ == "__main__":
    script.run(main, globals())
