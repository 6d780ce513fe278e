"""Masks for images of one's own, by a trained run.

There is no ground truth and no cache. Images may be of any size and of any format that Pillow
reads.
"""

import errno
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.cache import Cache
from common.episode import Episode
from common.frozen.clip_surgery import ClipSurgery
from common.frozen.clip_weights import clip_setup, load_clip
from common.frozen.models import FrozenModels
from common.frozen.sam import SamEmbedder, full_masks
from common.frozen.sam_weights import load_cached_sam
from common.images import frame_count, load_image, register_heif
from common.results.pictures import draw_points, overlay, save_picture
from common.runtime import checkpoint, script
from common.runtime.batches import in_batches, is_out_of_memory
from common.runtime.errors import UserError, some
from common.runtime.files import append_text, expanded, require_ours, write_text
from common.runtime.run import Run
from common.runtime.settings import choose

_LONGEST = 255  # bytes of a file's name on most file systems
# what to install where Pillow cannot read these
_PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif",
             ".avif": "'pillow>=11.3'"}
# AlignSAM's prompting of embeddings (B, C, h, w) with maps (B, h, w): the episode as it ended
Align = Callable[[Tensor, Tensor], Episode]


def segment(images: str, run: Run, classes: tuple[str, ...], align: Align, srm: nn.Module,
            made_with: dict) -> None:
    """Segments all images of a folder and its subfolders. Of photo.jpg it writes below run/masks:

    photo.png           the binary mask, 0 or 255, of the image's own size
    overlays/photo.png  the image with its mask and points
    masks.jsonl         a line on each mask; lines of masks that earlier calls made stay

    For sub/photo.jpg these are sub/photo.png and overlays/sub/photo.png. With several texts the
    first two are called photo-<text>.png, and photo-classes.png is an indexed picture: 0 = nothing,
    k = the k-th text. Where masks overlap, it shows the one of the highest SRM probability.

    A stopped call continues where it was. An image that gets no mask (it cannot be read, its
    features are not finite, it does not fit into memory, ...) is named, and the others go on; a
    later call tries it again. See `Progress`.

    classes: see `choose_texts`.
    align: AlignSAM's prompting. srm: the SRM that it uses.
    made_with: the settings of the run, for JSON.

    Raises UserError where a model is not the cache's; where two images' files would have one name,
    in this folder or with an earlier one; where a file of the user's would be replaced; and at the
    end where images got no mask. OSError where the disk is full.
    """
    folder, out, texts = expanded(images), run.folder / "masks", run.cache.texts
    wanted = choose_texts(classes, run.cache, made_with)
    paths, passed_over = find_images(folder, out)
    indices = [texts.index(text) for text in wanted]
    names = name_files(paths, [*wanted, "classes"] if len(texts) > 1 else [])
    progress = Progress(out, folder.resolve())
    progress.require_free(names)
    frozen = load_models(run.attributes, texts, run.device)
    progress.go_on(paths, {"classes": indices, **made_with})
    segment_batch = partial(segment_one, frozen, align, indices)

    def make_masks(path: Path) -> int:
        """Writes all files of an image; returns how many frames the image has."""
        image, frames = load_image(folder / path, first_frame=True), frame_count(folder / path)
        mend = f"set DEVICE=cpu, or make {folder / path} smaller"
        batch = [(folder / path, image)]
        _, (episode, masks) = next(in_batches(batch, 1, segment_batch, mend))
        about = {"folder": str(progress.folder), "image": path.as_posix()}
        lines = write_masks(out, names[path], wanted, image, masks, episode, frozen.frame, about)
        if len(texts) > 1:
            picture = indexed(masks, episode.foreground(srm), indices)
            save_picture(picture, out / f"{names[path][-1]}.png")
        progress.add(path, lines)
        return frames

    without_mask, several_frames = [], []
    left = [path for path in paths if path.as_posix() not in progress.images]
    for path in tqdm(left, "segmenting", initial=len(paths) - len(left), total=len(paths)):
        try:
            if make_masks(path) > 1:
                several_frames.append(path.as_posix())
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if not concerns_one_image(error):
                raise
            reason = str(error) or "out of memory"  # a MemoryError says nothing
            tqdm.write(f"no mask of {path}: {reason}", file=sys.stderr)
            without_mask.append(path.as_posix())

    progress.write_lines()
    print(f"wrote masks of {len(paths) - len(without_mask)} images to {out}")
    if several_frames:
        print(f"only the first of several frames or pages was used of {some(several_frames)}")
    print_passed_over(passed_over)
    if without_mask:
        raise UserError(f"{len(without_mask)} of {len(paths)} images got no mask "
                        f"({some(without_mask)}), and it is said above why: mend or remove them "
                        "and run the same command again; the other images are done")
    progress.end()


def concerns_one_image(error: Exception) -> bool:
    """Whether the next image may go well all the same."""
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return isinstance(error, (UserError, MemoryError)) or is_out_of_memory(error)


# ---- what is asked for

def check(images: str, classes: tuple[str, ...], masks: str) -> None:
    """Raises UserError where IMAGES does not go with CLASSES, MASKS, or torchrun."""
    if images:
        script.require_one_process("IMAGES")
        if masks:
            raise UserError("MASKS are masks of the test set, and IMAGES have no truth to score "
                            "them by: leave one of the two out")
    elif classes != ("all",):
        raise UserError("CLASSES belongs to IMAGES: set IMAGES to a folder, or leave CLASSES out")


def choose_texts(classes: tuple[str, ...], cache: Cache, made_with: dict) -> list[str]:
    """The texts to look for. CLASSES=all are those that training has seen; the others are named.

    made_with: the settings of the training. Raises UserError where CLASSES names an unknown text.
    """
    wanted = choose("CLASSES", classes, cache.texts)
    if classes != ("all",):
        return wanted
    shots = cache.samples("train")[:made_with["shots"] or None]
    seen = set(shots[:, 1].tolist())
    if made_with["every_text"]:  # also the other classes in these images
        seen |= set(np.flatnonzero(cache.present(shots[:, 0]).any(0)).tolist())
    unseen = [text for index, text in enumerate(cache.texts) if index not in seen]
    if unseen:
        print(f"not looked for, as no training sample shows them: {', '.join(unseen)} (CLASSES "
              "can name them all the same)")
    return [text for text in wanted if text not in unseen]


def find_images(folder: Path, out: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The pictures in `folder` and its subfolders, relative to it, and what else was found there.

    Pictures are files whose name ends as a format that Pillow reads. The others are {why they are
    passed over: names}. What is hidden, and the run folder, whose subfolder `out` is, do not count.

    Raises UserError if there are no pictures.
    """
    if not folder.is_dir():
        raise UserError(f"IMAGES={folder} is no folder: name the folder that holds your images")
    register_heif()
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN and not is_stub(Image.OPEN[kind][0])}
    found, passed_over = [], {}

    def pass_over(why: str, path: Path) -> None:
        passed_over.setdefault(why, []).append(path.relative_to(folder).as_posix())

    def closed(error: OSError) -> None:
        pass_over("which are folders that cannot be opened", Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=closed):
        here = Path(parent)
        for name in [name for name in folders if (here / name).is_symlink()]:
            pass_over("which are links to folders", here / name)
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and (here / name).resolve() not in (out.resolve(),
                                                                out.parent.resolve()))
        for path in (here / name for name in sorted(files) if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix in readable and path.is_file():
                found.append(path.relative_to(folder))
            elif suffix in _PACKAGES:
                pass_over(f"which need another package (pip install {_PACKAGES[suffix]})", path)
            else:
                pass_over("which are no pictures that Pillow reads", path)
    if not found:
        print_passed_over(passed_over)
        raise UserError(f"IMAGES={folder} holds no image: name a folder with files such as "
                        "photo.jpg in it")
    return sorted(found), passed_over


def is_stub(factory: object) -> bool:
    """Whether Pillow knows such files (HDF5, for one) without being able to read them."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def print_passed_over(passed_over: dict[str, list[str]]) -> None:
    for why, names in passed_over.items():
        print(f"passed over {len(names)}, {why}: {some(names)}")


def name_files(paths: list[Path], words: list[str]) -> dict[Path, list[str]]:
    """The names of each image's files, without suffix: photo-<word> for each word, else photo.

    paths: relative to the folder of images; the names have the same subfolders. What would be too
    long for a file system is cut. Raises UserError where two images would be written to one file.
    """
    stems, names, owner = Counter(path.with_suffix("") for path in paths), {}, {}
    endings = [re.sub(r"[^0-9A-Za-z]+", "-", f"-{word}") for word in words] or [""]
    room = _LONGEST - len(".png") - max(map(len, endings))
    for path in paths:
        alone = stems[path.with_suffix("")] == 1  # else a.jpg stands beside a.png
        stem = (path.parent / cut(path.stem if alone else path.name, room)).as_posix()
        names[path] = [stem + ending for ending in endings]
        for file in (file for name in names[path] for file in files_of(name)):
            if owner.setdefault(file, path) != path:
                raise UserError(f"the masks of {owner[file]} and {path} would both be written to "
                                f"{file}: rename one of the images")
    return names


def cut(name: str, room: int) -> str:
    """`name`; if it has more than `room` bytes, its beginning and a hash of the whole."""
    given = os.fsencode(name)
    if len(given) <= room:
        return name
    digest = hashlib.sha256(given).hexdigest()[:12]
    return given[:room - 13].decode("utf-8", "ignore") + "-" + digest


def files_of(name: str) -> tuple[str, str]:
    """The mask and the overlay of that name, relative to the folder of masks."""
    return f"{name}.png", f"overlays/{name}.png"


# ---- one image

def load_models(attributes: dict, texts: tuple[str, ...], device: torch.device) -> FrozenModels:
    """SAM's encoder and CLIP Surgery as the cache was made with.

    Raises UserError where they are others now.
    """
    sam = load_cached_sam(attributes, device)
    clip, tokenizer = load_clip(attributes["clip"], device)
    if checkpoint.fingerprint(clip.state_dict()) != attributes["clip_fingerprint"]:
        raise UserError(f"CLIP={attributes['clip']} is not the one that made the cache: set CLIP "
                        "to the one that did, or run stage 1 again")
    setup = clip_setup(clip)
    if attributes.get("clip_setup", setup) != setup:  # older caches do not tell theirs
        raise UserError(f"CLIP={attributes['clip']} has the weights that made the cache, but is "
                        f"set up otherwise ({setup}; there {attributes['clip_setup']}): name the "
                        "model and tag in CLIP that stage 1 had")
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
        mask, overlaid = files_of(names[k])
        save_picture(Image.fromarray(masks[k].astype(np.uint8) * 255), out / mask)
        picture = overlay(image, masks[k], (width, height))
        draw_points(picture, points[k], labels[k], frame)
        save_picture(picture, out / overlaid)
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


# ---- what is done

class Progress:
    """Which masks there are: masks.jsonl for the user, masks.json.part for a call that is stopped.

    masks.jsonl gets an image's lines as soon as its masks are there. masks.json.part keeps which
    images are done, so that the same call goes on after a kill, and does only the broken files once
    they are mended. It goes when all images are done.

    Both grow at their ends: writing them anew for each of 10,000 images would take longer than the
    masks. So a kill may tear the last line, which is then left out, and until the call ends
    masks.jsonl may hold two lines of one mask, of which the last counts.
    """

    def __init__(self, out: Path, folder: Path) -> None:
        """folder: of the images. Raises UserError where either file is not what was written."""
        self.out, self.folder, self.part = out, folder, out / "masks.json.part"
        require_ours(self.part)
        self.lines = read_lines(out / "masks.jsonl")  # {mask's file name: its line}
        self.images = {}  # {image's name: its stamp and lines}
        self.made_with, self.stamps = "", {}

    def require_free(self, names: dict[Path, list[str]]) -> None:
        """Raises UserError where a mask would replace what this run did not write.

        That is a mask of an image in another folder, or any file of the user's.
        """
        stems = [stem for stems in names.values() for stem in stems]
        require_ours(*(self.out / file for stem in stems for file in files_of(stem)))
        for path, stems in names.items():
            for stem in stems:
                mask, _ = files_of(stem)
                line = self.lines.get(mask, {})
                if line.get("folder", str(self.folder)) != str(self.folder):
                    raise UserError(f"{self.out / mask} is the mask of "
                                    f"{Path(line['folder'], line['image'])}, and that of "
                                    f"{self.folder / path} would replace it: rename the image, or "
                                    f"move {self.out} away")

    def go_on(self, paths: list[Path], made_with: dict) -> None:
        """Takes over the images that a stopped call has done and that are still the same.

        made_with: the settings that this call must have had too.
        """
        self.made_with = json.dumps({"folder": str(self.folder), **made_with})
        self.stamps = {path.as_posix(): stamp(self.folder / path) for path in paths}
        for name, entry in read_part(self.part, self.made_with).items():
            if entry["stamp"] == self.stamps.get(name):
                self.images[name] = entry
                self.lines |= {line["mask"]: line for line in entry["lines"]}
        # without what another call has done: this one may replace its masks
        entries = [{"image": name, **entry} for name, entry in self.images.items()]
        write_text(self.part, json_lines({"made_with": self.made_with}, *entries))
        self.write_lines()

    def add(self, path: Path, lines: list[dict]) -> None:
        """Keeps that the image `path` is done. lines: its lines of masks.jsonl."""
        name = path.as_posix()
        self.lines |= {line["mask"]: line for line in lines}
        append_text(self.out / "masks.jsonl", json_lines(*lines))
        entry = {"image": name, "stamp": self.stamps[name], "lines": lines}
        append_text(self.part, json_lines(entry))

    def write_lines(self) -> None:
        """Writes masks.jsonl anew, with one line for each mask."""
        write_text(self.out / "masks.jsonl", json_lines(*self.lines.values()))

    def end(self) -> None:
        """All images are done."""
        self.part.unlink(missing_ok=True)


def json_lines(*values: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def whole_lines(path: Path) -> list:
    """What the lines of a file hold as JSON, without a last one that a kill has torn."""
    text = path.read_text(encoding="utf-8", errors="replace")  # a torn letter, too
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def read_lines(path: Path) -> dict[str, dict]:
    """{mask's file name: its line} of a masks.jsonl, of the masks that are still there.

    Empty where there is no masks.jsonl. Raises UserError where it is not what was written.
    """
    if not path.exists():
        return {}
    try:
        return {line["mask"]: line for line in whole_lines(path)
                if (path.parent / line["mask"]).exists()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what was written: move it away") from error


def read_part(path: Path, made_with: str) -> dict[str, dict]:
    """{image's name: its stamp and lines} of what a stopped call had done.

    Leaves out images whose masks are gone. Empty where it was another call (`made_with`), and where
    `path` is not what was written.
    """
    try:
        head, *entries = whole_lines(path)
        if head["made_with"] != made_with:
            return {}
        done = {}
        for entry in entries:
            masks = [path.parent / line["mask"] for line in entry["lines"]]
            if all(mask.exists() for mask in masks):
                done[entry["image"]] = {"stamp": entry["stamp"], "lines": entry["lines"]}
        return done
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def stamp(path: Path) -> list[int]:
    """Size and time of the last change, to tell whether a file is still the one that was read."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
