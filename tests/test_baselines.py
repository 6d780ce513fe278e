"""What the agent is compared with: which points, which thresholds, which clicks."""

import numpy as np
import pytest
import torch

from common.baselines import best_threshold, next_clicks, prompt_with_map, srm_alone
from common.episode import Episode, patch_centres
from tests.test_episode import Recorder


def new_episode(maps: torch.Tensor) -> Episode:
    return Episode(Recorder(), torch.ones(len(maps), 4, 10, 10), maps, patch_centres(800, 80))


def test_the_srm_alone_is_foreground_where_it_says_more_than_one_half():
    logits = torch.randn(2, 10, 10)
    mask = srm_alone(new_episode(torch.rand(2, 10, 10)), lambda s_c, s_t: logits[:len(s_t)]) > 0
    assert torch.equal(mask, logits > 0)


def test_the_best_threshold_is_the_one_whose_masks_fit_the_training_samples():
    truths = [np.zeros((40, 40), np.uint8) for _ in range(3)]
    for index, truth in enumerate(truths):
        truth[10 * index:10 * index + 12, 5:30] = 1
    maps = torch.stack(
        [torch.from_numpy(np.where(truth == 1, 0.62, 0.48)) for truth in truths]
    ).float()
    assert 0.48 < best_threshold(maps, truths) < 0.62


@pytest.mark.parametrize(
    "ignored, taken_for, moved_to", [(0.72, 0, (0.7, 0.9)), (0.12, 1, (0, 0.12))]
)
def test_ignored_pixels_do_not_move_the_threshold(ignored, taken_for, moved_to):
    truth = np.full((40, 40), 255, np.uint8)
    truth[:10], truth[10:20] = 1, 0
    values = np.where(truth == 1, 0.62, np.where(truth == 0, 0.32, ignored))
    values[:5] = 0.92  # the surer half of the target
    maps = torch.from_numpy(values)[None].float()
    assert 0.32 < best_threshold(maps, [truth]) < 0.62
    low, high = moved_to  # where it would lie if they counted
    assert (
        low
        < best_threshold(maps, [np.where(truth == 255, taken_for, truth).astype(np.uint8)])
        < high
    )


def test_the_maps_points_are_its_highest_and_lowest_patches():
    maps = torch.full((2, 10, 10), 0.5)
    maps[0, 2, 3], maps[0, 7, 7], maps[0, 9, 0], maps[0, 0, 9] = 1.0, 0.9, 0.0, 0.1
    maps[1, 1, 1], maps[1, 1, 2], maps[1, 8, 8], maps[1, 8, 9] = 1.0, 0.9, 0.0, 0.1
    episode = new_episode(maps)
    prompt_with_map(episode, 2)
    assert sorted(episode.points[0, :2].tolist()) == [[280, 200], [600, 600]]
    assert sorted(episode.points[0, 2:].tolist()) == [[40, 760], [760, 40]]
    assert episode.labels.tolist() == [[1, 1, 0, 0]] * 2


def test_no_patch_has_both_labels_where_there_are_few():
    maps = torch.rand(2, 10, 10)
    for count, patches, each in ((3, 400, 2), (51, 80, 50), (8, 800, 1)):
        episode = Episode(Recorder(), torch.ones(2, 4, 10, 10), maps, patch_centres(800, patches))
        prompt_with_map(episode, count)
        for points, labels in zip(episode.points.tolist(), episode.labels):
            assert len({tuple(point) for point in points}) == len(points)
            assert labels.sum() == each and (labels == 0).sum() == (each if patches < 800 else 0)


def test_a_click_on_an_empty_target_that_was_found_empty_is_where_the_truth_is_known():
    truth = np.full((60, 60), 255, np.uint8)
    truth[40:, 30:] = 0
    points, labels = next_clicks([np.zeros(truth.shape, bool)], [truth], 60)
    x, y = points[0, 0].tolist()
    assert truth[int(y), int(x)] == 0 and labels.tolist() == [[0]]


def test_the_first_click_is_the_middle_of_the_largest_part_of_the_target():
    truth = np.zeros((100, 200), np.uint8)
    truth[20:61, 40:81], truth[90:95, 180:190] = 1, 1
    points, labels = next_clicks([np.zeros(truth.shape, bool)], [truth], 800)
    # X, y in the squashed frame.
    assert points.tolist() == [[[60.5 * 4, 40.5 * 8]]] and labels.tolist() == [[1]]


def test_the_next_click_is_where_the_mask_is_most_wrong_and_tells_the_truth():
    truth = np.zeros((100, 100), np.uint8)
    truth[10:31, 10:31] = 1
    mask = truth == 1
    mask[50:91, 50:91] = True  # too much, larger than what follows
    mask[10:20, 10:20] = False  # missed
    points, labels = next_clicks([mask], [truth], 800)
    assert points.tolist() == [[[564, 564]]] and labels.tolist() == [[0]]


def test_no_click_falls_on_what_has_no_truth():
    truth = np.zeros((60, 60), np.uint8)
    truth[:40] = 255
    truth[50:, :5] = 1
    points, labels = next_clicks([np.ones(truth.shape, bool)], [truth], 60)
    x, y = points[0, 0].tolist()
    assert truth[int(y), int(x)] == 0 and labels.tolist() == [[0]]


def test_a_perfect_mask_gets_a_click_into_the_target():
    truth = np.zeros((50, 50), np.uint8)
    truth[20:31, 20:31] = 1
    points, labels = next_clicks([truth == 1], [truth], 50)
    assert points.tolist() == [[[25.5, 25.5]]] and labels.tolist() == [[1]]
