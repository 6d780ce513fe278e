"""The four scripts as a user runs them, on a small data set of their own (TASK=folder)."""

import copy
import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from common.frozen.clip_weights import clip_setup, load_clip
from common.frozen.sam_weights import encoder_fingerprint, load_sam, sam_fingerprint
from common.runtime import checkpoint
from tests.conftest import STAGES, arrays, command, run

# Runs in other folders use the cache of the uninterrupted run.
CACHE = "FEATURES=runs/folder/features.h5"


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def equal(a, b) -> bool:
    """Whether the contents of two checkpoints are equal; how long an episode took may differ."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_weights(one: Path, other: Path) -> bool:
    return equal(load(one), load(other))


def test_a_run_folder_holds_cache_weights_logs_pictures_and_results(workplace):
    names = {path.name for path in (workplace / "runs/folder").iterdir()}
    assert names == {"features.h5", "data.png", "srm.pt", "srm_log.csv", "srm_curves.png",
                     "agent.pt", "agent_log.csv", "agent_curves.png", "results.json", "strips.png",
                     "comparison.png", "report.html"}
    with open(workplace / "runs/folder/agent_log.csv") as file:
        log = list(csv.DictReader(file))
    assert len(log) == 4
    for name in ("return", "foreground_rate", "entropy", "kl", "clip_fraction",
                 "explained_variance", "srm_loss", "srm_accuracy"):
        assert all(np.isfinite(float(row[name])) for row in log), name
    for row in log:  # rewards of +1 and -1 make the return of T = 3 rounds a function of this rate
        rate = float(row["foreground_rate"])
        assert float(row["return"]) == pytest.approx(3 * (2 * rate - 1), abs=1e-4)


def test_a_cache_tells_which_models_made_it(workplace):
    with h5py.File(workplace / "runs/folder/features.h5") as file:
        told = dict(file.attrs)
    sam, (clip, _) = load_sam("demo", "cpu"), load_clip("demo", "cpu")
    assert told["sam_fingerprint"] == sam_fingerprint(sam)
    assert told["encoder_fingerprint"] == encoder_fingerprint(sam)
    assert told["clip_fingerprint"] == checkpoint.fingerprint(clip.state_dict())
    assert told["clip_setup"] == clip_setup(clip)


def test_results_hold_the_four_rows_and_the_iou_of_every_round(workplace):
    results = json.loads((workplace / "runs/folder/results.json").read_text())
    assert {"task", "sam", "clip", "seed", "images", "units", "rows",
            "iou_per_round"} <= results.keys()
    assert results["images"] == 6 and results["task"] == "folder"
    assert list(results["rows"]) == ["AlignSAM", "w/o RL", "w/o SRM", "w/o MSI"]
    for name, row in results["rows"].items():
        assert {"mIoU", "F", "BER", "E", "MAE"} <= row.keys()
        assert ("FR" in row) == (name != "w/o MSI")  # FR is a share of T points; w/o MSI has one
        assert len(results["iou_per_round"][name]) == (2 if name.endswith("MSI") else 4)
    # the same agent and SRM do the same in the first round, however many rounds follow
    full, one_round = (results["iou_per_round"][name] for name in ("AlignSAM", "w/o MSI"))
    assert one_round == pytest.approx(full[:2])


def test_every_row_can_be_evaluated_beside_the_default_ones(workplace):
    done = run(workplace, "04_evaluate.py", "ROWS=all", "RESULTS=all.json", "PICTURES=0",
               "GALLERY=0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((workplace / "runs/folder/all.json").read_text())["rows"]
    before = json.loads((workplace / "runs/folder/results.json").read_text())["rows"]
    (workplace / "runs/folder/all.json").unlink()
    assert {name: rows[name] for name in before} == before
    assert {"labels: CLIP Surgery", "labels: last mask", "oracle labels", "oracle clicks", "PerSAM",
            "SRM alone", "CLIP Surgery alone", "CLIP Surgery points"} <= rows.keys()
    # the agent is hardly trained
    assert rows["oracle clicks"]["mIoU"] > max(row["mIoU"] for row in before.values())


def test_the_strips_show_image_truth_and_the_rounds(workplace):
    sheet = Image.open(workplace / "runs/folder/strips.png")
    # two samples; image, truth, rounds 0, 1 and 2
    assert sheet.size == ((256 + 4) * 5 - 4, 2 * (256 + 18 + 6))
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
    rows = Image.open(workplace / "runs/folder/comparison.png")
    # two samples; image, truth and the four rows
    assert rows.size == ((256 + 4) * 6 - 4, 2 * (256 + 18 + 6))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workplace):
    for run_dir, seed in (("again", 0), ("other", 1)):
        for script in list(STAGES)[1:3]:
            done = run(workplace, script, f"RUN_DIR={run_dir}", CACHE, f"SEED={seed}")
            assert done.returncode == 0, done.stderr
    assert same_weights(workplace / "again/agent.pt", workplace / "runs/folder/agent.pt")
    one, other = (load(workplace / folder / "agent.pt") for folder in ("runs/folder", "other"))
    for part, weight in (("actor", "trunk.0.weight"), ("srm", "join.0.0.weight")):
        assert not torch.equal(one[part][weight], other[part][weight]), part


def kill_and_restart(workplace: Path, script: str, has_begun: Callable[[], bool]) -> None:
    """Starts a stage in RUN_DIR=killed, kills it when it has begun, and runs it to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(workplace / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(command(script, "RUN_DIR=killed"), cwd=workplace,
                                   env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    while process.poll() is None and not has_begun():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = run(workplace, script, "RUN_DIR=killed")
    assert done.returncode == 0, done.stderr


def test_every_stage_killed_and_restarted_ends_like_an_undisturbed_run(workplace):
    whole, killed = workplace / "runs/folder", workplace / "killed"

    def some_images_are_done() -> bool:
        path = killed / "features.h5"
        if not path.exists():
            return False
        with h5py.File(path) as file:
            return 2 <= file["done"][:].sum() < len(file["done"])

    kill_and_restart(workplace, "01_cache_features.py", some_images_are_done)
    expected = arrays(whole / "features.h5")
    for name, values in arrays(killed / "features.h5").items():
        assert np.array_equal(values, expected[name]), name

    kill_and_restart(workplace, "02_train_srm.py", (killed / "srm.pt").exists)
    assert same_weights(killed / "srm.pt", whole / "srm.pt")
    kill_and_restart(workplace, "03_train_agent.py", (killed / "agent.pt").exists)
    assert same_weights(killed / "agent.pt", whole / "agent.pt")
    kill_and_restart(workplace, "04_evaluate.py", (killed / "results.json.part").exists)
    for name in ("results.json", "strips.png", "comparison.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (killed / "results.json.part").exists()
    assert not list(killed.glob(".*")), "a temporary file was left behind"


def test_stage_4_takes_over_finished_rows_of_the_same_agent_and_constants_only(workplace):
    folder = workplace / "runs/folder"
    arguments = ["ROWS=AlignSAM,w/o SRM", "RESULTS=again.json", "PICTURES=0", "GALLERY=0"]
    assert run(workplace, "04_evaluate.py", *arguments).returncode == 0
    results = json.loads((folder / "again.json").read_text())
    computed = results["rows"]["AlignSAM"]
    taken_over = 0.123
    stored = {"metrics": {**computed, "mIoU": taken_over}, "pictures": {},
              "iou_per_round": results["iou_per_round"]["AlignSAM"], "iou_per_round_per_class": {}}
    trained = load(folder / "agent.pt")
    made_with = trained["settings"] | {
        "actor": checkpoint.fingerprint(trained["actor"]),
        "trained_srm": checkpoint.fingerprint(trained["srm"]), "evaluation_rounds": 3,
        "evaluation_seed": 0, "sample_actions": False, "batch_size": 2, "pictures": 0, "gallery": 0}
    of_earlier_version = copy.deepcopy(stored)
    del of_earlier_version["metrics"]["pooled"]
    for changed, row, figure in (
            ({}, stored, taken_over), ({"evaluation_rounds": 2}, stored, computed["mIoU"]),
            ({"actor": "0"}, stored, computed["mIoU"]), ({}, of_earlier_version, computed["mIoU"])):
        checkpoint.save(folder / "again.json.part", {
            "settings": made_with | changed, "finished": False, "rows": {"AlignSAM": row}})
        done = run(workplace, "04_evaluate.py", *arguments)
        assert done.returncode == 0, done.stderr
        rows = json.loads((folder / "again.json").read_text())["rows"]
        assert rows["AlignSAM"]["mIoU"] == figure
    (folder / "again.json").unlink()


def test_results_of_another_name_leave_the_first_ones_pictures_as_they_are(workplace):
    folder = workplace / "runs/folder"
    names = ("strips.png", "comparison.png", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    done = run(workplace, "04_evaluate.py", "ROWS=AlignSAM", "ROUNDS=1", "RESULTS=T1.json")
    assert done.returncode == 0
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    for name in before:
        assert (folder / f"T1-{name}").read_bytes() != before[name]
        (folder / f"T1-{name}").unlink()
    (folder / "T1.json").unlink()


@pytest.mark.parametrize("recorded", [True, False])  # whether by a version that knew HEADS
def test_rows_of_the_same_agent_that_would_be_lost_are_named(workplace, recorded):
    there = json.loads((workplace / "runs/folder/results.json").read_text())
    if not recorded:
        del there["trained"]["heads"]
    path = workplace / "runs/folder/kept.json"
    path.write_text(json.dumps(there))
    done = run(workplace, "04_evaluate.py", "ROWS=AlignSAM,w/o RL,PerSAM", "RESULTS=kept.json")
    assert done.returncode == 1
    assert "runs/folder/kept.json also holds w/o SRM, w/o MSI, which would be lost" in done.stderr
    assert json.loads(path.read_text()) == there
    path.unlink()


@pytest.mark.parametrize("change", [
    lambda there: there["trained"].update(seed=7),  # another agent's
    lambda there: there.update(given_masks={"w/o RL": {}}),  # scored again in no time
    lambda there: there.pop("rows")])
def test_other_results_are_replaced_by_fewer_rows(workplace, change):
    there = json.loads((workplace / "runs/folder/results.json").read_text())
    there["rows"] = {row: there["rows"][row] for row in ("AlignSAM", "w/o RL")}
    change(there)
    path = workplace / "runs/folder/other.json"
    path.write_text(json.dumps(there))
    done = run(workplace, "04_evaluate.py", "ROWS=AlignSAM", "RESULTS=other.json", "PICTURES=0",
               "GALLERY=0")
    assert done.returncode == 0, done.stderr
    assert [*json.loads(path.read_text())["rows"]] == ["AlignSAM"]
    path.unlink()


def test_stages_3_and_4_see_the_state_that_stage_2_chose(workplace):
    folder, same = workplace / "runs/residual", ["RUN_DIR=runs/residual", CACHE]
    for script, more in (("02_train_srm.py", ["RESIDUAL=0.5", "EVERY_TEXT=true"]),
                         ("03_train_agent.py", []), ("04_evaluate.py", ["ROWS=AlignSAM"])):
        done = run(workplace, script, *same, *more)
        assert done.returncode == 0, done.stderr
    trained = load(folder / "agent.pt")
    assert trained["settings"]["residual"] == 0.5 and trained["settings"]["every_text"]

    paper, srm = workplace / "runs/paper", load(folder / "srm.pt")
    srm["settings"]["residual"] = 0.0  # the same SRM in the paper's state
    paper.mkdir()
    torch.save(srm, paper / "srm.pt")
    done = run(workplace, "03_train_agent.py", "RUN_DIR=runs/paper", CACHE)
    assert done.returncode == 0, done.stderr
    one, other = (checkpoint.fingerprint(load(place / "agent.pt")["actor"])
                  for place in (folder, paper))
    assert one != other

    with_residual = json.loads((folder / "results.json").read_text())
    trained["settings"]["residual"] = 0.0  # the same networks in the paper's state
    torch.save(trained, folder / "agent.pt")
    assert run(workplace, "04_evaluate.py", *same, "ROWS=AlignSAM").returncode == 0
    without = json.loads((folder / "results.json").read_text())
    assert with_residual["iou_per_round"] != without["iou_per_round"]


@pytest.mark.parametrize("script, arguments, sentence", [
    ("02_train_srm.py", ["RUN_DIR=nowhere"],
     "run 01_cache_features.py TASK=folder RUN_DIR=nowhere first"),
    ("03_train_agent.py", ["RUN_DIR=nowhere", CACHE],
     "run 02_train_srm.py TASK=folder RUN_DIR=nowhere FEATURES=runs/folder/features.h5 first"),
    ("04_evaluate.py", ["RUN_DIR=nowhere", CACHE],
     "run 03_train_agent.py TASK=folder RUN_DIR=nowhere FEATURES=runs/folder/features.h5 first"),
    ("02_train_srm.py", ["STEPS=21"], "STEPS=20, and now it is 21"),
    ("03_train_agent.py", ["GAMMA=0.5"], "GAMMA=0.99, and now it is 0.5"),
    ("01_cache_features.py", ["SEED=3"], "SEED=0"),
    ("01_cache_features.py", ["RUN_DIR=new", "PATCH_SIZE=70"], "PATCH_SIZE=70 does not divide"),
    ("03_train_agent.py", ["RUN_DIR=again2", "EPISODE=5"], "did you mean EPISODES?"),
    ("03_train_agent.py", ["ROUNDS=101"], "ROUNDS=101"),
    ("02_train_srm.py", ["ROUNDS=101", "RUN_DIR=new", CACHE], "ROUNDS=101"),
    ("02_train_srm.py", ["SHOTS=9", "RUN_DIR=new", CACHE], "SHOTS=9 is more than the 8"),
    ("03_train_agent.py", ["SHOTS=4"], "SHOTS=0, and now it is 4"),
    ("04_evaluate.py", ["ROWS=AlignSAM,w/o luck"], "ROWS names 'w/o luck'"),
    ("02_train_srm.py", ["SAM=gone.pth", "RUN_DIR=new", CACHE], "gone.pth does not exist: set SAM"),
    ("03_train_agent.py", ["SAM=gone.pth"], "gone.pth does not exist: set SAM"),
    ("04_evaluate.py", ["SAM=gone.pth"], "gone.pth does not exist: set SAM"),
    ("04_evaluate.py", ["IMAGES=data/test/images", "CLIP=ViT-B-16/gone.pt"],
     "gone.pt does not exist: name in CLIP"),
    ("01_cache_features.py", ["RUN_DIR=new", "CLIP_SIZE=160000"], "CLIP_SIZE=160000 is more than"),
    ("04_evaluate.py", ["IMAGES=nowhere"], "IMAGES=nowhere is no folder"),
    ("02_train_srm.py", ["SEED=-1"], "SEED=-1 must be 0 or more"),
    ("02_train_srm.py", ["STATES=1"], "are no shares"),
    ("02_train_srm.py", ["RESIDUAL=2"], "RESIDUAL=2.0 is no share"),
    ("01_cache_features.py", ["RUN_DIR=new", "SHOTS=1"], "SHOTS=1 is too few"),
    ("02_train_srm.py", ["BRANCH=both", "RUN_DIR=new", CACHE],
     "neither implicit nor explicit"),
    ("02_train_srm.py", ["SHOTS=1", "RUN_DIR=new", CACHE], "SHOTS=1 is too few"),
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
    done = run(workplace, "03_train_agent.py", "RUN_DIR=damaged", CACHE)
    assert done.returncode == 1 and "damaged/srm.pt is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unfinished_stage_is_not_taken_for_a_finished_one(workplace):
    folder = workplace / "unfinished"
    folder.mkdir()
    content = load(workplace / "runs/folder/srm.pt")
    torch.save(content | {"finished": False}, folder / "srm.pt")
    done = run(workplace, "03_train_agent.py", "RUN_DIR=unfinished", CACHE)
    assert done.returncode == 1 and "unfinished run: run 02_train_srm.py" in done.stderr


def test_an_srm_trained_again_makes_the_agent_that_grew_from_the_former_one_void(workplace):
    folder = workplace / "retrained"
    folder.mkdir()
    (folder / "agent.pt").write_bytes((workplace / "runs/folder/agent.pt").read_bytes())
    content = load(workplace / "runs/folder/srm.pt")
    name = next(iter(content["srm"]))
    content["srm"][name] = content["srm"][name] + 1
    checkpoint.save(folder / "srm.pt", content)
    done = run(workplace, "04_evaluate.py", "RUN_DIR=retrained", CACHE)
    assert done.returncode == 1
    assert "agent.pt was made from another srm file" in done.stderr, done.stderr
    assert not (folder / "results.json").exists()
