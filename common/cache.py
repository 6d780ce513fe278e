"""The feature cache as the stages read it; `cache_file` says what it holds and writes it."""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

from common.cache_file import AGAIN, NOT_COMPARED, SUMMED, binary, open_file, stored_attributes
from common.images import composed
from common.label_maps import IGNORE
from common.runtime.errors import UserError

READ = {  # attributes that the other stages read, beside the layout's own
    "task": str, "branch": str, "sam": str, "sam_fingerprint": str, "clip": str,
    "clip_fingerprint": str, "clip_size": int, "image_size": int, "precision": str}


@dataclass
class TrainingSet:
    """All that training needs of S drawn samples, in memory."""

    samples: np.ndarray  # int64 (S, 2): image row, text index
    embeddings: torch.Tensor  # F, float32 (S, C, h, w)
    maps: torch.Tensor  # M_c, float32 (S, h, w)
    truth: torch.Tensor  # y on the grid, float32 (S, h, w), see `truth_on_grid`
    every_map: torch.Tensor  # M_c of all K texts, float32 (S, K, h, w)
    every_truth: torch.Tensor  # y of all K texts, float32 (S, K, h, w)
    present: torch.Tensor  # which of the texts the image holds, bool (S, K), on the CPU
    truth_centres: torch.Tensor  # y at the patch centres, uint8 (S, P)
    label_maps: list[np.ndarray]  # y, S uint8 (H, W)

    def maps_and_truth(self, rows: torch.Tensor, every_text: bool,
                       generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """M_c and y on the grid, (B, h, w) each, of the samples `rows`.

        every_text: of a text that the sample's image holds, at random, instead of its own text.
        """
        if not every_text or len(self.present[0]) == 1:
            return self.maps[rows], self.truth[rows]
        shares = self.present[rows.cpu()].float()
        texts = torch.multinomial(shares, 1, generator=generator)[:, 0].to(rows.device)
        return self.every_map[rows, texts], self.every_truth[rows, texts]


class Truth(NamedTuple):
    """Ground truth of B samples, at the images' own sizes and at the patch centres."""

    label_maps: list[np.ndarray]  # B uint8 (H, W), 1 foreground, 0 background, 255 ignored
    at_centres: torch.Tensor  # uint8 (B, P), the same values


class Cache:
    """A complete cache, read-only.

    `samples`, here and below, are int (B, 2): image row and text index, in any order.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.file, self.attrs = path, file, stored_attributes(file)
        self.texts: tuple[str, ...] = tuple(json.loads(self.attrs["texts"]))
        self.channels: int = file["embeddings"].shape[1]  # C
        self.grid: tuple[int, int] = file["embeddings"].shape[2:]  # h, w
        self._names = [os.fsdecode(name) for name in file["names"][:]]
        self._sizes, self._offsets = file["sizes"][:], file["label_offsets"][:]
        self._crc = file["crc"][:]
        self._compared: set[tuple[str, int]] = set()  # dataset and image: once is enough

    @classmethod
    def open(cls, path: Path, task: str | None = None,
             maker: str = "01_cache_features.py") -> "Cache":
        """Raises UserError where the file is missing, damaged, incomplete, or of another task.

        task: None for a cache that no stage wrote; it need not hold the attributes that stages
        read. maker: the command that writes it, for the sentences.
        """
        file = open_file(path, maker)
        stored, done = stored_attributes(file), file["done"][:] == 1
        cached = stored.get("task")
        if task is not None and cached != task:
            raise UserError(f"{path} holds features of {cached}, not {task}: set TASK, RUN_DIR or "
                            "FEATURES")
        if not done.all():
            raise UserError(f"{path} lacks {(~done).sum()} of its {len(done)} images: run "
                            f"{maker} first, it goes on where it stopped")
        if task is not None:
            _require_attributes(path, stored)
        return cls(path, file)

    def identity(self) -> str:
        """16 hex digits over what the features were made of: models, constants, images and masks.

        Two caches with the same identity are interchangeable, though embeddings that another
        machine computed are rounded differently.
        """
        made_of = {name: value for name, value in sorted(self.attrs.items())
                   if name not in NOT_COMPARED}
        content = self._crc[:, [SUMMED.index("pictures"), SUMMED.index("labels")]].tolist()
        told = json.dumps([made_of, self._names, self.file["shots"][:].tolist(), content],
                          sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def samples(self, split: str) -> np.ndarray:
        """int64 (S, 2). "train": the drawn shots; "test": each test image with each text in it.

        Raises UserError where there is no such test image.
        """
        if split == "train":
            return self.file["shots"][:].astype(np.int64)
        in_split = self.file["split"][:] == split.encode()
        samples = np.argwhere(in_split[:, None] & self.present(range(len(in_split))))
        if not len(samples):
            raise UserError(f"{self.path} holds no {split} image with {' or '.join(self.texts)} in "
                            "it: look whether the masks hold what TASK names, and run "
                            "01_cache_features.py into another RUN_DIR")
        return samples

    def present(self, rows: Sequence[int]) -> np.ndarray:
        """bool (B, K): which of the texts these images hold."""
        stored = self.file["present"][:]
        return np.stack([self._checked("present", int(row), stored[row]) for row in rows]) == 1

    def drawn(self, shots: int) -> np.ndarray:
        """int64 (S, 2): the first `shots` drawn samples (0: all).

        A smaller draw is part of every larger one (Table 10). Raises UserError where there are
        fewer.
        """
        samples = self.samples("train")
        if max(shots, 1) > len(samples):
            raise UserError(f"SHOTS={shots} is more than the {len(samples)} samples drawn in "
                            f"{self.path}: set it lower, or run stage 1 with more SHOTS into "
                            "another RUN_DIR")
        return samples[:shots or None]

    def training_set(self, shots: int, rounds: int, device: torch.device) -> TrainingSet:
        """The first `shots` drawn samples (0: all) on `device`.

        Raises UserError as `drawn`, and where they are too few to compare, or where one has fewer
        than `rounds` patches.
        """
        if shots == 1:
            raise UserError("SHOTS=1 is too few: advantages compare samples, so set it to 2 or "
                            "more")
        samples = self.drawn(shots)
        centres = self.truth_centres(samples)
        fewest = int((centres != IGNORE).sum(1).min())
        if rounds > fewest:
            raise UserError(f"ROUNDS={rounds} is more than the {fewest} patches of one training "
                            "sample that are not ignored: set it lower")
        texts = range(len(self.texts))
        pairs = [np.column_stack([samples[:, 0], np.full(len(samples), text)]) for text in texts]
        return TrainingSet(
            samples=samples,
            embeddings=self.embeddings(samples).to(device).float(),
            maps=self.maps(samples).to(device),
            truth=self.truth_grid(samples).to(device),
            every_map=torch.stack([self.maps(some) for some in pairs], 1).to(device),
            every_truth=torch.stack([self.truth_grid(some) for some in pairs], 1).to(device),
            present=torch.from_numpy(self.present(samples[:, 0])),
            truth_centres=centres.to(device),
            label_maps=[self.label_map(sample) for sample in samples])

    def embedding(self, rows: Sequence[int]) -> torch.Tensor:
        """float16 (B, C, h, w): F of these images."""
        dataset = self.file["embeddings"]
        entries = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
        for index, row in enumerate(rows):
            entry = entries[index].reshape(-1).view(np.uint8)
            try:  # the chunk as it lies in the file: HDF5's own way takes half as long again
                dataset.id.read_direct_chunk((int(row), 0, 0, 0), out=entry)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{self.path} is damaged (/embeddings of {self._names[row]}: "
                                f"{error}): {AGAIN}") from error
            self._checked("embeddings", int(row), entries[index])
        return torch.from_numpy(entries)

    def embeddings(self, samples: np.ndarray) -> torch.Tensor:
        """float16 (B, C, h, w): F of the samples' images."""
        return self.embedding([row for row, _ in samples])

    def maps(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (B, h, w) in [0, 1]: M_c of each sample's own text."""
        return self._of_texts("maps", samples).float()

    def truth_grid(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (B, h, w): see `truth_on_grid`."""
        return self._of_texts("truth_grid", samples).float()

    def truth_centres(self, samples: np.ndarray) -> torch.Tensor:
        """uint8 (B, P): see `truth_at_centres`."""
        return self._of_texts("truth_centres", samples)

    def _of_texts(self, dataset: str, samples: np.ndarray) -> torch.Tensor:
        """Each sample's own text of a dataset (N, K, ...)."""
        values = []
        for row, text in samples.tolist():  # one by one: h5py indexes with rising rows only
            values.append(self._checked(dataset, row, self.file[dataset][row])[text])
        return torch.from_numpy(np.stack(values))

    def label_map(self, sample: Sequence[int]) -> np.ndarray:
        """uint8 (H, W), the image's own size: 1 = the sample's text, 0 = not, 255 = ignored."""
        row, text = sample
        return binary(self.every_label(row), text + 1)

    def every_label(self, row: int) -> np.ndarray:
        """uint8 (H, W), the image's own size: 0 background, k + 1 = text k, 255 ignored."""
        flat = self.file["labels"][self._offsets[row]:self._offsets[row + 1]]
        return self._checked("labels", int(row), flat).reshape(self._sizes[row])

    def truth(self, samples: np.ndarray) -> Truth:
        """The ground truth of the samples."""
        label_maps = [self.label_map(sample) for sample in samples]
        return Truth(label_maps, self.truth_centres(samples))

    def picture(self, sample: Sequence[int]) -> np.ndarray:
        """uint8 (256, 256, 3), RGB: the squashed image."""
        row = int(sample[0])
        return self._checked("pictures", row, self.file["pictures"][row])

    def name(self, sample: Sequence[int]) -> str:
        return self._names[sample[0]]

    def place(self, row: int) -> str:
        """split/name of an image, as `Sample.place` has it."""
        return composed(f"{self.file['split'][row].decode()}/{self._names[row]}")

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) of an image, pixels."""
        return tuple(self._sizes[row].tolist())

    def _checked(self, dataset: str, row: int, values: np.ndarray) -> np.ndarray:
        """`values`, one image's part of a dataset. Raises UserError if their CRC is another."""
        if (dataset, row) not in self._compared:
            if zlib.crc32(values) != self._crc[row, SUMMED.index(dataset)]:
                raise UserError(f"{self.path} is damaged (/{dataset} of {self._names[row]} is not "
                                f"what was written): {AGAIN}")
            self._compared.add((dataset, row))
        return values


def _require_attributes(path: Path, stored: dict) -> None:
    """Raises UserError naming the first attribute of READ that is missing or makes no sense."""
    fits = {name: isinstance(stored.get(name), kind) for name, kind in READ.items()}
    fits["branch"] = stored.get("branch") in ("implicit", "explicit")
    fits["precision"] = stored.get("precision") in ("fp32", "bf16")
    fits["image_size"] = stored.get("image_size") == stored["frame"]
    fits["clip_size"] = fits["clip_size"] and stored["clip_size"] > 0
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise UserError(f"{path} is damaged or not a feature cache (its attribute {wrong[0]} is "
                        f"{stored.get(wrong[0])}): {AGAIN}")
