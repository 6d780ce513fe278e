"""Loading SAM: published checkpoints, downloaded once and checked, or a file, or the stand-in."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from tqdm import tqdm

from common.frozen import mobile_sam
from common.runtime import checkpoint, distributed
from common.runtime.errors import UserError
from common.runtime.files import expanded, require_intact
from common.runtime.reading import reading

META = "https://dl.fbaipublicfiles.com/segment_anything"
MOBILE = "https://github.com/ChaoningZhang/MobileSAM/raw/f706ad9c4eb7f219c00d9050e46328518ffb65d2"
CHECKPOINTS = {  # name: (url, bytes, SHA-256)
    "vit_h": (f"{META}/sam_vit_h_4b8939.pth", 2_564_550_879,
              "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": (f"{META}/sam_vit_l_0b3195.pth", 1_249_524_607,
              "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": (f"{META}/sam_vit_b_01ec64.pth", 375_042_383,
              "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "mobile_sam": (f"{MOBILE}/weights/mobile_sam.pt", 40_728_226,
                   "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"),
}
ARCHITECTURES = {  # name: a function that builds it, with random weights
    name: sam_model_registry.get(name, mobile_sam.build_mobile_sam) for name in CHECKPOINTS}
POS_EMBED = "image_encoder.pos_embed"  # a ViT's; its last axis tells the size
SIZE_OF_WIDTH = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}

# Models that are taken for a SAM, and a part of a key that they alone have. The first that fits
# counts: SAM 3 holds a tracker with the keys of SAM 2.
_OTHER_MODELS = {
    "detector.backbone.": "SAM 3",
    "detector_model.": "SAM 3",
    "sam_mask_decoder.": "SAM 2",
    "vision_encoder.backbone.": "SAM 2",
    "mask_decoder.hf_token.": "HQ-SAM",
    "mask_decoder.hq_token.": "HQ-SAM",
    "prompt_encoder.bbox_top_left_embeddings.": "EfficientSAM",
    "dapter.": "SAM-Med2D or another SAM with adapters",  # Adapter., MLP_Adapter., adapter.
    ".proto.cv1.": "FastSAM, a YOLO",
    "shared_image_embedding.": "a SAM under Hugging Face's key names (SamModel)",
}
# what torch puts into the names of a module that it wraps: DataParallel, compile, FSDP
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_sam(name: str, device: torch.device) -> Sam:
    """A frozen SAM (eval mode, no gradients) on `device`.

    name: one of CHECKPOINTS (downloaded once to `cache_dir()`), the path of such a checkpoint
    ("vit_b:path" must be of that size), or "demo" (this repository's small stand-in).
    Raises UserError if there is no such file or no network, or if the file is damaged or not a
    checkpoint of SAM.
    """
    if name == "demo":
        from common.standin.model import build_sam  # no real run needs the stand-in

        sam = build_sam()
    elif name in CHECKPOINTS:
        sam = _load_checkpoint(download_checkpoint(name), size=name, compared=True)
    else:
        size, colon, path = name.partition(":")
        if not (colon and size in CHECKPOINTS):
            size, path = None, name
        if not path:
            raise UserError(f"SAM={name} names no file: set it to one of {', '.join(CHECKPOINTS)}, "
                            "to the path of such a checkpoint, or to demo")
        sam = _load_checkpoint(expanded(path), size)
    return sam.eval().requires_grad_(False).to(device)


def absolute_sam(name: str) -> str:
    """`name` as a cache keeps it: a checkpoint's path is understood from every folder."""
    size, colon, path = name.partition(":")
    if not (colon and size in CHECKPOINTS):
        size, colon, path = "", "", name
    if name in (*CHECKPOINTS, "demo") or not expanded(path).is_file():
        return name
    return size + colon + str(expanded(path).resolve())


def _load_checkpoint(path: Path, size: str | None, compared: bool = False) -> Sam:
    """The SAM in the file `path`.

    size: the one that the user named, None to go by the weights alone. compared: whether the
    file's own hash is known to be right, so that its parts need no second reading.
    """
    weights = _plain_names(_tensors(_read(path, compared)))
    found = _recognise(weights, path)
    if size not in (None, found):
        raise UserError(f"{path} holds {found}, not {size}; write {found}:{path} or the path "
                        "alone.")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} holds NaN or infinite values: download the checkpoint again.")
    if found == "mobile_sam":
        weights = mobile_sam.own_names(weights)
    sam = ARCHITECTURES[found]()
    try:
        sam.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit {found} ({reason} ...); give a checkpoint of that "
                        "model.") from error
    return sam


def _tensors(content: object, name: str = "", depth: int = 4) -> dict[str, torch.Tensor]:
    """The tensors in `content` and in dicts within it, with the keys on the way joined by dots.

    depth: dicts in dicts that are looked into; a file may hold a dict that holds itself.
    """
    if isinstance(content, torch.Tensor):
        return {name: content}
    found = {}
    if isinstance(content, dict) and depth:
        for key, value in content.items():
            found |= _tensors(value, f"{name}.{key}" if name else str(key), depth - 1)
    return found


def _plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The SAM among `tensors` under the names that its own state dict has.

    Training scripts save {"model": ..., "optimizer": ...}, and put "module.", "sam." and the like
    before the names or into them. Without a SAM the tensors come back as they are.
    """
    plain = {".".join(part for part in key.split(".") if part not in _WRAPPERS): tensor
             for key, tensor in tensors.items()}
    for mark in (POS_EMBED, mobile_sam.MARK):
        for key in plain:
            prefix = key.removesuffix(mark)
            if prefix != key and prefix[-1:] in ("", "."):
                return {key.removeprefix(prefix): tensor for key, tensor in plain.items()
                        if key.startswith(prefix)}
    return plain


def _recognise(weights: dict[str, torch.Tensor], path: Path) -> str:
    """Which of ARCHITECTURES has these weights. Raises UserError, where it can with a name."""
    for mark, model in _OTHER_MODELS.items():
        if any(mark in key for key in weights):
            raise _not_read(path, model)
    if mobile_sam.MARK in weights:
        return "mobile_sam"
    width = weights[POS_EMBED].shape[-1:] if POS_EMBED in weights else ()
    if not (width and width[0] in SIZE_OF_WIDTH):
        raise UserError(f"{path} is not a checkpoint of SAM's ViT-H, ViT-L or ViT-B or of "
                        f"MobileSAM: {POS_EMBED} is missing or of another width.")
    return SIZE_OF_WIDTH[width[0]]


def _not_read(path: Path, model: str) -> UserError:
    return UserError(f"{path} holds {model}, which is not read here: set SAM to "
                     f"{', '.join(CHECKPOINTS)} or the path of a checkpoint of one of these, as "
                     "its authors (or MedSAM's) published it.")


def _read(path: Path, compared: bool) -> object:
    """What the checkpoint file holds; no code in it is run. Raises UserError."""
    missing = f"set SAM to the path of a checkpoint, {', '.join(CHECKPOINTS)} or demo"
    try:
        with reading(path, missing):
            if not compared:
                require_intact(path)
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # which type it is depends on where in the file torch stumbles
        if "ultralytics" in str(error):
            raise _not_read(path, "FastSAM or another YOLO") from error
        if "GLOBAL" in str(error):
            raise UserError(f"{path} was refused: it holds Python objects, which could run code "
                            "when loaded; give a file that holds a SAM state dict and nothing "
                            "else.") from error
        raise UserError(f"{path} cannot be read as a PyTorch file ({type(error).__name__}): it is "
                        "damaged or something else; download the checkpoint again.") from error


def cache_dir() -> Path:
    """Where checkpoints are kept: $ALIGNSAM_CACHE, or ~/.cache/alignsam."""
    return expanded(os.environ.get("ALIGNSAM_CACHE") or "~/.cache/alignsam")


def download_checkpoint(name: str) -> Path:
    """The path of the published checkpoint `name`, downloaded if it is not there yet.

    Its SHA-256 is checked every time. A download that was cut off goes on from its `.part` file.
    Raises UserError without a network or if the file is another one.
    """
    url, size, sha256 = CHECKPOINTS[name]
    path = cache_dir() / url.rpartition("/")[2]
    if path.exists():  # perhaps put there by hand, so it is checked but never deleted
        if path.stat().st_size != size or _sha256(path) != sha256:
            raise UserError(f"{path} is not the published {name} checkpoint or is cut off; "
                            "delete it and run again.")
        return path
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, size)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded ({error}); run again to go on where it "
                        f"stopped, or download it by hand to {path}.") from error
    if _sha256(part) != sha256:
        part.unlink()
        raise UserError(f"What {url} sent has a wrong SHA-256 and was deleted; run again, or "
                        f"download it by hand to {path}.")
    part.rename(path)
    return path


def _fetch(url: str, part: Path, size: int) -> None:
    """Downloads `url` into `part` until it has `size` bytes, from where `part` ends.

    Raises OSError.
    """
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:  # the server sends the whole file, whatever was asked for
            have = 0
        length = int(response.headers.get("Content-Length", size - have))
        if have + length != size:  # a login page, for one: do not let it into the file
            raise OSError(f"the file has {have + length} bytes, not {size}")
        with (part.open("ab" if have else "wb") as file,
              tqdm(desc=part.stem, initial=have, total=size, unit="B", unit_scale=True) as bar):
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size != size:
        raise OSError(f"cut off at {part.stat().st_size} of {size} bytes")


def _sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with (path.open("rb") as file,
          tqdm(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True, leave=False,
               disable=distributed.RANK > 0) as bar):
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def sam_fingerprint(sam: Sam) -> str:
    """16 hex digits over the prompt encoder's and mask decoder's weights.

    It is stored with cached embeddings, so that a decoder that never saw that encoder is refused.
    """
    digest = hashlib.sha256()
    if isinstance(sam.image_encoder, mobile_sam.MobileEncoder):
        digest.update(b"mobile_sam")  # it was trained to serve ViT-H's decoder
    for part in (sam.prompt_encoder, sam.mask_decoder):
        for key, value in part.state_dict().items():
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encoder_fingerprint(sam: Sam) -> str:
    """16 hex digits over the image encoder's weights.

    Where the encoder alone was fine-tuned, `sam_fingerprint` is that of the original SAM.
    """
    return checkpoint.fingerprint(sam.image_encoder.state_dict())


def load_cached_sam(attributes: dict, device: torch.device) -> Sam:
    """The SAM whose embeddings a cache holds.

    attributes: the cache's, of which `sam` and the two fingerprints are read; older caches have
    none of the encoder. Raises UserError where the file of that name now holds other weights, and
    all that `load_sam` raises.
    """
    sam = load_sam(attributes["sam"], device)
    own = encoder_fingerprint(sam)
    if (sam_fingerprint(sam) != attributes["sam_fingerprint"]
            or attributes.get("encoder_fingerprint", own) != own):
        raise UserError(f"SAM={attributes['sam']} is not the one that made the cache: set SAM to "
                        "the path of that one, or run all stages in another RUN_DIR")
    return sam


def load_decoder(attributes: dict, device: torch.device) -> Sam:
    """`load_cached_sam` without the image encoder."""
    sam = load_cached_sam(attributes, torch.device("cpu"))
    sam.image_encoder = Headless(sam.image_encoder.img_size)  # its gigabytes are not needed again
    return sam.to(device)


class Headless(torch.nn.Module):
    """Stands where the image encoder was, and knows its input size."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size
