"""The five benchmarks in miniature, as they are shipped: with all that lies beside the pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from common.datasets import draw_shots, list_samples
from common.images import Sample
from common.label_maps import check_samples, load_label_map
from common.runtime.errors import UserError
from common.tasks import get_task
from tests.small_data import VOC, half, pair, palette_mask, picture, save


def shadow_of(height: int = 6, width: int = 8) -> np.ndarray:
    """A mask whose right half is foreground: not what `half` draws."""
    return 255 - half(height, width)


def cuhk(root: Path) -> None:
    for index in range(1, 8):
        ending = "JPG" if index % 2 else "jpg"
        save(root / f"image/out_of_focus{index:04d}.{ending}", picture())
        save(root / f"gt/out_of_focus{index:04d}.png", half())
        save(root / f"image/motion{index:04d}.{ending}", picture())
    save(root / "gt/motion0001.png", half())


def sbu(root: Path) -> None:
    training = root / "SBU-shadow/SBUTrain4KRecoveredSmall"
    for stem in ("lssd1", "lssd2", "lssd3"):
        pair(training / "ShadowImages", training / "ShadowMasks", stem)
    for file in ("ShadowImages/a.mat", "ShadowImages/b.mat", "ShadowMasks/lssd1.mat",
                 "ShadowMasks/c.mat"):
        (training / file).write_bytes(b"MATLAB 5.0 MAT-file")
    test = root / "SBU-shadow/SBU-Test"
    pair(test / "ShadowImages", test / "ShadowMasks", "lssd4")
    (root / "SBU-shadow.zip").write_bytes(b"")
    (root / "__MACOSX/SBU-shadow").mkdir(parents=True)


def msd(root: Path) -> None:
    for split, stems in (("train", "123"), ("test", "4")):
        for stem in stems:
            folder = root / "MSD" / split
            pair(folder / "images", folder / "masks", f"{stem}_512x640")
            save(folder / "edge" / f"{stem}_512x640.png", half())


def duts(root: Path) -> None:
    training, test = root / "DUTS-TR", root / "DUTS-TE"
    for stem in ("n01532829_13482", "n04442312_17818", "ILSVRC2014_train_00023530", "sun_a"):
        save(training / f"DUTS-TR-Image/{stem}.jpg", picture())
        masks = training / "DUTS-TR-Mask"
        right, wrong = (".png", ".jpg") if stem == "sun_a" else (".jpg", ".png")
        save(masks / f"{stem}{right}", half(), **({"quality": 100} if right == ".jpg" else {}))
        save(masks / f"{stem}{wrong}", shadow_of())
    for stem in ("sun_b", "sun_bcogaqperiljqupq", "ILSVRC2012_test_00036002"):
        size = (6, 8) if stem == "sun_b" else (8, 6)
        save(test / f"DUTS-TE-Image/{stem}.jpg", picture())
        save(test / f"DUTS-TE-Mask/{stem}.png", half(*size))
    save(test / "DUTS-TE-Mask/sun_b.jpg", shadow_of())


def voc(root: Path) -> None:
    outlined = palette_mask([[0, 1, 255, 2], [0, 255, 255, 0]])
    for stem in ("2007_1", "2007_2", "2007_3", "2007_4"):
        save(root / VOC / f"SegmentationClass/{stem}.png", outlined)
        save(root / VOC / f"SegmentationObject/{stem}.png", palette_mask([[0, 9]]))
    for stem in ("2007_1", "2007_2", "2007_3", "2007_4", *(f"2008_{n}" for n in range(20))):
        save(root / VOC / f"JPEGImages/{stem}.jpg", picture(2, 4))
        save(root / VOC / f"SegmentationClassAug/{stem}.png", np.zeros((2, 4), np.uint8))
    lists = root / VOC / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n2007_2\n2007_3\n")
    (lists / "val.txt").write_text("2007_4\n")
    (lists / "trainval.txt").write_text("2007_1\n2007_2\n2007_3\n2007_4\n")
    (lists / "trainaug.txt").write_text("2008_0\n2007_4\n")


@dataclass(frozen=True)
class Replica:
    make: object  # writes it into a folder
    train: int  # samples
    test: int
    said: tuple[str, ...]  # on stdout, when it is listed


REPLICAS = {
    "cuhk": Replica(cuhk, 6, 1, ("6 training images, 1 test images",)),
    "sbu": Replica(sbu, 3, 1, ("lies in", "SBU-shadow", "passed over", "a.mat, b.mat",
                               "c.mat, lssd1.mat")),
    "msd": Replica(msd, 3, 1, ("lies in", "train/images is taken for train/image",
                               "test/masks is taken for test/mask")),
    "duts": Replica(duts, 4, 3, ("sun_a.jpg", "n01532829_13482.png", "n04442312_17818.png",
                                 "ILSVRC2014_train_00023530.png", "sun_b.jpg")),
    "voc": Replica(voc, 3, 1, ("SegmentationClassAug and trainaug.txt passed over",
                               "SegmentationClass of the original tar")),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_benchmark_as_it_is_shipped_is_listed_drawn_and_checked(tmp_path, capsys, name):
    replica, task = REPLICAS[name], get_task(name)
    replica.make(tmp_path)
    samples = list_samples(task, tmp_path)
    out = capsys.readouterr().out
    assert all(said in out for said in replica.said), out
    splits = [sample.split for sample in samples]
    assert splits == ["train"] * replica.train + ["test"] * replica.test
    drawn = draw_shots(samples, task, replica.train, 0)
    assert {sample for sample, _ in drawn} == set(samples[:replica.train])
    fitting = [sample for sample in samples if name != "duts" or sample.split == "train"]
    for sample, checked in zip(fitting, check_samples(fitting, task)):
        if name == "voc":
            assert load_label_map(sample, task, checked.size).tolist() == [[0, 1, 255, 2],
                                                                           [0, 255, 255, 0]]
        else:
            label_map = load_label_map(sample, task, checked.size)
            assert label_map.tolist() == half(top=1).tolist()


def test_test_masks_of_duts_that_do_not_fit_are_all_named_with_the_way_out(tmp_path):
    duts(tmp_path)
    task = get_task("duts")
    samples = list_samples(task, tmp_path)
    with pytest.raises(UserError) as error:
        check_samples(samples, task)
    for name in ("sun_bcogaqperiljqupq", "ILSVRC2012_test_00036002"):
        assert f"{name}.png is 6 x 8, which does not fit {name}.jpg of 8 x 6" in str(error.value)
    skip = "SKIP=test/ILSVRC2012_test_00036002,test/sun_bcogaqperiljqupq"
    assert str(error.value).endswith(skip), str(error.value)


def test_masks_of_another_project_are_not_taken_for_vocs(tmp_path):
    voc(tmp_path)
    (tmp_path / VOC / "SegmentationClass").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="SegmentationClassAug holds other masks, so take "
                                        "SegmentationClass of the original tar, http"):
        list_samples(get_task("voc"), tmp_path)


def test_in_other_data_sets_two_masks_of_one_name_are_not_chosen_between(tmp_path):
    msd(tmp_path)
    save(tmp_path / "MSD/test/masks/4_512x640.jpg", half())
    with pytest.raises(UserError, match=r"4_512x640\.jpg and 4_512x640\.png"):
        list_samples(get_task("msd"), tmp_path)


def test_what_is_beside_the_pairs_is_no_sample(tmp_path):
    cuhk(tmp_path)
    samples: list[Sample] = list_samples(get_task("cuhk"), tmp_path)
    assert {sample.image.suffix for sample in samples} == {".jpg", ".JPG"}
    assert all(sample.name.startswith("out_of_focus") for sample in samples)
