"""Stage 4: evaluates prompting on the test set, from the cache: AlignSAM, its ablations, other ways.

    python 04_evaluate.py [NAME=value ...]           NAME is any constant below; `help` lists them
    python 04_evaluate.py IMAGES=some_folder         masks for images of your own, without a truth
    torchrun --nproc_per_node=4 04_evaluate.py ...   four processes share the test set

There is no ground truth at the start: P_0 is a foreground point where the SRM's probability is
highest and a background point where it is lowest. All rows come from the same agent and the same
SRM, so each changes one thing. A stopped call goes on after the last finished row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.agent import Actor, gumbel_noise, policy
from common.baselines import Baselines, oracle_clicks
from common.cache import Cache
from common.episode import Episode
from common.frozen.sam import full_masks
from common.metrics import Score, summarise
from common.results import own_images
from common.results.outputs import Drawing, Report, check_results_name
from common.runtime import checkpoint, distributed, files, script, settings
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.runtime.run import open_run
from common.srm import build_srm

# what is evaluated
TASK = "demo_saliency"  # as in stages 1 to 3
ROWS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")  # of _ROWS below; "all" = all there
ROUNDS = 15  # T
SAMPLE_ACTIONS = False  # draw the patch from the policy; false takes the most probable one
SEED = 0  # of the random patches (w/o RL), and of SAMPLE_ACTIONS

# images of your own
IMAGES = ""  # a folder of images without ground truth, embedded on the fly; empty = the cached test set
CLASSES = ("all",)  # which of the run's texts to look for in them

# how
BATCH_SIZE = 32  # test samples prompted side by side; halves itself where memory runs out
PICTURES = 8  # test samples drawn as strips, spread over the test set
GALLERY = 200  # test samples in report.html, spread over the test set; 0 = no report
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
RESULTS = "results.json"  # in the run folder; with T20.json the pictures are called T20-strips.png and so on

_ROWS = {  # where the next point goes, what labels it, how many rounds
    "AlignSAM": ("agent", "SRM", "all"),
    "w/o RL": ("random", "SRM", "all"),
    "w/o SRM": ("agent", "positive", "all"),
    "w/o MSI": ("agent", "SRM", "one"),
    "labels: CLIP Surgery": ("agent", "map", "all"),  # Table 8, with the next and w/o SRM
    "labels: last mask": ("agent", "mask", "all"),
    "oracle labels": ("agent", "truth", "all"),  # the ceiling for the label,
    "oracle clicks": ("error", "truth", "all"),  # and for place and label; no P_0
    "PerSAM": ("PerSAM", "", "none"),  # from here on there are no rounds
    "SRM alone": ("SRM", "", "none"),
    "CLIP Surgery alone": ("map", "", "none"),
    "CLIP Surgery points": ("map points", "", "none"),
}


class Truth(NamedTuple):
    """Ground truth of a batch, for the rows with an oracle."""

    label_maps: list[np.ndarray]  # B uint8 (H, W), 1 foreground, 0 background, 255 ignored
    at_centres: Tensor  # (B, A), the same at the patch centres


@dataclass
class Setup:
    """What all rows have in common."""

    cache: Cache
    new_episode: partial  # Episode(embeddings, maps) with SAM, patches and residual bound
    actor: Actor
    srm: nn.Module
    device: torch.device
    samples: np.ndarray  # (S, 2): image row, text index
    truth_centres: Tensor  # (S, A)
    baselines: Baselines


def label(labeller: str, episode: Episode, srm: nn.Module, action: Tensor,
          truth: Truth | None) -> Tensor:
    """(B,) labels of the chosen patches (B,), 1 foreground."""
    if labeller == "positive":
        return torch.ones_like(action)
    if labeller == "truth":
        return (truth.at_centres.to(action.device).gather(1, action[:, None])[:, 0] == 1).long()
    source = {"SRM": lambda: episode.foreground(srm), "map": lambda: episode.maps,
              "mask": lambda: episode.mask}[labeller]()
    return episode.label_by(source, action)


@torch.no_grad()
def prompt(row: str, episode: Episode, actor: Actor, srm: nn.Module, numbers: Sequence[int],
           truth: Truth | None = None) -> tuple[list[Tensor], Tensor]:
    """One row's prompting of a batch.

    numbers: (B,) the samples' places in the test set, from which random patches follow.
    Returns SAM's logits (B, 4h, 4w) after each round, M_0 first, and the actions (B, T).
    """
    place, labeller, rounds = _ROWS[row]
    if place == "error":
        logits = oracle_clicks(episode, truth.label_maps, ROUNDS)
        return logits, torch.empty(len(numbers), 0, dtype=torch.long)
    rounds = {"all": ROUNDS, "one": 1}[rounds]
    noises = [gumbel_noise(SEED, number, rounds, len(episode.centres)) for number in numbers]
    episode.start_without_truth(srm)  # P_0, M_0
    logits, actions = [episode.logits], []
    for noise in torch.stack(noises, 1).to(episode.centres.device):
        preference = torch.zeros_like(noise)
        if place == "agent":
            preference = actor(episode.action_state())
        if place == "random" or SAMPLE_ACTIONS:  # the highest of logits + Gumbel noise is a draw
            preference = preference + noise
        action = policy(preference, episode.allowed).logits.argmax(1)  # a_t
        episode.step(action, label(labeller, episode, srm, action, truth))  # P_t, M_t
        logits.append(episode.logits)
        actions.append(action)
    return logits, torch.stack(actions, 1).cpu()


def segment(row: str, setup: Setup,
            numbers: list[int]) -> tuple[Truth, list[Tensor], Tensor, Episode]:
    """One row's answer to a batch: its truth, logits and actions as of `prompt`, and the episode.

    The rows without rounds have no actions; those "alone" have logits (B, h, w).
    """
    samples = setup.samples[numbers]
    label_maps = [setup.cache.label_map(sample) for sample in samples]
    truth = Truth(label_maps, setup.truth_centres[numbers])
    embeddings = setup.cache.embeddings(samples).float().to(setup.device)
    episode = setup.new_episode(embeddings, setup.cache.maps(samples).to(setup.device))
    if _ROWS[row][2] != "none":
        return truth, *prompt(row, episode, setup.actor, setup.srm, numbers, truth), episode
    logits = setup.baselines.segment(row, episode, samples, setup.srm, ROUNDS // 2 + 1)
    return truth, [logits], torch.empty(len(samples), 0, dtype=torch.long), episode


def evaluate(row: str, setup: Setup, numbers: Sequence[int], drawing: Drawing) -> list[Score]:
    """One row's scores and pictures of the test samples `numbers`, at the images' own sizes."""
    scores = []
    bar = tqdm(numbers, row, disable=distributed.RANK > 0)
    batches = in_batches(bar, BATCH_SIZE, partial(segment, row, setup), mend="set DEVICE=cpu")
    for batch, (truth, logits, actions, episode) in batches:
        hits = (truth.at_centres.gather(1, actions) == 1).sum(1).tolist()
        points, labels = episode.points.cpu().numpy(), episode.labels.cpu().numpy()
        for index, label_map in enumerate(truth.label_maps):
            masks = [full_masks(after[index], label_map.shape).cpu().numpy() for after in logits]
            score = Score.of(batch[index], masks, label_map, actions.shape[1], hits[index])
            pictures = drawing.draw(row, score, masks, label_map, points[index], labels[index])
            scores.append(score._replace(pictures=pictures))
    return scores


def chosen_rows() -> list[str]:
    """ROWS without repetition. Raises UserError where a constant makes no sense."""
    settings.positive(globals(), "ROUNDS", "BATCH_SIZE")
    settings.not_negative(globals(), "SEED", "PICTURES", "GALLERY")
    rows = list(_ROWS) if ROWS == ("all",) else list(dict.fromkeys(ROWS))
    if unknown := [row for row in rows if row not in _ROWS]:
        raise UserError(f"ROWS names {unknown[0]!r}: set it to all, or to some of: "
                        f"{', '.join(_ROWS)}")
    if IMAGES and distributed.SIZE > 1:
        raise UserError("IMAGES are segmented in one process: start it with python, not with "
                        "torchrun")
    check_results_name(RESULTS)
    return rows


def main() -> None:
    rows = chosen_rows()
    run = open_run(globals())
    if ROUNDS > len(run.centres):
        raise UserError(f"ROUNDS={ROUNDS} is more than the {len(run.centres)} patches there are: "
                        "set it lower")

    # the trained agent, and the SRM that stage 3 ended with
    path, stage_3 = run.folder / "agent.pt", script.command("03_train_agent.py", globals())
    wanted = {"task": TASK, "features": run.cache.identity()}
    trained = checkpoint.load_finished(path, stage_3, wanted)
    if (run.folder / "srm.pt").exists():  # trained again since, it is not what this agent grew from
        stage_2 = script.command("02_train_srm.py", globals())
        now = checkpoint.load(run.folder / "srm.pt", stage_2, srm=dict)["srm"]
        settings.require_same(path, trained["settings"], {"srm": checkpoint.fingerprint(now)})
    files.lock(run.folder)
    branch, residual = trained["settings"]["branch"], trained["settings"]["residual"]
    actor = Actor(run.cache.channels).to(run.device).eval()
    srm = build_srm(branch, run.cache.channels).to(run.device).eval()
    checkpoint.restore(path, trained, actor=actor, srm=srm)
    prompter = run.load_prompter()
    new_episode = partial(Episode, prompter, centres=run.centres, residual=residual)
    made_with = trained["settings"] | {
        "actor": checkpoint.fingerprint(trained["actor"]),
        "trained_srm": checkpoint.fingerprint(trained["srm"]),
        "evaluation_rounds": ROUNDS, "evaluation_seed": SEED, "sample_actions": SAMPLE_ACTIONS}
    if IMAGES:
        def align(embeddings: Tensor, maps: Tensor) -> Episode:
            episode = new_episode(embeddings.float().to(run.device), maps.to(run.device))
            prompt("AlignSAM", episode, actor, srm, range(len(maps)))
            return episode

        own_images.segment(IMAGES, run.folder / "masks", run.cache.attrs, run.cache.texts, CLASSES,
                           align, srm, run.device, made_with)
        return

    # what rows need: the test samples, and what those without rounds learn in training samples
    samples = run.cache.samples("test")
    shots = trained["settings"]["shots"]
    baselines = Baselines.prepare(rows, run.cache, shots, prompter, run.device)
    setup = Setup(run.cache, new_episode, actor, srm, run.device, samples,
                  run.cache.truth_centres(samples), baselines)
    drawing = Drawing(run.cache, samples, PICTURES, GALLERY)
    report = Report(run.folder, RESULTS, run.cache, trained, rows, setup.truth_centres, drawing,
                    made_with | {"batch_size": BATCH_SIZE, "pictures": PICTURES, "gallery": GALLERY})

    # the rows that a stopped call has not finished; whole batches are dealt to torchrun's processes
    report.take_over_finished_rows(script.command("04_evaluate.py", globals()))
    starts = distributed.share(range(0, len(samples), BATCH_SIZE))
    mine = [number for start in starts for number in range(len(samples))[start:start + BATCH_SIZE]]
    for row in rows:
        if row not in report.finished:
            scores = distributed.gather(evaluate(row, setup, mine, drawing))  # on rank 0
            if scores:
                report.add(row, summarise(scores, drawing.classes, ROUNDS))
    if distributed.RANK == 0:
        report.write(baselines.threshold)


if __name__ == "__main__":
    script.run(main, globals(), shared=True)
