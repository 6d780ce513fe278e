"""SAMed: low-rank updates (LoRA) of the image encoder's weights, and a trained mask decoder.

Zhang and Liu, "Customized Segment Anything Model for Medical Image Segmentation", arXiv 2304.13785.
A weight W of the encoder becomes W + B A, where B and A have RANK columns and rows. W stays frozen,
B starts at zero, so at first the embedding is SAM's own.
"""

import math

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK = 4  # the authors'


class LowRank(nn.Module):
    """Adds B A to some rows of a weight; a convolution's weight counts as (out, in * k * k)."""

    def __init__(self, weight: Tensor, parts: list[Tensor]) -> None:
        """parts: the rows of each product, int64 (n,); rows in none of them are left alone."""
        super().__init__()
        self.parts = [rows.to(weight.device) for rows in parts]
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for rows in self.parts:  # drawn on the CPU: a seed means the same on every device
            a = torch.empty(RANK, weight[0].numel())
            self.a.append(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))  # nn.Linear's own
            self.b.append(torch.zeros(len(rows), RANK))
        self.to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        update = torch.zeros_like(weight).flatten(1)
        with torch.autocast(weight.device.type, enabled=False):  # what is merged is the same
            for rows, a, b in zip(self.parts, self.a, self.b):
                update = update.index_copy(0, rows, b @ a)
        return weight + update.view_as(weight)


def adapted_layers(encoder: nn.Module) -> list[tuple[nn.Module, list[Tensor]]]:
    """The layers of an image encoder that get updates, and which rows of their weights.

    Where there is attention these are the query's and the value's rows of every qkv layer, as in
    SAMed. The stand-in has none: all of its 1 x 1 and 3 x 3 convolutions.
    """
    found = []
    for module in encoder.modules():
        if not hasattr(module, "qkv"):
            continue
        rows = torch.arange(module.qkv.out_features)
        if hasattr(module, "key_dim"):  # MobileSAM's: q, k and v of one head after the other
            sizes = [module.key_dim, module.key_dim, module.val_dim]
            query, _, value = rows.view(module.num_heads, -1).split(sizes, 1)
        else:
            query, _, value = rows.chunk(3)
        found.append((module.qkv, [query.flatten(), value.flatten()]))
    if found:
        return found
    return [(module, [torch.arange(module.out_channels)]) for module in encoder.modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size in ((1, 1), (3, 3))]


def add_lora(sam: Sam) -> None:
    """Makes a frozen SAM a SAMed: what is to be trained requires gradients from now on.

    These are the updates, the prompt encoder's embedding of "no mask", and the mask decoder.
    """
    for layer, parts in adapted_layers(sam.image_encoder):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, parts))
    sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    sam.mask_decoder.requires_grad_(True)


def merge(sam: Sam) -> None:
    """Adds the updates to the weights for good: the encoder has its own layers alone again."""
    for layer in list(sam.image_encoder.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
