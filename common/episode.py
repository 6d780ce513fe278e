"""An episode of prompting, many images side by side: the points so far, SAM's masks, and the states they make."""

import torch
from torch import Tensor, nn

from common.agent import pool_state
from common.frozen.sam import BatchedPrompter, probability_grid
from common.srm import sample_at


def patch_centres(image_size: int, patch_size: int) -> Tensor:
    """(N, 2) float: the actions' points (x, y) = (80i + 40, 80j + 40), row by row (Eq. 3)."""
    cells = torch.arange(image_size // patch_size) * patch_size + patch_size / 2
    return torch.stack(torch.meshgrid(cells, cells, indexing="xy"), 2).flatten(0, 1)


class Episode:
    """B images being prompted side by side.

    embeddings (B, C, h, w) float = F; maps (B, h, w) float = M_c, the task's text on the grid. No mask exists yet:
    M = 1 everywhere, and no point. `mask` (B, h, w) is the current M on the grid, `logits` (B, 4h, 4w) SAM's answer and
    `predicted_iou` (B,) its opinion of it, `points` (B, n, 2) and `labels` (B, n) P_t,
    `allowed` (B, A) bool the patches that may still be chosen. residual: the share of F that a state keeps where the
    mask is empty; 0 is the paper's Eq. 4.
    """

    def __init__(self, prompter: BatchedPrompter, embeddings: Tensor, maps: Tensor, centres: Tensor,
                 allowed: Tensor | None = None, residual: float = 0.0) -> None:
        self.prompter, self.embeddings, self.maps, self.centres = prompter, embeddings, maps, centres
        self.frame, self.residual = prompter.frame, residual
        self.mask = torch.ones_like(maps)
        self.points = embeddings.new_zeros(len(embeddings), 0, 2)
        self.labels = torch.zeros(len(embeddings), 0, dtype=torch.long, device=embeddings.device)
        self.allowed = torch.ones(len(embeddings), len(centres), dtype=torch.bool, device=embeddings.device)
        if allowed is not None:
            self.allowed &= allowed
        self.prepared = self.logits = self.predicted_iou = None

    def state(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """s_t = F * M_{t-1} (Eq. 4), (B, C, h, w), of all images or some. Made when asked for, never kept."""
        return spatial_state(self.embeddings[rows], self.mask[rows], self.residual)

    def semantic_state(self, rows: Tensor | slice = slice(None), maps: Tensor | None = None) -> Tensor:
        """s_c = F * M_c (Eq. 11), (B, C, h, w), of all images or some; maps (B, h, w): M_c of other texts."""
        return self.embeddings[rows] * (self.maps[rows] if maps is None else maps)[:, None]

    def action_state(self, mask: Tensor | None = None) -> Tensor:
        """The state on the action grid, (B, C, 10, 10); mask (B, h, w): of another round's mask."""
        mask = self.mask if mask is None else mask
        state = spatial_state(self.embeddings, mask, self.residual)
        return pool_state(state, round(len(self.centres) ** 0.5))

    @torch.no_grad()
    def foreground(self, srm: nn.Module) -> Tensor:
        """y_r (B, h, w): the SRM's foreground probability in the current state (Eq. 12), a few images at a time."""
        rows = torch.arange(len(self.mask), device=self.mask.device).split(self.prompter.max_batch)
        return torch.cat([srm(self.semantic_state(some), self.state(some)) for some in rows]).sigmoid()

    def label_by(self, y_r: Tensor, actions: Tensor) -> Tensor:
        """(B,) 1 where y_r, sampled at the chosen patch centre, is above one half."""
        return (sample_at(y_r, self.centres[actions][:, None], self.frame)[:, 0] > 0.5).long()

    def prompt(self, points: Tensor, labels: Tensor) -> None:
        """Adds points (B, n, 2) with labels (B, n) and asks SAM with all points so far: M_t = D_M(F, P_t)."""
        self.points = torch.cat([self.points, points.to(self.points)], 1)
        self.labels = torch.cat([self.labels, labels.to(self.labels)], 1)
        if self.prepared is None:
            self.prepared = self.prompter.prepare(self.embeddings)
        self.logits, self.predicted_iou = self.prompter.decode(self.prepared, self.points, self.labels)
        self.mask = probability_grid(self.logits, self.mask.shape[1:])

    def step(self, actions: Tensor, labels: Tensor) -> None:
        """Prompts with the chosen patches' centres (B,) and labels (B,); a patch is not chosen twice."""
        self.allowed = self.allowed.scatter(1, actions[:, None], False)
        self.prompt(self.centres[actions][:, None], labels[:, None])

    def start_from_truth(self, points: Tensor) -> None:
        """P_0 in training: points (B, 2, 2) of `random_pixels`, the positive one first; M_0."""
        self.prompt(points, torch.tensor([1, 0]).expand(len(points), 2))

    def start_without_truth(self, srm: nn.Module) -> None:
        """P_0 at test time: a positive point at the highest cell of y_r and a negative one at the lowest."""
        y_r = self.foreground(srm)
        height, width = y_r.shape[1:]
        cells = torch.stack([y_r.flatten(1).argmax(1), y_r.flatten(1).argmin(1)], 1)
        points = torch.stack([(cells % width + 0.5) / width, (cells // width + 0.5) / height], 2) * self.frame
        self.prompt(points, torch.tensor([1, 0], device=y_r.device).expand(len(y_r), 2))


def spatial_state(embeddings: Tensor, mask: Tensor, residual: float) -> Tensor:
    """s_t = F * M (Eq. 4) of embeddings (B, C, h, w) and masks (B, h, w); with a residual r, F * (r + (1 - r) M)."""
    return embeddings * (residual + (1 - residual) * mask)[:, None]


def random_pixels(label_maps: list, generator: torch.Generator, frame: int) -> Tensor:
    """P_0 in training (Algorithm 1): for each label map (H, W), 1, 0 or 255, a random pixel of each of 1 and 0.

    Returns (B, 2, 2) points (x, y) in the frame, positive first, at pixel centres. Each map must hold both values.
    """
    points = []
    for truth in label_maps:
        truth = torch.as_tensor(truth)
        for value in (1, 0):
            places = (truth == value).nonzero()
            row, column = places[torch.randint(len(places), (1,), generator=generator).item()].tolist()
            points.append([(column + 0.5) / truth.shape[1] * frame, (row + 0.5) / truth.shape[0] * frame])
    return torch.tensor(points).view(len(label_maps), 2, 2)
