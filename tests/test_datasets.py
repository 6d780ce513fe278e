"""Every layout in miniature, and the draw of the training samples."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets import draw_shots, left_out, list_samples, read_skip
from common.images import load_image
from common.label_maps import load_label_map
from common.runtime.errors import UserError
from common.standin import scenes
from common.tasks import TASKS, get_task, with_prompt
from tests.small_data import (
    LAYOUTS,
    VOC,
    half,
    label_map_of,
    make,
    make_voc,
    pair,
    palette_mask,
    picture,
    save,
    task_of,
)


def make_cuhk(root, count):
    """A CUHK with `count` out-of-focus samples, and two pictures of the motion blur task."""
    for index in range(1, count + 1):
        pair(root / "image", root / "gt", f"out_of_focus{index:04d}")
    pair(root / "image", root / "gt", "motion0001")
    save(root / "image" / "motion0002.jpg", picture())  # it has no mask, and that is no error
    return root


def names(samples, split):
    return [sample.name for sample in samples if sample.split == split]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_two_splits_are_found_in_their_authors_folders(tmp_path, name):
    samples = list_samples(task_of(name), make(tmp_path, name))
    assert [(s.split, s.name) for s in samples] == [
        ("train", "train_a"), ("train", "train_b"), ("test", "test_a"), ("test", "test_b")]
    _, images, masks = LAYOUTS[name][0]
    assert samples[0].image == tmp_path / images / "train_a.jpg"
    assert samples[0].mask == tmp_path / masks / "train_a.png"
    assert label_map_of(samples[0], name).tolist() == half(top=1).tolist()


def test_cuhk_tests_on_the_hundred_images_of_the_literature(tmp_path, monkeypatch, capsys):
    # empty files will do, since listing opens no picture
    monkeypatch.setattr(Image.Image, "save", lambda self, path: path.touch())
    samples = list_samples(get_task("cuhk"), make_cuhk(tmp_path, 704))
    tested, stems = names(samples, "test"), names(samples, "train")
    assert len(tested) == 100 and len(stems) == 604 and not set(tested) & set(stems)
    assert {"out_of_focus0037", "out_of_focus0117", "out_of_focus0126"} < set(tested)
    assert sum(name > "out_of_focus0604" for name in tested) == 20
    assert "100 test images (those that the literature tests on" in capsys.readouterr().out


@pytest.mark.parametrize("count, tested", [(703, 100), (20, 3), (4, 1)])
def test_a_part_of_cuhk_is_tested_on_its_last_seventh(tmp_path, monkeypatch, capsys, count, tested):
    monkeypatch.setattr(Image.Image, "save", lambda self, path: path.touch())
    make_cuhk(tmp_path, 704 if count == 703 else count)
    if count == 703:  # one of the literature's is missing
        (tmp_path / "image/out_of_focus0037.jpg").unlink()
        (tmp_path / "gt/out_of_focus0037.png").unlink()
    samples = list_samples(get_task("cuhk"), tmp_path)
    whole = sorted(sample.name for sample in samples)
    assert names(samples, "train") == whole[:-tested]
    assert names(samples, "test") == whole[-tested:]
    assert "not all here" in capsys.readouterr().out


def test_a_copy_of_cuhk_with_other_names_is_told_so(tmp_path):
    pair(tmp_path / "image", tmp_path / "gt", "1")
    with pytest.raises(UserError, match=r"image holds no out_of_focus\*\.jpg.* TASK=folder"):
        list_samples(get_task("cuhk"), tmp_path)


def test_a_list_line_with_the_copys_name_before_the_image_is_read(tmp_path):
    make_cuhk(tmp_path, 4)
    (tmp_path / "test.txt").write_text("1.bmp--out_of_focus0002\n2.bmp--out_of_focus0004.jpg\n")
    samples = list_samples(get_task("cuhk"), tmp_path)
    assert names(samples, "test") == ["out_of_focus0002", "out_of_focus0004"]


def test_a_list_file_overrides_the_test_images_of_cuhk(tmp_path, capsys):
    make_cuhk(tmp_path, 4)
    # as an editor on Windows saves it
    lines = "\ufeffout_of_focus0003\r\n\r\nimage/out_of_focus0001.jpg \r\n"
    (tmp_path / "test.txt").write_bytes(lines.encode())
    samples = list_samples(get_task("cuhk"), tmp_path)
    assert [(s.split, s.name[-4:]) for s in samples] == [
        ("train", "0002"), ("train", "0004"), ("test", "0001"), ("test", "0003")]
    assert "test.txt" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["test.txt", "CUHK/test.txt"])
def test_the_list_file_counts_where_the_data_set_lies_one_folder_too_deep(tmp_path, capsys, place):
    make_cuhk(tmp_path / "CUHK", 4)
    (tmp_path / place).write_text("out_of_focus0003\n")
    samples = list_samples(get_task("cuhk"), tmp_path)
    assert names(samples, "test") == ["out_of_focus0003"]
    assert "named in test.txt" in capsys.readouterr().out


def test_a_name_in_the_list_file_that_is_no_image_is_named(tmp_path):
    make_cuhk(tmp_path, 4)
    # the last line is not UTF-8 either
    (tmp_path / "test.txt").write_bytes(b"out_of_focus0001\nmotion0001\n\xe9\n")
    with pytest.raises(UserError, match=r"test\.txt names motion0001, \ufffd,"):
        list_samples(get_task("cuhk"), tmp_path)


@pytest.mark.parametrize("white", [True, False])
def test_white_or_black_is_blurred_in_cuhk_as_the_task_says(tmp_path, capsys, white):
    task = replace(get_task("cuhk"), white_is_foreground=white)
    first = list_samples(task, make_cuhk(tmp_path, 4))[0]
    colour = "white" if white else "black"
    assert f"{colour} in the masks is taken to be blurred" in capsys.readouterr().out
    expected = half(top=1) if white else 1 - half(top=1)
    assert load_label_map(first, task, (6, 8)).tolist() == expected.tolist()


def test_only_the_names_in_vocs_lists_count(tmp_path):
    samples = list_samples(get_task("voc"), make_voc(tmp_path))
    assert names(samples, "train") == ["a", "c"]
    assert names(samples, "test") == ["b"]


@pytest.mark.parametrize("folder, extension", [("JPEGImages", "jpg"), ("SegmentationClass", "png")])
def test_a_listed_name_without_its_file_is_named(tmp_path, folder, extension):
    make_voc(tmp_path)
    (tmp_path / VOC / folder / f"c.{extension}").unlink()
    with pytest.raises(UserError, match=rf"{folder} has no c:"):
        list_samples(get_task("voc"), tmp_path)


def test_a_name_in_both_of_vocs_lists_is_named(tmp_path):
    with pytest.raises(UserError, match="both name a:"):
        list_samples(get_task("voc"), make_voc(tmp_path, train=("a", "c"), test=("a", "b")))


def test_the_drawn_tasks_use_the_layouts_they_mimic(tmp_path):
    assert len(list_samples(get_task("demo_mirror"), make(tmp_path / "msd", "msd"))) == 4
    assert len(list_samples(get_task("demo_blur"), make_cuhk(tmp_path / "cuhk", 4))) == 4


def test_drawing_that_is_stopped_in_the_middle_of_a_file_goes_on(tmp_path, monkeypatch):
    def half_of_it(path, text):
        path.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "TRAIN_SCENES", 2)
    monkeypatch.setattr(scenes, "TEST_SCENES", 1)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("pathlib.Path.write_text", half_of_it)
        scenes.write_dataset("saliency", tmp_path)
    assert not (tmp_path / "scenes.txt").exists()
    scenes.write_dataset("saliency", tmp_path)
    assert len(list_samples(get_task("demo_saliency"), tmp_path)) == 3
    marked = (tmp_path / "scenes.txt").stat().st_mtime_ns
    scenes.write_dataset("saliency", tmp_path)
    assert (tmp_path / "scenes.txt").stat().st_mtime_ns == marked


def test_a_file_that_two_processes_draw_at_once_is_whole_for_both(tmp_path, monkeypatch):
    path = tmp_path / "data" / "x.txt"

    def meanwhile(temporary):
        """Another process starts and ends while this one writes."""
        def in_another_file(other):
            assert other != temporary
            other.write_text("whole")

        temporary.write_text("whole")
        monkeypatch.setattr("os.getpid", lambda: -1)
        scenes.put(path, in_another_file)
        assert path.read_text() == temporary.read_text() == "whole"

    scenes.put(path, meanwhile)
    assert path.read_text() == "whole" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_data_set_is_told_with_its_folders_and_its_home(tmp_path, task):
    with pytest.raises(UserError) as error:
        list_samples(task, tmp_path / "nowhere")
    if task.dataset == "cuhk":
        expected = ["image", "gt"]
    elif task.dataset == "voc":
        expected = [f"{VOC}/JPEGImages", "Segmentation/train.txt"]
    else:
        expected = [folder for _, *folders in LAYOUTS[task.dataset] for folder in folders]
    assert all(folder in str(error.value) for folder in expected)
    assert "nowhere" in str(error.value)
    assert ("http" in str(error.value)) == (task.paper is not None)


def test_only_the_missing_folders_are_called_missing(tmp_path):
    make(tmp_path, "sbu")
    for file in (tmp_path / "SBU-Test/ShadowMasks").iterdir():
        file.unlink()
    (tmp_path / "SBU-Test/ShadowMasks").rmdir()
    sentence = r"has no SBU-Test/ShadowMasks: get the data set from https://www3\."
    with pytest.raises(UserError, match=sentence):
        list_samples(get_task("sbu"), tmp_path)


def test_a_missing_list_of_voc_is_named(tmp_path):
    make_voc(tmp_path)
    (tmp_path / VOC / "ImageSets/Segmentation/val.txt").unlink()
    sentence = r"has no VOCdevkit/VOC2012/ImageSets/Segmentation/val\.txt:"
    with pytest.raises(UserError, match=sentence):
        list_samples(get_task("voc"), tmp_path)


def test_an_empty_split_is_named(tmp_path):
    make(tmp_path, "duts")
    for file in (tmp_path / "DUTS-TE").rglob("*.*"):
        file.unlink()
    with pytest.raises(UserError, match="no test images"):
        list_samples(get_task("duts"), tmp_path)


@pytest.mark.parametrize("name", ["msd", "cuhk"])
def test_an_image_without_a_mask_is_named(tmp_path, name):
    make_cuhk(tmp_path, 4) if name == "cuhk" else make(tmp_path, name)
    lonely = {"msd": "test/image/lonely.jpg", "cuhk": "image/out_of_focus0009.jpg"}[name]
    save(tmp_path / lonely, picture())
    with pytest.raises(UserError, match=f"has nothing for {(tmp_path / lonely).name}:"):
        list_samples(get_task(name), tmp_path)


@pytest.mark.parametrize("name", ["msd", "cuhk"])
def test_a_mask_without_an_image_is_named(tmp_path, name):
    make_cuhk(tmp_path, 4) if name == "cuhk" else make(tmp_path, name)
    stray = {"msd": "train/mask/stray.png", "cuhk": "gt/out_of_focus0009.png"}[name]
    save(tmp_path / stray, half())
    with pytest.raises(UserError, match=f"has nothing for {(tmp_path / stray).name}:"):
        list_samples(get_task(name), tmp_path)


def test_extensions_count_in_any_case_and_hidden_files_do_not(tmp_path):
    make(tmp_path, "folder")
    images, masks = tmp_path / "train/images", tmp_path / "train/masks"
    for stem, image, mask in (("u", "JPG", "PNG"), ("v", "jpeg", "Png"), ("w", "PNG", "JPG")):
        save(images / f"{stem}.{image}", picture())
        save(masks / f"{stem}.{mask}", half())
    (images / "._u.jpg").write_bytes(b"left by macOS")
    (images / "Thumbs.db").write_bytes(b"left by Windows")
    samples = list_samples(task_of("folder"), tmp_path)
    assert names(samples, "train") == ["train_a", "train_b", "u", "v", "w"]
    assert [load_image(sample.image).shape for sample in samples] == [(6, 8, 3)] * len(samples)


@pytest.mark.parametrize("kind, first, second", [("images", "jpg", "png"), ("masks", "gif", "png")])
def test_all_files_that_share_a_name_are_named_at_once(tmp_path, kind, first, second):
    make(tmp_path, "folder")
    for stem in ("train_a", "train_b"):
        for ending in (first, second):
            save(tmp_path / f"train/{kind}/{stem}.{ending}", half())
    said = rf"train_a\.{first} and train_a\.{second}, train_b\.{first} and train_b\.{second}"
    with pytest.raises(UserError, match=said):
        list_samples(task_of("folder"), tmp_path)


def test_the_papers_tasks_have_the_papers_texts_and_branches():
    told = {task.name: (task.texts, task.branch) for task in TASKS if task.paper}
    classes, branch = told.pop("voc")
    assert told == {"cuhk": (("defocus background",), "implicit"), "sbu": (("shadow",), "explicit"),
                    "msd": (("glass",), "implicit"), "duts": (("saliency object",), "implicit")}
    assert branch == "explicit" and len(classes) == 20
    some = ("aeroplane", "cat", "person", "tvmonitor")
    assert [classes.index(name) + 1 for name in some] == [1, 8, 15, 20]


def test_a_folder_task_takes_its_prompt_as_text():
    task = get_task("folder", " polyp ")
    assert task.texts == ("polyp",)
    assert (task.branch, task.paper) == ("explicit", None)


def test_a_folder_task_without_a_prompt_is_refused():
    with pytest.raises(UserError, match='set PROMPT="dog"'):
        get_task("folder")


def test_a_prompt_replaces_the_text_of_a_task_that_has_one_and_is_refused_by_one_of_several():
    assert with_prompt(get_task("msd"), " mirror ") == replace(get_task("msd"), texts=("mirror",))
    assert with_prompt(get_task("voc"), "") == get_task("voc")
    with pytest.raises(UserError, match='PROMPT="dog" cannot stand for the 20 texts of voc'):
        with_prompt(get_task("voc"), "dog")


def test_an_unknown_task_is_answered_with_those_there_are():
    with pytest.raises(UserError, match=r"cuhk, sbu, msd, duts, voc, demo_blur, .*, folder"):
        get_task("coco")


def folder_of(root, count, **masks):
    """The samples of a folder data set of `count` training images, and the task.

    masks: masks for some of the images, by their names.
    """
    for index in range(count):
        save(root / "train" / "images" / f"i{index}.jpg", picture())
        save(root / "train" / "masks" / f"i{index}.png", masks.get(f"i{index}", half()))
    pair(root / "test" / "images", root / "test" / "masks", "t")
    task = task_of("folder")
    return list_samples(task, root), task


def test_shots_are_distinct_training_images_and_a_smaller_draw_is_the_start_of_a_larger(tmp_path):
    samples, task = folder_of(tmp_path, 12)
    ten = draw_shots(samples, task, 10, seed=0)
    assert len({sample.name for sample, _ in ten}) == 10
    assert all(sample.split == "train" for sample, _ in ten)
    assert ten[:4] == draw_shots(samples, task, 4, seed=0)
    assert ten != draw_shots(samples, task, 10, seed=1)


def test_empty_and_full_masks_are_named_and_passed_over(tmp_path, capsys):
    full = np.full((6, 8), 255, np.uint8)
    samples, task = folder_of(tmp_path, 4, i1=full, i3=full * 0)
    assert {sample.name for sample, _ in draw_shots(samples, task, 2, 0)} == {"i0", "i2"}
    drawn = capsys.readouterr().out
    with pytest.raises(UserError, match="SHOTS=3 .* set SHOTS=2 or less"):
        draw_shots(samples, get_task("msd"), 3, 0)
    drawn += capsys.readouterr().out
    masks = tmp_path / "train/masks"
    (masks / "i0.png").write_bytes((masks / "i1.png").read_bytes())
    with pytest.raises(UserError, match="has 1 that can train: add training images"):
        draw_shots(samples, task, 2, 0)
    assert "i1.png is full" in drawn and "i3.png is empty" in drawn


def test_a_folder_with_fewer_samples_than_shots_gives_all_it_has_and_says_so(tmp_path, capsys):
    samples, task = folder_of(tmp_path, 4)
    assert len(draw_shots(samples, task, 50, 0)) == 4
    assert "SHOTS=50: all 4 samples that can train are taken" in capsys.readouterr().out


@pytest.mark.parametrize(("pairs", "tested"), [(4, 2), (12, 2), (50, 10), (600, 100)])
def test_a_folder_without_test_images_holds_some_out(tmp_path, capsys, pairs, tested):
    for index in range(pairs):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / kind / f"i{index}.png").touch()
    samples = list_samples(task_of("folder"), tmp_path)
    assert len(names(samples, "test")) == tested and len(names(samples, "train")) == pairs - tested
    assert len(set(names(samples, "test")) | set(names(samples, "train"))) == pairs
    assert samples == list_samples(task_of("folder"), tmp_path)
    for kind in ("images", "masks"):  # a new sample leaves all but one where they are
        (tmp_path / "train" / kind / "new.png").touch()
    before, after = set(names(samples, "test")), list_samples(task_of("folder"), tmp_path)
    assert len(before ^ set(names(after, "test"))) <= 2
    said = capsys.readouterr().out
    assert f"{tested} of {pairs} samples are held out to test on: " in said
    assert names(samples, "test")[0] in said
    assert ("tells little" in said) == (pairs < 10)


def test_what_is_held_out_does_not_follow_the_order_of_the_names(tmp_path):
    for index in range(50):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / kind / f"i{index:02}.png").touch()
    held_out = names(list_samples(task_of("folder"), tmp_path), "test")
    first, last = held_out[0], held_out[-1]
    assert first < "i10" < "i40" < last and len(held_out) == 10


def test_a_name_that_is_not_utf_8_may_be_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("common.datasets.print", lambda *_: None, raising=False)
    for index in range(4):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / kind / os.fsdecode(b"caf\xe9%d.png" % index)).touch()
    assert len(names(list_samples(task_of("folder"), tmp_path), "test")) == 2


def test_a_file_in_the_place_of_the_data_folder_is_called_a_file(tmp_path):
    (tmp_path / "data.tar").touch()
    with pytest.raises(UserError, match=r"data\.tar is a file, not a folder, and should hold"):
        list_samples(get_task("duts"), tmp_path / "data.tar")


def test_the_first_list_of_cuhks_test_images_counts(tmp_path):
    make_cuhk(tmp_path / "CUHK", 4)
    (tmp_path / "test.txt").write_text("out_of_focus0003\n")
    (tmp_path / "CUHK/test.txt").write_text("out_of_focus0001\n")
    assert names(list_samples(get_task("cuhk"), tmp_path), "test") == ["out_of_focus0003"]


def test_a_listed_test_image_of_cuhk_that_is_skipped_may_be_gone(tmp_path):
    make_cuhk(tmp_path, 4)
    (tmp_path / "test.txt").write_text("out_of_focus0003\nout_of_focus0009\n")
    samples = list_samples(get_task("cuhk"), tmp_path, ["out_of_focus0009"])
    assert names(samples, "test") == ["out_of_focus0003"]


def test_a_line_that_stands_twice_in_vocs_list_is_one_sample(tmp_path):
    make_voc(tmp_path, train=("c", "a", "c"))
    assert sorted(names(list_samples(get_task("voc"), tmp_path), "train")) == ["a", "c"]


def test_which_class_is_drawn_first_depends_on_the_seed(tmp_path):
    make_voc(tmp_path)
    samples = list_samples(get_task("voc"), tmp_path)
    assert len({draw_shots(samples, get_task("voc"), 2, seed)[0][1] for seed in range(8)}) > 1


def test_an_image_that_is_nothing_but_one_class_is_not_drawn(tmp_path):
    make_voc(tmp_path, train=("a", "b1", "c"))
    save(tmp_path / VOC / "SegmentationClass/b1.png", palette_mask([[1, 1, 1, 255]] * 2))
    samples = list_samples(get_task("voc"), tmp_path)
    drawn = draw_shots(samples, get_task("voc"), 6, 0)
    assert {sample.name for sample, _ in drawn} == {"a", "c"}


def test_files_that_share_a_name_may_be_skipped(tmp_path):
    make(tmp_path, "msd")
    save(tmp_path / "train/image/train_a.png", picture())
    list_samples(get_task("msd"), tmp_path, ["train_a"])
    with pytest.raises(UserError, match="share a name"):
        list_samples(get_task("msd"), tmp_path)


@pytest.mark.parametrize("pairs", [1, 3])
def test_too_few_to_hold_some_out_is_said_with_their_number(tmp_path, pairs):
    for index in range(pairs):
        pair(tmp_path / "train" / "images", tmp_path / "train" / "masks", f"i{index}")
    with pytest.raises(UserError, match=f"holds {pairs} images with masks, and 4 at least"):
        list_samples(task_of("folder"), tmp_path)


def test_a_test_folder_that_lacks_its_masks_is_not_held_out_for(tmp_path):
    folder_of(tmp_path, 12)
    (tmp_path / "test" / "masks").rename(tmp_path / "test" / "others")
    with pytest.raises(UserError, match="has no test/masks"):
        list_samples(task_of("folder"), tmp_path)


@pytest.mark.parametrize("broken", ["images/i1.jpg", "masks/i1.png"])
@pytest.mark.parametrize("kept", [10, -40])  # bytes: no picture at all, and one that breaks off
def test_a_training_image_or_mask_that_cannot_be_read_is_passed_over_and_said(
        tmp_path, capsys, broken, kept):
    samples, task = folder_of(tmp_path, 4)
    path = tmp_path / "train" / broken
    path.write_bytes(path.read_bytes()[:kept])
    assert {sample.name for sample, _ in draw_shots(samples, task, 3, 0)} == {"i0", "i2", "i3"}
    assert f"not drawn: cannot read {path}" in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, os.strerror(errno.EIO)), PermissionError(errno.EACCES, "denied"),
    MemoryError()])
def test_a_disk_a_permission_or_a_memory_at_fault_does_not_change_the_draw(
        tmp_path, monkeypatch, error):
    samples, task = folder_of(tmp_path, 4)

    def fails(path):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(type(error)) as raised:
        draw_shots(samples, task, 3, 0)
    assert isinstance(error, MemoryError) or raised.value.filename.startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_with_several_classes_too_what_cannot_be_read_is_not_drawn(tmp_path, capsys, name):
    samples = list_samples(get_task("voc"), make_voc(tmp_path, train=("a", "b", "c"), test=("t",)))
    (tmp_path / VOC / name).write_bytes(b"no picture")
    drawn = draw_shots(samples, get_task("voc"), 6, 0)
    assert {sample.name for sample, _ in drawn} == {"a", "c"}
    assert f"not drawn: cannot read {tmp_path / VOC / name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["folder", "voc"])
def test_where_no_mask_can_be_read_the_sentence_says_why(tmp_path, capsys, name):
    stems = [f"i{index:02}" for index in range(12)]
    if name == "voc":
        samples = list_samples(get_task("voc"), make_voc(tmp_path, train=stems))
    else:
        samples, _ = folder_of(tmp_path, 12)
    for sample in samples:
        save(sample.mask, picture())
        sample.mask.write_bytes(sample.mask.read_bytes()[:40])
    with pytest.raises(UserError, match=r"has 0 that can train: .*; the first of 12 that cannot: "
                                        r"cannot read .*i\d+\.png as a picture"):
        draw_shots(samples, task_of(name), 5, 0)
    out = capsys.readouterr().out
    assert out.count("not drawn: cannot read") == 10 and "not drawn: 2 more\n" in out


def test_voc_draws_as_evenly_over_the_classes_as_the_data_allow(tmp_path):
    stems = [f"v{index}" for index in range(8)]
    make_voc(tmp_path, train=stems, unlisted=())
    for index, stem in enumerate(stems):
        if index < 2:
            mask = [[1, 1, 3, 255], [0, 0, 0, 255]]  # classes 1 and 3
        elif index < 7:
            mask = [[1, 1, 0, 255], [0, 0, 0, 255]]  # class 1
        else:
            mask = [[1, 1, 1, 1], [1, 1, 1, 1]]  # nothing but class 1
        save(tmp_path / VOC / "SegmentationClass" / f"{stem}.png", palette_mask(mask))
    task = get_task("voc")
    drawn = draw_shots(list_samples(task, tmp_path), task, 6, 0)
    texts = [text for _, text in drawn]
    assert sorted(texts) == [0, 0, 0, 0, 2, 2] and set(texts[:2]) == set(texts[2:4]) == {0, 2}
    assert len({sample.name for sample, _ in drawn}) == 6  # no image twice while there are others
    assert "v7" not in {sample.name for sample, _ in drawn}


def test_files_that_are_no_pictures_are_passed_over_and_said(tmp_path, capsys):
    make(tmp_path, "sbu")
    masks = tmp_path / "SBUTrain4KRecoveredSmall/ShadowMasks"
    (masks / "lssd5.mat").write_bytes(b"MATLAB")
    (masks / "._train_a.png").write_bytes(b"of macOS")
    samples = list_samples(get_task("sbu"), tmp_path)
    assert len(names(samples, "train")) == 2
    out = capsys.readouterr().out
    assert "passed over in " in out and "lssd5.mat" in out and "macOS" not in out


@pytest.mark.parametrize("ending", ["tif", "TIFF", "gif"])
def test_tiff_and_gif_pairs_belong_to_a_data_set(tmp_path, ending):
    root = make(tmp_path, "folder")
    for kind, values in (("images", picture()), ("masks", half())):
        Image.fromarray(values).save(root / "train" / kind / f"new.{ending}")
    sample = {sample.name: sample for sample in list_samples(task_of("folder"), root)}["new"]
    assert sample.image.suffix == f".{ending}"
    assert label_map_of(sample, "folder").tolist() == half(top=1).tolist()


def test_a_folder_that_may_not_be_looked_into_is_no_obstacle(tmp_path, monkeypatch):
    make(tmp_path / "SBU-shadow", "sbu")
    (tmp_path / "lost+found").mkdir()
    access, iterdir = os.access, Path.iterdir

    def listed(folder):
        if folder.name == "lost+found":
            raise PermissionError
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", listed)  # root itself may look into all
    monkeypatch.setattr(os, "access", lambda path, mode: (
        Path(path).name != "lost+found" and access(path, mode)))
    assert len(list_samples(get_task("sbu"), tmp_path)) == 4


def test_a_data_set_unpacked_one_folder_too_deep_is_found_and_said(tmp_path, capsys):
    make(tmp_path / "SBU-shadow", "sbu")
    (tmp_path / "SBU-shadow.zip").write_bytes(b"")
    samples = list_samples(get_task("sbu"), tmp_path)
    assert len(samples) == 4 and samples[0].image.is_relative_to(tmp_path / "SBU-shadow")
    assert f"the data set lies in {tmp_path / 'SBU-shadow'}" in capsys.readouterr().out


def test_two_copies_of_a_data_set_are_not_chosen_between(tmp_path):
    make(tmp_path / "one", "sbu")
    make(tmp_path / "two", "sbu")
    with pytest.raises(UserError, match="but has no SBUTrain4K"):
        list_samples(get_task("sbu"), tmp_path)


def test_vocs_inner_folder_leads_to_the_one_that_holds_it(tmp_path, capsys):
    make_voc(tmp_path)
    samples = list_samples(get_task("voc"), tmp_path / VOC)
    assert len(samples) == 3 and "the data set lies in" in capsys.readouterr().out


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # the same name in two forms of Unicode


def test_names_in_composed_and_decomposed_unicode_are_the_same(tmp_path):
    make(tmp_path, "folder")
    save(tmp_path / "train/images" / f"{DECOMPOSED}.jpg", picture())  # as macOS writes it
    save(tmp_path / "train/masks" / f"{COMPOSED}.png", half())
    samples = list_samples(task_of("folder"), tmp_path)
    assert names(samples, "train") == [COMPOSED, "train_a", "train_b"]
    assert label_map_of(samples[0]).tolist() == half(top=1).tolist()
    for typed in (COMPOSED, DECOMPOSED):
        assert left_out(read_skip(typed), samples) == {f"train/{COMPOSED}"}


def test_a_list_file_may_hold_names_in_decomposed_unicode(tmp_path):
    make_voc(tmp_path, train=("a", COMPOSED))
    (tmp_path / VOC / "ImageSets/Segmentation/train.txt").write_text(f"a\n{DECOMPOSED}\n")
    assert names(list_samples(get_task("voc"), tmp_path), "train") == ["a", COMPOSED]


@pytest.mark.parametrize("name, old, new", [
    ("msd", "train/image", "train/images"), ("msd", "test/mask", "test/Masks"),
    ("msd", "test/mask", "test/GT"), ("msd", "train", "Train"),
    ("duts", "DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Images"),
    ("duts", "DUTS-TE/DUTS-TE-Mask", "DUTS-TE/DUTS_TE_gt"),
    ("sbu", "SBU-Test/ShadowMasks", "SBU-Test/ShadowMask"),
    ("folder", "train/images", "train/imgs"), ("folder", "test/masks", "test/labels")])
def test_a_folder_of_a_like_name_is_taken_and_said(tmp_path, capsys, name, old, new):
    make(tmp_path, name)
    (tmp_path / old).rename(tmp_path / new)
    samples = list_samples(task_of(name), tmp_path)
    assert names(samples, "train") == ["train_a", "train_b"] and len(samples) == 4
    assert all(sample.image.exists() and sample.mask.exists() for sample in samples)
    assert f"{new}" in capsys.readouterr().out


def test_two_folders_of_like_names_are_named_and_not_chosen_between(tmp_path):
    make(tmp_path, "msd")
    (tmp_path / "train/image").rename(tmp_path / "train/Images")
    (tmp_path / "train/imgs").mkdir()
    said = r"has no train/image \(but train/Images and train/imgs: rename one of them\):"
    with pytest.raises(UserError, match=said):
        list_samples(get_task("msd"), tmp_path)


def test_a_folder_of_the_right_name_needs_no_word(tmp_path, capsys):
    make(tmp_path, "msd")
    (tmp_path / "train/images").mkdir()
    assert len(list_samples(get_task("msd"), tmp_path)) == 4
    assert capsys.readouterr().out == ""


# ---- SKIP ----------------------------------------------------------------------------------------


def test_skip_names_samples_with_their_split_where_both_have_the_name(tmp_path):
    make(tmp_path, "folder")
    for split in ("train", "test"):
        pair(tmp_path / split / "images", tmp_path / split / "masks", "both")
    samples = list_samples(task_of("folder"), tmp_path)
    assert left_out(read_skip("train_a, test/both.jpg"), samples) == {"train/train_a", "test/both"}
    with pytest.raises(UserError, match="both, and both splits have it: write train/both or"):
        left_out(read_skip("both"), samples)


def test_skip_reads_names_from_a_list_file(tmp_path):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    (tmp_path / "bad.txt").write_text("images/train_a.jpg\ntest_b\n")
    skip = read_skip(f"{tmp_path / 'bad.txt'},train_b")
    assert left_out(skip, samples) == {"train/train_a", "test/test_b", "train/train_b"}


def test_a_line_of_a_skip_list_names_one_sample_and_its_split(tmp_path):
    make(tmp_path, "folder")
    for split, name in (("train", "both"), ("test", "both"), ("train", "1"), ("train", "photo--1")):
        pair(tmp_path / split / "images", tmp_path / split / "masks", name)
    samples = list_samples(task_of("folder"), tmp_path)
    (tmp_path / "bad.txt").write_text("photo--1.jpg\n\ndata/test/both.jpg\n")
    skip = read_skip(str(tmp_path / "bad.txt"))
    assert left_out(skip, samples) == {"train/photo--1", "test/both"}


@pytest.mark.parametrize("typed, named", [
    ("train_a,lost,train/test_a", "lost, train/test_a"), ("no.txt", r"no\.txt")])
def test_a_name_in_skip_that_no_sample_has_is_named(tmp_path, typed, named):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    with pytest.raises(UserError, match=f"SKIP names {named}, but there is no such sample"):
        left_out(read_skip(typed), samples)
    assert left_out(["lost"], samples, cached=["test/lost"]) == {"test/lost"}


def test_skip_must_leave_a_test_image(tmp_path):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    with pytest.raises(UserError, match="SKIP leaves no test image"):
        left_out(["test_a", "test_b"], samples)


def test_a_skipped_training_sample_is_replaced_and_the_others_stay(tmp_path):
    samples, task = folder_of(tmp_path, 12)
    before = draw_shots(samples, task, 6, seed=0)
    skipped = before[2][0].place
    after = draw_shots(samples, task, 6, seed=0, skip={skipped})
    assert after[:5] == before[:2] + before[3:] and after[5] not in before


@pytest.mark.parametrize("gone", ["train/images/train_a.jpg", "train/masks/train_a.png"])
def test_a_skipped_sample_may_lack_its_image_or_mask(tmp_path, gone):
    make(tmp_path, "folder")
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match="train_a.*; SKIP leaves samples out"):
        list_samples(task_of("folder"), tmp_path)
    samples = list_samples(task_of("folder"), tmp_path, ["train_a"])
    assert names(samples, "train") == ["train_a", "train_b"]  # listed, so that draws do not change
    with pytest.raises(UserError, match="train_a"):  # it is another sample that is left out
        list_samples(task_of("folder"), tmp_path, ["test/train_a"])


def test_a_skipped_sample_of_voc_or_cuhk_may_lack_its_files(tmp_path):
    make_voc(tmp_path / "voc")
    (tmp_path / "voc" / VOC / "SegmentationClass/c.png").unlink()
    assert len(list_samples(get_task("voc"), tmp_path / "voc", ["c"])) == 3
    make_cuhk(tmp_path / "cuhk", 4)
    (tmp_path / "cuhk/gt/out_of_focus0002.png").unlink()
    assert len(list_samples(get_task("cuhk"), tmp_path / "cuhk", ["train/out_of_focus0002"])) == 4


def test_skipping_one_of_the_hundred_leaves_cuhks_other_test_images_as_they_are(
        tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda self, path: path.touch())
    make_cuhk(tmp_path, 704)
    for file in ("image/out_of_focus0037.jpg", "gt/out_of_focus0037.png"):
        (tmp_path / file).unlink()
    tested = names(list_samples(get_task("cuhk"), tmp_path, ["out_of_focus0037"]), "test")
    assert len(tested) == 99 and "out_of_focus0117" in tested
