"""A short fault campaign. `make faults` is the long one.

It is seeded, so it tries the same on every machine.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """The finished campaign and its report.

    It runs in a process of its own: it forks the stages, which no thread of another test may
    disturb.
    """
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    constants = ["KILLS=3", "FULL=3", "CLOSED=false", "INPUTS=77", "MASKS=9",
                 "KINDS=stage 1,stage 2"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.campaign", *constants, f"OUT={out}"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


@pytest.mark.parametrize("part", ["killed", "short of space", "damaged files", "masks",
                                  "false claims"])
def test_no_promise_is_broken(campaign, part):
    done, report = campaign
    assert sum(report["tried"][part].values()) >= 3
    violations = [violation for violation in report["violations"] if violation["part"] == part]
    assert violations == [], done.stdout


def test_the_campaign_prints_a_table_and_tells_by_its_exit_status(campaign):
    done, report = campaign
    assert "| part | tried | cases | violated |" in done.stdout
    assert (done.returncode == 0) == (not report["violations"])
