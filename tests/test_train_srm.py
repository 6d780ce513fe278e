"""Stage 2 takes its samples into the states that prompting meets."""

from collections import Counter

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
    return Episode(Recorder(), torch.randn(2, 4, 10, 10), torch.rand(2, 10, 10), patch_centres(800, 80), allowed)


def below(s_c: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """An SRM that is sure of foreground in the right half, most at the lower right, and of background elsewhere."""
    logits = torch.full((len(s_t), 10, 10), -4.0)
    logits[:, :, 5:], logits[:, 9, 9], logits[:, 9, 0] = 4.0, 9.0, -9.0
    return logits


LABELS = [np.pad(np.ones((1, 1), np.uint8), ((0, 9), (0, 9)))] * 2  # foreground in one corner


def test_before_any_mask_nothing_is_prompted(stage, episode):
    stage.reach_state("no mask", episode, below, LABELS, torch.Generator().manual_seed(0))
    assert episode.points.shape[1] == 0 and torch.equal(episode.state(), episode.embeddings)


@pytest.mark.parametrize("kind, start", [("test-time start", [[760, 760], [40, 760]]),
                                         ("true start", [[40, 40], None])])
def test_points_follow_the_start_with_the_srms_labels_where_there_is_truth(stage, episode, kind, start):
    stage.reach_state(kind, episode, below, LABELS, torch.Generator().manual_seed(1))
    points, labels = episode.points, episode.labels
    assert points.shape[1] > 4 and labels[:, :2].tolist() == [[1, 0]] * 2
    assert points[0, 0].tolist() == start[0] and start[1] in (None, points[0, 1].tolist())
    assert (points[:, 2:, 1] < 160).all()  # allowed ones, each once
    assert all(len({tuple(point) for point in its.tolist()}) == points.shape[1] - 2 for its in points[:, 2:])
    assert torch.equal(labels[:, 2:], (points[:, 2:, 0] > 400).long())


def test_kinds_of_states_are_drawn_by_their_shares(stage):
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(stage.draw_kind(generator) for _ in range(5000))
    assert sum(stage.STATES.values()) == 1
    assert {kind: count / 5000 for kind, count in drawn.items()} == pytest.approx(stage.STATES, abs=0.03)
