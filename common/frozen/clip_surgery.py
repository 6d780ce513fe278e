"""Text-guided maps from a frozen CLIP: CLIP Surgery (Li et al., arXiv 2304.05653) on open_clip's `CLIP`.

No module is changed: `surgery_tokens` walks the image tower's own layers and runs a second path beside the
first. All is float32: maps are made once per image, so speed matters little, and feature surgery takes the
difference of nearly equal similarities, of which half precision keeps too few digits.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.runtime import distributed
from common.runtime.errors import UserError
from common.runtime.files import require_intact

STANDIN = Path(__file__).parents[1] / "standin"
SURGERY_BLOCKS = 6  # attention blocks, counted from the last, that get the second path
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}  # no weights; only in OpenAI's own files

TEMPLATES = (
    *open_clip.OPENAI_IMAGENET_TEMPLATES,  # 80 functions of the text
    "there is a {} in the scene.".format,
    "there is the {} in the scene.".format,
    "this is a {} in the scene.".format,
    "this is the {} in the scene.".format,
    "this is one {} in the scene.".format,
)


def load_clip(name: str, device: str | torch.device) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """CLIP in eval mode, float32, without gradients, and its tokenizer.

    `name` is "demo" (the small stand-in of this repository), "<open_clip model>/<pretrained tag>" such as
    "ViT-B-16-quickgelu/openai", which is downloaded, or "<open_clip model>/<checkpoint file>". Most files do
    not tell which activation they were trained with: name the model, "-quickgelu" or not, accordingly.

    Raises UserError for an unknown model or tag, a model that is no plain CLIP ViT, QuickGELU weights under a
    model without it, and weights that are missing, damaged, unreadable, not finite or of another shape.
    """
    model_name, _, source = name.partition("/")
    tag = {}
    if name == "demo":
        config = json.loads(_existing(STANDIN / "clip_config.json", "restore common/standin").read_text())
        weights = _existing(STANDIN / "clip.safetensors", "restore common/standin")
    else:
        config = _model_config(model_name)
        tag = open_clip.get_pretrained_cfg(model_name, source)
        if tag.get("quick_gelu"):
            _require_quick_gelu(name, config)
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        mend = f"name a file, or a pretrained tag that open_clip has for {model_name} ({tags})"
        weights = _download(name, tag) if tag else _existing(Path(source).expanduser(), mend)

    state = _read_weights(weights)
    if OPENAI_KEYS & state.keys():
        _require_quick_gelu(name, config)
    model = open_clip.CLIP(**config)
    try:
        model.load_state_dict({key: value for key, value in state.items() if key not in OPENAI_KEYS})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"CLIP's file '{weights}' does not fit '{name}' ({reason}): name the open_clip model "
                        "that it was made with.") from error
    model.visual.image_mean = tag.get("mean", open_clip.OPENAI_DATASET_MEAN)  # where open_clip keeps them
    model.visual.image_std = tag.get("std", open_clip.OPENAI_DATASET_STD)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return model.eval().requires_grad_(False).to(device), tokenizer


def _existing(file: Path, mend: str) -> Path:
    if not file.is_file():
        raise UserError(f"CLIP's file '{file}' does not exist: {mend}.")
    return file


def _model_config(model_name: str) -> dict:
    configs = {known: open_clip.get_model_config(known) for known in open_clip.list_models()}
    if model_name in configs and _is_plain(configs[model_name]):
        return configs[model_name]
    usable = ", ".join(known for known, config in configs.items()
                       if _is_plain(config) and open_clip.list_pretrained_tags_by_model(known))
    fault = "is not a plain CLIP ViT" if model_name in configs else "is not a model of open_clip"
    raise UserError(f"CLIP: '{model_name}' {fault}: write '<model>/<tag or file>' with one of {usable}.")


def _is_plain(config: dict) -> bool:
    """Whether it is a ViT with a class token and CLIP's own text tower, all that is written out below."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return (set(vision) <= {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
            and set(text) <= {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
            and isinstance(vision["layers"], int))  # a list is a ResNet's


def _require_quick_gelu(name: str, config: dict) -> None:
    """open_clip only warns of this, and nothing would look wrong but the maps."""
    if not config.get("quick_gelu"):
        model_name, _, source = name.partition("/")
        raise UserError(f"CLIP '{name}': these weights were trained with QuickGELU, which {model_name} lacks:"
                        f" write '{model_name}-quickgelu/{source}'.")


def _download(name: str, tag: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # urllib, the hub's client and its HTTP library each raise their own kinds
        raise UserError(f"CLIP '{name}' could not be downloaded ({repr(error)[:200]}): check the network, or "
                        "fetch the weights elsewhere and write '<model>/<file>'.") from error


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            require_intact(file)
            state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code from the file
    except Exception as error:  # zip, pickle and safetensors each raise their own kinds
        mend = "fetch it again"
        if "TorchScript" in str(error):  # as OpenAI ships CLIP
            mend = ("if you trust it, extract the weights with "
                    "torch.save(torch.jit.load('in.pt', 'cpu').state_dict(), 'out.pt') and name that file")
        reason = repr(error)[:200]
        raise UserError(f"CLIP's file '{file}' cannot be read as weights ({reason}): {mend}.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not all(value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor)):
        raise UserError(f"CLIP's file '{file}' holds NaN or infinite values: fetch it again.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


@torch.no_grad()
def encode_texts(model: open_clip.CLIP, tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """One L2-normalised feature per text, the mean of its 85 normalised prompts: (K, D) float32."""
    device = model.visual.conv1.weight.device
    features = []
    for text in tqdm(texts, "encoding texts", leave=False, disable=len(texts) < 2 or distributed.RANK > 0):
        prompts = tokenizer([template(text) for template in TEMPLATES]).to(device)
        features.append(F.normalize(model.encode_text(prompts), dim=-1).mean(dim=0))
    return F.normalize(torch.stack(features), dim=-1)


def surgery_tokens(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Token features of the image tower after architecture surgery (Li et al., arXiv 2304.05653).

    Each of the last 6 blocks also attends with v in place of q and k. The second path starts as the input of
    the first of them and adds up those outputs, without MLPs; it reads the first path and never feeds back.

    `visual` is the image tower of a plain ViT `CLIP` of open_clip; images (B, 3, S, S) are normalised, S any
    multiple of the patch size. Returns (B, 1 + N, D), L2-normalised per token: the class token, of the first
    path, then the N = (S / patch)^2 patches row by row, of the second.
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
        q, k, v = _heads(block.attn, block.ln_1(x))
        if index == first:
            second = x
        if index >= first:
            second = second + _attend(block.attn, v, v, v)
        x = x + _attend(block.attn, q, k, v)
        x = x + block.mlp(block.ln_2(x))

    x = torch.cat([x[:, :1], second[:, 1:]], dim=1)
    return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)


def _position_embedding(visual: nn.Module, grid: tuple[int, int]) -> torch.Tensor:
    """(1 + N, width) for any grid: the patches' part resized bilinearly, the class token's kept."""
    position = visual.positional_embedding
    side = int((len(position) - 1) ** 0.5)
    if grid == (side, side):
        return position
    patches = position[1:].T.unflatten(1, (side, side))[None]
    patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
    return torch.cat([position[:1], patches[0].flatten(1).T])


def _heads(attention: nn.MultiheadAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of `x` (B, L, width), each (B, heads, L, width / heads)."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = (attention.num_heads, -1)
    return tuple(part.unflatten(2, heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))


def _attend(attention: nn.MultiheadAttention, *qkv: torch.Tensor) -> torch.Tensor:
    return attention.out_proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def feature_surgery(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Similarity with what all classes share taken out (Li et al., arXiv 2304.05653, feature surgery).

    image_features (B, 1 + N, D), class token first, and text_features (K, D), K > 1, both L2-normalised;
    returns (B, 1 + N, K). Each image is weighted by its own class token.
    """
    similarity = image_features @ text_features.T
    weight = (2 * similarity[:, :1]).softmax(dim=-1)
    # The paper takes the classes' mean from the products image * text before it sums them over D. Summing
    # first, as here, gives the same and never builds (B, 1 + N, K, D).
    weighted = similarity * weight / weight.mean(dim=-1, keepdim=True)
    return weighted - weighted.mean(dim=-1, keepdim=True)


def single_text_similarity(image_features: torch.Tensor, text_feature: torch.Tensor,
                           empty_feature: torch.Tensor) -> torch.Tensor:
    """The same for one text, with the empty string's feature as what is shared (Li et al., arXiv 2304.05653).

    image_features (B, 1 + N, D), text_feature and empty_feature (1, D); returns (B, 1 + N, 1).
    """
    return image_features @ (text_feature - empty_feature).T


def min_max(similarity: torch.Tensor) -> torch.Tensor:
    """(B, N, K) scaled to [0, 1] over the N tokens, per image and class; zeros where all tokens are equal."""
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(torch.finfo(similarity.dtype).tiny)


class ClipSurgery:
    """Maps of a fixed set of texts, which are encoded once, here.

    `image_size` is CLIP's input size in pixels. Raises UserError unless it is a multiple of the patch size.
    """

    def __init__(self, model: open_clip.CLIP, tokenizer, image_size: int, texts: Sequence[str]):
        self.visual, self.image_size, self.patch = model.visual, image_size, model.visual.conv1.kernel_size[0]
        if image_size % self.patch:
            raise UserError(f"CLIP's input size of {image_size} pixels is not a multiple of its patch size "
                            f"{self.patch}: use {(image_size // self.patch + 1) * self.patch}.")
        self.text_features = encode_texts(model, tokenizer, texts)  # (K, D)
        self.empty_feature = encode_texts(model, tokenizer, [""]) if len(texts) == 1 else None  # (1, D)
        mean = getattr(self.visual, "image_mean", open_clip.OPENAI_DATASET_MEAN)
        std = getattr(self.visual, "image_std", open_clip.OPENAI_DATASET_STD)
        self.mean = self.text_features.new_tensor(mean).view(3, 1, 1)
        self.std = self.text_features.new_tensor(std).view(3, 1, 1)

    @torch.no_grad()
    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """One map per image and text, (B, K, gh, gw) float32 in [0, 1], a cell per patch, on CLIP's device.

        images are (B, 3, S, S) RGB, uint8 or float in [0, 1], squashed to a square of any size S. They are
        resized here to CLIP's input size (bilinear, antialiased) and normalised with CLIP's mean and std.
        """
        images = images.to(self.mean.device).float() / (255 if images.dtype == torch.uint8 else 1)
        images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        tokens = surgery_tokens(self.visual, (images - self.mean) / self.std)
        if self.empty_feature is None:
            similarity = feature_surgery(tokens, self.text_features)
        else:
            similarity = single_text_similarity(tokens, self.text_features, self.empty_feature)
        side = self.image_size // self.patch
        return min_max(similarity[:, 1:]).transpose(1, 2).unflatten(2, (side, side))
