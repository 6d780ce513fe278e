"""The feature cache: whole entries only, whatever is killed; truth that matches the label maps."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import open_mark
from common.cache import Cache
from common.cache_file import (
    SUMMED,
    CacheWriter,
    Layout,
    bytes_per_image,
    create,
    known_places,
    truth_at_centres,
    truth_on_grid,
)
from common.results.own_images import choose_texts
from common.runtime.errors import UserError

LAYOUT = Layout(
    names=["first", "naïve", "third", "fourth"],
    splits=["train", "test", "train", "test"],
    sizes=[(7, 11), (9, 5), (16, 12), (4, 4)],
    shots=[(2, 0), (0, 1)],
    texts=["shadow", "glass"],
    embedding=(8, 4, 4),
    frame=800,
    patch=80,
)
ATTRIBUTES = {
    "task": "sbu", "branch": "explicit", "sam": "vit_h", "sam_fingerprint": "0a", "clip": "demo",
    "clip_fingerprint": "1b", "clip_size": 192, "image_size": 800, "precision": "fp32", "seed": 0,
    "versions": {"torch": "2.6"}, "time": "then"}
WRITES = 9  # calls of os.pwrite for an entry: seven arrays, their CRCs and the flag


def entry(row: int) -> dict[str, np.ndarray]:
    """An image's arrays, different in every row; only rows 1 and 2 hold the second text."""
    rng = np.random.default_rng(row)
    held = [0, 1, 2, 255] if row in (1, 2) else [0, 1, 255]
    labels = rng.choice(np.array(held, np.uint8), LAYOUT.sizes[row])
    return {
        "embedding": rng.standard_normal(LAYOUT.embedding, np.float32),
        "maps": rng.random((2, 4, 4), np.float32),
        "label_map": labels,
        "picture": rng.integers(0, 256, (256, 256, 3), np.uint8),
    }


def write(path: Path, rows: list[int] | None = None) -> None:
    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        for row in writer.missing() if rows is None else rows:
            writer.write(row, **entry(row))


def contents(path: Path) -> dict[str, bytes]:
    """Every dataset and attribute, as plain h5py reads them."""
    with h5py.File(path, "r") as file:
        return {name: file[name][:].tobytes() for name in file} | dict(file.attrs)


def assert_done_entries_are_whole(path: Path) -> int:
    """Compares each entry that counts as done, as plain h5py reads it; returns their number."""
    with h5py.File(path, "r") as file:
        done = np.flatnonzero(file["done"][:])
        for row in done:
            expected = entry(row)
            start, end = file["label_offsets"][row : row + 2]
            assert np.array_equal(file["embeddings"][row], expected["embedding"].astype(np.float16))
            assert np.array_equal(file["maps"][row], expected["maps"].astype(np.float16))
            assert np.array_equal(file["pictures"][row], expected["picture"])
            label_map = file["labels"][start:end].reshape(file["sizes"][row])
            assert np.array_equal(label_map, expected["label_map"])
            present = [(expected["label_map"] == 1).any(), (expected["label_map"] == 2).any()]
            assert np.array_equal(file["present"][row], present)
            for k in range(2):
                grid = truth_on_grid(expected["label_map"], k + 1, (4, 4))
                centres = truth_at_centres(expected["label_map"], k + 1, 800, 80)
                assert np.array_equal(file["truth_grid"][row, k], grid)
                assert np.array_equal(file["truth_centres"][row, k], centres)
    return len(done)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "features.h5"


@pytest.fixture
def complete(path: Path) -> Path:
    write(path)
    return path


# ---- kills ---------------------------------------------------------------------------------------


def test_plain_h5py_reads_the_file_after_every_single_write(path, monkeypatch):
    pwrite, counts = os.pwrite, []

    def pwrite_then_read(*args):
        written = pwrite(*args)
        counts.append(assert_done_entries_are_whole(path))
        return written

    monkeypatch.setattr(os, "pwrite", pwrite_then_read)
    write(path)
    assert counts == [n // WRITES for n in range(1, 4 * WRITES + 1)]


def in_killed_process(work, *args) -> None:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def write_until_killed(path: Path, fatal: int) -> None:
    """Writes the whole cache, but stops halfway through the `fatal`-th call of os.pwrite."""
    pwrite, calls = os.pwrite, []

    def fatal_pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == fatal:
            pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = fatal_pwrite
    write(path)


@pytest.mark.parametrize("fatal", [1, 4, WRITES, WRITES + 3, 2 * WRITES + 7, 4 * WRITES])
def test_a_killed_run_goes_on_where_it_stopped_and_ends_the_same(path, tmp_path, fatal):
    in_killed_process(write_until_killed, path, fatal)
    whole = (fatal - 1) // WRITES
    assert assert_done_entries_are_whole(path) == whole
    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        assert writer.missing() == list(range(whole, 4))
    write(path)
    write(tmp_path / "undisturbed.h5")
    assert contents(path) == contents(tmp_path / "undisturbed.h5")


def create_until_killed(path: Path) -> None:
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    write(path)


def test_a_kill_while_the_file_is_laid_out_leaves_no_cache_and_no_obstacle(path):
    in_killed_process(create_until_killed, path)
    assert [file.name for file in path.parent.iterdir()] == ["features.h5.tmp"]
    write(path)
    assert assert_done_entries_are_whole(path) == 4
    assert [file.name for file in path.parent.iterdir()] == ["features.h5"]


def test_an_entry_whose_flag_was_not_set_counts_as_missing(complete):
    with h5py.File(complete, "r") as file:
        flag = file["done"].id.get_offset() + 2
    with open(complete, "r+b") as file:
        file.seek(flag)
        file.write(b"\0")
    with CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES) as writer:
        assert writer.missing() == [2]
    with pytest.raises(UserError, match=r"lacks 1 of its 4 images.*01_cache_features.py TASK=sbu"):
        Cache.open(complete, None, "01_cache_features.py TASK=sbu")


def test_the_flag_is_set_only_after_the_data_are_synced(path, monkeypatch):
    calls, pwrite, fsync = [], os.pwrite, os.fsync
    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *args: calls.append(len(args[1])) or pwrite(*args))
        monkeypatch.setattr(os, "fsync", lambda fd: calls.append("sync") or fsync(fd))
        writer.write(0, **entry(0))
    assert calls[WRITES - 1 :] == ["sync", 1, "sync"]


def test_two_writers_fill_one_file(path):
    with (
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as one,
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as other,
    ):
        for row in (3, 1):
            one.write(row, **entry(row))
            other.write(row - 1, **entry(row - 1))
    assert assert_done_entries_are_whole(path) == 4


def test_an_entry_that_is_done_is_left_as_it_is(path):
    write(path, rows=[0])
    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        writer.write(0, **entry(0) | {"picture": np.zeros((256, 256, 3), np.uint8)})
    assert assert_done_entries_are_whole(path) == 1


# ---- SKIP ----------------------------------------------------------------------------------------


THERE = {"train/first", "test/naïve", "train/third", "test/fourth", "train/fifth"}
# "third" is left out, and "fifth" is drawn in its place
FEWER = replace(LAYOUT, names=["first", "fifth", "naïve", "fourth"],
                splits=["train", "train", "test", "test"],
                sizes=[(7, 11), (3, 3), (9, 5), (4, 4)], shots=[(1, 0), (0, 1)])
FORMER = {0: 0, 2: 1, 3: 3}  # rows of FEWER: rows of LAYOUT
SKIPPING = ATTRIBUTES | {"skip": ["train/third"]}


def entry_bytes(path: Path, row: int) -> list[bytes]:
    """One image's part of each dataset, as plain h5py reads it."""
    with h5py.File(path, "r") as file:
        start, end = file["label_offsets"][row : row + 2]
        parts = [file[name][row] for name in (*SUMMED, "crc", "done") if name != "labels"]
        return [part.tobytes() for part in (*parts, file["labels"][start:end])]


def skip_third(path: Path) -> list[int]:
    """Leaves out "third"; returns the rows that are missing then."""
    with CacheWriter.open_or_create(path, FEWER, SKIPPING, THERE) as writer:
        return writer.missing()


def test_images_that_stay_when_skip_changes_are_taken_over_byte_for_byte(complete, capsys):
    before = [entry_bytes(complete, row) for row in range(4)]
    assert skip_third(complete) == [1]
    for row, former in FORMER.items():
        assert entry_bytes(complete, row) == before[former]
    assert "SKIP has changed" in capsys.readouterr().out
    with h5py.File(complete) as file:
        assert file["names"].asstr()[:].tolist() == FEWER.names
        assert file.attrs["skip"] == '["train/third"]'
    assert [file.name for file in complete.parent.iterdir()] == ["features.h5"]
    assert skip_third(complete) == [1] and "anew" not in capsys.readouterr().out


def test_an_image_that_was_not_done_is_not_taken_over(path, capsys):
    write(path, rows=[0, 1, 2])
    assert skip_third(path) == [1, 3]
    assert "2 of its 4 images are taken over" in capsys.readouterr().out


def test_an_image_of_another_size_now_is_not_taken_over(complete):
    layout = replace(FEWER, sizes=[(7, 11), (3, 3), (9, 6), (4, 4)])
    with CacheWriter.open_or_create(complete, layout, SKIPPING, THERE) as writer:
        assert writer.missing() == [1, 2]


def test_a_cache_laid_out_anew_has_another_identity_and_reads_as_a_new_one(complete, tmp_path):
    identity = Cache.open(complete).identity()
    new = {row: entry(former) for row, former in FORMER.items()}
    new[1] = entry(3) | {"label_map": np.eye(3, dtype=np.uint8)}
    skip_third(complete)
    with (
        CacheWriter.open_or_create(complete, FEWER, SKIPPING, THERE) as writer,
        CacheWriter.open_or_create(tmp_path / "new.h5", FEWER, SKIPPING, THERE) as fresh,
    ):
        writer.write(1, **new[1])
        for row, values in new.items():
            fresh.write(row, **values)
    assert contents(complete) == contents(tmp_path / "new.h5")
    assert Cache.open(complete).identity() != identity


def test_what_skip_leaves_out_is_computed_when_it_is_wanted_again(complete):
    skip_third(complete)
    with CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES, THERE) as writer:
        assert writer.missing() == [2]
    with h5py.File(complete) as file:
        assert "skip" not in file.attrs


def test_a_skip_that_changes_no_image_leaves_the_file_as_it_is(complete):
    before = complete.read_bytes()
    skipping = ATTRIBUTES | {"skip": ["train/sixth"]}
    CacheWriter.open_or_create(complete, LAYOUT, skipping, {*THERE, "train/sixth"}).close()
    assert complete.read_bytes() == before


@pytest.mark.parametrize("skip", [{}, {"skip": ["train/first"]}])
def test_images_that_are_neither_on_the_disk_nor_skipped_are_named_with_skip(complete, skip):
    before, there = complete.read_bytes(), THERE - {"train/third"}
    with pytest.raises(UserError, match=r"holds train/third, and DATA_DIR no longer does: put "
                                        "them back, name them in SKIP, or set another RUN_DIR"):
        CacheWriter.open_or_create(complete, FEWER, ATTRIBUTES | skip, there)
    assert complete.read_bytes() == before
    with CacheWriter.open_or_create(complete, FEWER, SKIPPING, there) as writer:
        assert writer.missing() == [1]


def test_other_images_under_the_same_skip_are_a_contradiction(complete):
    with pytest.raises(UserError, match="/names: naïve then, fifth now"):
        CacheWriter.open_or_create(complete, FEWER, ATTRIBUTES, THERE)


def test_skip_excuses_no_other_setting(complete):
    with pytest.raises(UserError, match="SEED=0, and now it is 1"):
        CacheWriter.open_or_create(complete, FEWER, SKIPPING | {"seed": 1}, THERE)


def test_a_cache_knows_what_it_holds_and_what_it_left_out(complete, tmp_path):
    assert known_places(tmp_path / "none.h5") == set()
    assert known_places(complete) == THERE - {"train/fifth"}
    skip_third(complete)
    assert known_places(complete) == THERE


@pytest.mark.parametrize("skip", ["[", "3", 3])
def test_a_list_of_skipped_images_that_makes_no_sense_is_refused(complete, skip):
    changed(complete, lambda file: file.attrs.__setitem__("skip", skip))
    with pytest.raises(UserError, match=r"features.h5 is damaged or not a feature cache"):
        CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES)


def skip_until_killed(path: Path, fatal: int) -> None:
    pwrite, calls = os.pwrite, []

    def fatal_pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = fatal_pwrite
    skip_third(path)


def kill_before_renaming(path: Path) -> None:
    rename = os.replace

    def fatal_replace(source, target):
        if Path(target) == path:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = fatal_replace
    skip_third(path)


@pytest.mark.parametrize("fatal", [1, WRITES, WRITES + 4, 3 * WRITES, None])
def test_a_kill_while_images_are_taken_over_loses_nothing(complete, fatal):
    before = complete.read_bytes()
    if fatal:
        in_killed_process(skip_until_killed, complete, fatal)
    else:
        in_killed_process(kill_before_renaming, complete)
    assert complete.read_bytes() == before
    assert complete.with_name("features.h5.new").exists()
    assert skip_third(complete) == [1]
    assert [file.name for file in complete.parent.iterdir()] == ["features.h5"]


def test_what_a_kill_left_is_removed_though_skip_is_taken_back(complete):
    in_killed_process(skip_until_killed, complete, 3)
    CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES, THERE).close()
    assert [file.name for file in complete.parent.iterdir()] == ["features.h5"]


def test_names_in_the_other_form_of_unicode_are_the_same_images(complete):
    before = complete.read_bytes()
    names = [unicodedata.normalize("NFD", name) for name in LAYOUT.names]
    assert names != LAYOUT.names
    CacheWriter.open_or_create(complete, replace(LAYOUT, names=names), ATTRIBUTES, THERE).close()
    assert complete.read_bytes() == before


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [("seed", 1), ("sam", "vit_b"), ("precision", "bfloat16")])
def test_a_contradiction_names_the_constant_and_both_values(complete, key, value):
    was = f"{key.upper()}={ATTRIBUTES.get(key)}"
    message = rf"features.h5 .* {was}, and now it is {value}: set it back, .*delete the file"
    with pytest.raises(UserError, match=message):
        CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES | {key: value})


def test_another_sam_is_named_itself_not_by_the_shape_of_its_embedding(complete):
    layout = replace(LAYOUT, embedding=(4, 2, 2))
    with pytest.raises(UserError, match="SAM=vit_h, and now it is demo"):
        CacheWriter.open_or_create(complete, layout, ATTRIBUTES | {"sam": "demo"})


@pytest.mark.parametrize("name, known", [("sam", ("sam_fingerprint", "encoder_fingerprint")),
                                         ("clip", ("clip_fingerprint", "clip_setup"))])
def test_a_model_whose_file_has_moved_is_known_by_its_fingerprints(path, name, known):
    old = ATTRIBUTES | {name: "/old/model", **dict.fromkeys(known, "2c")}
    create(path, LAYOUT, old)
    CacheWriter.open_or_create(path, LAYOUT, old | {name: "/new/model"}).close()
    for other in known:
        with pytest.raises(UserError, match=f"{name.upper()}=/old/model, and now it is /new/mod"):
            CacheWriter.open_or_create(path, LAYOUT, old | {name: "/new/model", other: "3d"})


def test_masks_that_have_changed_since_are_named_for_what_is_done_alone(path):
    write(path, rows=[0, 2])
    sums = [zlib.crc32(entry(row)["label_map"]) for row in range(4)]
    with CacheWriter.open(path) as writer:
        writer.require_masks(sums)
        writer.require_masks([sums[0], 1, sums[2], 2])
        with pytest.raises(UserError, match=r"the masks of t\w+/\w+ are others now than those in"):
            writer.require_masks([*sums[:2], 1, sums[3]])


def test_a_constant_that_is_stored_only_where_it_is_set_may_not_be_left_out(path):
    CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES | {"foreground": "3"})
    with pytest.raises(UserError, match="FOREGROUND=3, and now it is empty"):
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES)


@pytest.mark.parametrize("name", ["encoder_fingerprint", "clip_setup"])
def test_an_older_cache_that_tells_less_of_its_models_is_gone_on_with(path, name):
    create(path, LAYOUT, ATTRIBUTES)
    CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES | {name: "2c"}).close()
    path.unlink()
    create(path, LAYOUT, ATTRIBUTES | {name: "2c"})
    with pytest.raises(UserError, match=f"{name.upper()}=2c, and now it is 3d"):
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES | {name: "3d"})


def test_another_time_and_other_library_versions_are_no_contradiction(complete):
    later = ATTRIBUTES | {"time": "now", "versions": {"torch": "2.7"}}
    with CacheWriter.open_or_create(complete, LAYOUT, later) as writer:
        assert writer.missing() == []


def test_an_older_caches_relative_paths_are_no_contradiction(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("half.pth").touch()
    old = ATTRIBUTES | {"sam": "half.pth", "clip": "ViT-B-16/half.pth"}
    new = ATTRIBUTES | {"sam": f"{tmp_path}/half.pth", "clip": f"ViT-B-16/{tmp_path}/half.pth"}
    create(path, LAYOUT, old)
    CacheWriter.open_or_create(path, LAYOUT, new).close()
    with pytest.raises(UserError, match="SAM=.*half.pth, and now it is vit_h"):
        CacheWriter.open_or_create(path, LAYOUT, new | {"sam": "vit_h"})


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("names", ["first", "other", "third", "fourth"], "/names: naïve then, other now"),
        ("splits", ["train", "train", "train", "test"], "/split: test then, train now"),
        ("sizes", [(7, 11), (9, 6), (16, 12), (4, 4)], r"/sizes: \[9, 5\] then, \[9, 6\] now"),
        ("shots", [(2, 0)], "/shots: 2 then, 1 now"),
        ("texts", ["shadow"], r'PROMPT=\["shadow", "glass"\], and now it is \["shadow"\]'),
        ("patch", 40, "PATCH_SIZE=80, and now it is 40"),
    ],
)
def test_other_images_samples_or_texts_are_a_contradiction(complete, field, value, named):
    with pytest.raises(UserError, match=named):
        CacheWriter.open_or_create(complete, replace(LAYOUT, **{field: value}), ATTRIBUTES)


def test_too_little_space_is_said_before_anything_is_written(path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    layout = replace(LAYOUT, embedding=(256, 64, 64), texts=["shadow"], shots=[(2, 0), (0, 0)])
    needed = sum(bytes_per_image((256, 64, 64), 1, size) for size in LAYOUT.sizes)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage(0, 0, needed - 1))
    with pytest.raises(
        UserError, match=r"features.h5 needs 0.01 GB and its disk has 0.01 GB free: "
    ):
        CacheWriter.open_or_create(path, layout, ATTRIBUTES)
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage(0, 0, needed))
    CacheWriter.open_or_create(path, layout, ATTRIBUTES).close()


def test_the_remains_of_a_killed_creation_are_gone_before_space_is_measured(path, monkeypatch):
    path.parent.mkdir()
    path.with_name("features.h5.tmp").write_bytes(b"left over")
    usage, found = shutil.disk_usage, []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: found.extend(path.parent.iterdir()) or usage(at)
    )
    CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES).close()
    assert found == [] and path.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_the_space_is_reserved_when_the_file_is_created(path):
    CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES).close()
    stat = path.stat()
    needed = sum(bytes_per_image((8, 4, 4), 2, size) for size in LAYOUT.sizes)
    assert stat.st_blocks * 512 >= stat.st_size >= needed


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_quota_that_fills_while_space_is_reserved_ends_in_a_sentence(
    path, monkeypatch, full
):
    def fill(fd, offset, size):
        raise OSError(full, os.strerror(full))

    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(UserError, match=f"features.h5 cannot be created .*{os.strerror(full)}"):
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES)
    # The reserved space is given back.
    assert [file.stat().st_size for file in path.parent.iterdir()] == [0]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_a_file_system_that_cannot_reserve_space_will_do(path, monkeypatch):
    def refuse(fd, offset, size):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(path)
    assert assert_done_entries_are_whole(path) == 4


def test_a_link_to_nothing_is_not_replaced_by_a_cache(path):
    path.parent.mkdir()
    path.symlink_to("gone.h5")
    with pytest.raises(UserError, match="features.h5 is a link to gone.h5, which does not exist"):
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES)
    assert path.is_symlink()


# ---- locks, and the mark that HDF5 leaves in an open file ----------------------------------------


@pytest.fixture
def holder(complete):
    """A process that has the cache open as a notebook would, in "r+"."""
    program = f"import h5py\nfile = h5py.File({str(complete)!r}, 'r+')\nprint(flush=True)\ninput()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_cache_that_another_process_has_open_for_writing_is_left_alone(
    complete, holder, monkeypatch
):
    monkeypatch.setattr(open_mark, "_put", None)  # the living writer's mark is never touched
    before = complete.read_bytes()
    for opening in (Cache.open, lambda path: CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES)):
        with pytest.raises(UserError, match="^another process.*features.h5 open for writing: cl"):
            opening(complete)
    assert complete.read_bytes() == before


def test_a_cache_whose_writer_died_is_used_and_that_is_said(complete, capsys, request):
    before = complete.read_bytes()
    holder = request.getfixturevalue("holder")
    holder.kill()
    holder.wait()
    assert complete.read_bytes() != before
    assert Cache.open(complete, "sbu").texts == ("shadow", "glass")
    assert "features.h5 had been left open by a program that died" in capsys.readouterr().out
    assert complete.read_bytes() == before
    Cache.open(complete, "sbu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dataset", ["maps", "labels"])
def test_a_damaged_cache_whose_writer_died_stays_marked(complete, capsys, request, dataset):
    with CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES) as writer:
        os.pwrite(writer.fd, b"\x55\x55", writer.offsets[dataset][1])
    holder = request.getfixturevalue("holder")
    holder.kill()
    holder.wait()
    before = complete.read_bytes()
    with pytest.raises(UserError, match=f"is damaged .*/{dataset} of image 1 is not what was"):
        Cache.open(complete)
    assert complete.read_bytes() == before and capsys.readouterr().out == ""


def test_a_mark_is_left_where_no_lock_tells_whose_it_is(complete, holder, monkeypatch):
    holder.kill()
    holder.wait()
    refuse_locks(monkeypatch, errno.ENOLCK)
    with pytest.raises(UserError, match="has no locks .*h5clear -s"):
        Cache.open(complete)


def refuse_locks(monkeypatch, number: int) -> None:
    """Makes this a file system without locks, for HDF5 and for our own."""
    opened = h5py.File

    def without_locks(name, mode, locking=True):
        if locking:
            raise OSError(number, "Unable to synchronously open file (unable to lock file)")
        return opened(name, mode, locking=False)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(h5py, "File", without_locks)
    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_will_do(complete, monkeypatch, number):
    refuse_locks(monkeypatch, number)
    assert Cache.open(complete, "sbu").texts == ("shadow", "glass")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/features.h5 cannot be created .*set another RUN_DIR"
    ):
        CacheWriter.open_or_create(tmp_path / "file" / "features.h5", LAYOUT, ATTRIBUTES)


def test_a_truncated_file_is_named(complete):
    os.truncate(complete, complete.stat().st_size // 2)
    with pytest.raises(UserError, match=r"features.h5 is damaged .*truncated.* delete it and run"):
        Cache.open(complete)
    with pytest.raises(UserError, match=r"features.h5 is damaged .*truncated.* delete it and run"):
        CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES)


def test_a_file_that_is_not_hdf5_is_named(path):
    path.parent.mkdir()
    path.write_text("no HDF5\n" * 100)
    with pytest.raises(UserError, match=r"features.h5 is damaged or not a feature cache"):
        Cache.open(path)


def test_an_hdf5_file_of_something_else_is_named(path):
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(UserError, match=r"features.h5 is damaged or not a feature cache"):
        Cache.open(path)


def test_arrays_that_do_not_fit_each_other_are_named(complete):
    with h5py.File(complete, "r+") as file:
        del file["maps"]
        file["maps"] = np.zeros((4, 1, 4, 4), np.float16)
    with pytest.raises(
        UserError, match=r"/maps is float16 \(4, 1, 4, 4\) and not float16 \(4, 2, 4, 4\)"
    ):
        Cache.open(complete)


def test_another_format_is_named(complete):
    with h5py.File(complete, "r+") as file:
        file.attrs["format"] = 99
    with pytest.raises(
        UserError, match=r"features.h5 has cache format 99.*delete it and run 01_cache"
    ):
        Cache.open(complete)


def test_a_missing_cache_names_the_script_that_makes_it(path):
    with pytest.raises(
        UserError, match=r"features.h5 does not exist: run 01_cache\S+ TASK=msd first"
    ):
        Cache.open(path, "msd", "01_cache_features.py TASK=msd")


def test_a_cache_of_another_task_names_both(complete):
    with pytest.raises(UserError, match=r"features.h5 holds features of sbu, not msd"):
        Cache.open(complete, "msd")


@pytest.mark.parametrize("array", ["embedding", "maps"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])  # 1e6 is infinite in float16
def test_values_that_are_not_finite_are_refused_with_the_images_name(path, array, bad):
    CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES).close()
    before = path.read_bytes()
    values = entry(1)
    values[array][1, 2, 3] = bad
    with (
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer,
        pytest.raises(UserError, match=r"of naïve holds NaN or infinite values"),
    ):
        writer.write(1, **values)
    assert path.read_bytes() == before


def test_an_embedding_that_went_bad_on_the_disk_is_named_when_it_is_read(complete):
    with h5py.File(complete, "r+") as file:
        file["embeddings"][1, 0, 0, 0] += 1
    opened = Cache.open(complete)
    assert opened.embedding([0, 2, 3]).isfinite().all()
    with pytest.raises(
        UserError, match=r"features.h5 is damaged \(/embeddings of naïve is not what was written\)"
    ):
        opened.embeddings(np.array([[0, 0], [1, 0]]))


def test_embeddings_that_another_tool_compressed_are_refused(complete):
    with h5py.File(complete, "r+") as file:
        values = file["embeddings"][:]
        del file["embeddings"]
        file.create_dataset(
            "embeddings", data=values, chunks=(1, *values.shape[1:]), compression="gzip"
        )
    with pytest.raises(
        UserError, match="compressed or chunked anew .*h5repack -f NONE -l embeddings:CHUNK=1x"
    ):
        Cache.open(complete)


def test_an_embedding_whose_chunk_is_gone_is_named_when_it_is_read(complete):
    with h5py.File(complete, "r+") as file:
        values = file["embeddings"][:1]
        shape = file["embeddings"].shape
        del file["embeddings"]
        embeddings = file.create_dataset("embeddings", shape, values.dtype, chunks=(1, *shape[1:]))
        embeddings[0] = values[0]
    opened = Cache.open(complete)
    assert opened.embedding([0]).isfinite().all()
    with pytest.raises(UserError, match="features.h5 is damaged .*/embeddings of naïve"):
        opened.embedding([1])


@pytest.mark.parametrize("dataset", SUMMED)
def test_a_single_bit_that_went_bad_in_any_dataset_is_noticed(complete, dataset):
    with CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES) as writer:
        place = writer.offsets[dataset][1] + 1
    content = bytearray(complete.read_bytes())
    content[place] ^= 4
    complete.write_bytes(content)
    opened, samples = Cache.open(complete), np.array([[0, 0], [1, 0]])
    read = {
        "embeddings": opened.embeddings,
        "maps": opened.maps,
        "truth_grid": opened.truth_grid,
        "truth_centres": opened.truth_centres,
        "present": lambda _: opened.samples("test"),
        "labels": lambda _: opened.label_map(samples[1]),
        "pictures": lambda _: opened.picture(samples[1]),
    }[dataset]
    with pytest.raises(UserError, match=f"/{dataset} of naïve is not what was written"):
        read(samples)


def test_texts_of_a_training_image_that_went_bad_are_noticed(complete):
    with h5py.File(complete, "r+") as file:
        row = int(file["shots"][0, 0])
        file["present"][row] = 0
    opened = Cache.open(complete)
    with pytest.raises(UserError, match="/present of .* is not what was written"):
        opened.training_set(0, 1, torch.device("cpu"))
    made_with = {"shots": 0, "every_text": True}
    with pytest.raises(UserError, match="/present of .* is not what was written"):
        choose_texts(("all",), opened, made_with)


def test_a_label_map_of_another_size_names_the_image(path):
    with (
        CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer,
        pytest.raises(UserError, match=r"naïve is now \(5, 9\) pixels, but \(9, 5\) in"),
    ):
        writer.write(1, **entry(1) | {"label_map": np.zeros((5, 9), np.uint8)})


@pytest.mark.parametrize("array, wrong", [("label_map", np.int64), ("picture", np.float32)])
def test_an_array_of_another_type_is_not_written_over_its_neighbours(path, array, wrong):
    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        before = path.read_bytes()
        with pytest.raises(ValueError, match=np.dtype(wrong).name):
            writer.write(1, **entry(1) | {array: entry(1)[array].astype(wrong)})
    assert path.read_bytes() == before


# ---- reading -------------------------------------------------------------------------------------


def test_samples_are_the_shots_and_the_test_images_with_the_texts_they_hold(complete):
    opened = Cache.open(complete, "sbu")
    assert opened.samples("train").tolist() == [[2, 0], [0, 1]]
    assert opened.samples("test").tolist() == [[1, 0], [1, 1], [3, 0]]


def test_an_empty_mask_of_a_binary_task_is_evaluated(path):
    values = entry(1) | {"label_map": np.zeros((9, 5), np.uint8), "maps": entry(1)["maps"][:1]}
    layout = replace(
        LAYOUT, names=["naïve"], splits=["test"], sizes=[(9, 5)], shots=[], texts=["shadow"]
    )
    with CacheWriter.open_or_create(path, layout, ATTRIBUTES) as writer:
        writer.write(0, **values)
    opened = Cache.open(path)
    assert opened.samples("test").tolist() == [[0, 0]]
    assert opened.samples("train").shape == (0, 2)


def test_samples_are_read_in_the_order_asked_for(complete):
    opened, samples = Cache.open(complete), np.array([[2, 1], [0, 0], [2, 0]])
    embeddings, maps = opened.embeddings(samples), opened.maps(samples)
    grid, centres = opened.truth_grid(samples), opened.truth_centres(samples)
    assert embeddings.dtype == torch.float16
    assert maps.dtype == grid.dtype == torch.float32
    for i, (row, text) in enumerate(samples):
        expected = entry(row)
        assert np.array_equal(embeddings[i], expected["embedding"].astype(np.float16))
        assert np.array_equal(maps[i], expected["maps"][text].astype(np.float16))
        assert np.array_equal(grid[i], truth_on_grid(expected["label_map"], text + 1, (4, 4)))
        assert np.array_equal(
            centres[i], truth_at_centres(expected["label_map"], text + 1, 800, 80)
        )


def test_more_rounds_than_one_training_sample_has_patches_are_refused(complete):
    opened, device = Cache.open(complete, "sbu"), torch.device("cpu")
    centres = opened.truth_centres(opened.samples("train"))
    fewest = min(int((of_sample != 255).sum()) for of_sample in centres)
    opened.training_set(0, fewest, device)
    with pytest.raises(UserError, match=f"ROUNDS={fewest + 1} is more than the {fewest} patches"):
        opened.training_set(0, fewest + 1, device)


def test_targets_are_the_samples_own_text_or_any_text_that_its_image_holds(complete):
    shots = Cache.open(complete, "sbu").training_set(0, 1, torch.device("cpu"))
    rows, generator = torch.tensor([0] * 40), torch.Generator().manual_seed(0)
    own, truth = shots.maps_and_truth(rows[:1], False, generator)
    assert torch.equal(own[0], torch.from_numpy(entry(2)["maps"][0].astype(np.float16)).float())
    expected = truth_on_grid(entry(2)["label_map"], 1, (4, 4))
    assert torch.equal(truth[0], torch.from_numpy(expected).float())
    maps, truth = shots.maps_and_truth(rows, True, generator)
    first = [torch.equal(one, shots.every_map[0, 0]) for one in maps]
    assert 5 < sum(first) < 35  # the image holds both texts
    for one, y, is_first in zip(maps, truth, first):
        text = 0 if is_first else 1
        assert torch.equal(one, shots.every_map[0, text])
        assert torch.equal(y, shots.every_truth[0, text])
    maps, _ = shots.maps_and_truth(torch.tensor([1] * 20), True, generator)
    # The other image holds the first text alone.
    assert all(torch.equal(one, shots.every_map[1, 0]) for one in maps)


def test_a_samples_labels_are_its_own_text_against_the_rest(complete):
    labels, stored = Cache.open(complete).label_map((2, 1)), entry(2)["label_map"]
    assert labels.dtype == np.uint8 and labels.shape == (16, 12)
    assert np.array_equal(labels == 1, stored == 2)
    assert np.array_equal(labels == 255, stored == 255)
    assert np.array_equal(labels == 0, stored < 2)


def test_names_pictures_texts_and_attributes_come_back(complete):
    opened = Cache.open(complete)
    assert [opened.name(sample) for sample in [(1, 0), (3, 1)]] == ["naïve", "fourth"]
    assert np.array_equal(opened.picture((3, 0)), entry(3)["picture"])
    with h5py.File(complete, "r") as file:  # a utf-8 string for everyone, not for our reader only
        assert file["names"].asstr()[:].tolist() == LAYOUT.names
        assert file["split"].asstr()[:].tolist() == LAYOUT.splits
    assert opened.texts == ("shadow", "glass") and opened.grid == (4, 4)
    assert opened.attrs["seed"] == 0 and opened.attrs["versions"] == '{"torch": "2.6"}'
    assert opened.attrs["frame"] == 800 and opened.attrs["patch_size"] == 80


def test_one_vit_h_image_takes_the_bytes_of_its_arrays():
    grids = 256 * 64 * 64 * 2 + 2 * 64 * 64 * 2
    arrays = grids + 100 + 1 + 256 * 256 * 3 + 300 * 400 + 2 * 4 + 1 + 2 * 8 + 7 * 4
    assert bytes_per_image((256, 64, 64), 1, (300, 400)) == arrays


# ---- truth ---------------------------------------------------------------------------------------


def test_the_grid_holds_the_foreground_share_of_each_cells_valid_area():
    # A cell of the 2 x 2 grid is 1.5 pixels wide.
    labels = np.array([[1, 1, 0], [2, 255, 1]], np.uint8)
    assert truth_on_grid(labels, 1, (2, 2)).tolist() == [[1, float(np.float16(1 / 3))], [0, 1]]
    assert truth_on_grid(labels, 2, (2, 2)).tolist() == [[0, 0], [1, 0]]


def test_a_cell_that_is_ignored_altogether_is_minus_one():
    labels = np.array([[255, 255, 1, 255]], np.uint8)
    assert truth_on_grid(labels, 1, (1, 2)).tolist() == [[-1, 1]]
    assert truth_on_grid(labels, 1, (1, 8)).tolist() == [[-1, -1, -1, -1, 1, 1, -1, -1]]


@pytest.mark.parametrize("size", [(7, 11), (40, 24), (2, 5)])
def test_the_grid_is_torchs_mean_over_the_map_with_every_pixel_repeated(size):
    labels = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), size)
    fine = torch.from_numpy(labels).repeat_interleave(5, 0).repeat_interleave(3, 1)[None]
    foreground, valid = (
        torch.nn.functional.adaptive_avg_pool2d(mask.double(), (5, 3))[0]
        for mask in (fine == 1, fine != 255)
    )
    expected = torch.where(valid > 0, foreground / valid, -1.0)
    np.testing.assert_allclose(truth_on_grid(labels, 1, (5, 3)), expected, atol=5e-4)


def test_truth_at_centres_reads_the_pixel_under_each_centre_row_by_row():
    # Centres 1, 3 of 4: columns 0, 2, rows 0, 1.
    labels = np.array([[1, 2, 255], [0, 1, 1]], np.uint8)
    assert truth_at_centres(labels, 1, frame=4, patch=2).tolist() == [1, 255, 0, 1]
    assert truth_at_centres(labels, 2, frame=4, patch=2).tolist() == [0, 255, 0, 0]


def test_the_patch_of_a_centre_is_row_times_ten_plus_column():
    labels = np.zeros((10, 10), np.uint8)
    labels[3, 7] = 1
    assert np.flatnonzero(truth_at_centres(labels, 1, 800, 80)).tolist() == [37]


def test_a_centre_on_the_edge_of_two_pixels_takes_the_one_that_starts_there():
    labels = np.zeros((1, 180), np.uint8)
    # Centre c lies at pixel coordinate 18 c + 9; in floats, 280 / 800 * 180 is below 63.
    labels[0, 9::18] = 1
    assert truth_at_centres(labels, 1, 800, 80).tolist() == [1] * 100


def test_the_identity_tells_caches_apart_by_what_made_them_and_not_by_when(complete, tmp_path):
    def identity(name: str, edits: dict[int, dict], layout: Layout = LAYOUT, **changed) -> str:
        with CacheWriter.open_or_create(tmp_path / name, layout, ATTRIBUTES | changed) as writer:
            for row in writer.missing():
                writer.write(row, **entry(row) | edits.get(row, {}))
        return Cache.open(tmp_path / name).identity()

    same = Cache.open(complete).identity()
    assert identity("later.h5", {}, time="now", versions={"torch": "9"}) == same
    assert identity("other.h5", {}, sam="vit_b") != same
    edited = entry(3)["label_map"].copy()
    edited[0, 0] = 1 - min(edited[0, 0], 1)
    # A mask that was mended makes other features of the same name.
    assert identity("edited.h5", {3: {"label_map": edited}}) != same
    assert identity("pictured.h5", {3: {"picture": 255 - entry(3)["picture"]}}) != same
    assert identity("drawn.h5", {}, replace(LAYOUT, shots=LAYOUT.shots[::-1])) != same


def test_a_link_to_a_cache_stays_one_where_skip_lays_it_out_anew(complete):
    there = complete.rename(complete.with_name("elsewhere.h5"))
    complete.symlink_to(there)
    skip_third(complete)
    with h5py.File(there) as file:
        assert complete.is_symlink() and "third" not in [*file["names"].asstr()]


def test_what_a_kill_left_while_skip_laid_the_file_out_is_removed(complete):
    left = [complete.with_name(complete.name + end) for end in (".new", ".new.tmp")]
    for path in left:
        path.touch()
    CacheWriter.open_or_create(complete, LAYOUT, ATTRIBUTES).close()
    assert not any(path.exists() for path in left)


def changed(complete: Path, change) -> Path:
    with h5py.File(complete, "r+") as file:
        change(file)
    return complete


@pytest.mark.parametrize("dataset, place, value, said", [
    ("label_offsets", 1, -1, "/sizes and /label_offsets contradict each other"),
    ("label_offsets", 2, 1, "/sizes and /label_offsets contradict each other"),
    ("sizes", (0, 0), -7, "/sizes and /label_offsets contradict each other"),
    ("shots", (0, 0), 4, "/shots names other than training samples"),
    ("shots", (0, 1), -1, "/shots names other than training samples"),
    ("shots", (0, 0), 1, "/shots names other than training samples"),  # a test image
    ("shots", 1, (2, 0), "or one twice"),
    ("split", 0, b"tset", "/split holds another word"),
])
def test_sizes_and_shots_that_make_no_sense_are_refused(complete, dataset, place, value, said):
    changed(complete, lambda file: file[dataset].__setitem__(place, value))
    with pytest.raises(UserError, match=f"features.h5 is damaged .*{said}.*delete it and run"):
        Cache.open(complete)


@pytest.mark.parametrize(
    "name, value",
    [("branch", "both"), ("clip_size", 0), ("image_size", 400), ("sam", 3), ("precision", "")],
)
def test_an_attribute_that_makes_no_sense_is_named(complete, name, value):
    changed(complete, lambda file: file.attrs.__setitem__(name, value))
    with pytest.raises(
        UserError, match=f"features.h5 is damaged .*its attribute {name} is {value}"
    ):
        Cache.open(complete, "sbu")
    changed(complete, lambda file: file.attrs.__delitem__(name))
    with pytest.raises(UserError, match=f"features.h5 is damaged .*its attribute {name} is None"):
        Cache.open(complete, "sbu")


@pytest.mark.parametrize("frame, patch", [(800, 0), (0, 80), (800, -80), (800, 70), ("800", 80)])
def test_a_patch_that_does_not_divide_the_frame_is_refused(complete, frame, patch):
    changed(complete, lambda file: file.attrs.update(frame=frame, patch_size=patch))
    with pytest.raises(UserError, match="features.h5 is damaged .*does not divide a frame"):
        Cache.open(complete)


def test_a_cache_without_any_test_sample_is_named(path):
    layout = replace(LAYOUT, splits=["train"] * 4)
    with CacheWriter.open_or_create(path, layout, ATTRIBUTES) as writer:
        for row in writer.missing():
            writer.write(row, **entry(row))
    with pytest.raises(
        UserError, match="features.h5 holds no test image with shadow or glass in it"
    ):
        Cache.open(path).samples("test")


def test_a_write_that_fails_names_the_file(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with CacheWriter.open_or_create(path, LAYOUT, ATTRIBUTES) as writer:
        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(OSError) as failure:
            writer.write(0, **entry(0))
    assert failure.value.filename == str(path) and failure.value.errno == errno.EFBIG
