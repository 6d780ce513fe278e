"""The paper's tables: which runs they need, and what they say of them."""

import json
import re
from pathlib import Path

import pytest

from common.results import tables
from common.results.paper import paper_figures, results_table
from common.runtime.errors import UserError


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Stands in for the numbered scripts: keeps the commands, and writes results that depend on seed and constants."""
    monkeypatch.chdir(tmp_path)
    commands, trained = [], {}

    def run_script(script, *constants):
        given = dict(constant.split("=", 1) for constant in constants)
        commands.append((script[:2], given))
        folder = Path(given.get("RUN_DIR", "runs/demo_saliency"))
        folder.mkdir(parents=True, exist_ok=True)
        if script.startswith("02"):
            (folder / "srm.pt").write_text(given["SEED"])
            trained.pop(folder, None)
        if script.startswith(("02", "03")):
            trained.setdefault(folder, {"episodes": "50", "rounds": "15", "shots": "0", "residual": "0.0",
                                        "every_text": "false", "branch": "implicit"})
            trained[folder].update({name.lower(): value for name, value in given.items()
                                    if name not in ("RUN_DIR", "FEATURES", "DEVICE")} | {"features": "0a"})
        if script.startswith("04"):
            rows = ["AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", "labels: CLIP Surgery", "labels: last mask", "PerSAM"]
            rows = rows if given["ROWS"] == "all" else given["ROWS"].split(",")
            rounds = int(given.get("ROUNDS", 15))
            score = 0.4 + 0.1 * int(given["SEED"]) + (0.05 if "explicit" in str(folder) else 0)
            row = dict.fromkeys(("mIoU", "F", "BER", "E", "MAE", "FR"), score)
            (folder / given["RESULTS"]).write_text(json.dumps({
                "task": given["TASK"], "sam": "demo", "clip": "demo", "branch": "implicit", "samples": 240,
                "foreground_rate_attainable": 0.4, "trained": trained.get(folder, {}),
                "rounds": rounds, "evaluation_seed": int(given["SEED"]), "sample_actions": False,
                "rows": {name: row for name in rows},
                "iou_per_round": {name: [score + 0.01 * number for number in range(rounds + 1)] for name in rows}}))

    monkeypatch.setattr(tables, "run_script", run_script)
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 50, ("saliency object",)))
    return commands


def test_the_tables_hold_mean_and_deviation_over_seeds_and_nothing_is_run_twice(scripts, monkeypatch, capsys):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    tables.main()
    first = len(scripts)
    stages = [stage for stage, _ in scripts]
    assert stages.count("01") == 1
    assert stages.count("02") == stages.count("03") == 2 * 5  # a seed: main, AlignSAM+, other branch, 5 and 20 shots
    assert stages.count("04") == 2 * 6  # and 20 rounds
    text = Path("runs/demo_saliency/tables.md").read_text()
    assert "| AlignSAM | 45.00 ± 7.07 |" in text  # 0.4 and 0.5, deviation 0.0707
    assert re.search(r"\| explicit \| 50.00 ± 7.07", text)
    assert "0.450 ± 0.071" in text  # MAE stays a fraction
    stored = json.loads(Path("runs/demo_saliency/tables.json").read_text())
    table = stored["tables"]["Table 5: IoU after each round (trained with T = 15)"]
    assert table["AlignSAM"]["20"] == pytest.approx([0.65, 0.0707], abs=1e-4)
    assert Path("runs/demo_saliency/iterations.png").stat().st_size > 1000
    (Path("runs/demo_saliency-seed1") / "results.json").unlink()
    tables.main()
    assert [stage for stage, _ in scripts[first:] if stage != "01"] == ["02", "03", "04"]  # only what was missing


def test_an_experiment_is_a_set_of_constants(scripts, monkeypatch):
    monkeypatch.setattr(tables, "FIGURE7", True)
    tables.main()
    of = {(stage, Path(given.get("RUN_DIR", "")).name, given.get("RESULTS")): given for stage, given in scripts}
    assert of["02", "demo_saliency-seed0-explicit", None]["BRANCH"] == "explicit"
    assert of["02", "demo_saliency-seed0-shots5", None]["SHOTS"] == "5"
    assert of["03", "demo_saliency-seed0-shots5", None]["SHOTS"] == "5"
    assert of["02", "demo_saliency-seed0-plus", None]["RESIDUAL"] == "0.5"
    assert of["04", "demo_saliency-seed0", "T20.json"]["ROUNDS"] == "20"
    assert of["03", "demo_saliency-seed0-episodes100", None]["EPISODES"] == "100"
    assert of["03", "demo_saliency-seed0-rounds5", None]["ROUNDS"] == "5"
    assert of["04", "demo_saliency-seed0-rounds5", "results.json"]["ROUNDS"] == "5"
    assert ("02", "demo_saliency-seed0-rounds5", None) not in of  # its SRM is the main run's
    assert Path("runs/demo_saliency-seed0-rounds5/srm.pt").read_text() == "0"
    assert all(given["FEATURES"] == "runs/demo_saliency/features.h5" for stage, given in scripts if stage != "01")
    assert Path("runs/demo_saliency/figure7_episodes.png").exists()


def test_shots_that_the_cache_does_not_hold_are_left_out(scripts, monkeypatch):
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 12, ("saliency object",)))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("shots",))
    tables.main()
    table = json.loads(Path("runs/demo_saliency/tables.json").read_text())["tables"]["Table 10: labelled images, mIoU"]
    assert list(table["AlignSAM"]) == ["5", "all"]


def test_the_papers_figures_stand_beside_its_models_and_its_question_only(scripts, monkeypatch, capsys):
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
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(zip(("sam", "clip"), models))))
        tables.main()
        text = Path("runs/duts/tables.md").read_text()
        assert ("(paper)" in text) == beside and ("(stand-ins: CLIP)" in text) == ("demo" in models)


def test_results_of_another_cache_or_of_other_constants_are_not_taken_for_these(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main", "branches"))
    tables.main()
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0b", 50, ("saliency object",)))
    with pytest.raises(UserError, match="seed0/results.json comes from a run with another features.h5"):
        tables.main()
    monkeypatch.setattr(tables, "look_into_cache", lambda task: ("0a", 50, ("saliency object",)))
    path = Path("runs/demo_saliency-seed0-explicit/results.json")
    path.write_text(path.read_text().replace('"branch": "explicit"', '"branch": "implicit"'))
    with pytest.raises(UserError, match="explicit/results.json comes from a run with BRANCH=implicit, not explicit"):
        tables.main()


def with_rounds(content: dict, rounds: int) -> None:
    content["rounds"] = rounds
    content["iou_per_round"] = {row: values[:rounds + 1] for row, values in content["iou_per_round"].items()}


@pytest.mark.parametrize("change, said", [
    (lambda content: content["trained"].update(episodes="5"), "EPISODES=5, not 50"),
    (lambda content: with_rounds(content, 5), "ROUNDS=5, not 15"),
    (lambda content: content.update(sample_actions=True), "SAMPLE_ACTIONS=True, not False")])
def test_a_table_is_of_one_recipe(scripts, monkeypatch, change, said):
    monkeypatch.setattr(tables, "SEEDS", (0, 1))
    monkeypatch.setattr(tables, "EXPERIMENTS", ("main",))
    tables.main()
    path = Path("runs/demo_saliency-seed1/results.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"seed1/results.json comes from a run with {said}"):
        tables.main()


def test_20_rounds_that_are_fewer_are_not_taken_for_them(scripts, monkeypatch):
    monkeypatch.setattr(tables, "EXPERIMENTS", ("iterations",))
    tables.main()
    path = Path("runs/demo_saliency-seed0/T20.json")
    content = json.loads(path.read_text())
    with_rounds(content, 15)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="T20.json comes from a run with ROUNDS=15, not 20"):
        tables.main()


def test_real_data_without_a_cache_are_not_guessed_at(scripts, monkeypatch):
    monkeypatch.setattr(tables, "TASK", "duts")
    with pytest.raises(UserError, match="run 01_cache_features.py TASK=duts first"):
        tables.main()
    monkeypatch.setattr(tables, "EXPERIMENTS", ("table 8",))
    with pytest.raises(UserError, match="EXPERIMENTS names 'table 8'"):
        tables.main()


def test_the_papers_figures_stand_beside_the_right_rows():
    assert paper_figures("labels", "voc")["RL + SRM"]["mIoU"] == 62.09
    assert paper_figures("branches", "sbu") == {"implicit": {"mIoU": 19.40}, "explicit": {"mIoU": 30.78}}
    assert paper_figures("shots", "msd")["AlignSAM"] == {"5": 31.19, "20": 38.78}
    assert paper_figures("foreground rate", "duts")["random"]["FR"] == 14.6
    assert paper_figures("iterations", "voc")["sheep"]["20"] == 74.0 and paper_figures("iterations", "duts") is None
    assert paper_figures("shots", "sbu") is None and paper_figures("labels", "duts") is None
    table = results_table({"implicit": {"mIoU": (0.2, 0.01)}}, paper_figures("branches", "sbu"))
    assert "| implicit | 20.00 ± 1.00 | 19.40 |" in table and "| explicit (paper only) | – | 30.78 |" in table


@pytest.fixture
def results(scripts) -> Path:
    """A file of results as stage 4 writes it."""
    tables.run_script("04_evaluate.py", "TASK=sbu", "SEED=0", "ROWS=all", "RUN_DIR=.", "RESULTS=results.json")
    return Path("results.json")


def test_results_are_read_as_they_were_written(results):
    assert tables.read_results(results, "sbu", ("AlignSAM", "PerSAM")) == json.loads(results.read_text())


@pytest.mark.parametrize("change, said", [
    (lambda content: content["rows"]["AlignSAM"].update(mIoU=float("nan")), "a figure is not finite"),
    (lambda content: content["rows"]["AlignSAM"].update(mIoU="high"), "TypeError"),
    (lambda content: content["rows"]["AlignSAM"].pop("mIoU"), "KeyError"),
    (lambda content: content.update(rows=[]), "rows is no dict"),
    (lambda content: content.update(iou_per_round={}), "KeyError"),
    (lambda content: content["iou_per_round"]["AlignSAM"].pop(), "rounds are not as many as it says"),
    (lambda content: content.update(task="duts"), "holds results of duts, not sbu: move it away"),
    (lambda content: content["rows"].pop("PerSAM"), "lacks the row PerSAM: delete it and run the same command again"),
])
def test_results_that_do_not_hold_what_the_tables_need_are_named(results, change, said):
    content = json.loads(results.read_text())
    change(content)
    results.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json .*{said}"):
        tables.read_results(results, "sbu", ("AlignSAM", "PerSAM"))


@pytest.mark.parametrize("stored", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_results_that_are_no_json_are_named(results, stored):
    results.write_bytes(stored)
    with pytest.raises(UserError, match="results.json is damaged or was not written by 04_evaluate.py"):
        tables.read_results(results, "sbu", ())
