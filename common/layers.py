"""Layers and small operations that more than one network needs and torch does not have."""

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place, (B, C, h, w) to the same shape.

    It is SAM's LayerNorm2d with torch's own kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_block(before: int, after: int, kernel: int = 3) -> nn.Sequential:
    """(B, before, h, w) to (B, after, h, w): convolution, norm, GELU.

    The norm keeps places visible where M, and so F * M, is small.
    """
    convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, ChannelNorm(after), nn.GELU())


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """Queries, keys or values (B, N, heads * d) to (B, heads, N, d)."""
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(attended: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads * d): what `split_heads` undoes."""
    return attended.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention after the projections: (B, heads, N, d) each, to (B, N, heads * d)."""
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def interval_overlaps(edges: np.ndarray, other_edges: np.ndarray) -> np.ndarray:
    """How much of a line the intervals of one partition share with those of another.

    edges: (m + 1,) and other_edges: (n + 1,), rising, in the same unit. Returns (m, n), in that
    unit and in their dtype.
    """
    starts, ends = edges[:-1, None], edges[1:, None]
    shared = np.minimum(ends, other_edges[1:]) - np.maximum(starts, other_edges[:-1])
    return shared.clip(min=0)
