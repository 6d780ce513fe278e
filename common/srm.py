"""The semantic recalibration module (paper, section 3.3): foreground or background, everywhere.

It reads states on the embedding grid and answers y_r, a foreground probability on the same grid.
The implicit branch sees the spatial state s_t = F * M alone; the explicit branch also sees the
semantic state s_c = F * M_c (Eq. 11).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.layers import attention, conv_block, split_heads
from common.runtime.errors import UserError

WIDTH = 64  # channels inside either branch: 50 images cannot train more
HEADS = 4  # of the explicit branch's self-attention
JOIN_KERNEL = 1  # of the convolutions that join s_c and s_t: 3 overfits 50 samples of six classes
CHANNEL_DROP = 0.4  # share of F's channels hidden from a sample in training, against overfitting


class ImplicitSRM(nn.Module):
    """y_r = head(two convolution blocks(s_t)).

    For targets that no text names well (blur, mirrors, saliency).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_block(channels, WIDTH), conv_block(WIDTH, WIDTH))
        self.head = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, s_c: Tensor, s_t: Tensor) -> Tensor:
        """Logits of y_r (B, h, w), Eq. 12, of s_t (B, C, h, w); s_c is not looked at."""
        return self.head(self.branch(s_t))[:, 0]


class ExplicitSRM(nn.Module):
    """Three convolutions join s_c and s_t, a self-attention relates places, two decode.

    The joining ones look at one place each; the attention and the decoding ones relate places.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        before = (2 * channels, WIDTH, WIDTH)
        self.join = nn.Sequential(*(conv_block(width, WIDTH, JOIN_KERNEL) for width in before))
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.decode = conv_block(WIDTH, WIDTH)
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, s_c: Tensor, s_t: Tensor) -> Tensor:
        """s_c and s_t, (B, C, h, w) each, to logits of y_r (B, h, w), Eq. 12."""
        x = self.join(torch.cat([s_c, s_t], 1))
        tokens = x.flatten(2).transpose(1, 2)  # (B, h w, WIDTH)
        q, k, v = self.query_key_value(self.norm(tokens)).chunk(3, 2)
        q, k, v = split_heads(q, HEADS), split_heads(k, HEADS), split_heads(v, HEADS)
        tokens = self.attended(attention(q, k, v))
        x = x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(self.decode(x))[:, 0]


def build_srm(branch: str, channels: int) -> ImplicitSRM | ExplicitSRM:
    """A fresh SRM for embeddings of `channels` channels.

    branch: "implicit" or "explicit". Raises UserError for any other.
    """
    branches = {"implicit": ImplicitSRM, "explicit": ExplicitSRM}
    if branch not in branches:
        raise UserError(f"BRANCH={branch} is neither implicit nor explicit: set one of them")
    return branches[branch](channels)


def srm_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Eq. 13: Dice + binary cross-entropy of y_r's logits (B, h, w) against y on the grid.

    truth: (B, h, w), the foreground share of each cell in [0, 1], or -1 where there is no truth:
    such cells do not count. Both terms are averages over images; Dice is smoothed by one cell.
    """
    known = (truth >= 0).float()
    truth = truth.clamp(min=0)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, known, reduction="none").sum((1, 2))
    entropy = entropy / known.sum((1, 2)).clamp(min=1)
    probability = logits.sigmoid() * known
    both = (probability * truth).sum((1, 2))
    areas = probability.sum((1, 2)) + (truth * known).sum((1, 2))
    dice = 1 - (2 * both + 1) / (areas + 1)
    return (dice + entropy).mean()


def train_step(srm: nn.Module, optimizer: torch.optim.Optimizer, s_c: Tensor, s_t: Tensor,
               truth: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """One optimiser step of Eq. 13; returns the loss and the share of cells answered right.

    s_c, s_t: (B, C, h, w). truth: (B, h, w), as in `srm_loss`. generator: on the CPU whatever the
    device, so that a resumed run draws what an undisturbed one draws.

    The paper is silent on augmentation. Without any the SRM overfits its 50 images, so each step
    hides some of F's channels. Flipped embeddings would be no augmentation: the encoder's features
    know direction and place, and no flipped image has a flipped embedding.
    """
    kept = (torch.rand(s_t.shape[:2], generator=generator) >= CHANNEL_DROP).to(s_t)
    kept = kept[:, :, None, None] / (1 - CHANNEL_DROP)
    logits = srm(s_c * kept, s_t * kept)
    loss = srm_loss(logits, truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    right = (logits > 0) == (truth > 0.5)
    return loss.item(), right[truth >= 0].float().mean().item()


def sample_at(values: Tensor, points: Tensor, frame: int) -> Tensor:
    """Bilinear samples (B, N) of maps (B, h, w).

    points: (B, N, 2), (x, y) in a frame x frame picture. Beyond the centres of the outermost cells
    the values are those at the centres.
    """
    height, width = values.shape[1:]
    edge = 1 - 1 / torch.tensor([width, height], device=values.device)  # the last cell's centre
    where = (points.to(values) * (2 / frame) - 1).clamp(-edge, edge)[:, :, None]
    return F.grid_sample(values[:, None], where, mode="bilinear", align_corners=False)[:, 0, :, 0]
