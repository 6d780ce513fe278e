"""What the SAM stand-in's embedding has to tell beside masks: nameless facts about each place.

SAM's encoder starts from masked pretraining and then sees a billion masks, so its features know more than edges: how a
surface looks, which things are shaped alike. A small encoder that learns from clicks alone knows edges only. So each
cell of the embedding is asked, through a linear head, how the place is painted, for statistics of the image around it,
and for the shape of the thing that it lies on. Names of kinds, shadows, mirrors, blur and saliency are never asked for.
"""

import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from common.standin.model import STRIDE
from common.standin.scenes import SURFACES

SHAPE = 11  # numbers that `shape_of` gives
STATISTICS = 15  # numbers that `statistics` gives
CENTRE = 12  # an offset to the centre, in shares of the image, times this varies about as the other numbers do
OUTLINE = 2  # weight of the outline beside the other three losses
CHANNELS = len(SURFACES) + STATISTICS + 1 + SHAPE  # of the linear head


def shape_of(mask: np.ndarray) -> np.ndarray:
    """(11,) float: centre, size and outline of a mask (S, S) bool by its moments, whatever it is called.

    The outline is described in coordinates with the mask's second moments taken out (so that neither size nor stretch
    count): kurtosis of the radius, share of a hole, how much of the area within its greatest radius is filled, and the
    strength of its 3- to 6-fold symmetries.
    """
    y, x = np.nonzero(mask)
    side = mask.shape[0]
    cy, cx = y.mean(), x.mean()
    centred = np.stack([x - cx, y - cy])
    covariance = centred @ centred.T / len(x) + np.eye(2) / 12
    values, vectors = np.linalg.eigh(covariance)
    u = vectors.T @ centred / np.sqrt(values)[:, None]
    rho, theta = np.hypot(*u), np.arctan2(u[1], u[0])
    squares = (rho ** 2).mean()
    folds = [np.hypot((rho ** 2 * np.cos(m * theta)).mean(), (rho ** 2 * np.sin(m * theta)).mean()) / squares
             for m in (3, 4, 5, 6)]
    box = mask[y.min():y.max() + 1, x.min():x.max() + 1]
    hole = ndimage.binary_fill_holes(box).sum() / len(x) - 1
    fill = len(x) / (np.pi * np.quantile(rho, 0.98) ** 2 * np.sqrt(values.prod()))
    return np.array([(cx + 0.5) / side, (cy + 0.5) / side, np.log(len(x) / side ** 2), np.log(values[1] / values[0]),
                     (rho ** 4).mean() / squares ** 2, hole, fill, *folds], np.float32)


def shapes_of_scene(instances: np.ndarray) -> list[np.ndarray]:
    """`shape_of` things 1, 2, ... in instances (S, S) uint8; NaN for things of fewer than 12 visible pixels."""
    masks = [instances == index for index in range(1, int(instances.max()) + 1)]
    return [shape_of(mask) if mask.sum() >= 12 else np.full(SHAPE, np.nan, np.float32) for mask in masks]


def shapes_of_scenes(instances: np.ndarray) -> np.ndarray:
    """(N, most + 1, 11) float32 for instances (N, S, S) uint8: row i of a scene is its thing i, NaN where there is
    none. All numbers but the centre (the first two) are standardised over all things."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(shapes_of_scene, instances, chunksize=64))
    shapes = np.full((len(rows), 1 + max(map(len, rows)), SHAPE), np.nan, np.float32)
    for scene, things in zip(shapes, rows):
        for index, thing in enumerate(things, 1):
            scene[index] = thing
    spread = shapes[..., 2:]
    spread[:] = (spread - np.nanmean(spread, (0, 1))) / np.nanstd(spread, (0, 1))
    return shapes


def statistics(images: Tensor) -> Tensor:
    """(B, 3, S, S) float in 0..255 to (B, 15, g, g): each cell's mean colour, that less the image's mean, log contrast
    in three bands over the cell and over 5 x 5 cells, and over 3 x 3 cells the sharpest edge, the range, and their
    ratio (how sharp the edges are, whatever their height)."""
    pixels = images / 64 - 2
    mean = F.avg_pool2d(pixels, STRIDE)
    grey = pixels.mean(1, keepdim=True)
    smooth = [grey] + [F.avg_pool2d(grey, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 15)]
    bands = torch.cat([(a - b).abs() for a, b in zip(smooth, smooth[1:])], 1)
    energy = F.avg_pool2d(bands, STRIDE)
    around = F.avg_pool2d(energy, 5, 1, 2, count_include_pad=False)
    window = {"kernel_size": 3 * STRIDE, "stride": STRIDE, "padding": STRIDE}
    calm = smooth[1]
    edge = (F.max_pool2d((calm[..., 1:] - calm[..., :-1]).abs(), **window, ceil_mode=True),
            F.max_pool2d((calm[..., 1:, :] - calm[..., :-1, :]).abs(), **window, ceil_mode=True))
    edge = torch.maximum(*edge)
    span = F.max_pool2d(calm, **window) + F.max_pool2d(-calm, **window)
    edge, span = (edge + 0.01).log(), (span + 0.03).log()
    return torch.cat([mean, mean - mean.mean((2, 3), keepdim=True), (energy + 0.01).log(), (around + 0.01).log(),
                      edge, span, edge - span], 1)


def loss(answers: Tensor, images: Tensor, instances: Tensor, surfaces: Tensor, shapes: Tensor) -> Tensor:
    """How badly a linear head's answers (B, CHANNELS, g, g) tell what is there, a scalar.

    images (B, 3, S, S) float in 0..255; instances and surfaces (B, g, g) int64 at the cells' centres; shapes (B, n, 11)
    as `shapes_of_scenes` gives them.
    """
    paint, numbers, thing, outline = answers.split((len(SURFACES), STATISTICS, 1, SHAPE), 1)
    of_cell = shapes[torch.arange(len(shapes), device=shapes.device)[:, None, None], instances].permute(0, 3, 1, 2)
    cells = (torch.arange(instances.shape[1], device=shapes.device) + 0.5) / instances.shape[1]
    offset = CENTRE * torch.stack([of_cell[:, 0] - cells[None, None], of_cell[:, 1] - cells[None, :, None]], 1)
    truth = torch.cat([offset, of_cell[:, 2:]], 1)
    known = ~truth[:, :1].isnan()
    return (F.cross_entropy(paint, surfaces) + F.mse_loss(numbers, statistics(images))
            + F.binary_cross_entropy_with_logits(thing[:, 0], (instances > 0).float())
            + OUTLINE * ((outline - truth.nan_to_num()) ** 2 * known).sum() / (SHAPE * known.sum()).clamp(min=1))
