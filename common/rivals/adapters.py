"""MSA: small trained layers between those of a frozen SAM.

Wu et al., "Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation",
arXiv 2304.12620. An adapter is a linear layer down to a quarter of the width, GELU, and a linear
layer up. The layer up starts at zero, so at first the embedding is SAM's own.
"""

from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

NARROWER = 4  # times that an adapter is narrower inside
BESIDE_SHARE = 0.5  # of the adapter beside an MLP


class Adapter(nn.Module):
    """up(GELU(down(x))), on the channels of each place; the same shape as x."""

    def __init__(self, width: int, axis: int = -1, skip: bool = True) -> None:
        """axis: of the channels. skip: whether x is added to the result."""
        super().__init__()
        self.axis, self.skip = axis, skip
        self.down = nn.Linear(width, width // NARROWER)
        self.up = nn.Linear(width // NARROWER, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.gelu(self.down(x.movedim(self.axis, -1)))).movedim(-1, self.axis)
        return x + y if self.skip else y


class Beside(nn.Module):
    """An MLP, and an adapter without a skip connection on the same input."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, Adapter(width, skip=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + BESIDE_SHARE * self.adapter(x)


def after(layer: nn.Linear) -> nn.Sequential:
    """A linear layer, the last one of an attention, with an adapter behind it."""
    return nn.Sequential(layer, Adapter(layer.out_features))


def add_to_encoder(encoder: nn.Module) -> None:
    """Two adapters in every transformer block: after the attention, and beside the MLP.

    The stand-in has no such blocks: one after each of its residual blocks.
    """
    blocks = [module for module in encoder.modules()
              if hasattr(module, "attn") and hasattr(module, "mlp")]
    for block in blocks:
        block.attn.proj = after(block.attn.proj)
        block.mlp = Beside(block.mlp, block.attn.qkv.in_features)
    if blocks:
        return
    from common.standin.model import Residual  # no real run needs the stand-in

    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Residual):
                adapter = Adapter(child.body[0].in_channels, axis=1)
                setattr(parent, name, nn.Sequential(child, adapter))


def add_to_decoder(decoder: nn.Module) -> None:
    """Three adapters in each block of the mask decoder.

    They stand after the tokens' attention to the image, beside the MLP, and after the image's
    attention to the tokens, as in the paper. Its adapters also read the prompt; here there is none.
    The authors' code has no adapters in the decoder.
    """
    for block in decoder.transformer.layers:
        to_image, to_tokens = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        to_image.out_proj, to_tokens.out_proj = after(to_image.out_proj), after(to_tokens.out_proj)
        block.mlp = Beside(block.mlp, block.norm3.normalized_shape[0])


def add_adapters(sam: Sam) -> None:
    """Makes a frozen SAM an MSA: what is to be trained requires gradients from now on.

    These are the adapters (the paper's) and the mask decoder's own weights (the authors' code's).
    """
    add_to_encoder(sam.image_encoder)
    add_to_decoder(sam.mask_decoder)
    sam.mask_decoder.requires_grad_(True)
    sam.to(sam.device)
