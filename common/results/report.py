"""report.html: one self-contained page about a run: tables, curves, a gallery to step through."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from common.results.paper import POOLED_NOTE
from common.runtime.files import write_text

SIDE = 320  # longest side of a picture in the gallery, in pixels: 200 test images are some 10 MB
QUALITY = 80  # of its JPEG
TEMPLATE = Path(__file__).with_name("report_template.html")
PLACE = "__REPORT_DATA__"  # where the template takes the data


def gallery_item(name: str, target: str | None, image: np.ndarray, truth: np.ndarray,
                 masks: np.ndarray, ious: list[float], points: np.ndarray,
                 labels: np.ndarray, frame: int) -> dict:
    """What the page shows of one test sample, as a small dict that JSON can hold.

    target: the class asked for, None where the task has one only.
    image: uint8 (H, W, 3), RGB. One of another size than the truth, such as the cache's squashed
        square, is stretched to it.
    truth: uint8 (H, W), 1 foreground, 0 background, 255 ignored.
    masks, ious: bool (1 + T, H, W) and fractions, one after each of the rounds 0..T.
    points, labels: (2 + T, 2), (x, y) in the square `frame` that the image was squashed to, and
        (2 + T,), 1 foreground, in the order of prompting: two by round 0, then one a round.

    Raises ValueError where these do not belong together.
    """
    if not len(masks) == len(ious) == len(points) - 1 == len(labels) - 1:
        raise ValueError(f"{name}: {len(masks)} masks, {len(ious)} IoUs, {len(points)} points, "
                         f"{len(labels)} labels")
    height, width = truth.shape
    shrink = min(1, SIDE / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    shares = [[round(float(x) / frame, 4), round(float(y) / frame, 4)] for x, y in points]
    return {
        "name": name, "target": target, "width": size[0], "height": size[1],
        "image": _picture_uri(image, size), "truth": _mask_uri(truth == 1, size),
        "masks": [_mask_uri(mask, size) for mask in masks], "ious": _plain(ious),
        "points": shares,  # of the sides
        "labels": [int(label) for label in labels]}


def write_report(path: Path, results: dict, srm_log: list[dict], agent_log: list[dict],
                 gallery: list[dict], paper: dict[str, dict[str, float]] | None = None) -> None:
    """Writes the page to `path`, whole or not at all.

    results: what results.json holds.
    srm_log, agent_log: stage 2's and stage 3's logs, {quantity: number} a row. The first quantity
        is the x axis. Either log may be empty.
    gallery: `gallery_item`s in any order. They are shown from the worst last IoU to the best.
    paper: the figures that the paper prints for this data set (see `paper_row`), where they are to
        stand below the results.

    What is not a finite number is shown as a dash.
    """
    data = {"results": _plain(results), "pooled_note": POOLED_NOTE, "paper": _plain(paper),
            "srm_log": _plain(srm_log),
            "agent_log": _plain(agent_log), "gallery": sorted(_plain(gallery), key=_last_iou)}
    # ASCII, because a file name that is not UTF-8 reaches Python as lone surrogates, which no file
    # can be written with
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so no name closes the script or opens a comment
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
    write_text(path, page)


def _last_iou(item: dict) -> float:
    """By what the gallery is sorted; an unknown IoU comes last."""
    last = item["ious"][-1]
    return math.inf if last is None else last


def _plain(value: object) -> object:
    """`value` as JSON can hold it.

    NumPy's numbers and arrays become Python's. NaN and infinity, which JSON lacks, become None.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture_uri(image: np.ndarray, size: tuple[int, int]) -> str:
    """uint8 (H, W, 3) as the data URI of a JPEG of `size` (width, height)."""
    file = io.BytesIO()
    small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return _uri("jpeg", file)


def _mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """bool (H, W) as the data URI of a 1-bit PNG of `size` (width, height).

    It is transparent where the mask is not.
    """
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    one_bit = grey.point(lambda value: 255 * (value >= 128), "1")
    file = io.BytesIO()
    one_bit.save(file, "PNG", transparency=0, optimize=True)
    return _uri("png", file)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
