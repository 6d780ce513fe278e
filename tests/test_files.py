"""No file that the project did not write is ever replaced, and that is said before work begins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.datasets import list_samples, read_skip
from common.frozen.clip_weights import load_clip
from common.frozen.sam_weights import load_sam
from common.results import bench, given_masks, tables
from common.results.outputs import check_results_name
from common.results.pictures import plot_curves, save_strips
from common.results.report import write_report
from common.runtime import checkpoint, script
from common.runtime.errors import UserError
from common.runtime.files import require_ours, write_text
from common.standin import scenes
from common.tasks import get_task
from tests.conftest import run
from tests.faults import campaign

LOGS = {"srm_log.csv": [{"step": 10, "loss": 0.5}],
        "agent_log.csv": [{"episode": 1, "return": 2.0, "foreground_rate": 0.5}]}
RESULTS = {"task": "duts", "sam": "vit_h", "clip": "a/b", "rows": {}}
TEXTS = {
    "results.json": json.dumps(RESULTS, indent=1),
    "tables.json": json.dumps({"task": "duts", "models": "SAM vit_h"}, indent=1),
    "bench.json": json.dumps({"device": "CPU, 2 cores", "torch": "2.9"}, indent=1),
    "faults.json": json.dumps({"seed": 0, "seconds": {"killed": 3.0}}, indent=1),
    "masks.jsonl": json.dumps({"folder": "/photos", "image": "a.png"}) + "\n",
    "masks.json.part": json.dumps({"made_with": "{}"}) + "\n",
}
FOREIGN = {".png": b"\x89PNG of someone else", ".csv": b"name,age\nAda,36\n",
           ".json": b'{"name": "Ada"}', ".jsonl": b'{"name": "Ada"}\n', ".md": b"# My notes\n",
           ".html": b"<!DOCTYPE html><title>My page</title>", ".part": b"half a download",
           ".pt": b"weights"}


def write(path: Path) -> None:
    """As the project writes a file of this name."""
    if path.name in TEXTS:
        write_text(path, TEXTS[path.name])
    elif path.name == "tables.md":
        first = {"branch": "implicit", "samples": 3, "trained": {}}
        write_text(path, tables.markdown(first, "SAM demo, CLIP demo (stand-ins)", {}, False))
    elif path.name == "report.html":
        write_report(path, RESULTS, [], [], [])
    elif path.suffix == ".csv":
        checkpoint.write_log(path, LOGS[path.name])
    elif path.name == "srm_curves.png":
        plot_curves(LOGS["srm_log.csv"], path, "SRM")
    elif path.name == "iterations.png":
        tables.plot(path, {"AlignSAM": {0: (0.1, None), 1: (0.2, None)}}, "round", "duts")
    elif path.name == "strips.png":
        save_strips([Image.new("RGB", (8, 8))], path)
    else:
        checkpoint.save(path, {"settings": {}, "finished": False})


@pytest.mark.parametrize("name", [
    *TEXTS, *LOGS, "tables.md", "report.html", "srm_curves.png", "iterations.png", "strips.png",
    "agent.pt", "results.json.part"])
def test_each_writer_replaces_its_own_file_and_no_other(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")  # nothing is lost with it
    write(path)
    write(path)
    assert path.stat().st_size
    path.write_bytes(FOREIGN[path.suffix])
    with pytest.raises(UserError, match=f"{name} was not written by AlignSAM.*move it away"):
        write(path)
    assert path.read_bytes() == FOREIGN[path.suffix] and [*tmp_path.iterdir()] == [path]


def test_a_picture_of_another_program_is_not_ours(tmp_path):
    mark = PngInfo()
    mark.add_text("Software", "Matplotlib version 3.9")
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=mark)
    with pytest.raises(UserError, match="a.png was not written by AlignSAM"):
        require_ours(tmp_path / "a.png")


@pytest.mark.parametrize("read", [
    lambda path: script.run_dir(path, "duts"), lambda path: script.cache_path(path, Path(".")),
    read_skip, lambda path: load_sam(path, torch.device("cpu")),
    lambda path: load_clip(f"ViT-B-16/{path}", torch.device("cpu")),
    lambda path: given_masks.split(f"a:{path}", ()),
    lambda path: list_samples(get_task("msd"), path)])
def test_the_home_folder_of_nobody_is_named(read):
    with pytest.raises(UserError, match=r"~nobody-known/x.* begins with the home folder of a user"):
        read("~nobody-known/x.txt")


def test_a_folder_and_an_unknown_kind_are_not_ours(tmp_path):
    (tmp_path / "results.json").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("results.json", "notes.txt"):
        with pytest.raises(UserError, match=f"{name} was not written by AlignSAM"):
            require_ours(tmp_path / "none.json", tmp_path / name)


@pytest.mark.parametrize(("script", "makes", "theirs"), [
    ("02_train_srm.py", "srm.pt", "srm_log.csv"), ("02_train_srm.py", "srm.pt", "srm_curves.png"),
    ("03_train_agent.py", "agent.pt", "agent_log.csv"),
    ("03_train_agent.py", "agent.pt", "agent_curves.png"),
    ("04_evaluate.py", "results.json", "strips.png"),
    ("04_evaluate.py", "results.json", "comparison.png"),
    ("04_evaluate.py", "results.json", "report.html"),
    ("04_evaluate.py", "strips.png", "results.json")])
def test_a_stage_refuses_before_it_works(workplace, tmp_path, script, makes, theirs):
    folder = tmp_path / "run"
    shutil.copytree(workplace / "runs/folder", folder)
    (folder / makes).unlink()
    (folder / theirs).write_bytes(FOREIGN[Path(theirs).suffix])
    done = run(workplace, script, f"RUN_DIR={folder}")
    assert done.returncode == 1 and f"{theirs} was not written by AlignSAM" in done.stderr
    assert (folder / theirs).read_bytes() == FOREIGN[Path(theirs).suffix]
    assert not (folder / makes).exists() and not (folder / "results.json.part").exists()


def test_stage_4_without_pictures_does_not_ask_for_their_places(workplace, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workplace / "runs/folder", folder)
    (folder / "results.json").unlink()
    for name in ("strips.png", "comparison.png", "report.html"):
        (folder / name).write_bytes(b"theirs")
    done = run(workplace, "04_evaluate.py", f"RUN_DIR={folder}", "PICTURES=0", "GALLERY=0",
               "ROWS=SRM alone")
    assert done.returncode == 0, done.stderr
    assert (folder / "strips.png").read_bytes() == b"theirs"


def test_a_results_file_whose_pictures_would_have_too_long_names_is_refused():
    check_results_name("é" * 97 + ".json")
    for name in ("é" * 98 + ".json", "results.csv", "../results.json"):
        with pytest.raises(UserError, match="is no name of a results file"):
            check_results_name(name)


@pytest.mark.parametrize("theirs", ["tables.md", "tables.json", "iterations.png"])
def test_the_tables_refuse_before_the_first_training(tmp_path, monkeypatch, theirs):
    out = tmp_path / "runs/demo_blur"
    out.mkdir(parents=True)
    (out / theirs).write_bytes(FOREIGN[Path(theirs).suffix])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "TASK", "demo_blur")
    monkeypatch.setattr(tables, "run_script", lambda *_: None)
    with pytest.raises(UserError, match=f"{theirs} was not written by AlignSAM"):
        tables.main()


@pytest.mark.parametrize("program", [bench, campaign])
def test_programs_with_an_out_refuse_before_they_measure(tmp_path, monkeypatch, program):
    monkeypatch.setattr(program, "OUT", str(tmp_path / "notes.json"))
    (tmp_path / "notes.json").write_bytes(FOREIGN[".json"])
    monkeypatch.setattr(bench, "build_sam", None)
    monkeypatch.setattr(campaign, "run_parts", None)
    with pytest.raises(UserError, match="notes.json was not written by AlignSAM"):
        program.main()


@pytest.mark.parametrize("theirs", ["DUTS-TR/DUTS-TR-Image/tr0000.jpg",
                                    "DUTS-TE/DUTS-TE-Mask/te0000.png"])
def test_drawn_scenes_replace_nothing_that_is_no_scene(tmp_path, theirs):
    path = tmp_path / theirs
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a photograph")
    split = "train" if "TR" in theirs else "test"
    with pytest.raises(UserError, match=f"{path.name} is there already and is not what"):
        scenes.write_scene(("saliency", split, 0, tmp_path))
    assert path.read_bytes() == b"a photograph"
    path.unlink()
    scenes.write_scene(("saliency", split, 0, tmp_path))
    drawn = path.read_bytes()
    scenes.write_scene(("saliency", split, 0, tmp_path))  # as after a kill
    assert path.read_bytes() == drawn
