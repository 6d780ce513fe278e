"""An episode: where points go, how they are labelled, and what SAM is asked."""

import numpy as np
import pytest
import torch

from common.episode import Episode, patch_centres, random_pixels, spatial_state
from tests.conftest import one_thread


class Recorder:
    """Stands in for SAM: remembers the prompts.

    It answers with confident logits where it was last told foreground.
    """

    frame, max_batch = 800, 8

    def prepare(self, embeddings):
        return embeddings

    def decode(self, embeddings, points, labels):
        self.points, self.labels = points.clone(), labels.clone()
        return torch.full((len(embeddings), 40, 40), 3.0), torch.full((len(embeddings),), 0.7)


@pytest.fixture
def episode():
    torch.manual_seed(0)
    return Episode(
        Recorder(), torch.randn(3, 4, 10, 10), torch.rand(3, 10, 10), patch_centres(800, 80)
    )


def test_the_actions_are_the_centres_of_the_patches_row_by_row():
    centres = patch_centres(800, 80)
    assert centres.shape == (100, 2)
    assert centres[[0, 7, 23]].tolist() == [[40, 40], [600, 40], [280, 200]]


def test_before_any_mask_the_state_is_the_embedding(episode):
    assert torch.equal(episode.state(), episode.embeddings)
    assert torch.equal(episode.semantic_state(), episode.embeddings * episode.maps[:, None])


def test_a_step_prompts_with_all_points_so_far_and_updates_the_state(episode):
    episode.prompt(torch.full((3, 2, 2), 5.0), torch.tensor([[1, 0]]).expand(3, 2))
    episode.step(torch.tensor([0, 7, 23]), torch.tensor([1, 0, 1]))
    assert episode.prompter.points.shape == (3, 3, 2)
    assert episode.prompter.points[:, 2].tolist() == [[40, 40], [600, 40], [280, 200]]
    assert episode.prompter.labels.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert torch.allclose(episode.state(), episode.embeddings * torch.tensor(3.0).sigmoid())


def test_a_residual_state_keeps_its_share_of_the_embedding_where_the_mask_is_empty():
    embeddings, mask = torch.randn(1, 4, 1, 2), torch.tensor([[[0.0, 1.0]]])
    kept = spatial_state(embeddings, mask, 0.25) / embeddings
    assert torch.allclose(kept, torch.tensor([0.25, 1.0]).expand(1, 4, 1, 2))


def test_a_patch_is_not_chosen_twice(episode):
    episode.step(torch.tensor([0, 7, 23]), torch.ones(3))
    episode.step(torch.tensor([1, 8, 24]), torch.ones(3))
    assert [row.nonzero()[:, 0].tolist() for row in ~episode.allowed] == [[0, 1], [7, 8], [23, 24]]


def test_patches_without_truth_are_never_allowed():
    allowed = torch.rand(2, 100) > 0.3
    episode = Episode(
        Recorder(),
        torch.randn(2, 4, 10, 10),
        torch.rand(2, 10, 10),
        patch_centres(800, 80),
        allowed,
    )
    assert torch.equal(episode.allowed, allowed)


def test_the_start_without_truth_is_the_highest_and_the_lowest_cell(episode):
    logits = torch.zeros(3, 10, 10)
    for image, (high, low) in enumerate((((2, 3), (9, 9)), ((0, 0), (4, 5)), ((7, 1), (1, 7)))):
        logits[image][high], logits[image][low] = 2.0, -2.0
    episode.start_without_truth(lambda s_c, s_t: logits)
    assert episode.points[0].tolist() == [[280, 200], [760, 760]]
    assert episode.points[1].tolist() == [[40, 40], [440, 360]]
    assert episode.labels.tolist() == [[1, 0]] * 3


def test_a_start_point_is_the_surest_cell_though_several_round_to_probability_one(episode):
    logits = torch.zeros(3, 10, 10)
    logits[:, 1], logits[:, 6] = 30.0, -120.0  # sigmoids of exactly 1 and 0 in float32
    logits[:, 1, 4], logits[:, 6, 8] = 31.0, -121.0
    assert (logits.sigmoid() == 1).sum() == 30 and (logits.sigmoid() == 0).sum() == 30
    episode.start_without_truth(lambda s_c, s_t: logits)
    assert episode.points.round().tolist() == [[[360, 120], [680, 520]]] * 3


def test_the_srm_is_asked_a_few_images_at_a_time_and_answers_the_same(episode):
    asked = []

    def srm(s_c, s_t):
        asked.append(len(s_t))
        return (s_c + 2 * s_t).mean(1)

    whole = episode.foreground(srm)
    episode.prompter.max_batch = 2
    assert torch.equal(episode.foreground(srm), whole)
    assert asked[0] == 3 and sorted(asked[1:]) == [1, 2]  # threads come in any order
    with one_thread():
        assert torch.equal(episode.foreground(srm), whole)
    assert asked[3:] == [2, 1]


def test_a_label_is_the_srms_answer_at_the_chosen_centre(episode):
    y_r = torch.zeros(3, 10, 10)
    y_r[0, 0, 0], y_r[1, 2, 3], y_r[2, 2, 3] = 0.9, 0.4, 0.6
    assert episode.label_by(y_r, torch.tensor([0, 23, 23])).tolist() == [1, 0, 1]


def test_random_pixels_lie_on_their_labels_and_never_on_ignored_ones():
    rng = np.random.default_rng(0)
    labels = [rng.choice([0, 1, 255], (37, 61)).astype(np.uint8) for _ in range(20)]
    points = random_pixels(labels, torch.Generator().manual_seed(0), 800)
    for (positive, negative), truth in zip(points.tolist(), labels):
        for (x, y), value in ((positive, 1), (negative, 0)):
            assert truth[int(y / 800 * 37), int(x / 800 * 61)] == value


def test_random_pixels_are_drawn_over_the_whole_target():
    truth = np.zeros((4, 4), np.uint8)
    truth[:2] = 1
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(random_pixels([truth], generator, 800)[0, 0].tolist()) for _ in range(200)}
    assert len(drawn) == 8
