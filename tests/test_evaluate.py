"""Each row of the evaluation changes one thing: where the next point goes, or what labels it."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.episode import Episode, patch_centres
from common.results.pictures import MASK_COLOUR, PANEL, strip
from tests.conftest import load_script
from tests.test_episode import Recorder

ROUNDS = 6


class Answering(Recorder):
    """A SAM whose mask is foreground in the left half, whatever it is asked."""

    def decode(self, embeddings, points, labels):
        logits = torch.full((len(embeddings), 40, 40), -5.0)
        logits[:, :, :20] = 5.0
        return logits, torch.ones(len(embeddings))


@pytest.fixture
def stage():
    module = load_script("04_evaluate.py")
    module.ROUNDS = ROUNDS
    return module


def run(stage, row: str, numbers: range = range(3), favourite: int = 0):
    """Prompts with an agent that likes patch `favourite` and those after it.

    The SRM sees foreground in the lower half.
    """
    maps = torch.zeros(len(numbers), 10, 10)
    maps[:, :, 1::2] = 1  # every other column
    embeddings = torch.ones(len(numbers), 4, 10, 10)
    episode = Episode(Answering(), embeddings, maps, patch_centres(800, 80))
    liking = -((torch.arange(100) - favourite) % 100).float()
    below = torch.full((10, 10), -1.0)
    below[5:] = 1.0
    truth = (torch.arange(100) % 3 == 0).to(torch.uint8).expand(len(numbers), -1)
    logits, actions = stage.prompt(
        row,
        episode,
        lambda state: liking.expand(len(state), -1),
        lambda s_c, s_t: below.expand(len(s_t), -1, -1),
        numbers,
        stage.Truth([], truth),
    )
    assert len(logits) == actions.shape[1] + 1
    return actions, episode.labels[:, 2:], episode


def test_alignsam_follows_the_agent_and_the_srm(stage):
    actions, labels, _ = run(stage, "AlignSAM", favourite=47)
    assert actions.tolist() == [[47, 48, 49, 50, 51, 52]] * 3
    assert labels.tolist() == [[0, 0, 0, 1, 1, 1]] * 3  # rows 4 and 5 of the patches


def test_a_point_is_foreground_where_the_srm_answers_more_than_one_half():
    embeddings, maps = torch.ones(2, 4, 10, 10), torch.ones(2, 10, 10)
    episode = Episode(Answering(), embeddings, maps, patch_centres(800, 80))
    y_r = torch.full((2, 10, 10), 0.49)
    y_r[1] = 0.51
    assert episode.label_by(y_r, torch.tensor([47, 47])).tolist() == [0, 1]


def test_without_rl_patches_are_drawn_without_the_agent_and_without_repetition(stage):
    actions, labels, _ = run(stage, "w/o RL", favourite=10)
    assert torch.equal(actions, run(stage, "w/o RL", favourite=60)[0])
    assert all(len(set(row)) == ROUNDS for row in actions.tolist())
    assert len({tuple(row) for row in actions.tolist()}) == 3
    assert torch.equal(labels, (actions >= 50).long())  # the SRM's still
    many = run(stage, "w/o RL", range(400))[0]
    counts = torch.bincount(many.flatten(), minlength=100)
    assert counts.min() > 5 and counts.max() < 50  # 24 of each are expected


def test_a_random_patch_does_not_depend_on_the_batch(stage):
    whole = run(stage, "w/o RL", range(3))[0]
    parts = [run(stage, "w/o RL", numbers)[0] for numbers in (range(2), range(2, 3))]
    assert torch.equal(torch.cat(parts), whole)


def test_without_srm_every_chosen_point_is_foreground(stage):
    actions, labels, _ = run(stage, "w/o SRM", favourite=47)
    assert torch.equal(actions, run(stage, "AlignSAM", favourite=47)[0])
    assert labels.tolist() == [[1] * ROUNDS] * 3


def test_without_msi_there_is_one_round(stage):
    actions, labels, episode = run(stage, "w/o MSI", favourite=47)
    assert actions.tolist() == [[47]] * 3 and episode.points.shape == (3, 3, 2)


def test_table_8s_rows_differ_in_the_source_of_the_label(stage):
    actions, from_map, _ = run(stage, "labels: CLIP Surgery", favourite=3)
    assert torch.equal(from_map, actions % 10 % 2)
    actions, from_mask, _ = run(stage, "labels: last mask", favourite=3)
    assert torch.equal(from_mask, (actions % 10 < 5).long())
    actions, from_truth, _ = run(stage, "oracle labels", favourite=3)
    assert torch.equal(from_truth, (actions % 3 == 0).long())


def test_every_row_starts_from_the_same_points(stage):
    rows = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", "oracle labels")
    starts = [run(stage, row)[2].points[:, :2] for row in rows]
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_sampled_actions_follow_the_policy(stage):
    stage.SAMPLE_ACTIONS, stage.ROUNDS = True, 1
    liking = torch.full((100,), -20.0)
    liking[[4, 40, 44]] = torch.tensor([0.6, 0.3, 0.1]).log()
    embeddings, maps = torch.ones(2000, 1, 10, 10), torch.zeros(2000, 10, 10)
    episode = Episode(Answering(), embeddings, maps, patch_centres(800, 80))
    actions = stage.prompt("AlignSAM", episode, lambda state: liking.expand(len(state), -1),
                           lambda s_c, s_t: torch.zeros(len(s_t), 10, 10), range(2000))[1]
    share = torch.bincount(actions.flatten(), minlength=100) / 2000
    assert np.allclose(share[[4, 40, 44]], (0.6, 0.3, 0.1), atol=0.04)
    assert share[[4, 40, 44]].sum() == 1


def test_oracle_clicks_go_where_the_mask_is_wrong(stage):
    truth = np.zeros((40, 40), np.uint8)
    truth[:, :30] = 1
    embeddings, maps = torch.ones(1, 4, 10, 10), torch.zeros(1, 10, 10)
    episode = Episode(Answering(), embeddings, maps, patch_centres(800, 80))
    truth = stage.Truth([truth], torch.empty(0))
    logits, actions = stage.prompt("oracle clicks", episode, None, None, range(1), truth)
    assert len(logits) == ROUNDS + 1 and actions.numel() == 0
    assert episode.labels.tolist() == [[1] * (ROUNDS + 1)]
    # After the first click the mask lacks columns 20 to 29.
    assert 20 * 20 <= episode.points[0, 1, 0] <= 30 * 20


def scored(stage, numbers: range, batch_size: int) -> tuple[list[bool], int]:
    """Of `evaluate`: for each batch but the first, whether the one before was freed when it was
    computed; and how often a tensor was brought from the device.
    """
    alive, freed, copies = [], [], []

    def segment_batch(row, batch):
        if alive:
            freed.append(all(reference() is None for reference in alive))
        alive.clear()
        logits = [torch.ones(len(batch), 8, 8) for _ in range(1 + ROUNDS)]
        episode = Episode(Answering(), torch.ones(len(batch), 4, 10, 10),
                          torch.zeros(len(batch), 10, 10), patch_centres(800, 80))
        alive.extend(map(weakref.ref, (*logits, episode)))
        truth = stage.Truth([np.ones((40, 40), np.uint8)] * len(batch),
                            torch.ones(len(batch), 100, dtype=torch.uint8))
        return truth, logits, torch.zeros(len(batch), ROUNDS, dtype=torch.long), episode

    def count(tensor):
        copies.append(tensor)
        return cpu(tensor)

    cpu, stage.BATCH_SIZE = torch.Tensor.cpu, batch_size
    drawing = SimpleNamespace(draw=lambda *_: {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "cpu", count)
        scores = stage.evaluate("AlignSAM", segment_batch, numbers, drawing)
    assert [score.ious for score in scores] == [[1.0] * (1 + ROUNDS)] * len(numbers)
    return freed, len(copies)


def test_a_batch_is_freed_before_the_next_is_computed(stage):
    assert scored(stage, range(6), 2)[0] == [True, True]


def test_the_bar_counts_what_is_computed(stage, monkeypatch):
    reached = []
    monkeypatch.setattr(stage.Bar, "reach", lambda self, done: reached.append((self.total, done)))
    scored(stage, range(5), 2)
    assert reached == [(5, 2), (5, 4), (5, 5)]


def test_the_masks_of_all_rounds_of_an_image_are_copied_at_once(stage):
    assert scored(stage, range(6), 3)[1] == 6 + 2 * 2  # points and labels of each of two batches


def test_in_a_strip_only_masks_and_points_have_a_colour():
    picture = np.zeros((PANEL, PANEL, 3), np.uint8)
    picture[:] = MASK_COLOUR
    truth = np.zeros((PANEL, PANEL), np.uint8)
    truth[:, :64] = 1
    row = strip("one", "blue", picture, truth, {"mask": truth.T == 1}, {}, 800)
    shown = np.asarray(row)[18:]  # below the captions
    first, second, third = (shown[:, at:at + PANEL] for at in (0, PANEL + 4, 2 * PANEL + 8))
    assert (first == MASK_COLOUR).all()
    for panel, inside in ((second, truth == 1), (third, truth.T == 1)):
        assert np.array_equal(np.ptp(panel, axis=2) > 0, inside)
