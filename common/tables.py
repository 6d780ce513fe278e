"""Every table of the paper for one task, over several seeds, from one cache. What is there already is not run again.

    python -m common.tables TASK=demo_saliency SEEDS=0,1,2 FIGURE7=true

An experiment is a run folder and constants of the numbered scripts, nothing else. This runs those that are missing and
writes tables.md, tables.json and the plots of Table 5 and Figure 7 into runs/<TASK>.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt

from common import settings
from common.cache import Cache
from common.paper import paper_figures, results_table
from common.tasks import get_task

TASK = "demo_saliency"
SEEDS = (0,)  # of training; three give the spread that the README states
EXPERIMENTS = ("main", "plus", "branches", "iterations", "shots")  # main = AlignSAM and all rows beside it; plus = AlignSAM+
FIGURE7 = False  # also the sensitivity to T and E: six more trainings a seed
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

_OTHER = {"implicit": "explicit", "explicit": "implicit"}
_PLUS = ("RESIDUAL=0.5", "EVERY_TEXT=true")  # of stage 2: what makes AlignSAM+
_SHOTS = (5, 20)  # Table 10, beside all 50
_ROUNDS, _EPISODES = (5, 10, 20), (10, 25, 100)  # Figure 7, beside T = 15 and E = 50
_QUICK = ("PICTURES=0", "GALLERY=0")
_METRICS = ("mIoU", "F", "BER", "E", "MAE", "FR")
_ABLATIONS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")
_ALL = (*_ABLATIONS, "labels: CLIP Surgery", "labels: last mask", "PerSAM")  # of ROWS=all, what a table cannot do without
_CONTENT = {"task": str, "sam": str, "clip": str, "branch": str, "images": int, "rows": dict, "iou_per_round": dict,
            "foreground_rate_attainable": float, "trained": dict}


def run_stages(task: str, folder: Path, seed: int, evaluation: list[str], agent: list[str] | None = None,
               srm: list[str] | None = None, srm_from: Path | None = None, results: str = "results.json") -> dict:
    """Runs the stages into `folder` with the given constants, unless its results are there; returns the results.

    agent, srm: constants of stages 3 and 2, None where that stage's file is there already. srm_from: a run whose srm.pt
    was trained with the same constants, to be taken over.
    """
    if not (folder / results).exists():
        same = [f"TASK={task}", f"RUN_DIR={folder}", f"FEATURES=runs/{task}/features.h5", f"DEVICE={DEVICE}",
                f"SEED={seed}"]
        print(f"\n{folder}", flush=True)
        if srm_from and not (folder / "srm.pt").exists():
            settings.write_atomic(folder / "srm.pt", lambda temporary: shutil.copy(srm_from / "srm.pt", temporary))
        if srm is not None:
            run_script("02_train_srm.py", *same, *srm)
        if agent is not None:
            run_script("03_train_agent.py", *same, *agent)
        run_script("04_evaluate.py", *same, f"RESULTS={results}", *evaluation)
    rows = next(constant for constant in evaluation if constant.startswith("ROWS=")).removeprefix("ROWS=")
    content = read_results(folder / results, task, _ALL if rows == "all" else tuple(rows.split(",")))
    asked = dict(constant.split("=", 1) for constant in (f"SEED={seed}", *(srm or ()), *(agent or ())))
    require_asked(folder / results, content["trained"], asked | {"features": cache_identity(task)})
    return content


def cache_identity(task: str) -> str:
    return Cache.open(Path("runs") / task / "features.h5", task).identity()


def require_asked(path: Path, trained: dict, asked: dict[str, str]) -> None:
    """Raises UserError where the run behind `path` was trained with other constants than `asked`, or from another cache."""
    for name, value in asked.items():
        stored = str(trained.get(name.lower())).lower()
        if stored != value.lower():
            other = "another features.h5 than the one there is now" if name == "features" else f"{name}={stored}, not {value}"
            raise settings.UserError(f"{path} comes from a run with {other}: move {path.parent} away, or delete it, and run "
                                     "the same command again")


def read_results(path: Path, task: str, rows: tuple[str, ...]) -> dict:
    """What stage 4 wrote to `path`. Raises UserError where it is damaged, of another task, or lacks one of `rows`."""
    try:
        content = json.loads(path.read_text())
        for name, kind in _CONTENT.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        metrics = [content["rows"][row][name] for row in content["rows"] for name in _METRICS if name != "FR"]
        metrics += [score["FR"] for score in content["rows"].values() if "FR" in score]
        metrics += [scores["mIoU"] for row in content["rows"].values() for scores in row.get("per_class", {}).values()]
        metrics += [value for row in content["rows"] for value in content["iou_per_round"][row]]
        if not all(map(math.isfinite, [*metrics, content["foreground_rate_attainable"]])):
            raise ValueError("a figure is not finite")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise settings.UserError(f"{path} is damaged or was not written by 04_evaluate.py ({type(error).__name__}: "
                                 f"{error}): delete it and run the same command again") from error
    if content["task"] != task:
        raise settings.UserError(f"{path} holds results of {content['task']}, not {task}: move it away and run the "
                                 "same command again")
    if missing := [row for row in rows if row not in content["rows"]]:
        raise settings.UserError(f"{path} lacks the row {missing[0]}: delete it and run the same command again")
    return content


def run_script(script: str, *constants: str) -> None:
    """Raises UserError where it fails; it has said why itself."""
    script = str(Path(__file__).parent.parent / script)
    environment = os.environ | {"PYTHONPATH": str(Path(script).parent)}
    if subprocess.run([sys.executable, script, *constants], env=environment).returncode:
        raise settings.UserError(f"{Path(script).name} stopped; mend what it says above and run the same command again")


def pooled(runs: list[dict]) -> dict[str, dict]:
    """{row: {metric: (mean, deviation over seeds or None)}} of several results files, metrics as fractions."""
    return {row: {name: spread([run["rows"][row][name] for run in runs]) for name in _METRICS if name in first}
            for row, first in runs[0]["rows"].items()}


def spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def per_round(runs: list[dict], row: str) -> list[tuple[float, float | None]]:
    return [spread(list(values)) for values in zip(*(run["iou_per_round"][row] for run in runs))]


def plot(path: Path, lines: dict[str, dict[int, tuple]], x_name: str) -> None:
    """Mean and spread of mIoU in percent over x, one line a name, as PNG."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, values in lines.items():
        axis.errorbar(list(values), [100 * value for value, _ in values.values()],
                      [100 * (deviation or 0) for _, deviation in values.values()], marker=".", capsize=2, label=name)
    axis.set(xlabel=x_name, ylabel="mIoU (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half a round
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    settings.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def main() -> None:
    if unknown := set(EXPERIMENTS) - {"main", "plus", "branches", "iterations", "shots"}:
        raise settings.UserError(f"EXPERIMENTS names {unknown.pop()!r}: choose among main, plus, branches, iterations, shots")
    task, out = get_task(TASK, "-"), Path("runs") / TASK
    if TASK.startswith("demo_"):  # ends at once where the cache is whole
        run_script("01_cache_features.py", f"TASK={TASK}", f"DEVICE={DEVICE}")
    elif not (out / "features.h5").exists():
        raise settings.UserError(f"{out / 'features.h5'} does not exist: run 01_cache_features.py TASK={TASK} first, with "
                                 "your SAM, CLIP and DATA_DIR")
    folders = {seed: Path("runs") / f"{TASK}-seed{seed}" for seed in SEEDS}
    base = [run_stages(TASK, folder, seed, ["ROWS=all"], [], []) for seed, folder in folders.items()]
    real = base[0]["sam"] != "demo" and base[0]["clip"] != "demo"
    key = task.paper if real else None
    text, tables = [f"# {TASK}", f"SAM {base[0]['sam']}, CLIP {base[0]['clip']}{'' if real else ' (stand-ins)'}, "
                    f"{base[0]['branch']} branch, {base[0]['images']} test samples, seeds {', '.join(map(str, SEEDS))}. "
                    "Percent, MAE a fraction; mean ± deviation over seeds."], {}

    def add(title: str, table: dict[str, dict], paper: str | None = None) -> None:
        """One table into both files; paper: its key in the paper's tables."""
        tables[title] = table
        text.append(f"## {title}\n\n" + results_table(table, paper_figures(paper, key) if paper and key else None))

    def others(name: str, runs_of: dict, paper: str | None = None, rows: tuple[str, ...] = ("AlignSAM",)) -> None:
        """A table of {column: runs}, mIoU of some rows."""
        add(name, {row: {column: pooled(runs)[row]["mIoU"] for column, runs in runs_of.items()} for row in rows}, paper)

    rows = pooled(base)
    add("Tables 2 and 3: the method and its ablations", {row: rows[row] for row in _ABLATIONS}, "rows")
    if "per_class" in base[0]["rows"]["AlignSAM"]:
        add("Table 3: IoU per class", {row: {label: spread([run["rows"][row]["per_class"][label]["mIoU"] for run in base])
                                             for label in base[0]["rows"][row]["per_class"]} for row in _ABLATIONS}, "classes")
    add("Baselines and bounds", {row: rows[row] for row in rows if row == "AlignSAM" or row not in _ABLATIONS})
    labels = {"RL + SRM": "AlignSAM", "RL + CLIP-Surgery map": "labels: CLIP Surgery", "RL + last SAM mask": "labels: last mask",
              "RL only (all positive)": "w/o SRM"}
    add("Table 8: source of the labels", {name: {"mIoU": rows[row]["mIoU"]} for name, row in labels.items()}, "labels")
    attainable = spread([run["foreground_rate_attainable"] for run in base])
    add("Table 9: foreground rate", {"AlignSAM": {"FR": rows["AlignSAM"]["FR"], "mIoU": rows["AlignSAM"]["mIoU"]},
                                     "random": {"FR": rows["w/o RL"]["FR"], "mIoU": rows["w/o RL"]["mIoU"]},
                                     "attainable": {"FR": attainable}}, "foreground rate")

    if "plus" in EXPERIMENTS:
        plus = [run_stages(TASK, Path(f"{folder}-plus"), seed, ["ROWS=AlignSAM,w/o RL,w/o SRM,w/o MSI", *_QUICK], [], [*_PLUS])
                for seed, folder in folders.items()]
        add(f"AlignSAM+ ({' '.join(_PLUS)} in stage 2)", {"AlignSAM": rows["AlignSAM"]} | {
            "AlignSAM+" if row == "AlignSAM" else f"AlignSAM+ {row}": scores for row, scores in pooled(plus).items()})

    if "branches" in EXPERIMENTS:
        other = _OTHER[task.branch]
        runs = [run_stages(TASK, Path(f"{folder}-{other}"), seed, ["ROWS=AlignSAM", *_QUICK], [], [f"BRANCH={other}"])
                for seed, folder in folders.items()]
        branches = {task.branch: pooled(base)["AlignSAM"], other: pooled(runs)["AlignSAM"]}
        add("Table 4: branch of the SRM", {name: branches[name] for name in ("implicit", "explicit")}, "branches")
    if "iterations" in EXPERIMENTS:
        runs = [run_stages(TASK, folder, seed, ["ROWS=AlignSAM,w/o RL,w/o SRM", "ROUNDS=20", *_QUICK], results="T20.json")
                for seed, folder in folders.items()]
        rounds = {row: per_round(runs, row) for row in runs[0]["rows"]}
        add("Table 5: IoU after each round (trained with T = 15)",
            {row: {str(number): values[number] for number in (0, 1, 2, 3, 5, 10, 15, 20)}
             for row, values in rounds.items()})
        plot(out / "iterations.png", {row: dict(enumerate(values)) for row, values in rounds.items()}, "round")
    if "shots" in EXPERIMENTS:
        few = {str(shots): [run_stages(TASK, Path(f"{folder}-shots{shots}"), seed, ["ROWS=AlignSAM,PerSAM", *_QUICK],
                                       [f"SHOTS={shots}"], [f"SHOTS={shots}"]) for seed, folder in folders.items()]
               for shots in _SHOTS}
        others("Table 10: labelled images, mIoU", few | {"all": base}, "shots", ("AlignSAM", "PerSAM"))
    if FIGURE7:
        for name, values, standard in (("ROUNDS", _ROUNDS, 15), ("EPISODES", _EPISODES, 50)):
            runs_of = {value: [run_stages(TASK, Path(f"{folder}-{name.lower()}{value}"), seed,
                                          ["ROWS=AlignSAM", *([f"ROUNDS={value}"] if name == "ROUNDS" else []), *_QUICK],
                                          [f"{name}={value}"], srm_from=folder)
                               for seed, folder in folders.items()] for value in values}
            runs_of = dict(sorted((runs_of | {standard: base}).items()))
            others(f"Figure 7: {name.lower()}, mIoU", {str(value): runs for value, runs in runs_of.items()})
            plot(out / f"figure7_{name.lower()}.png",
                 {"AlignSAM": {value: pooled(runs)["AlignSAM"]["mIoU"] for value, runs in runs_of.items()}}, name.lower())

    settings.write_atomic(out / "tables.md", lambda temporary: temporary.write_text("\n\n".join(text)))
    settings.write_atomic(out / "tables.json", lambda temporary: temporary.write_text(json.dumps(
        {"task": TASK, "seeds": SEEDS, "units": "[mean, deviation over seeds], fractions", "tables": tables}, indent=1)))
    print("\n\n".join(text) + f"\nwrote {out / 'tables.md'}, {out / 'tables.json'}")


if __name__ == "__main__":
    settings.run(main, globals())
