"""What stage 4 writes: results.json, the printed tables, strips of masks, report.html."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cache import Cache
from common.metrics import Score, summarise
from common.results.paper import POOLED_NOTE, beside_pooled, paper_row, results_table, stand_ins
from common.results.pictures import save_strips, strip
from common.results.report import gallery_item, write_report
from common.runtime import checkpoint, distributed
from common.runtime.errors import UserError, some
from common.runtime.files import require_ours, write_text
from common.tasks import get_task

STRIP_ROUNDS = (0, 1, 2, 5, 10, 15)  # after which the strips show the mask


def check_results_name(name: str) -> None:
    """Raises UserError unless `name` can be the name of a results file in the run folder."""
    if not name.endswith(".json") or "/" in name or len(os.fsencode(name)) > 200:
        raise UserError(f"RESULTS={name} is no name of a results file: set it to one that ends in "
                        ".json and has 200 bytes at most")


class Drawing:
    """Which test samples get pictures, and what those pictures need of a sample."""

    def __init__(self, cache: Cache, samples: np.ndarray, strips: int, gallery: int) -> None:
        """samples: (S, 2). strips, gallery: how many of them to draw, spread over the test set."""
        self.cache, self.samples, self.frame = cache, samples, cache.attrs["image_size"]
        self.classes = None
        if len(cache.texts) > 1:
            self.classes = [cache.texts[text] for _, text in samples]
        self.in_strips, self.in_gallery = self._spread(strips), self._spread(gallery)

    def _spread(self, count: int) -> set[int]:
        count = min(count, len(self.samples))
        return set(np.linspace(0, len(self.samples) - 1, count).astype(int).tolist())

    def draw(self, row: str, score: Score, masks: np.ndarray, label_map: np.ndarray,
             points: np.ndarray, labels: np.ndarray) -> dict:
        """What is kept of a sample. It is made now, as the masks are too large to keep.

        masks: bool (1 + T, H, W), after each round. label_map: uint8 (H, W). points, labels:
        (2 + T, 2) and (2 + T,), in the order of prompting.
        """
        number = score.number
        kept = {}
        if number in self.in_strips:  # a copy, or it would keep the masks of all rounds
            kept["mask"] = torch.from_numpy(masks[-1].copy())
        if row != "AlignSAM":
            return kept
        sample = self.samples[number]
        name, target = self.cache.name(sample), self.cache.texts[sample[1]]
        if number in self.in_strips:
            rounds = {f"round {after}": after for after in STRIP_ROUNDS if after < len(masks)}
            growing = {caption: masks[after] for caption, after in rounds.items()}
            prompts = {caption: (points[:2 + after], labels[:2 + after])
                       for caption, after in rounds.items()}
            picture = strip(name, target, self.cache.picture(sample), label_map, growing, prompts,
                            self.frame)
            kept["strip"] = torch.from_numpy(np.array(picture))
        if number in self.in_gallery:
            kept["gallery"] = gallery_item(name, target if self.classes else None,
                                           self.cache.picture(sample), label_map, masks, score.ious,
                                           points, labels, self.frame)
        return kept

    def compare(self, number: int, masks: dict[str, np.ndarray]) -> Image.Image:
        """A sample's last mask of each row, side by side (the paper's Figure 4)."""
        sample = self.samples[number]
        name, target = self.cache.name(sample), self.cache.texts[sample[1]]
        return strip(name, target, self.cache.picture(sample), self.cache.label_map(sample), masks,
                     {}, self.frame)


@dataclass
class Report:
    """The rows as they are finished, and all that is written of them.

    trained: content of agent.pt. made_with: settings. If they have changed, finished rows of a
    stopped call are computed again. given: {row: the record of its masks} of the rows that are
    scored from given masks; if it has changed, that row is computed again.
    """

    folder: Path
    name: str  # of the results file; the pictures' names begin with its stem, if not "results"
    cache: Cache
    trained: dict
    rows: list[str]
    drawing: Drawing
    made_with: dict
    given: dict[str, dict] = field(default_factory=dict)
    finished: dict[str, dict] = field(default_factory=dict)

    @property
    def part(self) -> Path:
        """Where finished rows are kept until all are."""
        return self.folder / f"{self.name}.part"

    def path(self, kind: str) -> Path:
        """Of strips.png, comparison.png or report.html (kind)."""
        stem = self.name.removesuffix(".json")
        return self.folder / (kind if stem == "results" else f"{stem}-{kind}")

    def __post_init__(self) -> None:
        """Raises UserError where `write` would replace a file that is not ours."""
        drawing, prompted = self.drawing, "AlignSAM" in self.rows
        written = {"strips.png": prompted and drawing.in_strips,
                   "comparison.png": drawing.in_strips,
                   "report.html": prompted and drawing.in_gallery}
        pictures = (self.path(kind) for kind, is_written in written.items() if is_written)
        require_ours(self.folder / self.name, *pictures)
        if left_out := self.rows_left_out():
            raise UserError(f"{self.folder / self.name} also holds {some(left_out)}, which would "
                            "be lost: add them to ROWS, give RESULTS=another.json, or delete the "
                            "file")

    def rows_left_out(self) -> list[str]:
        """The rows that the results file has of this agent, and that this call does not compute.

        Rows of given masks are not among them: they are scored again in no time.
        """
        try:
            there = json.loads((self.folder / self.name).read_text(encoding="utf-8"))
            now = json.loads(json.dumps(self.trained["settings"]))
            shared = now.keys() & there["trained"].keys()  # earlier versions recorded fewer
            if any(now[name] != there["trained"][name] for name in shared):
                return []
            held = there["rows"].keys() - there.get("given_masks", {}).keys()
            return [row for row in there["rows"] if row in held - {*self.rows}]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return []  # there are no results yet, or none that can be read

    def take_over_finished_rows(self, command: str) -> list[str]:
        """Takes over the rows that a stopped call has finished, if its settings were the same.

        command: how stage 4 is called, for the message where the file is damaged.
        Returns the rows that are left.
        """
        if self.part.exists():
            saved = checkpoint.load(self.part, command, rows=dict)
            whole = all("pooled" in row["metrics"] for row in saved["rows"].values())
            if saved["settings"] == self.made_with and whole:  # earlier versions pooled nothing
                self.finished = {row: kept for row, kept in saved["rows"].items()
                                 if kept.get("given") == self.given.get(row)}
        return [row for row in self.rows if row not in self.finished]

    def add(self, row: str, scores: list[Score]) -> None:
        """Keeps a finished row on disk. scores: of all test samples, in their order; rank 0 alone.

        The other ranks have none, and keep nothing.
        """
        if not scores:
            return
        summary = summarise(scores, self.drawing.classes, self.made_with["evaluation_rounds"])
        self.finished[row] = summary | {"given": self.given.get(row)}
        checkpoint.save(self.part, {"settings": self.made_with, "finished": False,
                                    "rows": self.finished})

    def write(self, threshold: float | None) -> None:
        """Writes results.json, the pictures and the report, then prints the tables; rank 0 alone.

        threshold: of CLIP Surgery's map, where a row needed one.
        """
        if distributed.RANK > 0:
            return
        content = self.content(threshold)
        paper = self.paper()
        written = [self.folder / self.name]
        write_text(written[0], json.dumps(content, indent=1))
        written += self.write_pictures(content, paper)
        self.part.unlink(missing_ok=True)
        self.print_tables(content, paper)
        print("wrote " + ", ".join(map(str, written)))

    def content(self, threshold: float | None) -> dict:
        """What results.json holds."""
        attrs, settings = self.cache.attrs, self.trained["settings"]
        samples, rounds = self.drawing.samples, self.made_with["evaluation_rounds"]
        # Table 9's bound: small targets have few patch centres that could be chosen
        truth_centres = self.cache.truth_centres(samples)
        centres = (truth_centres == 1).sum(1).clamp(max=rounds)
        content = {
            "task": settings["task"], "sam": attrs["sam"], "clip": attrs["clip"],
            "seed": settings["seed"], "images": len(np.unique(samples[:, 0])),
            "samples": len(samples), "units": "all metrics are fractions between 0 and 1",
            "evaluation_seed": self.made_with["evaluation_seed"],
            "sample_actions": self.made_with["sample_actions"], "rounds": rounds,
            "branch": settings["branch"], "trained": settings,
            "foreground_rate_attainable": (centres / rounds).mean().item()}
        if threshold is not None:
            content["clip_surgery_threshold"] = threshold
        if self.given:
            content["given_masks"] = self.given
        content["rows"] = self._of_rows("metrics")
        content["iou_per_round"] = self._of_rows("iou_per_round")
        if self.drawing.classes:
            content["iou_per_round_per_class"] = self._of_rows("iou_per_round_per_class")
        return content

    def _of_rows(self, name: str) -> dict[str, object]:
        """{row: what its summary holds under `name`}."""
        return {row: self.finished[row][name] for row in self.rows}

    def paper(self) -> dict[str, dict[str, float]] | None:
        """The paper's figures, where the models and the question are the paper's."""
        attrs, task = self.cache.attrs, get_task(self.trained["settings"]["task"], "-")
        same = not stand_ins(attrs["sam"], attrs["clip"]) and self.cache.texts == task.texts
        return paper_row(task.paper) if task.paper and same else None

    def print_tables(self, content: dict, paper: dict | None) -> None:
        warning = ""
        if stand_ins(content["sam"], content["clip"]):
            warning = (" (stand-ins: small models trained on drawn scenes; these numbers cannot be "
                       "compared with the paper's)")
        samples, means = f"{content['samples']} test samples", "means over images"
        if self.drawing.classes:
            samples += f" (pairs of image and class) from {content['images']} images"
            means = "means over the images of each class, then over the classes"
        print(f"\n{content['task']}, {samples}, SAM {content['sam']}, "
              f"CLIP {content['clip']}{warning}")
        rows = {row: flat(scores) for row, scores in content["rows"].items()}
        print(results_table(rows, paper and beside_pooled(paper)))
        print(f"Percent, MAE a fraction. mIoU, F, BER, E and MAE are {means}; pooled IoU and BER "
              f"count pixels of all images together.\n{POOLED_NOTE}")
        print(f"FR attainable: {100 * content['foreground_rate_attainable']:.2f} "
              f"(no choice of {content['rounds']} different patches does better)")
        if content["rounds"] != content["trained"]["rounds"]:
            print(f"evaluated with ROUNDS={content['rounds']}, trained with "
                  f"ROUNDS={content['trained']['rounds']}")
        if self.drawing.classes:
            means, pooled = {}, {}
            for row, scores in content["rows"].items():
                per_class = scores["per_class"].items()
                means[row] = {label: its["mIoU"] for label, its in per_class}
                pooled[row] = {label: its["pooled"]["IoU"] for label, its in per_class}
            print("\nIoU per class, mean over images\n\n" + results_table(means, paper))
            print("\nIoU per class, pooled over the images that hold the class\n\n"
                  + results_table(pooled, paper))

    def write_pictures(self, content: dict, paper: dict | None) -> list[Path]:
        """strips.png, comparison.png and report.html, as far as they have something to show."""
        pictures = self._of_rows("pictures")
        prompted, written = list(pictures.get("AlignSAM", {}).values()), []
        strips = [Image.fromarray(kept["strip"].numpy()) for kept in prompted if "strip" in kept]
        if strips:  # the paper's Figure 5: points and mask growing
            written.append(self.path("strips.png"))
            save_strips(strips, written[-1])
        if self.drawing.in_strips:
            written.append(self.path("comparison.png"))
            sheet = []
            for number in sorted(self.drawing.in_strips):
                masks = {row: pictures[row][number]["mask"].numpy() for row in self.rows}
                sheet.append(self.drawing.compare(number, masks))
            save_strips(sheet, written[-1])
        gallery = [kept["gallery"] for kept in prompted if "gallery" in kept]
        if gallery:
            srm_log = checkpoint.read_log(self.folder / "srm_log.csv")
            written.append(self.path("report.html"))
            write_report(written[-1], content, srm_log, self.trained["log"], gallery, paper)
        return written


def flat(scores: dict) -> dict[str, float]:
    """A row's scores as columns of a table: its pooled metrics by name, without its classes."""
    columns = {name: value for name, value in scores.items() if name not in ("per_class", "pooled")}
    return columns | {f"pooled {name}": value for name, value in scores["pooled"].items()}
