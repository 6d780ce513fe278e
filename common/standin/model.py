"""The SAM stand-in: segment_anything's prompt encoder and mask decoder on a small encoder.

A plain ViT with global attention is too slow on a CPU at this size. The convolutional encoder here
embeds an image in a few milliseconds. All that follows the embedding is code of segment_anything,
only narrower, so the stand-in is prompted in the same way as SAM.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn
from torch.nn import functional as F

from common.runtime.errors import UserError
from common.runtime.reading import reading

WEIGHTS = Path(__file__).with_name("sam.safetensors")
IMAGE_SIZE = 256  # pixels a side that the stand-in sees; SAM sees 1024
STRIDE = 8  # pixels a side of one cell of the embedding, which is a 32 x 32 grid
WIDTH = 64  # channels of the embedding; SAM has 256
FINE_WIDTH = 16  # channels of the upscaled embedding; SAM has 32, an eighth of its width


class Residual(nn.Module):
    """Two convolutions with a skip connection, (B, C, h, w) to the same shape."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class GlobalContext(nn.Module):
    """Adds a projection of the image's mean feature to every cell, (B, C, h, w) to the same shape.

    So a cell can tell what is common in the scene.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(x.mean((2, 3)))[:, :, None, None]


def down(before: int, after: int) -> nn.Sequential:
    """Halves the resolution: (B, before, h, w) to (B, after, h / 2, w / 2)."""
    convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class ImageEncoder(nn.Module):
    """Images (B, 3, 256, 256) float, normalised as for SAM, to embeddings (B, 64, 32, 32)."""

    img_size = IMAGE_SIZE  # Sam reads this name

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(down(3, 24), down(24, 48), Residual(48))  # to 64 x 64
        self.middle = nn.Sequential(down(48, 96), Residual(96), Residual(96))  # to 32 x 32
        self.deep = nn.Sequential(  # to 16 x 16
            down(96, 192), Residual(192), GlobalContext(192),
            Residual(192, dilation=2), GlobalContext(192),
            Residual(192))
        self.lift = nn.Conv2d(192, 96, 1)
        # the four 64 x 64 features that one cell covers, so that outlines get finer than a cell
        self.detail = nn.Conv2d(48 * 4, 96, 1)
        self.join = nn.Sequential(GlobalContext(96), Residual(96))
        self.neck = nn.Sequential(
            nn.Conv2d(96, WIDTH, 1, bias=False),
            LayerNorm2d(WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            LayerNorm2d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.middle(fine)
        deep = self.lift(self.deep(middle))
        deep = F.interpolate(deep, scale_factor=2.0, mode="nearest")
        detail = self.detail(F.pixel_unshuffle(fine, 2))
        return self.neck(self.join(F.relu(middle + deep + detail)))


def new_sam() -> Sam:
    """A stand-in with fresh weights."""
    grid = IMAGE_SIZE // STRIDE
    sam = Sam(
        image_encoder=ImageEncoder(),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH, image_embedding_size=(grid, grid),
            input_image_size=(IMAGE_SIZE, IMAGE_SIZE), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer_dim=WIDTH,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=4 * WIDTH,
                                          num_heads=4),
            iou_head_depth=3, iou_head_hidden_dim=WIDTH))

    # the decoder's last layers are wider than an eighth of so narrow an embedding: they draw the
    # outlines
    decoder = sam.mask_decoder
    decoder.output_upscaling = nn.Sequential(
        nn.ConvTranspose2d(WIDTH, 2 * FINE_WIDTH, kernel_size=2, stride=2),
        LayerNorm2d(2 * FINE_WIDTH),
        nn.GELU(),
        nn.ConvTranspose2d(2 * FINE_WIDTH, FINE_WIDTH, kernel_size=2, stride=2),
        nn.GELU())
    decoder.output_hypernetworks_mlps = nn.ModuleList(
        MLP(WIDTH, WIDTH, FINE_WIDTH, 3) for _ in range(decoder.num_mask_tokens))
    return sam


def build_sam() -> Sam:
    """The trained stand-in, float32 and in evaluation mode.

    Raises UserError where its weights are missing or damaged.
    """
    sam, mend = new_sam(), "restore it from the repository, or train it with `make standin`"
    try:
        with reading(WEIGHTS, mend):
            weights = load_file(WEIGHTS)
        sam.load_state_dict({name: value.float() for name, value in weights.items()})
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{WEIGHTS} is damaged or another model's ({type(error).__name__}): "
                        f"{mend}") from error
    return sam.eval()
