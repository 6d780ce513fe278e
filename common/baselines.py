"""What the agent is compared with: masks that need no prompting, CLIP Surgery's own points, and clicks of an oracle."""

from collections.abc import Iterable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from common.episode import Episode
from common.frozen.sam import full_masks
from common.metrics import overlap
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
