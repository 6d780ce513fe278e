"""The paper's tables: which runs they need, and what they say of them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.metrics import METRICS
from common.results import tables
from common.results.outputs import Report
from common.results.paper import POOLED_NOTE, paper_figures, results_table
from common.rivals.finetuned import METHODS
from common.runtime.errors import UserError
from common.tasks import get_task

RECIPE = {"episodes": 50, "rounds": 15, "shots": 0, "residual": 0.0, "every_text": False,
          "branch": "implicit", "features": "0a"}
ROWS = ["AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", "labels: CLIP Surgery", "labels: last mask",
        "PerSAM"]


def typed(text: str) -> object:
    """A constant's value as a JSON file holds it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def results_of(given: dict[str, str], trained: dict, score: float | Callable) -> dict:
    """What stage 4 writes, called with the constants `given`; VOC has two classes.

    score: of all rows and metrics, or a function of row, metric, `trained` and rounds.
    """
    masks = dict(item.split(":") for item in given.get("MASKS", "").split(",") if item)
    rows = {"all": ROWS, "none": []}.get(given["ROWS"], given["ROWS"].split(","))
    rows = [*rows, *masks]
    rounds = int(given.get("ROUNDS", 15))
    if callable(score):
        return {**results_of(given, trained, 0.4), "rows": {
            row: {name: score(row, name, trained, rounds) for name in (*METRICS.values(), "FR")} | {
                "pooled": {name: score(row, name, trained, rounds) for name in ("IoU", "BER")}}
            for row in rows}}
    after_rounds = [score + 0.01 * number for number in range(rounds + 1)]
    row = {"mIoU": score, "F": score, "BER": score, "E": score, "MAE": score, "FR": score,
           "pooled": {"IoU": score + 0.03, "BER": score + 0.07}}
    per_round = {}
    if given["TASK"] == "voc":
        row["per_class"] = {"car": class_scores(score, score + 0.11),
                            "sheep": class_scores(score + 0.2, score + 0.05)}
        per_round = {name: dict.fromkeys(row["per_class"], after_rounds) for name in rows}
    return {"task": given["TASK"], "sam": "demo", "clip": "demo", "branch": "implicit",
            "samples": 240, "foreground_rate_attainable": 0.4, "trained": trained,
            "rounds": rounds, "evaluation_seed": int(given["SEED"]), "sample_actions": False,
            "rows": dict.fromkeys(rows, row), "iou_per_round": dict.fromkeys(rows, after_rounds),
            "iou_per_round_per_class": per_round,
            **({"given_masks": {row: record_of(folder) for row, folder in masks.items()}}
               if masks else {})}


def record_of(folder: str) -> dict:
    listed = Path(folder, "masks.json")
    training = {"training": json.loads(listed.read_text())} if listed.exists() else {}
    return {"folder": folder} | training


def class_scores(mean: float, pooled: float) -> dict:
    return {"mIoU": mean, "pooled": {"IoU": pooled, "BER": 0.9}}


def tables_of(task: str) -> dict:
    return json.loads(Path(f"runs/{task}/tables.json").read_text())["tables"]


@pytest.fixture
def scripts(monkeypatch, tmp_path, request):
    """Stands in for the numbered scripts: keeps the commands, and writes results.

    Those depend on seed and constants, unless the test has a function of its own for them. Pooled
    IoU is 3 percent points above the mean over images, pooled BER 7.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("seem", "unet", "unet0", "unet1", "msa", "theirs", "pictures"):  # tests name these
        Path(name).mkdir()
    commands, trained, own_score = [], {}, getattr(request, "param", None)

    def run_script(script, *constants):
        given = dict(constant.split("=", 1) for constant in constants)
        commands.append((script[:2], given))
        folder = Path(given.get("RUN_DIR", "runs/demo_saliency"))
        folder.mkdir(parents=True, exist_ok=True)
        if script.startswith("02"):
            (folder / "srm.pt").write_text(given["SEED"])
            trained.pop(folder, None)
        if script.startswith(("02", "03")):
            trained.setdefault(folder, dict(RECIPE))
            trained[folder].update({name.lower(): typed(value) for name, value in given.items()
                                    if name not in ("RUN_DIR", "FEATURES", "DEVICE")})
            trained[folder]["srm"] = (folder / "srm.pt").read_text()
        if script == "-m common.rivals.peft":
            method = given["METHOD"].lower()
            (folder / f"{method}_masks").mkdir(exist_ok=True)
            (folder / f"{method}_masks" / "masks.json").write_text(json.dumps(
                {"steps": 500, "seed": int(given["SEED"]), "shots": int(given.get("SHOTS", 0))}))
        if script.startswith("04"):
            for masks in given.get("MASKS", "").split(","):
                if "_masks" in masks:  # as many shots as the agent's folder
                    assert record_of(masks.split(":")[1])["training"]["shots"] == (
                        trained[folder]["shots"])
            score = 0.4 + 0.1 * int(given["SEED"]) + (0.05 if "explicit" in str(folder) else 0)
            content = results_of(given, trained.get(folder, {}), own_score or score)
            (folder / given["RESULTS"]).write_text(json.dumps(content))

    monkeypatch.setattr(tables, "run_script", run_script)
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 50, ("saliency object",)))
    return commands


def edit(path: Path, change: Callable) -> None:
    """Changes the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_tables_hold_mean_and_deviation_over_seeds_and_nothing_is_run_twice(scripts, monkeypatch):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    tables.main()
    first = len(scripts)
    stages = [stage for stage, _ in scripts]
    assert stages.count("01") == 1
    # a seed: main, AlignSAM+, other branch, 5 and 20 shots
    assert stages.count("02") == stages.count("03") == 2 * 5
    # and SAMed and MSA, on all samples, on 5 and on 20
    assert stages.count("-m") == 2 * 2 * 3
    assert stages.count("04") == 2 * 9  # and 20 rounds
    text = Path("runs/demo_saliency/tables.md").read_text()
    assert "| AlignSAM | 45.00 ± 7.07 |" in text  # 0.4 and 0.5, deviation 0.0707
    assert re.search(r"\| explicit \| 50.00 ± 7.07", text)
    assert "0.450 ± 0.071" in text  # MAE stays a fraction
    table = tables_of("demo_saliency")["Table 5: IoU after each round (trained with T = 15)"]
    assert table["AlignSAM"]["20"] == pytest.approx([0.65, 0.0707], abs=1e-4)
    assert Path("runs/demo_saliency/iterations.png").stat().st_size > 1000
    (Path("runs/demo_saliency-seed1") / "results.json").unlink()
    tables.main()
    again = [stage for stage, _ in scripts[first:] if stage != "01"]
    assert again == ["02", "03", "04"]  # only what was missing


def test_pooled_metrics_stand_beside_the_means_over_images(scripts, monkeypatch):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    tables.main()
    for title, row in (("Tables 2 and 3: the method and its ablations", "w/o RL"),
                       ("Baselines and bounds", "PerSAM")):
        scores = tables_of("demo_saliency")[title][row]
        assert scores["mIoU"] == scores["BER"] == pytest.approx([0.45, 0.0707], abs=1e-4)
        assert scores["pooled IoU"] == pytest.approx([0.48, 0.0707], abs=1e-4)
        assert scores["pooled BER"] == pytest.approx([0.52, 0.0707], abs=1e-4)
    text = Path("runs/demo_saliency/tables.md").read_text()
    assert "| FR | pooled IoU | pooled BER |" in text
    assert "| 45.00 ± 7.07 | 48.00 ± 7.07 | 52.00 ± 7.07 |" in text
    assert text.count(POOLED_NOTE) == 2


def test_the_papers_iou_and_ber_stand_beside_pooled_ones_too(scripts, monkeypatch):
    write_table(monkeypatch, "sbu")
    text = Path("runs/sbu/tables.md").read_text()
    assert "| pooled IoU | pooled IoU (paper) | pooled BER | pooled BER (paper) |" in text
    assert "| 43.00 | 30.78 | 47.00 | 34.62 |" in text  # AlignSAM's row ends so


def test_classes_have_a_table_of_means_and_one_of_pooled_ious(scripts, monkeypatch):
    write_table(monkeypatch, "voc")
    written = tables_of("voc")
    means = written["Table 3: IoU per class"]["AlignSAM"]
    title = "Table 3: IoU per class, pooled over the images that hold the class"
    pooled = written[title]["AlignSAM"]
    assert {name: value for name, (value, _) in means.items()} == pytest.approx(
        {"car": 0.4, "sheep": 0.6})
    assert {name: value for name, (value, _) in pooled.items()} == pytest.approx(
        {"mIoU": 0.48, "car": 0.51, "sheep": 0.45})
    text = Path("runs/voc/tables.md").read_text()
    assert "| AlignSAM | 40.00 | 66.13 | 60.00 | 73.12 |" in text
    assert "| AlignSAM | 48.00 | 62.09 | 51.00 | 66.13 | 45.00 | 73.12 |" in text
    # the paper's is a mean over classes, and this is not
    assert "| pooled IoU | pooled IoU (paper) |" in text


def write_table(monkeypatch, task: str) -> None:
    """Writes the main runs' tables of a real data set, as if of the paper's models."""
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    monkeypatch.setattr(tables, "TASK", task)
    monkeypatch.setattr(tables, "stand_ins", lambda sam, clip: "")
    texts = get_task(task, "-").texts
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 50, texts))
    Path("runs", task).mkdir(parents=True)
    Path("runs", task, "features.h5").touch()
    tables.main()


def test_rows_of_given_masks_stand_beside_the_papers_figures(scripts, monkeypatch):
    monkeypatch.setattr(tables, "MASKS", "SEEM:seem,U-Net:unet")
    write_table(monkeypatch, "sbu")
    text = Path("runs/sbu/tables.md").read_text()
    assert re.search(r"\| SEEM \| 40.00 \| 19.52 \| .* \| 43.00 \| 19.52 \|", text)
    assert "| U-Net | 40.00 | – | " in text
    assert "| SEEM (paper only)" not in text and "| Painter (paper only)" in text
    written = tables_of("sbu")
    assert list(written["Tables 2 and 3: the method and its ablations"]) == [
        "AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", "SEEM", "U-Net"]
    assert list(written["Baselines and bounds"])[-2:] == ["SEEM", "U-Net"]


def test_rows_of_given_masks_have_their_classes_in_table_3(scripts, monkeypatch):
    monkeypatch.setattr(tables, "MASKS", "MSA:msa")
    write_table(monkeypatch, "voc")
    text = Path("runs/voc/tables.md").read_text()
    assert "| MSA | 40.00 | 41.05 | 60.00 | 56.47 |" in text  # car and sheep
    written = tables_of("voc")
    pooled_title = "Table 3: IoU per class, pooled over the images that hold the class"
    assert written["Table 3: IoU per class"]["MSA"]["sheep"][0] == pytest.approx(0.6)
    assert written[pooled_title]["MSA"]["sheep"][0] == pytest.approx(0.45)


def test_given_masks_are_scored_alone_and_anew_in_each_call_with_each_seeds_folder(
        scripts, monkeypatch):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("shots",))
    tables.main()
    first = len(scripts)
    monkeypatch.setattr(tables, "MASKS", "SEEM:seem,U-Net:unet{seed}")
    for _ in range(2):
        tables.main()
        again = [given for stage, given in scripts[first:] if stage != "01"]
        first = len(scripts)
        assert [(given["MASKS"], given["ROWS"], given["RESULTS"]) for given in again] == [
            (f"SEEM:seem,U-Net:unet{seed}", "none", "given_masks.json") for seed in (0, 1)]
    table = tables_of("demo_saliency")["Table 10: labelled images, mIoU"]
    assert table["U-Net"] == {"all": [pytest.approx(0.45), pytest.approx(0.0707, abs=1e-4)]}
    assert set(table["PerSAM"]) == {"5", "20", "all"}


def test_rows_that_stage_4_has_scored_by_hand_are_shown_if_every_seed_has_them(
        scripts, monkeypatch, capsys):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    tables.main()
    for seed, masks in ((0, "SEEM:seem,U-Net:unet"), (1, "SEEM:seem")):
        path = Path(f"runs/demo_saliency-seed{seed}/results.json")
        trained = json.loads(path.read_text())["trained"]
        given = {"TASK": "demo_saliency", "SEED": str(seed), "ROWS": "all", "MASKS": masks}
        path.write_text(json.dumps(results_of(given, trained, 0.4)))
    tables.main()
    compared = tables_of("demo_saliency")["Tables 2 and 3: the method and its ablations"]
    assert "SEEM" in compared and "U-Net" not in compared
    assert "in no table, as not all seeds have them: U-Net\n" in capsys.readouterr().out


def test_an_experiment_is_a_set_of_constants(scripts, monkeypatch):
    monkeypatch.setattr(tables, "FIGURE7", True)
    tables.main()
    of = {}
    for stage, given in scripts:
        of[stage, Path(given.get("RUN_DIR", "")).name, given.get("RESULTS")] = given
    assert of["02", "demo_saliency-seed0-explicit", None]["BRANCH"] == "explicit"
    assert of["02", "demo_saliency-seed0-shots5", None]["SHOTS"] == "5"
    assert of["03", "demo_saliency-seed0-shots5", None]["SHOTS"] == "5"
    assert of["02", "demo_saliency-seed0-plus", None]["RESIDUAL"] == "0.5"
    assert of["02", "demo_saliency-seed0-plus", None]["EVERY_TEXT"] == "true"
    assert of["04", "demo_saliency-seed0", "T20.json"]["ROUNDS"] == "20"
    assert of["04", "demo_saliency-seed0", "T20.json"]["ROWS"] == "AlignSAM,w/o RL,w/o SRM"
    assert of["03", "demo_saliency-seed0-episodes100", None]["EPISODES"] == "100"
    assert of["03", "demo_saliency-seed0-rounds5", None]["ROUNDS"] == "5"
    assert of["04", "demo_saliency-seed0-rounds5", "results.json"]["ROUNDS"] == "5"
    assert ("02", "demo_saliency-seed0-rounds5", None) not in of  # its SRM is the main run's
    assert Path("runs/demo_saliency-seed0-rounds5/srm.pt").read_text() == "0"
    assert {given["FEATURES"] for stage, given in scripts if stage != "01"} == {
        "runs/demo_saliency/features.h5"}
    assert Path("runs/demo_saliency/figure7_episodes.png").exists()


def test_a_sam_whose_file_has_moved_is_named_to_every_stage(scripts, monkeypatch):
    tables.main()
    assert not any("SAM" in given for stage, given in scripts)
    scripts.clear()
    shutil.rmtree("runs")
    monkeypatch.setattr(tables, "SAM", "elsewhere/vit_b.pth")
    tables.main()
    assert {stage for stage, _ in scripts} == {"01", "02", "03", "04", "-m"}
    assert {given.get("SAM") for stage, given in scripts if stage != "01"} == {
        "elsewhere/vit_b.pth"}


def figure_of(row: str, metric: str, trained: dict, rounds: int) -> float:
    """Another figure for each row and metric, and for each constant that an experiment changes."""
    names = [*ROWS, *METHODS]
    metrics = [*METRICS.values(), "FR", "IoU"]
    changed = {"residual": 0.5, "branch": "explicit", "shots": 5}
    return (0.01 * (1 + names.index(row)) + 0.001 * metrics.index(metric)
            + sum(0.1 * (1 + place) for place, (name, value) in enumerate(changed.items())
                  if trained[name] == value)
            + 0.15 * (trained["shots"] == 20) + 0.02 * rounds + 0.0001 * trained["episodes"])


@pytest.mark.parametrize("scripts", [figure_of], indirect=True)
def test_each_cell_is_the_figure_of_its_own_row_metric_and_experiment(scripts, monkeypatch):
    monkeypatch.setattr(tables, "FIGURE7", True)
    tables.main()
    written = tables_of("demo_saliency")

    def cell(title: str, row: str, column: str) -> float:
        [table] = [its for name, its in written.items() if name.startswith(title)]
        return table[row][column][0]

    def expected(row: str, metric: str = "mIoU", rounds: int = 15, **trained) -> object:
        return pytest.approx(figure_of(row, metric, RECIPE | trained, rounds))

    for row in ("AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", *METHODS):
        for metric in METRICS.values():
            assert cell("Tables 2 and 3", row, metric) == expected(row, metric)
        assert cell("Tables 2 and 3", row, "pooled IoU") == expected(row, "IoU")
        assert cell("Tables 2 and 3", row, "pooled BER") == expected(row, "BER")
    for row in ("AlignSAM", "PerSAM"):
        assert cell("Baselines", row, "F") == expected(row, "F")
    for name, row in (("RL + SRM", "AlignSAM"), ("RL + CLIP-Surgery map", "labels: CLIP Surgery"),
                      ("RL + last SAM mask", "labels: last mask"),
                      ("RL only (all positive)", "w/o SRM")):
        assert cell("Table 8", name, "mIoU") == expected(row)
    for name, row in (("AlignSAM", "AlignSAM"), ("random", "w/o RL")):
        for metric in ("FR", "mIoU", "E"):
            assert cell("Table 9", name, metric) == expected(row, metric)
    assert cell("AlignSAM+", "AlignSAM", "mIoU") == expected("AlignSAM")
    assert cell("AlignSAM+", "AlignSAM+", "mIoU") == expected("AlignSAM", residual=0.5)
    assert cell("AlignSAM+", "AlignSAM+ w/o RL", "E") == expected("w/o RL", "E", residual=0.5)
    for branch in ("implicit", "explicit"):
        assert cell("Table 4", branch, "mIoU") == expected("AlignSAM", branch=branch)
    for row in ("AlignSAM", "PerSAM", *METHODS):
        for column, shots in (("5", 5), ("20", 20), ("all", 0)):
            assert cell("Table 10", row, column) == expected(row, shots=shots)
    for number in (5, 10, 15, 20):
        assert cell("Figure 7: rounds", "AlignSAM", str(number)) == expected(
            "AlignSAM", rounds=number)
    for number in (10, 25, 50, 100):
        assert cell("Figure 7: episodes", "AlignSAM", str(number)) == expected(
            "AlignSAM", episodes=number)


def test_samed_and_msa_are_trained_beside_each_agent_and_stand_in_tables_2_3_and_10(
        scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("rivals", "shots"))
    monkeypatch.setattr(tables, "DATA_DIR", "pictures")
    tables.main()
    trained = [given for stage, given in scripts if stage == "-m"]
    assert [(given["METHOD"], Path(given["RUN_DIR"]).name, given.get("SHOTS"), given["DATA_DIR"])
            for given in trained] == [
        (method, f"demo_saliency-seed0{suffix}", shots, "pictures")
        for suffix, shots in (("", None), ("-shots5", "5"), ("-shots20", "20"))
        for method in ("SAMed", "MSA")]
    assert {given["FEATURES"] for given in trained} == {"runs/demo_saliency/features.h5"}
    scored = [given["MASKS"] for stage, given in scripts if given.get("ROWS") == "none"]
    assert scored[1] == ("SAMed:runs/demo_saliency-seed0-shots5/samed_masks,"
                         "MSA:runs/demo_saliency-seed0-shots5/msa_masks")
    written = tables_of("demo_saliency")
    assert list(written["Tables 2 and 3: the method and its ablations"])[-2:] == ["SAMed", "MSA"]
    assert list(written["Table 10: labelled images, mIoU"]["MSA"]) == ["5", "20", "all"]

    first = len(scripts)
    monkeypatch.setattr(tables, "EXPERIMENTS", ("rivals",))
    tables.main()
    assert [stage for stage, _ in scripts[first:]] == ["01"]  # nothing is trained or scored twice
    edit(Path("runs/demo_saliency-seed0/rivals.json"), lambda content: content["rows"].pop("MSA"))
    with pytest.raises(UserError, match="rivals.json lacks the row MSA: delete it"):
        tables.main()


@pytest.mark.parametrize("change, said", [
    (lambda training: training.update(steps=1500), "was made with STEPS=1500, and now it is 500"),
    (lambda training: training.update(seed=0), "was made with SEED=0, and now it is 1"),
    (lambda training: training.update(shots=20), "was made with SHOTS=20, and now it is 0")])
def test_samed_and_msa_are_of_one_recipe(scripts, monkeypatch, change, said):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("rivals",))
    tables.main()
    edit(Path("runs/demo_saliency-seed1/rivals.json"),
         lambda content: change(content["given_masks"]["MSA"]["training"]))
    with pytest.raises(UserError, match=f"seed1/rivals.json {said}: ") as refused:
        tables.main()
    folder = "runs/demo_saliency-seed1"
    assert f"move {folder}/rivals.json and {folder}/msa.pt and {folder}/msa_masks away" in str(
        refused.value)
    # seed 1 may be right: the recipe is that of the first seed
    first = "(or runs/demo_saliency-seed0/rivals.json, if that is the odd one)"
    assert (first in str(refused.value)) == ("STEPS" in said)


def test_results_that_do_not_say_how_rivals_were_trained_are_named(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("rivals",))
    tables.main()
    path = Path("runs/demo_saliency-seed0/rivals.json")
    for change in (lambda content: content["given_masks"]["SAMed"].pop("training"),
                   lambda content: content.pop("given_masks")):
        edit(path, change)
        with pytest.raises(UserError, match="rivals.json does not say how SAMed was trained: del"):
            tables.main()
    path.unlink()
    tables.main()


def test_a_row_of_masks_never_takes_the_place_of_one_that_is_trained(scripts, monkeypatch):
    monkeypatch.setattr(tables, "MASKS", "SEEM:seem, SAMed :theirs")
    with pytest.raises(UserError, match="MASKS names the row SAMed, which is trained here too"):
        tables.main()
    assert not scripts
    monkeypatch.setattr(tables, "MASKS", "SAMed:theirs")
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    tables.main()
    assert "SAMed" in tables_of("demo_saliency")["Tables 2 and 3: the method and its ablations"]


@pytest.mark.parametrize("seeds", [(0, 0), (), (1, -1)])
def test_seeds_that_say_nothing_of_the_spread_are_refused(scripts, monkeypatch, seeds):
    monkeypatch.setattr(tables, "SEEDS", seeds)
    with pytest.raises(UserError, match="^SEEDS=.* name each seed once"):
        tables.main()


@pytest.mark.parametrize("file, stale", [
    ("demo_saliency-seed1/T20.json", r"seed1/T20\.json"),
    ("demo_saliency-seed1/rivals.json", r"seed1/rivals\.json"),
    ("demo_saliency-seed1-rounds5/results.json", "seed1-rounds5")])
def test_results_with_another_srm_than_the_seeds_own_are_not_taken(
        scripts, monkeypatch, file, stale):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("iterations", "rivals"))
    monkeypatch.setattr(tables, "FIGURE7", True)
    tables.main()
    edit(Path("runs", file), lambda content: content["trained"].update(srm="another"))
    with pytest.raises(UserError, match=f"was made from another srm file .*: move runs/[^/]*{stale}"
                                        " away"):
        tables.main()


def test_results_of_rivals_with_another_number_of_shots_are_not_taken(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("rivals", "shots"))
    tables.main()
    path = Path("runs/demo_saliency-seed0-shots5/rivals.json")
    path.write_text(path.read_text().replace('"shots": 5', '"shots": 20'))
    with pytest.raises(UserError, match="shots5/rivals.json was made with SHOTS=20, and now it is "
                                        "5: move"):
        tables.main()


@pytest.mark.parametrize("held, columns", [(12, ["5", "all"]), (20, ["5", "all"]), (5, ["all"])])
def test_shots_that_the_cache_does_not_hold_are_left_out(scripts, monkeypatch, held, columns):
    """And those that are all it holds are not trained twice."""
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", held, ("saliency object",)))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("shots",))
    tables.main()
    table = tables_of("demo_saliency")["Table 10: labelled images, mIoU"]
    assert list(table["AlignSAM"]) == columns


@pytest.mark.parametrize("name, value, said", [
    ("MASKS", "SEEM:seem{seed}", "MASKS names seem1 for SEEM, which is no folder"),
    ("DATA_DIR", "nowhere", "nowhere does not exist, and SAMed and MSA see its pictures: set")])
def test_a_missing_folder_is_named_before_hours_of_training(
        scripts, monkeypatch, name, value, said):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, name, value)
    Path("seem0").mkdir()
    with pytest.raises(UserError, match=said):
        tables.main()
    assert {stage for stage, _ in scripts} <= {"01"}
    if name == "MASKS":
        Path("seem1").mkdir()
    else:
        monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))  # these need no pictures
    tables.main()


def test_the_papers_figures_stand_beside_its_models_and_its_question_only(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    monkeypatch.setattr(tables, "TASK", "duts")
    Path("runs/duts").mkdir(parents=True)
    Path("runs/duts/features.h5").touch()
    for texts, models, beside in ((("saliency object",), ("vit_h", "ViT-B-16"), True),
                                  (("red thing",), ("vit_h", "ViT-B-16"), False),
                                  (("saliency object",), ("vit_h", "demo"), False)):
        monkeypatch.setattr(tables, "look_into_cache", lambda task, texts=texts: ("0a", 50, texts))
        tables.main()
        path = Path("runs/duts-seed0/results.json")
        content = json.loads(path.read_text())
        content["sam"], content["clip"] = models
        path.write_text(json.dumps(content))
        tables.main()
        text = Path("runs/duts/tables.md").read_text()
        assert ("(paper)" in text) == beside
        assert ("(stand-ins: CLIP)" in text) == ("demo" in models)


def test_results_of_another_cache_or_of_other_constants_are_not_taken(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main", "branches"))
    tables.main()
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0b", 50, ("saliency object",)))
    with pytest.raises(UserError, match="seed0/results.json was made from another features file "
                                        ".*: move .*seed0 away, or delete it, and run the same"):
        tables.main()
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 50, ("saliency object",)))
    path = Path("runs/demo_saliency-seed0-explicit/results.json")
    path.write_text(path.read_text().replace('"branch": "explicit"', '"branch": "implicit"'))
    with pytest.raises(UserError, match="explicit/results.json was made with BRANCH=implicit, and "
                                        "now it is explicit: move .*explicit away, or delete it"):
        tables.main()


def with_rounds(content: dict, rounds: int) -> None:
    content["rounds"] = rounds
    for row, values in content["iou_per_round"].items():
        content["iou_per_round"][row] = values[:rounds + 1]


@pytest.mark.parametrize("change, said, stale", [
    (lambda content: content["trained"].update(episodes=5), "EPISODES=5, and now it is 50", ""),
    (lambda content: with_rounds(content, 5), "ROUNDS=5, and now it is 15", "/results.json"),
    (lambda content: content.update(evaluation_seed=7), "EVALUATION_SEED=7, and now it is 1",
     "/results.json"),
    (lambda content: content.update(sample_actions=True),
     "SAMPLE_ACTIONS=True, and now it is False", "/results.json")])
def test_a_table_is_of_one_recipe(scripts, monkeypatch, change, said, stale):
    """And a training is not thrown away where an evaluation alone is another one."""
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    tables.main()
    edit(Path("runs/demo_saliency-seed1/results.json"), change)
    one, first = (f"runs/demo_saliency-seed{seed}{stale}" for seed in (1, 0))
    with pytest.raises(UserError, match=f"seed1/results.json was made with {said}: move {one} away,"
                                        rf" or delete it \(or {first}, if that is the odd one\)"):
        tables.main()


def test_only_the_results_are_stale_where_an_experiment_trained_no_agent(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("iterations",))
    tables.main()
    edit(Path("runs/demo_saliency-seed0/T20.json"),
         lambda content: content["trained"].update(episodes=5))
    with pytest.raises(UserError, match="EPISODES=5, and now it is 50: move [^ ]*/T20.json away"):
        tables.main()


def test_20_rounds_that_are_fewer_are_not_taken_for_them(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("iterations",))
    tables.main()
    edit(Path("runs/demo_saliency-seed0/T20.json"), lambda content: with_rounds(content, 15))
    with pytest.raises(UserError, match="T20.json was made with ROUNDS=15, and now it is 20: move "
                                        "[^ ]*/T20.json away"):
        tables.main()


def test_a_row_of_fewer_rounds_is_in_no_table_of_rounds(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("iterations",))
    tables.main()
    edit(Path("runs/demo_saliency-seed0/T20.json"), lambda content: (
        content["rows"].update({"w/o MSI": content["rows"]["w/o RL"]}),
        content["iou_per_round"].update({"w/o MSI": [0.1, 0.2]})))
    tables.main()
    [rows] = (rows for title, rows in tables_of("demo_saliency").items() if "Table 5" in title)
    assert list(rows) == ["AlignSAM", "w/o RL", "w/o SRM"]


def test_real_data_without_a_cache_are_not_guessed_at(scripts, monkeypatch):
    monkeypatch.setattr(tables, "TASK", "duts")
    with pytest.raises(UserError, match="run 01_cache_features.py TASK=duts first"):
        tables.main()
    monkeypatch.setattr(tables, "EXPERIMENTS", ("table 8",))
    with pytest.raises(UserError, match="EXPERIMENTS names 'table 8'"):
        tables.main()


def test_the_papers_figures_stand_beside_the_right_rows():
    assert paper_figures("labels", "voc")["RL + SRM"]["mIoU"] == 62.09
    branches = paper_figures("branches", "sbu")
    assert branches == {"implicit": {"mIoU": 19.40}, "explicit": {"mIoU": 30.78}}
    assert paper_figures("shots", "msd")["AlignSAM"] == {"5": 31.19, "20": 38.78}
    assert paper_figures("foreground rate", "duts")["random"]["FR"] == 14.6
    assert paper_figures("iterations", "voc")["sheep"]["20"] == 74.0
    assert paper_figures("classes", "voc")["AlignSAM"]["sofa"] == 61.63
    for table, key in (("iterations", "duts"), ("classes", "duts"), ("labels", "duts"),
                       ("shots", "sbu")):
        assert paper_figures(table, key) is None
    text = results_table({"implicit": {"mIoU": (0.2, 0.01)}}, branches)
    assert "| implicit | 20.00 ± 1.00 | 19.40 |" in text
    assert "| explicit (paper only) | – | 30.78 |" in text


def test_modules_are_run_as_such_and_their_failure_is_a_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # the repository is found from anywhere
    tables.run_script("-m common.rivals.peft", "help")
    assert "METHOD=SAMed" in capfd.readouterr().out
    with pytest.raises(UserError, match="^common.rivals.peft stopped; mend what it says above"):
        tables.run_script("-m common.rivals.peft", "METHOD=LoRA")
    assert "set SAMed or MSA" in capfd.readouterr().err


@pytest.fixture
def results(scripts) -> Path:
    """A file of results as stage 4 writes it."""
    for stage in ("02_train_srm.py", "03_train_agent.py"):
        tables.run_script(stage, "TASK=sbu", "SEED=0", "RUN_DIR=.")
    tables.run_script("04_evaluate.py", "TASK=sbu", "SEED=0", "ROWS=all", "RUN_DIR=.",
                      "RESULTS=results.json")
    return Path("results.json")


def test_results_are_read_as_they_were_written(results):
    content = json.loads(results.read_text())
    assert tables.read_results(results, "sbu", ("AlignSAM", "PerSAM")) == content


def aligned(content: dict) -> dict:
    return content["rows"]["AlignSAM"]


def pooled(content: dict) -> dict:
    return aligned(content)["pooled"]


@pytest.mark.parametrize("change, said", [
    (lambda content: aligned(content).update(mIoU=float("nan")), "a figure is not finite"),
    (lambda content: aligned(content).update(mIoU="high"), "TypeError"),
    (lambda content: aligned(content).pop("mIoU"), "KeyError"),
    (lambda content: pooled(content).update(BER=float("inf")), "a figure is not finite"),
    (lambda content: pooled(content).pop("IoU"), "KeyError"),
    (lambda content: content.update(rows=[]), "rows is no dict"),
    (lambda content: content.update(given_masks=5), "AttributeError|training is no dict"),
    (lambda content: content.update(given_masks={"MSA": 5}), "AttributeError|training is no dict"),
    (lambda content: content.update(given_masks={"MSA": {"training": 5}}),
     "AttributeError|training is no dict"),
    (lambda content: content["rows"].pop("AlignSAM"), "lacks the row AlignSAM"),
    (lambda content: content["trained"].pop("srm"), "KeyError: 'srm'"),
    (lambda content: content["trained"].pop("rounds"), "KeyError: 'rounds'"),
    (lambda content: content.update(iou_per_round={}), "KeyError"),
    (lambda content: content["iou_per_round"]["AlignSAM"].pop(),
     "rounds are not as many as it says"),
    (lambda content: content.update(task="duts"), "holds results of duts, not sbu: move it away"),
    (lambda content: content["rows"].pop("PerSAM"),
     "lacks the row PerSAM: delete it and run the same command again"),
])
def test_results_that_do_not_hold_what_the_tables_need_are_named(results, change, said):
    edit(results, change)
    with pytest.raises(UserError, match=f"results.json .*{said}"):
        tables.read_results(results, "sbu", ("AlignSAM", "PerSAM"))


def test_results_from_before_there_were_pooled_metrics_are_outdated(results):
    said = "from before results held pooled IoU and BER: delete it and run the same command again"
    content = json.loads(results.read_text())
    whole = aligned(content).pop("pooled")
    results.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json is {said}"):
        tables.read_results(results, "sbu", ())
    aligned(content).update(pooled=whole, per_class={"car": {"mIoU": 0.5}})
    results.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json is {said}"):
        tables.read_results(results, "sbu", ())


@pytest.mark.parametrize("stored", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_results_that_are_no_json_are_named(results, stored):
    results.write_bytes(stored)
    with pytest.raises(UserError, match="is damaged or was not written by 04_evaluate.py"):
        tables.read_results(results, "sbu", ())


def test_stage_4_prints_the_papers_iou_and_ber_beside_the_means_and_the_pooled_ones(capsys):
    scores = {"mIoU": 0.1, "BER": 0.2, "pooled": {"IoU": 0.3, "BER": 0.4}}
    content = {"task": "sbu", "samples": 1, "images": 1, "sam": "vit_h", "clip": "a/b",
               "rounds": 15, "rows": {"AlignSAM": scores}, "foreground_rate_attainable": 0.5,
               "trained": {"rounds": 15}}
    report = SimpleNamespace(drawing=SimpleNamespace(classes=None))
    Report.print_tables(report, content, {"AlignSAM": {"mIoU": 11.0, "BER": 22.0}})
    assert "| AlignSAM | 10.00 | 11.00 | 20.00 | 22.00 | 30.00 | 11.00 | 40.00 | 22.00 |" in \
        capsys.readouterr().out
