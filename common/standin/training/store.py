"""Keeps the scenes on which the stand-ins are trained, and the weights.

To draw a scene takes tens of milliseconds, and training sees each one many times. So they are drawn
once and kept in a folder.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from common.runtime import files
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
    the things of each scene. Exits with a message if the folder holds fewer scenes or other ones.
    """
    if not (folder / "things.json").exists():
        draw_scenes(folder, count)
    again = "delete the folder to draw them again"
    content = json.loads((folder / "things.json").read_text())
    if not isinstance(content, dict) or not content.items() >= _DRAWN.items():
        raise SystemExit(f"{folder} holds scenes of another generator or size: {again}")
    things = content["things"]
    if len(things) < count:
        raise SystemExit(f"{folder} holds {len(things)} scenes, but {count} are needed: {again}")
    images = np.load(folder / "images.npy", mmap_mode="r")
    maps = np.load(folder / "maps.npy", mmap_mode="r")
    return images[:count], maps[:count], things[:count]


def draw_scenes(folder: Path, count: int) -> None:
    """Draws training scenes 0 to `count` - 1. things.json is written last: then all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    side = IMAGE_SIZE
    open_memmap = np.lib.format.open_memmap
    images = open_memmap(folder / "images.npy", "w+", np.uint8, (count, side, side, 3))
    maps = open_memmap(folder / "maps.npy", "w+", np.uint8, (count, len(FIELDS), side, side))
    things = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(draw_small, range(count), chunksize=16)
        for index, scene in enumerate(tqdm(drawn, "drawing scenes", total=count)):
            images[index], maps[index], things_of_scene = scene
            things.append(things_of_scene)
    files.write_text(folder / "things.json", json.dumps(_DRAWN | {"things": things}))


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's weights, as float16. A kill leaves the old file or the new one."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    files.write_atomic(path, lambda temporary: save_file(weights, temporary))
