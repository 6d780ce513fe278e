"""The four stages with DEVICE=cuda, rehearsed on a GPU that is none (see `pretend_cuda`)."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common.runtime import files, script
from common.runtime.settings import override
from tests.conftest import STAGES, arrays, load_script, one_thread

rehearsal = pytest.importorskip("tests.pretend_cuda", exc_type=ImportError,
                                reason="this torch has other private names")


def rehearse(name: str, *arguments: str, room: float = float("inf")) -> int:
    """Runs a stage in this process on a pretended GPU; returns the most bytes it held at once."""
    stage = load_script(name)
    given = ["TASK=folder", "DEVICE=cuda", "RUN_DIR=gpu", *STAGES[name], *arguments]
    override(vars(stage), given)
    with one_thread(), rehearsal.pretend(room) as gpu:  # as `run` starts the stages on the CPU
        stage.main()
    return gpu.peak


@pytest.fixture
def in_workplace(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(files, "lock", lambda folder: None)  # this process locks it for each stage
    return workplace


def same(one: object, other: object) -> bool:
    """Whether two checkpoints' contents are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() | other.keys()
        return all(key in one and key in other and same(one[key], other[key])
                   for key in keys - {"seconds"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_all_stages_and_images_end_on_cuda_as_on_the_cpu(in_workplace):
    cpu, gpu = in_workplace / "runs/folder", in_workplace / "gpu"
    with h5py.File(cpu / "features.h5") as file:
        precision = file.attrs["precision"]
    assert rehearse("01_cache_features.py", f"PRECISION={precision}") > 0
    for name in [*STAGES][1:]:
        assert rehearse(name) > 0
    for name, values in arrays(gpu / "features.h5").items():
        assert np.array_equal(values, arrays(cpu / "features.h5")[name]), name
    for name in ("srm.pt", "agent.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (cpu, gpu))
        assert same(one, other), name
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (cpu, gpu))
    assert one["rows"] == other["rows"]

    rehearse("04_evaluate.py", "IMAGES=data/test/images")
    assert len(list((gpu / "masks").glob("*.png"))) == 6


def test_too_little_memory_halves_the_batches_and_then_ends_in_a_sentence(
        in_workplace, monkeypatch, capsys):
    shutil.rmtree("little", ignore_errors=True)
    peak = rehearse("01_cache_features.py", "RUN_DIR=little", "BATCH_SIZE=8")
    shutil.rmtree("little")
    capsys.readouterr()
    rehearse("01_cache_features.py", "RUN_DIR=little", "BATCH_SIZE=8", room=peak - 1)
    assert "out of memory: from here on with BATCH_SIZE=4" in capsys.readouterr().err
    shutil.rmtree("little")
    monkeypatch.setattr(sys, "argv", ["01_cache_features.py"])
    with pytest.raises(SystemExit, match="^error: out of memory: set smaller sizes or batches"):
        script.run(partial(rehearse, "01_cache_features.py", "RUN_DIR=little", room=peak / 9), {})
