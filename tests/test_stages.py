"""The four scripts as a user runs them, on a small data set of one's own (TASK=folder)."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from common.runtime import checkpoint
from tests.conftest import STAGES, arrays, command, run


def same_weights(one: Path, other: Path) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "seconds")
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b
    return equal(torch.load(one, weights_only=True), torch.load(other, weights_only=True))


def test_a_run_folder_holds_cache_weights_logs_pictures_and_results(workplace):
    names = {path.name for path in (workplace / "runs/folder").iterdir()}
    assert names == {"features.h5", "srm.pt", "srm_log.csv", "srm_curves.png", "agent.pt", "agent_log.csv",
                     "agent_curves.png", "results.json", "strips.png", "comparison.png", "report.html"}
    with open(workplace / "runs/folder/agent_log.csv") as file:
        log = list(csv.DictReader(file))
    assert len(log) == 4
    for name in ("return", "foreground_rate", "entropy", "kl", "clip_fraction", "explained_variance", "srm_loss",
                 "srm_accuracy"):
        assert all(np.isfinite(float(row[name])) for row in log), name
    for row in log:  # +1 and -1 make the return of T = 3 rounds a function of the foreground rate
        assert float(row["return"]) == pytest.approx(3 * (2 * float(row["foreground_rate"]) - 1), abs=1e-4)


def test_results_hold_the_four_rows_and_the_iou_of_every_round(workplace):
    results = json.loads((workplace / "runs/folder/results.json").read_text())
    assert {"task", "sam", "clip", "seed", "images", "units", "rows", "iou_per_round"} <= results.keys()
    assert results["images"] == 6 and results["task"] == "folder"
    assert list(results["rows"]) == ["AlignSAM", "w/o RL", "w/o SRM", "w/o MSI"]
    for name, row in results["rows"].items():
        assert {"mIoU", "F", "BER", "E", "MAE"} <= row.keys()
        assert ("FR" in row) == (name != "w/o MSI")  # a share of T points, and there is one
        assert len(results["iou_per_round"][name]) == (2 if name.endswith("MSI") else 4)
        assert all(0 <= value <= 1 for value in results["iou_per_round"][name])
    # one round of the same agent and SRM is the same prompting, wherever it is stopped
    assert results["iou_per_round"]["w/o MSI"] == pytest.approx(results["iou_per_round"]["AlignSAM"][:2])


def test_every_row_can_be_evaluated_beside_the_default_ones(workplace):
    done = run(workplace, "04_evaluate.py", "ROWS=all", "RESULTS=all.json", "PICTURES=0", "GALLERY=0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((workplace / "runs/folder/all.json").read_text())["rows"]
    before = json.loads((workplace / "runs/folder/results.json").read_text())["rows"]
    (workplace / "runs/folder/all.json").unlink()
    assert {name: rows[name] for name in before} == before
    assert {"labels: CLIP Surgery", "labels: last mask", "oracle labels", "oracle clicks", "PerSAM", "SRM alone",
            "CLIP Surgery alone", "CLIP Surgery points"} <= rows.keys()
    assert all(0 <= row["mIoU"] <= 1 for row in rows.values())
    assert rows["oracle clicks"]["mIoU"] > max(before[name]["mIoU"] for name in before)  # a barely trained agent


def test_the_strips_show_image_truth_and_the_rounds(workplace):
    sheet = Image.open(workplace / "runs/folder/strips.png")
    assert sheet.size == ((256 + 4) * 5 - 4, 2 * (256 + 18 + 6))  # image, truth, rounds 0, 1 and 2; two samples
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
    rows = Image.open(workplace / "runs/folder/comparison.png")
    assert rows.size == ((256 + 4) * 6 - 4, 2 * (256 + 18 + 6))  # image, truth and the four rows; two samples


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workplace):
    for run_dir, seed in (("again", 0), ("other", 1)):
        for script in list(STAGES)[1:3]:
            done = run(workplace, script, f"RUN_DIR={run_dir}", "FEATURES=runs/folder/features.h5", f"SEED={seed}")
            assert done.returncode == 0, done.stderr
    assert same_weights(workplace / "again/agent.pt", workplace / "runs/folder/agent.pt")
    one, other = (torch.load(workplace / folder / "agent.pt", weights_only=True) for folder in ("runs/folder", "other"))
    for part, weight in (("actor", "trunk.0.weight"), ("srm", "join.0.0.weight")):
        assert not torch.equal(one[part][weight], other[part][weight]), part


def killed_and_restarted(workplace: Path, script: str, begun: Path, entries, run_dir: str, *more: str) -> None:
    """Starts a stage, SIGKILLs it once `entries(begun)` says that it is under way, and runs it to its end."""
    more = (f"RUN_DIR={run_dir}", *more)
    with open(workplace / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(command(script, *more), cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.DEVNULL, stderr=stderr)
    while process.poll() is None and not (begun.exists() and entries(begun)):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = run(workplace, script, *more)
    assert done.returncode == 0, done.stderr


def test_every_stage_killed_and_restarted_ends_like_an_undisturbed_run(workplace):
    def some_images_done(path: Path) -> bool:
        with h5py.File(path) as file:
            return 2 <= file["done"][:].sum() < len(file["done"])

    killed = workplace / "killed"
    killed_and_restarted(workplace, "01_cache_features.py", killed / "features.h5", some_images_done, "killed")
    whole = arrays(workplace / "runs/folder/features.h5")
    for name, values in arrays(killed / "features.h5").items():
        assert np.array_equal(values, whole[name]), name

    killed_and_restarted(workplace, "02_train_srm.py", killed / "srm.pt", lambda path: True, "killed")
    assert same_weights(killed / "srm.pt", workplace / "runs/folder/srm.pt")
    killed_and_restarted(workplace, "03_train_agent.py", killed / "agent.pt", lambda path: True, "killed")
    assert same_weights(killed / "agent.pt", workplace / "runs/folder/agent.pt")
    killed_and_restarted(workplace, "04_evaluate.py", killed / "results.json.part", lambda path: True, "killed")
    for name in ("results.json", "strips.png", "comparison.png"):
        assert (killed / name).read_bytes() == (workplace / "runs/folder" / name).read_bytes(), name
    assert not (killed / "results.json.part").exists()
    assert not list(killed.glob(".*")), "a temporary file was left behind"


def test_stage_4_takes_over_finished_rows_of_the_same_agent_and_constants_only(workplace):
    folder = workplace / "runs/folder"
    same = ["ROWS=AlignSAM,w/o SRM", "RESULTS=again.json"]
    assert run(workplace, "04_evaluate.py", *same, "PICTURES=0", "GALLERY=0").returncode == 0
    results = json.loads((folder / "again.json").read_text())
    trained = torch.load(folder / "agent.pt", weights_only=True)
    stored = {"metrics": {**results["rows"]["AlignSAM"], "mIoU": 0.123}, "pictures": {},
              "iou_per_round": results["iou_per_round"]["AlignSAM"], "iou_per_round_per_class": {}}
    constants = {"actor": checkpoint.fingerprint(trained["actor"]),
                 "trained_srm": checkpoint.fingerprint(trained["srm"]), "evaluation_rounds": 3, "evaluation_seed": 0,
                 "sample_actions": False, "batch_size": 2, "pictures": 0, "gallery": 0}
    for changed, figure in (({}, 0.123), ({"evaluation_rounds": 2}, results["rows"]["AlignSAM"]["mIoU"]),
                            ({"actor": "0"}, results["rows"]["AlignSAM"]["mIoU"])):
        checkpoint.save(folder / "again.json.part", {
            "settings": trained["settings"] | constants | changed, "finished": False, "rows": {"AlignSAM": stored}})
        done = run(workplace, "04_evaluate.py", *same, "PICTURES=0", "GALLERY=0")
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "again.json").read_text())["rows"]["AlignSAM"]["mIoU"] == figure
    (folder / "again.json").unlink()


def test_results_of_another_name_leave_the_first_ones_pictures_as_they_are(workplace):
    folder = workplace / "runs/folder"
    before = {name: (folder / name).read_bytes() for name in ("strips.png", "comparison.png", "report.html")}
    assert run(workplace, "04_evaluate.py", "ROWS=AlignSAM", "ROUNDS=1", "RESULTS=T1.json").returncode == 0
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    for name in before:
        assert (folder / f"T1-{name}").read_bytes() != before[name]
        (folder / f"T1-{name}").unlink()
    (folder / "T1.json").unlink()


def test_stages_3_and_4_see_the_state_that_stage_2_chose(workplace):
    folder, same = workplace / "runs/residual", ["RUN_DIR=runs/residual", "FEATURES=runs/folder/features.h5"]
    for script, more in (("02_train_srm.py", ["RESIDUAL=0.5", "EVERY_TEXT=true"]), ("03_train_agent.py", []),
                         ("04_evaluate.py", ["ROWS=AlignSAM"])):
        done = run(workplace, script, *same, *more)
        assert done.returncode == 0, done.stderr
    trained = torch.load(folder / "agent.pt", weights_only=True)
    assert trained["settings"]["residual"] == 0.5 and trained["settings"]["every_text"]
    chosen = json.loads((folder / "results.json").read_text())
    paper, content = workplace / "runs/paper", torch.load(folder / "srm.pt", weights_only=True)
    content["settings"]["residual"] = 0.0  # the same SRM in the paper's state
    paper.mkdir()
    torch.save(content, paper / "srm.pt")
    done = run(workplace, "03_train_agent.py", "RUN_DIR=runs/paper", "FEATURES=runs/folder/features.h5")
    assert done.returncode == 0, done.stderr
    agents = [torch.load(place / "agent.pt", weights_only=True)["actor"] for place in (folder, paper)]
    assert checkpoint.fingerprint(agents[0]) != checkpoint.fingerprint(agents[1])
    trained["settings"]["residual"] = 0.0  # and the same networks
    torch.save(trained, folder / "agent.pt")
    assert run(workplace, "04_evaluate.py", *same, "ROWS=AlignSAM").returncode == 0
    other = json.loads((folder / "results.json").read_text())
    assert chosen["iou_per_round"] != other["iou_per_round"]


@pytest.mark.parametrize("script, arguments, sentence", [
    ("02_train_srm.py", ["RUN_DIR=nowhere"], "run 01_cache_features.py TASK=folder RUN_DIR=nowhere first"),
    ("03_train_agent.py", ["RUN_DIR=nowhere", "FEATURES=runs/folder/features.h5"],
     "run 02_train_srm.py TASK=folder RUN_DIR=nowhere FEATURES=runs/folder/features.h5 first"),
    ("04_evaluate.py", ["RUN_DIR=nowhere", "FEATURES=runs/folder/features.h5"],
     "run 03_train_agent.py TASK=folder RUN_DIR=nowhere FEATURES=runs/folder/features.h5 first"),
    ("02_train_srm.py", ["STEPS=21"], "STEPS=20, and now it is 21"),
    ("03_train_agent.py", ["GAMMA=0.5"], "GAMMA=0.99, and now it is 0.5"),
    ("01_cache_features.py", ["SEED=3"], "SEED=0"),
    ("01_cache_features.py", ["RUN_DIR=new", "SHOTS=11"], "set SHOTS=10 or less"),
    ("01_cache_features.py", ["RUN_DIR=new", "PATCH_SIZE=70"], "PATCH_SIZE=70 does not divide"),
    ("03_train_agent.py", ["RUN_DIR=again2", "EPISODE=5"], "did you mean EPISODES?"),
    ("03_train_agent.py", ["ROUNDS=101"], "ROUNDS=101"),
    ("02_train_srm.py", ["ROUNDS=101", "RUN_DIR=new", "FEATURES=runs/folder/features.h5"], "ROUNDS=101"),
    ("02_train_srm.py", ["SHOTS=9", "RUN_DIR=new", "FEATURES=runs/folder/features.h5"], "SHOTS=9 is more than the 8"),
    ("03_train_agent.py", ["SHOTS=4"], "SHOTS=0, and now it is 4"),
    ("04_evaluate.py", ["ROWS=AlignSAM,w/o luck"], "ROWS names 'w/o luck'"),
    ("04_evaluate.py", ["IMAGES=nowhere"], "IMAGES=nowhere is no folder"),
    ("02_train_srm.py", ["SEED=-1"], "SEED=-1 must be 0 or more"),
    ("02_train_srm.py", ["STATES=1"], "are no shares"),
    ("02_train_srm.py", ["RESIDUAL=2"], "RESIDUAL=2.0 is no share"),
    ("01_cache_features.py", ["RUN_DIR=new", "SHOTS=1"], "SHOTS=1 is too few"),
    ("02_train_srm.py", ["BRANCH=both", "RUN_DIR=new", "FEATURES=runs/folder/features.h5"],
     "neither implicit nor explicit"),
    ("02_train_srm.py", ["SHOTS=1", "RUN_DIR=new", "FEATURES=runs/folder/features.h5"], "SHOTS=1 is too few"),
    ("04_evaluate.py", ["RESULTS=agent.pt"], "RESULTS=agent.pt is no name of a results file"),
])
def test_a_mistake_gets_one_sentence_and_no_traceback(workplace, script, arguments, sentence):
    done = run(workplace, script, *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named(workplace):
    folder = workplace / "damaged"
    folder.mkdir()
    (folder / "srm.pt").write_bytes((workplace / "runs/folder/srm.pt").read_bytes()[:-2000])
    done = run(workplace, "03_train_agent.py", "RUN_DIR=damaged", "FEATURES=runs/folder/features.h5")
    assert done.returncode == 1 and "damaged/srm.pt is damaged" in done.stderr and "Traceback" not in done.stderr


def test_an_unfinished_stage_is_not_taken_for_a_finished_one(workplace):
    folder = workplace / "unfinished"
    folder.mkdir()
    content = torch.load(workplace / "runs/folder/srm.pt", weights_only=True)
    torch.save(content | {"finished": False}, folder / "srm.pt")
    done = run(workplace, "03_train_agent.py", "RUN_DIR=unfinished", "FEATURES=runs/folder/features.h5")
    assert done.returncode == 1 and "unfinished run: run 02_train_srm.py" in done.stderr


def test_an_srm_trained_again_makes_the_agent_that_grew_from_the_former_one_void(workplace):
    folder = workplace / "retrained"
    folder.mkdir()
    (folder / "agent.pt").write_bytes((workplace / "runs/folder/agent.pt").read_bytes())
    content = torch.load(workplace / "runs/folder/srm.pt", weights_only=True)
    name = next(iter(content["srm"]))
    content["srm"][name] = content["srm"][name] + 1
    checkpoint.save(folder / "srm.pt", content)
    done = run(workplace, "04_evaluate.py", "RUN_DIR=retrained", "FEATURES=runs/folder/features.h5")
    assert done.returncode == 1 and "agent.pt was made from another srm file" in done.stderr, done.stderr
    assert not (folder / "results.json").exists()
