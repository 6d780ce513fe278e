"""A file that cannot be read gets a sentence of its own; damage alone is called damage."""

import errno
import os

import pytest
import torch

from common.cache import Cache
from common.frozen.clip_weights import load_clip
from common.frozen.sam_weights import load_sam
from common.runtime import checkpoint, reading
from common.runtime.errors import UserError

READERS = {
    "features.h5": Cache.open,
    "srm.pt": lambda path: checkpoint.load(path, "02_train_srm.py"),
    "sam.pth": lambda path: load_sam(str(path), torch.device("cpu")),
    "clip.pt": lambda path: load_clip(f"ViT-B-16-quickgelu/{path}", "cpu"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n"
OBSTACLES = {
    "does not exist: ": lambda path: None,
    "is an empty file: delete it, and ": lambda path: path.touch(),
    "is a folder, not a file: ": lambda path: path.mkdir(),
    "is a link to gone, which does not exist: mend the link": lambda path: path.symlink_to("gone"),
    "is a pointer of Git LFS, .*git lfs pull": lambda path: path.write_text(POINTER),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("said", OBSTACLES)
def test_what_lies_in_a_files_place_is_said(tmp_path, name, said):
    OBSTACLES[said](tmp_path / name)
    with pytest.raises(UserError, match=f"^{tmp_path / name} {said}"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("error, said", [
    (OSError(errno.EACCES, ""), "^there is no permission to read "),
    (OSError(errno.EIO, ""), f"cannot be read .{os.strerror(errno.EIO)}.: look whether its disk"),
    (MemoryError(), "^there is too little memory to read "),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "^there is too little memory to "),
])
def test_what_the_machine_lacks_is_not_called_damage(tmp_path, monkeypatch, name, error, said):
    def fail(*_, **__):
        raise error

    path = tmp_path / name
    path.write_bytes(b"a file that can be opened")
    monkeypatch.setattr("h5py.File", fail)
    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(UserError, match=said) as refusal:
        READERS[name](path)
    assert str(path) in str(refusal.value) and "damaged" not in str(refusal.value)


def test_a_place_that_a_damaged_file_only_claims_is_no_fault_of_the_disk(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError), reading.reading(tmp_path / "file", ""):
        raise OSError(errno.EINVAL, "")


def test_a_stopped_training_does_not_start_afresh_where_its_file_is_a_broken_link(tmp_path):
    (tmp_path / "srm.pt").symlink_to("gone")
    with pytest.raises(UserError, match="srm.pt is a link to gone"):
        checkpoint.resume(tmp_path / "srm.pt", "02_train_srm.py", {}, {})
