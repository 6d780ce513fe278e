"""Rows of other systems, scored from folders of masks (MASKS of stage 4)."""

import json
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.cache import Cache
from common.metrics import summarise
from common.results import own_images
from common.results.given_masks import open_all, split
from common.results.outputs import Drawing, Report
from common.results.paper import paper_row
from common.runtime.errors import UserError
from common.tasks import DEMO_CLASSES
from tests.conftest import load_script, run
from tests.small_data import half, palette_mask, picture, save
from tests.test_distributed import finish, start

NO_PICTURES = SimpleNamespace(draw=lambda *_: {}, in_strips=set(), in_gallery=set(), classes=None)
OWN = ("AlignSAM", "PerSAM")


def cache_of(truths: dict[str, np.ndarray], task: str = "duts",
             texts: tuple[str, ...] = ("thing",)) -> tuple[SimpleNamespace, np.ndarray]:
    """A cache of these images, {name: label map (H, W)}, and its test samples (S, 2)."""
    names, label_maps = list(truths), list(truths.values())

    def label_map(sample):
        return (label_maps[sample[0]] == 1 + sample[1]).astype(np.uint8)

    samples = [(row, text) for row, labels in enumerate(label_maps) for text in range(len(texts))
               if len(texts) == 1 or (labels == 1 + text).any()]
    cache = SimpleNamespace(texts=texts, attrs={"task": task}, label_map=label_map,
                            name=lambda sample: names[sample[0]])
    return cache, np.array(samples)


def scored(folder: Path, cache: SimpleNamespace, samples: np.ndarray) -> dict:
    """The metrics of the row "rival", whose masks are in `folder`."""
    masks, _ = open_all(f"rival:{folder}", OWN, cache, samples)
    scores = masks["rival"].score(range(len(samples)), NO_PICTURES)
    classes = [cache.texts[text] for _, text in samples] if len(cache.texts) > 1 else None
    return summarise(scores, classes, 15)["metrics"]


def small(count: int = 2) -> tuple[SimpleNamespace, np.ndarray]:
    """A cache of images "0", "1", ... of 6 x 8 pixels, whose left halves are foreground."""
    return cache_of({str(number): half(top=1) for number in range(count)})


# ---- what is read

def test_a_truth_fed_back_scores_1_in_every_plain_form(tmp_path):
    forms = [half(), half(top=1), Image.fromarray(half() > 0), half().repeat(3).reshape(6, 8, 3),
             half().astype(np.uint16) * 257, half(top=1).astype(np.uint16),
             Image.fromarray(half()).convert("P"), Image.fromarray(half()).convert("RGBA")]
    for number, mask in enumerate(forms):
        save(tmp_path / f"{number}.png", mask)
    assert Image.open(tmp_path / "2.png").mode == "1" and Image.open(tmp_path / "6.png").mode == "P"
    assert Image.open(tmp_path / "4.png").mode.startswith("I")
    metrics = scored(tmp_path, *small(len(forms)))
    assert (metrics["mIoU"], metrics["BER"], metrics["MAE"]) == (1, 0, 0)
    assert metrics["pooled"] == {"IoU": 1, "BER": 0} and "FR" not in metrics


@pytest.mark.parametrize("mask, iou", [(half(top=0), 0.0), (half(top=1) * 0 + 1, 0.5),
                                       (np.full((6, 8), 255, np.uint8), 0.5)])
def test_an_empty_and_a_full_mask_are_answers_too(tmp_path, mask, iou):
    save(tmp_path / "0.png", mask)
    assert scored(tmp_path, *small(1))["mIoU"] == iou


@pytest.mark.parametrize("mask, said", [
    (half(top=128), "0.png holds the grey levels 0, 128: threshold it as its system does"),
    (np.full((6, 8), 254, np.uint8), "0.png holds the grey levels 254: threshold it"),
    (half() | half(top=1)[:, ::-1], "0.png holds the grey levels 1, 255"),
    (half(width=4).repeat(2, 1) & np.arange(8, dtype=np.uint8), "levels 0, 1, 2, 3: threshold"),
    (np.arange(48, dtype=np.uint8).reshape(6, 8), "levels 0, 1, 2, 3, .* and 38 more: threshold"),
    (palette_mask(half(top=1)), "0.png holds colours, transparency or 16 bits"),
    (np.dstack([picture(value=255), half()]), "0.png holds colours, transparency or 16 bits"),
])
def test_what_is_not_black_and_white_is_refused(tmp_path, mask, said):
    save(tmp_path / "0.png", mask)
    with pytest.raises(UserError, match=said):
        scored(tmp_path, *small(1))


def test_colours_of_16_bits_that_pillow_cuts_to_black_are_refused(tmp_path):
    from tests.test_label_maps import write_png
    write_png(tmp_path / "0.png", 8, 16, 2, [b"\0\1" * 24] * 6)
    assert not np.asarray(Image.open(tmp_path / "0.png")).any()
    with pytest.raises(UserError, match="0.png holds colours, transparency or 16 bits"):
        scored(tmp_path, *small(1))


@pytest.mark.parametrize("size", [(800, 1200), (171, 256), (170, 256)])
def test_a_mask_of_another_size_and_the_images_aspect_is_resized_and_said_once(
        tmp_path, capsys, size):
    cache, samples = cache_of({name: half(400, 600, 1) for name in "abc"})
    save(tmp_path / "a.png", half(400, 600))
    save(tmp_path / "b.png", half(*size))
    save(tmp_path / "c.png", half(*size))
    masks, records = open_all(f"rival:{tmp_path}", OWN, cache, samples)
    assert capsys.readouterr().out == (
        f"rival: 3 masks from {tmp_path}, 2 of them resized to their images (nearest pixel)\n")
    assert records["rival"]["resized"] == 2
    scores = masks["rival"].score(range(3), NO_PICTURES)
    assert [score.metrics["IoU"] for score in scores] == [1, 1, 1]
    assert sum(scores[1].counts) == 400 * 600


@pytest.mark.parametrize("size", [(8, 6), (8, 8), (12, 14), (171, 255), (256, 256)])
def test_a_mask_of_another_aspect_is_refused(tmp_path, size):
    truth = (6, 8) if max(size) < 100 else (400, 600)
    cache, samples = cache_of({"0": half(*truth, 1)})
    save(tmp_path / "0.png", half(*size))
    with pytest.raises(UserError, match=rf"0\.png is {size[1]} x {size[0]}, which does not fit its "
                                        rf"image of {truth[1]} x {truth[0]} \(width x height\)"):
        scored(tmp_path, cache, samples)


def test_every_fault_of_every_row_is_named_before_anything_is_scored(tmp_path):
    cache, samples = small(5)
    for row in ("one", "two"):
        for number in range(5):
            save(tmp_path / row / f"{number}.png", half())
    (tmp_path / "one/1.png").unlink()
    (tmp_path / "one/3.png").unlink()
    (tmp_path / "one/3.png").mkdir()
    (tmp_path / "two/0.png").write_bytes((tmp_path / "two/1.png").read_bytes()[:50])
    save(tmp_path / "two/2.png", half(top=77))
    save(tmp_path / "two/4.png", half(8, 8))
    with pytest.raises(UserError) as error:
        open_all(f"one:{tmp_path / 'one'},two:{tmp_path / 'two'}", OWN, cache, samples)
    faults = str(error.value).split("; ")
    assert len(faults) == 4
    assert faults[0] == f"{tmp_path}/one has no 1.png, 3.png: each test sample needs its mask"
    for fault, said in zip(faults[1:], ("cannot read .*two/0.png", "two/2.png holds the grey",
                                        "two/4.png is 8 x 8")):
        assert re.search(said, fault)


def test_the_first_ten_of_many_faults_are_named_and_the_others_counted(tmp_path):
    for number in range(14):
        save(tmp_path / f"{number}.png", half(top=77))
    with pytest.raises(UserError) as error:
        scored(tmp_path, *small(14))
    assert str(error.value).count("holds the grey") == 10
    assert str(error.value).endswith("; and 4 more")


def test_other_files_are_not_used_and_that_is_said(tmp_path, capsys):
    for name in ("0.png", "1.png", "7.png", "notes.txt", "overlays/0.png"):
        save(tmp_path / name, half(), format="PNG")
    assert scored(tmp_path, *small())["mIoU"] == 1
    assert "; other files, not used: 2 (7.png, notes.txt)\n" in capsys.readouterr().out


def test_a_name_is_found_whichever_form_of_unicode_it_has(tmp_path):
    save(tmp_path / f"{unicodedata.normalize('NFD', 'é.1')}.png", half())
    assert scored(tmp_path, *cache_of({"é.1": half(top=1)}))["mIoU"] == 1


# ---- several texts

LABELS = np.array([[1, 1, 2, 2, 0, 0, 6, 6]] * 6, np.uint8)  # star, ring, ball


def several() -> tuple[SimpleNamespace, np.ndarray]:
    return cache_of({"a": LABELS, "b": np.where(LABELS == 2, 0, LABELS)}, "demo_semantic",
                    DEMO_CLASSES)


def test_masks_of_several_texts_are_named_as_stage_4_names_those_of_images(tmp_path, capsys):
    cache, samples = several()
    names = own_images.name_files([Path("a.jpg"), Path("b.jpg")], [*DEMO_CLASSES, "classes"])
    for image, labels in (("a", LABELS), ("b", LABELS)):
        for text, name in enumerate(names[Path(f"{image}.jpg")][:-1]):
            wrong = text == 5 and image == "b"  # one class of one image is missed
            save(tmp_path / f"{name}.png", (labels == 1 + text) * np.uint8(0 if wrong else 255))
        save(tmp_path / f"{image}.png", palette_mask(0 * labels))  # masks of texts come first
    metrics = scored(tmp_path, cache, samples)
    assert {label: its["mIoU"] for label, its in metrics["per_class"].items()} == {
        "star": 1, "ring": 1, "ball": 0.5}
    assert metrics["mIoU"] == pytest.approx(2.5 / 3)
    said = capsys.readouterr().out
    assert "rival: 5 masks" in said and "; other files, not used: 9 (" in said


@pytest.mark.parametrize("made", [palette_mask, np.asarray])
def test_an_indexed_picture_holds_the_masks_of_all_texts_and_255_is_none(tmp_path, made):
    cache, samples = several()
    save(tmp_path / "a.png", made(LABELS))
    save(tmp_path / "b.png", made(np.where(LABELS == 6, 255, LABELS)))
    per_class = scored(tmp_path, cache, samples)["per_class"]
    assert {label: its["mIoU"] for label, its in per_class.items()} == {
        "star": 1, "ring": 1, "ball": 0.5}


def test_an_indexed_picture_whose_name_ends_like_a_class_is_not_taken_for_its_mask(tmp_path):
    cache, samples = cache_of({"a": LABELS, "a-star": LABELS}, "demo_semantic", DEMO_CLASSES)
    for name in ("a", "a-star"):
        save(tmp_path / f"{name}.png", palette_mask(LABELS))
    assert scored(tmp_path, cache, samples)["mIoU"] == 1


@pytest.mark.parametrize("mask, said", [
    (LABELS + 1, "a.png holds the index 7, but .* has the classes 1 to 6"),
    (picture(), "a.png holds RGB pixels and no palette indices"),
    (LABELS[:, :6], "a.png is 6 x 6, which does not fit its image of 8 x 6"),
])
def test_a_faulty_indexed_picture_is_named_once(tmp_path, mask, said):
    cache, samples = several()
    save(tmp_path / "a.png", mask)
    save(tmp_path / "b.png", palette_mask(LABELS))
    with pytest.raises(UserError, match=said) as error:
        scored(tmp_path, cache, samples)
    assert str(error.value).count("a.png") == 1


def test_missing_masks_of_texts_are_named_with_the_other_way_to_give_them(tmp_path):
    cache, samples = several()
    save(tmp_path / "a-star.png", half())
    with pytest.raises(UserError, match="has no a-ball.png, a-ring.png, b-ball.png, b-star.png: "
                                        "each test sample needs its mask, or each image an indexed "
                                        "picture"):
        scored(tmp_path, cache, samples)


# ---- MASKS

def test_masks_are_rows_with_folders(tmp_path):
    assert split("", OWN) == {}
    (tmp_path / "a:b").mkdir()
    assert split(f" w/ U-Net : {tmp_path} ,b:{tmp_path}/a:b", OWN) == {
        "w/ U-Net": tmp_path, "b": tmp_path / "a:b"}


@pytest.mark.parametrize("given, said", [
    ("SEEM", "MASKS holds 'SEEM', which names no row and folder: write row:folder"),
    ("a:.,", "MASKS holds '', which names no row and folder"),
    (":.", "MASKS holds ':.', which names"), ("SEEM:", "MASKS holds 'SEEM:', which names"),
    ("PerSAM:.", "MASKS names the row PerSAM, and there is another of that name"),
    ("a:.,a:/", "MASKS names the row a, and there is another of that name"),
    ("a|b:.", r"MASKS names the row 'a\|b', which cannot stand in a table"),
    ("a\nb:.", r"MASKS names the row 'a\\nb', which cannot stand in a table"),
    ("a\udcff:.", "which cannot stand in a table"),
    ("a:nowhere", "MASKS names nowhere for a, which is no folder"),
])
def test_masks_that_name_no_row_of_their_own_and_a_folder_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        split(given, OWN)


def test_images_and_masks_are_not_given_together():
    own_images.check("photos", ("all",), "")
    with pytest.raises(UserError, match="MASKS are masks of the test set, and IMAGES have no"):
        own_images.check("photos", ("all",), "SEEM:masks")


def test_a_stopped_call_scores_only_the_rows_again_whose_masks_have_changed(tmp_path):
    cache, samples = small()
    settings = {"task": "duts", "branch": "implicit", "seed": 0, "shots": 0, "rounds": 15,
                "every_text": False, "residual": 0.0, "features": "", "heads": 4,
                "evaluation_rounds": 15}
    for row in ("one", "two"):
        for number in range(2):
            save(tmp_path / row / f"{number}.png", half())
    given = f"one:{tmp_path / 'one'},two:{tmp_path / 'two'}"

    def begin() -> tuple[Report, dict]:
        masks, records = open_all(given, OWN, cache, samples)
        return Report(tmp_path, "r.json", cache, {}, ["PerSAM", "one", "two"], NO_PICTURES,
                      settings, records), masks

    report, masks = begin()
    assert report.take_over_finished_rows("04") == ["PerSAM", "one", "two"]
    for row in ("PerSAM", "one", "two"):
        report.add(row, masks.get(row, masks["one"]).score([0, 1], NO_PICTURES))
    assert begin()[0].take_over_finished_rows("04") == []
    save(tmp_path / "two/1.png", half(top=1))  # the same mask, written otherwise
    assert begin()[0].take_over_finished_rows("04") == []
    save(tmp_path / "two/1.png", half(top=0))
    report, masks = begin()
    assert report.take_over_finished_rows("04") == ["two"]
    report.add("two", masks["two"].score([0, 1], NO_PICTURES))
    assert report.finished["two"]["metrics"]["mIoU"] == 0.5


def test_the_papers_figure_of_that_name_stands_beside_the_row(tmp_path, capsys):
    cache, samples = small()
    for number in range(2):
        save(tmp_path / f"{number}.png", half())
    metrics = scored(tmp_path, cache, samples)
    content = {"task": "sbu", "samples": 2, "images": 2, "sam": "vit_h", "clip": "a/b",
               "rounds": 15, "rows": {"SEEM": metrics, "Mine": metrics},
               "foreground_rate_attainable": 0.5, "trained": {"rounds": 15}}
    report = SimpleNamespace(drawing=NO_PICTURES)
    Report.print_tables(report, content, paper_row("sbu"))
    said = capsys.readouterr().out
    assert "| SEEM | 100.00 | 19.52 | 100.00 | 0.00 | 48.01 |" in said
    assert "| Mine | 100.00 | – | 100.00 | 0.00 | – |" in said
    assert "SEEM (paper only)" not in said and "| Painter (paper only) |" in said


# ---- stage 4

@pytest.fixture
def place(workplace, tmp_path, monkeypatch) -> Path:
    """The current folder: a copy of the run folder of the small data set."""
    shutil.copytree(workplace / "runs/folder", tmp_path / "runs/folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(place: Path, name: str) -> dict:
    return json.loads((place / "runs/folder" / name).read_text())


def test_our_own_masks_fed_back_score_exactly_as_their_row(place, monkeypatch):
    def keep(drawing, row, score, masks, *rest):
        image = drawing.cache.name(drawing.samples[score.number])
        save(place / "ours" / f"{image}.png", masks[-1])
        return draw(drawing, row, score, masks, *rest)

    stage, draw = load_script("04_evaluate.py"), Drawing.draw
    monkeypatch.setattr(Drawing, "draw", keep)
    monkeypatch.setattr(stage.files, "lock", lambda folder: None)  # it lasts as long as a process
    stage.TASK, stage.DEVICE, stage.RESULTS = "folder", "cpu", "ours.json"
    stage.ROWS, stage.ROUNDS, stage.BATCH_SIZE = ("AlignSAM",), 3, 2
    stage.main()
    done = run(place, "04_evaluate.py", "MASKS=ours again:ours", "RESULTS=again.json")
    assert done.returncode == 0, done.stderr
    content = results(place, "again.json")
    assert list(content["rows"]) == ["AlignSAM", "w/o RL", "w/o SRM", "w/o MSI", "ours again"]
    ours = content["rows"]["AlignSAM"]
    del ours["FR"]
    assert 0 < ours["mIoU"] < 1 and content["rows"]["ours again"] == ours
    per_round = content["iou_per_round"]
    assert per_round["ours again"] == per_round["AlignSAM"][-1:]
    assert content["given_masks"]["ours again"]["folder"] == "ours"
    assert "| ours again |" in done.stdout
    sheet = np.asarray(Image.open(place / "runs/folder/again-comparison.png"))
    assert sheet.shape[1] == (256 + 4) * (2 + 5) - 4  # image, truth and five rows
    panels = [sheet[18:274, 260 * column:260 * column + 256] for column in range(7)]
    assert np.array_equal(panels[6], panels[2]) and not np.array_equal(panels[6], panels[0])
    assert '"ours again":{"mIoU":' in (place / "runs/folder/again-report.html").read_text()


def test_masks_alone_are_scored_with_rows_none(place, workplace):
    truth = f"MASKS=truth:{workplace / 'data/test/masks'}"
    done = run(place, "04_evaluate.py", truth, "ROWS=none", "RESULTS=rivals.json")
    assert done.returncode == 0, done.stderr
    assert {row: its["mIoU"] for row, its in results(place, "rivals.json")["rows"].items()} == {
        "truth": 1}
    assert (place / "runs/folder/rivals-comparison.png").exists()
    assert not (place / "runs/folder/rivals-report.html").exists()
    done = run(place, "04_evaluate.py", "ROWS=none")
    assert done.returncode == 1 and "ROWS names 'none'" in done.stderr


@pytest.mark.parametrize("stored, recorded", [
    ('{"training": {"steps": 500}}', {"training": {"steps": 500}}), ('{"training": 5}', {}),
    ('{"masks": []}', {}), ("[]", {}), ("{", {}), ("", {})])
def test_the_record_says_how_masks_were_trained_where_peft_says_so(
        place, workplace, stored, recorded):
    shutil.copytree(workplace / "data/test/masks", place / "rival")
    (place / "rival/masks.json").write_text(stored)
    cache = Cache.open(place / "runs/folder/features.h5", "folder")
    _, records = open_all("rival:rival", OWN, cache, cache.samples("test"))
    digest = records["rival"]["digest"]
    assert records == {"rival": {"folder": "rival", "digest": digest, "resized": 0} | recorded}


def test_faulty_masks_end_stage_4_in_one_sentence_before_it_computes(place, workplace):
    shutil.copytree(workplace / "data/test/masks", place / "rival")
    (place / "rival/3.png").unlink()
    done = run(place, "04_evaluate.py", "MASKS=rival:rival", "RESULTS=r.json")
    assert done.returncode == 1
    assert done.stderr == "error: rival has no 3.png: each test sample needs its mask\n"
    assert not list((place / "runs/folder").glob("r.json*"))


def test_two_processes_score_masks_as_one_does(place, workplace):
    given = ["ROWS=w/o RL", f"MASKS=truth:{workplace / 'data/test/masks'}"]
    done = run(place, "04_evaluate.py", *given, "RESULTS=one.json")
    assert done.returncode == 0, done.stderr
    process = start(place, "04_evaluate.py", *given, "RESULTS=two.json")
    said = finish(process)
    assert process.returncode == 0, said
    for kind in (".json", "-comparison.png"):
        one, two = (place / f"runs/folder/{name}{kind}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert said.count("truth: 6 masks from") == 1
