"""Masks for images of one's own: a trained run on a folder without ground truth."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.frozen.clip_weights import load_clip
from common.frozen.sam import SamEmbedder
from common.frozen.sam_weights import load_sam, sam_fingerprint
from common.results.own_images import (
    find_images,
    indexed,
    name_files,
    palette,
    segment,
)
from common.runtime import checkpoint
from common.runtime.errors import UserError
from common.standin.scenes import PALETTE, paths, write_scene
from tests.conftest import ROOT, run

CPU = torch.device("cpu")
TINY = {
    "01_cache_features.py": ["SHOTS=12", "BATCH_SIZE=4"],
    "02_train_srm.py": ["STEPS=4", "HELD_OUT=4", "SRM_BATCH=2"],
    "03_train_agent.py": ["EPISODES=1", "EPOCHS=1", "ROUNDS=2", "SRM_BATCH=2", "SRM_STEPS=1"],
    "04_evaluate.py": ["ROUNDS=2", "PICTURES=1", "ROWS=AlignSAM,PerSAM,CLIP Surgery alone"],
}


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    """A small run on several classes, with VOC's layout and ignored pixels.

    The run folder is runs/demo_semantic.
    """
    folder = tmp_path_factory.mktemp("voc")
    lists = folder / "data/VOCdevkit/VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, name, count in (("train", "train", 10), ("test", "val", 4)):
        names = [write_scene(("semantic", split, index, folder / "data")) for index in range(count)]
        (lists / f"{name}.txt").write_text("\n".join(names) + "\n")
        for index in range(count):
            path = folder / "data" / paths("semantic", split, index)[1]
            mask = np.array(Image.open(path))
            mask[:, 100:140] = 255
            ignored = Image.fromarray(mask)
            # all 256 colours, or PNG keeps fewer bits
            ignored.putpalette(PALETTE + [0] * (768 - len(PALETTE)))
            ignored.save(path)
    for script, constants in TINY.items():
        where = ["DATA_DIR=data"] if script[1] == "1" else []
        command = [sys.executable, str(ROOT / script), "TASK=demo_semantic", "DEVICE=cpu",
                   *constants, *where]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


def own_images(folder: Path) -> Path:
    """Five readable pictures of awkward kinds in folder/mine, and one that is broken."""
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (60, 90, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, to be shown standing
    Image.fromarray(pixels).save(mine / "turned.JPG", exif=turned)
    Image.fromarray(pixels[:, :, 0]).save(mine / "grey.png")
    narrow = Image.fromarray(rng.integers(0, 255, (301, 17, 4), np.uint8))
    narrow.save(mine / "narrow.webp", lossless=True)
    Image.fromarray(pixels).convert("P").save(mine / "same.gif")
    Image.fromarray(pixels).save(mine / "same.bmp")
    (mine / "broken.jpg").write_bytes((mine / "turned.JPG").read_bytes()[:500])
    (mine / "notes.txt").write_text("no picture")
    return mine


def stored_lines(out: Path) -> list[dict]:
    """The lines of masks.jsonl."""
    return [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """The workplace with a copy of its run in runs/own, where masks may be written."""
    shutil.copytree(workplace / "runs/folder", workplace / "runs/own")
    return workplace


def test_every_readable_image_gets_a_mask_of_its_own_size_and_a_broken_one_is_named(trained):
    mine = own_images(trained)
    done = run(trained, "04_evaluate.py", f"IMAGES={mine}", "RUN_DIR=runs/own")
    assert done.returncode == 1 and "1 of 6 files could not be read (broken.jpg)" in done.stderr
    assert "Traceback" not in done.stderr
    out = trained / "runs/own/masks"
    lines = {line["image"]: line for line in stored_lines(out)}
    sizes = {"turned.JPG": (60, 90), "grey.png": (90, 60), "narrow.webp": (17, 301),
             "same.gif": (90, 60), "same.bmp": (90, 60)}
    assert lines.keys() == sizes.keys()
    for name, size in sizes.items():
        assert Image.open(out / lines[name]["mask"]).size == size
        assert Image.open(out / "overlays" / lines[name]["mask"]).size == size
        points, labels = np.array(lines[name]["points"]), lines[name]["labels"]
        assert points.shape == (2 + 3, 2)
        assert len(labels) == 5 and labels[:2] == [1, 0]
        assert (points >= 0).all() and (points <= size).all()
        assert isinstance(lines[name]["predicted_iou"], float)
    assert lines["same.gif"]["mask"] != lines["same.bmp"]["mask"]


def test_a_test_image_given_as_ones_own_gets_the_evaluations_prompts(trained):
    done = run(trained, "04_evaluate.py", f"IMAGES={trained / 'data/test/images'}",
               "RUN_DIR=runs/own", "FEATURES=")
    assert done.returncode == 0, done.stderr
    lines = stored_lines(trained / "runs/own/masks")
    assert [line["image"] for line in lines][-6:] == [f"{index}.jpg" for index in range(6)]
    ious = []
    for index in range(6):
        mask = np.asarray(Image.open(trained / f"runs/own/masks/{index}.png")) > 0
        truth = np.asarray(Image.open(trained / f"data/test/masks/{index}.png")) > 127
        ious.append((mask & truth).sum() / max((mask | truth).sum(), 1))
    results = json.loads((trained / "runs/folder/results.json").read_text())
    stored = results["rows"]["AlignSAM"]["mIoU"]
    assert np.mean(ious) == pytest.approx(stored, abs=0.02)  # the cache holds float16


def test_a_run_on_several_classes_evaluates_per_class_and_ignores_what_has_no_truth(voc):
    results = json.loads((voc / "runs/demo_semantic/results.json").read_text())
    assert list(results["rows"]) == ["AlignSAM", "PerSAM", "CLIP Surgery alone"]
    for row in results["rows"].values():
        per_class = [scores["mIoU"] for scores in row["per_class"].values()]
        assert len(per_class) >= 2 and row["mIoU"] == pytest.approx(np.mean(per_class))
    assert "FR" in results["rows"]["AlignSAM"] and "FR" not in results["rows"]["PerSAM"]


def test_several_classes_give_a_mask_each_and_one_indexed_picture(voc):
    mine = voc / "one"
    mine.mkdir(exist_ok=True)
    scene = Image.open(voc / "data" / paths("semantic", "test", 0)[0])
    scene.resize((120, 80)).save(mine / "scene.png")
    command = [sys.executable, str(ROOT / "04_evaluate.py"), "TASK=demo_semantic", "DEVICE=cpu",
               "ROUNDS=2", f"IMAGES={mine}"]
    done = subprocess.run([*command, "CLASSES=ring,ball"], cwd=voc, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = voc / "runs/demo_semantic/masks"
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {
        "masks.jsonl", "scene-ring.png", "overlays/scene-ring.png", "scene-ball.png",
        "overlays/scene-ball.png", "scene-classes.png"}
    classes = Image.open(out / "scene-classes.png")
    assert classes.mode == "P" and classes.size == (120, 80)
    indices = np.asarray(classes)
    ring = np.asarray(Image.open(out / "scene-ring.png")) > 0
    ball = np.asarray(Image.open(out / "scene-ball.png")) > 0
    assert set(np.unique(indices)) <= {0, 2, 6}  # ring is the second text, ball the sixth
    assert np.array_equal(indices > 0, ring | ball) and (indices[ring & ~ball] == 2).all()
    done = subprocess.run([*command, "CLASSES=ring,moon"], cwd=voc, capture_output=True, text=True)
    assert done.returncode == 1 and "CLASSES names 'moon'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def attributes() -> dict:
    """Of a cache that the stand-ins made."""
    sam, (clip, _) = load_sam("demo", CPU), load_clip("demo", CPU)
    return {"sam": "demo", "sam_fingerprint": sam_fingerprint(sam), "clip": "demo",
            "clip_fingerprint": checkpoint.fingerprint(clip.state_dict()), "clip_size": 192,
            "image_size": 800, "precision": "fp32"}


def left_half(embeddings: torch.Tensor, maps: torch.Tensor) -> SimpleNamespace:
    """An episode on one image whose mask is its left half, wherever its two points are."""
    logits = torch.full((1, 96, 96), -5.0)
    logits[:, :, :48] = 5
    return SimpleNamespace(logits=logits, points=torch.tensor([[[200.0, 400.0], [600.0, 400.0]]]),
                           labels=torch.tensor([[1, 0]]), predicted_iou=torch.tensor([0.75]))


def photos(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.full((60, 90, 3), 90, np.uint8)).save(folder / name)
    return str(folder)


def told(out: Path) -> list[tuple[str, str]]:
    """(image, mask) of each line of masks.jsonl."""
    return [(line["image"], line["mask"]) for line in stored_lines(out)]


def segment_dogs(images: str, out: Path, attributes: dict, align=left_half,
                 made_with: dict | None = None) -> None:
    """`segment` for a run that knows one text."""
    segment(images, out, attributes, ("dog",), ("all",), align, None, CPU, made_with or {})


def test_the_mask_is_the_logits_at_the_images_size_and_no_overlay_replaces_it(tmp_path, attributes):
    mine, out = photos(tmp_path / "mine", "photo.png", "photo-overlay.png"), tmp_path / "masks"
    segment_dogs(mine, out, attributes)
    for name in ("photo.png", "photo-overlay.png"):
        mask, drawn = (np.asarray(Image.open(folder / name)) for folder in (out, out / "overlays"))
        assert mask.dtype == np.uint8 and mask.tolist() == [[255] * 45 + [0] * 45] * 60
        # tinted where the mask is
        assert (drawn[:20, :40] != 90).any(2).all() and (drawn[:20, 50:] == 90).all()
    assert stored_lines(out)[1] == {
        "folder": str(tmp_path / "mine"), "image": "photo.png", "text": "dog", "mask": "photo.png",
        "labels": [1, 0], "points": [[22.5, 30.0], [67.5, 30.0]], "predicted_iou": 0.75}


def test_a_mask_of_another_folders_image_of_the_same_name_is_not_replaced(tmp_path, attributes):
    out, one = tmp_path / "masks", photos(tmp_path / "one", "a.png")
    two = photos(tmp_path / "two", "a.jpg", "b.png")
    segment_dogs(one, out, attributes)
    with pytest.raises(UserError, match="masks/a.png is the mask of .*one/a.png, "
                                        "and that of .*two/a.jpg would replace"):
        segment_dogs(two, out, attributes)
    assert told(out) == [("a.png", "a.png")]
    segment_dogs(one, out, attributes)  # its own may be made again
    (out / "a.png").unlink()
    segment_dogs(two, out, attributes)
    assert told(out) == [("a.jpg", "a.png"), ("b.png", "b.png")]


@pytest.mark.parametrize("theirs", ["a.png", "overlays/a.png"])
def test_a_file_of_the_users_is_not_replaced(tmp_path, attributes, theirs):
    out, folder = tmp_path / "masks", photos(tmp_path / "one", "a.png", "b.png")
    (out / "overlays").mkdir(parents=True)
    Image.new("L", (8, 8), 7).save(out / theirs)  # drawn by hand
    before = (out / theirs).read_bytes()
    with pytest.raises(UserError, match="masks/.*a.png was not written by this run, .* of .*a.png"):
        segment_dogs(folder, out, attributes)
    assert (out / theirs).read_bytes() == before and not (out / "b.png").exists()


def test_a_mask_that_the_user_has_drawn_anew_is_not_replaced(tmp_path, attributes):
    out, folder = tmp_path / "masks", photos(tmp_path / "one", "a.png")
    segment_dogs(folder, out, attributes)
    Image.new("L", (8, 8), 7).save(out / "a.png")
    before = (out / "a.png").read_bytes()
    with pytest.raises(UserError, match="masks/a.png was not written by this run"):
        segment_dogs(folder, out, attributes)
    assert (out / "a.png").read_bytes() == before


def test_photographs_that_lie_where_masks_go_are_not_replaced(tmp_path, attributes):
    folder = photos(tmp_path / "masks", "a.png")
    before = (tmp_path / "masks/a.png").read_bytes()
    with pytest.raises(UserError, match="masks/a.png was not written by this run"):
        segment_dogs(folder, tmp_path / "masks", attributes)
    assert (tmp_path / "masks/a.png").read_bytes() == before


def test_a_mask_whose_line_a_kill_left_unwritten_is_made_again(tmp_path, attributes):
    out, folder = tmp_path / "masks", photos(tmp_path / "one", "a.png")
    segment_dogs(folder, out, attributes)
    (out / "masks.jsonl").unlink()
    segment_dogs(folder, out, attributes)
    assert told(out) == [("a.png", "a.png")]


def test_lines_of_another_folder_stay_and_a_stopped_call_keeps_its_own(tmp_path, attributes):
    out, seen = tmp_path / "masks", []

    def stopped(embeddings, maps):
        if seen:
            raise KeyboardInterrupt
        seen.append(embeddings)
        return left_half(embeddings, maps)

    segment_dogs(photos(tmp_path / "one", "a.png"), out, attributes)
    second = photos(tmp_path / "two", "b.png", "c.png")
    with pytest.raises(KeyboardInterrupt):
        segment_dogs(second, out, attributes, stopped)
    assert told(out) == [("a.png", "a.png"), ("b.png", "b.png")]
    (out / "a.png").unlink()
    segment_dogs(second, out, attributes)
    assert told(out) == [("b.png", "b.png"), ("c.png", "c.png")]  # a line lives with its mask


def test_a_stopped_call_goes_on_unless_run_image_or_mask_is_another(tmp_path, attributes):
    out, computed = tmp_path / "masks", []
    mine = photos(tmp_path / "mine", "a.png", "b.png", "c.png")
    (tmp_path / "mine/d.png").write_bytes(b"no picture")

    def count(embeddings, maps):
        computed.append(maps)
        return left_half(embeddings, maps)

    def images_computed(run: dict) -> int:
        computed.clear()
        with pytest.raises(UserError, match="1 of 4 files could not be read .d.png."):
            segment_dogs(mine, out, attributes, count, run)
        assert [image for image, _ in told(out)] == ["a.png", "b.png", "c.png"]
        return len(computed)

    assert images_computed({"seed": 0}) == 3
    lines = (out / "masks.jsonl").read_text()
    (out / "masks.jsonl").unlink()  # a kill comes before it is written
    assert images_computed({"seed": 0}) == 0 and (out / "masks.jsonl").read_text() == lines
    Image.fromarray(np.full((61, 90, 3), 90, np.uint8)).save(Path(mine) / "b.png")
    (out / "c.png").unlink()
    assert images_computed({"seed": 0}) == 2 and Image.open(out / "b.png").size == (90, 61)
    assert images_computed({"seed": 1}) == 3
    (out / "masks.json.part").write_text("damaged")
    assert images_computed({"seed": 1}) == 3
    (tmp_path / "mine/d.png").unlink()
    segment_dogs(mine, out, attributes, count, {"seed": 1})
    assert not (out / "masks.json.part").exists()


def test_a_masks_jsonl_of_something_else_is_not_replaced(tmp_path, attributes):
    out = tmp_path / "masks"
    out.mkdir()
    for content in ("not JSON\n", "[3]\n"):
        (out / "masks.jsonl").write_text(content)
        with pytest.raises(UserError, match="masks.jsonl is not what was written: move it away"):
            segment_dogs(photos(tmp_path / "mine", "a.png"), out, attributes)
        assert (out / "masks.jsonl").read_text() == content


def test_features_that_are_not_finite_stop_with_the_images_name(tmp_path, attributes, monkeypatch):
    embed = SamEmbedder.embed
    monkeypatch.setattr(SamEmbedder, "embed",
                        lambda self, images: embed(self, images) * float("nan"))
    with pytest.raises(UserError, match="SAM's embedding of .*photo.png holds NaN or infinite"):
        segment_dogs(photos(tmp_path / "mine", "photo.png"), tmp_path / "masks", attributes)
    assert not (tmp_path / "masks/photo.png").exists()


def test_an_image_without_room_in_memory_is_named(tmp_path, attributes):
    def too_large(embeddings, maps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    mine = photos(tmp_path / "mine", "photo.png")
    with pytest.raises(UserError, match="out of memory .*DEVICE=cpu, or make .*photo.png smaller"):
        segment_dogs(mine, tmp_path / "masks", attributes, too_large)


def test_images_whose_files_would_have_one_name_are_refused():
    assert name_files([Path("a.jpg"), Path("a.png"), Path("b.png")], []) == {
        Path("a.jpg"): ["a.jpg"], Path("a.png"): ["a.png"], Path("b.png"): ["b"]}
    names = name_files([Path("a.jpg")], ["dog", "big cat"])
    assert names == {Path("a.jpg"): ["a-dog", "a-big-cat"]}
    with pytest.raises(UserError, match="a.bmp and a.bmp.jpg would both be written to a.bmp.png"):
        name_files([Path("a.bmp"), Path("a.bmp.jpg"), Path("a.jpg")], [])
    with pytest.raises(UserError, match="a-dog.jpg and a.jpg would both be written to a-dog-class"):
        name_files([Path("a-dog.jpg"), Path("a.jpg")], ["dog classes", "classes"])


def test_overlapping_masks_yield_to_the_higher_probability():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :, :3], masks[1, :, 1:] = True, True
    y_r = torch.stack([torch.full((2, 2), 0.6), torch.tensor([[0.9, 0.9], [0.1, 0.1]])])
    assert np.asarray(indexed(masks, y_r, [4, 7]))[[0, 3]].tolist() == [[5, 8, 8, 8], [5, 5, 5, 8]]


def test_the_palette_is_vocs():
    assert palette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert palette()[3 * 20:3 * 21] == [0, 64, 128]  # tvmonitor


def test_a_folder_without_images_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="holds no image"):
        find_images(tmp_path)


def test_files_that_are_passed_over_are_said(tmp_path, attributes, capsys):
    folder = photos(tmp_path / "one", "a.png")
    (tmp_path / "one/b.heic").write_bytes(b"HEIC")
    (tmp_path / "one/more").mkdir()
    segment_dogs(folder, tmp_path / "masks", attributes)
    assert "passed over, as no picture that Pillow reads here, or a folder: b.heic, more" in \
        capsys.readouterr().out
