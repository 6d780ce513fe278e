"""Keeps the scenes on which the stand-ins are trained, and the weights.

To draw a scene takes tens of milliseconds, and training sees each one many times. So they are drawn
once and kept in a folder.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from common.runtime import files
from common.runtime.errors import UserError
from common.runtime.reading import reading
from common.standin.model import IMAGE_SIZE
from common.standin.scenes import GENERATOR, draw_for_training

FIELDS = ("instances", "surface", "shadow", "mirror", "blur")  # the maps of a Scene
_DRAWN = {"generator": GENERATOR, "side": IMAGE_SIZE}  # of the scenes that are used


def draw_small(index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Training scene `index` at the size that the stand-in sees, s = IMAGE_SIZE.

    Returns the image (s, s, 3) uint8, the maps (5, s, s) uint8 in the order of FIELDS, and the
    scene's things as dicts.
    """
    scene = draw_for_training(index)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    image = np.asarray(Image.fromarray(scene.image).resize(size, Image.BILINEAR))
    maps = []
    for name in FIELDS:
        full_size = Image.fromarray(getattr(scene, name).astype(np.uint8))
        maps.append(np.asarray(full_size.resize(size, Image.NEAREST)))
    return image, np.stack(maps), [asdict(thing) for thing in scene.things]


def load_scenes(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[list[dict]]]:
    """The first `count` training scenes; they are drawn on all cores if the folder has none.

    Returns images (count, s, s, 3) uint8 and maps (count, 5, s, s) uint8, both memory-mapped, and
    the things of each scene. Raises UserError if the folder holds fewer scenes, other ones, or
    files that are damaged or cannot be read.
    """
    if not (folder / "things.json").exists():
        try:
            draw_scenes(folder, count)
        except OSError as error:  # a write to an open file names none
            error.filename = error.filename or str(folder)
            raise
    again = "delete things.json there, and they are drawn again"
    try:
        with reading(folder / "things.json", again):
            content = json.loads((folder / "things.json").read_text(encoding="utf-8"))
        arrays = []
        for name in ("images.npy", "maps.npy"):
            with reading(folder / name, again):
                arrays.append(np.load(folder / name, mmap_mode="r"))
        if not isinstance(content, dict) or not content.items() >= _DRAWN.items():
            raise UserError(f"{folder} holds scenes of another generator or size: {again}")
        images, maps = arrays
        things = content["things"]
        if not len(images) == len(maps) == len(things):
            raise ValueError("not all files have the same number of scenes")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"the scenes in {folder} are damaged ({error}): {again}") from error
    if len(things) < count:
        raise UserError(f"{folder} holds {len(things)} scenes, but {count} are needed: {again}")
    return images[:count], maps[:count], things[:count]


def draw_scenes(folder: Path, count: int) -> None:
    """Draws training scenes 0 to `count` - 1. things.json is written last: then all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    side, things = IMAGE_SIZE, []
    shapes = {"images.npy": (count, side, side, 3), "maps.npy": (count, len(FIELDS), side, side)}
    with ExitStack() as opened:
        # Scene by scene into open files: where the disk is full, a memory map would kill us.
        images, maps = (opened.enter_context(open(folder / name, "wb")) for name in shapes)
        for file, shape in zip((images, maps), shapes.values()):
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        pool = ProcessPoolExecutor(os.cpu_count())
        opened.callback(pool.shutdown, cancel_futures=True)
        drawn = pool.map(draw_small, range(count), chunksize=16)
        for image, its_maps, its_things in tqdm(drawn, "drawing scenes", total=count):
            images.write(image.tobytes())
            maps.write(its_maps.tobytes())
            things.append(its_things)
    files.write_text(folder / "things.json", json.dumps(_DRAWN | {"things": things}))


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's weights, as float16. A kill leaves the old file or the new one.

    Raises UserError where a weight is not finite in float16.
    """
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{name} is not finite in float16, so {path} is not replaced: train "
                            "with a lower rate")
    content = safetensors.torch.save(weights)
    files.write_atomic(path, lambda temporary: temporary.write_bytes(content))
