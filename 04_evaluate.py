"""Stage 4: masks and scores of AlignSAM and of what it is compared with; masks of your images.

    python 04_evaluate.py [NAME=value ...]           NAME is any constant below; `help` lists them
    python 04_evaluate.py IMAGES=some_folder         masks for images of your own, without a truth
    python 04_evaluate.py MASKS=U-Net:some_folder    another system's masks of the test set as a row
    torchrun --nproc_per_node=4 04_evaluate.py ...   four processes share the test set

There is no ground truth at the start: P_0 is a foreground point where the SRM's probability is
highest and a background point where it is lowest. The four default rows share the agent, the SRM
and P_0, so each changes one thing. A stopped call goes on after the last finished row.
"""

import common.runtime.first  # noqa: F401  before torch

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common.agent import Actor, gumbel_noise, policy
from common.baselines import Baselines, label_points, oracle_clicks
from common.cache import Cache, Truth
from common.episode import Episode
from common.frozen.sam import full_masks
from common.metrics import Score
from common.results import given_masks, own_images
from common.results.outputs import Drawing, Report, check_results_name
from common.runtime import distributed, files, script, settings
from common.runtime.batches import in_batches
from common.runtime.progress import Bar
from common.runtime.run import Trained, open_run

# what is evaluated
TASK = "demo_saliency"  # as in stages 1 to 3
ROWS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")  # others are in _ROWS; all; none with MASKS
MASKS = ""  # row:folder,row:folder of other systems' masks, so that they are scored as ours are
ROUNDS = 15  # T
SAMPLE_ACTIONS = False  # draw the patch from the policy; false takes the most probable one
SEED = 0  # of the random patches (w/o RL), and of SAMPLE_ACTIONS

# images of your own
IMAGES = ""  # a folder of images without ground truth, to segment instead of the cached test set
CLASSES = ("all",)  # with IMAGES: which of the run's texts to look for; all = those trained on

# how
BATCH_SIZE = 32  # test samples prompted side by side; halves itself where memory runs out
PICTURES = 8  # test samples drawn as strips, spread over the test set
GALLERY = 200  # test samples in report.html, spread over the test set; 0 = no report
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
SAM = ""  # the cache's SAM, where its file lies elsewhere now; empty = where stage 1 found it
CLIP = ""  # with IMAGES, the same of CLIP
RESULTS = "results.json"  # in the run folder; T20.json names its pictures T20-strips.png and so on

_ROWS = {  # where the next point goes, what labels it, how many rounds
    "AlignSAM": ("agent", "SRM", "all"),
    "w/o RL": ("random", "SRM", "all"),
    "w/o SRM": ("agent", "positive", "all"),
    "w/o MSI": ("agent", "SRM", "one"),
    "labels: CLIP Surgery": ("agent", "map", "all"),  # Table 8, with the next row and w/o SRM
    "labels: last mask": ("agent", "mask", "all"),
    "oracle labels": ("agent", "truth", "all"),  # the ceiling for the label,
    "oracle clicks": ("error", "truth", "all"),  # and for place and label; no P_0
    "PerSAM": ("", "", "none"),  # from here on there are no rounds
    "SRM alone": ("", "", "none"),
    "CLIP Surgery alone": ("", "", "none"),
    "CLIP Surgery points": ("", "", "none"),
}


@torch.no_grad()
def prompt(row: str, episode: Episode, actor: Actor, srm: nn.Module, numbers: Sequence[int],
           truth: Truth | None = None) -> tuple[list[Tensor], Tensor]:
    """One row's prompting of a batch.

    numbers: (B,) the samples' places in the test set, from which random patches follow.
    truth: of the batch, for the rows with an oracle.
    Returns SAM's logits (B, 4h, 4w) after each round, M_0 first, and the actions (B, T).
    """
    place, label_source, rounds = _ROWS[row]
    if place == "error":
        logits = oracle_clicks(episode, truth.label_maps, ROUNDS)
        return logits, torch.empty(len(numbers), 0, dtype=torch.long)
    rounds = {"all": ROUNDS, "one": 1}[rounds]
    noises = [gumbel_noise(SEED, number, rounds, len(episode.centres)) for number in numbers]
    episode.start_without_truth(srm)  # P_0, M_0
    logits, actions = [episode.logits], []
    for noise in torch.stack(noises, 1).to(episode.centres.device):
        preference = actor(episode.action_state()) if place == "agent" else torch.zeros_like(noise)
        if place == "random" or SAMPLE_ACTIONS:  # the highest of logits + Gumbel noise is a draw
            preference = preference + noise
        action = policy(preference, episode.allowed).logits.argmax(1)  # a_t
        label = label_points(label_source, episode, srm, action, truth)
        episode.step(action, label)  # P_t, M_t
        logits.append(episode.logits)
        actions.append(action)
    return logits, torch.stack(actions, 1).cpu()


def segment(row: str, numbers: list[int], test_set: np.ndarray, cache: Cache, trained: Trained,
            baselines: Baselines) -> tuple[Truth, list[Tensor], Tensor, Episode]:
    """Segments a batch for one row: its truth, logits and actions as of `prompt`, and the episode.

    numbers: (B,) places in test_set (S, 2), whose samples are (image row, text index).
    The rows without rounds have no actions; those "alone" have logits (B, h, w).
    """
    samples = test_set[numbers]
    truth = cache.truth(samples)
    episode = trained.new_episode(cache.embeddings(samples), cache.maps(samples))
    if _ROWS[row][2] != "none":
        return truth, *prompt(row, episode, trained.actor, trained.srm, numbers, truth), episode
    logits = baselines.segment(row, episode, samples, trained.srm, ROUNDS // 2 + 1)
    return truth, [logits], torch.empty(len(samples), 0, dtype=torch.long), episode


def evaluate(row: str, segment_batch: Callable, numbers: Sequence[int],
             drawing: Drawing) -> list[Score]:
    """One row's scores and pictures; segment_batch: `segment` of a row and numbers."""
    scores = []
    batches = in_batches(numbers, BATCH_SIZE, partial(segment_batch, row), mend="set DEVICE=cpu")
    with Bar(row, len(numbers)) as bar:
        for batch, (truth, logits, actions, episode) in batches:
            hits = (truth.at_centres.gather(1, actions) == 1).sum(1).tolist()
            points, labels = episode.points.cpu().numpy(), episode.labels.cpu().numpy()
            for index, label_map in enumerate(truth.label_maps):
                masks = torch.stack([full_masks(after[index], label_map.shape) for after in logits])
                masks = masks.cpu().numpy()  # (1 + T, H, W): the device is waited for once
                score = Score.of(batch[index], masks, label_map, actions.shape[1], hits[index])
                pictures = drawing.draw(row, score, masks, label_map, points[index], labels[index])
                scores.append(score._replace(pictures=pictures))
            bar.reach(len(scores))
            del logits, episode  # or they stay while the next batch is computed
    return scores


def main() -> None:
    settings.positive(globals(), "ROUNDS", "BATCH_SIZE")
    settings.not_negative(globals(), "SEED", "PICTURES", "GALLERY")
    rows = [] if MASKS and ROWS == ("none",) else settings.choose("ROWS", ROWS, _ROWS)
    check_results_name(RESULTS)
    own_images.check(IMAGES, CLASSES, MASKS)
    run = open_run(globals())
    trained = run.load_agent(globals())  # and the SRM that stage 3 ended with
    files.lock(run.folder)
    made_with = trained.made_with | {
        "evaluation_rounds": ROUNDS, "evaluation_seed": SEED, "sample_actions": SAMPLE_ACTIONS}
    if IMAGES:
        def align(embeddings: Tensor, maps: Tensor) -> Episode:
            episode = trained.new_episode(embeddings, maps)
            prompt("AlignSAM", episode, trained.actor, trained.srm, range(len(maps)))
            return episode

        return own_images.segment(IMAGES, run, CLASSES, align, trained.srm, made_with)

    # the test samples, and what rows without rounds learn from the training samples
    test_set, shots = run.cache.samples("test"), trained.made_with["shots"]
    masks, records = given_masks.open_all(MASKS, _ROWS, run.cache, test_set)
    baselines = Baselines.prepare(rows, run.cache, shots, trained.prompter, run.device)
    segment_batch = partial(segment, test_set=test_set, cache=run.cache, trained=trained,
                            baselines=baselines)
    drawing = Drawing(run.cache, test_set, PICTURES, GALLERY)
    made_with |= {"batch_size": BATCH_SIZE, "pictures": PICTURES, "gallery": GALLERY}
    report = Report(run.folder, RESULTS, run.cache, trained.content, [*rows, *masks], drawing,
                    made_with, records)

    # the rows that a stopped call has not finished; whole batches are dealt to all processes
    mine = distributed.share_batches(range(len(test_set)), BATCH_SIZE)
    for row in report.take_over_finished_rows(script.command("04_evaluate.py", globals())):
        score = masks[row].score if row in masks else partial(evaluate, row, segment_batch)
        report.add(row, distributed.gather(score(mine, drawing)))
    report.write(baselines.threshold)


if __name__ == "__main__":
    script.run(main, globals(), shared=True)
