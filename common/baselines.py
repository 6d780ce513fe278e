"""What the agent is compared with: masks without prompting, CLIP Surgery's points, an oracle."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from common.cache import Cache, Truth
from common.episode import Episode
from common.frozen.sam import BatchedPrompter, full_masks
from common.metrics import overlap
from common.rivals.persam import PerSAM
from common.srm import sample_at

THRESHOLDS = np.linspace(0.05, 0.95, 19)  # tried for CLIP Surgery's map


def srm_alone(episode: Episode, srm: nn.Module) -> Tensor:
    """(B, h, w), positive where y_r > 0.5 before any mask exists: without SAM's decoder."""
    return episode.foreground(srm) - 0.5


def best_threshold(maps: Tensor, truths: Iterable[np.ndarray]) -> float:
    """The threshold at which maps (S, h, w) have the best mean IoU with S truths uint8 (H, W)."""
    scores = []
    for one, truth in zip(maps.cpu(), truths):
        masks = [full_masks(one - threshold, truth.shape).numpy() for threshold in THRESHOLDS]
        scores.append([overlap(mask, truth) for mask in masks])
    return float(THRESHOLDS[np.mean(scores, 0).argmax()])


def prompt_with_map(episode: Episode, count: int) -> None:
    """Points from CLIP Surgery's map (arXiv 2304.05653, section 3.4), all in one prompt.

    The `count` patch centres where M_c is highest are foreground, as many of the lowest background.
    (The authors count the cells of a smaller map that are above a threshold; here AlignSAM's places
    and number of points are kept, so that the row differs in the choice alone.)
    Where there are too few patches, each has one label.
    """
    centres = episode.centres.expand(len(episode.maps), -1, -1)
    order = sample_at(episode.maps, centres, episode.frame).argsort(1, descending=True)
    count = min(count, max(1, order.shape[1] // 2))
    highest, lowest = order[:, :count], order[:, count:][:, -count:]
    labels = torch.cat([torch.ones_like(highest), torch.zeros_like(lowest)], 1)
    episode.prompt(episode.centres[torch.cat([highest, lowest], 1)], labels)


def next_clicks(masks: list[np.ndarray], truths: list[np.ndarray],
                frame: int) -> tuple[Tensor, Tensor]:
    """The standard next click of interactive segmentation, for each image.

    It is the most interior pixel of the largest region where mask and truth differ, with its true
    label. A mask without an error gets a click into what is right already.

    masks: B bool (H, W). truths: B uint8 (H, W), 255 ignored. Returns points (B, 1, 2), (x, y) in
    the frame, and labels (B, 1).
    """
    points, labels = [], []
    for mask, truth in zip(masks, truths):
        wrong = mask != (truth == 1)
        errors = [wrong & (truth == value) for value in (1, 0)]  # missed, and too much
        regions = [ndimage.label(error)[0] for error in errors]
        sizes = [np.bincount(parts.ravel(), minlength=2)[1:] for parts in regions]
        side = 0 if sizes[0].max() >= sizes[1].max() else 1
        right = truth == int((truth == 1).any())  # if all is right: the target, or what is none
        region = regions[side] == 1 + sizes[side].argmax() if sizes[side].max() else right
        padded = np.pad(region, 1)  # the picture's edge is an edge of the region
        inside = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
        row, column = np.unravel_index(inside.argmax(), inside.shape)
        height, width = truth.shape
        points.append([(column + 0.5) / width * frame, (row + 0.5) / height * frame])
        labels.append(int(truth[row, column] == 1))
    return torch.tensor(points, dtype=torch.float32)[:, None], torch.tensor(labels)[:, None]


def label_points(source: str, episode: Episode, srm: nn.Module, actions: Tensor,
                 truth: Truth | None) -> Tensor:
    """(B,) labels of the chosen patches (B,), 1 foreground, from one of Table 8's sources.

    source: "SRM", "map" (CLIP Surgery's M_c), "mask" (M_{t-1}), "positive", or "truth".
    """
    if source == "positive":
        return torch.ones_like(actions)
    if source == "truth":
        at_centres = truth.at_centres.to(actions.device)
        return (at_centres.gather(1, actions[:, None])[:, 0] == 1).long()
    if source == "SRM":
        return episode.label_by(episode.foreground(srm), actions)
    return episode.label_by(episode.maps if source == "map" else episode.mask, actions)


def oracle_clicks(episode: Episode, label_maps: list[np.ndarray], rounds: int) -> list[Tensor]:
    """`next_clicks` on an episode without a point, once and then `rounds` times.

    label_maps: B uint8 (H, W). Returns SAM's logits (B, 4h, 4w) after each click.
    """
    masks, logits = [np.zeros(truth.shape, bool) for truth in label_maps], []
    for _ in range(rounds + 1):
        episode.prompt(*next_clicks(masks, label_maps, episode.frame))
        logits.append(episode.logits)
        masks = [full_masks(one, truth.shape).cpu().numpy()
                 for one, truth in zip(episode.logits, label_maps)]
    return logits


class Baselines(NamedTuple):
    """The rows without rounds, and what they learn from the training samples."""

    persam: PerSAM
    targets: dict[int, Tensor]  # PerSAM's target (C,) of each text; empty if not asked for
    threshold: float | None  # of CLIP Surgery's map; None if not asked for

    @classmethod
    def prepare(cls, rows: list[str], cache: Cache, shots: int, prompter: BatchedPrompter,
                device: torch.device) -> "Baselines":
        """For these rows, from the first `shots` training samples (0: all)."""
        samples = cache.samples("train")[:shots or None]
        persam, targets, threshold = PerSAM(prompter.sam, prompter.frame), {}, None
        texts = range(len(cache.texts)) if "PerSAM" in rows else ()
        unseen = [cache.texts[text] for text in texts if text not in samples[:, 1]]
        if unseen:
            print(f"PerSAM: no training sample shows {', '.join(unseen)}: their target is the mean "
                  "over all training samples")
        for text in texts:
            same = samples[samples[:, 1] == text]
            if not len(same):
                same = samples
            targets[text] = persam.target(cache.embeddings(same).to(device).float(),
                                          cache.truth_grid(same).to(device))
        if "CLIP Surgery alone" in rows:
            label_maps = [cache.label_map(sample) for sample in samples]
            threshold = best_threshold(cache.maps(samples), label_maps)
        return cls(persam, targets, threshold)

    def segment(self, row: str, episode: Episode, samples: np.ndarray, srm: nn.Module,
                count: int) -> Tensor:
        """Logits of a batch, (B, 4h, 4w), or (B, h, w) where SAM has no part in it.

        samples: (B, 2). count: points of each label for CLIP Surgery's points; with half of T + 2
        there are as many in all as AlignSAM has.
        """
        if row == "PerSAM":
            masks = [self.persam.segment(embedding, self.targets[text])[0]
                     for embedding, (_, text) in zip(episode.embeddings, samples)]
            return torch.stack(masks)
        if row == "SRM alone":
            return srm_alone(episode, srm)
        if row == "CLIP Surgery alone":
            return episode.maps - self.threshold
        prompt_with_map(episode, count)  # "CLIP Surgery points"
        return episode.logits
