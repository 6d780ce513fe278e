"""Metrics against PySODMetrics' own `step()`, by hand, with ignored pixels; the paper's figures."""

import numpy as np
import py_sod_metrics as sod
import pytest
import torch

from common.metrics import average, average_iou, evaluate_mask, grid_iou, overlap
from common.results.paper import paper_row, results_table
from common.runtime.errors import UserError


def masks(seed: int, shape: tuple[int, int] = (60, 80)) -> tuple[np.ndarray, np.ndarray]:
    """A truth of one random rectangle, and a prediction with one in five pixels flipped."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.uint8)
    top, left = rng.integers(0, shape[0] // 2), rng.integers(0, shape[1] // 2)
    truth[top : top + rng.integers(3, 30), left : left + rng.integers(3, 40)] = 1
    return (truth == 1) ^ (rng.random(shape) < 0.2), truth


def by_the_library(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PySODMetrics as its users call it: 8-bit pictures into `step()`."""
    counts = sod.FmeasureV2(
        {
            "IoU": sod.IOUHandler(False, False, with_binary=True),
            "F": sod.FmeasureHandler(False, False, with_binary=True, beta=0.3),
            "BER": sod.BERHandler(False, False, with_binary=True),
        }
    )
    enhanced, error = sod.Emeasure(), sod.MAE()
    for metric in (counts, enhanced, error):
        metric.step(prediction.astype(np.uint8) * 255, truth * np.uint8(255))
    values = {name: result["binary"] for name, result in counts.get_results().items()}
    values["E"] = enhanced.get_results()["em"]["curve"][128]
    values["MAE"] = error.get_results()["mae"]
    return values


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_the_library(seed):
    prediction, truth = masks(seed)
    theirs = by_the_library(prediction, truth)
    assert evaluate_mask(prediction, truth) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("predicted", ["nothing", "all", "half"])
@pytest.mark.parametrize("true", [0, 1])
def test_e_and_mae_are_the_librarys_on_uniform_truth(predicted, true):
    prediction = np.full((6, 8), predicted == "all")
    prediction[:3] |= predicted == "half"
    truth = np.full((6, 8), true, np.uint8)
    ours, theirs = evaluate_mask(prediction, truth), by_the_library(prediction, truth)
    assert (ours["E"], ours["MAE"]) == pytest.approx((theirs["E"], theirs["MAE"]), abs=1e-12)


def test_four_counts_give_the_closed_forms():
    truth = np.array([[1] * 4 + [0] * 6], np.uint8)
    prediction = np.array([[1, 1, 1, 0, 1, 0, 0, 0, 0, 0]], bool)  # TP 3, FN 1, FP 1, TN 5
    result = evaluate_mask(prediction, truth)
    assert result["IoU"] == pytest.approx(3 / 5)
    assert result["F"] == pytest.approx(1.3 * 0.75 * 0.75 / (0.3 * 0.75 + 0.75))
    assert result["BER"] == pytest.approx(1 - (3 / 4 + 5 / 6) / 2)
    assert result["MAE"] == pytest.approx(2 / 10)


def test_f_weighs_precision_over_recall():
    truth = np.array([[1] * 4 + [0] * 6], np.uint8)
    prediction = np.array([[1] + [0] * 9], bool)  # precision 1, recall 1/4
    assert evaluate_mask(prediction, truth)["F"] == pytest.approx(1.3 * 0.25 / (0.3 + 0.25))


def test_an_empty_mask_on_empty_truth_is_right():
    result = evaluate_mask(np.zeros((5, 6), bool), np.zeros((5, 6), np.uint8))
    assert (result["IoU"], result["F"], result["BER"], result["MAE"]) == (1, 1, 0, 0)


def test_a_mask_on_empty_truth_is_wrong_in_its_share_of_the_background():
    prediction = np.zeros((4, 5), bool)
    prediction[0] = True
    result = evaluate_mask(prediction, np.zeros((4, 5), np.uint8))
    assert (result["IoU"], result["F"], result["BER"]) == (0, 0, pytest.approx(1 / 4))


def test_an_empty_mask_on_some_foreground_has_no_overlap():
    truth = np.zeros((4, 5), np.uint8)
    truth[0] = 1
    result = evaluate_mask(np.zeros((4, 5), bool), truth)
    assert (result["IoU"], result["F"], result["BER"], result["MAE"]) == (0, 0, 0.5, 0.25)


def test_ber_on_full_truth_is_the_share_of_missed_foreground():
    prediction = np.ones((4, 5), bool)
    prediction[0] = False
    result = evaluate_mask(prediction, np.ones((4, 5), np.uint8))
    assert (result["IoU"], result["BER"]) == (pytest.approx(3 / 4), pytest.approx(1 / 4))


@pytest.mark.parametrize("under_ignore", [True, False])
def test_ignored_pixels_count_as_if_cropped_away(under_ignore):
    prediction, truth = masks(7)
    cropped = evaluate_mask(prediction[:40, 10:], truth[:40, 10:])
    truth[40:], truth[:, :10] = 255, 255
    prediction[40:], prediction[:, :10] = under_ignore, under_ignore
    assert evaluate_mask(prediction, truth) == cropped


@pytest.mark.parametrize("seed", range(3))
def test_overlap_alone_is_the_iou_of_all_metrics(seed):
    prediction, truth = masks(seed)
    truth[:, ::3] = 255
    assert overlap(prediction, truth) == pytest.approx(evaluate_mask(prediction, truth)["IoU"])


def test_overlap_is_intersection_over_union_of_the_pixels_that_are_known():
    truth = np.array([[1, 1, 1, 0, 0, 255, 255]], np.uint8)
    prediction = np.array([[1, 1, 0, 1, 0, 1, 1]], bool)
    assert overlap(prediction, truth) == pytest.approx(2 / 4)


def test_overlap_with_nothing_is_whole_for_an_empty_mask_and_none_for_any_other():
    truth = np.array([[0, 0, 0, 255]], np.uint8)
    assert overlap(np.array([[False, False, False, True]]), truth) == 1
    assert overlap(np.array([[True, False, False, False]]), truth) == 0


@pytest.mark.parametrize("mask, truth, iou", [
    ([[0.9, 0.9], [0.1, 0.1]], [[1.0, 0.0], [0.6, 0.4]], 1 / 3),
    ([[0.9, 0.9], [0.1, 0.9]], [[1.0, -1.0], [0.0, -1.0]], 1),  # two cells have no truth
    ([[0.2, 0.3], [0.1, 0.9]], [[0.4, 0.1], [0.0, -1.0]], 1),  # nothing, and nothing found
    ([[0.2, 0.6], [0.1, 0.9]], [[0.4, 0.1], [0.0, -1.0]], 0)])
def test_iou_on_the_grid_is_that_of_the_cells_with_a_truth(mask, truth, iou):
    both = [torch.tensor([values, np.eye(2).tolist()]) for values in (mask, truth)]
    assert grid_iou(*both) == pytest.approx((iou + 1) / 2)  # the mean with a perfect one


def test_arrays_that_do_not_fit_are_refused():
    prediction, truth = masks(1)
    with pytest.raises(UserError, match="nothing but 255"):
        evaluate_mask(prediction, np.full_like(truth, 255))
    for mask, labels in [(prediction.astype(float), truth), (prediction[1:], truth),
                         (prediction, truth * 2)]:
        with pytest.raises(ValueError, match="mask|label"):
            evaluate_mask(mask, labels)


def test_the_mean_is_over_images_and_not_over_pixels():
    large, small = masks(2, (90, 90)), masks(3, (60, 70))
    both = [evaluate_mask(*large), evaluate_mask(*small)]
    means = average(both)
    assert set(means) == {"mIoU", "F", "BER", "E", "MAE"}
    for key, name in [("IoU", "mIoU"), ("F", "F"), ("BER", "BER"), ("E", "E"), ("MAE", "MAE")]:
        assert both[0][key] != both[1][key]
        assert means[name] == pytest.approx(np.mean([row[key] for row in both]))


def test_classes_weigh_alike_however_many_images_hold_them():
    rows = [dict.fromkeys(("IoU", "F", "BER", "E", "MAE"), value) for value in (0.2, 0.9, 0.4)]
    means = average(rows, ["cat", "dog", "cat"])
    by_class = {label: row["mIoU"] for label, row in means["per_class"].items()}
    assert by_class == pytest.approx({"cat": 0.3, "dog": 0.9})
    assert [means[name] for name in ("mIoU", "F", "BER", "E", "MAE")] == pytest.approx([0.6] * 5)


def test_the_iou_of_a_round_is_averaged_as_the_last_one_and_told_per_class():
    assert average_iou([0.2, 0.4]) == (pytest.approx(0.3), {})
    mean, by_class = average_iou([0.2, 0.4, 0.9], ["cat", "cat", "dog"])
    assert by_class == pytest.approx({"cat": 0.3, "dog": 0.9}) and mean == pytest.approx(0.6)


def test_an_average_of_nothing_is_refused():
    with pytest.raises(UserError, match="no test image"):
        average([])


def test_the_papers_figures_are_those_of_its_tables():
    assert paper_row("cuhk")["AlignSAM"] == {"mIoU": 68.47, "F": 76.89, "FR": 70.90}
    assert paper_row("sbu")["Painter"] == {"mIoU": 9.31, "BER": 47.89}
    assert paper_row("msd")["w/o RL"] == {"mIoU": 33.41, "F": 46.91, "FR": 22.80}
    assert paper_row("duts")["w/o SRM"] == {"E": 30.52, "MAE": 0.587}
    assert paper_row("voc")["MSA"]["mIoU"] == 47.12 and paper_row("voc")["AlignSAM"]["cow"] == 72.97
    with pytest.raises(KeyError):
        paper_row("demo")


def test_a_results_table_sets_the_papers_figures_beside_ours():
    ours = {"AlignSAM": {"mIoU": 0.5, "E": 0.7, "MAE": 0.12345, "FR": 0.3}}
    table = results_table(ours, paper_row("duts"))
    lines = table.splitlines()
    assert lines[0] == "|  | mIoU | E | E (paper) | MAE | MAE (paper) | FR | FR (paper) |"
    assert lines[2] == "| AlignSAM | 50.00 | 70.00 | 78.21 | 0.123 | 0.082 | 30.00 | 32.90 |"
    assert "| PerSAM (paper only) | – | – | 64.13 | – | 0.257 | – | – |" in lines
    assert len(lines) == 2 + len(paper_row("duts"))


def test_a_results_table_of_a_task_that_is_not_in_the_paper_has_our_columns_only():
    assert results_table({"ours": {"mIoU": 0.5}, "other": {"F": 0.25}}) == (
        "|  | mIoU | F |\n| --- | ---: | ---: |\n| ours | 50.00 | – |\n| other | – | 25.00 |\n"
    )
