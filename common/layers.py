"""The one layer that both the SRM and the agent need and torch does not have."""

from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place, (B, C, h, w) to the same shape: SAM's LayerNorm2d, torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
