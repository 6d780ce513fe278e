"""Masks for images of one's own: a trained run on a folder without ground truth."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.frozen.clip_weights import clip_setup, load_clip
from common.frozen.sam import SamEmbedder
from common.frozen.sam_weights import encoder_fingerprint, load_sam, sam_fingerprint
from common.results import own_images as own
from common.results.own_images import (
    choose_texts,
    find_images,
    indexed,
    name_files,
    palette,
    segment,
)
from common.results.pictures import save_picture
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
    assert done.returncode == 1 and "1 of 6 images got no mask (broken.jpg)" in done.stderr
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


@pytest.fixture
def stand_ins() -> dict:
    """Attributes of a cache that the stand-ins made."""
    sam, (clip, _) = load_sam("demo", CPU), load_clip("demo", CPU)
    return {"sam": "demo", "sam_fingerprint": sam_fingerprint(sam), "clip": "demo",
            "clip_fingerprint": checkpoint.fingerprint(clip.state_dict()), "clip_size": 192,
            "image_size": 800, "precision": "fp32",
            "encoder_fingerprint": encoder_fingerprint(sam), "clip_setup": clip_setup(clip)}


@pytest.fixture
def attributes(monkeypatch) -> dict:
    """Of no cache: the models are replaced by ones that see nothing."""
    seen = torch.zeros(1, 8, 24, 24), torch.zeros(1, 1, 24, 24)
    blind = SimpleNamespace(frame=800, see=lambda image: image, compute=lambda images: seen)
    monkeypatch.setattr(own, "load_models", lambda *_: blind)
    return {}


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
    samples = np.zeros((1, 2), int)
    cache = SimpleNamespace(texts=("dog",), samples=lambda split: samples)
    assert out.name == "masks"
    run = SimpleNamespace(folder=out.parent, cache=cache, attributes=attributes, device=CPU)
    made_with = {"shots": 0, "every_text": False} | (made_with or {})
    segment(images, run, ("all",), align, None, made_with)


def test_the_mask_is_the_logits_at_the_images_size_and_no_overlay_replaces_it(tmp_path, stand_ins):
    mine, out = photos(tmp_path / "mine", "photo.png", "photo-overlay.png"), tmp_path / "masks"
    segment_dogs(mine, out, stand_ins)
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
    with pytest.raises(UserError, match="masks/.*a.png was not written by AlignSAM"):
        segment_dogs(folder, out, attributes)
    assert (out / theirs).read_bytes() == before and not (out / "b.png").exists()


def test_a_mask_that_the_user_has_drawn_anew_is_not_replaced(tmp_path, attributes):
    out, folder = tmp_path / "masks", photos(tmp_path / "one", "a.png")
    segment_dogs(folder, out, attributes)
    Image.new("L", (8, 8), 7).save(out / "a.png")
    before = (out / "a.png").read_bytes()
    with pytest.raises(UserError, match="masks/a.png was not written by AlignSAM"):
        segment_dogs(folder, out, attributes)
    assert (out / "a.png").read_bytes() == before


def test_photographs_that_lie_where_masks_go_are_not_replaced(tmp_path, attributes):
    folder = photos(tmp_path / "masks", "a.png")
    before = (tmp_path / "masks/a.png").read_bytes()
    with pytest.raises(UserError, match="masks/a.png was not written by AlignSAM"):
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
        with pytest.raises(UserError, match="1 of 4 images got no mask .d.png."):
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
    (out / "masks.json.part").write_text('{"made_with": "damaged')
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


def test_a_masks_json_part_of_something_else_is_not_replaced(tmp_path, attributes):
    part = tmp_path / "masks/masks.json.part"
    part.parent.mkdir()
    part.write_text("half a download")
    with pytest.raises(UserError, match="masks.json.part was not written by AlignSAM"):
        segment_dogs(photos(tmp_path / "mine", "a.png"), part.parent, attributes)
    assert part.read_text() == "half a download"


def test_one_bad_image_is_named_and_the_others_get_their_masks(
        tmp_path, attributes, monkeypatch, capsys):
    """Too large for the GPU's memory, for the machine's, and a mask that cannot be written."""
    mine, out = photos(tmp_path / "mine", "a.png", "b.png", "c.png", "d.png"), tmp_path / "masks"
    failures = iter([torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])

    def without_room(embeddings, maps):
        for failure in failures:
            raise failure
        return left_half(embeddings, maps)

    def save_all_but_one(picture, path):
        if path.name == "c.png":
            raise OSError(errno.ENAMETOOLONG, "File name too long", str(path))
        save_picture(picture, path)

    with monkeypatch.context() as patched:
        patched.setattr(own, "save_picture", save_all_but_one)
        with pytest.raises(UserError, match="3 of 4 images got no mask .a.png, b.png, c.png."):
            segment_dogs(mine, out, attributes, without_room)
    told_why = capsys.readouterr().err
    assert "no mask of a.png: out of memory at BATCH_SIZE=1: set DEVICE=cpu, or make " in told_why
    assert "no mask of b.png: out of memory" in told_why
    assert re.search("no mask of c.png: .*File name too long: .*masks/c.png", told_why)
    assert told(out) == [("d.png", "d.png")]
    segment_dogs(mine, out, attributes)
    assert len(told(out)) == 4 and not (out / "masks.json.part").exists()


def test_a_kill_may_tear_the_last_lines_and_costs_that_image_alone(tmp_path, attributes):
    out, mine = tmp_path / "masks", photos(tmp_path / "mine", "a.png", "b.png", "c.png")
    computed = []

    def count(embeddings, maps):
        computed.append(maps)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return left_half(embeddings, maps)

    with pytest.raises(KeyboardInterrupt):
        segment_dogs(mine, out, attributes, count)
    assert told(out) == [("a.png", "a.png"), ("b.png", "b.png")]
    for name in ("masks.jsonl", "masks.json.part"):
        (out / name).write_bytes((out / name).read_bytes()[:-9])
    segment_dogs(mine, out, attributes, count)
    assert len(computed) == 5  # b and c
    assert told(out) == [(name, name) for name in ("a.png", "b.png", "c.png")]


def test_an_image_adds_its_own_lines_and_writes_no_others_again(tmp_path, attributes, monkeypatch):
    written = []
    monkeypatch.setattr(own, "write_text", lambda path, text: written.append(text))
    monkeypatch.setattr(own, "append_text", lambda path, text: written.append(text))
    names = [f"{number:02}.png" for number in range(12)]
    segment_dogs(photos(tmp_path / "mine", *names), tmp_path / "masks", attributes)
    mentions = [text.count('"mask": ') for text in written]
    assert mentions == [0, 0] + [1, 1] * 12 + [12]  # begun, an image each, and put in order


def test_a_mask_that_is_made_again_has_one_line_in_the_end(tmp_path, attributes):
    out, mine = tmp_path / "masks", photos(tmp_path / "mine", "a.png", "b.png")
    segment_dogs(mine, out, attributes, made_with={"seed": 0})
    segment_dogs(mine, out, attributes, made_with={"seed": 1})
    assert told(out) == [("a.png", "a.png"), ("b.png", "b.png")]


def test_other_models_than_the_caches_are_refused(tmp_path, stand_ins):
    mine, out = photos(tmp_path / "mine", "photo.png"), tmp_path / "masks"
    for name, said in (("sam_fingerprint", "SAM=demo is not the one that made the cache"),
                       ("encoder_fingerprint", "SAM=demo is not the one that made the cache"),
                       ("clip_fingerprint", "CLIP=demo is not the one that made the cache"),
                       ("clip_setup", "CLIP=demo has the weights .* otherwise .QuickGELU, mean")):
        with pytest.raises(UserError, match=said):
            segment_dogs(mine, out, stand_ins | {name: "0a"})
    older = {name: value for name, value in stand_ins.items()
             if name not in ("encoder_fingerprint", "clip_setup")}
    segment_dogs(mine, out, older)
    assert told(out) == [("photo.png", "photo.png")]


def test_features_that_are_not_finite_are_named(tmp_path, stand_ins, monkeypatch, capsys):
    embed = SamEmbedder.embed
    monkeypatch.setattr(SamEmbedder, "embed",
                        lambda self, images: embed(self, images) * float("nan"))
    with pytest.raises(UserError, match="1 of 1 images got no mask"):
        segment_dogs(photos(tmp_path / "mine", "photo.png"), tmp_path / "masks", stand_ins)
    assert re.search("SAM's embedding of .*photo.png holds NaN", capsys.readouterr().err)
    assert not (tmp_path / "masks/photo.png").exists()


def test_a_full_disk_stops_the_call(tmp_path, attributes, monkeypatch):
    def full(picture, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(own, "save_picture", full)
    with pytest.raises(OSError, match="No space left"):
        segment_dogs(photos(tmp_path / "mine", "a.png"), tmp_path / "masks", attributes)


@pytest.mark.parametrize("letter", ["a", "é", "猫"])
def test_names_as_long_as_a_file_system_takes_are_cut_and_stay_apart(tmp_path, letter, attributes):
    size = len(letter.encode())
    alike = [letter * ((251 - len(end)) // size) + end for end in ("1", "2")]
    mine, out = photos(tmp_path / "mine", *(f"{name}.png" for name in alike)), tmp_path / "masks"
    segment_dogs(mine, out, attributes)
    assert [image for image, _ in told(out)] == [f"{name}.png" for name in alike]
    names = name_files([Path(f"{name}.png") for name in alike], ["dog", "big cat"])
    stems = [stem for stems in names.values() for stem in stems]
    assert len(set(stems)) == 4 and all(len(f"{stem}.png".encode()) <= 255 for stem in stems)
    assert all(stem.endswith(("-dog", "-big-cat")) and stem[:50] == alike[0][:50] for stem in stems)


def test_subfolders_are_read_and_masks_lie_as_their_images_do(tmp_path, attributes):
    mine = Path(photos(tmp_path / "mine", "a.png"))
    for folder in ("one", "one/two", ".hidden"):
        photos(mine / folder, "a.png")
    run_folder = mine / "runs/dogs"
    photos(run_folder.parent, "b.png")
    segment_dogs(str(mine), run_folder / "masks", attributes)
    segment_dogs(str(mine), run_folder / "masks", attributes)  # and not its own masks
    images = ["a.png", "one/a.png", "one/two/a.png", "runs/b.png"]
    assert told(run_folder / "masks") == [(image, image) for image in images]
    for image in images:
        assert (run_folder / "masks" / image).exists()
        assert (run_folder / "masks/overlays" / image).exists()


def test_an_image_in_a_subfolder_called_overlays_does_not_replace_an_overlay():
    with pytest.raises(UserError, match="a.jpg and overlays/a.jpg would both be written to overl"):
        name_files([Path("a.jpg"), Path("overlays/a.jpg")], [])


def test_the_first_frame_is_used_and_that_is_said(tmp_path, attributes, capsys):
    mine, out = photos(tmp_path / "mine", "one.png"), tmp_path / "masks"
    frames = [Image.new("RGB", (90, 60), (shade, 0, 0)) for shade in (250, 10)]
    for name in ("pages.tif", "film.gif"):
        frames[0].save(tmp_path / "mine" / name, save_all=True, append_images=frames[1:])
    segment_dogs(mine, out, attributes)
    assert "the first of several frames or pages was used of film.gif, pages.tif" in \
        capsys.readouterr().out
    assert np.asarray(Image.open(out / "overlays/film.png"))[5, 80, 0] == 250


def test_the_texts_that_no_training_sample_shows_are_not_looked_for_unless_named(capsys):
    present = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], bool)
    cache = SimpleNamespace(texts=("ring", "ball", "star", "leaf"),
                            present=lambda rows: present[rows],
                            samples=lambda split: np.array([[0, 0], [1, 1]]))
    seen = {"shots": 1, "every_text": False}
    assert choose_texts(("all",), cache, seen) == ["ring"]
    assert "no training sample shows them: ball, star, leaf" in capsys.readouterr().out
    assert choose_texts(("all",), cache, seen | {"shots": 0}) == ["ring", "ball"]
    assert choose_texts(("all",), cache, seen | {"every_text": True}) == ["ring", "star"]
    assert choose_texts(("leaf", "ring"), cache, seen) == ["leaf", "ring"]


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
        find_images(tmp_path / "nowhere", tmp_path / "masks")
    (tmp_path / "features.h5").write_text("which Pillow names and does not read")
    with pytest.raises(UserError, match="holds no image"):
        find_images(tmp_path, tmp_path / "masks")


def test_what_is_passed_over_is_counted_and_named_with_the_reason(
        tmp_path, attributes, capsys, monkeypatch):
    folder = photos(tmp_path / "one", "a.png")
    (tmp_path / "one/b.HEIC").write_bytes(b"HEIC")
    (tmp_path / "one/more").mkdir()
    (tmp_path / "one/more/notes.txt").write_text("")
    (tmp_path / "one/link").symlink_to(tmp_path / "one/more")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    segment_dogs(folder, tmp_path / "masks", attributes)
    printed = capsys.readouterr().out
    assert "wrote masks of 1 images" in printed
    assert "passed over 1, which need another package (pip install pillow-heif): b.HEIC" in printed
    assert "passed over 1, which are no pictures that Pillow reads: more/notes.txt" in printed
    assert "passed over 1, which are links to folders: link" in printed


def test_pillow_heif_is_used_where_it_is_installed(tmp_path, monkeypatch):
    def register():
        Image.register_extension("PNG", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.registered_extensions()))
    photos(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert find_images(tmp_path, tmp_path / "masks") == ([Path("a.heic")], {})
