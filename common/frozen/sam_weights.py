"""Loading SAM: Meta's checkpoints, downloaded once and checked, or a file, or the stand-in."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from tqdm import tqdm

from common.runtime import distributed
from common.runtime.errors import UserError
from common.runtime.files import require_intact
from common.runtime.reading import reading

META = "https://dl.fbaipublicfiles.com/segment_anything"
CHECKPOINTS = {  # name: (url, bytes, SHA-256)
    "vit_h": (f"{META}/sam_vit_h_4b8939.pth", 2_564_550_879,
              "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": (f"{META}/sam_vit_l_0b3195.pth", 1_249_524_607,
              "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": (f"{META}/sam_vit_b_01ec64.pth", 375_042_383,
              "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
}
SIZE_OF_WIDTH = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}  # last axis of image_encoder.pos_embed


def load_sam(name: str, device: torch.device) -> Sam:
    """A frozen SAM (eval mode, no gradients) on `device`.

    name: "vit_h", "vit_l" or "vit_b" (downloaded once to `cache_dir()`), the path of such a
    checkpoint ("vit_b:path" must be of that size), or "demo" (this repository's small stand-in).
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
        sam = _load_checkpoint(Path(path).expanduser(), size)
    return sam.eval().requires_grad_(False).to(device)


def absolute_sam(name: str) -> str:
    """`name` as a cache keeps it: a checkpoint's path is understood from every folder."""
    size, colon, path = name.partition(":")
    if not (colon and size in CHECKPOINTS):
        size, colon, path = "", "", name
    if name in (*CHECKPOINTS, "demo") or not Path(path).expanduser().is_file():
        return name
    return size + colon + str(Path(path).expanduser().resolve())


def _load_checkpoint(path: Path, size: str | None, compared: bool = False) -> Sam:
    """The SAM in the file `path`.

    size: the one that the user named, None to go by the weights alone. compared: whether the
    file's own hash is known to be right, so that its parts need no second reading.
    """
    weights = _unwrapped(_read(path, compared))
    pos_embed = weights.get("image_encoder.pos_embed") if isinstance(weights, dict) else None
    width = pos_embed.shape[-1] if isinstance(pos_embed, torch.Tensor) else None
    found = SIZE_OF_WIDTH.get(width)
    if found is None:
        raise UserError(f"{path} is not a checkpoint of SAM's ViT-H, ViT-L or ViT-B: "
                        "image_encoder.pos_embed is missing or of another width.")
    if size not in (None, found):
        raise UserError(f"{path} holds {found}, not {size}; write {found}:{path} or the path "
                        "alone.")
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"{path} holds NaN or infinite values: download the checkpoint again.")
    sam = sam_model_registry[found]()
    try:
        sam.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit segment_anything's {found} ({reason} ...); "
                        "give a checkpoint of that model.") from error
    return sam


def _unwrapped(content: object) -> object:
    """The state dict in what training scripts save: {"model": ...}, names with "module." before."""
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, dict):
        content = {str(key).removeprefix("module."): value for key, value in content.items()}
    return content


def _read(path: Path, compared: bool) -> object:
    """What the checkpoint file holds; no code in it is run. Raises UserError."""
    missing = f"set SAM to the path of a checkpoint, {', '.join(CHECKPOINTS)} or demo"
    try:
        with reading(path, missing):
            if not compared:
                require_intact(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # which type it is depends on where in the file torch stumbles
        if "GLOBAL" in str(error):
            raise UserError(f"{path} was refused: it holds Python objects, which could run code "
                            "when loaded; give a file that holds a SAM state dict and nothing "
                            "else.") from error
        raise UserError(f"{path} cannot be read as a PyTorch file ({type(error).__name__}): it is "
                        "damaged or something else; download the checkpoint again.") from error


def cache_dir() -> Path:
    """Where checkpoints are kept: $ALIGNSAM_CACHE, or ~/.cache/alignsam."""
    return Path(os.environ.get("ALIGNSAM_CACHE") or "~/.cache/alignsam").expanduser()


def download_checkpoint(name: str) -> Path:
    """The path of Meta's checkpoint `name`, downloaded if it is not there yet.

    Its SHA-256 is checked every time. A download that was cut off goes on from its `.part` file.
    Raises UserError without a network or if the file is not Meta's.
    """
    url, size, sha256 = CHECKPOINTS[name]
    path = cache_dir() / url.rpartition("/")[2]
    if path.exists():  # perhaps put there by hand, so it is checked but never deleted
        if path.stat().st_size != size or _sha256(path) != sha256:
            raise UserError(f"{path} is not Meta's {name} checkpoint or is cut off; delete it and "
                            "run again.")
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
    for part in (sam.prompt_encoder, sam.mask_decoder):
        for key, value in part.state_dict().items():
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_decoder(attributes: dict, device: torch.device) -> Sam:
    """The SAM whose embeddings a cache holds, without the image encoder.

    attributes: the cache's, of which `sam` and `sam_fingerprint` are read. Raises UserError where
    the file of that name now holds other weights, and all that `load_sam` raises.
    """
    sam = load_sam(attributes["sam"], torch.device("cpu"))
    if sam_fingerprint(sam) != attributes["sam_fingerprint"]:
        raise UserError(f"SAM={attributes['sam']} is not the one that made the cache: set SAM to "
                        "the path of that one, or run all stages in another RUN_DIR")
    sam.image_encoder = Headless(sam.image_encoder.img_size)  # its gigabytes are not needed again
    return sam.to(device)


class Headless(torch.nn.Module):
    """Stands where the image encoder was, and knows its input size."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size
