"""Masks for images of one's own, by a trained run: no ground truth, no cache, any size, any format of Pillow's."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common.datasets import load_image
from common.episode import Episode
from common.frozen.clip_surgery import ClipSurgery
from common.frozen.clip_weights import load_clip
from common.frozen.models import FrozenModels
from common.frozen.sam import SamEmbedder, full_masks
from common.frozen.sam_weights import load_sam, sam_fingerprint
from common.results.pictures import draw_points, overlay
from common.runtime import checkpoint
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.runtime.files import write_atomic

Align = Callable[[torch.Tensor, torch.Tensor], Episode]


def find_images(folder: Path) -> list[Path]:
    """The files in `folder` itself whose name ends as a format that Pillow reads. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"IMAGES={folder} is no folder: name the folder that holds your images")
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(path for path in folder.iterdir()
                   if path.is_file() and path.suffix.lower() in readable and not path.name.startswith("."))
    if not found:
        raise UserError(f"IMAGES={folder} holds no image: name a folder with files such as photo.jpg in it")
    return found


def choose_texts(texts: tuple[str, ...], classes: tuple[str, ...]) -> list[int]:
    """Indices of `classes` among the run's texts; ("all",) = all of them. Raises UserError naming the first unknown."""
    if classes == ("all",):
        return list(range(len(texts)))
    if "all" in classes:
        raise UserError(f"CLASSES names 'all' beside others: set CLASSES=all, or choose among {', '.join(texts)}")
    if unknown := [name for name in classes if name not in texts]:
        raise UserError(f"CLASSES names {unknown[0]!r}, which this run does not know: choose among {', '.join(texts)}")
    return [texts.index(name) for name in dict.fromkeys(classes)]


def palette() -> list[int]:
    """VOC's colour map, 256 RGB triples: the bits of the index spread over the three channels."""
    colours, index = np.zeros((256, 3), int), np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = index >> 3
    return colours.ravel().tolist()


def name_files(paths: list[Path], words: list[str]) -> dict[Path, list[str]]:
    """The names of each image's files, without suffix: the image's own, or with words photo-<word> for each of them.

    Raises UserError where two images would be written to the same file.
    """
    stems, names, owner = Counter(path.stem for path in paths), {}, {}
    for path in paths:
        stem = path.stem if stems[path.stem] == 1 else path.name  # a.jpg beside a.png
        names[path] = [f"{stem}-{re.sub(r'[^0-9A-Za-z]+', '-', word)}" for word in words] or [stem]
        for name in names[path]:
            if name in owner:
                raise UserError(f"the masks of {owner[name].name} and {path.name} would both be written to {name}.png: "
                                "rename one of the images")
            owner[name] = path
    return names


def read_lines(path: Path) -> dict[str, dict]:
    """{mask's file name: its line} of a masks.jsonl, of the masks that are still there; empty where there is none."""
    if not path.exists():
        return {}
    try:
        lines = {line["mask"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        return {name: line for name, line in lines.items() if (path.parent / name).exists()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what was written: move it away") from error


def write_lines(path: Path, lines: dict[str, dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def stamp(path: Path) -> list[int]:
    """Size and time of the last change, to tell whether a file is still the one that was read."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_part(path: Path, made_with: str) -> dict[str, dict]:
    """{image's name: its stamp and lines} of what a stopped call had done, where it was the same call (`made_with`) and
    the masks are still there; empty for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {image: {"stamp": entry["stamp"], "lines": entry["lines"]} for image, entry in content["images"].items()
                if content["made_with"] == made_with
                and all((path.parent / line["mask"]).exists() for line in entry["lines"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_part(path: Path, made_with: str, images: dict[str, dict]) -> None:
    """What `read_part` reads."""
    text = json.dumps({"made_with": made_with, "images": images})
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def segment(images: str, out: Path, attributes: dict, texts: tuple[str, ...], classes: tuple[str, ...], align: Align,
            srm: nn.Module, device: torch.device, run: dict) -> None:
    """Segments every image of a folder and writes below `out`, for an image photo.jpg:

    photo.png (binary mask, 0 or 255, the image's own size), overlays/photo.png (with its points), and a line of
    masks.jsonl. With several texts the two are called photo-<text>.png, and photo-classes.png is an indexed picture:
    0 = nothing, k = the k-th text, where masks overlap the one of the highest SRM probability.

    masks.jsonl gets an image's lines as soon as its masks are there; lines of masks that earlier calls made stay.
    masks.json.part keeps which images are done, so that the same call goes on after a kill, and does only the broken
    files once they are mended; it goes when all images are done.

    attributes: of the run's cache, from which SAM and CLIP are loaded. align: AlignSAM on embeddings (B, C, h, w) and
    maps (B, h, w). run: what tells this run from others, for JSON. Raises UserError where a model is not the cache's,
    where two images' files would have one name, in this folder or with an earlier one, where an image's features are not
    finite or do not fit into memory, and at the end where files could not be read.
    """
    folder = Path(images).expanduser()
    paths, chosen = find_images(folder), choose_texts(texts, classes)
    names = name_files(paths, [*(texts[text] for text in chosen), "classes"] if len(texts) > 1 else [])
    lines, home = read_lines(out / "masks.jsonl"), str(folder.resolve())
    written = {f"{name}.png": path for path in paths for name in names[path]}
    for mask, line in lines.items():
        if mask in written and line.get("folder", home) != home:
            raise UserError(f"{out / mask} is the mask of {Path(line['folder'], line['image'])}, and that of "
                            f"{written[mask]} would replace it: rename the image, or move {out} away")
    sam = load_sam(attributes["sam"], device)
    clip, tokenizer = load_clip(attributes["clip"], device)
    for name, found in (("sam", sam_fingerprint(sam)), ("clip", checkpoint.fingerprint(clip.state_dict()))):
        if found != attributes[f"{name}_fingerprint"]:
            raise UserError(f"{name.upper()}={attributes[name]} is not the one that made the cache: run stage 1 again")
    embedder = SamEmbedder(sam, attributes["precision"])
    surgery, frame = ClipSurgery(clip, tokenizer, attributes["clip_size"], texts), attributes["image_size"]
    frozen = FrozenModels(embedder, surgery, frame)

    def compute(batch: list[tuple[Path, np.ndarray]]) -> tuple[Episode, np.ndarray]:
        """AlignSAM on the chosen texts of one image: the episode as it ended, and masks (K, H, W) bool."""
        [(path, image)] = batch
        embedding, maps = frozen.compute([frozen.see(image)])
        for what, values in (("SAM's embedding", embedding), ("the CLIP map", maps)):
            if not values.isfinite().all():
                raise UserError(f"{what} of {path} holds NaN or infinite values: run stage 1 with PRECISION=fp32 into "
                                "another RUN_DIR, or check the weights")
        episode = align(embedding.expand(len(chosen), -1, -1, -1), maps[0, chosen])
        return episode, np.stack([full_masks(logits, image.shape[:2]).cpu().numpy() for logits in episode.logits])

    # what a stopped call has done, of images that are still the same
    part = out / "masks.json.part"
    made_with = json.dumps({"folder": home, "classes": chosen, **run})
    stamps = {path.name: stamp(path) for path in paths}
    done = {name: entry for name, entry in read_part(part, made_with).items() if entry["stamp"] == stamps.get(name)}
    lines |= {line["mask"]: line for entry in done.values() for line in entry["lines"]}
    if not done:
        part.unlink(missing_ok=True)  # another call's, whose masks this one may replace
    write_lines(out / "masks.jsonl", lines)

    broken, left = [], [path for path in paths if path.name not in done]
    for path in tqdm(left, "segmenting", initial=len(done), total=len(paths)):
        try:
            image = load_image(path)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            broken.append(path.name)
            continue
        mend = f"set DEVICE=cpu, or make {path} smaller"
        [(_, (episode, masks))] = in_batches([(path, image)], 1, compute, mend)

        scale, own = np.array(image.shape[1::-1]) / frame, {}
        for name, mask, text, points, labels, quality in zip(
                names[path], masks, chosen, episode.points.cpu().numpy(), episode.labels.tolist(),
                episode.predicted_iou.tolist()):
            save(out / f"{name}.png", Image.fromarray(mask.astype(np.uint8) * 255))
            picture = overlay(image, mask, image.shape[1::-1])
            draw_points(picture, points, labels, frame)
            save(out / "overlays" / f"{name}.png", picture)
            own[f"{name}.png"] = {
                "folder": home, "image": path.name, "text": texts[text], "mask": f"{name}.png", "labels": labels,
                "points": (points * scale).round(1).tolist(), "predicted_iou": round(quality, 4)}
        if len(texts) > 1:
            save(out / f"{names[path][-1]}.png", indexed(masks, episode.foreground(srm), chosen))
        lines |= own
        write_lines(out / "masks.jsonl", lines)
        done[path.name] = {"stamp": stamps[path.name], "lines": list(own.values())}
        write_part(part, made_with, done)
    print(f"wrote masks of {len(paths) - len(broken)} images to {out}")
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} files could not be read ({', '.join(broken[:5])}"
                        f"{', ...' if len(broken) > 5 else ''}): mend or remove them; the other images are done")
    part.unlink(missing_ok=True)


def indexed(masks: np.ndarray, y_r: torch.Tensor, texts: list[int]) -> Image.Image:
    """masks (K, H, W) bool and y_r (K, h, w) to one indexed picture: 1 + text of the most probable mask there, or 0."""
    probability = F.interpolate(y_r[:, None], masks.shape[1:], mode="bilinear")[:, 0].cpu().numpy()
    best = np.where(masks, probability, -1).argmax(0)
    picture = Image.fromarray(np.where(masks.any(0), 1 + np.array(texts)[best], 0).astype(np.uint8))
    picture.putpalette(palette())
    return picture


def save(path: Path, picture: Image.Image) -> None:
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG"))
