"""Stages killed, short of space and locked out: what happens to their files, and how they go on.

A stage is run in a fork of a process that has imported torch already, which saves the seconds that a start costs and
lets every kill fall into the stage's own work.
"""

import contextlib
import ctypes
import fcntl
import importlib
import json
import mmap
import os
import random
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch

from tests.conftest import ROOT, STAGES, arrays, draw_data
from tests.test_stages import same_weights

# what a stage is killed in, and the function that does one unit of work: an entry, a step, an episode, or that keeps a
# row or an image
KINDS = {
    "stage 1": ("01_cache_features.py", [], ("common.cache", "CacheWriter.write")),
    "stage 2": ("02_train_srm.py", [], ("common.srm", "train_step")),
    "stage 3": ("03_train_agent.py", [], ("common.agent", "ppo_update")),
    "stage 4": ("04_evaluate.py", [], ("common.runtime.checkpoint", "save")),
    "own images": ("04_evaluate.py", ["IMAGES=data/test/images"], ("common.results.own_images", "write_part")),
}
MAY_LOSE = {"stage 1": 0, "stage 2": 2, "stage 3": 1, "stage 4": 0, "own images": 0}  # finished units; SAVE_EVERY=2
TOTAL = {"stage 1": 14, "stage 2": 20, "stage 3": 4, "stage 4": 4, "own images": 6}
KEPT_IN = {"stage 1": "features.h5", "stage 2": "srm.pt", "stage 3": "agent.pt", "stage 4": "results.json.part",
           "own images": "masks/masks.json.part"}
TIMED = ("agent_log.csv", "agent_curves.png")  # they show how long an episode took
PATIENCE = 300  # seconds after which a stage counts as hung
SET_PIPE_SIZE = 1031  # fcntl's F_SETPIPE_SZ, which Python names from 3.10 on Linux only


@dataclass
class Found:
    """What one part of the campaign tried, and each promise that was broken, beside the case that shows it."""

    tried: dict[str, int] = field(default_factory=dict)
    violations: list[tuple[str, str]] = field(default_factory=list)

    def count(self, what: str) -> None:
        self.tried[what] = self.tried.get(what, 0) + 1

    def check(self, holds: bool, case: str, otherwise: str) -> None:
        if not holds:
            self.violations.append((case, otherwise))


@dataclass
class Stage:
    """A stage that runs in a process of its own. `units` counts the work that it has finished."""

    pid: int
    stderr: int
    counter: mmap.mmap
    code: int | None = None

    @property
    def units(self) -> int:
        return struct.unpack("q", self.counter[:8])[0]

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether it ended within that time; `code` is then its exit status, or minus the signal that ended it."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.002)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        """What it wrote to stderr. To be asked once, after its end."""
        with open(self.stderr, encoding="utf-8", errors="replace") as file:
            return file.read()


def start(folder: Path, kind: str, run_dir: str, hinder: Callable[[], None] = lambda: None, *more: str) -> Stage:
    """Starts a stage in `folder`; `hinder` is called in its process before it begins."""
    script, constants, unit = KINDS[kind]
    read, write = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(write, SET_PIPE_SIZE, 1 << 20)  # progress bars must never fill it: it is read at the end
    counter = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid:
        os.close(write)
        return Stage(pid, read, counter)
    code = 1
    try:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        sys.argv = [script, "TASK=folder", "DEVICE=cpu", *STAGES[script], f"RUN_DIR={run_dir}", *constants, *more]
        if unit:
            _count_calls(*unit, counter)
        hinder()
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _count_calls(module: str, name: str, counter: mmap.mmap) -> None:
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        counter[:8] = struct.pack("q", struct.unpack("q", counter[:8])[0] + 1)
        return result

    setattr(owner, name, counted)


def saved_units(kind: str, run_dir: Path) -> int:
    """The work that a stage's file holds, such that a restart does not do it again."""
    if not (path := run_dir / KEPT_IN[kind]).exists():
        return 0
    if kind == "own images":
        return len(json.loads(path.read_text())["images"])
    if kind == "stage 1":
        with h5py.File(path) as file:
            return int(file["done"][:].sum())
    content = torch.load(path, weights_only=True)
    return content["step"] if kind == "stage 2" else len(content["rows" if kind == "stage 4" else "log"])


def has_ended(kind: str, run_dir: Path) -> bool:
    """Whether a stage that removes what it kept has done so because all is written."""
    lines = run_dir / "masks/masks.jsonl"
    return (kind == "stage 4" and (run_dir / "results.json").exists()
            or kind == "own images" and lines.exists() and len(lines.read_text().splitlines()) == TOTAL[kind])


def differences(run_dir: Path, reference: Path) -> list[str]:
    """The files in which a finished run is not what the undisturbed one left, times aside."""
    def names(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    differ = sorted(names(run_dir) ^ names(reference))
    for name in sorted(names(run_dir) & names(reference)):
        one, other = run_dir / name, reference / name
        if name == "features.h5":
            a, b = arrays(one), arrays(other)
            same = a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        elif name.endswith(".pt"):
            same = same_weights(one, other)
        else:
            same = name in TIMED or one.read_bytes() == other.read_bytes()
        differ += [] if same else [name]
    return differ


class Workshop:
    """A folder with the small data set, and the run folder before and after each stage of an undisturbed run."""

    def __init__(self, folder: Path, kinds: tuple[str, ...]) -> None:
        self.folder, self.seconds = folder, {}
        for script in STAGES:
            runpy.run_path(str(ROOT / script))  # runs nothing; what it imports is then there in every fork
        draw_data(folder)
        state = folder / "start"
        state.mkdir()
        self.before, self.after = {}, {}
        for kind in KINDS:
            if kind == "own images" and kind not in kinds:
                continue  # the stages are needed in any case, by each other and for their files
            self.before[kind], self.after[kind] = state, folder / f"after {kind}"
            shutil.copytree(state, self.after[kind])
            started = time.monotonic()
            stage = start(folder, kind, str(self.after[kind]))
            if not stage.wait() or stage.code:
                raise SystemExit(f"{kind} fails without any fault: {stage.said()}")
            self.seconds[kind] = time.monotonic() - started
            state = self.after[kind]

    @contextlib.contextmanager
    def copy(self, kind: str) -> Iterator[Path]:
        """A run folder as it is before that stage."""
        run_dir = self.folder / "case"
        shutil.copytree(self.before[kind], run_dir)
        try:
            yield run_dir
        finally:
            shutil.rmtree(run_dir)

    def check_earlier_files(self, found: Found, case: str, kind: str, run_dir: Path) -> None:
        for path in self.before[kind].rglob("*"):
            kept = run_dir / path.relative_to(self.before[kind])
            if path.is_file():
                found.check(kept.is_file() and kept.read_bytes() == path.read_bytes(), case, f"{path.name} was changed")

    def finish(self, found: Found, case: str, kind: str, run_dir: Path) -> None:
        """Runs the stage to its end without hindrance: it must go on, and end as an undisturbed run."""
        saved = saved_units(kind, run_dir)
        stage = start(self.folder, kind, str(run_dir))
        ended = stage.wait()
        if not ended:
            stage.kill()
        said = stage.said()
        found.check(ended and stage.code == 0, case, f"{kind} does not go on: {said[-300:] if ended else 'it hangs'}")
        if ended and stage.code == 0:
            again = saved + stage.units - TOTAL[kind]
            found.check(again == 0, case, f"{kind} did {again} units of work again")
            found.check(not (differ := differences(run_dir, self.after[kind])), case, f"{kind}: {differ} differ")


def kills(workshop: Workshop, kinds: tuple[str, ...], count: int, seed: int, only: str) -> Found:
    """At least `count` SIGKILLs at random moments, up to four in a row before a stage may end."""
    found, number = Found(), 0
    while sum(found.tried.values()) < count:
        case, kind = f"kill-{number}", kinds[number % len(kinds)]
        rng = random.Random(f"{seed} {case}")
        number += 1
        if only not in ("", case):
            if number > 10 * count:
                break
            continue
        with workshop.copy(kind) as run_dir:
            for _ in range(rng.randint(1, 4)):
                saved = saved_units(kind, run_dir)
                stage = start(workshop.folder, kind, str(run_dir))
                if stage.wait(rng.random() * workshop.seconds[kind]):
                    said = stage.said()
                    found.check(stage.code == 0, case, f"{kind} does not go on: {said[-300:]}")
                    break
                stage.kill()
                os.close(stage.stderr)
                found.count(f"SIGKILL in {kind}")
                kept = saved_units(kind, run_dir)
                if not kept and has_ended(kind, run_dir):
                    break  # it has no use for what it kept any more
                lost = saved + stage.units - kept
                found.check(kept >= saved, case, f"{kind}: {saved - kept} units that were saved are gone")
                found.check(lost <= MAY_LOSE[kind], case, f"{kind}: the kill cost {lost} finished units")
                workshop.check_earlier_files(found, case, kind, run_dir)
            workshop.finish(found, case, kind, run_dir)
        if only:
            break
    return found


def is_one_sentence(said: str) -> bool:
    """Whether stderr holds progress bars, and then one sentence that begins with "error:"."""
    last = said.rstrip().splitlines()[-1]
    return "Traceback" not in said and said.count("error: ") == 1 and last.startswith("error: ")


def refused(found: Found, case: str, kind: str, stage: Stage, name: str) -> None:
    """The stage must end with one sentence that holds `name`."""
    ended = stage.wait()
    if not ended:
        stage.kill()
    said = stage.said() or "nothing"
    last = said.rstrip().splitlines()[-1]
    right = ended and stage.code == 1 and is_one_sentence(said)
    found.check(right, case, f"{kind} ends with {stage.code}: {said[-400:]}")
    found.check(name in last, case, f"{kind} does not say where: {last}")


def full_disks(workshop: Workshop, kinds: tuple[str, ...], count: int, seed: int, only: str) -> Found:
    """No file may grow beyond a random size (RLIMIT_FSIZE, so that writes fail with EFBIG)."""
    found = Found()
    for number in range(count):
        case, kind = f"full-{number}", kinds[number % len(kinds)]
        if only not in ("", case):
            continue
        rng = random.Random(f"{seed} {case}")
        new = [path for path in workshop.after[kind].rglob("*") if path.is_file()
               and not (workshop.before[kind] / path.relative_to(workshop.after[kind])).exists()]
        limit = int(rng.choice(new).stat().st_size * rng.random())
        with workshop.copy(kind) as run_dir:
            if rng.random() < 0.5:  # not from the start, but where a kill stopped it, or where it ended before one
                stage = start(workshop.folder, kind, str(run_dir))
                if not (ended := stage.wait(rng.random() * workshop.seconds[kind])):
                    stage.kill()
                said = stage.said()
                found.check(not ended or stage.code == 0, case, f"{kind} fails without a limit: {said[-300:]}")
            saved = saved_units(kind, run_dir)
            stage = start(workshop.folder, kind, str(run_dir),
                          lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
            stage.wait()
            found.count(f"no file may grow beyond a size in {kind}")
            if stage.code:
                refused(found, case, kind, stage, run_dir.name)
                found.check(saved_units(kind, run_dir) >= saved, case, f"{kind}: saved work is gone")
            else:
                os.close(stage.stderr)
            workshop.check_earlier_files(found, case, kind, run_dir)
            workshop.finish(found, case, kind, run_dir)
    return found


def without_privileges() -> None:
    """Root stays root but has to obey permissions: all capabilities are dropped (Linux)."""
    if os.geteuid() == 0:
        version_and_pid, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(version_and_pid, sets):
            raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[bool]:
    """A file system in memory at `place`; yields whether this machine lets us mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    mounted = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def closed_folders(workshop: Workshop, kinds: tuple[str, ...], only: str) -> Found:
    """Run folders that cannot be written to, in four ways, for every stage; two of them need a mount."""
    found = Found()
    for kind in kinds:
        features = f"FEATURES={workshop.after['stage 1'] / 'features.h5'}"
        more = [] if kind == "stage 1" else [features]
        case = f"file in the place of the run folder, {kind}"
        if only in ("", case):
            place = workshop.folder / "case"
            place.write_text("in the way")
            refused(found, case, kind, start(workshop.folder, kind, str(place), lambda: None, *more), place.name)
            found.check(place.read_text() == "in the way", case, "the file was changed")
            place.unlink()
            found.count("a file in the place of the run folder")
        case = f"no permission, {kind}"
        if only in ("", case):
            with workshop.copy(kind) as run_dir:
                run_dir.chmod(0o555)
                refused(found, case, kind, start(workshop.folder, kind, str(run_dir), without_privileges), run_dir.name)
                run_dir.chmod(0o755)
                found.count("a run folder without permission to write")
                workshop.check_earlier_files(found, case, kind, run_dir)
                workshop.finish(found, case, kind, run_dir)
        for what, change in (("full disk", None), ("read-only file system", "remount,ro")):
            case = f"{what}, {kind}"
            if only not in ("", case):
                continue
            used = sum(path.stat().st_size for path in workshop.before[kind].rglob("*") if path.is_file())
            size = "64m" if change else f"{used // 1024 + 200}k"  # room for what is there, and for little more
            with small_disk(workshop.folder / "case", f"size={size}") as mounted:
                if not mounted:
                    found.count(f"{what}: passed over, this machine mounts nothing")
                    continue
                run_dir = workshop.folder / "case"
                shutil.copytree(workshop.before[kind], run_dir, dirs_exist_ok=True)
                if change:
                    subprocess.run(["mount", "-o", change, str(run_dir)], check=True)
                refused(found, case, kind, start(workshop.folder, kind, str(run_dir)), run_dir.name)
                found.count(f"a {what}, mounted")
                workshop.check_earlier_files(found, case, kind, run_dir)
                subprocess.run(["mount", "-o", "remount,rw,size=64m", str(run_dir)], check=True)
                workshop.finish(found, case, kind, run_dir)
    return found
