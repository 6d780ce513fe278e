"""Stages that are killed, short of space or locked out: what happens to their files, and after.

A stage runs in a fork of a process that has imported torch already. That saves the seconds that a
start costs, and every kill falls into the stage's own work.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib
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

from common.results.own_images import whole_lines
from tests.conftest import ROOT, STAGES, arrays, draw_data
from tests.test_stages import same_weights


@dataclass(frozen=True)
class Kind:
    """What a stage is, and what it promises when it is killed."""

    script: str
    unit: tuple[str, str]  # module and function; each call does, or keeps, one unit of work
    total: int  # units of work of a whole run
    may_lose: int  # finished units that a kill may cost
    kept_in: str  # the file in the run folder that holds finished work
    constants: tuple[str, ...] = ()  # beside those of STAGES


KINDS = {
    "stage 1": Kind("01_cache_features.py", ("common.cache_file", "CacheWriter.write"),
                    total=14, may_lose=0, kept_in="features.h5"),
    "stage 2": Kind("02_train_srm.py", ("common.srm", "train_step"),
                    total=20, may_lose=2, kept_in="srm.pt"),  # SAVE_EVERY=2
    "stage 3": Kind("03_train_agent.py", ("common.agent", "ppo_update"),
                    total=4, may_lose=1, kept_in="agent.pt"),
    "stage 4": Kind("04_evaluate.py", ("common.runtime.checkpoint", "save"),
                    total=4, may_lose=0, kept_in="results.json.part"),
    "own images": Kind("04_evaluate.py", ("common.results.own_images", "Progress.add"),
                       total=6, may_lose=0, kept_in="masks/masks.json.part",
                       constants=("IMAGES=data/test/images",)),
}
TIMED = ("agent_log.csv", "agent_curves.png")  # they show how long an episode took
PATIENCE = 300  # seconds after which a stage counts as hung
SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of fcntl, which Python does not name everywhere


@dataclass
class Found:
    """What one part of the campaign tried, and each broken promise with the case that shows it."""

    tried: dict[str, int] = field(default_factory=dict)
    violations: list[tuple[str, str]] = field(default_factory=list)

    def count(self, what: str) -> None:
        self.tried[what] = self.tried.get(what, 0) + 1

    def check(self, holds: bool, case: str, otherwise: str) -> None:
        """Notes a violation unless `holds`; `otherwise` says what is wrong then."""
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
        """Whether it ended within that time.

        `code` is then its exit status, or minus the number of the signal that ended it.
        """
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
        """What it wrote to stderr. Call it once, and only after the stage's end."""
        with open(self.stderr, encoding="utf-8", errors="replace") as file:
            return file.read()


def start(folder: Path, kind: str, run_dir: Path, *more: str,
          hinder: Callable[[], None] | None = None) -> Stage:
    """Starts a stage in `folder`.

    more: further constants. hinder: called in the stage's process before the stage begins.
    """
    read, write = os.pipe()
    with contextlib.suppress(OSError):
        # stderr is read at the end only, so the progress bars must not fill the pipe before
        fcntl.fcntl(write, SET_PIPE_SIZE, 1 << 20)
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
        script, constants = KINDS[kind].script, KINDS[kind].constants
        sys.argv = [script, "TASK=folder", "DEVICE=cpu", *STAGES[script], f"RUN_DIR={run_dir}",
                    *constants, *more]
        _count_calls(*KINDS[kind].unit, counter)
        if hinder:
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
    """Lets a function of the module, "f" or "Class.f", count its finished calls."""
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        calls = struct.unpack("q", counter[:8])[0]
        counter[:8] = struct.pack("q", calls + 1)
        return result

    setattr(owner, name, counted)


def saved_units(kind: str, run_dir: Path) -> int:
    """How many units of work the stage's file holds. A restart must not do these again."""
    path = run_dir / KINDS[kind].kept_in
    if not path.exists():
        return 0
    if kind == "own images":
        return len(whole_lines(path)[1:])  # the first tells the settings
    if kind == "stage 1":
        with h5py.File(path) as file:
            return int(file["done"][:].sum())
    content = torch.load(path, weights_only=True)
    if kind == "stage 2":
        return content["step"]
    return len(content["rows" if kind == "stage 4" else "log"])


def has_ended(kind: str, run_dir: Path) -> bool:
    """Whether all results are written, for the stages that then remove the file they kept."""
    if kind == "stage 4":
        return (run_dir / "results.json").exists()
    lines = run_dir / "masks/masks.jsonl"
    if kind == "own images" and lines.exists():
        return len(whole_lines(lines)) == KINDS[kind].total
    return False


def files_below(folder: Path) -> set[Path]:
    """All files in a folder and its subfolders, by their paths relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def differences(run_dir: Path, reference: Path) -> list[str]:
    """The files in which a finished run differs from the undisturbed one, times aside."""
    found, expected = files_below(run_dir), files_below(reference)
    differ = [str(path) for path in sorted(found ^ expected)]
    for path in sorted(found & expected):
        one, other = run_dir / path, reference / path
        if path.name == "features.h5":
            a, b = arrays(one), arrays(other)
            same = a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        elif path.suffix == ".pt":
            same = same_weights(one, other)
        else:
            same = str(path) in TIMED or one.read_bytes() == other.read_bytes()
        if not same:
            differ.append(str(path))
    return differ


class Workshop:
    """A small data set, and the run folder before and after each stage of an undisturbed run."""

    def __init__(self, folder: Path, kinds: tuple[str, ...]) -> None:
        self.folder, self.seconds = folder, {}
        for script in STAGES:
            runpy.run_path(str(ROOT / script))  # runs no stage; every fork then has its imports
        draw_data(folder)
        state = folder / "start"
        state.mkdir()
        self.before, self.after = {}, {}
        for kind in KINDS:
            if kind == "own images" and kind not in kinds:
                continue  # the stages are always needed, by each other and for their files
            self.before[kind], self.after[kind] = state, folder / f"after {kind}"
            shutil.copytree(state, self.after[kind])
            started = time.monotonic()
            stage = start(folder, kind, self.after[kind])
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
        """The files of the stages before must be as they were."""
        for path in files_below(self.before[kind]):
            kept, original = run_dir / path, self.before[kind] / path
            unchanged = kept.is_file() and kept.read_bytes() == original.read_bytes()
            found.check(unchanged, case, f"{path.name} was changed")

    def finish(self, found: Found, case: str, kind: str, run_dir: Path) -> None:
        """Runs the stage to its end unhindered: it must go on, and end as an undisturbed run."""
        saved = saved_units(kind, run_dir)
        stage = start(self.folder, kind, run_dir)
        ended = stage.wait()
        if not ended:
            stage.kill()
        said = stage.said()
        why = said[-300:] if ended else "it hangs"
        found.check(ended and stage.code == 0, case, f"{kind} does not go on: {why}")
        if ended and stage.code == 0:
            again = saved + stage.units - KINDS[kind].total
            found.check(again == 0, case, f"{kind} did {again} units of work again")
            differ = differences(run_dir, self.after[kind])
            found.check(not differ, case, f"{kind}: {differ} differ")


# ---- kills --------------------------------------------------------------------------------------


def kills(workshop: Workshop, kinds: tuple[str, ...], count: int, seed: int, only: str) -> Found:
    """At least `count` SIGKILLs at random moments, up to four in a row before a stage may end."""
    found, number = Found(), 0
    while sum(found.tried.values()) < count:
        case, kind = f"kill-{number}", kinds[number % len(kinds)]
        number += 1
        if only in ("", case):
            kill_and_go_on(workshop, found, case, kind, random.Random(f"{seed} {case}"))
        if only == case or (only and number > 10 * count):  # done, or there is no such case
            break
    return found


def kill_and_go_on(workshop: Workshop, found: Found, case: str, kind: str,
                   rng: random.Random) -> None:
    """Kills a stage up to four times. Each restart must go on from what was finished."""
    with workshop.copy(kind) as run_dir:
        for _ in range(rng.randint(1, 4)):
            saved = saved_units(kind, run_dir)
            stage = start(workshop.folder, kind, run_dir)
            if stage.wait(rng.random() * workshop.seconds[kind]):
                said = stage.said()
                found.check(stage.code == 0, case, f"{kind} does not go on: {said[-300:]}")
                break
            stage.kill()
            os.close(stage.stderr)
            found.count(f"SIGKILL in {kind}")
            kept = saved_units(kind, run_dir)
            if not kept and has_ended(kind, run_dir):
                break  # it has removed the file, which it does not need any more
            gone, lost = saved - kept, saved + stage.units - kept
            found.check(gone <= 0, case, f"{kind}: {gone} units that were saved are gone")
            found.check(lost <= KINDS[kind].may_lose, case,
                        f"{kind}: the kill cost {lost} finished units")
            workshop.check_earlier_files(found, case, kind, run_dir)
        workshop.finish(found, case, kind, run_dir)


# ---- full disks ---------------------------------------------------------------------------------


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


def full_disks(workshop: Workshop, kinds: tuple[str, ...], count: int, seed: int,
               only: str) -> Found:
    """No file may grow beyond a random size (RLIMIT_FSIZE, so that writes fail with EFBIG)."""
    found = Found()
    for number in range(count):
        case, kind = f"full-{number}", kinds[number % len(kinds)]
        if only in ("", case):
            limit_and_go_on(workshop, found, case, kind, random.Random(f"{seed} {case}"))
    return found


def limit_and_go_on(workshop: Workshop, found: Found, case: str, kind: str,
                    rng: random.Random) -> None:
    """Runs a stage under a limit on the size of files, which is lifted for a second run.

    The limit is a random share of the size of one file that the stage writes. Half of the time the
    stage does not begin anew under it, but goes on from a kill or repeats a finished run.
    """
    before, after = workshop.before[kind], workshop.after[kind]
    new_files = [after / path for path in sorted(files_below(after) - files_below(before))]
    limit = int(rng.choice(new_files).stat().st_size * rng.random())
    lower_limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE,
                                    (limit, resource.RLIM_INFINITY))
    with workshop.copy(kind) as run_dir:
        if rng.random() < 0.5:
            stage = start(workshop.folder, kind, run_dir)
            ended = stage.wait(rng.random() * workshop.seconds[kind])
            if not ended:
                stage.kill()
            said = stage.said()
            found.check(not ended or stage.code == 0, case,
                        f"{kind} fails without a limit: {said[-300:]}")
        saved = saved_units(kind, run_dir)
        stage = start(workshop.folder, kind, run_dir, hinder=lower_limit)
        stage.wait()
        found.count(f"no file may grow beyond a size in {kind}")
        if stage.code:
            refused(found, case, kind, stage, run_dir.name)
            found.check(saved_units(kind, run_dir) >= saved, case, f"{kind}: saved work is gone")
        else:
            os.close(stage.stderr)
        workshop.check_earlier_files(found, case, kind, run_dir)
        workshop.finish(found, case, kind, run_dir)


# ---- folders that cannot be written to ----------------------------------------------------------


def drop_capabilities() -> None:
    """Root stays root but must obey permissions: all its capabilities are dropped (Linux)."""
    if os.geteuid() == 0:
        version_3 = 0x20080522
        version_and_pid = (ctypes.c_uint32 * 2)(version_3, 0)
        no_capabilities = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capset(version_and_pid, no_capabilities):
            raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[bool]:
    """A file system in memory, mounted at `place`; yields whether this machine let us mount it."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    mounted = False
    if shutil.which("mount"):
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def closed_folders(workshop: Workshop, kinds: tuple[str, ...], only: str) -> Found:
    """Run folders that cannot be written to, in four ways, for every stage; two need a mount."""
    ways = {
        "file in the place of the run folder": file_in_the_way,
        "no permission": no_permission,
        "full disk": full_disk,
        "read-only file system": read_only_file_system,
    }
    found = Found()
    for kind in kinds:
        for name, way in ways.items():
            case = f"{name}, {kind}"
            if only in ("", case):
                way(workshop, found, case, kind)
    return found


def file_in_the_way(workshop: Workshop, found: Found, case: str, kind: str) -> None:
    place = workshop.folder / "case"
    place.write_text("in the way")
    # the cache is named, as it cannot lie in the run folder
    cache_path = workshop.after["stage 1"] / "features.h5"
    more = [] if kind == "stage 1" else [f"FEATURES={cache_path}"]
    refused(found, case, kind, start(workshop.folder, kind, place, *more), place.name)
    found.check(place.read_text() == "in the way", case, "the file was changed")
    place.unlink()
    found.count("a file in the place of the run folder")


def no_permission(workshop: Workshop, found: Found, case: str, kind: str) -> None:
    with workshop.copy(kind) as run_dir:
        run_dir.chmod(0o555)
        stage = start(workshop.folder, kind, run_dir, hinder=drop_capabilities)
        refused(found, case, kind, stage, run_dir.name)
        run_dir.chmod(0o755)
        found.count("a run folder without permission to write")
        workshop.check_earlier_files(found, case, kind, run_dir)
        workshop.finish(found, case, kind, run_dir)


def full_disk(workshop: Workshop, found: Found, case: str, kind: str) -> None:
    """The disk has room for what is there, and for little more."""
    before = workshop.before[kind]
    used = sum((before / path).stat().st_size for path in files_below(before))
    on_a_disk(workshop, found, case, kind, f"size={used // 1024 + 200}k")


def read_only_file_system(workshop: Workshop, found: Found, case: str, kind: str) -> None:
    on_a_disk(workshop, found, case, kind, "size=64m", read_only=True)


def on_a_disk(workshop: Workshop, found: Found, case: str, kind: str, options: str,
              read_only: bool = False) -> None:
    """Runs a stage on a file system on which it must fail, and then with room to write."""
    what = case.removesuffix(f", {kind}")
    run_dir = workshop.folder / "case"
    with small_disk(run_dir, options) as mounted:
        if not mounted:
            found.count(f"{what}: left out, this machine mounts nothing")
            return
        shutil.copytree(workshop.before[kind], run_dir, dirs_exist_ok=True)
        if read_only:
            remount(run_dir, "ro")
        refused(found, case, kind, start(workshop.folder, kind, run_dir), run_dir.name)
        found.count(f"a {what}, mounted")
        workshop.check_earlier_files(found, case, kind, run_dir)
        remount(run_dir, "rw,size=64m")
        workshop.finish(found, case, kind, run_dir)
