"""The layout of the repository: imports run one way, the linter is silent, scripts stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in sorted((ROOT / "common").rglob("*.py")) if path.name != "__init__.py"}

# The rooms of common/ in their order. A module imports from its own room and from earlier ones.
ROOMS = [
    "common.runtime",
    "common.frozen",
    "common",  # the method: the modules directly in common/, and common/rivals
    "common.runtime.run",  # this one of runtime opens the cache and the decoder for stages 2 to 4
    "common.results",
    "common.rivals.peft",  # this one of rivals is a program, which opens a run and writes masks
    "common.standin",
    "common.standin.training",
]
LEAVES = ("common.layers",)  # imports nothing of ours, so that any module may import it
# Only runs on the drawn data or the stand-in weights need these two. So any module may import them,
# but only inside the function that needs them.
LAZY = ("common.standin.model", "common.standin.scenes")
SCRIPTS = sorted(path.name for path in ROOT.glob("[0-9][0-9]_*.py"))


def room(module: str) -> int:
    """The place in ROOMS of the room that holds a module."""
    holding = [name for name in ROOMS if f"{module}.".startswith(f"{name}.")]
    return ROOMS.index(max(holding, key=len))


def imports(module: str, source: str) -> list[tuple[str, bool]]:
    """(name, whether inside a function) of every import in the source of `module`.

    Of `from package import name` the name is package.name if that is a module of common/.
    """
    tree = ast.parse(source)
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:  # relative to the module's own package, or to one above it
                parents = module.split(".")[:-node.level]
                package = ".".join([*parents, package]).rstrip(".")
            for alias in node.names:
                name = f"{package}.{alias.name}"
                found.append((name if name in MODULES else package, node in lazy))
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    """What `module` must not import, as sentences."""
    faults = []
    for name, is_lazy in imports(module, source):
        if name.split(".")[0] in ("importlib", "runpy") and name != "importlib.metadata":
            faults.append(f"{module} imports {name}, which can load a numbered script")
        if name.split(".")[0] != "common":
            continue
        if module in LEAVES:
            faults.append(f"{module} imports {name}, but it stands below all others")
        if name in LEAVES:
            continue
        if room(name) > room(module) and not (is_lazy and name in LAZY):
            faults.append(f"{module} imports {name} of a later room")
        if module.startswith("common.standin.") and ROOMS[room(name)] == "common.results":
            faults.append(f"{module} imports {name}, but the stand-in needs no results")
    return faults


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert wrong_imports(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module, line", [
    ("common.runtime.files", "import common.frozen.sam"),
    ("common.runtime.script", "from common.runtime import run"),
    ("common.frozen.sam", "from common import episode"),
    ("common.agent", "from common.runtime.run import open_run"),
    ("common.layers", "from common.runtime.errors import UserError"),
    ("common.agent", "from common.results.paper import paper_row"),
    ("common.agent", "from .results import paper"),
    ("common.agent", "def f():\n    from common.results import paper"),
    ("common.runtime.run", "from common.results import paper"),
    ("common.rivals.lora", "from common.results import paper"),
    ("common.baselines", "from common.rivals.peft import train"),
    ("common.results.report", "from common.standin.model import build_sam"),
    ("common.results.report", "def f():\n    from common.standin.training import train_sam"),
    ("common.standin.scenes", "from common.results.pictures import strip"),
    ("common.standin.scenes", "import common.standin.training.store"),
    ("common.results.tables", "import importlib.util"),
    ("common.results.tables", "from runpy import run_path"),
])
def test_a_wrong_import_is_found(module, line):
    assert len(wrong_imports(module, line)) == 1


@pytest.mark.parametrize("module, line", [
    ("common.runtime.files", "from common.runtime import distributed"),
    ("common.runtime.run", "from common.cache import Cache"),
    ("common.frozen.sam", "def f():\n    from common.standin.model import build_sam"),
    ("common.frozen.sam", "from common.layers import attention"),
    ("common.baselines", "from common.rivals.persam import PerSAM"),
    ("common.rivals.peft", "from common.results.pictures import save_picture"),
    ("common.standin.training.train_clip", "from common.frozen.clip_surgery import ClipSurgery"),
    ("common.results.tables", "import json, importlib.metadata"),
])
def test_a_right_import_is_left_alone(module, line):
    assert wrong_imports(module, line) == []


def test_the_linter_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [*SCRIPTS, "README.md"])
def test_the_scripts_and_the_readme_have_at_most_180_lines(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
