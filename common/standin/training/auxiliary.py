"""A second task for the SAM stand-in's encoder: facts about each place that name nothing.

SAM's encoder starts from masked pretraining and then sees a billion masks, so its features know
more than edges: how a surface looks, and which things have the same shape. A small encoder that
learns from clicks alone knows edges only. Therefore a linear head asks each cell of the embedding
how the place is painted, for statistics of the image around it, for the shape of the thing there,
and which of its 4 x 4 mask pixels show a thing and which lie in the shade. It never asks for the
names of kinds, nor for mirrors, blur or saliency.
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

SHAPE = 11  # length of what `shape_of` returns
STATISTICS = 15  # channels of what `statistics` returns
# Offsets to the centre are shares of the image. Multiplied by this, they vary about as much as the
# other numbers.
CENTRE = 12
FINE = 4  # pixels of a mask along a cell; things and shade are asked for as finely as masks are
OUTLINE, SHADE = 2, 4  # weights of the losses of shape and shade; the other three have weight 1
SECTIONS = (len(SURFACES), STATISTICS, FINE ** 2, FINE ** 2, SHAPE)  # what the head answers
CHANNELS = sum(SECTIONS)
LEAST_PIXELS = 12  # a thing of which fewer show has no shape


def shape_of(mask: np.ndarray) -> np.ndarray:
    """Centre, size and outline of a mask (S, S) bool, float32 (11,). The kind does not matter.

    In order: the centre's x and y as shares of the image, log area (as a share too), log
    elongation, kurtosis of the radius, area of the holes, area relative to an ellipse of the
    greatest radius, and the strength of the 3-, 4-, 5- and 6-fold symmetries. From the kurtosis on,
    the mask's second moments are taken out first, so that neither size nor stretch counts.
    """
    y, x = np.nonzero(mask)
    area, side = len(x), mask.shape[0]
    centre_x, centre_y = x.mean(), y.mean()
    centred = np.stack([x - centre_x, y - centre_y])
    pixel = np.eye(2) / 12  # a pixel's own second moments
    variances, axes = np.linalg.eigh(centred @ centred.T / area + pixel)

    # whitened coordinates
    u, v = axes.T @ centred / np.sqrt(variances)[:, None]
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    squares = (rho ** 2).mean()
    kurtosis = (rho ** 4).mean() / squares ** 2
    symmetries = []
    for fold in (3, 4, 5, 6):
        cosine, sine = np.cos(fold * theta), np.sin(fold * theta)
        strength = np.hypot((rho ** 2 * cosine).mean(), (rho ** 2 * sine).mean())
        symmetries.append(strength / squares)

    box = mask[y.min():y.max() + 1, x.min():x.max() + 1]
    holes = ndimage.binary_fill_holes(box).sum() / area - 1
    greatest_radius = np.quantile(rho, 0.98)
    filled = area / (np.pi * greatest_radius ** 2 * np.sqrt(variances.prod()))
    return np.array([(centre_x + 0.5) / side, (centre_y + 0.5) / side, np.log(area / side ** 2),
                     np.log(variances[1] / variances[0]), kurtosis, holes, filled, *symmetries],
                    np.float32)


def shapes_of_scene(instances: np.ndarray) -> list[np.ndarray]:
    """`shape_of` for things 1, 2, ... of instances (S, S) uint8; NaN where too little shows."""
    shapes = []
    for number in range(1, int(instances.max()) + 1):
        mask = instances == number
        is_seen = mask.sum() >= LEAST_PIXELS
        shapes.append(shape_of(mask) if is_seen else np.full(SHAPE, np.nan, np.float32))
    return shapes


def shapes_of_scenes(instances: np.ndarray) -> np.ndarray:
    """The shapes of all things of N scenes, for instances (N, S, S) uint8.

    Returns float32 (N, most things + 1, 11). Row i of a scene is its thing i, and NaN where there
    is none. All numbers but the first two, the centre, are standardised over all things.
    """
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(shapes_of_scene, instances, chunksize=64))
    most = max(len(things) for things in rows)
    shapes = np.full((len(rows), 1 + most, SHAPE), np.nan, np.float32)
    for scene, things in zip(shapes, rows):
        for number, thing in enumerate(things, 1):
            scene[number] = thing
    outlines = shapes[..., 2:]
    outlines[:] = (outlines - np.nanmean(outlines, (0, 1))) / np.nanstd(outlines, (0, 1))
    return shapes


def statistics(images: Tensor) -> Tensor:
    """Statistics of images (B, 3, S, S) float in 0..255 at each cell, (B, 15, g, g).

    In order: the cell's mean colour (3) and that less the image's mean (3); log contrast in three
    bands over the cell (3) and over 5 x 5 cells (3); and over 3 x 3 cells the log of the steepest
    edge, the log of the range, and their difference, which tells how sharp the edges are whatever
    their height.
    """
    pixels = images / 64 - 2
    colour = F.avg_pool2d(pixels, STRIDE)
    colour_less_mean = colour - colour.mean((2, 3), keepdim=True)

    grey = pixels.mean(1, keepdim=True)
    smooth = [F.avg_pool2d(grey, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 15)]
    bands = [(fine - coarse).abs() for fine, coarse in zip([grey, *smooth], smooth)]
    contrast = F.avg_pool2d(torch.cat(bands, 1), STRIDE)
    contrast_around = F.avg_pool2d(contrast, 5, 1, 2, count_include_pad=False)

    window = {"kernel_size": 3 * STRIDE, "stride": STRIDE, "padding": STRIDE}
    calm = smooth[0]  # single noisy pixels make no edge
    step_x = (calm[..., 1:] - calm[..., :-1]).abs()
    step_y = (calm[..., 1:, :] - calm[..., :-1, :]).abs()
    edge = torch.maximum(F.max_pool2d(step_x, **window, ceil_mode=True),
                         F.max_pool2d(step_y, **window, ceil_mode=True))
    span = F.max_pool2d(calm, **window) + F.max_pool2d(-calm, **window)
    log_edge, log_span = (edge + 0.01).log(), (span + 0.03).log()
    return torch.cat([colour, colour_less_mean, (contrast + 0.01).log(),
                      (contrast_around + 0.01).log(), log_edge, log_span, log_edge - log_span], 1)


def loss(answers: Tensor, images: Tensor, instances: Tensor, surfaces: Tensor,
         things: Tensor, shade: Tensor, shapes: Tensor) -> Tensor:
    """How far the head's answers (B, CHANNELS, g, g) are from the truth, a scalar.

    images: (B, 3, S, S) float in 0..255. instances, surfaces: (B, g, g) int64, at the cells'
    centres. things, shade: (B, 4 g, 4 g) float, the share of each mask pixel on which a thing is,
    or from which something keeps the light away. shapes: (B, n, 11) as from `shapes_of_scenes`. The
    head answers, in this order, with logits of the surface, the statistics, logits of things and of
    shade at the cell's 16 mask pixels, row by row, and the thing's shape, in which offsets from the
    cell stand in place of the centre. Cells without a thing, or with one that has no shape, do not
    count in the shape loss.
    """
    surface, numbers, thing, dark, shape = answers.split(SECTIONS, 1)

    scene = torch.arange(len(shapes), device=shapes.device)[:, None, None]
    shape_of_cell = shapes[scene, instances].permute(0, 3, 1, 2)
    grid = instances.shape[1]
    cells = (torch.arange(grid, device=shapes.device) + 0.5) / grid  # their middles
    offset_x = shape_of_cell[:, 0] - cells[None, None]
    offset_y = shape_of_cell[:, 1] - cells[None, :, None]
    offset = CENTRE * torch.stack([offset_x, offset_y], 1)
    truth = torch.cat([offset, shape_of_cell[:, 2:]], 1)
    known = ~truth[:, :1].isnan()
    squares = (shape - truth.nan_to_num()) ** 2 * known

    def of_fine(logits: Tensor, fine: Tensor) -> Tensor:
        """Cross-entropy of logits (B, 16, g, g) with fine (B, 4 g, 4 g) in 0..1, a scalar."""
        in_cells = F.pixel_unshuffle(fine[:, None], FINE)
        return F.binary_cross_entropy_with_logits(logits, in_cells)

    surface_loss = F.cross_entropy(surface, surfaces)
    statistics_loss = F.mse_loss(numbers, statistics(images))
    thing_loss, shade_loss = of_fine(thing, things), of_fine(dark, shade)
    shape_loss = squares.sum() / (SHAPE * known.sum()).clamp(min=1)
    return (surface_loss + statistics_loss + thing_loss + SHADE * shade_loss
            + OUTLINE * shape_loss)
