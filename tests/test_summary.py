"""Means and spreads over the seeds of finished runs."""

import json

from common.summary import summarise


def test_the_mean_and_the_spread_over_seeds_are_printed_per_task_and_branch(tmp_path):
    folders = []
    for seed, branch, value in ((0, "implicit", 0.2), (1, "implicit", 0.4), (0, "explicit", 0.5)):
        folders.append(tmp_path / f"{branch}{seed}")
        folders[-1].mkdir()
        row = dict.fromkeys(("mIoU", "F", "BER", "E", "MAE", "FR"), value)
        (folders[-1] / "results.json").write_text(json.dumps({
            "task": "demo_semantic", "branch": branch, "images": 240, "seed": seed, "foreground_rate_attainable": 0.25,
            "rows": {"AlignSAM": row, "w/o RL": {**row, "mIoU": value / 2}}}))
    text = summarise(folders)
    implicit, explicit = text.split("**demo_semantic**")[1:]
    assert "implicit branch" in implicit and "seeds 0, 1" in implicit and "attainable 25.0" in implicit
    assert "| AlignSAM | 30.0 ± 10.0 |" in implicit and "| w/o RL | 15.0 ± 5.0 |" in implicit
    assert "0.300 ± 0.100" in implicit  # MAE stays a fraction
    assert "| AlignSAM | 50.0 ± 0.0 |" in explicit
