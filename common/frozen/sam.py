"""The frozen SAM: its checkpoints, its image encoder in batches, its decoder in batches of different images.

Every parameter comes from segment_anything (Kirillov et al., "Segment Anything", ICCV 2023), and what is
computed here equals its `SamPredictor`; only the batching is ours.
"""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from tqdm import tqdm

from common.frozen.decoder import ImageSide, SingleMaskDecoder
from common.frozen.encoder import encode
from common.runtime import distributed
from common.runtime.errors import UserError
from common.runtime.files import require_intact

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

    name: "vit_h" | "vit_l" | "vit_b" (downloaded once to `cache_dir()`), the path of such a checkpoint (or
    "vit_b:path", which must be of that size), or "demo" (this repository's small stand-in).
    Raises UserError if there is no such file or no network, or if the file is damaged or not a checkpoint of SAM.
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


def _load_checkpoint(path: Path, size: str | None, compared: bool = False) -> Sam:
    """The SAM in the file `path`; `size` is the one the user named, None to go by the weights alone.

    compared: whether the file's own hash is known to be right, so that its parts need no second reading.
    """
    if not path.is_file():
        raise UserError(f"There is no SAM checkpoint at {path}; give the path of a .pth file, "
                        f"{', '.join(CHECKPOINTS)} or demo.")
    try:
        if not compared:
            require_intact(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which type it is depends on where in the file torch stumbles
        if "GLOBAL" in str(error):
            raise UserError(f"{path} was refused: it holds Python objects, which could run code when loaded; "
                            "give a file that holds a SAM state dict and nothing else.") from error
        raise UserError(f"{path} cannot be read as a PyTorch file ({type(error).__name__}): it is damaged or "
                        "something else; download the checkpoint again.") from error
    pos_embed = weights.get("image_encoder.pos_embed") if isinstance(weights, dict) else None
    found = SIZE_OF_WIDTH.get(pos_embed.shape[-1]) if isinstance(pos_embed, torch.Tensor) else None
    if found is None:
        raise UserError(f"{path} is not a checkpoint of SAM's ViT-H, ViT-L or ViT-B: "
                        "image_encoder.pos_embed is missing or of another width.")
    if size not in (None, found):
        raise UserError(f"{path} holds {found}, not {size}; write {found}:{path} or the path alone.")
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, torch.Tensor)):
        raise UserError(f"{path} holds NaN or infinite values: download the checkpoint again.")
    sam = sam_model_registry[found]()
    try:
        sam.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit segment_anything's {found} ({reason} ...); "
                        "give a checkpoint of that model.") from error
    return sam


def cache_dir() -> Path:
    """Where checkpoints are kept: $ALIGNSAM_CACHE, or ~/.cache/alignsam."""
    return Path(os.environ.get("ALIGNSAM_CACHE") or "~/.cache/alignsam").expanduser()


def download_checkpoint(name: str) -> Path:
    """The path of Meta's checkpoint `name`, downloaded if it is not there yet; SHA-256 checked every time.

    A download that was cut off goes on from its `.part` file. Raises UserError without a network or if the
    file is not Meta's.
    """
    url, size, sha256 = CHECKPOINTS[name]
    path = cache_dir() / url.rpartition("/")[2]
    if path.exists():  # perhaps put there by hand, so it is checked but never deleted
        if path.stat().st_size != size or _sha256(path) != sha256:
            raise UserError(f"{path} is not Meta's {name} checkpoint or is cut off; delete it and run again.")
        return path
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, size)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded ({error}); run again to go on where it stopped, "
                        f"or download it by hand to {path}.") from error
    if _sha256(part) != sha256:
        part.unlink()
        raise UserError(f"What {url} sent has a wrong SHA-256 and was deleted; run again, "
                        f"or download it by hand to {path}.")
    part.rename(path)
    return path


def _fetch(url: str, part: Path, size: int) -> None:
    """Download `url` into `part` until it has `size` bytes, from where `part` ends. Raises OSError."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
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

    Stored with cached embeddings, so that a decoder that never saw that encoder is refused.
    """
    digest = hashlib.sha256()
    for part in (sam.prompt_encoder, sam.mask_decoder):
        for key, value in part.state_dict().items():
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_decoder(attributes: dict, device: torch.device) -> Sam:
    """The SAM whose embeddings a cache holds (its attributes `sam`, `sam_fingerprint`), without the image encoder.

    Raises UserError where the file of that name now holds other weights, and all that `load_sam` raises.
    """
    sam = load_sam(attributes["sam"], torch.device("cpu"))
    if sam_fingerprint(sam) != attributes["sam_fingerprint"]:
        raise UserError(f"SAM={attributes['sam']} is not the one that made the cache: delete the cache and run "
                        "01_cache_features.py again")
    sam.image_encoder = Headless(sam.image_encoder.img_size)  # its gigabytes are not needed again
    return sam.to(device)


class Headless(torch.nn.Module):
    """Stands where the image encoder was, and knows its input size."""

    def __init__(self, img_size: int):
        super().__init__()
        self.img_size = img_size


def squash(image: np.ndarray, sam_size: int, frame: int = 800) -> np.ndarray:
    """The picture that SAM sees: uint8 (H, W, 3) -> uint8 (sam_size, sam_size, 3), without padding.

    First squashed to frame x frame (AlignSAM, Eq. 3), then taken to `sam_size` by SAM's own transform; for a
    SAM smaller than the frame resized only once, so that nothing is blurred twice. PIL's bilinear filter.
    """
    side = frame if sam_size >= frame else sam_size
    squashed = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return ResizeLongestSide(sam_size).apply_image(np.asarray(squashed))


class SamEmbedder:
    """SAM's image encoder on batches of squashed pictures: what `SamPredictor.set_image` computes one by one.

    precision: "fp32", "bf16" (autocast), or "auto": bf16 where the hardware computes in it, fp32 elsewhere.
    """

    def __init__(self, sam: Sam, precision: str = "auto"):
        if precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"The precision {precision!r} is none of auto, fp32, bf16.")
        self.sam = sam
        self.bf16 = precision == "bf16" or (precision == "auto" and has_bf16(sam.device))

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (B, s, s, 3) from `squash`, s = SAM's input size -> float32 (B, C, h, w) on SAM's device."""
        pixels = torch.as_tensor(images, device=self.sam.device).permute(0, 3, 1, 2)
        with torch.autocast(self.sam.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = self.sam.preprocess(pixels)
            encoder = self.sam.image_encoder
            return (encode(encoder, pixels) if isinstance(encoder, ImageEncoderViT) else encoder(pixels)).float()


def has_bf16(device: torch.device) -> bool:
    """Whether `device` itself computes in bfloat16, rather than torch emulating it at a loss of speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return False


class BatchedPrompter:
    """SAM's prompt encoder and mask decoder on a batch of different images, each with its own points.

    The decoder's own `predict_masks` repeats one image for many prompts; this is the same computation with
    one image per row, and of the four mask tokens it decodes only the single-mask one, so that it equals
    `SamPredictor.predict(multimask_output=False)` image by image.
    """

    def __init__(self, sam: Sam, frame: int = 800, max_batch: int | None = None):
        """frame: side in pixels of the square that points lie in. max_batch: images decoded at a time."""
        self.sam, self.frame = sam, frame
        self.scale = sam.image_encoder.img_size / frame  # as ResizeLongestSide.apply_coords on a square
        height, width = sam.prompt_encoder.image_embedding_size
        fitting = 64 if sam.device.type == "cuda" else max(1, 16 * 24 * 24 // (height * width))  # in a CPU's caches
        self.max_batch = max_batch or fitting
        self.decoder = SingleMaskDecoder(sam)

    def prepare(self, embeddings: torch.Tensor) -> list[ImageSide]:
        """What `decode` needs of embeddings (B, C, h, w) of any float type on any device, to be made once.

        About two and a half times their float32 size, on SAM's device: keys, and three projections of half the width.
        """
        return [self.decoder.prepare(chunk.to(self.sam.device).float()) for chunk in embeddings.split(self.max_batch)]

    @torch.no_grad()  # not inference_mode: the states made from these masks go through autograd
    def decode(self, prepared: list[ImageSide], points: torch.Tensor,
               labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution mask logits float32 (B, 4h, 4w) and predicted IoU float32 (B,), on SAM's device.

        prepared: `prepare` of the B images. points: (B, N, 2) as (x, y) in pixels of the frame.
        labels: (B, N), 1 foreground, 0 background, -1 SAM's "not a point" (a token of its own, not nothing).
        Points and labels may lie on any device.
        """
        device, answers = self.sam.device, []
        for image, xy, label in zip(prepared, points.split(self.max_batch), labels.split(self.max_batch), strict=True):
            prompt = (xy.to(device).float() * self.scale, label.to(device))
            sparse, _ = self.sam.prompt_encoder(prompt, boxes=None, masks=None)
            answers.append(self.decoder.decode(image, sparse))
        logits, iou = zip(*answers)
        return torch.cat(logits), torch.cat(iou)


def probability_grid(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The M that multiplies F (AlignSAM, Eqs. 4 and 11): logits (B, H', W') -> probabilities (B, h, w).

    Sigmoid first, so that a cell averages the probabilities under it.
    """
    return F.adaptive_avg_pool2d(logits.sigmoid(), size)


def full_masks(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits (H', W') -> bool mask (H, W) of the image's own size: bilinear, then SAM's threshold of 0."""
    return F.interpolate(logits[None, None], size, mode="bilinear")[0, 0] > Sam.mask_threshold
