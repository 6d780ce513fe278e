"""Mask metrics of one image and their averages over images.

The formulas are those of PySODMetrics, the field's reference code.
"""

from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
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

from common.label_maps import IGNORE
from common.runtime.errors import UserError

# {name of a metric of one image: name of its mean over images}
METRICS = {"IoU": "mIoU", "F": "F", "BER": "BER", "E": "E", "MAE": "MAE"}

_ONE_MASK = {"with_dynamic": False, "with_adaptive": False}  # no thresholds: masks are binary
iou = IOUHandler(**_ONE_MASK)
f_measure = FmeasureHandler(**_ONE_MASK, beta=0.3)  # its beta is the field's beta squared
ber = BERHandler(**_ONE_MASK)
accuracy = OverallAccuracyHandler(**_ONE_MASK)
true_positive_rate = TPRHandler(**_ONE_MASK)
true_negative_rate = TNRHandler(**_ONE_MASK)


def evaluate_mask(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """IoU, F (beta^2 = 0.3), BER, E-measure and MAE of one binary mask, as fractions in 0..1.

    prediction: (H, W) bool. truth: (H, W) uint8, 1 foreground, 0 background, 255 ignored: those
    pixels are dropped from every metric, as if the image did not have them.

    Every metric here is a function of the four counts TP, FP, TN, FN. So the pixels are counted
    once, and the library's own formulas are applied to the counts. Its `step()` gives the same
    numbers (E is its `curve[128]`), but it also sweeps 256 thresholds where a binary mask has one,
    and takes 4 ms instead of 0.3 on a 400x300 mask.

    Edge cases: an empty mask on empty truth has IoU = F = 1 (the library says 0). BER is the mean
    of the two error rates; where truth has no foreground, or no background, one of them is
    undefined and BER is the other. E of a perfect mask is n / (n - 1) for n pixels, as in the
    published code, so slightly above 1.

    Raises UserError if every pixel is ignored, ValueError if the arrays are not as described.
    """
    if prediction.dtype != bool or prediction.shape != truth.shape:
        raise ValueError(f"{prediction.dtype} mask {prediction.shape} for truth {truth.shape}")
    valid = truth != IGNORE
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
    """The IoU of `evaluate_mask` alone, without the time that the other metrics take.

    It is computed for the rounds before the last.
    """
    known = truth != IGNORE
    foreground = truth == 1
    union = np.count_nonzero((prediction & known) | foreground)
    return np.count_nonzero(prediction & foreground) / union if union else 1.0


def grid_iou(mask: Tensor, truth: Tensor) -> float:
    """Mean IoU over the batch of masks (B, h, w), foreground above 0.5, on the cells of the grid.

    truth: (B, h, w), the share of foreground in each cell, also foreground above 0.5. Cells without
    a truth are -1 and do not count. Where neither has foreground, the IoU is 1.
    """
    predicted, foreground = (mask > 0.5) & (truth >= 0), truth > 0.5
    both, either = (mask.sum((1, 2)) for mask in (predicted & foreground, predicted | foreground))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).mean().item()


def centre_accuracy(labels: Tensor, truth: Tensor) -> tuple[float, float]:
    """Share of patch centres labelled right: of those on foreground, of those on background.

    labels: bool (B, A). truth: (B, A), 1 foreground, 0 background, 255 ignored.
    A share is NaN where there are no such centres.
    """
    right = labels == (truth == 1)
    return right[truth == 1].float().mean().item(), right[truth == 0].float().mean().item()


def e_measure(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Enhanced-alignment measure (Fan et al., IJCAI 2018) of two (n,) bool arrays.

    It only counts pixels, wherever they lie, so a flat array gives the value of the image.
    """
    measure = Emeasure()
    measure.gt_fg_numel = np.count_nonzero(truth)  # the library's step() would set these two
    measure.gt_size = truth.size
    return float(measure.cal_em_with_threshold(prediction, truth, threshold=0.5))


def average_iou(values: list[float],
                classes: list[str] | None = None) -> tuple[float, dict[str, float]]:
    """The mIoU of `overlap`'s results, averaged as `average` does it, and {class: its mIoU}.

    classes: the class of each result. Without them the dict is empty.
    """
    if classes is None:
        return fmean(values), {}
    of_class: dict[str, list[float]] = {}
    for value, label in zip(values, classes, strict=True):
        of_class.setdefault(label, []).append(value)
    means = {label: fmean(ious) for label, ious in of_class.items()}
    return fmean(means.values()), means


def average(per_image: list[dict[str, float]], classes: list[str] | None = None) -> dict:
    """Means of `evaluate_mask`'s results over images: {"mIoU", "F", "BER", "E", "MAE"}, fractions.

    classes: the class of each result, in the same order (VOC: one result for each image and class
    in it). Each metric is then averaged over the images of a class first and over the classes
    after that, and "per_class" holds {class: its means}. Pixels are not pooled over images.
    Raises UserError if there is no result.
    """
    if not per_image:
        raise UserError("there is no test image to average over: check the data folder and the "
                        "split")
    if classes is None:
        return {name: fmean(row[key] for row in per_image) for key, name in METRICS.items()}
    rows_of_class: dict[str, list[dict[str, float]]] = {}
    for row, label in zip(per_image, classes, strict=True):
        rows_of_class.setdefault(label, []).append(row)
    per_class = {label: average(rows) for label, rows in rows_of_class.items()}
    means = {name: fmean(row[name] for row in per_class.values()) for name in METRICS.values()}
    return means | {"per_class": per_class}


class Score(NamedTuple):
    """How good the masks of one test sample are, and what is drawn of them."""

    number: int  # the sample's place in the test set
    metrics: dict[str, float]  # `evaluate_mask` of the last mask
    counts: tuple[int, int, int, int]  # `count_pixels` of the last mask
    ious: list[float]  # `overlap` after each round, M_0 first
    chosen: int  # how many patches the row chose
    hits: int  # how many of them are on foreground; ignored pixels are not
    pictures: dict = {}

    @classmethod
    def of(cls, number: int, masks: np.ndarray, truth: np.ndarray, chosen: int,
           hits: int) -> "Score":
        """masks: bool (1 + T, H, W), after each round. truth: uint8 (H, W), 255 ignored."""
        metrics, counts = evaluate_mask(masks[-1], truth), count_pixels(masks[-1], truth)
        ious = [overlap(mask, truth) for mask in masks]
        return cls(number, metrics, counts, ious, chosen, hits)


def count_pixels(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """TP, FP, TN, FN of a bool mask (H, W) and a uint8 truth (H, W); 255 does not count."""
    tp = int(np.count_nonzero(prediction & (truth == 1)))
    fp = int(np.count_nonzero(prediction & (truth == 0)))
    fn = int(np.count_nonzero(truth == 1)) - tp
    tn = int(np.count_nonzero(truth == 0)) - fp
    return tp, fp, tn, fn


def pool(counts: list[tuple[int, int, int, int]]) -> dict[str, float]:
    """{"IoU", "BER"} over the pixels of all images together, from their `count_pixels`.

    Shadow detection computes BER so, and VOC its IoU. VOC also counts what is predicted in images
    without the class, and those are not among our samples. If there is no foreground at all, or
    no background, one error rate is undefined and BER is the other. The IoU of an empty union is 1.
    """
    tp, fp, tn, fn = (sum(column) for column in zip(*counts))
    error_rates = []
    if tp + fn:
        error_rates.append(fn / (tp + fn))
    if tn + fp:
        error_rates.append(fp / (tn + fp))
    union = tp + fp + fn
    return {"IoU": tp / union if union else 1.0, "BER": fmean(error_rates)}


def summarise(scores: list[Score], classes: list[str] | None, rounds: int) -> dict:
    """One row of the results, over all test samples in their order.

    classes: the class of each sample, None for a binary task. rounds: T. FR is a share of T
    patches, so a row that chooses another number of them has no FR.
    Pooled metrics of several classes are pooled within each class, then averaged over the classes.
    Returns {"metrics": the means, the "pooled" ones and perhaps FR, "iou_per_round" and
    "iou_per_round_per_class": mIoU after each round, "pictures": {number: what is drawn}}.
    """
    metrics = average([score.metrics for score in scores], classes)
    if scores[0].chosen == rounds:
        chosen = sum(score.chosen for score in scores)
        metrics["FR"] = sum(score.hits for score in scores) / chosen
    metrics["pooled"] = pool([score.counts for score in scores])
    if classes is not None:
        for label, means in metrics["per_class"].items():
            of_class = [score for score, its_class in zip(scores, classes) if its_class == label]
            means["pooled"] = pool([score.counts for score in of_class])
        pooled = [means["pooled"] for means in metrics["per_class"].values()]
        metrics["pooled"] = {name: fmean(its[name] for its in pooled) for name in ("IoU", "BER")}
    means_per_round = []
    per_class: dict[str, list[float]] = {}
    for ious in zip(*(score.ious for score in scores)):
        mean, class_means = average_iou(list(ious), classes)
        means_per_round.append(mean)
        for label, class_mean in class_means.items():
            per_class.setdefault(label, []).append(class_mean)
    return {"metrics": metrics, "iou_per_round": means_per_round,
            "iou_per_round_per_class": per_class,
            "pictures": {score.number: score.pictures for score in scores if score.pictures}}
