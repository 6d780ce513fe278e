"""What is settled before torch is imported: Ctrl-C without a traceback, and threads that sleep."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted([*ROOT.glob("[0-9][0-9]_*.py"), *(
    path for folder in ("common", "tests") for path in (ROOT / folder).rglob("*.py")
    if any(line.startswith("if __name__ ==") for line in path.read_text().splitlines()))])
# a torch that says it is being imported and goes on with that until it is told to stop
TORCH = """
import os, sys, time
print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
if "WAIT" in os.environ:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise SystemExit("a KeyboardInterrupt during an import")
sys.exit()
"""


def heed_ctrl_c() -> None:
    """Tests may run in the background of a shell, where programs inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Starts a script with a torch that only prints OMP_WAIT_POLICY and ends, or sleeps."""
    (tmp_path / "torch.py").write_text(TORCH)

    def start(**variables: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        environment |= {"PYTHONPATH": str(tmp_path), **variables}
        # not by its path: the script's own folder comes before PYTHONPATH
        return subprocess.Popen([sys.executable, ROOT / "03_train_agent.py"], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                preexec_fn=heed_ctrl_c)

    return start


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_program_imports_it_before_all_else(program):
    first = next(node for node in ast.parse(program.read_text()).body
                 if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert ast.unparse(first) == "import common.runtime.first"


@pytest.mark.parametrize("own, seen", [
    ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None"),
])
def test_torchs_threads_sleep_while_they_wait_unless_the_user_says_otherwise(start, own, seen):
    assert start(**own).communicate()[0].strip() == seen


def test_ctrl_c_while_torch_is_imported_ends_with_one_line(start):
    process = start(WAIT="")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "\nstopped; run the same command to go on\n")


def test_ctrl_c_after_the_imports_is_an_exception_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import common.runtime.first\nimport os, signal\n"
                      "from common.runtime.script import run\n"
                      "def main():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
                      "    finally:\n        print('closed')\n"
                      "run(main, {})\n")
    done = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, preexec_fn=heed_ctrl_c)
    assert (done.returncode, done.stdout) == (130, "closed\n")


def test_a_test_or_notebook_that_loads_it_keeps_its_own_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    sys.modules.pop("common.runtime.first", None)
    import common.runtime.first  # noqa: F401
    assert signal.getsignal(signal.SIGINT) is before
