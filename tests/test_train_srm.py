"""Stage 2 brings its samples into the states in which the SRM is asked during prompting."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.episode import Episode, patch_centres
from tests.conftest import load_script
from tests.test_episode import Recorder


@pytest.fixture
def stage():
    return load_script("02_train_srm.py")


@pytest.fixture
def episode():
    torch.manual_seed(0)
    allowed = torch.ones(2, 100, dtype=torch.bool)
    allowed[:, 20:] = False  # the upper two rows of patches alone have truth
    return Episode(Recorder(), torch.randn(2, 4, 10, 10), torch.rand(2, 10, 10),
                   patch_centres(800, 80), allowed)


def below(s_c: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """Stands for an SRM: foreground in the right half, background in the left.

    It is most sure of both in the lowest row, at the right end and at the left end.
    """
    logits = torch.full((len(s_t), 10, 10), -4.0)
    logits[:, :, 5:] = 4.0
    logits[:, 9, 9] = 9.0
    logits[:, 9, 0] = -9.0
    return logits


# two label maps with foreground in the upper left corner only
LABEL_MAPS = [np.pad(np.ones((1, 1), np.uint8), ((0, 9), (0, 9)))] * 2


def test_before_any_mask_nothing_is_prompted(stage, episode):
    stage.reach_state("no mask", episode, below, LABEL_MAPS, torch.Generator().manual_seed(0))
    assert episode.points.shape[1] == 0 and torch.equal(episode.state(), episode.embeddings)


@pytest.mark.parametrize("kind, positive, negative", [
    ("test-time start", [760, 760], [40, 760]),
    ("true start", [40, 40], None),  # the negative one is drawn
])
def test_points_follow_the_start_with_the_srms_labels_where_there_is_truth(
        stage, episode, kind, positive, negative):
    stage.reach_state(kind, episode, below, LABEL_MAPS, torch.Generator().manual_seed(1))
    points, labels = episode.points, episode.labels
    assert points.shape[1] > 4 and labels[:, :2].tolist() == [[1, 0]] * 2
    assert points[0, 0].tolist() == positive
    assert negative is None or points[0, 1].tolist() == negative
    assert (points[:, 2:, 1] < 160).all()  # only allowed patches, and each of them once
    for of_image in points[:, 2:].tolist():
        assert len({tuple(point) for point in of_image}) == points.shape[1] - 2
    assert torch.equal(labels[:, 2:], (points[:, 2:, 0] > 400).long())


def test_states_have_none_up_to_t_points_after_the_start(stage, monkeypatch):
    monkeypatch.setattr(stage, "ROUNDS", 3)
    counts = set()
    for seed in range(40):
        episode = Episode(Recorder(), torch.ones(2, 4, 10, 10), torch.ones(2, 10, 10),
                          patch_centres(800, 80))
        stage.reach_state("true start", episode, below, LABEL_MAPS,
                          torch.Generator().manual_seed(seed))
        counts.add(episode.points.shape[1] - 2)
    assert counts == {0, 1, 2, 3}


def test_kinds_of_states_are_drawn_by_their_shares(stage):
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(stage.draw_kind(generator) for _ in range(5000))
    assert sum(stage.STATES.values()) == 1
    shares = {kind: count / 5000 for kind, count in drawn.items()}
    assert shares == pytest.approx(stage.STATES, abs=0.03)


def test_held_out_samples_without_foreground_have_no_number_instead_of_nan(stage, capsys):
    cache = SimpleNamespace(
        samples=lambda split: np.zeros((2, 2), int),
        embeddings=lambda some: torch.ones(len(some), 4, 10, 10),
        maps=lambda some: torch.ones(len(some), 10, 10),
        truth_centres=lambda some: torch.zeros(len(some), 100, dtype=torch.uint8))
    new_episode = partial(Episode, Recorder(), centres=patch_centres(800, 80))
    run = SimpleNamespace(cache=cache, device=torch.device("cpu"))
    stage.print_held_out_accuracy(run, new_episode, below)
    printed = capsys.readouterr().out
    assert "before any mask: foreground none there, background 0.500 (2 test samples)" in printed
    assert "nan" not in printed


def test_all_held_out_samples_count_though_they_are_prompted_a_few_at_a_time(stage, capsys):
    truth = torch.zeros(70, 100, dtype=torch.uint8)
    truth[:, 5::10] = 1  # a column that `below` calls foreground,
    truth[64:] = 1  # and samples of the last batch of which it gets one half right
    prompted = []

    def embeddings(some: np.ndarray) -> torch.Tensor:
        prompted.append(len(some))
        return torch.ones(len(some), 4, 10, 10)

    cache = SimpleNamespace(samples=lambda split: np.stack([np.arange(70)] * 2, 1),
                            embeddings=embeddings,
                            maps=lambda some: torch.ones(len(some), 10, 10),
                            truth_centres=lambda some: truth[some[:, 0]])
    new_episode = partial(Episode, Recorder(), centres=patch_centres(800, 80))
    run = SimpleNamespace(cache=cache, device=torch.device("cpu"))
    stage.print_held_out_accuracy(run, new_episode, below)
    foreground, background = (64 * 10 + 6 * 50) / (64 * 10 + 6 * 100), 64 * 50 / (64 * 90)
    assert (f"before any mask: foreground {foreground:.3f}, background {background:.3f} "
            "(70 test samples)") in capsys.readouterr().out
    assert max(prompted) <= 32 and sum(prompted) == 2 * 70
