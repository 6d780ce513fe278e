"""What SAMed and MSA share: SAM without a prompt, trained on pictures and their label maps."""

from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn
from torch.nn import functional as F

from common.frozen.sam import SamEmbedder
from common.label_maps import IGNORE
from common.rivals.adapters import add_adapters
from common.rivals.lora import add_lora

METHODS = {"SAMed": add_lora, "MSA": add_adapters}
DICE_SHARE = 0.8  # of the loss; the rest is cross-entropy (SAMed's, here for both)
_SMOOTH = 1e-5  # of Dice, as in SAMed's code


class FineTuned:
    """A SAM that answers without a prompt, with a score for the background and for each text."""

    def __init__(self, sam: Sam, method: str, texts: int, precision: str = "auto") -> None:
        """Changes `sam`, a frozen one, by the method, one of METHODS.

        With one text the foreground is SAM's single mask. With K texts the decoder gets K + 1 mask
        tokens, which all begin as the single-mask one. precision: as of `SamEmbedder`, of the
        encoder alone.
        """
        self.sam, self.embedder = sam, SamEmbedder(sam, precision)
        decoder, self.masks = sam.mask_decoder, 1
        if texts > 1:
            self.masks = texts + 1
            one_token_each(decoder, self.masks)
        METHODS[method](sam)
        # what no mask is made of
        decoder.iou_prediction_head.requires_grad_(False)
        decoder.output_hypernetworks_mlps[self.masks:].requires_grad_(False)

    def logits(self, picture: np.ndarray) -> Tensor:
        """Float32 (1 + K, 4h, 4w): the background's, and one of each of K texts.

        picture: uint8 (s, s, 3) from `squash`. With one text the background's are 0, so that the
        foreground's are logits of its probability.
        """
        sam = self.sam
        embedding = self.embedder.forward(picture[None])
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = sam.mask_decoder.predict_masks(
            embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)
        masks = masks[0, :self.masks]
        return masks if len(masks) > 1 else torch.cat([torch.zeros_like(masks), masks])

    @torch.no_grad()
    def segment(self, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The label map uint8 (H, W) of a picture as of `logits`: 0 background, k + 1 text k.

        size: (H, W) of the image itself.
        """
        full = F.interpolate(self.logits(picture)[None], size, mode="bilinear")[0]
        return full.argmax(0).to(torch.uint8).cpu().numpy()

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in SAM."""
        return {name: weight for name, weight in self.sam.named_parameters()
                if weight.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """For checkpoints: of what is trained alone."""
        return {name: weight.detach() for name, weight in self.trained().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError or RuntimeError if it is of another network."""
        if set(state) != set(self.trained()):
            raise ValueError("other weights are trained")
        self.sam.load_state_dict(state, strict=False)


def one_token_each(decoder: MaskDecoder, masks: int) -> None:
    """Gives the decoder so many mask tokens with hypernetworks, copies of the single-mask one."""
    token = decoder.mask_tokens.weight[:1].detach()
    decoder.mask_tokens = nn.Embedding.from_pretrained(token.repeat(masks, 1))
    head = decoder.output_hypernetworks_mlps[0]
    decoder.output_hypernetworks_mlps = nn.ModuleList(deepcopy(head) for _ in range(masks))
    decoder.num_mask_tokens = masks


def low_resolution(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map uint8 (H, W) at the size of the logits, each place the nearest label."""
    return np.array(Image.fromarray(label_map).resize(size[::-1], Image.Resampling.NEAREST))


def turned(square: np.ndarray, view: int) -> np.ndarray:
    """One of the eight views, 0 to 7, of a square (s, s, ...): quarter turns, flipped from 4 on."""
    square = np.rot90(square, view % 4)
    return np.ascontiguousarray(square[:, ::-1] if view >= 4 else square)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """SAMed's loss of one picture: cross-entropy + Dice, averaged over the classes in it.

    logits: (1 + K, h, w). target: uint8 (h, w), 0 background, k + 1 text k, 255 ignored. A class
    that the picture does not hold has no Dice: it is left to the cross-entropy.
    """
    known = target != IGNORE
    logits, labels = logits[:, known].T, target[known].long()  # (n, 1 + K), (n,)
    probability = logits.softmax(1)
    truth = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    both, areas = (probability * truth).sum(0), (probability**2).sum(0) + truth.sum(0)
    dice = 1 - (2 * both + _SMOOTH) / (areas + _SMOOTH)
    entropy = F.cross_entropy(logits, labels)
    return DICE_SHARE * dice[truth.any(0)].mean() + (1 - DICE_SHARE) * entropy
