"""Masks for images of one's own, by a trained run.

There is no ground truth and no cache. Images may be of any size and of any format that Pillow
reads.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.episode import Episode
from common.frozen.clip_surgery import ClipSurgery
from common.frozen.clip_weights import load_clip
from common.frozen.models import FrozenModels
from common.frozen.sam import SamEmbedder, full_masks
from common.frozen.sam_weights import load_sam, sam_fingerprint
from common.images import load_image
from common.results.pictures import draw_points, overlay
from common.runtime import checkpoint, script
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.runtime.files import write_atomic, write_text
from common.runtime.settings import choose

_MARK = ("Software", "AlignSAM")  # in every picture written here, so that no other is replaced
# AlignSAM's prompting of embeddings (B, C, h, w) with maps (B, h, w): the episode as it ended
Align = Callable[[Tensor, Tensor], Episode]


def segment(images: str, out: Path, attributes: dict, texts: tuple[str, ...],
            classes: tuple[str, ...], align: Align, srm: nn.Module, device: torch.device,
            made_with: dict) -> None:
    """Segments every image of a folder. For an image photo.jpg it writes below `out`:

    photo.png           the binary mask, 0 or 255, of the image's own size
    overlays/photo.png  the image with its mask and points
    masks.jsonl         a line on each mask; lines of masks that earlier calls made stay

    With several texts the first two are called photo-<text>.png, and photo-classes.png is an
    indexed picture: 0 = nothing, k = the k-th text. Where masks overlap, it shows the one of the
    highest SRM probability.

    A stopped call continues where it was. Files that could not be read are processed by a later
    call, once they are repaired. See `Progress`.

    attributes: of the run's cache, from which SAM and CLIP are loaded.
    texts: what the run knows. classes: which of them to look for, or ("all",).
    align: AlignSAM's prompting. srm: the SRM that it uses.
    made_with: what tells this run from others, for JSON.

    Raises UserError where a model is not the cache's; where two images' files would have one name,
    in this folder or with an earlier one; where an image's features are not finite or do not fit
    into memory; and at the end where files could not be read.
    """
    folder = Path(images).expanduser()
    paths, wanted = find_images(folder), choose("CLASSES", classes, texts)
    indices = [texts.index(text) for text in wanted]
    names = name_files(paths, [*wanted, "classes"] if len(texts) > 1 else [])
    progress = Progress(out, str(folder.resolve()))
    progress.require_free(names)
    frozen = load_models(attributes, texts, device)
    progress.go_on(paths, {"classes": indices, **made_with})

    segment_batch = partial(segment_one, frozen, align, indices)
    left, broken = [path for path in paths if path.name not in progress.images], []
    for path in tqdm(left, "segmenting", initial=len(progress.images), total=len(paths)):
        try:
            image = load_image(path)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            broken.append(path.name)
            continue
        mend = f"set DEVICE=cpu, or make {path} smaller"
        _, (episode, masks) = next(in_batches([(path, image)], 1, segment_batch, mend))
        about = {"folder": progress.folder, "image": path.name}
        lines = write_masks(out, names[path], wanted, image, masks, episode, frozen.frame, about)
        if len(texts) > 1:
            save(out / f"{names[path][-1]}.png", indexed(masks, episode.foreground(srm), indices))
        progress.add(path, lines)

    print(f"wrote masks of {len(paths) - len(broken)} images to {out}")
    if broken:
        some = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise UserError(f"{len(broken)} of {len(paths)} files could not be read ({some}): mend or "
                        "remove them; the other images are done")
    progress.end()


# ---- what is asked for

def check(images: str, classes: tuple[str, ...]) -> None:
    """Raises UserError where IMAGES and CLASSES, or IMAGES and torchrun, do not go together."""
    if images:
        script.require_one_process("IMAGES")
    elif classes != ("all",):
        raise UserError("CLASSES belongs to IMAGES: set IMAGES to a folder, or leave CLASSES out")


def find_images(folder: Path) -> list[Path]:
    """The files in `folder` itself whose name ends as a format that Pillow reads.

    Raises UserError if there are none.
    """
    if not folder.is_dir():
        raise UserError(f"IMAGES={folder} is no folder: name the folder that holds your images")
    Image.init()
    formats = Image.registered_extensions().items()
    readable = {suffix for suffix, kind in formats if kind in Image.OPEN}
    found = [path for path in folder.iterdir() if path.is_file()
             and path.suffix.lower() in readable and not path.name.startswith(".")]
    others = [path.name for path in sorted(folder.iterdir())
              if path not in found and not path.name.startswith(".")]
    if others:
        some = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
        print(f"passed over, as no picture that Pillow reads here, or a folder: {some}")
    if not found:
        raise UserError(f"IMAGES={folder} holds no image: name a folder with files such as "
                        "photo.jpg in it")
    return sorted(found)


def name_files(paths: list[Path], words: list[str]) -> dict[Path, list[str]]:
    """The names of each image's files, without suffix: photo-<word> for each word, else photo.

    Raises UserError where two images would be written to the same file.
    """
    stems, names, owner = Counter(path.stem for path in paths), {}, {}
    for path in paths:
        stem = path.stem if stems[path.stem] == 1 else path.name  # a.jpg beside a.png
        endings = [re.sub(r"[^0-9A-Za-z]+", "-", word) for word in words]
        names[path] = [f"{stem}-{ending}" for ending in endings] or [stem]
        for name in names[path]:
            if name in owner:
                raise UserError(f"the masks of {owner[name].name} and {path.name} would both be "
                                f"written to {name}.png: rename one of the images")
            owner[name] = path
    return names


# ---- one image

def load_models(attributes: dict, texts: tuple[str, ...], device: torch.device) -> FrozenModels:
    """SAM's encoder and CLIP Surgery as the cache was made with.

    Raises UserError where they are others now.
    """
    sam = load_sam(attributes["sam"], device)
    clip, tokenizer = load_clip(attributes["clip"], device)
    found = {"sam": sam_fingerprint(sam), "clip": checkpoint.fingerprint(clip.state_dict())}
    for name, fingerprint in found.items():
        if fingerprint != attributes[f"{name}_fingerprint"]:
            raise UserError(f"{name.upper()}={attributes[name]} is not the one that made the "
                            "cache: run stage 1 again")
    surgery = ClipSurgery(clip, tokenizer, attributes["clip_size"], texts)
    embedder = SamEmbedder(sam, attributes["precision"])
    return FrozenModels(embedder, surgery, attributes["image_size"])


def segment_one(frozen: FrozenModels, align: Align, texts: list[int],
                batch: list[tuple[Path, np.ndarray]]) -> tuple[Episode, np.ndarray]:
    """AlignSAM on K texts of one image: the episode as it ended, and masks bool (K, H, W).

    batch: the image's path and its pixels, uint8 (H, W, 3), as the only item.
    """
    [(path, image)] = batch
    embedding, maps = frozen.compute([frozen.see(image)])
    for what, values in (("SAM's embedding", embedding), ("the CLIP map", maps)):
        if not values.isfinite().all():
            raise UserError(f"{what} of {path} holds NaN or infinite values: run stage 1 with "
                            "PRECISION=fp32 into another RUN_DIR, or check the weights")
    episode = align(embedding.expand(len(texts), -1, -1, -1), maps[0, texts])
    masks = [full_masks(logits, image.shape[:2]).cpu().numpy() for logits in episode.logits]
    return episode, np.stack(masks)


def write_masks(out: Path, names: list[str], texts: list[str], image: np.ndarray,
                masks: np.ndarray, episode: Episode, frame: int, about: dict) -> list[dict]:
    """Writes the mask and the overlay of each of K texts; returns their lines of masks.jsonl.

    image: uint8 (H, W, 3). masks: bool (K, H, W). about: what each line begins with.
    """
    height, width = image.shape[:2]
    points, labels = episode.points.cpu().numpy(), episode.labels.tolist()
    qualities, lines = episode.predicted_iou.tolist(), []
    for k, text in enumerate(texts):
        mask = f"{names[k]}.png"
        save(out / mask, Image.fromarray(masks[k].astype(np.uint8) * 255))
        picture = overlay(image, masks[k], (width, height))
        draw_points(picture, points[k], labels[k], frame)
        save(out / "overlays" / mask, picture)
        own_points = points[k] * (np.array([width, height]) / frame)
        lines.append(about | {"text": text, "mask": mask, "labels": labels[k],
                              "points": own_points.round(1).tolist(),
                              "predicted_iou": round(qualities[k], 4)})
    return lines


def indexed(masks: np.ndarray, y_r: Tensor, texts: list[int]) -> Image.Image:
    """One indexed picture of K masks: 1 + the text of the most probable mask, 0 where none is.

    masks: bool (K, H, W). y_r: the SRM's probability (K, h, w). texts: their K indices.
    """
    size = masks.shape[1:]
    indices, highest = np.zeros(size, np.uint8), np.full(size, -1, np.float32)
    for mask, text, coarse in zip(masks, texts, y_r):  # one by one: full-size maps are large
        probability = F.interpolate(coarse[None, None], size, mode="bilinear")[0, 0].cpu().numpy()
        wins = mask & (probability > highest)
        indices[wins], highest[wins] = 1 + text, probability[wins]
    picture = Image.fromarray(indices)
    picture.putpalette(palette())
    return picture


def palette() -> list[int]:
    """VOC's colour map, 256 RGB triples: the bits of the index spread over the three channels."""
    colours, index = np.zeros((256, 3), int), np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = index >> 3
    return colours.ravel().tolist()


def save(path: Path, picture: Image.Image) -> None:
    """As PNG, marked as written here; see `is_ours`."""
    mark = PngInfo()
    mark.add_text(*_MARK)
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG", pnginfo=mark))


def is_ours(path: Path) -> bool:
    """Whether `save` wrote this picture."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(_MARK[0]) == _MARK[1]
    except Exception:  # what is no picture makes Pillow raise nearly anything
        return False


# ---- what is done

class Progress:
    """Which masks there are: masks.jsonl for the user, masks.json.part for a call that is stopped.

    masks.jsonl gets an image's lines as soon as its masks are there. masks.json.part keeps which
    images are done, so that the same call goes on after a kill, and does only the broken files once
    they are mended. It goes when all images are done.
    """

    def __init__(self, out: Path, folder: str) -> None:
        """folder: of the images. Raises UserError where masks.jsonl is not what was written."""
        self.out, self.folder, self.part = out, folder, out / "masks.json.part"
        self.lines = read_lines(out / "masks.jsonl")  # {mask's file name: its line}
        self.images = {}  # {image's name: its stamp and lines}
        self.made_with, self.stamps = "", {}

    def require_free(self, names: dict[Path, list[str]]) -> None:
        """Raises UserError where a mask would replace what this run did not write.

        That is a mask of an image in another folder, or any file of the user's.
        """
        for path, stems in names.items():
            for stem in stems:
                for file in (self.out / f"{stem}.png", self.out / "overlays" / f"{stem}.png"):
                    if file.exists() and not is_ours(file):
                        raise UserError(f"{file} was not written by this run, and a mask of {path} "
                                        "would replace it: move it away, or name another RUN_DIR")
                line = self.lines.get(f"{stem}.png", {})
                if line.get("folder", self.folder) != self.folder:
                    raise UserError(f"{self.out / line['mask']} is the mask of "
                                    f"{Path(line['folder'], line['image'])}, and that of {path} "
                                    f"would replace it: rename the image, or move {self.out} away")

    def go_on(self, paths: list[Path], made_with: dict) -> None:
        """Takes over the images that a stopped call has done and that are still the same.

        made_with: the settings that this call must have had too.
        """
        self.made_with = json.dumps({"folder": self.folder, **made_with})
        self.stamps = {path.name: stamp(path) for path in paths}
        for name, entry in read_part(self.part, self.made_with).items():
            if entry["stamp"] == self.stamps.get(name):
                self.images[name] = entry
                self.lines |= {line["mask"]: line for line in entry["lines"]}
        if not self.images:
            self.part.unlink(missing_ok=True)  # another call's, whose masks this one may replace
        self.write_lines()

    def add(self, path: Path, lines: list[dict]) -> None:
        """Keeps that the image `path` is done. lines: its lines of masks.jsonl."""
        self.lines |= {line["mask"]: line for line in lines}
        self.write_lines()
        self.images[path.name] = {"stamp": self.stamps[path.name], "lines": lines}
        write_text(self.part, json.dumps({"made_with": self.made_with, "images": self.images}))

    def write_lines(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines.values())
        write_text(self.out / "masks.jsonl", text)

    def end(self) -> None:
        """All images are done."""
        self.part.unlink(missing_ok=True)


def read_lines(path: Path) -> dict[str, dict]:
    """{mask's file name: its line} of a masks.jsonl, of the masks that are still there.

    Empty where there is no masks.jsonl. Raises UserError where it is not what was written.
    """
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {line["mask"]: line for line in lines if (path.parent / line["mask"]).exists()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what was written: move it away") from error


def read_part(path: Path, made_with: str) -> dict[str, dict]:
    """{image's name: its stamp and lines} of what a stopped call had done.

    Leaves out images whose masks are gone. Empty where it was another call (`made_with`), and where
    `path` is not what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made_with"] != made_with:
            return {}
        done = {}
        for image, entry in content["images"].items():
            masks = [path.parent / line["mask"] for line in entry["lines"]]
            if all(mask.exists() for mask in masks):
                done[image] = {"stamp": entry["stamp"], "lines": entry["lines"]}
        return done
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def stamp(path: Path) -> list[int]:
    """Size and time of the last change, to tell whether a file is still the one that was read."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
