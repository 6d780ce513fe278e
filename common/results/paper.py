"""The figures that the paper prints, and results tables that set ours beside them."""

import json
from pathlib import Path

TABLES = json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))
CLASSES = list(TABLES["table5_iterations_voc_iou"]["rows"])  # VOC's, of Tables 5 and 8
OUR_NAMES = {"F_beta": "F", "E_phi": "E"}  # the paper's names where they differ from ours
POOLED_NOTE = ("The paper does not say whether it averages IoU and BER over images or pools the "
               "pixels of all test samples, so both are given.")
_KEYS = {"labels": "table8_label_source_voc_iou", "foreground rate": "table9_foreground_rate",
           "branches": "table4_semantic_switch", "shots": "table10_shots"}


def stand_ins(sam: str, clip: str) -> str:
    """Names the models that are this repository's own small ones: " (stand-ins: SAM, CLIP)".

    Empty where neither is. Only then can our figures be compared with the paper's.
    """
    own = [name for name, model in (("SAM", sam), ("CLIP", clip)) if model == "demo"]
    return f" (stand-ins: {', '.join(own)})" if own else ""


def paper_row(key: str) -> dict[str, dict[str, float]]:
    """What the paper prints for the task `key`: {row: {metric: figure}}, percent (MAE: a fraction).

    Rows and metrics are those of Table 2 ("cuhk", "sbu", "msd", "duts") or Table 3 ("voc": mIoU and
    the IoU of ten classes). "AlignSAM w/o RL" is called "w/o RL" here. The two rows that Table 9
    has also get its foreground rate FR. Raises KeyError for any other key.
    """
    rows = _columns("table3_voc_iou") if key == "voc" else _columns("table2", key)
    foreground_rate = _columns("table9_foreground_rate", key)
    rows["AlignSAM"]["FR"] = foreground_rate["AlignSAM"]["FR"]
    rows["w/o RL"]["FR"] = foreground_rate["random"]["FR"]  # its other figures are that row's
    return rows


def paper_figures(table: str, key: str) -> dict[str, dict[str, float]] | None:
    """The paper's figures for one of the tables of `common.results.tables`, or None if it has none.

    table: "rows", "classes", "labels", "foreground rate", "branches", "shots" or "iterations".
    key: the paper's task, as in `paper_row`.
    """
    if key != "voc" and table in ("classes", "iterations"):
        return None
    if table == "iterations":
        printed = TABLES["table5_iterations_voc_iou"]
        rounds = [str(number) for number in printed["columns"]]
        return {label: dict(zip(rounds, figures, strict=True))
                for label, figures in printed["rows"].items()}
    if table in ("rows", "classes"):
        return paper_row(key)
    one_task = table == "labels" and key == "voc"  # Table 8 has columns of this task alone
    try:
        return _columns(_KEYS[table], None if one_task else key)
    except KeyError:
        return None


def beside_pooled(paper: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """`paper`'s figures with IoU and BER a second time, to stand beside our pooled ones too.

    POOLED_NOTE says why.
    """
    doubled = {}
    for row, figures in paper.items():
        doubled[row] = dict(figures)
        for metric, pooled in (("mIoU", "pooled IoU"), ("BER", "pooled BER")):
            if metric in figures:
                doubled[row][pooled] = figures[metric]
    return doubled


def _columns(table: str, task: str | None = None) -> dict[str, dict[str, float]]:
    """{row: {metric: figure}} of a table of the paper.

    task: takes the columns of this task alone, where the table has several. Raises KeyError where
    it has none of it.
    """
    names = TABLES[table]["columns"]
    kept = [task is None or name.startswith(f"{task}.") for name in names]
    if not any(kept):
        raise KeyError(task)
    metrics = [OUR_NAMES.get(name.split(".")[-1], name.split(".")[-1]) for name in names]
    rows = {}
    for row, figures in TABLES[table]["rows"].items():
        columns = zip(metrics, figures, kept, strict=True)
        rows[row.removeprefix("AlignSAM ")] = {metric: figure for metric, figure, keep in columns
                                               if keep}
    return rows


def results_table(rows: dict[str, dict],
                  paper: dict[str, dict[str, float]] | None = None) -> str:
    """A Markdown table of our `rows`, {row: {column: figure}}.

    A figure is a fraction, or a pair of it and its deviation over seeds (None for one seed). It is
    shown in percent with two digits, MAE as a fraction with three, a missing one as a dash. Columns
    stand in the order of their first use. `paper` (see `paper_row`) puts its figure for the same
    row and metric beside ours. Its other rows follow, marked "paper only".
    """
    paper = paper or {}
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row))
    printed = [name for name in metrics if any(name in row for row in paper.values())]
    head = [""]
    for name in metrics:
        head += [name, f"{name} (paper)"] if name in printed else [name]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows | paper:
        cells = [row if row in rows else f"{row} (paper only)"]
        for name in metrics:
            cells.append(_figure(rows.get(row, {}).get(name), name, 1 if name == "MAE" else 100))
            if name in printed:
                cells.append(_figure(paper.get(row, {}).get(name), name, 1))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _figure(value: float | tuple | list | None, name: str, scale: float) -> str:
    """A cell of `results_table`: the value times `scale`, with its deviation where it has one."""
    if value is None:
        return "–"
    value, deviation = value if isinstance(value, (tuple, list)) else (value, None)
    digits = 3 if name == "MAE" else 2
    text = f"{value * scale:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation * scale:.{digits}f}"
