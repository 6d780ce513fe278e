"""An episode of prompting, many images side by side: points, SAM's masks, states."""

import torch
from torch import Tensor, nn

from common.agent import pool_state
from common.frozen.sam import BatchedPrompter, probability_grid
from common.runtime.workers import side_by_side
from common.srm import sample_at


def patch_centres(image_size: int, patch_size: int) -> Tensor:
    """(N, 2) float: the actions' points (x, y) = (80i + 40, 80j + 40), row by row (Eq. 3)."""
    cells = torch.arange(image_size // patch_size) * patch_size + patch_size / 2
    return torch.stack(torch.meshgrid(cells, cells, indexing="xy"), 2).flatten(0, 1)


class Episode:
    """B images being prompted side by side.

    mask: (B, h, w) float, the current M on the grid; 1 everywhere before the first point.
    frame: side in pixels of the square that every picture is squashed to, in which points lie.
    points: (B, n, 2) and labels: (B, n), P_t. allowed: bool (B, A), the patches that may still be
    chosen. logits: (B, 4h, 4w), SAM's last answer. predicted_iou: (B,), its own estimate of it.
    """

    def __init__(self, prompter: BatchedPrompter, embeddings: Tensor, maps: Tensor, centres: Tensor,
                 allowed: Tensor | None = None, residual: float = 0.0) -> None:
        """embeddings: (B, C, h, w) float, F. maps: (B, h, w) float, M_c of the task's text.

        centres: (A, 2), see `patch_centres`. allowed: bool (B, A), by default all patches.
        residual: the share of F that a state keeps where the mask is empty; 0 is the paper's Eq. 4.
        """
        self.prompter, self.frame, self.residual = prompter, prompter.frame, residual
        self.embeddings, self.maps, self.centres = embeddings, maps, centres
        batch, device = len(embeddings), embeddings.device
        self.mask = torch.ones_like(maps)
        self.points = embeddings.new_zeros(batch, 0, 2)
        self.labels = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.allowed = torch.ones(batch, len(centres), dtype=torch.bool, device=device)
        if allowed is not None:
            self.allowed &= allowed
        self.prepared = self.logits = self.predicted_iou = None

    def state(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """s_t = F * M_{t-1} (Eq. 4), (B, C, h, w), of all images or some.

        Made when asked for and never kept, for it is large.
        """
        return spatial_state(self.embeddings[rows], self.mask[rows], self.residual)

    def semantic_state(self, rows: Tensor | slice = slice(None),
                       maps: Tensor | None = None) -> Tensor:
        """s_c = F * M_c (Eq. 11), (B, C, h, w), of all images or some.

        maps: (B, h, w), M_c of other texts than the episode's.
        """
        maps = self.maps[rows] if maps is None else maps
        return self.embeddings[rows] * maps[:, None]

    def action_state(self, mask: Tensor | None = None) -> Tensor:
        """The state on the action grid, (B, C, 10, 10).

        mask: (B, h, w), M of another round; by default the current M.
        """
        mask = self.mask if mask is None else mask
        state = spatial_state(self.embeddings, mask, self.residual)
        return pool_state(state, round(len(self.centres) ** 0.5))

    @torch.no_grad()
    def foreground_logits(self, srm: nn.Module) -> Tensor:
        """Logits of y_r (B, h, w), the SRM's answer in the current state.

        Computed for a few images at a time, for states are large.
        """
        def answer(some: Tensor) -> Tensor:
            return srm(self.semantic_state(some), self.state(some))

        device = self.mask.device
        rows = torch.arange(len(self.mask), device=device).split(self.prompter.max_batch)
        return torch.cat(side_by_side(answer, rows, device))

    def foreground(self, srm: nn.Module) -> Tensor:
        """y_r (B, h, w): the SRM's foreground probability in the current state (Eq. 12)."""
        return self.foreground_logits(srm).sigmoid()

    def labels_at_centres(self, srm: nn.Module) -> Tensor:
        """bool (B, A): what the SRM calls the patch centres in the current state."""
        centres = self.centres.expand(len(self.mask), -1, -1)
        return sample_at(self.foreground(srm), centres, self.frame) > 0.5

    def label_by(self, y_r: Tensor, actions: Tensor) -> Tensor:
        """(B,) 1 where y_r, sampled at the chosen patch centre, is above one half."""
        points = self.centres[actions][:, None]
        return (sample_at(y_r, points, self.frame)[:, 0] > 0.5).long()

    def prompt(self, points: Tensor, labels: Tensor) -> None:
        """M_t = D_M(F, P_t), where P_t is P_{t-1} with points (B, n, 2) and labels (B, n) added."""
        self.points = torch.cat([self.points, points.to(self.points)], 1)
        self.labels = torch.cat([self.labels, labels.to(self.labels)], 1)
        if self.prepared is None:
            self.prepared = self.prompter.prepare(self.embeddings)
        answer = self.prompter.decode(self.prepared, self.points, self.labels)
        self.logits, self.predicted_iou = answer
        self.mask = probability_grid(self.logits, self.mask.shape[1:])

    def step(self, actions: Tensor, labels: Tensor) -> None:
        """Prompts with the centres of the chosen patches (B,), labelled by labels (B,).

        A chosen patch is no longer allowed.
        """
        self.allowed = self.allowed.scatter(1, actions[:, None], False)
        self.prompt(self.centres[actions][:, None], labels[:, None])

    def start_from_truth(self, points: Tensor) -> None:
        """P_0 in training: points (B, 2, 2) of `random_pixels`, the positive one first; M_0."""
        self.prompt(points, torch.tensor([1, 0]).expand(len(points), 2))

    def start_without_truth(self, srm: nn.Module) -> None:
        """P_0 at test time: a positive point where y_r is highest, a negative where lowest."""
        logits = self.foreground_logits(srm)  # y_r itself is rounded: many cells would share its 1
        height, width = logits.shape[1:]
        cells = torch.stack([logits.flatten(1).argmax(1), logits.flatten(1).argmin(1)], 1)
        x, y = (cells % width + 0.5) / width, (cells // width + 0.5) / height
        labels = torch.tensor([1, 0], device=logits.device).expand(len(logits), 2)
        self.prompt(torch.stack([x, y], 2) * self.frame, labels)


def spatial_state(embeddings: Tensor, mask: Tensor, residual: float) -> Tensor:
    """s_t = F * M (Eq. 4) of embeddings (B, C, h, w) and masks (B, h, w).

    With a residual r it is F * (r + (1 - r) M).
    """
    return embeddings * (residual + (1 - residual) * mask)[:, None]


def random_pixels(label_maps: list, generator: torch.Generator, frame: int) -> Tensor:
    """P_0 in training (Algorithm 1): a random foreground and a random background pixel.

    label_maps: B arrays (H, W) of 1, 0 and 255, each of which holds both 1 and 0. Returns points
    (B, 2, 2), (x, y) in the frame at pixel centres, positive first.
    """
    points = []
    for label_map in label_maps:
        label_map = torch.as_tensor(label_map)
        height, width = label_map.shape
        for value in (1, 0):
            places = (label_map == value).nonzero()
            index = torch.randint(len(places), (1,), generator=generator).item()
            row, column = places[index].tolist()
            points.append([(column + 0.5) / width * frame, (row + 0.5) / height * frame])
    return torch.tensor(points).view(len(label_maps), 2, 2)
