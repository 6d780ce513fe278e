"""The Makefile's targets: what `make help` lists, and what `make row` hands to the scripts."""

import re
import shlex
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*arguments: str) -> list[str]:
    """The lines that make prints."""
    done = subprocess.run(["make", "--silent", *arguments], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    return done.stdout.splitlines()


def test_help_lists_every_target():
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(line.partition(":")[0] for line in make("help")) == sorted(phony.split())


@pytest.mark.parametrize("prompt", ["rusty bolt", "it's a \"bolt\"", "$(x) `y` ; z"])
def test_row_hands_a_prompt_to_stage_1_as_one_word(prompt):
    lines = make("--dry-run", "row", "TASK=folder", "PROMPT=" + prompt.replace("$", "$$"))
    [stage_1] = [shlex.split(line) for line in lines if "01_cache_features.py" in line]
    assert f"PROMPT={prompt}" in stage_1
    assert not any("PROMPT" in line for line in lines if "02_train_srm.py" in line)


def test_row_without_a_prompt_gives_stage_1_none():
    lines = make("--dry-run", "row", "TASK=duts", "STAGE1=SAM=vit_h CLIP=ViT-B-16/openai")
    [stage_1] = [shlex.split(line) for line in lines if "01_cache_features.py" in line]
    assert stage_1[1:] == ["01_cache_features.py", "TASK=duts", "DEVICE=auto", "SAM=vit_h",
                           "CLIP=ViT-B-16/openai"]


def test_row_hands_a_data_set_to_stage_1_and_a_branch_to_stage_2():
    lines = make("--dry-run", "row", "DATA_DIR=my data", "STAGE2=BRANCH=implicit")
    for given, script in (("DATA_DIR=my data", "01_cac"), ("BRANCH=implicit", "02_train")):
        assert [script in line for line in lines if given in shlex.split(line)] == [True]


def test_tables_are_handed_masks_and_a_data_set_as_one_word_each():
    given = "U-Net:my masks/{seed},it's:b"
    *_, line = make("--dry-run", "tables", f"MASKS={given}", "DATA_DIR=my data")
    assert f"MASKS={given}" in shlex.split(line) and "DATA_DIR=my data" in shlex.split(line)
    *_, line = make("--dry-run", "tables")
    assert "MASKS" not in line and "DATA_DIR" not in line
