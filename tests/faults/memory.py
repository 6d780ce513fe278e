"""Does stage 4's memory stay the same however many test images there are? Run by hand:

    python -m tests.faults.memory IMAGES=5000 [NAME=value ...]     NAME is any constant below; `help` lists them

Builds two caches of random entries for the SAM stand-in, one of a few test images and one of IMAGES, and an untrained
agent for each; evaluates both by 04_evaluate.py and prints the peak resident memory of that process. Caches of 5,000
images take 2 GB of disk meanwhile.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import cache, cache_file
from common.agent import Actor
from common.frozen.sam_weights import load_sam, sam_fingerprint
from common.runtime import checkpoint, script, settings
from common.runtime.errors import UserError
from common.srm import build_srm

IMAGES = 5000  # test images of the large cache; duts has 5,019
FEW = 100  # of the small one
ROUNDS = 2  # of prompting; more take longer and no more memory that grows with the images
ROWS = ("AlignSAM",)  # as in stage 4
WHERE = ""  # a folder for the caches, which are removed at the end; empty = the system's temporary one

_SIZE = (300, 400)  # of the images, as most of duts has it
_SHOTS = 2  # the fewest that stage 1 draws
# A process counts the memory of the one that started it until it runs a program of its own, and this one has torch in
# it; so a small one stands between.
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
    layout = cache_file.Layout(
        names=[f"{number:05}" for number in range(_SHOTS + images)], splits=["train"] * _SHOTS + ["test"] * images,
        sizes=[_SIZE] * (_SHOTS + images), shots=[(row, 0) for row in range(_SHOTS)], texts=["blob"],
        embedding=(channels, *grid), frame=800, patch=80)
    made_of = {"task": "folder", "branch": "explicit", "sam": "demo", "sam_fingerprint": sam_fingerprint(sam),
               "clip": "demo", "clip_fingerprint": "", "clip_size": 192, "image_size": 800, "precision": "fp32"}
    random = np.random.default_rng(0)
    with cache_file.CacheWriter.open_or_create(run_dir / "features.h5", layout, made_of) as writer:
        for row in range(_SHOTS + images):
            labels = np.zeros(_SIZE, np.uint8)
            top, left = random.integers(0, 200, 2)
            labels[top:top + 80, left:left + 80] = 1
            embedding = random.standard_normal((channels, *grid), np.float32)
            maps = random.random((1, *grid), np.float32)
            writer.write(row, embedding, maps, labels,
                         random.integers(0, 256, (cache_file.PICTURE, cache_file.PICTURE, 3), np.uint8))

    torch.manual_seed(0)
    identity = cache.Cache.open(run_dir / "features.h5").identity()
    checkpoint.save(run_dir / "agent.pt", {
        "settings": {"task": "folder", "branch": "explicit", "seed": 0, "shots": 0, "rounds": ROUNDS,
                     "every_text": False, "residual": 0.0, "features": identity},
        "actor": Actor(channels).state_dict(), "srm": build_srm("explicit", channels).state_dict(), "log": [],
        "generator": torch.Generator().get_state(), "finished": True})


def peak(run_dir: Path) -> int:
    """Bytes of resident memory that stage 4 took at most. Raises UserError where it failed."""
    script = Path(__file__).parents[2] / "04_evaluate.py"
    stage_4 = [sys.executable, script, "TASK=folder", f"RUN_DIR={run_dir}", f"ROUNDS={ROUNDS}",
               f"ROWS={','.join(ROWS)}", "GALLERY=0", "PICTURES=0", "DEVICE=cpu"]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *stage_4], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"04_evaluate.py ended with status {done.returncode}: see what it says above")
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


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
