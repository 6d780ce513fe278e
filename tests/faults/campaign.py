"""The fault campaign: hinders stages and damages files, and checks what the project promises.

    python -m tests.faults.campaign [NAME=value ...]

NAME is any constant below; `help` lists them.

Stages are killed, run out of space and are locked out of their folders. Files are damaged, or their
content is made wrong. The promises are that nothing is lost that was finished; that a stage goes on
to the same result, bit for bit; and that a file or folder that cannot be used ends the stage with
one sentence that names it. Masks as tools export them are read as they are meant, or refused.

The campaign prints a table, writes OUT, and exits with 1 if a promise was broken. A case depends
only on SEED and its own name, and the moment of a kill also on the machine's speed. ONLY=<case>
repeats one case.
"""

import common.runtime.first  # noqa: F401  before torch

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.runtime import files, script, settings
from common.runtime.errors import UserError
from tests.faults import input_faults, mask_faults, stage_faults
from tests.faults.stage_faults import Found

KILLS = 200  # SIGKILLs at random moments
FULL = 25  # stages in which no file may grow beyond a random size
CLOSED = True  # also run folders that cannot be written to, in every way and for every stage
INPUTS = 1000  # files with random damage
MASKS = 1000  # masks as tools export them
CLAIMS = True  # also every file that does not hold what it claims
KINDS = tuple(stage_faults.KINDS)  # the stages to hinder
SEED = 0  # of everything random
ONLY = ""  # the one case to repeat; empty = all
OUT = "runs/faults.json"


def run_parts(folder: Path) -> tuple[dict[str, Found], dict[str, float]]:
    """Runs all parts of the campaign. Returns what each found, and how many seconds it took."""
    workshop = stage_faults.Workshop(folder, KINDS)
    sound_files = input_faults.gather(folder / "sound", workshop.after["stage 4"], folder / "data")
    partial = functools.partial
    parts: dict[str, Callable[[], Found]] = {
        "killed": partial(stage_faults.kills, workshop, KINDS, KILLS, SEED, ONLY),
        "short of space": partial(stage_faults.full_disks, workshop, KINDS, FULL, SEED, ONLY),
    }
    if CLOSED:
        parts["locked out"] = partial(stage_faults.closed_folders, workshop, KINDS, ONLY)
    parts["damaged files"] = partial(input_faults.damaged, sound_files, INPUTS, SEED, ONLY)
    parts["masks"] = partial(mask_faults.masks, folder, MASKS, SEED, ONLY)
    if CLAIMS:
        parts["false claims"] = partial(input_faults.false_claims, sound_files, ONLY)

    found, seconds = {}, {}
    for name, work in parts.items():
        started = time.monotonic()
        found[name] = work()
        seconds[name] = time.monotonic() - started
        print(f"{name}: {sum(found[name].tried.values())} tried, "
              f"{len(found[name].violations)} violated, {seconds[name]:.0f} s", file=sys.stderr)
    return found, seconds


def print_table(found: dict[str, Found], seconds: dict[str, float]) -> None:
    print("| part | tried | cases | violated |\n| --- | --- | ---: | ---: |")
    for name, part in found.items():
        for what, count in sorted(part.tried.items()):
            print(f"| {name} | {what} | {count} | |")
        print(f"| **{name}** | all, in {seconds[name]:.0f} s | {sum(part.tried.values())} | "
              f"{len(part.violations)} |")


def main() -> None:
    settings.not_negative(globals(), "KILLS", "FULL", "INPUTS", "MASKS", "SEED")
    if unknown := set(KINDS) - set(stage_faults.KINDS):
        raise UserError(f"KINDS names {unknown.pop()!r}: "
                        f"choose among {', '.join(stage_faults.KINDS)}")
    files.require_ours(Path(OUT))
    # Forks cannot use the threads of this process, and results round differently with their number.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found, seconds = run_parts(Path(folder))
    print_table(found, seconds)

    violations = [{"part": name, "case": case, "what": what}
                  for name, part in found.items() for case, what in part.violations]
    tried = {name: part.tried for name, part in found.items()}
    report = {"seed": SEED, "seconds": seconds, "tried": tried, "violations": violations}
    text = json.dumps(report, indent=1)
    files.write_text(Path(OUT), text)
    for violation in violations:
        print(f"\nviolated in {violation['case']} ({violation['part']}): {violation['what']}")
    if violations:
        raise UserError(f"{len(violations)} violations, listed above and in {OUT}: "
                        f"repeat one with ONLY=<case> SEED={SEED}")


if __name__ == "__main__":
    script.run(main, globals())
