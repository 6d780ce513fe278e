"""Scenes for training the stand-ins, drawn once: a scene takes tens of milliseconds to draw and is seen many times."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.standin.model import IMAGE_SIZE
from common.standin.scenes import draw_for_training

FIELDS = ("instances", "surface", "shadow", "mirror", "blur")


def draw_small(index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Training scene `index` at the stand-in's size: image (s, s, 3), the five FIELDS (5, s, s) uint8, its things."""
    scene = draw_for_training(index)
    side = (IMAGE_SIZE, IMAGE_SIZE)
    image = np.asarray(Image.fromarray(scene.image).resize(side, Image.BILINEAR))
    maps = [np.asarray(Image.fromarray(getattr(scene, name).astype(np.uint8)).resize(side, Image.NEAREST))
            for name in FIELDS]
    return image, np.stack(maps), [asdict(thing) for thing in scene.things]


def load_scenes(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[list[dict]]]:
    """(count, s, s, 3) uint8 images, (count, 5, s, s) uint8 maps, things a scene; drawn on all cores if not there."""
    if not (folder / "things.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
        maps = np.lib.format.open_memmap(folder / "maps.npy", "w+", np.uint8,
                                         (count, len(FIELDS), IMAGE_SIZE, IMAGE_SIZE))
        things = []
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            drawn = pool.map(draw_small, range(count), chunksize=16)
            for index, (image, layers, inventory) in enumerate(tqdm(drawn, "drawing scenes", total=count)):
                images[index], maps[index] = image, layers
                things.append(inventory)
        (folder / "things.json").write_text(json.dumps(things))
    things = json.loads((folder / "things.json").read_text())
    if len(things) < count:
        raise SystemExit(f"{folder} holds {len(things)} scenes, {count} are asked for: delete it to draw them anew")
    return (np.load(folder / "images.npy", mmap_mode="r")[:count], np.load(folder / "maps.npy", mmap_mode="r")[:count],
            things[:count])
