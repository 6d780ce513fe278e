"""Stages 1 and 4 shared by two processes of torchrun (gloo, CPU).

They end like one process, and fail together.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.runtime import distributed
from tests.conftest import arrays, command, run


def start(folder: Path, script: str, *more: str) -> subprocess.Popen:
    """Starts one of the scripts in two processes, with stdout and stderr in one text."""
    _, *rest = command(script, *more)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", *rest]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(torchrun, cwd=folder, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Waits for the end, three minutes at most, so that a hang fails; returns what was printed."""
    try:
        return process.communicate(timeout=180)[0]
    finally:
        process.kill()


def process_of_rank(rank: int, torchrun: int) -> int | None:
    """The id of that rank's process among the children of torchrun's process."""
    for children in Path(f"/proc/{torchrun}/task").glob("*/children"):
        for child in children.read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(child)
    return None


@pytest.mark.skipif(not os.path.exists("/proc/self/task"),
                    reason="finds the process of a rank by /proc")
def test_stage_1_with_one_process_killed_ends_and_goes_on_to_the_same_cache(workplace):
    path = workplace / "shared/features.h5"

    def an_image_is_done() -> bool:
        return path.exists() and h5py.File(path)["done"][:].any()

    process = start(workplace, "01_cache_features.py", "RUN_DIR=shared", "BATCH_SIZE=1")
    while process.poll() is None and not an_image_is_done():
        time.sleep(0.01)
    os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
    said = finish(process)
    assert process.returncode != 0 and "wrote" not in said and "-9" in said, said
    assert said.count("error: ") <= 1  # torchrun may stop rank 0 before it notices

    process = start(workplace, "01_cache_features.py", "RUN_DIR=shared", "BATCH_SIZE=1")
    said = finish(process)
    assert process.returncode == 0 and said.count("14 images (8 training samples)") == 1, said
    # image by image too: many CPUs round otherwise in a batch of another size
    assert run(workplace, "01_cache_features.py", "RUN_DIR=whole", "BATCH_SIZE=1").returncode == 0
    whole = arrays(workplace / "whole/features.h5")
    for name, values in arrays(path).items():
        assert np.array_equal(values, whole[name]), name


def test_stage_4_writes_the_same_bytes(workplace):
    one, two = workplace / "runs/folder", workplace / "evaluated"
    two.mkdir()
    for name in ("agent.pt", "srm_log.csv"):
        shutil.copy(one / name, two / name)
    process = start(workplace, "04_evaluate.py", "RUN_DIR=evaluated",
                    "FEATURES=runs/folder/features.h5")
    said = finish(process)
    assert process.returncode == 0 and said.count("FR attainable") == 1, said
    for name in ("results.json", "strips.png", "comparison.png", "report.html"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_error_of_one_process_is_said_once_and_ends_both(workplace):
    shutil.copytree(workplace / "data", workplace / "broken")
    broken = workplace / "broken/test/images/5.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])  # its size can be read, its pixels cannot
    process = start(workplace, "01_cache_features.py", "RUN_DIR=new", "DATA_DIR=broken")
    said = finish(process)
    assert process.returncode != 0 and said.count("error: ") == 1, said
    assert "broken/test/images/5.jpg" in said, said


def test_what_is_gathered_is_in_the_order_of_the_samples():
    assert distributed.gather([(4, "e"), (5, "f"), (2, "c")]) == [(2, "c"), (4, "e"), (5, "f")]
