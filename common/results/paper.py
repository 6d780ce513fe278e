"""The figures that the paper prints, and results tables that set ours beside them."""

import json
from pathlib import Path

TABLES = json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))
CLASSES = list(TABLES["table5_iterations_voc_iou"]["rows"])  # the four of VOC that Tables 5 and 8 print
OUR_NAMES = {"F_beta": "F", "E_phi": "E"}  # the paper's names where they differ from ours


def stand_ins(sam: str, clip: str) -> str:
    """Which of the two models are the repository's own small ones, " (stand-ins: SAM, CLIP)"; empty where neither is,
    so that figures compare with the paper's."""
    own = [name for name, model in (("SAM", sam), ("CLIP", clip)) if model == "demo"]
    return f" (stand-ins: {', '.join(own)})" if own else ""


def paper_row(key: str) -> dict[str, dict[str, float]]:
    """What the paper prints for the task `key`, {row: {metric: figure}}, in percent (MAE: a fraction).

    Rows and metrics are those of Table 2 ("cuhk", "sbu", "msd", "duts") or Table 3 ("voc": mIoU and the
    IoU of ten classes), "AlignSAM w/o RL" being "w/o RL" here, with the foreground rate FR of Table 9 in the two rows
    that it has. Raises KeyError.
    """
    rows = _columns("table3_voc_iou") if key == "voc" else _columns("table2", key)
    foreground_rate = _columns("table9_foreground_rate", key)
    rows["AlignSAM"]["FR"] = foreground_rate["AlignSAM"]["FR"]
    rows["w/o RL"]["FR"] = foreground_rate["random"]["FR"]  # its other figures are that row's
    return rows


def paper_figures(table: str, key: str) -> dict[str, dict[str, float]] | None:
    """The paper's figures beside one of `common.results.tables`' tables, for its task `key`; None where it prints none.

    table: "rows", "classes", "labels", "foreground rate", "branches", "shots" or "iterations".
    """
    if table == "iterations":
        printed = TABLES["table5_iterations_voc_iou"]
        return {label: dict(zip(map(str, printed["columns"]), figures, strict=True))
                for label, figures in printed["rows"].items()} if key == "voc" else None
    if table in ("rows", "classes"):
        if table == "classes" and key != "voc":
            return None
        return paper_row(key)
    name = {"labels": "table8_label_source_voc_iou", "foreground rate": "table9_foreground_rate",
            "branches": "table4_semantic_switch", "shots": "table10_shots"}[table]
    try:
        return _columns(name, None if table == "labels" and key == "voc" else key)
    except KeyError:
        return None


def _columns(table: str, task: str | None = None) -> dict[str, dict[str, float]]:
    """{row: {metric: figure}} of a table of the paper, of the columns of one task where it has several."""
    columns = TABLES[table]["columns"]
    if task is not None:
        columns = [column if column.startswith(f"{task}.") else None for column in columns]
        if not any(columns):
            raise KeyError(task)
    names = [column and column.split(".")[-1] for column in columns]
    return {
        row.removeprefix("AlignSAM "): {OUR_NAMES.get(name, name): figure
                                        for name, figure in zip(names, figures, strict=True) if name}
        for row, figures in TABLES[table]["rows"].items()
    }


def results_table(rows: dict[str, dict], paper: dict[str, dict[str, float]] | None = None) -> str:
    """A Markdown table of our `rows`, {row: {column: figure}}: percent with two digits, MAE with three.

    A figure is a fraction, or a pair of it and its deviation over seeds (None for one seed); a missing one is a dash.
    Columns stand in the order of their first use. `paper` (see `paper_row`) puts its figure for the same row and metric
    beside ours; its other rows follow, marked "paper only".
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
    if value is None:
        return "–"
    value, deviation = value if isinstance(value, (tuple, list)) else (value, None)
    digits = 3 if name == "MAE" else 2
    return f"{value * scale:.{digits}f}" + ("" if deviation is None else f" ± {deviation * scale:.{digits}f}")
