"""Fixtures of more than one test file, and the functions that start the four scripts."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from common.standin.scenes import draw_for_task

ROOT = Path(__file__).parent.parent
STAGES = {
    "01_cache_features.py": ["SHOTS=8", "PROMPT=salient object", "BATCH_SIZE=2", "DATA_DIR=data"],
    "02_train_srm.py": ["STEPS=20", "SAVE_EVERY=2", "LOG_EVERY=5", "HELD_OUT=4", "SRM_BATCH=4"],
    "03_train_agent.py": ["EPISODES=4", "EPOCHS=2", "ROUNDS=3", "SRM_BATCH=4"],
    "04_evaluate.py": ["ROUNDS=3", "PICTURES=2", "BATCH_SIZE=2"],
}


def load_script(name: str) -> ModuleType:
    """A numbered script as a fresh module, whose constants a test may change; main is not run."""
    spec = importlib.util.spec_from_file_location(f"stage_{name[:2]}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script: str, *more: str) -> list[str]:
    """The command line that runs a script on the small data set, with `more` arguments."""
    return [sys.executable, str(ROOT / script), "TASK=folder", "DEVICE=cpu", *STAGES[script], *more]


def run(folder: Path, script: str, *more: str) -> subprocess.CompletedProcess:
    """Runs a script in `folder` to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.run(command(script, *more), cwd=folder, env=environment,
                          capture_output=True, text=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread, as in `run`: more threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_data(folder: Path) -> None:
    """Draws a data set of 10 training and 6 test images into folder/data."""
    for split, count in (("train", 10), ("test", 6)):
        images, masks = (folder / "data" / split / kind for kind in ("images", "masks"))
        images.mkdir(parents=True)
        masks.mkdir()
        for index in range(count):
            scene = draw_for_task("saliency", split, index)
            size = (200, 150 + 10 * index)
            image = Image.fromarray(scene.image)
            image.resize(size).save(images / f"{index}.jpg")
            mask = Image.fromarray(scene.label_map("saliency") * 255)
            mask.resize(size, Image.NEAREST).save(masks / f"{index}.png")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with the small data set and one uninterrupted run of all stages in runs/folder."""
    folder = tmp_path_factory.mktemp("stages")
    draw_data(folder)
    for script in STAGES:
        done = run(folder, script)
        assert done.returncode == 0, done.stderr
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All datasets of an HDF5 file, read whole."""
    with h5py.File(path) as file:
        return {name: dataset[:] for name, dataset in file.items()}


@pytest.fixture(scope="session")
def vit_b() -> Sam:
    """segment_anything's own ViT-B, with seeded random weights so that nothing is downloaded.

    Every weight gets a little noise, because a weight that is 0 or 1 at the start (position
    embeddings, biases, the scales of norms) would hide an error.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = sam_model_registry["vit_b"]()
        with torch.no_grad():
            for weight in sam.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return sam.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny() -> Sam:
    """A SAM that takes milliseconds, with an input smaller than the 800 px frame."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sam = Sam(
            ImageEncoderViT(
                img_size=256,
                embed_dim=32,
                depth=2,
                num_heads=2,
                out_chans=16,
                use_rel_pos=True,
                window_size=7,
                global_attn_indexes=(1,),
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            ),
            PromptEncoder(16, (16, 16), (256, 256), mask_in_chans=4),
            MaskDecoder(transformer_dim=16, transformer=TwoWayTransformer(2, 16, 2, 32)),
        )
        for block in sam.image_encoder.blocks:  # zero as they start, they would hide an error
            torch.nn.init.normal_(block.attn.rel_pos_h, std=0.5)
            torch.nn.init.normal_(block.attn.rel_pos_w, std=0.5)
    return sam.eval().requires_grad_(False)
