"""Stage 1 before and after the models: SKIP, what is said of the masks, and data.png."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from common.cache import Cache
from common.cache_file import CacheWriter
from common.frozen import clip_weights
from common.images import Sample
from common.label_maps import Checked
from common.prepare import mask_summary, read_sample
from common.results.data_sheet import foreground_line
from common.results.paper import paper_row
from common.results.pictures import MASK_COLOUR
from common.runtime import distributed
from common.runtime.errors import UserError
from common.runtime.settings import override
from tests.conftest import STAGES, draw_data, load_script
from tests.small_data import VOC, make_voc, one, palette_mask, picture, save, task_of

CACHE = Path("runs/folder/features.h5")
SHEET = Path("runs/folder/data.png")


@pytest.fixture
def stage_1(tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs stage 1 on 10 training and 6 test images; returns how many images it computed."""
    draw_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.runtime.files.lock", lambda folder: None)  # as if each run ended
    written, write = [], CacheWriter.write
    monkeypatch.setattr(CacheWriter, "write",
                        lambda self, row, *rest: written.append(row) or write(self, row, *rest))

    def run(*arguments: str) -> int:
        written.clear()
        stage = load_script("01_cache_features.py")
        override(vars(stage), ["TASK=folder", "DEVICE=cpu", *STAGES["01_cache_features.py"],
                               *arguments])
        stage.main()
        return len(written)

    return run


def cached() -> list[str]:
    """split/name of the cache's images."""
    with h5py.File(CACHE) as file:
        assert file["done"][:].all()
        return [f"{split}/{name}" for split, name in zip(file["split"].asstr(),
                                                         file["names"].asstr())]


def one_of(folder: Path, stem: str) -> Path:
    [path] = folder.glob(f"{stem}.*")
    return path


def remove(name: str) -> None:
    for path in Path("data").glob(f"{name.split('/')[0]}/*/{name.split('/')[1]}.*"):
        path.unlink()


def test_with_skip_only_the_replacement_of_a_training_sample_is_computed(stage_1, capsys):
    assert stage_1() == 14
    before = cached()
    assert f"wrote {CACHE}, {SHEET}" in capsys.readouterr().out
    assert stage_1(f"SKIP={before[2]},test/3") == 1
    out, after = capsys.readouterr().out, cached()
    assert "12 of its 13 images are taken over" in out and "left out by SKIP: test/3, train/" in out
    assert set(before) - set(after) == {before[2], "test/3"} and len(after) == 13
    assert stage_1(f"SKIP={before[2]},test/3") == 0
    assert "taken over" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"SKIP names 3, and both splits have it: write train/3"):
        stage_1("SKIP=3")


def test_an_image_that_is_gone_from_the_disk_must_be_named_in_skip(stage_1):
    stage_1()
    remove("test/3")
    with pytest.raises(UserError, match="holds test/3, and DATA_DIR no longer does: .* in SKIP"):
        stage_1()
    assert stage_1("SKIP=test/3") == 0  # it is known from the cache
    assert stage_1("SKIP=test/3") == 0  # the cache no longer holds it, but knows that it did
    assert len(cached()) == 13 and "test/3" not in cached()
    with pytest.raises(UserError, match="SKIP names test/7, but there is no such sample"):
        stage_1("SKIP=test/7")


def test_test_images_that_break_off_are_all_named_when_the_others_are_computed(stage_1):
    for stem in ("2", "5"):
        path = Path(f"data/test/images/{stem}.jpg")
        path.write_bytes(path.read_bytes()[:2000])  # its size can be read, its pixels cannot
    with pytest.raises(UserError, match=r"/2\.jpg .*/5\.jpg .*; or leave them out by SKIP="
                                        r"test/2,test/5; what was computed of the others is kept"):
        stage_1()
    with h5py.File(CACHE) as file:
        assert file["done"][:].sum() == 12
    assert stage_1("SKIP=test/2,test/5") == 0


def test_masks_that_are_edited_after_they_were_cached_are_named(stage_1, tmp_path):
    stage_1("SKIP=test/5")
    mask = one_of(tmp_path / "data/test/masks", "3")
    save(mask, 255 - np.asarray(Image.open(mask)))
    for left_out in ("SKIP=test/5", "SKIP="):  # also where the file is laid out anew
        with pytest.raises(UserError, match="masks of test/3 are others now than those in runs"):
            stage_1(left_out)
    save(mask, 255 - np.asarray(Image.open(mask)))
    assert stage_1() == 1


def test_images_that_are_edited_after_they_were_cached_are_named(stage_1, tmp_path):
    stage_1("SKIP=test/5")
    images, kept = [one_of(tmp_path / "data/test/images", stem) for stem in "34"], {}
    for image in images:
        kept[image] = image.read_bytes()
        save(image, 255 - np.asarray(Image.open(image)))
    for left_out in ("SKIP=test/5", "SKIP="):  # also where the file is laid out anew
        with pytest.raises(UserError, match="images test/3, test/4 are others now than those in r"):
            stage_1(left_out)
    for image, content in kept.items():
        image.write_bytes(content)
    darker = np.asarray(Image.open(images[0])) // 2 * 2  # as another decoder might read it
    save(images[0].with_suffix(".png"), darker)
    images[0].unlink()
    assert stage_1() == 1


def test_data_png_is_drawn_too_where_nothing_was_missing_but_by_one_process(stage_1, monkeypatch):
    stage_1()
    first = SHEET.read_bytes()
    SHEET.unlink()
    assert stage_1() == 0 and SHEET.read_bytes() == first
    SHEET.unlink()
    monkeypatch.setattr(distributed, "RANK", 1)
    assert stage_1() == 0 and not SHEET.exists()


@pytest.mark.parametrize("line, split", [(0, "train"), (1, "test")])
def test_data_png_shows_four_images_of_either_split_with_their_foreground_in_blue(
        stage_1, line, split):
    stage_1()
    sheet = np.asarray(Image.open(SHEET)).astype(int)
    assert sheet.shape == (2 * (256 + 18 + 4) - 4, 4 * (256 + 4) - 4, 3)
    with h5py.File(CACHE) as file:
        row = file["shots"][0, 0]
        if split == "test":
            row = int((file["split"][:] == b"test").argmax())
        plain = file["pictures"][row].astype(int)
        start, end = file["label_offsets"][row:row + 2]
        labels = file["labels"][start:end].reshape(file["sizes"][row])
    panel = sheet[line * 278 + 18:line * 278 + 274, :256]
    truth = np.asarray(Image.fromarray(labels * 255).resize((256, 256), Image.NEAREST)) == 255
    expected = (plain + np.array(MASK_COLOUR)) / 2
    assert abs(panel - expected)[truth].max() <= 1.5
    changed = (panel != plain).any(-1)
    assert changed[truth].mean() > 0.9 and 0 < (changed & ~truth).mean() < 0.1  # the outline


def test_data_png_gives_each_class_a_colour_of_its_own(stage_1, tmp_path):
    stems = ("a", "c", "d")
    make_voc(tmp_path / "voc", train=stems)
    for stem in stems:  # aeroplane, background, bicycle
        save(tmp_path / "voc" / VOC / "JPEGImages" / f"{stem}.jpg", picture(30, 30, 200))
        save(tmp_path / "voc" / VOC / "SegmentationClass" / f"{stem}.png",
             palette_mask(np.repeat([[1] * 10 + [0] * 10 + [2] * 10], 30, 0)))
    stage_1("TASK=voc", "PROMPT=", "DATA_DIR=voc", "SHOTS=4")
    sheet = np.asarray(Image.open("runs/voc/data.png")).astype(int)
    assert sheet.shape == (256 + 36, 4 * 260 - 4, 3)
    red, grey, green = (sheet[36 + 128, x] for x in (40, 128, 210))
    assert abs(grey - 200).max() < 5
    assert abs(red - [164, 100, 100]).max() < 5 and abs(green - [100, 164, 100]).max() < 5
    caption = sheet[18:36, :256]  # "aeroplane bicycle", in their colours
    assert (caption[..., 0] - caption[..., 1]).max() > 60
    assert (caption[..., 1] - caption[..., 0]).max() > 60


def test_how_masks_were_read_is_said_in_one_line():
    images = [Sample(name, Path(), Path(), split)
              for name, split in (("a", "train"), ("b", "test"), ("c", "test"))]
    checked = [Checked((4, 4), "0 and 255", 0.25, 0), Checked((4, 4), "JPEG", 0.0, 0),
               Checked((4, 4), "0 and 255", 0.5, 0)]
    assert mask_summary(images, checked) == (
        "masks: 0 and 255 in 2, JPEG in 1; foreground 25.0% on average, from 0.0% (test/b) to "
        "50.0% (test/c)")


def test_stage_1_says_how_masks_were_read(stage_1, capsys):
    stage_1()
    assert "masks: 0 and 255 in 14; foreground " in capsys.readouterr().out


def test_the_seed_decides_which_training_samples_are_drawn(stage_1):
    stage_1("SHOTS=4", "RUN_DIR=runs/0")
    stage_1("SHOTS=4", "SEED=1", "RUN_DIR=runs/1")
    first, second = (Cache.open(Path(f"runs/{seed}/features.h5"), "folder") for seed in "01")
    assert [first.name(sample) for sample in first.samples("train")] != [
        second.name(sample) for sample in second.samples("train")]


def test_a_clip_that_is_no_stand_in_sees_512_pixels(stage_1, monkeypatch):
    load = clip_weights.load_clip
    monkeypatch.setattr(clip_weights, "load_clip", lambda name, device: load("demo", device))
    stage_1("CLIP=ViT-B-16/openai", "SHOTS=2")
    with h5py.File(CACHE) as file:
        assert file.attrs["clip_size"] == 512


@pytest.mark.parametrize("precision", ["bf16", "fp32"])  # auto is one of them
def test_a_precision_that_is_named_counts(stage_1, precision):
    stage_1("SHOTS=2", f"PRECISION={precision}")
    with h5py.File(CACHE) as file:
        assert file.attrs["precision"] == precision


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    sample = one(tmp_path)
    image, label_map = read_sample(sample, task_of("folder"))
    assert image.shape == (6, 8, 3) and label_map.sum() == 24
    sample.mask.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"x\.png as a picture "):
        read_sample(sample, task_of("folder"))


def test_the_foreground_under_the_patches_is_held_against_the_papers(stage_1, capsys, monkeypatch):
    stage_1()
    with h5py.File(CACHE) as file:
        tested = file["split"][:] == b"test"
        share = (file["truth_centres"][:][tested] == 1).mean()
    said = f"foreground under the patch centres of the test images: {share:.1%}"
    assert said + "\n" in capsys.readouterr().out
    cache = Cache.open(CACHE, "folder")
    assert foreground_line(cache, None) == said
    monkeypatch.setattr("common.results.data_sheet.MOST", share - 0.01)
    assert "WARNING: that is most of them; if white should be back" in foreground_line(cache, None)
    near, far = share + 0.09, share + 0.11
    for figure in (near, far):
        monkeypatch.setattr("common.results.data_sheet.paper_row",
                            lambda key, figure=figure: {"w/o RL": {"FR": 100 * figure}})
        line = foreground_line(cache, "duts")
        assert line.startswith(f"{said} (the paper's random patches: {figure:.1%})")
        assert ("WARNING" in line) == (figure == far)


def test_the_paper_has_the_foreground_rate_of_each_of_its_data_sets():
    rates = {key: paper_row(key)["w/o RL"]["FR"] for key in ("cuhk", "sbu", "msd", "duts", "voc")}
    assert rates == {"cuhk": 63.8, "sbu": 18.3, "msd": 22.8, "duts": 14.6, "voc": 23.2}
