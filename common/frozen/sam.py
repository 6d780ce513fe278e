"""The frozen SAM: its image encoder in batches, and its decoder in batches of different images.

Every parameter comes from segment_anything (Kirillov et al., "Segment Anything", ICCV 2023), and
what is computed here equals its `SamPredictor`; only the batching is ours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.utils.transforms import ResizeLongestSide

from common.frozen.decoder import ImageSide, SingleMaskDecoder
from common.frozen.encoder import encode
from common.runtime.errors import UserError
from common.runtime.workers import side_by_side


def squash(image: np.ndarray, sam_size: int, frame: int = 800) -> np.ndarray:
    """The picture that SAM sees: uint8 (H, W, 3) to uint8 (sam_size, sam_size, 3), without padding.

    First squashed to frame x frame (AlignSAM, Eq. 3), then taken to `sam_size` by SAM's own
    transform. For a SAM smaller than the frame it is resized only once, so that nothing is blurred
    twice. PIL's bilinear filter.
    """
    side = frame if sam_size >= frame else sam_size
    squashed = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return ResizeLongestSide(sam_size).apply_image(np.asarray(squashed))


class SamEmbedder:
    """SAM's image encoder on batches of squashed pictures.

    It computes what `SamPredictor.set_image` computes one by one. precision: "fp32", "bf16"
    (autocast), or "auto": bf16 where the hardware computes in it, fp32 elsewhere.
    """

    def __init__(self, sam: Sam, precision: str = "auto") -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"PRECISION={precision} is unknown: set auto, fp32 or bf16")
        self.sam = sam
        self.bf16 = precision == "bf16" or precision == "auto" and has_bf16(sam.device)

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> torch.Tensor:
        """F, float32 (B, C, h, w) on SAM's device.

        images: uint8 (B, s, s, 3) from `squash`, s = SAM's input size.
        """
        at_a_time = for_one_core(self.sam) if self.sam.device.type == "cpu" else len(images)
        parts = [images[start:start + at_a_time] for start in range(0, len(images), at_a_time)]
        return torch.cat(side_by_side(self.forward, parts, self.sam.device))

    def forward(self, images: np.ndarray) -> torch.Tensor:
        """`embed` of all images at a time, with gradients: for what is trained in the encoder."""
        encoder = self.sam.image_encoder
        pixels = torch.as_tensor(images, device=self.sam.device).permute(0, 3, 1, 2)
        with torch.autocast(self.sam.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = self.sam.preprocess(pixels)
            if isinstance(encoder, ImageEncoderViT):
                return encode(encoder, pixels).float()
            return encoder(pixels).float()


def for_one_core(sam: Sam) -> int:
    """Images that a CPU's core computes at a time: more would not fit into its cache."""
    height, width = sam.prompt_encoder.image_embedding_size
    return max(1, 8 * 24 * 24 // (height * width))


def has_bf16(device: torch.device) -> bool:
    """Whether `device` itself computes in bfloat16; torch emulates it elsewhere, which is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return False


class BatchedPrompter:
    """SAM's prompt encoder and mask decoder on different images, each with its own points.

    The decoder's own `predict_masks` repeats one image for many prompts; this is the same
    computation with one image per row. Of the four mask tokens it decodes only the single-mask one,
    so that it equals `SamPredictor.predict(multimask_output=False)` image by image.
    """

    def __init__(self, sam: Sam, frame: int = 800, max_batch: int | None = None) -> None:
        """frame: side in pixels of the square that points lie in.

        max_batch: images decoded at a time; by default, as many as suit the device.
        """
        self.sam, self.frame = sam, frame
        # as ResizeLongestSide.apply_coords on a square
        self.scale = sam.image_encoder.img_size / frame
        self.max_batch = max_batch or (64 if sam.device.type == "cuda" else for_one_core(sam))
        self.decoder = SingleMaskDecoder(sam)

    def prepare(self, embeddings: torch.Tensor) -> list[ImageSide]:
        """What `decode` needs of embeddings (B, C, h, w), of any float type on any device.

        Made once per episode. It takes about two and a half times the embeddings' float32 size on
        SAM's device: keys, and three projections of half the width.
        """
        chunks = embeddings.split(self.max_batch)
        return [self.decoder.prepare(chunk.to(self.sam.device).float()) for chunk in chunks]

    @torch.no_grad()  # not inference_mode: the states made from these masks go through autograd
    def decode(self, prepared: list[ImageSide], points: torch.Tensor,
               labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits float32 (B, 4h, 4w) and predicted IoU float32 (B,), on SAM's device.

        prepared: `prepare` of the B images. points: (B, N, 2) as (x, y) in pixels of the frame.
        labels: (B, N), 1 foreground, 0 background, -1 SAM's "not a point", a token of its own.
        Points and labels may lie on any device.
        """
        device = self.sam.device
        points = (points.to(device).float() * self.scale).split(self.max_batch)
        labels = labels.to(device).split(self.max_batch)

        def answer(part: tuple[ImageSide, torch.Tensor, torch.Tensor]) -> tuple:
            image, xy, label = part
            sparse, _ = self.sam.prompt_encoder((xy, label), boxes=None, masks=None)
            return self.decoder.decode(image, sparse)

        answers = side_by_side(answer, zip(prepared, points, labels, strict=True), device)
        logits, iou = zip(*answers)
        return torch.cat(logits), torch.cat(iou)


def probability_grid(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The M that multiplies F (Eqs. 4 and 11): logits (B, H', W') to probabilities (B, h, w).

    Sigmoid first, so that a cell averages the probabilities under it.
    """
    return F.adaptive_avg_pool2d(logits.sigmoid(), size)


def full_masks(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits (H', W') to a bool mask (H, W) of the image's own size.

    Bilinear, then SAM's threshold of 0.
    """
    return F.interpolate(logits[None, None], size, mode="bilinear")[0, 0] > Sam.mask_threshold
