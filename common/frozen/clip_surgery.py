"""Text-guided maps from a frozen CLIP: CLIP Surgery (Li et al., arXiv 2304.05653) on open_clip.

No module is changed: `surgery_tokens` walks the image tower's own layers and runs a second path
beside the first. All is float32 (torch lets a GPU's convolutions, here that of the patches, use
TF32): maps are made once per image, so speed matters little, and feature surgery takes the
difference of nearly equal similarities, of which half precision keeps too few digits.
"""

from collections.abc import Sequence
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.layers import attention, split_heads
from common.runtime import distributed
from common.runtime.errors import UserError
from common.runtime.workers import side_by_side

SURGERY_BLOCKS = 6  # attention blocks, counted from the last, that get the second path

TEMPLATES = (
    *open_clip.OPENAI_IMAGENET_TEMPLATES,  # 80 functions of the text
    "there is a {} in the scene.".format,
    "there is the {} in the scene.".format,
    "this is a {} in the scene.".format,
    "this is the {} in the scene.".format,
    "this is one {} in the scene.".format,
)


def _warn_of_cut(tokenizer: open_clip.SimpleTokenizer, text: str, room: int) -> None:
    """Says which words of a text CLIP does not see, of which it reads `room` tokens."""
    tokens = tokenizer.encode(text)
    if len(tokens) > room:
        print(f"CLIP reads only the beginning of a long text; it does not see: "
              f"{tokenizer.decode(tokens[room:]).strip()}")


@torch.no_grad()
def encode_texts(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer,
                 texts: Sequence[str]) -> Tensor:
    """One L2-normalised feature per text, the mean of its 85 normalised prompts: (K, D) float32."""
    device = model.visual.conv1.weight.device
    encoded = []
    quiet = len(texts) < 2 or distributed.RANK > 0
    for text in tqdm(texts, "encoding texts", leave=False, disable=quiet):
        prompts = tokenizer([template(text) for template in TEMPLATES]).to(device)
        encoded.append(F.normalize(model.encode_text(prompts), dim=-1).mean(dim=0))
    return F.normalize(torch.stack(encoded), dim=-1)


def surgery_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """Token features of the image tower after architecture surgery (Li et al., arXiv 2304.05653).

    The last 6 blocks also compute attention with v in place of q and k. The second path starts with
    the input of the first of these blocks and adds these outputs. It has no MLPs and never changes
    the first path.

    visual: the image tower of a plain ViT `CLIP` of open_clip. images: (B, 3, S, S), normalised, S
    any multiple of the patch size. Returns (B, 1 + N, D), L2-normalised per token: the class token,
    of the first path, then the N = (S / patch)^2 patches row by row, of the second.
    Lets gradients through, for the training of the stand-in.
    """
    patches = visual.conv1(images)
    grid = patches.shape[-2:]
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], dim=1)
    x = visual.ln_pre(x + _position_embedding(visual, grid))

    blocks = visual.transformer.resblocks
    first = max(len(blocks) - SURGERY_BLOCKS, 0)
    for index, block in enumerate(blocks):
        q, k, v = _project(block.attn, block.ln_1(x))
        if index == first:
            second = x
        if index >= first:
            second = second + block.attn.out_proj(attention(v, v, v))
        x = x + block.attn.out_proj(attention(q, k, v))
        x = x + block.mlp(block.ln_2(x))

    x = torch.cat([x[:, :1], second[:, 1:]], dim=1)
    return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)


def _position_embedding(visual: nn.Module, grid: tuple[int, int]) -> Tensor:
    """(1 + N, width) for any grid: the patches' part resized bilinearly, the class token's kept."""
    position = visual.positional_embedding
    side = int((len(position) - 1) ** 0.5)
    if grid == (side, side):
        return position
    patches = position[1:].T.unflatten(1, (side, side))[None]
    patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
    return torch.cat([position[:1], patches[0].flatten(1).T])


def _project(layer: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of `x` (B, L, width), each (B, heads, L, width / heads)."""
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    return tuple(split_heads(part, layer.num_heads) for part in qkv.chunk(3, dim=-1))


def feature_surgery(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Similarity with what all classes share taken out (feature surgery, same paper).

    image_features: (B, 1 + N, D), class token first. text_features: (K, D), K > 1. Both are
    L2-normalised. Returns (B, 1 + N, K). Each image is weighted by its own class token.
    """
    similarity = image_features @ text_features.T
    weight = (2 * similarity[:, :1]).softmax(dim=-1)
    # The paper takes the classes' mean from the products image * text before it sums them over D.
    # Summing first, as here, gives the same and never builds (B, 1 + N, K, D).
    weighted = similarity * weight / weight.mean(dim=-1, keepdim=True)
    return weighted - weighted.mean(dim=-1, keepdim=True)


def single_text_similarity(image_features: Tensor, text_feature: Tensor,
                           empty_feature: Tensor) -> Tensor:
    """The same for one text, with the empty string's feature as what is shared (same paper).

    image_features: (B, 1 + N, D). text_feature, empty_feature: (1, D). Returns (B, 1 + N, 1).
    """
    return image_features @ (text_feature - empty_feature).T


def min_max(similarity: Tensor) -> Tensor:
    """(B, N, K) scaled to [0, 1] over the N tokens, per image and class.

    Zeros where all tokens are equal.
    """
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(torch.finfo(similarity.dtype).tiny)


class ClipSurgery:
    """Maps of a fixed set of texts, which are encoded once, here.

    image_size: CLIP's input size in pixels. Raises UserError unless it is a multiple of the patch
    size.
    """

    def __init__(self, model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, image_size: int,
                 texts: Sequence[str]) -> None:
        self.visual, self.image_size = model.visual, image_size
        self.patch = model.visual.conv1.kernel_size[0]
        if image_size % self.patch:
            raise UserError(f"CLIP_SIZE={image_size} is not a multiple of CLIP's patch size "
                            f"{self.patch}: set {(image_size // self.patch + 1) * self.patch}")
        longest = max(len(tokenizer.encode(template(""))) for template in TEMPLATES)
        for text in texts:  # a prompt has a start and an end token besides
            _warn_of_cut(tokenizer, text, model.context_length - 2 - longest)
        self.text_features = encode_texts(model, tokenizer, texts)  # (K, D)
        self.empty_feature = None  # (1, D), needed where there is one text
        if len(texts) == 1:
            self.empty_feature = encode_texts(model, tokenizer, [""])
        mean = getattr(self.visual, "image_mean", open_clip.OPENAI_DATASET_MEAN)
        std = getattr(self.visual, "image_std", open_clip.OPENAI_DATASET_STD)
        self.mean = self.text_features.new_tensor(mean).view(3, 1, 1)
        self.std = self.text_features.new_tensor(std).view(3, 1, 1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """One map per image and text: float32 (B, K, gh, gw) in [0, 1], on CLIP's device.

        A cell is one of CLIP's patches. images: (B, 3, S, S) RGB, uint8 or float in [0, 1],
        squashed to a square of any size S. They are resized here to CLIP's input size (bilinear,
        antialiased) and normalised with CLIP's mean and standard deviation.
        """
        images = images.to(self.mean.device).float() / (255 if images.dtype == torch.uint8 else 1)
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:  # not every device has a kernel for it
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        images = (images - self.mean) / self.std
        at_a_time = 1 if images.device.type == "cpu" else len(images)
        tokens = torch.cat(side_by_side(partial(surgery_tokens, self.visual),
                                        images.split(at_a_time), images.device))
        if self.empty_feature is None:
            similarity = feature_surgery(tokens, self.text_features)
        else:
            similarity = single_text_similarity(tokens, self.text_features, self.empty_feature)
        side = self.image_size // self.patch
        return min_max(similarity[:, 1:]).transpose(1, 2).unflatten(2, (side, side))
