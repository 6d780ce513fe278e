"""Mask metrics of one image and their averages, through the field's reference code, PySODMetrics."""

from statistics import fmean
from typing import NamedTuple

import numpy as np
from py_sod_metrics import (
    BERHandler,
    Emeasure,
    FmeasureHandler,
    FmeasureV2,
    IOUHandler,
    OverallAccuracyHandler,
    TNRHandler,
    TPRHandler,
)
from torch import Tensor

from common.runtime.errors import UserError

METRICS = {"IoU": "mIoU", "F": "F", "BER": "BER", "E": "E", "MAE": "MAE"}  # one image: many

iou = IOUHandler(False, False)
f_measure = FmeasureHandler(False, False, beta=0.3)  # its beta is the field's beta squared
ber = BERHandler(False, False)
accuracy = OverallAccuracyHandler(False, False)
true_positive_rate = TPRHandler(False, False)
true_negative_rate = TNRHandler(False, False)


def evaluate_mask(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """IoU, F (beta^2 = 0.3), BER, E-measure and MAE of one binary mask, as fractions in 0..1.

    prediction: (H, W) bool. truth: (H, W) uint8, 1 foreground, 0 background, 255 ignored: those pixels are
    dropped from every metric, as if the image did not have them.

    Every metric here is a function of the four counts TP, FP, TN, FN, so the pixels are counted once and
    given to the library's own formulas. Its `step()` would also sweep 256 thresholds, where a binary mask
    has one: 4 ms against 0.3 on a 400x300 mask, for the same numbers (E is its `curve[128]`).

    Edge cases: empty mask on empty truth has IoU = F = 1 (the library says 0). BER is the mean of the two
    error rates; where truth has no foreground, or no background, one is undefined and BER is the other.
    E of a perfect mask is n / (n - 1) for n pixels, as in the published code, so a hair above 1.

    Raises UserError where every pixel is ignored, ValueError where the arrays do not fit the above.
    """
    if prediction.dtype != bool or prediction.shape != truth.shape:
        raise ValueError(f"{prediction.dtype} mask {prediction.shape} for truth {truth.shape}")
    valid = truth != 255
    prediction, truth = prediction[valid], truth[valid]  # (n,)
    if not truth.size:
        raise UserError("a ground-truth mask holds nothing but 255 (ignore): leave that image out")
    if truth.max() > 1:
        raise ValueError(f"truth holds the label {truth.max()}: make it binary first")
    truth = truth == 1
    foreground = int(np.count_nonzero(truth))
    background = truth.size - foreground
    counts = FmeasureV2.get_statistics(prediction, truth, foreground, background)  # tp, fp, tn, fn

    both_empty = not foreground and not counts["fp"]
    if not foreground:
        error_rate = 1 - true_negative_rate(**counts)
    elif not background:
        error_rate = 1 - true_positive_rate(**counts)
    else:
        error_rate = ber(**counts)
    return {
        "IoU": 1.0 if both_empty else float(iou(**counts)),
        "F": 1.0 if both_empty else float(f_measure(**counts)),
        "BER": float(error_rate),
        "E": e_measure(prediction, truth),
        "MAE": float(1 - accuracy(**counts)),  # the mean of |mask - truth| where both are 0 or 1
    }


def overlap(prediction: np.ndarray, truth: np.ndarray) -> float:
    """The IoU of `evaluate_mask` alone, for the rounds before the last: E-measure's share of the time is not needed."""
    known = truth != 255
    truth = truth == 1
    union = np.count_nonzero((prediction & known) | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def grid_iou(mask: Tensor, truth: Tensor) -> float:
    """Mean IoU of masks (B, h, w), foreground above 0.5, with y on the grid.

    truth (B, h, w): foreground share of each cell, or -1 where there is no truth, which does not
    count.
    """
    mask, foreground = (mask > 0.5) & (truth >= 0), truth > 0.5
    union = (mask | foreground).sum((1, 2)).clamp(min=1)
    return ((mask & foreground).sum((1, 2)) / union).mean().item()


def e_measure(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Enhanced-alignment measure (Fan et al., IJCAI 2018) of two (n,) bool arrays.

    It counts pixels and does not look at where they lie, so a flat array gives the image's value.
    """
    measure = Emeasure()
    measure.gt_fg_numel, measure.gt_size = np.count_nonzero(truth), truth.size  # what its step() would set
    return float(measure.cal_em_with_threshold(prediction, truth, threshold=0.5))


def average_iou(values: list[float], classes: list[str] | None = None) -> tuple[float, dict[str, float]]:
    """mIoU of `overlap`'s results, averaged as `average` does, and {class: its IoU}, empty without classes."""
    means = average([{key: value for key in METRICS} for value in values], classes)
    return means["mIoU"], {label: its["mIoU"] for label, its in means.get("per_class", {}).items()}


def average(per_image: list[dict[str, float]], classes: list[str] | None = None) -> dict:
    """Means of `evaluate_mask`'s results over images: {"mIoU", "F", "BER", "E", "MAE"}, fractions.

    classes: the class of each result, in the same order (VOC: one result per image and class present).
    Each metric is then averaged over the images of a class first, and over the classes after that, and
    "per_class" holds {class: its means}. There is no pooling of pixels over images. Raises UserError if empty.
    """
    if not per_image:
        raise UserError("there is no test image to average over: check the data folder and the split")
    if classes is None:
        return {name: fmean(row[key] for row in per_image) for key, name in METRICS.items()}
    per_class = {
        label: average([row for row, its in zip(per_image, classes, strict=True) if its == label])
        for label in dict.fromkeys(classes)
    }
    means = {name: fmean(row[name] for row in per_class.values()) for name in METRICS.values()}
    return means | {"per_class": per_class}


class Score(NamedTuple):
    """What one test sample's masks are worth, and what is drawn of them."""

    number: int  # the sample's place in the test set
    metrics: dict[str, float]  # `evaluate_mask` of the last mask
    counts: tuple[int, int, int, int]  # `count_pixels` of the last mask
    ious: list[float]  # `overlap` after each round, M_0 first
    chosen: int  # patches that the row chose
    hits: int  # those of them on foreground; ignored patches are none
    pictures: dict = {}

    @classmethod
    def of(cls, number: int, masks: list[np.ndarray], truth: np.ndarray, chosen: int,
           hits: int) -> "Score":
        """masks: bool (H, W) after each round. truth: uint8 (H, W), 255 ignored."""
        last, ious = masks[-1], [overlap(mask, truth) for mask in masks]
        return cls(number, evaluate_mask(last, truth), count_pixels(last, truth), ious, chosen, hits)


def count_pixels(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """TP, FP, TN, FN of a bool mask (H, W) and a uint8 truth (H, W); 255 does not count."""
    tp = int(np.count_nonzero(prediction & (truth == 1)))
    fp = int(np.count_nonzero(prediction & (truth == 0)))
    fn = int(np.count_nonzero(truth == 1)) - tp
    tn = int(np.count_nonzero(truth == 0)) - fp
    return tp, fp, tn, fn


def pool(counts: list[tuple[int, int, int, int]]) -> dict[str, float]:
    """{"IoU", "BER"} over the pixels of all images together, from their `count_pixels`.

    Shadow detection counts BER so, and VOC its IoU. Where there is no foreground at all, or no
    background, one error rate is undefined and BER is the other. An empty union is IoU 1.
    """
    tp, fp, tn, fn = (sum(column) for column in zip(*counts))
    rates = [wrong / (right + wrong) for right, wrong in ((tp, fn), (tn, fp)) if right + wrong]
    union = tp + fp + fn
    return {"IoU": tp / union if union else 1.0, "BER": fmean(rates)}


def summarise(scores: list[Score], classes: list[str] | None, rounds: int) -> dict:
    """One row of the results, of all test samples in their order.

    classes: of each sample, None for a binary task. rounds: T; FR is a share of T patches, so a
    row that chooses another number of them has none.
    Returns {"metrics": means, their "pooled" ones and perhaps FR, "iou_per_round" and
    "iou_per_round_per_class": mIoU after each round, "pictures": {number: what is drawn}}.
    """
    metrics = average([score.metrics for score in scores], classes)
    if scores[0].chosen == rounds:
        chosen = sum(score.chosen for score in scores)
        metrics["FR"] = sum(score.hits for score in scores) / chosen
    metrics["pooled"] = pool([score.counts for score in scores])
    for label, means in metrics.get("per_class", {}).items():
        means["pooled"] = pool([score.counts for score, its in zip(scores, classes) if its == label])
    after_rounds = [average_iou(list(ious), classes) for ious in zip(*(score.ious for score in scores))]
    per_class = {label: [its[label] for _, its in after_rounds] for label in after_rounds[0][1]}
    return {"metrics": metrics, "iou_per_round": [mean for mean, _ in after_rounds],
            "iou_per_round_per_class": per_class,
            "pictures": {score.number: score.pictures for score in scores if score.pictures}}
