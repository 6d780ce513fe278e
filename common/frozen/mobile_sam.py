"""MobileSAM: SAM's prompt encoder and mask decoder behind a small image encoder.

Zhang et al., "Faster Segment Anything", arXiv 2306.14289. A TinyViT of 6 million parameters was
taught to give the embeddings of SAM's ViT-H, so all that reads an embedding works as it is. The
layers are timm's and segment_anything's. The authors' checkpoint names them differently.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

WIDTH = 256  # channels of the embedding, as of every SAM
MARK = "image_encoder.patch_embed.seq.0.c.weight"  # of the checkpoints: no other SAM has this key

_RENAMED = (  # what is called otherwise in the authors' checkpoint, and timm's name for it
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"\.c\.", ".conv."),
    # the authors end a stage with the downsampling, timm begins the next one with it
    (r"layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"layers\.(\d)\.blocks\.", r"stages.\1.blocks."))


class MobileEncoder(nn.Module):
    """TinyViT and SAM's neck.

    Images (B, 3, 1024, 1024) float, normalised as for SAM, to embeddings (B, 256, 64, 64).
    """

    img_size = 1024  # Sam reads this name

    def __init__(self) -> None:
        super().__init__()
        # imported here because timm takes a third of a second, which no other SAM needs
        from timm.models.tiny_vit import TinyVit

        tiny_vit = TinyVit(num_classes=0, embed_dims=(64, 128, 160, 320), depths=(2, 2, 6, 2),
                           num_heads=(2, 4, 5, 10), window_sizes=(7, 7, 14, 7), drop_path_rate=0.0)
        self.patch_embed, self.stages = tiny_vit.patch_embed, tiny_vit.stages
        self.stages[3].downsample.conv2.conv.stride = (1, 1)  # so that the map stays 64 x 64
        for module in self.stages.modules():
            if hasattr(module, "attention_biases"):
                module.get_attention_biases = partial(_with_batch, module.get_attention_biases)
        self.neck = nn.Sequential(
            nn.Conv2d(320, WIDTH, 1, bias=False), LayerNorm2d(WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), LayerNorm2d(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.stages(self.patch_embed(images)))


def _with_batch(get_biases: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
    """timm's (n, N, N) as (1, n, N, N): a CPU's fused attention takes no bias of three axes."""
    return get_biases(device)[None]


def build_mobile_sam() -> Sam:
    """MobileSAM with random weights. Prompt encoder and mask decoder are built as every SAM's."""
    side = MobileEncoder.img_size // 16
    return Sam(
        MobileEncoder(),
        PromptEncoder(WIDTH, (side, side), (MobileEncoder.img_size,) * 2, mask_in_chans=16),
        MaskDecoder(transformer_dim=WIDTH, transformer=TwoWayTransformer(2, WIDTH, 8, 2048)))


def own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under the names of `build_mobile_sam`.

    Their classifier, which embeds nothing, is left out.
    """
    renamed = {}
    for key, value in weights.items():
        if key.startswith(("image_encoder.norm_head.", "image_encoder.head.")):
            continue
        if key.startswith("image_encoder."):
            for theirs, ours in _RENAMED:
                key = re.sub(theirs, ours, key)
        renamed[key] = value
    return renamed
