"""Stage 4: the full prompting evaluation on the test set, from the same cache: AlignSAM, its ablations, other ways.

    python 04_evaluate.py [NAME=value ...]              NAME is any constant below; `help` lists them
    python 04_evaluate.py IMAGES=some_folder            masks for images of your own, without ground truth
    torchrun --nproc_per_node=4 04_evaluate.py …        four processes share the test set, to the same figures

There is no ground truth at the start: P_0 is the SRM's highest and lowest place. All rows come from the same agent and
the same SRM, so each changes one thing. A finished row is kept: killed and started again, the rows before it are not
computed again.
"""

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.agent import Actor, policy
from common.baselines import best_threshold, next_clicks, prompt_with_map, srm_alone
from common.cache import Cache
from common.episode import Episode, patch_centres
from common.frozen.sam import BatchedPrompter, full_masks, load_decoder
from common.metrics import average, average_iou, evaluate_mask, overlap
from common.persam import PerSAM
from common.results import own_images
from common.results.paper import paper_row, results_table, stand_ins
from common.results.pictures import save_strips, strip
from common.results.report import gallery_item, write_report
from common.runtime import checkpoint, distributed, files, script, settings
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.srm import build_srm
from common.tasks import get_task

# what is evaluated
TASK = "demo_saliency"  # as in stages 1 to 3
ROWS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")  # of _ROWS below; "all" = every one there
ROUNDS = 15  # T
SAMPLE_ACTIONS = False  # draw the patch from the policy; false takes the most probable one, which is reproducible
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
_STRIP_ROUNDS = (0, 1, 2, 5, 10, 15)  # after which the strips show the mask


def gumbel_noise(sample: int, rounds: int, actions: int) -> torch.Tensor:
    """(T, A) of the sample's own generator, so that a draw does not depend on what else is in the batch."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + sample)
    return -(-torch.rand(rounds, actions, generator=generator).clamp(1e-9, 1 - 1e-7).log()).log()


@torch.no_grad()
def prompt(row: str, episode: Episode, actor: Actor, srm: torch.nn.Module, numbers: Sequence[int],
           truths: list[np.ndarray], truth_centres: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One row's prompting of a batch: SAM's logits (B, 4h, 4w) after each round, M_0 first, and the actions (B, T).

    numbers: the samples' places in the test set. truths and truth_centres are for the rows with an oracle only.
    """
    place, labeller, rounds = _ROWS[row]
    rounds = {"all": ROUNDS, "one": 1}[rounds]
    chance = torch.stack([gumbel_noise(number, rounds, len(episode.centres)) for number in numbers], 1)
    if place == "error":  # clicks anywhere, the first into the target
        masks, logits = [np.zeros(truth.shape, bool) for truth in truths], []
        for _ in range(rounds + 1):
            episode.prompt(*next_clicks(masks, truths, episode.frame))
            logits.append(episode.logits)
            masks = [full_masks(one, truth.shape).cpu().numpy() for one, truth in zip(episode.logits, truths)]
        return logits, torch.empty(len(truths), 0, dtype=torch.long)

    # P_0: the SRM's highest and lowest place; then T rounds of patch, label, mask
    episode.start_without_truth(srm)
    logits, actions = [episode.logits], []
    for noise in chance.to(episode.centres.device):
        preference = actor(episode.action_state()) if place == "agent" else torch.zeros_like(noise)
        if place == "random" or SAMPLE_ACTIONS:  # the highest of logits with Gumbel noise is a draw from the policy
            preference = preference + noise
        action = policy(preference, episode.allowed).logits.argmax(1)
        if labeller == "SRM":
            answer = episode.label_by(episode.foreground(srm), action)
        elif labeller in ("map", "mask"):
            answer = episode.label_by({"map": episode.maps, "mask": episode.mask}[labeller], action)
        elif labeller == "truth":
            answer = (truth_centres.to(action.device).gather(1, action[:, None])[:, 0] == 1).long()
        elif labeller == "positive":
            answer = torch.ones_like(action)
        episode.step(action, answer)
        logits.append(episode.logits)
        actions.append(action)
    return logits, torch.stack(actions, 1).cpu()


def main() -> None:
    settings.positive(globals(), "ROUNDS", "BATCH_SIZE")
    settings.not_negative(globals(), "SEED", "PICTURES", "GALLERY")
    rows = list(_ROWS) if ROWS == ("all",) else list(dict.fromkeys(ROWS))
    if unknown := [row for row in rows if row not in _ROWS]:
        raise UserError(f"ROWS names {unknown[0]!r}: set it to all, or to some of: {', '.join(_ROWS)}")
    if not RESULTS.endswith(".json") or "/" in RESULTS:
        raise UserError(f"RESULTS={RESULTS} is no name of a results file: set it to one that ends in .json")
    if IMAGES and distributed.SIZE > 1:
        raise UserError("IMAGES are segmented in one process: start it with python, not with torchrun")
    device = distributed.own(script.device(DEVICE))
    run_dir = script.run_dir(RUN_DIR, TASK)
    features = Cache.open(script.cache_path(FEATURES, run_dir), TASK,
                          script.command("01_cache_features.py", globals()))
    frame, patch = features.attrs["image_size"], features.attrs["patch_size"]
    centres = patch_centres(frame, patch).to(device)
    if ROUNDS > len(centres):
        raise UserError(f"ROUNDS={ROUNDS} is more than the {len(centres)} patches there are: set it lower")

    # the trained agent, and the SRM that stage 3 ended with
    path, maker = run_dir / "agent.pt", script.command("03_train_agent.py", globals())
    trained = checkpoint.load(path, maker, **checkpoint.TRAINING)
    checkpoint.require_finished(path, trained, maker)
    settings.require_same(path, trained["settings"], {"task": TASK, "features": features.identity()})
    srm_path = run_dir / "srm.pt"
    if srm_path.exists():  # trained again since, it is not what this agent and its SRM grew from
        stage_2 = checkpoint.load(srm_path, script.command("02_train_srm.py", globals()), srm=dict)
        settings.require_same(path, trained["settings"], {"srm": checkpoint.fingerprint(stage_2["srm"])})
    files.lock(run_dir)
    channels, residual = json.loads(features.attrs["embedding"])[0], trained["settings"]["residual"]
    actor, srm = Actor(channels).to(device).eval(), build_srm(trained["settings"]["branch"], channels).to(device).eval()
    checkpoint.restore(path, trained, actor=actor, srm=srm)
    with distributed.rank_0_first():  # weights that are not there yet are downloaded once
        prompter = BatchedPrompter(load_decoder(features.attrs, device), frame)

    def align(embeddings: torch.Tensor, maps: torch.Tensor) -> Episode:
        """AlignSAM on embeddings (B, C, h, w) and maps (B, h, w) of images without ground truth."""
        episode = Episode(prompter, embeddings.float().to(device), maps.to(device), centres, residual=residual)
        prompt("AlignSAM", episode, actor, srm, range(len(maps)), [], torch.empty(0))
        return episode

    # what a stopped call has finished is kept; another agent, cache or constant makes it void
    chosen = trained["settings"] | {
        "actor": checkpoint.fingerprint(trained["actor"]), "trained_srm": checkpoint.fingerprint(trained["srm"]),
        "evaluation_rounds": ROUNDS, "evaluation_seed": SEED, "sample_actions": SAMPLE_ACTIONS}
    if IMAGES:
        own_images.segment(IMAGES, run_dir / "masks", features.attrs, features.texts, CLASSES, align, srm, device,
                           chosen)
        return

    samples = features.samples("test")
    truth_centres = features.truth_centres(samples)
    classes = [features.texts[text] for _, text in samples] if len(features.texts) > 1 else None
    drawn, shown = (set(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int).tolist())
                    for count in (PICTURES, GALLERY))
    # whole batches are dealt to the processes of torchrun, so that each batch is computed as in a single process
    mine = [number for start in distributed.share(range(0, len(samples), BATCH_SIZE))
            for number in range(start, min(start + BATCH_SIZE, len(samples)))]

    # what the rows without rounds learn from the training samples
    shots = features.samples("train")[:trained["settings"]["shots"] or None]
    persam = PerSAM(prompter.sam, frame)
    references = {}
    for text in range(len(features.texts)) if "PerSAM" in rows else ():
        same = shots[shots[:, 1] == text]
        if not len(same):
            same = shots  # few shots of many classes leave some without: then all there are
            print(f"PerSAM: no training sample shows {features.texts[text]}, so its target is the mean of the others'")
        references[text] = persam.target(features.embeddings(same).float().to(device),
                                         features.truth_grid(same).to(device))
    threshold = (best_threshold(features.maps(shots), [features.labels(shot) for shot in shots])
                 if "CLIP Surgery alone" in rows else None)

    def segment(row: str, numbers: list[int]) -> tuple[list[np.ndarray], list[torch.Tensor], torch.Tensor, Episode]:
        """One row's answer to a batch of samples, by their numbers in the test set.

        Returns their truths (H, W), logits (B, 4h, 4w) after each round that the row has, M_0 first (the rows "alone"
        have (B, h, w), positive on foreground too), the actions (B, T), and the episode as it ended.
        """
        batch, at_centres = samples[numbers], truth_centres[numbers]
        place, _, rounds = _ROWS[row]
        truths = [features.labels(sample) for sample in batch]
        embeddings = features.embeddings(batch).float().to(device)
        episode = Episode(prompter, embeddings, features.maps(batch).to(device), centres, residual=residual)
        actions = torch.empty(len(batch), 0, dtype=torch.long)
        if rounds != "none":
            logits, actions = prompt(row, episode, actor, srm, numbers, truths, at_centres)
        elif place == "PerSAM":
            masks = [persam.segment(one, references[text])[0] for one, (_, text) in zip(embeddings, batch)]
            logits = [torch.stack(masks)]
        elif place == "SRM":
            logits = [srm_alone(episode, srm)]
        elif place == "map":
            logits = [episode.maps - threshold]
        elif place == "map points":
            prompt_with_map(episode, ROUNDS // 2 + 1)  # as many points as AlignSAM's T + 2, or one fewer
            logits = [episode.logits]
        return truths, logits, actions, episode

    def draw(row: str, number: int, masks: list[np.ndarray], ious: list[float], points: np.ndarray,
             labels: np.ndarray) -> dict:
        """What the pictures need of a sample, made as its masks come by: they are too large to keep."""
        kept = {"mask": torch.from_numpy(masks[-1])} if number in drawn else {}
        if row != "AlignSAM" or number not in drawn | shown:
            return kept
        name, target = features.name(samples[number]), features.texts[samples[number][1]]
        picture, truth = features.picture(samples[number]), features.labels(samples[number])
        if number in drawn:
            some = {f"round {after}": after for after in _STRIP_ROUNDS if after < len(masks)}
            growing = {caption: masks[after] for caption, after in some.items()}
            marked = {caption: (points[:2 + after], labels[:2 + after]) for caption, after in some.items()}
            kept["strip"] = torch.from_numpy(
                np.array(strip(name, target, picture, truth, growing, marked, frame)))
        if number in shown:
            kept["gallery"] = gallery_item(name, target if classes else None, picture, truth, masks, ious, points,
                                           labels, frame)
        return kept

    # rows that a killed run finished
    part = run_dir / f"{RESULTS}.part"
    chosen |= {"batch_size": BATCH_SIZE, "pictures": PICTURES, "gallery": GALLERY}
    finished = {}
    if part.exists():
        saved = checkpoint.load(part, script.command("04_evaluate.py", globals()), rows=dict)
        finished = saved["rows"] if saved["settings"] == chosen else {}

    for row in rows:
        if row in finished:
            continue
        found = []  # number, last mask's metrics, IoU after each round, points chosen, those on the target, pictures
        bar = tqdm(mine, row, disable=distributed.RANK > 0)
        batches = in_batches(bar, BATCH_SIZE, partial(segment, row), mend="set DEVICE=cpu")
        for numbers, (truths, logits, actions, episode) in batches:
            right = (truth_centres[numbers].gather(1, actions) == 1).sum(1).tolist()
            points, labels = episode.points.cpu().numpy(), episode.labels.cpu().numpy()
            for index, (number, truth) in enumerate(zip(numbers, truths)):  # masks at the image's own size
                masks = [full_masks(after[index], truth.shape).cpu().numpy() for after in logits]
                ious = [overlap(mask, truth) for mask in masks]
                found.append((number, evaluate_mask(masks[-1], truth), ious, actions.shape[1], right[index],
                              draw(row, number, masks, ious, points[index], labels[index])))
        if found := distributed.gather(found):  # on rank 0
            numbers, last, ious, chosen_points, on_target, pictures = zip(*found)
            # FR is a share of T points: one point (w/o MSI) is another question
            rate = {"FR": sum(on_target) / sum(chosen_points)} if chosen_points[0] == ROUNDS else {}
            rounds, by_class = zip(*(average_iou(list(after), classes) for after in zip(*ious)))
            finished[row] = {
                "metrics": average(last, classes) | rate, "iou_per_round": list(rounds),
                "iou_per_round_per_class": {name: [one[name] for one in by_class] for name in by_class[0]},
                "pictures": {number: kept for number, kept in zip(numbers, pictures) if kept}}
            checkpoint.save(part, {"settings": chosen, "finished": False, "rows": finished})
    if distributed.RANK > 0:
        return
    results = {row: finished[row]["metrics"] for row in rows}

    # Table 9's bound: small targets have few centres that could be chosen
    attainable = ((truth_centres == 1).sum(1).clamp(max=ROUNDS) / ROUNDS).mean().item()
    task = get_task(TASK, "-")
    real = not stand_ins(features.attrs["sam"], features.attrs["clip"])
    same = real and features.texts == task.texts  # else PROMPT asks something that the paper did not
    paper = paper_row(task.paper) if task.paper and same else None
    print(f"\n{TASK}, {len(samples)} test samples, SAM {features.attrs['sam']}, CLIP {features.attrs['clip']}"
          + ("" if real else " (stand-ins: small models trained on drawn scenes; no figure compares with the paper's)"))
    table = {name: {key: value for key, value in row.items() if key != "per_class"} for name, row in results.items()}
    print(results_table(table, paper))
    print(f"FR attainable: {100 * attainable:.2f} (no choice of {ROUNDS} different patches does better)")
    if ROUNDS != trained["settings"]["rounds"]:
        print(f"evaluated with ROUNDS={ROUNDS}, trained with ROUNDS={trained['settings']['rounds']}")
    if classes:
        per_class = {name: {label: scores["mIoU"] for label, scores in row["per_class"].items()}
                     for name, row in results.items()}
        print("\nIoU per class\n\n" + results_table(per_class, paper))

    content = {
        "task": TASK, "sam": features.attrs["sam"], "clip": features.attrs["clip"], "seed": trained["settings"]["seed"],
        "images": len(np.unique(samples[:, 0])), "samples": len(samples),
        "units": "all metrics are fractions between 0 and 1",
        "evaluation_seed": SEED, "sample_actions": SAMPLE_ACTIONS, "rounds": ROUNDS,
        "branch": trained["settings"]["branch"], "trained": trained["settings"],
        "foreground_rate_attainable": attainable,
        **({} if threshold is None else {"clip_surgery_threshold": threshold}), "rows": results,
        **{name: {row: finished[row][name] for row in rows} for name in (
            "iou_per_round", *(["iou_per_round_per_class"] if classes else []))}}
    files.write_atomic(run_dir / RESULTS, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))
    written, prefix = [run_dir / RESULTS], "" if RESULTS == "results.json" else f"{RESULTS.removesuffix('.json')}-"
    pictures = {row: finished[row]["pictures"] for row in rows}
    prompted = pictures.get("AlignSAM", {}).values()
    sequences = [Image.fromarray(kept["strip"].numpy()) for kept in prompted if "strip" in kept]
    if sequences:  # the paper's Figure 5: points and mask growing
        written.append(run_dir / f"{prefix}strips.png")
        save_strips(sequences, written[-1])
    if drawn:  # its Figure 4: the rows side by side
        written.append(run_dir / f"{prefix}comparison.png")
        save_strips([strip(features.name(samples[number]), features.texts[samples[number][1]],
                           features.picture(samples[number]), features.labels(samples[number]),
                           {row: pictures[row][number]["mask"].numpy() for row in rows}, {}, frame)
                     for number in sorted(drawn)], written[-1])
    gallery = [kept["gallery"] for kept in prompted if "gallery" in kept]
    if gallery:
        srm_log = checkpoint.read_log(run_dir / "srm_log.csv")
        written.append(run_dir / f"{prefix}report.html")
        write_report(written[-1], content, srm_log, trained["log"], gallery, paper)
    part.unlink(missing_ok=True)
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    script.run(main, globals(), shared=True)
