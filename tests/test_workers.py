"""Parts that are computed side by side on a CPU give what they give one after another."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from common.frozen.sam import BatchedPrompter
from common.runtime.workers import side_by_side
from common.standin.model import build_sam

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_parts_run_at_the_same_time_with_one_torch_thread_each(two_threads):
    both_run = threading.Barrier(2, timeout=60)  # breaks, with an error, if only one part runs

    def compute(part):
        both_run.wait()
        return part, torch.get_num_threads(), threading.get_ident()

    (one, threads, ident), (two, other_threads, other_ident) = side_by_side(compute, "ab", CPU)
    assert (one, two) == ("a", "b")
    assert threads == other_threads == 1 and ident != other_ident


def test_results_keep_the_order_of_the_parts(two_threads):
    assert side_by_side(lambda part: part * part, range(50), CPU) == [n * n for n in range(50)]


def test_torch_keeps_its_threads_outside_of_the_parts():
    # in a process of its own: there the workers start here
    code = ("import torch; from threading import Thread; from common.runtime import workers\n"
            "torch.set_num_threads(2)\n"
            "workers.side_by_side(str, range(4), torch.device('cpu'))\n"
            "counts = [torch.get_num_threads()]\n"
            "later = Thread(target=lambda: counts.append(torch.get_num_threads()))\n"
            "later.start(); later.join(); print(counts)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[2, 2]\n", done.stderr


def test_what_a_part_raises_is_raised(two_threads):
    def compute(part):
        if part == 3:
            raise RuntimeError("out of memory")
        return part

    with pytest.raises(RuntimeError, match="out of memory"):
        side_by_side(compute, range(6), CPU)


def test_no_part_keeps_what_a_gradient_needs(two_threads):
    weight = torch.ones(2, requires_grad=True)
    results = side_by_side(lambda part: weight * part, range(3), CPU)
    assert not any(result.requires_grad for result in results)


def test_a_gpu_gets_its_parts_one_after_another_from_the_caller(two_threads):
    idents = side_by_side(lambda part: threading.get_ident(), range(4), torch.device("cuda"))
    assert set(idents) == {threading.get_ident()}


def test_the_number_of_threads_changes_no_bit_of_a_mask(two_threads):
    generator = torch.Generator().manual_seed(0)
    prompter = BatchedPrompter(build_sam(), max_batch=3)
    height, width = prompter.sam.prompt_encoder.image_embedding_size
    channels = prompter.sam.mask_decoder.transformer_dim
    embeddings = torch.randn(7, channels, height, width, generator=generator)
    points = torch.rand(7, 5, 2, generator=generator) * 800
    labels = torch.randint(0, 2, (7, 5), generator=generator)
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(1)
        prepared = prompter.prepare(embeddings)
        torch.set_num_threads(threads)
        answers.append(prompter.decode(prepared, points, labels))
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1])
