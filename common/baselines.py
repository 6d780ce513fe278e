"""What the agent is compared with: masks that need no prompting, CLIP Surgery's own points, and clicks of an oracle."""

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
from common.persam import PerSAM
from common.srm import sample_at

THRESHOLDS = np.linspace(0.05, 0.95, 19)  # tried for CLIP Surgery's map


def srm_alone(episode: Episode, srm: nn.Module) -> Tensor:
    """(B, h, w), positive where y_r > 0.5 before any mask exists: the SRM without SAM."""
    return episode.foreground(srm) - 0.5


def best_threshold(maps: Tensor, truths: Iterable[np.ndarray]) -> float:
    """The threshold at which maps (S, h, w) in [0, 1] have the best mean IoU with truths, S uint8 (H, W)."""
    scores = [[overlap(full_masks(one - threshold, truth.shape).numpy(), truth) for threshold in THRESHOLDS]
              for one, truth in zip(maps.cpu(), truths)]
    return float(THRESHOLDS[np.mean(scores, 0).argmax()])


def prompt_with_map(episode: Episode, count: int) -> None:
    """CLIP Surgery's points (arXiv 2304.05653, section 3.4): `count` highest patch centres of M_c as foreground, as
    many of the lowest as background, all in one prompt."""
    heights = sample_at(episode.maps, episode.centres.expand(len(episode.maps), -1, -1), episode.frame)
    order = heights.argsort(1, descending=True)
    chosen = torch.cat([order[:, :count], order[:, -count:]], 1)
    episode.prompt(episode.centres[chosen], (torch.arange(2 * count) < count).long().expand(len(chosen), -1))


def next_clicks(masks: list[np.ndarray], truths: list[np.ndarray], frame: int) -> tuple[Tensor, Tensor]:
    """The standard next click of interactive segmentation, for each image: the most interior pixel of the largest
    region where mask and truth differ, with its true label.

    masks bool (H, W), truths uint8 (H, W), 255 ignored. Returns points (B, 1, 2), (x, y) in the frame, and labels
    (B, 1). A mask without an error gets a click into what is right already.
    """
    points, labels = [], []
    for mask, truth in zip(masks, truths):
        errors = [(mask != (truth == 1)) & (truth == value) for value in (1, 0)]  # missed, and too much
        regions = [ndimage.label(error) for error in errors]
        sizes = [np.bincount(parts.ravel(), minlength=2)[1:] for parts, _ in regions]
        side = 0 if sizes[0].max() >= sizes[1].max() else 1
        region = regions[side][0] == 1 + sizes[side].argmax() if sizes[side].max() else truth == 1
        inside = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]  # the picture's edge is an edge
        row, column = np.unravel_index(inside.argmax(), inside.shape)
        points.append([(column + 0.5) / truth.shape[1] * frame, (row + 0.5) / truth.shape[0] * frame])
        labels.append(int(truth[row, column] == 1))
    return torch.tensor(points, dtype=torch.float32)[:, None], torch.tensor(labels)[:, None]


def label_points(source: str, episode: Episode, srm: nn.Module, actions: Tensor,
                 truth: Truth | None) -> Tensor:
    """(B,) labels of the chosen patches `actions` (B,), 1 foreground, from one of Table 8's sources.

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
    targets: dict[int, Tensor]  # PerSAM's target embedding (C,) of each text; empty if not asked for
    threshold: float | None  # of CLIP Surgery's map; None if not asked for

    @classmethod
    def prepare(cls, rows: list[str], cache: Cache, shots: int, prompter: BatchedPrompter,
                device: torch.device) -> "Baselines":
        """For these rows, from the first `shots` training samples (0: all)."""
        samples = cache.samples("train")[:shots or None]
        persam, targets, threshold = PerSAM(prompter.sam, prompter.frame), {}, None
        for text in range(len(cache.texts)) if "PerSAM" in rows else ():
            same = samples[samples[:, 1] == text]
            if not len(same):
                same = samples  # few shots of many classes leave some without: then all there are
                print(f"PerSAM: no training sample shows {cache.texts[text]}, so its target is the "
                      "mean of the others'")
            targets[text] = persam.target(cache.embeddings(same).float().to(device),
                                          cache.truth_grid(same).to(device))
        if "CLIP Surgery alone" in rows:
            label_maps = [cache.label_map(sample) for sample in samples]
            threshold = best_threshold(cache.maps(samples), label_maps)
        return cls(persam, targets, threshold)

    def segment(self, row: str, episode: Episode, samples: np.ndarray, srm: nn.Module,
                count: int) -> Tensor:
        """Logits of a batch, (B, 4h, 4w), or (B, h, w) where SAM has no part in it.

        samples: (B, 2). count: points of each label for CLIP Surgery's points.
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
