"""What a checkpoint file claims is checked before it is used, and what was damaged is refused."""

import re

import pytest
import torch

from common.runtime import checkpoint
from common.runtime.errors import UserError

SETTINGS = {"task": "sbu", "branch": "implicit", "seed": 0, "shots": 0, "rounds": 15, "every_text": False,
            "residual": 0.0, "features": "0a"}


def content(**changed) -> dict:
    return {"settings": SETTINGS, "finished": True, "generator": torch.Generator().get_state(), "log": [{"step": 1}],
            "srm": torch.nn.Linear(100, 30).state_dict(), **changed}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "srm.pt"


def load(path, **further):
    return checkpoint.load(path, "02_train_srm.py TASK=sbu", **checkpoint.TRAINING, **further)


def test_what_was_saved_comes_back(path):
    saved = content()
    checkpoint.save(path, saved)
    loaded = load(path)
    assert loaded["settings"] == SETTINGS and torch.equal(loaded["srm"]["weight"], saved["srm"]["weight"])


def test_a_single_bit_that_went_bad_in_a_weight_is_noticed(path):
    saved = content()
    checkpoint.save(path, saved)
    stored = bytearray(path.read_bytes())
    stored[stored.find(saved["srm"]["weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(stored)
    with pytest.raises(UserError, match="srm.pt is damaged or was not written by 02_train_srm.py TASK=sbu: delete it"):
        load(path)


@pytest.mark.parametrize("changed", [
    {"settings": {**SETTINGS, "branch": "both"}}, {"settings": {**SETTINGS, "shots": "all"}},
    {"settings": {name: value for name, value in SETTINGS.items() if name != "seed"}}, {"settings": None},
    {"finished": "yes"}, {"generator": 3}, {"log": ["x"]}, {"log": [{"loss": "low"}]},
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
    checkpoint.save(path, content(log=[{"foreground_accuracy": float("nan")}]))  # a batch without a foreground point
    load(path)
    checkpoint.save(path, content(srm={"weight": torch.tensor([1.0, float("inf")])}))
    with pytest.raises(UserError, match="srm.pt holds NaN or infinite values: delete it and run 02"):
        load(path)


def test_weights_are_put_where_they_belong(path):
    layer, other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    generator = torch.Generator().manual_seed(7)
    checkpoint.restore(path, {"srm": layer.state_dict(), "generator": generator.get_state()}, srm=other,
                       generator=(fresh := torch.Generator()))
    assert torch.equal(layer.weight, other.weight) and fresh.initial_seed() == 7


def test_weights_and_optimisers_of_another_shape_are_refused_in_one_line(path):
    layer, larger = torch.nn.Linear(4, 2), torch.nn.Linear(5, 2)
    optimizer, other = torch.optim.Adam(layer.parameters()), torch.optim.Adam(larger.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for name, part, stored in (("srm", larger, layer), ("optimizer", other, optimizer)):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} does not fit the networks") as refusal:
            checkpoint.restore(path, {name: stored.state_dict()}, **{name: part})
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="does not fit .*KeyError: 'actor'"):
        checkpoint.restore(path, {}, actor=layer)


def test_a_log_that_cannot_be_read_counts_as_none(tmp_path):
    path = tmp_path / "srm_log.csv"
    for stored in (b"step,loss\n1,x\n", b"step\n\0\n", b"step\n" + b'"' + b"1" * 200_000, b"\xff\n1\n", b"step\n1,2\n"):
        path.write_bytes(stored)
        assert checkpoint.read_log(path) == []
    checkpoint.write_log(path, [{"step": 1, "loss": 0.5}])
    assert checkpoint.read_log(path) == [{"step": 1, "loss": 0.5}]
