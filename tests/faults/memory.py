"""Shows that stage 4's memory grows by a few kB only for each test image. Run it by hand:

    python -m tests.faults.memory IMAGES=5000 [NAME=value ...]

NAME is any constant below; `help` lists them.

It builds two caches of random entries for the SAM stand-in, one of a few test images and one of
IMAGES, and an untrained agent for each. It evaluates both with 04_evaluate.py and prints the peak
resident memory of that process. The cache of 5,000 images takes 2 GB of disk meanwhile.
"""

import common.runtime.first  # noqa: F401  before torch

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import cache_file
from common.agent import Actor
from common.cache import Cache
from common.frozen.sam_weights import load_sam, sam_fingerprint
from common.runtime import checkpoint, script, settings
from common.runtime.errors import UserError
from common.srm import build_srm

IMAGES = 5000  # test images of the large cache; duts has 5,019
FEW = 100  # of the small one
ROUNDS = 2  # of prompting; more rounds take longer, but no memory that grows with the images
ROWS = ("AlignSAM",)  # as in stage 4
WHERE = ""  # a folder for the caches, which are removed at the end; empty = a temporary one

_SIZE = (300, 400)  # height, width of the images, as of most in duts
_SHOTS = 2  # the fewest that stage 1 draws
# Until a new process runs a program of its own, it counts the memory of the process that started
# it. This one has imported torch, so a small program stands between it and stage 4.
_MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def write_run(run_dir: Path, images: int) -> None:
    """A run folder that stage 4 accepts: features.h5 with `images` test images, and agent.pt."""
    sam = load_sam("demo", torch.device("cpu"))
    channels, grid = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size
    write_cache(run_dir / "features.h5", images, (channels, *grid), sam_fingerprint(sam))
    identity = Cache.open(run_dir / "features.h5").identity()
    torch.manual_seed(0)
    made_with = {
        "task": "folder", "branch": "explicit", "seed": 0, "shots": 0, "rounds": ROUNDS,
        "every_text": False, "residual": 0.0, "features": identity,
    }
    checkpoint.save_training(run_dir / "agent.pt", made_with, log=[], finished=True,
                             actor=Actor(channels), srm=build_srm("explicit", channels),
                             generator=torch.Generator())


def write_cache(cache_path: Path, images: int, embedding: tuple[int, int, int],
                fingerprint: str) -> None:
    """A cache of random entries, with embeddings (C, h, w) of that shape."""
    count = _SHOTS + images
    layout = cache_file.Layout(
        names=[f"{number:05}" for number in range(count)],
        splits=["train"] * _SHOTS + ["test"] * images,
        sizes=[_SIZE] * count, shots=[(row, 0) for row in range(_SHOTS)], texts=["blob"],
        embedding=embedding, frame=800, patch=80)
    made_with = {
        "task": "folder", "branch": "explicit", "sam": "demo", "sam_fingerprint": fingerprint,
        "clip": "demo", "clip_fingerprint": "", "clip_size": 192, "image_size": 800,
        "precision": "fp32",
    }
    rng = np.random.default_rng(0)
    picture_shape = (cache_file.PICTURE, cache_file.PICTURE, 3)
    with cache_file.CacheWriter.open_or_create(cache_path, layout, made_with) as writer:
        for row in range(count):
            label_map = np.zeros(_SIZE, np.uint8)
            top, left = rng.integers(0, 200, 2)
            label_map[top:top + 80, left:left + 80] = 1
            writer.write(row, rng.standard_normal(embedding, np.float32),
                         rng.random((1, *embedding[1:]), np.float32), label_map,
                         rng.integers(0, 256, picture_shape, np.uint8))


def peak(run_dir: Path) -> int:
    """The most resident memory that stage 4 took, in bytes. Raises UserError if stage 4 fails."""
    stage_4 = Path(__file__).parents[2] / "04_evaluate.py"
    command = [sys.executable, stage_4, "TASK=folder", f"RUN_DIR={run_dir}", f"ROUNDS={ROUNDS}",
               f"ROWS={','.join(ROWS)}", "GALLERY=0", "PICTURES=0", "DEVICE=cpu"]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], stdout=subprocess.PIPE,
                          text=True)
    if done.returncode:
        raise UserError(f"04_evaluate.py ended with status {done.returncode}: "
                        "see what it says above")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return int(done.stdout.split()[-1]) * unit


def main() -> None:
    settings.positive(globals(), "IMAGES", "FEW", "ROUNDS")
    peaks = []
    for images in (FEW, IMAGES):
        with tempfile.TemporaryDirectory(dir=WHERE or None) as folder:
            write_run(Path(folder), images)
            peaks.append(peak(Path(folder)))
    for images, found in zip((FEW, IMAGES), peaks):
        print(f"{images} test images: {found / 1e6:.0f} MB at most")


if __name__ == "__main__":
    script.run(main, globals())
