"""Every table of the paper for one task, over several seeds, from one cache. What is there already is not run again.

    python -m common.results.tables TASK=demo_saliency SEEDS=0,1,2 FIGURE7=true

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
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt

from common.cache import Cache
from common.results.paper import CLASSES, paper_figures, results_table, stand_ins
from common.runtime import files, script
from common.runtime.errors import UserError
from common.tasks import get_task

TASK = "demo_saliency"
SEEDS = (0,)  # of training; three give the spread that the README states
EXPERIMENTS = ("main", "plus", "branches", "iterations", "shots")  # main, all rows of one training, is always run
FIGURE7 = False  # also the sensitivity to T and E: six more trainings a seed
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

_OTHER = {"implicit": "explicit", "explicit": "implicit"}
_PLUS = ("RESIDUAL=0.5", "EVERY_TEXT=true")  # of stage 2: what makes AlignSAM+
_SHOTS = (5, 20)  # Table 10, beside all 50
_ROUNDS, _EPISODES = (5, 10, 20), (10, 25, 100)  # Figure 7, beside T = 15 and E = 50
_QUICK = ("PICTURES=0", "GALLERY=0")
_METRICS = ("mIoU", "F", "BER", "E", "MAE", "FR")
_ABLATIONS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")
_ALL = (*_ABLATIONS, "labels: CLIP Surgery", "labels: last mask", "PerSAM")  # of ROWS=all, those that a table names
_LABELS = {"RL + SRM": "AlignSAM", "RL + CLIP-Surgery map": "labels: CLIP Surgery",
           "RL + last SAM mask": "labels: last mask", "RL only (all positive)": "w/o SRM"}  # Table 8's names
_CONTENT = {"task": str, "sam": str, "clip": str, "branch": str, "samples": int, "rows": dict, "iou_per_round": dict,
            "foreground_rate_attainable": float, "trained": dict, "rounds": int, "evaluation_seed": int,
            "sample_actions": bool}


class Experiment(NamedTuple):
    """One training and its evaluation: a run folder, and constants of the numbered scripts."""

    suffix: str  # the folder is runs/<TASK>-seed<n> and this
    evaluation: tuple[str, ...]  # of stage 4
    agent: tuple[str, ...] | None = ()  # of stage 3; None: the folder's agent.pt is there already
    srm: tuple[str, ...] | None = ()  # of stage 2; None: the main run's srm.pt is taken over
    results: str = "results.json"


def experiments(branch: str, shots: int) -> dict[str, dict[str, Experiment]]:
    """{experiment: {column: what is run for it}}, for a task with this branch of the SRM and a cache of these shots."""
    other = _OTHER[branch]
    one_row = ("ROWS=AlignSAM", *_QUICK)
    return {
        "main": {"": Experiment("", ("ROWS=all",))},
        "plus": {"": Experiment("-plus", (f"ROWS={','.join(_ABLATIONS)}", *_QUICK), srm=_PLUS)},
        "branches": {other: Experiment(f"-{other}", one_row, srm=(f"BRANCH={other}",))},
        "iterations": {"": Experiment("", ("ROWS=AlignSAM,w/o RL,w/o SRM", "ROUNDS=20", *_QUICK), None, None,
                                      "T20.json")},
        "shots": {str(few): Experiment(f"-shots{few}", ("ROWS=AlignSAM,PerSAM", *_QUICK), (f"SHOTS={few}",),
                                       (f"SHOTS={few}",)) for few in _SHOTS if few < shots},
        "rounds": {str(rounds): Experiment(f"-rounds{rounds}", (f"ROUNDS={rounds}", *one_row), (f"ROUNDS={rounds}",),
                                           None) for rounds in _ROUNDS},
        "episodes": {str(episodes): Experiment(f"-episodes{episodes}", one_row, (f"EPISODES={episodes}",), None)
                     for episodes in _EPISODES},
    }


def run_stages(task: str, seed: int, experiment: Experiment, features: str, like: dict | None = None) -> dict:
    """Runs the stages of an experiment, unless its results are there; returns the results.

    features: the cache's identity. like: results of the task's first main run; see `require_asked`.
    """
    main = Path("runs") / f"{task}-seed{seed}"
    folder = main.with_name(main.name + experiment.suffix)
    path = folder / experiment.results
    if not path.exists():
        same = [f"TASK={task}", f"RUN_DIR={folder}", f"FEATURES=runs/{task}/features.h5", f"DEVICE={DEVICE}",
                f"SEED={seed}"]
        print(f"\n{folder}", flush=True)
        if experiment.srm is not None:
            run_script("02_train_srm.py", *same, *experiment.srm)
        elif not (folder / "srm.pt").exists():
            files.write_atomic(folder / "srm.pt", lambda temporary: shutil.copy(main / "srm.pt", temporary))
        if experiment.agent is not None:
            run_script("03_train_agent.py", *same, *experiment.agent)
        run_script("04_evaluate.py", *same, f"RESULTS={experiment.results}", *experiment.evaluation)
    rows = values_of(experiment.evaluation)["rows"]
    content = read_results(path, task, _ALL if rows == "all" else tuple(rows.split(",")))
    require_asked(path, content, experiment, seed, features, like or content)
    return content


def values_of(constants: tuple[str, ...] | None) -> dict[str, str]:
    """{"NAME=value"} as {name: value}, names in lower case as results hold them."""
    return {name.lower(): value for name, value in (constant.split("=", 1) for constant in constants or ())}


def look_into_cache(task: str) -> tuple[str, int, tuple[str, ...]]:
    """The identity of the task's cache, how many training samples it holds, and its texts."""
    cache = Cache.open(Path("runs") / task / "features.h5", task)
    return cache.identity(), len(cache.samples("train")), cache.texts


def require_asked(path: Path, content: dict, experiment: Experiment, seed: int, features: str, like: dict) -> None:
    """Raises UserError where the results at `path` are of another cache or of other constants than `experiment` has.

    What the experiment does not name must be as in the results `like`: a table is of one recipe, though the constants
    at the top of the scripts may be edited, and scripts run by hand, between one run and the next.
    """
    asked = values_of(experiment.srm) | values_of(experiment.agent) | {"seed": seed, "features": features}
    follows = {"srm"} | ({"srm_steps"} if "branch" in asked else set())  # from the seed and the branch
    training = {name: value for name, value in like["trained"].items() if name not in follows} | asked
    evaluation = {name: like[name] for name in ("rounds", "sample_actions")} | {"evaluation_seed": seed}
    evaluation |= {name: value for name, value in values_of(experiment.evaluation).items() if name == "rounds"}
    for stored, wanted in ((content["trained"], training), (content, evaluation)):
        for name, value in wanted.items():
            if str(stored.get(name)).lower() != str(value).lower():
                other = f"{name.upper()}={stored.get(name)}, not {value}"
                if name == "features":
                    other = "another features.h5 than the one there is now"
                raise UserError(f"{path} comes from a run with {other}: move {path.parent} away, or delete "
                                         "it, and run the same command again")


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
        classes = content["rows"]["AlignSAM"].get("per_class", ())
        rounds = [content["iou_per_round"]["AlignSAM"]]
        rounds += [content["iou_per_round_per_class"]["AlignSAM"][label] for label in classes]
        if any(len(values) != content["rounds"] + 1 or not all(map(math.isfinite, values)) for values in rounds):
            raise ValueError("AlignSAM's rounds are not as many as it says, or not finite")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or was not written by 04_evaluate.py ({type(error).__name__}: "
                                 f"{error}): delete it and run the same command again") from error
    if content["task"] != task:
        raise UserError(f"{path} holds results of {content['task']}, not {task}: move it away and run the "
                                 "same command again")
    if missing := [row for row in rows if row not in content["rows"]]:
        raise UserError(f"{path} lacks the row {missing[0]}: delete it and run the same command again")
    return content


def run_script(script: str, *constants: str) -> None:
    """Raises UserError where it fails; it has said why itself."""
    script = str(Path(__file__).parents[2] / script)
    environment = os.environ | {"PYTHONPATH": str(Path(script).parent)}
    if subprocess.run([sys.executable, script, *constants], env=environment).returncode:
        raise UserError(f"{Path(script).name} stopped; mend what it says above and run the same command again")


def pooled(runs: list[dict]) -> dict[str, dict]:
    """{row: {metric: (mean, deviation over seeds or None)}} of several results files, metrics as fractions."""
    return {row: {name: spread([run["rows"][row][name] for run in runs]) for name in _METRICS if name in first}
            for row, first in runs[0]["rows"].items()}


def spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def rounds_of(runs: dict[str, dict[str, list[dict]]]) -> dict[str, list[tuple[float, float | None]]]:
    """{row: mean and spread of mIoU after each round} of the runs with 20 rounds."""
    results = runs["iterations"][""]
    return {row: [spread(list(values)) for values in zip(*(run["iou_per_round"][row] for run in results))]
            for row in results[0]["rows"]}


def plot(path: Path, lines: dict[str, dict[int, tuple]], x_name: str, title: str) -> None:
    """Mean and spread of mIoU in percent over x, one line a name, as PNG."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, values in lines.items():
        axis.errorbar(list(values), [100 * value for value, _ in values.values()],
                      [100 * (deviation or 0) for _, deviation in values.values()], marker=".", capsize=2, label=name)
    axis.set(xlabel=x_name, ylabel="mIoU (%)")
    axis.set_title(title, fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half a round
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def paper_tables(runs: dict[str, dict[str, list[dict]]], branch: str) -> dict[str, tuple[dict, str | None]]:
    """{title: (table, its key in the paper's tables)} of {experiment: {column: its results, one a seed}}."""
    base = runs["main"][""]
    rows, trained = pooled(base), base[0]["trained"]

    def by_column(experiment: str, standard: str, names: tuple[str, ...] = ("AlignSAM",)) -> dict[str, dict]:
        """{row: {column: mIoU}} of an experiment and of the main runs, which are its column `standard`."""
        columns = {standard: rows} | {column: pooled(results) for column, results in runs[experiment].items()}
        order = sorted(columns, key=lambda column: int(column) if column.isdigit() else math.inf)
        return {name: {column: columns[column][name]["mIoU"] for column in order} for name in names}

    def per_class(row: str, label: str) -> tuple[float, float | None]:
        return spread([run["rows"][row]["per_class"][label]["mIoU"] for run in base])

    classes = list(base[0]["rows"]["AlignSAM"].get("per_class", ()))
    printed = [label for label in classes if label in CLASSES]
    tables = {"Tables 2 and 3: the method and its ablations": ({row: rows[row] for row in _ABLATIONS}, "rows")}
    if classes:
        tables["Table 3: IoU per class"] = (
            {row: {label: per_class(row, label) for label in classes} for row in _ABLATIONS}, "classes")
    tables["Baselines and bounds"] = (
        {row: rows[row] for row in rows if row == "AlignSAM" or row not in _ABLATIONS}, None)
    tables["Table 8: source of the labels"] = (
        {name: {"mIoU": rows[row]["mIoU"]} | {label: per_class(row, label) for label in printed}
         for name, row in _LABELS.items()}, "labels")
    tables["Table 9: foreground rate"] = (
        {name: {metric: rows[row][metric] for metric in ("FR", "mIoU", "E")}
         for name, row in (("AlignSAM", "AlignSAM"), ("random", "w/o RL"))}
        | {"attainable": {"FR": spread([run["foreground_rate_attainable"] for run in base])}}, "foreground rate")
    if "plus" in runs:
        plus = {f"AlignSAM+ {row}".removesuffix(" AlignSAM"): scores
                for row, scores in pooled(runs["plus"][""]).items()}
        tables[f"AlignSAM+ ({' '.join(_PLUS)} in stage 2)"] = ({"AlignSAM": rows["AlignSAM"]} | plus, None)
    if "branches" in runs:
        branches = {branch: rows["AlignSAM"], _OTHER[branch]: pooled(runs["branches"][_OTHER[branch]])["AlignSAM"]}
        tables["Table 4: branch of the SRM"] = ({name: branches[name] for name in ("implicit", "explicit")}, "branches")
    if "iterations" in runs:
        tables[f"Table 5: IoU after each round (trained with T = {trained['rounds']})"] = (
            {row: {str(number): values[number] for number in (0, 1, 2, 3, 5, 10, 15, 20)}
             for row, values in rounds_of(runs).items()}, None)
        if classes:
            tables["Table 5: IoU of each class after each round, AlignSAM"] = (
                {label: {str(number): spread([run["iou_per_round_per_class"]["AlignSAM"][label][number]
                                              for run in runs["iterations"][""]]) for number in (1, 5, 10, 15, 20)}
                 for label in classes}, "iterations")
    if "shots" in runs:
        tables["Table 10: labelled images, mIoU"] = (by_column("shots", "all", ("AlignSAM", "PerSAM")), "shots")
    if "rounds" in runs:
        tables["Figure 7: rounds, mIoU"] = (by_column("rounds", str(trained["rounds"])), None)
        tables["Figure 7: episodes, mIoU"] = (by_column("episodes", str(trained["episodes"])), None)
    return tables


def main() -> None:
    if unknown := set(EXPERIMENTS) - {"main", "plus", "branches", "iterations", "shots"}:
        raise UserError(
            f"EXPERIMENTS names {unknown.pop()!r}: choose among main, plus, branches, iterations, shots")
    task, out = get_task(TASK, "-"), Path("runs") / TASK
    if TASK.startswith("demo_"):  # ends at once where the cache is whole
        run_script("01_cache_features.py", f"TASK={TASK}", f"DEVICE={DEVICE}")
    elif not (out / "features.h5").exists():
        raise UserError(f"{out / 'features.h5'} does not exist: run 01_cache_features.py TASK={TASK} first, "
                                 "with your SAM, CLIP and DATA_DIR")

    features, shots, texts = look_into_cache(TASK)
    wanted = {"main", *EXPERIMENTS, *(("rounds", "episodes") if FIGURE7 else ())}
    runs, first = {}, None
    for name, columns in experiments(task.branch, shots).items():
        if name in wanted:
            runs[name] = {}
            for column, experiment in columns.items():
                runs[name][column] = []
                for seed in SEEDS:
                    runs[name][column].append(run_stages(TASK, seed, experiment, features, first))
                    first = first or runs[name][column][0]

    models = f"SAM {first['sam']}, CLIP {first['clip']}{stand_ins(first['sam'], first['clip'])}"
    comparable = not stand_ins(first["sam"], first["clip"]) and texts == task.texts  # PROMPT may ask something else
    text = [f"# {TASK}", f"{models}, {first['branch']} branch, {first['samples']} test samples, seeds "
            f"{', '.join(map(str, SEEDS))}. Percent, MAE a fraction; mean ± deviation over seeds.",
            "Main runs: " + ", ".join(f"{name.upper()}={value}" for name, value in first["trained"].items()
                                      if name not in ("task", "seed", "features", "srm")) + "."]
    tables = paper_tables(runs, task.branch)
    for title, (table, paper) in tables.items():
        figures = paper_figures(paper, task.paper) if comparable and paper and task.paper else None
        text.append(f"## {title}\n\n" + results_table(table, figures))

    if "iterations" in runs:
        plot(out / "iterations.png", {row: dict(enumerate(values)) for row, values in rounds_of(runs).items()}, "round",
             f"{TASK}, {models}")
    for name in ("rounds", "episodes") if FIGURE7 else ():
        table = tables[f"Figure 7: {name}, mIoU"][0]
        plot(out / f"figure7_{name}.png",
             {row: {int(value): figure for value, figure in figures.items()} for row, figures in table.items()}, name,
             f"{TASK}, {models}")
    files.write_atomic(out / "tables.md", lambda temporary: temporary.write_text("\n\n".join(text)))
    content = {"task": TASK, "models": models, "seeds": SEEDS, "units": "[mean, deviation over seeds], fractions",
               "tables": {title: table for title, (table, _) in tables.items()}}
    files.write_atomic(out / "tables.json", lambda temporary: temporary.write_text(json.dumps(content, indent=1)))
    print("\n\n".join(text) + f"\nwrote {out / 'tables.md'}, {out / 'tables.json'}")


if __name__ == "__main__":
    script.run(main, globals())
