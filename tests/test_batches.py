"""Batches that do not fit are halved and tried again, a line says so, and no item is lost."""

import numpy as np
import pytest
import torch

from common.frozen.sam import SamEmbedder
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.runtime.settings import override
from tests.conftest import STAGES, arrays, load_script, one_thread

CPU_WORDS = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
             "memory: you tried to")


def fits(most: int, error: type[RuntimeError] = torch.OutOfMemoryError):
    """A computation with memory for `most` items; `asked` holds the batch sizes it was given."""
    def compute(batch: list[int]) -> list[int]:
        compute.asked.append(len(batch))
        if len(batch) > most:
            raise error(CPU_WORDS)
        return [item * 10 for item in batch]
    compute.asked = []
    return compute


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_batch_that_does_not_fit_is_halved_for_good_and_said_once_a_halving(error, capsys):
    compute = fits(2, error)
    found = list(in_batches(range(11), 8, compute, ""))
    assert [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert all(result == [item * 10 for item in batch] for batch, result in found)
    assert compute.asked == [8, 4, 2, 2, 2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "out of memory: from here on with BATCH_SIZE=4",
        "out of memory: from here on with BATCH_SIZE=2"]


def test_where_there_is_room_batches_are_whole_and_nothing_is_said(capsys):
    compute = fits(4)
    batches = [batch for batch, _ in in_batches(range(9), 4, compute, "")]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert compute.asked == [4, 4, 1] and capsys.readouterr().err == ""


def test_no_room_for_one_is_a_sentence_that_says_what_to_do(capsys):
    with pytest.raises(UserError, match="^out of memory at BATCH_SIZE=1: buy more$"):
        list(in_batches(range(5), 3, fits(0), "buy more"))
    assert capsys.readouterr().err == "out of memory: from here on with BATCH_SIZE=1\n"


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def compute(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        list(in_batches(range(5), 3, compute, ""))


def test_stage_1_finds_its_batch_size(workplace, monkeypatch, capsys):
    stage = load_script("01_cache_features.py")
    override(vars(stage), [*STAGES["01_cache_features.py"], "TASK=folder", "DEVICE=cpu",
                           "RUN_DIR=halved", "BATCH_SIZE=8"])
    embed = SamEmbedder.embed

    def little_memory(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(self, images)

    monkeypatch.setattr(SamEmbedder, "embed", little_memory)
    monkeypatch.chdir(workplace)
    with one_thread():  # as the workplace was made
        stage.main()
    assert "BATCH_SIZE=2\n" in capsys.readouterr().err
    whole = arrays(workplace / "runs/folder/features.h5")  # made with BATCH_SIZE=2
    for name, values in arrays(workplace / "halved/features.h5").items():
        assert np.array_equal(values, whole[name]), name
