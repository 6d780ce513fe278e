"""Loading CLIP: open_clip's pretrained weights, a file, or the stand-in; plain ViTs only."""

import json
from pathlib import Path

import open_clip
import safetensors.torch
import torch

from common.runtime.errors import UserError
from common.runtime.files import expanded, require_intact
from common.runtime.reading import reading

STANDIN = Path(__file__).parents[1] / "standin"
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's files: no weights


def load_clip(name: str,
              device: str | torch.device) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """CLIP in eval mode, float32, without gradients, and its tokenizer.

    name: "demo" (the small stand-in of this repository), "<open_clip model>/<pretrained tag>" such
    as "ViT-B-16-quickgelu/openai", which is downloaded, or "<open_clip model>/<checkpoint file>".
    Most files do not tell which activation they were trained with: name the model, "-quickgelu" or
    not, accordingly. A file's pictures are normalised as OpenAI's were.

    Raises UserError for an unknown model or tag, a model that is no plain CLIP ViT, QuickGELU
    weights under a model without it, and weights that are missing, damaged, unreadable, not finite
    or of another shape.
    """
    model_name, _, source = name.partition("/")
    tag = {}
    if name == "demo":
        weights, mend = STANDIN / "clip.safetensors", "restore common/standin"
        with reading(STANDIN / "clip_config.json", mend):
            config = json.loads((STANDIN / "clip_config.json").read_text(encoding="utf-8"))
    else:
        config = _model_config(model_name)
        tag = open_clip.get_pretrained_cfg(model_name, source)
        if tag.get("quick_gelu"):
            _require_quick_gelu(name, config)
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        mend = f"name in CLIP a file, or a tag that open_clip has for {model_name} ({tags})"
        if not source:
            raise UserError(f"CLIP={name} names no weights: {mend}")
        weights = _download(name, tag) if tag else expanded(source)

    state = _read_weights(weights, mend)
    if OPENAI_KEYS & state.keys():
        _require_quick_gelu(name, config)
    model = open_clip.CLIP(**config)
    try:
        model.load_state_dict({key: state[key] for key in state.keys() - OPENAI_KEYS})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"CLIP's file '{weights}' does not fit '{name}' ({reason}): name the "
                        "open_clip model that it was made with.") from error
    # where open_clip keeps them
    model.visual.image_mean = tag.get("mean", open_clip.OPENAI_DATASET_MEAN)
    model.visual.image_std = tag.get("std", open_clip.OPENAI_DATASET_STD)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return model.eval().requires_grad_(False).to(device), tokenizer


def clip_setup(clip: open_clip.CLIP) -> str:
    """What the weights do not tell: the activation, and the mean and deviation of pictures."""
    activation = type(clip.transformer.resblocks[0].mlp.gelu).__name__
    mean, deviation = (tuple(of) for of in (clip.visual.image_mean, clip.visual.image_std))
    return f"{activation}, mean {mean}, deviation {deviation}"


def absolute_clip(name: str) -> str:
    """`name` as a cache keeps it: a weights file's path is understood from every folder."""
    model_name, _, source = name.partition("/")
    path = expanded(source)
    if not path.is_file() or open_clip.get_pretrained_cfg(model_name, source):
        return name
    return f"{model_name}/{path.resolve()}"


def _model_config(model_name: str) -> dict:
    configs = {known: open_clip.get_model_config(known) for known in open_clip.list_models()}
    if model_name in configs and _is_plain(configs[model_name]):
        return configs[model_name]
    usable = [known for known, config in configs.items()
              if _is_plain(config) and open_clip.list_pretrained_tags_by_model(known)]
    fault = "is not a plain CLIP ViT" if model_name in configs else "is not a model of open_clip"
    raise UserError(f"CLIP: '{model_name}' {fault}: write '<model>/<tag or file>' with one of "
                    f"{', '.join(usable)}.")


def _is_plain(config: dict) -> bool:
    """Whether it is a ViT with a class token and CLIP's own text tower.

    That is all that `clip_surgery.surgery_tokens` writes out.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    of_vision = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    of_text = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    return (set(vision) <= of_vision and set(text) <= of_text
            and isinstance(vision["layers"], int))  # a list is a ResNet's


def _require_quick_gelu(name: str, config: dict) -> None:
    """open_clip only warns of this, and nothing would look wrong but the maps."""
    if not config.get("quick_gelu"):
        model_name, _, source = name.partition("/")
        raise UserError(f"CLIP '{name}': these weights were trained with QuickGELU, which "
                        f"{model_name} lacks: write '{model_name}-quickgelu/{source}'.")


def _download(name: str, tag: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # urllib, the hub's client and its HTTP library: each its own kind
        raise UserError(f"CLIP '{name}' could not be downloaded ({repr(error)[:200]}): check the "
                        "network, or fetch the weights elsewhere and write '<model>/<file>'."
                        ) from error


def _read_weights(file: Path, missing: str) -> dict[str, torch.Tensor]:
    """The state dict in `file`. missing: what to do if there is none; see `reading`."""
    try:
        with reading(file, missing):
            if file.suffix == ".safetensors":
                state = safetensors.torch.load_file(file)
            else:
                require_intact(file)
                state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
    except UserError:
        raise
    except Exception as error:  # zip, pickle and safetensors each raise their own kinds
        mend = "fetch it again"
        if "TorchScript" in str(error):  # as OpenAI ships CLIP
            mend = ("if you trust it, extract the weights with "
                    "torch.save(torch.jit.load('in.pt', 'cpu').state_dict(), 'out.pt') and name "
                    "that file")
        reason = repr(error)[:200]
        raise UserError(f"CLIP's file '{file}' cannot be read as weights ({reason}): "
                        f"{mend}.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"CLIP's file '{file}' holds NaN or infinite values: fetch it again.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}
