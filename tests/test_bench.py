"""The benchmark: both sides of every workload agree, its table and its file hold them all.

No time is asserted.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from common.results import bench
from common.runtime.errors import UserError
from common.standin.model import build_sam as stand_in

TINY = {"SAM": "demo", "IMAGES": 2, "BATCH": 1, "PROMPTED": 2, "EPISODE_IMAGES": 2, "CACHED": 2,
        "MASKS": 3, "REPEATS": 1, "DEVICE": "cpu", "_ROUNDS": 3, "_EPOCHS": 4}
NAMES = ("embed", "prompt", "episode", "cache", "metrics")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, dict]:
    """What is printed and what is written, with tiny constants and the stand-in SAM."""
    path, printed = tmp_path_factory.mktemp("bench") / "runs" / "bench.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in (TINY | {"OUT": str(path)}).items():
            patch.setattr(bench, name, value)
        bench.main()
    return printed.getvalue(), json.loads(path.read_text())


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """The constants of `whole` for a test of its own; returns the folder of bench.json."""
    for name, value in (TINY | {"OUT": str(tmp_path / "bench.json")}).items():
        monkeypatch.setattr(bench, name, value)
    return tmp_path


def test_the_table_and_the_file_hold_every_workload(whole):
    printed, report = whole
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(NAMES)
    assert {line.count("|") for line in lines} == {6}  # no share of ceilings on a CPU
    assert tuple(report["workloads"]) == NAMES
    for line, entry in zip(lines[2:], report["workloads"].values()):
        assert line.startswith(f"| {entry['title']} |") and entry["comparison"] in line
        assert "beyond" not in line
    assert report["torch"] == torch.__version__ and report["threads"] == torch.get_num_threads()
    assert report["device"] in printed and report["torch"] in printed


@pytest.mark.parametrize("name", NAMES)
def test_the_two_sides_come_to_the_same_result(whole, name):
    entry = whole[1]["workloads"][name]
    assert entry["agrees"]
    if name == "embed":
        assert 0.999 <= entry["figure"] <= 1.0001
    else:
        limits = {"prompt": 1e-3, "episode": 1e-5, "cache": 0, "metrics": 1e-12}
        assert 0 <= entry["figure"] <= limits[name]


def test_a_roll_out_keeps_one_mask_where_the_reference_keeps_every_channel(whole):
    printed, report = whole
    entry = report["workloads"]["episode"]
    # rounds, images, the stand-in's grid, float32
    assert entry["kept_bytes"] == 3 * 2 * 32 * 32 * 4
    assert entry["reference_kept_bytes"] == 64 * entry["kept_bytes"]
    assert printed.count("keeps") == 2


def test_the_episode_trains_the_actor(tiny, monkeypatch):
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    sides = bench.episode(stand_in().eval().requires_grad_(False), tiny)
    trained, _ = sides.ours()
    assert (trained - 1 / 100).abs().max() > 1e-4  # no longer the uniform policy that it starts as


def test_sides_that_differ_are_marked_and_end_in_a_sentence(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WORKLOADS", ("metrics",))
    unknown = dict.fromkeys(("IoU", "F", "BER", "E", "MAE"), float("nan"))
    monkeypatch.setattr(bench, "evaluate_mask", lambda *_: unknown)
    with pytest.raises(UserError, match="the two sides of metrics differ"):
        bench.main()
    assert "largest difference not finite, **beyond 1e-09** |" in capsys.readouterr().out
    entry = json.loads((tiny / "bench.json").read_text())["workloads"]["metrics"]
    assert not entry["agrees"] and entry["figure"] is None


def test_ceilings_give_the_table_a_column(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WORKLOADS", ("embed", "metrics"))
    monkeypatch.setattr(bench, "ceilings", lambda device: (1e15, 1e12))
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    *_, embed, metrics = [line for line in printed if line.startswith("|")]
    assert "% of compute" in embed and "% of memory" in embed and metrics.endswith("|  |")
    entry = json.loads((tiny / "bench.json").read_text())["workloads"]["embed"]
    assert entry["compute_share"] * entry["seconds"] == pytest.approx(entry["operations"] / 1e15)


def test_work_is_counted_by_operations_and_bytes_and_a_view_moves_none():
    a, b = torch.ones(3, 4), torch.ones(5, 4)
    assert bench.work_of(lambda: a @ b.T) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15))


def test_an_unknown_workload_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr(bench, "WORKLOADS", ("prompt", "training"))
    with pytest.raises(UserError, match="WORKLOADS names 'training': set it to all, .*: embed, "):
        bench.main()


def test_an_episode_of_one_image_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr(bench, "EPISODE_IMAGES", 1)
    with pytest.raises(UserError, match="EPISODE_IMAGES=1 is too few"):
        bench.main()


def test_an_official_architecture_has_the_same_random_weights_every_time(monkeypatch):
    monkeypatch.setattr(bench, "SAM", "vit_b")
    monkeypatch.setattr(bench, "load_sam", None)  # nothing is loaded
    # the real one takes seconds to build
    monkeypatch.setitem(bench.ARCHITECTURES, "vit_b", stand_in)
    first, again = (bench.build_sam(torch.device("cpu")).state_dict() for _ in range(2))
    original = stand_in().state_dict()
    name = "mask_decoder.iou_token.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], original[name])


def test_a_profile_names_the_dearest_operators_below_the_table(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WORKLOADS", ("prompt",))
    monkeypatch.setattr(bench, "PROFILE", 30)  # nearly all: which come first is a matter of time
    bench.main()
    operators = json.loads((tiny / "bench.json").read_text())["workloads"]["prompt"]["profile"]
    shares = [share for _, share in operators]
    assert 3 < len(operators) <= 30
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert any(name in ("aten::addmm", "aten::mm", "aten::bmm") for name, _ in operators)
    assert f"prompt: {operators[0][0]} {100 * shares[0]:.0f} %" in capsys.readouterr().out
