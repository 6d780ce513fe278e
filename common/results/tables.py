"""Every table of the paper for one task, over several seeds, from one cache.

    python -m common.results.tables TASK=demo_saliency SEEDS=0,1,2 FIGURE7=true

An experiment is a run folder and constants of the numbered scripts, nothing else. This runs those
that are missing, and none twice. It writes tables.md, tables.json and the plots of Table 5 and
Figure 7 into runs/<TASK>.
"""

import common.runtime.first  # noqa: F401  before torch

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from common.cache import Cache
from common.metrics import METRICS
from common.results.given_masks import split
from common.results.outputs import flat
from common.results.paper import (
    CLASSES,
    POOLED_NOTE,
    beside_pooled,
    paper_figures,
    results_table,
    stand_ins,
)
from common.results.plotting import plt, save_figure
from common.rivals.finetuned import METHODS
from common.runtime import files, script, settings
from common.runtime.errors import UserError
from common.runtime.files import expanded
from common.runtime.settings import require_same
from common.tasks import get_task

TASK = "demo_saliency"
SEEDS = (0,)  # of training; three give the spread that the README states
# main is run in any case; rivals are SAMed and MSA, which take hours with a real SAM on a CPU
EXPERIMENTS = ("main", "rivals", "plus", "branches", "iterations", "shots")
FIGURE7 = False  # also the sensitivity to T and E: six more trainings a seed
MASKS = ""  # rows of other systems' masks, as in stage 4; {seed} in a folder's name is the seed
DATA_DIR = ""  # the data set, whose pictures SAMed and MSA see; empty = data/<TASK>
SAM = ""  # the cache's SAM, where its file lies elsewhere now; empty = where stage 1 found it
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

_KNOWN = EXPERIMENTS  # as it stands here, before the command line
_OTHER = {"implicit": "explicit", "explicit": "implicit"}
_PLUS = {"RESIDUAL": 0.5, "EVERY_TEXT": True}  # of stage 2: what makes AlignSAM+
_SHOTS = (5, 20)  # Table 10, beside all 50
_ROUNDS, _EPISODES = (5, 10, 20), (10, 25, 100)  # Figure 7, beside T = 15 and E = 50
_PLOTS = {"iterations": "iterations.png", "rounds": "figure7_rounds.png",
          "episodes": "figure7_episodes.png"}
_QUICK = {"PICTURES": 0, "GALLERY": 0}
_ABLATIONS = ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI")
# of ROWS=all, those that a table names
_NAMED = (*_ABLATIONS, "labels: CLIP Surgery", "labels: last mask", "PerSAM")
_LABELS = {"RL + SRM": "AlignSAM", "RL + CLIP-Surgery map": "labels: CLIP Surgery",
           "RL + last SAM mask": "labels: last mask",
           "RL only (all positive)": "w/o SRM"}  # Table 8's names
_CONTENT = {"task": str, "sam": str, "clip": str, "branch": str, "samples": int, "rows": dict,
            "iou_per_round": dict, "foreground_rate_attainable": float, "trained": dict,
            "rounds": int, "evaluation_seed": int, "sample_actions": bool}
_AGAIN = "delete it and run the same command again"

Figure = tuple[float, float | None]  # mean over seeds, and deviation; None where there is one seed
Runs = dict[str, dict[str, list[dict]]]  # {experiment: {column: its results, one a seed}}


class Experiment(NamedTuple):
    """One training and its evaluation: a run folder, and constants of the numbered scripts."""

    suffix: str  # the folder is runs/<TASK>-seed<n> and this
    evaluation: dict[str, object]  # of stage 4
    agent: dict[str, object] | None = {}  # of stage 3; None: the folder has its agent.pt already
    srm: dict[str, object] | None = {}  # of stage 2; None: the main run's srm.pt is taken over
    results: str = "results.json"
    rivals: dict[str, object] | None = None  # of common.rivals.peft, which trains each of METHODS


class Table(NamedTuple):
    """One table of fractions."""

    rows: dict[str, dict[str, Figure]]  # {row: {column: figure}}
    paper: str | None = None  # its name in `paper_figures`; None: the paper prints nothing like it
    note: str = ""  # a sentence below it


# ---- experiments and their results

def experiments(branch: str, shots: int) -> dict[str, dict[str, Experiment]]:
    """{experiment: {column: what is run for it}}, for a task with this branch of the SRM.

    shots: training samples in the cache.
    """
    other, one_row = _OTHER[branch], {"ROWS": ("AlignSAM",), **_QUICK}
    masks_alone = {"ROWS": ("none",), "MASKS": MASKS, **_QUICK}
    twenty_rounds = {"ROWS": ("AlignSAM", "w/o RL", "w/o SRM"), "ROUNDS": 20, **_QUICK}
    few_shots, few_rivals, rounds, episodes = {}, {}, {}, {}
    for few in _SHOTS:
        if few < shots:
            few_shots[str(few)] = Experiment(
                f"-shots{few}", {"ROWS": ("AlignSAM", "PerSAM"), **_QUICK},
                agent={"SHOTS": few}, srm={"SHOTS": few})
            few_rivals[str(few)] = trained_rivals(f"-shots{few}", {"SHOTS": few})
    for number in _ROUNDS:
        rounds[str(number)] = Experiment(f"-rounds{number}", {"ROUNDS": number, **one_row},
                                         agent={"ROUNDS": number}, srm=None)
    for number in _EPISODES:
        episodes[str(number)] = Experiment(f"-episodes{number}", one_row,
                                           agent={"EPISODES": number}, srm=None)
    return {
        "main": {"": Experiment("", {"ROWS": ("all",)})},
        "rivals": {"": trained_rivals("", {})},
        "masks": {"": Experiment("", masks_alone, None, None, "given_masks.json")},
        "plus": {"": Experiment("-plus", {"ROWS": _ABLATIONS, **_QUICK}, srm=_PLUS)},
        "branches": {other: Experiment(f"-{other}", one_row, srm={"BRANCH": other})},
        "iterations": {"": Experiment("", twenty_rounds, None, None, "T20.json")},
        "shots": few_shots,
        "rivals at few shots": few_rivals,
        "rounds": rounds,
        "episodes": episodes,
    }


def trained_rivals(suffix: str, constants: dict[str, object]) -> Experiment:
    """SAMed and MSA beside the agent of a run folder, trained on the same samples."""
    folders = ",".join(f"{method}:{{folder}}/{method.lower()}_masks" for method in METHODS)
    return Experiment(suffix, {"ROWS": ("none",), "MASKS": folders, **_QUICK}, None, None,
                      "rivals.json", constants)


def run_experiments(wanted: set[str], branch: str, identity: str, shots: int) -> Runs:
    """Runs the wanted experiments, as far as they are missing.

    identity: the cache's. shots: training samples in it.
    """
    runs, first, first_rivals = {}, None, None
    for name, columns in experiments(branch, shots).items():
        if name not in wanted:
            continue
        runs[name] = {column: [] for column in columns}
        for column, experiment in columns.items():
            for seed in SEEDS:
                content = run_stages(TASK, seed, experiment, identity, first)
                runs[name][column].append(content)
                first = first or content
                if experiment.rivals is not None:
                    first_rivals = first_rivals or content
                    asked = {"seed": seed, "shots": experiment.rivals.get("SHOTS", 0)}
                    require_trained_alike(place_of(TASK, seed, experiment), content, first_rivals,
                                          asked)
    return runs


def run_folder(task: str, seed: int, suffix: str = "") -> Path:
    return Path("runs") / f"{task}-seed{seed}{suffix}"


def place_of(task: str, seed: int, experiment: Experiment) -> Path:
    """Where the results of an experiment lie."""
    return run_folder(task, seed, experiment.suffix) / experiment.results


def run_stages(task: str, seed: int, experiment: Experiment, identity: str,
               like: dict | None = None) -> dict:
    """Runs the stages of an experiment, unless its results are there. Returns the results.

    identity: the cache's. like: results of the task's first main run; see `require_asked`.
    """
    path, rivals = place_of(task, seed, experiment), experiment.rivals
    main, folder = run_folder(task, seed), path.parent
    masks = experiment.evaluation.get("MASKS")
    if not path.exists() or masks and rivals is None:  # given masks may have changed since
        same = {"TASK": task, "RUN_DIR": folder, "FEATURES": f"runs/{task}/features.h5",
                "DEVICE": DEVICE, "SEED": seed} | ({"SAM": SAM} if SAM else {})
        print(f"\n{folder}", flush=True)
        if experiment.srm is not None:
            run_script("02_train_srm.py", *arguments(same | experiment.srm))
        elif not (folder / "srm.pt").exists():
            files.write_atomic(folder / "srm.pt",
                               lambda temporary: shutil.copy(main / "srm.pt", temporary))
        if experiment.agent is not None:
            run_script("03_train_agent.py", *arguments(same | experiment.agent))
        if rivals is not None:
            for method in METHODS:
                run_script("-m common.rivals.peft", *arguments(
                    same | {"METHOD": method, "DATA_DIR": DATA_DIR} | rivals))
        evaluation = {"RESULTS": experiment.results, **experiment.evaluation}
        if masks:
            for name, value in (("{seed}", seed), ("{folder}", folder)):
                masks = masks.replace(name, str(value))
            evaluation["MASKS"] = masks
        run_script("04_evaluate.py", *arguments(same | evaluation))
    asked = experiment.evaluation["ROWS"]
    rows = {("all",): _NAMED, ("none",): () if rivals is None else METHODS}.get(asked, asked)
    content = read_results(path, task, tuple(rows))
    require_asked(path, content, experiment, seed, identity, like or content)
    if experiment.srm is None:  # the SRM must be that of the agent which the results stand beside
        beside, stale = (folder, path) if experiment.agent is None else (main, folder)
        srm = read_results(beside / "results.json", task, ())["trained"]["srm"]
        require_same(path, content["trained"], {"srm": srm}, mend=move_away(stale))
    return content


def add_given(base: list[dict], *given: list[dict]) -> None:
    """Puts the rows of `given`, results of given masks alone, into `base`, results of the agent.

    All are one a seed. Rows of `base` that are not there for every seed, since stage 4 was called
    by hand with MASKS, are named on stdout: the tables leave them out.
    """
    for results in given:
        for run, its in zip(base, results, strict=True):
            for part in ("rows", "iou_per_round", "given_masks"):
                run[part] = run.get(part, {}) | its[part]
    partly = {row for run in base for row in run["rows"]} - {*rows_of_all(base)}
    if partly:
        print(f"in no table, as not all seeds have them: {', '.join(sorted(partly))}")


def arguments(constants: dict[str, object]) -> list[str]:
    """{name: value} as the command line takes it: NAME=value, a tuple's values joined by commas."""
    given = []
    for name, value in constants.items():
        if isinstance(value, tuple):
            value = ",".join(value)
        elif isinstance(value, bool):
            value = str(value).lower()
        given.append(f"{name}={value}")
    return given


def run_script(script: str, *constants: str) -> None:
    """Raises UserError where it fails; it has said why itself."""
    root, module = Path(__file__).parents[2], script.removeprefix("-m ")
    program = [str(root / script)] if module == script else ["-m", module]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *program, *constants], env=environment)
    if done.returncode:
        raise UserError(f"{module} stopped; mend what it says above and run the same command again")


def require_folders(wanted: set[str]) -> None:
    """Raises UserError at once where a folder is missing that is needed only after hours."""
    data, drawn = expanded(DATA_DIR or f"data/{TASK}"), TASK.startswith("demo_") and not DATA_DIR
    for seed in SEEDS:
        split(MASKS.replace("{seed}", str(seed)), own_rows=())
        untrained = not place_of(TASK, seed, trained_rivals("", {})).exists()
        if "rivals" in wanted and untrained and not drawn and not data.is_dir():
            raise UserError(f"{data} does not exist, and SAMed and MSA see its pictures: set "
                            "DATA_DIR to the data set, or EXPERIMENTS without rivals")


def look_into_cache(task: str) -> tuple[str, int, tuple[str, ...]]:
    """The identity of the task's cache, how many training samples it holds, and its texts."""
    cache = Cache.open(Path("runs") / task / "features.h5", task)
    return cache.identity(), len(cache.samples("train")), cache.texts


def require_asked(path: Path, content: dict, experiment: Experiment, seed: int, identity: str,
                  like: dict) -> None:
    """Raises UserError where the results at `path` are of another cache or of other constants.

    content: these results. Settings that the experiment does not name must equal those in `like`.
    Otherwise one table could mix runs from before and after a constant was edited.
    """
    asked = {"seed": seed, "features": identity}
    for constants in (experiment.srm, experiment.agent, experiment.rivals):
        asked |= {name.lower(): value for name, value in (constants or {}).items()}
    follows = {"srm", *asked}  # from the seed
    if "branch" in asked:
        follows.add("srm_steps")  # from the branch
    training = {name: value for name, value in like["trained"].items() if name not in follows}
    evaluation = {"rounds": experiment.evaluation.get("ROUNDS", like["rounds"]),
                  "sample_actions": like["sample_actions"], "evaluation_seed": seed}
    stale = path if experiment.agent is None else path.parent  # another's agent stays
    first = run_folder(content["task"], SEEDS[0])
    require_same(path, content["trained"], asked, mend=move_away(stale))
    require_same(path, content["trained"], training, mend=move_away(stale, unless=first))
    require_same(path, content, evaluation, mend=move_away(path, unless=first / "results.json"))


def require_trained_alike(path: Path, content: dict, like: dict, asked: dict) -> None:
    """Raises UserError where SAMed or MSA of the results at `path` had other constants of peft.

    content: these results. like: the first ones of SAMed and MSA for this task, whose settings
    these must have, but for those in `asked`.
    """
    for method in METHODS:
        training = content.get("given_masks", {}).get(method, {}).get("training")
        if training is None:
            raise UserError(f"{path} does not say how {method} was trained: {_AGAIN}")
        stale = [path, *(path.parent / f"{method.lower()}{end}" for end in (".pt", "_masks"))]
        recipe = {name: value for name, value in like["given_masks"][method]["training"].items()
                  if name not in asked}
        first = run_folder(content["task"], SEEDS[0]) / "rivals.json"
        require_same(path, training, asked, mend=move_away(*stale))
        require_same(path, training, recipe, mend=move_away(*stale, unless=first))


def move_away(*stale: Path, unless: Path | None = None) -> str:
    """What to do about stale files. unless: what they are compared with, which may be at fault."""
    named, it = " and ".join(map(str, stale)), "them" if len(stale) > 1 else "it"
    odd = f" (or {unless}, if that is the odd one)" if unless and unless not in stale else ""
    return f"move {named} away, or delete {it}{odd}, and run the same command again"


def read_results(path: Path, task: str, rows: tuple[str, ...]) -> dict:
    """What stage 4 wrote to `path`.

    Raises UserError where it is damaged, of an earlier format, of another task, or lacks one of
    `rows`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in _CONTENT.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        for name in ("srm", "rounds", "episodes"):
            content["trained"][name]
        outdated = lacks_pooled(content)
        if not outdated:
            check_figures(content)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or was not written by 04_evaluate.py "
                        f"({type(error).__name__}: {error}): {_AGAIN}") from error
    if outdated:
        raise UserError(f"{path} is from before results held pooled IoU and BER: {_AGAIN}")
    if content["task"] != task:
        raise UserError(f"{path} holds results of {content['task']}, not {task}: move it away and "
                        "run the same command again")
    if missing := [row for row in rows if row not in content["rows"]]:
        raise UserError(f"{path} lacks the row {missing[0]}: {_AGAIN}")
    return content


def lacks_pooled(content: dict) -> bool:
    """Whether a row, or a class of it, has no pooled metrics: earlier versions wrote none."""
    scores = list(content["rows"].values())
    for row in content["rows"].values():
        scores += row.get("per_class", {}).values()
    return any("pooled" not in each for each in scores)


def check_figures(content: dict) -> None:
    """Raises LookupError, TypeError, AttributeError or ValueError unless all figures are there."""
    figures = [content["foreground_rate_attainable"]]
    for row, scores in content["rows"].items():
        figures += [scores[name] for name in METRICS.values()]
        figures += [scores["pooled"][name] for name in ("IoU", "BER")]
        if "FR" in scores:
            figures.append(scores["FR"])
        for its in scores.get("per_class", {}).values():
            figures += [its["mIoU"], its["pooled"]["IoU"]]
        figures += content["iou_per_round"][row]
    after_rounds = []
    if "AlignSAM" in content["rows"]:
        after_rounds.append(content["iou_per_round"]["AlignSAM"])
        for label in content["rows"]["AlignSAM"].get("per_class", ()):
            after_rounds.append(content["iou_per_round_per_class"]["AlignSAM"][label])
            figures += after_rounds[-1]
    for record in content.get("given_masks", {}).values():
        if not isinstance(record.get("training", {}), dict):
            raise ValueError("training is no dict")
    if not all(map(math.isfinite, figures)):
        raise ValueError("a figure is not finite")
    if any(len(values) != content["rounds"] + 1 for values in after_rounds):
        raise ValueError("AlignSAM's rounds are not as many as it says")


# ---- figures over seeds; `runs` are the results of one experiment, one a seed

def spread(values: list[float]) -> Figure:
    return mean(values), stdev(values) if len(values) > 1 else None


def over_seeds(runs: list[dict]) -> dict[str, dict[str, Figure]]:
    """{row: {metric: figure}} of rows of all seeds, with pooled metrics as columns of their own."""
    table = {}
    for row in rows_of_all(runs):
        scores = [flat(run["rows"][row]) for run in runs]
        table[row] = {name: spread([score[name] for score in scores]) for name in scores[0]}
    return table


def rows_of_all(runs: list[dict]) -> list[str]:
    """The rows that the results of every seed hold, in their order."""
    return [row for row in runs[0]["rows"] if all(row in run["rows"] for run in runs)]


def given_rows(runs: list[dict]) -> list[str]:
    """Those of `rows_of_all` that were scored from given masks."""
    return [row for row in rows_of_all(runs) if row in runs[0].get("given_masks", {})]


def class_ious(runs: list[dict], row: str, labels: list[str]) -> dict[str, Figure]:
    """{class: IoU, a mean over its images} of a row and of these classes."""
    per_class = [run["rows"][row].get("per_class", {}) for run in runs]
    return {label: spread([scores[label]["mIoU"] for scores in per_class]) for label in labels}


def pooled_class_ious(runs: list[dict], row: str) -> dict[str, Figure]:
    """{class: IoU over all pixels of its images} of a row, and before them their mean, "mIoU"."""
    ious = []
    for run in runs:
        per_class = run["rows"][row]["per_class"]
        pooled = {label: scores["pooled"]["IoU"] for label, scores in per_class.items()}
        ious.append({"mIoU": mean(pooled.values())} | pooled)
    return {name: spread([its[name] for its in ious]) for name in ious[0]}


def rounds_of(runs: list[dict]) -> dict[str, list[Figure]]:
    """{row: mIoU after each round, M_0 first}, of the rows that have all rounds."""
    lines = {}
    for row in rows_of_all(runs):
        if any(len(run["iou_per_round"][row]) <= run["rounds"] for run in runs):
            continue  # w/o MSI, or given masks: someone called stage 4 with more rows
        after_rounds = zip(*(run["iou_per_round"][row] for run in runs))
        lines[row] = [spread(list(values)) for values in after_rounds]
    return lines


def rounds_of_classes(runs: list[dict]) -> dict[str, list[Figure]]:
    """{class: AlignSAM's IoU after each round, M_0 first}."""
    per_class = [run["iou_per_round_per_class"]["AlignSAM"] for run in runs]
    lines = {}
    for label in runs[0]["rows"]["AlignSAM"]["per_class"]:
        after_rounds = zip(*(ious[label] for ious in per_class))
        lines[label] = [spread(list(values)) for values in after_rounds]
    return lines


# ---- tables

def paper_tables(runs: Runs, branch: str) -> dict[str, Table]:
    """{title: table} of all experiments there are. branch: the task's branch of the SRM."""
    return main_tables(runs["main"][""]) | experiment_tables(runs, branch)


def main_tables(base: list[dict]) -> dict[str, Table]:
    """The tables of the main runs alone: 2, 3, 8, 9, and the baselines."""
    rows = over_seeds(base)
    labels = list(base[0]["rows"]["AlignSAM"].get("per_class", ()))
    baselines = {row: scores for row, scores in rows.items()
                 if row == "AlignSAM" or row not in _ABLATIONS}
    compared = (*_ABLATIONS, *given_rows(base))
    tables = {"Tables 2 and 3: the method and its ablations": Table(
        {row: rows[row] for row in compared}, "rows", POOLED_NOTE)}
    if labels:
        tables["Table 3: IoU per class"] = Table(
            {row: class_ious(base, row, labels) for row in compared}, "classes")
        tables["Table 3: IoU per class, pooled over the images that hold the class"] = Table(
            {row: pooled_class_ious(base, row) for row in compared}, "classes", POOLED_NOTE)
    tables["Baselines and bounds"] = Table(baselines, note=POOLED_NOTE)

    sources, printed = {}, [label for label in labels if label in CLASSES]
    for name, row in _LABELS.items():
        sources[name] = {"mIoU": rows[row]["mIoU"]} | class_ious(base, row, printed)
    tables["Table 8: source of the labels"] = Table(sources, "labels")

    rates = {}
    for name, row in (("AlignSAM", "AlignSAM"), ("random", "w/o RL")):
        rates[name] = {metric: rows[row][metric] for metric in ("FR", "mIoU", "E")}
    rates["attainable"] = {"FR": spread([run["foreground_rate_attainable"] for run in base])}
    tables["Table 9: foreground rate"] = Table(rates, "foreground rate")
    return tables


def experiment_tables(runs: Runs, branch: str) -> dict[str, Table]:
    """The tables for which more was run: AlignSAM+, Tables 4, 5 and 10, Figure 7."""
    base, tables = runs["main"][""], {}
    main, trained = over_seeds(base)["AlignSAM"], base[0]["trained"]
    if "plus" in runs:
        rows = {"AlignSAM": main}
        for row, scores in over_seeds(runs["plus"][""]).items():
            rows["AlignSAM+" if row == "AlignSAM" else f"AlignSAM+ {row}"] = scores
        title = f"AlignSAM+ ({' '.join(arguments(_PLUS))} in stage 2)"
        tables[title] = Table(rows)
    if "branches" in runs:
        other = over_seeds(runs["branches"][_OTHER[branch]])["AlignSAM"]
        branches = {branch: main, _OTHER[branch]: other}
        tables["Table 4: branch of the SRM"] = Table(
            {name: branches[name] for name in ("implicit", "explicit")}, "branches", POOLED_NOTE)
    if "iterations" in runs:
        results = runs["iterations"][""]
        title = f"Table 5: IoU after each round (trained with T = {trained['rounds']})"
        tables[title] = Table(at_rounds(rounds_of(results), (0, 1, 2, 3, 5, 10, 15, 20)))
        if "per_class" in base[0]["rows"]["AlignSAM"]:
            tables["Table 5: IoU of each class after each round, AlignSAM"] = Table(
                at_rounds(rounds_of_classes(results), (1, 5, 10, 15, 20)), "iterations")
    if "shots" in runs:
        tables["Table 10: labelled images, mIoU"] = Table(
            by_column(runs, "shots", "all", ("AlignSAM", "PerSAM", *given_rows(base))), "shots")
    for name in ("rounds", "episodes"):
        if name in runs:
            tables[f"Figure 7: {name}, mIoU"] = Table(by_column(runs, name, str(trained[name])))
    return tables


def at_rounds(lines: dict[str, list[Figure]],
              numbers: tuple[int, ...]) -> dict[str, dict[str, Figure]]:
    """{row: {round: figure}} of these rounds, of {row: figure after each round}."""
    return {row: {str(number): values[number] for number in numbers}
            for row, values in lines.items()}


def by_column(runs: Runs, experiment: str, standard: str,
              rows: tuple[str, ...] = ("AlignSAM",)) -> dict[str, dict[str, Figure]]:
    """{row: {column: mIoU}} of an experiment and of the main runs, which are column `standard`.

    Columns that are numbers come in their order, before others. A row may lack some of them.
    """
    columns = {standard: over_seeds(runs["main"][""])}
    for column, results in runs[experiment].items():
        columns[column] = over_seeds(results)
    order = sorted(columns, key=lambda column: int(column) if column.isdigit() else math.inf)
    return {row: {column: columns[column][row]["mIoU"] for column in order
                  if row in columns[column]} for row in rows}


# ---- files

def plot(path: Path, lines: dict[str, dict[int, Figure]], x_name: str, title: str) -> None:
    """Mean and spread of mIoU in percent over x, one line a row, as PNG."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for row, values in lines.items():
        heights = [100 * value for value, _ in values.values()]
        bars = [100 * (deviation or 0) for _, deviation in values.values()]
        axis.errorbar(list(values), heights, bars, marker=".", capsize=2, label=row)
    axis.set(xlabel=x_name, ylabel="mIoU (%)")
    axis.set_title(title, fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half a round
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def write_plots(out: Path, runs: Runs, tables: dict[str, Table], title: str) -> None:
    """iterations.png and figure7_*.png, of those experiments there are."""
    if "iterations" in runs:
        lines = rounds_of(runs["iterations"][""])
        after_rounds = {row: dict(enumerate(values)) for row, values in lines.items()}
        plot(out / _PLOTS["iterations"], after_rounds, "round", title)
    for name in ("rounds", "episodes"):
        if name in runs:
            rows = tables[f"Figure 7: {name}, mIoU"].rows
            lines = {row: {int(column): value for column, value in values.items()}
                     for row, values in rows.items()}
            plot(out / _PLOTS[name], lines, name, title)


def markdown(first: dict, models: str, tables: dict[str, Table], comparable: bool) -> str:
    """tables.md.

    first: results of the first main run. comparable: whether the paper's figures stand beside ours.
    """
    seeds = ", ".join(map(str, SEEDS))
    settings = [f"{name.upper()}={value}" for name, value in first["trained"].items()
                if name not in ("task", "seed", "features", "srm")]
    parts = [f"# {TASK}", f"{models}, {first['branch']} branch, {first['samples']} test samples, "
             f"seeds {seeds}. Percent, MAE a fraction; mean ± deviation over seeds.",
             f"Main runs: {', '.join(settings)}."]
    paper_task = get_task(TASK, "-").paper
    for title, table in tables.items():
        paper = None
        if comparable and table.paper and paper_task:
            paper = paper_figures(table.paper, paper_task)
        if paper:
            paper = beside_pooled(paper)
        parts.append(f"## {title}\n\n{results_table(table.rows, paper)}")
        if table.note:
            parts[-1] += f"\n{table.note}\n"
    return "\n\n".join(parts)


def main() -> None:
    if len(set(SEEDS)) < len(SEEDS) or min(SEEDS, default=-1) < 0:
        raise UserError(f"SEEDS={','.join(map(str, SEEDS))} names none, one twice or a negative "
                        "one: name each seed once")
    wanted = {"main", *settings.choose("EXPERIMENTS", EXPERIMENTS, _KNOWN)}
    if FIGURE7:
        wanted |= {"rounds", "episodes"}
    if MASKS:
        wanted.add("masks")
    given = [item.partition(":")[0].strip() for item in MASKS.split(",")]
    if "rivals" in wanted and (twice := [row for row in given if row in METHODS]):
        raise UserError(f"MASKS names the row {twice[0]}, which is trained here too: call it "
                        "otherwise, or set EXPERIMENTS without rivals")
    if {"rivals", "shots"} <= wanted:
        wanted.add("rivals at few shots")
    task, out = get_task(TASK, "-"), Path("runs") / TASK
    if TASK.startswith("demo_"):  # ends at once where the cache is whole
        run_script("01_cache_features.py", *arguments({"TASK": TASK, "DEVICE": DEVICE}))
    elif not (out / "features.h5").exists():
        raise UserError(f"{out / 'features.h5'} does not exist: run 01_cache_features.py "
                        f"TASK={TASK} first, with your SAM, CLIP and DATA_DIR")
    require_folders(wanted)

    plots = [_PLOTS[name] for name in _PLOTS if name in wanted]
    files.require_ours(*(out / name for name in ("tables.md", "tables.json", *plots)))
    identity, shots, texts = look_into_cache(TASK)
    runs = run_experiments(wanted, task.branch, identity, shots)
    add_given(runs["main"][""], *(runs[name][""] for name in ("rivals", "masks") if name in runs))
    for column, its in runs.get("rivals at few shots", {}).items():
        add_given(runs["shots"][column], its)
    tables = paper_tables(runs, task.branch)
    first = runs["main"][""][0]
    own_models = stand_ins(first["sam"], first["clip"])
    models = f"SAM {first['sam']}, CLIP {first['clip']}{own_models}"
    comparable = not own_models and texts == task.texts  # PROMPT may ask something else

    write_plots(out, runs, tables, f"{TASK}, {models}")
    text = markdown(first, models, tables, comparable)
    files.write_text(out / "tables.md", text)
    content = {"task": TASK, "models": models, "seeds": SEEDS,
               "units": "[mean, deviation over seeds], fractions",
               "tables": {title: table.rows for title, table in tables.items()}}
    files.write_text(out / "tables.json", json.dumps(content, indent=1))
    print(f"{text}\nwrote {out / 'tables.md'}, {out / 'tables.json'}")


if __name__ == "__main__":
    script.run(main, globals())
