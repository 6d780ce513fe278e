"""Constants from the command line, errors as sentences with an exit status, atomic writes."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.runtime.errors import UserError
from common.runtime.files import lock, write_atomic
from common.runtime.script import command, device, require_finite, run, run_dir, seed_everything
from common.runtime.settings import at_most, choose, override, positive

ROOT = Path(__file__).resolve().parents[1]


def constants() -> dict[str, object]:
    return {
        "__doc__": "Trains the agent.",
        "ROUNDS": 15,
        "LR": 1e-4,
        "NORM": False,
        "TASK": "demo",
        "SIZES": (1, 2),
        "SRM_STEPS": {"implicit": 1, "explicit": 5},
        "lower": 3,
        "_PRIVATE": 4,
        "NOTHING": None,
    }


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ROUNDS=10", 10),
        ("LR=3", 3.0),
        ("LR=1e-3", 0.001),
        ("NORM=true", True),
        ("NORM=1", True),
        ("NORM=False", False),
        ("TASK=a=b", "a=b"),
        ("TASK=", ""),
        ("SIZES=4,5,6", (4, 5, 6)),
        ("SIZES=4", (4,)),
        ("SRM_STEPS=3", {"implicit": 3, "explicit": 3}),
        ("SRM_STEPS=implicit:2,explicit:4", {"implicit": 2, "explicit": 4}),
        ("SRM_STEPS=explicit:4", {"implicit": 1, "explicit": 4}),
    ],
)
def test_a_value_is_read_as_its_constants_type(argument, value):
    given = constants()
    override(given, [argument])
    name = argument.split("=")[0]
    assert given[name] == value and type(given[name]) is type(value)
    assert given == constants() | {name: value}


@pytest.mark.parametrize(
    "argument",
    ["ROUNDS=10.5", "ROUNDS=", "LR=fast", "LR=nan", "NORM=yes", "SIZES=1,,2", "SIZES=1.5",
     "SRM_STEPS=other:2"],
)
def test_a_value_of_another_type_is_refused(argument):
    given = constants()
    sentence = f"^{argument} does not read as .*ROUNDS=15.*=implicit:1,explicit:5$"
    with pytest.raises(UserError, match=sentence):
        override(given, ["TASK=sbu", argument])
    assert given == constants()


@pytest.mark.parametrize("argument", ["ROUND=3", "rounds=3", "--rounds=3"])
def test_an_unknown_constant_is_refused_with_the_nearest_name(argument):
    with pytest.raises(UserError, match="did you mean ROUNDS"):
        override(constants(), [argument])


@pytest.mark.parametrize("name", ["lower", "_PRIVATE", "NOTHING", "__doc__"])
def test_only_constants_of_plain_types_can_be_given(name):
    with pytest.raises(UserError, match=f"there is no constant {name}"):
        override(constants(), [f"{name}=3"])


def test_an_argument_that_is_not_name_value_is_refused():
    with pytest.raises(UserError, match="'ROUNDS' is not of the form NAME=value"):
        override(constants(), ["ROUNDS", "3"])


def test_a_value_whose_quotes_the_shell_has_taken_is_shown_with_them():
    with pytest.raises(UserError, match=r"""'bolt' is not .* needs quotes: TASK="rusty bolt"\);"""):
        override(constants(), ["TASK=rusty", "bolt"])


@pytest.mark.parametrize("word", ["help", "--help"])
def test_help_lists_the_constants_and_exits_with_0(word, capsys):
    with pytest.raises(SystemExit) as stop:
        override(constants(), ["ROUNDS=3", word])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Trains the agent." in printed and "NAME=value" in printed
    listed = {"ROUNDS=15", "NORM=false", "SIZES=1,2", "SRM_STEPS=implicit:1,explicit:5"}
    assert listed <= set(printed.split())


@pytest.mark.parametrize(
    ("name", "value"), [("ROUNDS", 0), ("LR", -1.0), ("SIZES", (1, 0)), ("SRM_STEPS", {"a": 0})]
)
def test_a_constant_that_must_be_positive_is_named(name, value):
    positive(constants(), "ROUNDS", "LR", "SIZES", "SRM_STEPS")
    with pytest.raises(UserError, match=f"^{name}=.* greater than 0"):
        positive(constants() | {name: value}, "ROUNDS", "LR", "SIZES", "SRM_STEPS")


def test_a_script_prints_one_sentence_and_exits_with_1(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        '"""Doubles.\n\nA number.\n"""\n\n'
        "from common.runtime.script import run\n"
        "TASK, ROUNDS = 'voc', 15\n\n\n"
        "def main():\n"
        "    print(ROUNDS * 2)\n\n\n"
        'if __name__ == "__main__":\n'
        "    run(main, globals())\n"
    )

    def call(argument):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, script, argument], env=environment,
                              capture_output=True, text=True)

    good, bad = call("ROUNDS=4"), call("ROUNDS=four")
    assert (good.returncode, good.stdout, good.stderr) == (0, "Doubles. TASK=voc\n8\n", "")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr == ("error: ROUNDS=four does not read as a whole number; "
                          "the constants are TASK=voc, ROUNDS=15\n")


@pytest.fixture
def stopped(monkeypatch, capsys):
    """A function that runs a main which raises `error`, and returns (exit code, stderr)."""

    def call(error):
        def main():
            raise error

        monkeypatch.setattr(sys, "argv", ["script.py"])
        with pytest.raises(SystemExit) as stop:
            run(main, {})
        return stop.value.code, capsys.readouterr().err

    return call


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(stopped):
    code, printed = stopped(KeyboardInterrupt())
    assert code == 130 and printed.strip() == "stopped; run the same command to go on"


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "free some"), (errno.EFBIG, "ulimit -f"), (errno.EROFS, "choose a folder"),
     (errno.EACCES, "change its permissions"),
     (errno.EISDIR, "a folder has that name: move it away")],
)
def test_a_disk_error_names_the_path_and_the_mend(stopped, number, mend):
    code, _ = stopped(OSError(number, os.strerror(number), "runs/demo/agent.pt"))
    assert code.startswith("error: ") and "runs/demo/agent.pt" in code and mend in code


def test_any_other_error_of_the_system_names_path_and_reason(stopped):
    code, _ = stopped(OSError(errno.ENAMETOOLONG, "", "masks/long.png"))
    assert code == (f"error: masks/long.png cannot be used ({os.strerror(errno.ENAMETOOLONG)}): "
                    "look at it, or choose another place")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough "
                                                               "memory: you tried to allocate")])
def test_too_little_memory_is_a_sentence(stopped, error):
    code, _ = stopped(error)
    assert code.startswith("error: out of memory: set smaller sizes or batches")


@pytest.mark.parametrize("error", [OSError("of a library"), RuntimeError("a bug")])
def test_an_error_that_the_user_cannot_mend_is_not_hidden(monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error), match=str(error)):
        run(main, {})


@pytest.fixture
def printing(tmp_path):
    """A script that prints a dash that not every encoding has, and then writes a file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tqdm import tqdm\n"
        "from common.runtime.script import run\n\n\n"
        "def main():\n"
        "    print('0 \\u2013 1' + 100_000 * ' ', file=sys.stderr)\n"
        "    Path('done').write_text(str(sum(tqdm(range(3)))))\n"
        "    print('0 \\u2013 1' + 100_000 * ' ')\n\n\n"
        "run(main, {})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}

    def call(redirection):
        command = f"{shlex.quote(sys.executable)} script.py {redirection}"
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)
        return done, (tmp_path / "done").exists()

    return call


def test_a_character_that_the_terminal_lacks_stops_nothing(printing):
    done, whole = printing("")
    assert done.returncode == 0 and whole
    assert done.stdout.startswith("0 \\u2013 1") and done.stderr.startswith("0 \\u2013 1")


def test_closed_streams_change_nothing(printing):
    done, whole = printing(">&- 2>&-")
    assert done.returncode == 0 and whole


def test_a_reader_that_has_gone_ends_a_script_without_a_word(printing):
    done, whole = printing("2>/dev/null | true")
    assert done.returncode in (0, 141) and whole
    done, _ = printing("2>&1 >/dev/null | cat")
    assert "Traceback" not in done.stdout and "BrokenPipe" not in done.stderr


def test_the_backend_that_a_notebook_exports_changes_nothing():
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", "import common.results.pictures"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_spaces_after_commas_do_not_count():
    given = {"SIZES": (1, 2), "ROWS": ("a", "b"), "STEPS": {"x": 1, "y": 2}}
    override(given, ["SIZES=3, 4", "ROWS=c, d e", "STEPS=x: 5, y:6"])
    assert given == {"SIZES": (3, 4), "ROWS": ("c", "d e"), "STEPS": {"x": 5, "y": 6}}


def test_a_number_that_no_library_takes_is_refused():
    with pytest.raises(UserError, match="^ROUNDS=2147483648 must be below 2.31"):
        positive(constants() | {"ROUNDS": 2**31}, "ROUNDS")


def test_auto_takes_the_accelerator_there_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device("auto") == torch.device("cpu")


def test_a_device_that_is_absent_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:x", "gpu", "", "cuda:", "cuda:01", "cuda:\u0661", "cpu:3", "mps:7",
                 "cuda:99999999999999999999", "cuda:" + "9" * 5000):
        with pytest.raises(UserError, match=f"DEVICE={name} is not on this machine.*cuda"):
            device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="DEVICE=cuda is not on this machine"):
        device("cuda")


def test_a_size_beyond_any_use_is_refused():
    at_most({"IMAGE_SIZE": 4096}, 4096, "IMAGE_SIZE")
    with pytest.raises(UserError, match="^CLIP_SIZE=160000 is more than .* set it to 4096 or less"):
        at_most({"IMAGE_SIZE": 800, "CLIP_SIZE": 160_000}, 4096, "IMAGE_SIZE", "CLIP_SIZE")


def test_a_run_lies_under_runs_unless_a_folder_is_given():
    assert run_dir("", "sbu") == Path("runs/sbu")
    assert run_dir("elsewhere", "sbu") == Path("elsewhere")


def test_a_printed_command_can_be_pasted_into_a_shell():
    constants = {"TASK": "folder", "RUN_DIR": "my runs/a", "FEATURES": "", "SEED": 0}
    printed = command("02_train_srm.py", constants)
    assert shlex.split(printed) == ["02_train_srm.py", "TASK=folder", "RUN_DIR=my runs/a"]
    unquoted = command("02_train_srm.py", constants | {"RUN_DIR": "runs/a"})
    assert unquoted == "02_train_srm.py TASK=folder RUN_DIR=runs/a"
    constants = {"TASK": "msd", "RUN_DIR": "", "FEATURES": "", "SHOTS": 5, "SEED": 0}
    shared = command("03_train_agent.py", constants, ("SHOTS", "SEED"))
    assert shared == "03_train_agent.py TASK=msd SHOTS=5"


def test_a_seed_repeats_every_generator():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    first = draw()
    assert all(a != b for a, b in zip(first, draw()))
    seed_everything(3)
    assert draw() == first


def test_a_write_replaces_the_file_whole(tmp_path):
    path = tmp_path / "new" / "log.csv"
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("step,loss\n2")
        assert path.read_text() == "step,loss\n1"

    write_atomic(path, lambda temporary: temporary.write_text("step,loss\n1"))
    write_atomic(path, write)
    assert path.read_text() == "step,loss\n2" and os.listdir(path.parent) == ["log.csv"]
    assert seen[0].suffix == ".csv" and seen[0].parent == path.parent and seen[0] != path


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "agent.pt"
    path.write_text("PK, old")

    def write(temporary):
        temporary.write_text("half of i")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, write)
    assert path.read_text() == "PK, old" and os.listdir(tmp_path) == ["agent.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to stand for a full disk")
def test_a_full_disk_is_named_by_the_path_that_was_asked_for(tmp_path):
    def write(temporary):
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x")

    path = tmp_path / "agent.pt"
    with pytest.raises(OSError) as failure:
        write_atomic(path, write)
    assert failure.value.errno == errno.ENOSPC and failure.value.filename == str(path)
    assert os.listdir(tmp_path) == []


def test_a_file_in_a_folders_place_is_named(tmp_path, stopped):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileExistsError) as failure:
        write_atomic(tmp_path / "runs" / "log.csv", lambda temporary: None)
    code, _ = stopped(failure.value)
    assert f"{tmp_path / 'runs'} should be a folder" in code


def test_a_second_process_on_a_run_folder_is_told_so_and_a_third_may_follow(tmp_path):
    program = ("from pathlib import Path\n"
               "from common.runtime.files import lock\n"
               f"lock(Path({str(tmp_path)!r}))\n"
               "print('held', flush=True)\n"
               "input()\n")
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is working in"):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    lock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_not_finite_is_named():
    require_finite({"loss": 0.5}, "in step 1")
    with pytest.raises(UserError, match="value loss is nan in episode 3"):
        require_finite({"loss": 0.5, "value_loss": float("nan")}, "in episode 3")


def test_constants_that_a_script_imports_cannot_be_given_and_help_shows_the_comments(
        tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("from other import DROP\n\n"
                      "STEPS = 600  # optimiser steps\n"
                      "NAMES = (\n    'a',)  # of them\n")
    constants = {"__file__": str(script), "DROP": 0.4, "STEPS": 600, "NAMES": ("a",)}
    with pytest.raises(UserError, match="there is no constant DROP"):
        override(constants, ["DROP=0.1"])
    override(constants, ["STEPS=5"])
    assert constants["STEPS"] == 5 and constants["DROP"] == 0.4
    with pytest.raises(SystemExit):
        override(constants, ["help"])
    printed = capsys.readouterr().out
    assert "STEPS=5" in printed and "optimiser steps" in printed and "of them" in printed
    assert "DROP" not in printed


def test_names_are_chosen_once_each_or_all_of_them():
    assert choose("CLASSES", ("all",), ("dog", "cat")) == ["dog", "cat"]
    assert choose("CLASSES", ("cat", "cat"), ("dog", "cat")) == ["cat"]
    with pytest.raises(UserError, match="CLASSES names 'cow': set it to all, or .*: dog, cat"):
        choose("CLASSES", ("cat", "cow"), ("dog", "cat"))
    with pytest.raises(UserError, match="CLASSES names all and others: .*: dog, cat"):
        choose("CLASSES", ("all", "dog"), ("dog", "cat"))
