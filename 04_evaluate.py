"""Stage 4: the full prompting evaluation on the test set, from the same cache: AlignSAM and its ablations.

    python 04_evaluate.py [NAME=value ...]              NAME is any constant below; `help` lists them

There is no ground truth here: P_0 is the SRM's highest and lowest place, every label is the SRM's. All rows come from
the same agent and the same SRM, so each changes one thing.
"""

import json

import numpy as np
import torch
from tqdm import tqdm

from common import checkpoint, settings
from common.agent import Actor, policy
from common.cache import Cache
from common.episode import Episode, patch_centres
from common.metrics import average, evaluate_mask
from common.paper import paper_row, results_table
from common.pictures import save_strips, strip
from common.sam import BatchedPrompter, full_masks, load_decoder
from common.srm import build_srm
from common.tasks import get_task

# what is evaluated
TASK = "demo_saliency"  # as in stages 1 to 3
ROUNDS = 15  # T
SAMPLE_ACTIONS = False  # draw the patch from the policy; false takes the most probable one, which is reproducible
SEED = 0  # of the random patches (w/o RL), and of SAMPLE_ACTIONS

# how
BATCH_SIZE = 32  # test samples prompted side by side
PICTURES = 8  # test samples drawn as strips, spread over the test set
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder

# each row: is the patch the agent's (else drawn at random), is the label the SRM's (else positive), how many rounds
_ROWS = {"AlignSAM": (True, True, "all"), "w/o RL": (False, True, "all"),
         "w/o SRM": (True, False, "all"), "w/o MSI": (True, True, "one")}
STRIP_ROUNDS = (0, 1, 2, 5, 10, 15)  # after which the strips show the mask


def gumbel_noise(sample: int, rounds: int, actions: int) -> torch.Tensor:
    """(T, A) of the sample's own generator, so that a draw does not depend on what else is in the batch."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + sample)
    return -(-torch.rand(rounds, actions, generator=generator).clamp(1e-9, 1 - 1e-7).log()).log()


def main() -> None:
    settings.positive(globals(), "ROUNDS", "BATCH_SIZE")
    settings.not_negative(globals(), "SEED", "PICTURES")
    device = settings.device(DEVICE)
    run_dir = settings.run_dir(RUN_DIR, TASK)
    features = Cache.open(settings.features(FEATURES, run_dir), TASK)
    frame, patch = features.attrs["image_size"], features.attrs["patch_size"]
    centres = patch_centres(frame, patch).to(device)
    if ROUNDS > len(centres):
        raise settings.UserError(f"ROUNDS={ROUNDS} is more than the {len(centres)} patches there are: set it lower")
    prompter = BatchedPrompter(load_decoder(features.attrs, device), frame)

    # the trained agent, and the SRM that stage 3 ended with
    path = run_dir / "agent.pt"
    trained = checkpoint.load(path, f"03_train_agent.py TASK={TASK}")
    checkpoint.require_finished(path, trained, f"03_train_agent.py TASK={TASK}")
    checkpoint.require_same(path, trained["settings"], {"task": TASK, "features": features.identity()})
    channels = json.loads(features.attrs["embedding"])[0]
    actor, srm = Actor(channels).to(device).eval(), build_srm(trained["settings"]["branch"], channels).to(device).eval()
    actor.load_state_dict(trained["actor"])
    srm.load_state_dict(trained["srm"])

    samples = features.samples("test")
    truths_at_centres = features.truth_centres(samples)
    classes = [features.texts[text] for _, text in samples] if len(features.texts) > 1 else None
    pictured = set(np.linspace(0, len(samples) - 1, min(PICTURES, len(samples))).astype(int))
    rows, iou_per_round, strips = {}, {}, {}

    for row, (by_agent, by_srm, rounds) in _ROWS.items():
        rounds = ROUNDS if rounds == "all" else 1
        scores: list[list[dict]] = [[] for _ in range(rounds + 1)]  # after each round, one per sample
        on_target = 0
        for start in tqdm(range(0, len(samples), BATCH_SIZE), row):
            batch = samples[start:start + BATCH_SIZE]
            truths = [features.labels(sample) for sample in batch]
            episode = Episode(prompter, features.embeddings(batch).float().to(device), features.maps(batch).to(device), centres)
            chance = torch.stack([gumbel_noise(start + index, rounds, len(centres)) for index in range(len(batch))], 1)
            logits = []  # SAM's answer after each round, M_0 first

            with torch.no_grad():
                # P_0: the SRM's highest and lowest place; then T rounds of patch, label, mask
                episode.start_without_truth(srm)
                logits.append(episode.logits)
                for noise in chance.to(device):
                    preference = actor(episode.action_state()) if by_agent else torch.zeros_like(noise)
                    if not by_agent or SAMPLE_ACTIONS:  # the highest of logits with Gumbel noise is a draw from the policy
                        preference = preference + noise
                    action = policy(preference, episode.allowed).logits.argmax(1)
                    answer = episode.label_by(episode.foreground(srm), action) if by_srm else torch.ones_like(action)
                    truth = truths_at_centres[start:start + len(batch)].gather(1, action.cpu()[:, None])
                    on_target += int((truth == 1).sum())
                    episode.step(action, answer)
                    logits.append(episode.logits)

            for index, truth in enumerate(truths):  # masks at the image's own size
                masks = [full_masks(after[index], truth.shape).cpu().numpy() for after in logits]
                for after, mask in zip(scores, masks):
                    after.append(evaluate_mask(mask, truth))
                if row == "AlignSAM" and start + index in pictured:
                    shown = {number: masks[number] for number in STRIP_ROUNDS if number < len(masks)}
                    points, labels = episode.points[index].cpu().numpy(), episode.labels[index].cpu().numpy()
                    name, target = features.name(batch[index]), features.texts[batch[index][1]]
                    strips[start + index] = strip(name, target, features.picture(batch[index]), truth, shown, points,
                                                  labels, frame)
        rows[row] = average(scores[-1], classes) | {"FR": on_target / (rounds * len(samples))}
        iou_per_round[row] = [average(after, classes)["mIoU"] for after in scores]

    # Table 9's bound: small targets have few centres that could be chosen
    attainable = ((truths_at_centres == 1).sum(1).clamp(max=ROUNDS) / ROUNDS).mean().item()
    task_paper = get_task(TASK, "-").paper
    real = features.attrs["sam"] != "demo" and features.attrs["clip"] != "demo"
    print(f"\n{TASK}, {len(samples)} test samples, SAM {features.attrs['sam']}, CLIP {features.attrs['clip']}"
          + ("" if real else " (stand-ins: small models trained on drawn scenes; no figure here compares with the paper's)"))
    table = {name: {key: value for key, value in row.items() if key != "per_class"} for name, row in rows.items()}
    print(results_table(table, paper_row(task_paper) if task_paper and real else None))
    print(f"FR attainable: {attainable:.4f} (no choice of {ROUNDS} different patches does better)")
    if classes:
        per_class = {name: {label: scores["mIoU"] for label, scores in row["per_class"].items()} for name, row in rows.items()}
        print("\nIoU per class\n\n" + results_table(per_class))

    results = {
        "task": TASK, "sam": features.attrs["sam"], "clip": features.attrs["clip"], "seed": trained["settings"]["seed"],
        "images": len(samples),
        "evaluation_seed": SEED, "sample_actions": SAMPLE_ACTIONS, "rounds": ROUNDS,
        "units": "all metrics are fractions between 0 and 1",
        "branch": trained["settings"]["branch"], "foreground_rate_attainable": attainable, "rows": rows,
        "iou_per_round": iou_per_round}
    settings.write_atomic(run_dir / "results.json", lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
    written = [run_dir / "results.json"]
    if strips:
        save_strips([strips[index] for index in sorted(strips)], run_dir / "strips.png")
        written.append(run_dir / "strips.png")
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    settings.run(main, globals())
