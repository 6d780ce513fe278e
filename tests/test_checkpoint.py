"""The content of a checkpoint file is checked before it is used, and damage is refused."""

import re
import zipfile

import pytest
import torch

from common.runtime import checkpoint
from common.runtime.errors import UserError

SETTINGS = {"task": "sbu", "branch": "implicit", "seed": 0, "shots": 0, "rounds": 15,
            "every_text": False, "residual": 0.0, "features": "0a"}


def content(**changed) -> dict:
    """What a stage would save, with some entries changed."""
    return {"settings": SETTINGS, "finished": True, "generator": torch.Generator().get_state(),
            "log": [{"step": 1}], "srm": torch.nn.Linear(100, 30).state_dict(), **changed}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "srm.pt"


def load(path, **further):
    return checkpoint.load(path, "02_train_srm.py TASK=sbu", **checkpoint.TRAINING, **further)


def test_what_was_saved_comes_back(path):
    saved = content(settings=SETTINGS | {"heads": 8})
    checkpoint.save(path, saved)
    loaded = load(path)
    assert loaded["settings"] == SETTINGS | {"heads": 8}
    assert torch.equal(loaded["srm"]["weight"], saved["srm"]["weight"])


def test_a_bit_that_marks_a_weight_as_a_folder_is_noticed(path):
    checkpoint.save(path, content())
    file = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        weight = max(parts.infolist(), key=lambda part: part.file_size).filename
    entry = file.rindex(weight.encode()) - 46  # in the zip file's directory
    assert file[entry:entry + 4] == b"PK\x01\x02"
    file[entry + 38] |= 0x10  # of its external attributes
    path.write_bytes(file)
    with pytest.raises(UserError, match="srm.pt is damaged"):
        load(path)


def test_a_single_bit_that_went_bad_in_a_weight_is_noticed(path):
    saved = content()
    checkpoint.save(path, saved)
    stored = bytearray(path.read_bytes())
    stored[stored.find(saved["srm"]["weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(stored)
    sentence = "srm.pt is damaged or was not written by 02_train_srm.py TASK=sbu: delete it"
    with pytest.raises(UserError, match=sentence):
        load(path)


WITHOUT_SEED = {name: value for name, value in SETTINGS.items() if name != "seed"}


@pytest.mark.parametrize("changed", [
    {"settings": {**SETTINGS, "branch": "both"}},
    {"settings": {**SETTINGS, "shots": "all"}},
    {"settings": WITHOUT_SEED},
    {"settings": None},
    {"finished": "yes"},
    {"generator": 3},
    {"log": ["x"]},
    {"log": [{"loss": "low"}]},
])
def test_content_that_no_stage_writes_is_refused(path, changed):
    checkpoint.save(path, content(**changed))
    with pytest.raises(UserError, match="srm.pt is damaged or was not written by 02"):
        load(path)


def test_what_a_stage_needs_beside_must_be_there(path):
    checkpoint.save(path, content())
    with pytest.raises(UserError, match="srm.pt is damaged"):
        load(path, step=int)
    checkpoint.save(path, content(step=3))
    assert load(path, step=int)["step"] == 3


def test_weights_that_are_not_finite_are_refused_and_a_log_that_is_not_is_no_fault(path):
    # a batch without a foreground point has no foreground accuracy
    checkpoint.save(path, content(log=[{"foreground_accuracy": float("nan")}]))
    load(path)
    checkpoint.save(path, content(srm={"weight": torch.tensor([1.0, float("inf")])}))
    sentence = "srm.pt holds NaN or infinite values: delete it and run 02"
    with pytest.raises(UserError, match=sentence):
        load(path)


def test_weights_are_put_where_they_belong(path):
    layer, other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    generator, fresh = torch.Generator().manual_seed(7), torch.Generator()
    stored = {"srm": layer.state_dict(), "generator": generator.get_state()}
    checkpoint.restore(path, stored, srm=other, generator=fresh)
    assert torch.equal(layer.weight, other.weight) and fresh.initial_seed() == 7


def test_weights_and_optimisers_of_another_shape_are_refused_in_one_line(path):
    layer, larger = torch.nn.Linear(4, 2), torch.nn.Linear(5, 2)
    optimizer, other = (torch.optim.Adam(network.parameters()) for network in (layer, larger))
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    sentence = f"{re.escape(str(path))} does not fit the networks"
    for name, part, stored in (("srm", larger, layer), ("optimizer", other, optimizer)):
        with pytest.raises(UserError, match=sentence) as refusal:
            checkpoint.restore(path, {name: stored.state_dict()}, **{name: part})
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="does not fit .*KeyError: 'actor'"):
        checkpoint.restore(path, {}, actor=layer)


def test_a_log_that_cannot_be_read_counts_as_none(tmp_path):
    path = tmp_path / "srm_log.csv"
    too_long_a_field = b'step\n"' + b"1" * 200_000
    for stored in (b"step,loss\n1,x\n", b"step\n\0\n", too_long_a_field, b"\xff\n1\n",
                   b"step\n1,2\n"):
        path.write_bytes(stored)
        assert checkpoint.read_log(path) == []
    path.unlink()
    checkpoint.write_log(path, [{"step": 1, "loss": 0.5}])
    assert checkpoint.read_log(path) == [{"step": 1, "loss": 0.5}]
