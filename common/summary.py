"""Mean and spread over seeds of the results that run folders hold.

    python -m common.summary runs/demo_saliency-seed0 runs/demo_saliency-seed1 ...

prints one Markdown table a task (and branch): each row's mean over the folders, and the deviation over seeds.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev

METRICS = ("mIoU", "F", "BER", "E", "MAE", "FR")


def summarise(folders: list[Path]) -> str:
    """Markdown tables in percent (MAE: a fraction), "mean ± deviation over the runs", one per task and branch."""
    groups = defaultdict(list)
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        groups[results["task"], results["branch"], results["images"]].append(results)
    text = []
    for (task, branch, images), runs in groups.items():
        seeds = ", ".join(str(results["seed"]) for results in runs)
        attainable = 100 * mean(results["foreground_rate_attainable"] for results in runs)
        text.append(f"\n**{task}**, {branch} branch, {images} test samples, seeds {seeds}; FR attainable {attainable:.1f}\n")
        text += ["| row | " + " | ".join(METRICS) + " |", "| --- |" + " ---: |" * len(METRICS)]
        for row in runs[0]["rows"]:
            cells = []
            for name in METRICS:
                values = [results["rows"][row][name] * (1 if name == "MAE" else 100) for results in runs]
                digits = 3 if name == "MAE" else 1
                cells.append(f"{mean(values):.{digits}f} ± {pstdev(values):.{digits}f}")
            text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    print(summarise([Path(folder) for folder in sys.argv[1:]]))
