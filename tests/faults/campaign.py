"""The fault campaign: stages are killed, run out of space and are locked out; files are damaged and made to lie.

    python -m tests.faults.campaign [NAME=value ...]           NAME is any constant below; `help` lists them

What must hold: nothing that was finished is lost, a stage goes on to the same result, bit for bit, and whatever it
cannot use ends in one sentence that names it. Prints a table, writes OUT, and exits with 1 where anything was violated.
A case depends on SEED and its own name only, and a kill's moment also on the machine's speed: ONLY=<case> repeats it.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.runtime import files, script, settings
from common.runtime.errors import UserError
from tests.faults import input_faults, stage_faults
from tests.faults.stage_faults import Found

KILLS = 200  # SIGKILLs at random moments
FULL = 25  # stages in which no file may grow beyond a random size
CLOSED = True  # run folders that cannot be written to: every way, every stage
INPUTS = 1000  # files with random damage
CLAIMS = True  # files that do not hold what they claim: every one
KINDS = tuple(stage_faults.KINDS)  # what is killed, or short of space
SEED = 0  # of everything drawn
ONLY = ""  # the one case to repeat; empty = all
OUT = "runs/faults.json"


def main() -> None:
    settings.not_negative(globals(), "KILLS", "FULL", "INPUTS", "SEED")
    if unknown := set(KINDS) - set(stage_faults.KINDS):
        raise UserError(f"KINDS names {unknown.pop()!r}: choose among {', '.join(stage_faults.KINDS)}")
    torch.set_num_threads(1)  # forks cannot use the threads of this process; and rounding depends on their number
    seconds, found = {}, {}

    def part(name: str, work: Callable[[], Found]) -> None:
        started = time.monotonic()
        found[name] = work()
        seconds[name] = time.monotonic() - started
        print(f"{name}: {sum(found[name].tried.values())} tried, {len(found[name].violations)} violated, "
              f"{seconds[name]:.0f} s", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        workshop = stage_faults.Workshop(folder, KINDS)
        whole = input_faults.gather(folder / "sound", workshop.after["stage 4"], folder / "data")
        part("killed", lambda: stage_faults.kills(workshop, KINDS, KILLS, SEED, ONLY))
        part("short of space", lambda: stage_faults.full_disks(workshop, KINDS, FULL, SEED, ONLY))
        if CLOSED:
            part("locked out", lambda: stage_faults.closed_folders(workshop, KINDS, ONLY))
        part("damaged files", lambda: input_faults.damaged(whole, INPUTS, SEED, ONLY))
        if CLAIMS:
            part("false claims", lambda: input_faults.claims(whole, ONLY))

    print("| part | tried | cases | violated |\n| --- | --- | ---: | ---: |")
    for name, one in found.items():
        for what, count in sorted(one.tried.items()):
            print(f"| {name} | {what} | {count} | |")
        print(f"| **{name}** | all, in {seconds[name]:.0f} s | {sum(one.tried.values())} | {len(one.violations)} |")
    violations = [{"part": name, "case": case, "what": what}
                  for name, one in found.items() for case, what in one.violations]
    report = {"seed": SEED, "seconds": seconds, "tried": {name: one.tried for name, one in found.items()},
              "violations": violations}
    files.write_atomic(Path(OUT), lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
    for violation in violations:
        print(f"\nviolated in {violation['case']} ({violation['part']}): {violation['what']}")
    if violations:
        raise UserError(f"{len(violations)} violations, listed above and in {OUT}; repeat one with "
                                 f"ONLY=<case> SEED={SEED}")


if __name__ == "__main__":
    script.run(main, globals())
