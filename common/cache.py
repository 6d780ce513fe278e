"""The feature cache: one HDF5 file that any HDF5 reader opens, also while it is being written.

N images, K texts, S drawn training samples, P = (frame / patch_size)^2 patch centres, a C x h x w embedding:

    /names          (N,)              utf-8    image names
    /split          (N,)              utf-8    "train" or "test"
    /sizes          (N, 2)            int32    height, width of image and label map, in pixels
    /shots          (S, 2)            int32    the drawn training samples: image row, text index
    /done           (N,)              uint8    1 = all that follows is whole for the image, 0 = do not read it
    /embeddings     (N, C, h, w)      float16  SAM's image embedding F, one image a chunk
    /maps           (N, K, h, w)      float16  CLIP Surgery's maps M_c, in [0, 1]
    /truth_grid     (N, K, h, w)      float16  foreground share of each grid cell, -1 = all of it is ignored
    /truth_centres  (N, K, P)         uint8    truth under each patch centre: 1, 0, 255 = ignored
    /present        (N, K)            uint8    1 = the image has foreground of text k; all 1 where K = 1
    /pictures       (N, 256, 256, 3)  uint8    the squashed image, RGB, for drawing
    /labels         (sum of H * W,)   uint8    full-size label maps: 0 background, k + 1 = text k, 255 ignored
    /label_offsets  (N + 1,)          int64    map i is labels[o[i]:o[i + 1]].reshape(sizes[i])
    /crc            (N, 7)            uint32   CRC-32 of the image's part of each dataset, in the order of SUMMED below

Root attributes: `format`, `texts` (JSON), `embedding` (JSON: [C, h, w]), `frame`, `patch_size`, and what the
writing script adds: numbers and strings as they are, anything else as JSON.

A kill does no harm. `create` lays out the whole file under another name, reserves its space and renames it;
HDF5 never opens it for writing again. An entry's bytes go straight to the offsets that HDF5 reports, are
synced, and only then is its `done` byte set. So a kill can neither damage HDF5's own structures nor leave a
half-written entry that counts as whole. Once the file exists, several processes may write different images.
Needs `os.pwrite` (Linux, macOS, WSL).

What a disk or a copy damaged is not computed with: HDF5 keeps checksums of its own structures (readers need HDF5
1.10 or newer), and each image's part of a dataset is compared with its CRC when it is first read.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from common.runtime.errors import UserError

FORMAT = 2  # raised whenever the schema above changes
PICTURE = 256  # side of /pictures, pixels
IGNORE = 255
CHUNKED = ("embeddings", "maps", "truth_grid", "pictures")  # one image a chunk; the others are contiguous
SUMMED = (*CHUNKED, "truth_centres", "present", "labels")
ENTRY = (*SUMMED, "crc", "done")  # what is written image by image
NOT_COMPARED = ("time", "versions")  # attributes in which a resumed run may differ from the file
MEND = "set another RUN_DIR or FEATURES, or delete the file"
AGAIN = "delete it and run 01_cache_features.py again"
WRITTEN = {  # attributes that the other stages read, beside the layout's own
    "task": str, "branch": str, "sam": str, "sam_fingerprint": str, "clip": str, "clip_fingerprint": str,
    "clip_size": int, "image_size": int, "precision": str}


@dataclass(frozen=True)
class Layout:
    """All that is known of a cache before its first image is encoded."""

    names: Sequence[str]  # N image names
    splits: Sequence[str]  # N times "train" or "test"
    sizes: Sequence[tuple[int, int]]  # N label map sizes (H, W), pixels
    shots: Sequence[tuple[int, int]]  # S drawn training samples (image row, text index)
    texts: Sequence[str]  # K
    embedding: tuple[int, int, int]  # C, h, w
    frame: int  # side of the squashed image in which points are given, pixels
    patch: int  # side of a patch in that frame, pixels


def truth_on_grid(labels: np.ndarray, label: int, grid: tuple[int, int]) -> np.ndarray:
    """Foreground share of each cell of an h x w grid laid over the (squashed) label map.

    labels: uint8 (H, W). Returns float16 (h, w): area of `label` / area not ignored, -1 where all is ignored.
    A pixel that lies in several cells counts in each by the area it covers there. Areas are counted in units
    of 1/h x 1/w pixel: whole numbers, so the sums are exact and the same on every machine.
    """
    rows, cols = (_overlaps(size, cells) for size, cells in zip(labels.shape, grid))
    valid = rows @ (labels != IGNORE) @ cols.T
    foreground = rows @ (labels == label) @ cols.T
    return np.where(valid > 0, foreground / np.maximum(valid, 1), -1).astype(np.float16)


def _overlaps(size: int, cells: int) -> np.ndarray:
    """float64 (cells, size): how much of each pixel lies in each cell, in units of 1/cells pixel."""
    cell, pixel = np.arange(cells)[:, None] * size, np.arange(size) * cells
    overlap = np.minimum(cell + size, pixel + cells) - np.maximum(cell, pixel)
    return overlap.clip(min=0).astype(np.float64)


def truth_at_centres(labels: np.ndarray, label: int, frame: int, patch: int) -> np.ndarray:
    """Truth under the patch centres (Eq. 3), row by row: uint8 (P,), 1 = `label`, 0 = not, 255 = ignored.

    A centre (cx, cy) of the frame lies on pixel x = floor(cx / frame * W), y = floor(cy / frame * H).
    """
    twice = (2 * np.arange(frame // patch) + 1) * patch  # 2 cx: whole, so floor is exact
    y, x = (twice * size // (2 * frame) for size in labels.shape)
    return _binary(labels[np.ix_(y, x)], label).reshape(-1)


def _binary(labels: np.ndarray, label: int) -> np.ndarray:
    return np.where(labels == IGNORE, IGNORE, labels == label).astype(np.uint8)


def bytes_per_image(embedding: Sequence[int], texts: int, size: Sequence[int], patches: int = 100) -> int:
    """Bytes that one image of `size` (H, W) takes in the cache, without its name. embedding: (C, h, w)."""
    schema = _schema(1, texts, embedding, patches, size[0] * size[1], 0)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in schema.values())


def _schema(n: int, k: int, embedding: Sequence[int], p: int, pixels: int, s: int) -> dict[str, tuple]:
    """Shape and dtype of every dataset but the two of strings: the table above."""
    c, h, w = embedding
    schema = {
        "sizes": ((n, 2), "<i4"),
        "shots": ((s, 2), "<i4"),
        "done": ((n,), "u1"),
        "embeddings": ((n, c, h, w), "<f2"),
        "maps": ((n, k, h, w), "<f2"),
        "truth_grid": ((n, k, h, w), "<f2"),
        "truth_centres": ((n, k, p), "u1"),
        "present": ((n, k), "u1"),
        "pictures": ((n, PICTURE, PICTURE, 3), "u1"),
        "labels": ((pixels,), "u1"),
        "label_offsets": ((n + 1,), "<i8"),
        "crc": ((n, len(SUMMED)), "<u4"),
    }
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in schema.items()}


def _known(layout: Layout) -> dict[str, np.ndarray]:
    """The datasets whose values a layout already holds."""
    sizes = np.array(layout.sizes, "<i4").reshape(-1, 2)
    return {
        "names": np.array([os.fsencode(name) for name in layout.names]),
        "split": np.array([split.encode() for split in layout.splits]),
        "sizes": sizes,
        "shots": np.array(layout.shots, "<i4").reshape(-1, 2),
        "label_offsets": _label_offsets(sizes),
    }


def _label_offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], sizes.prod(1, dtype=np.int64).cumsum()]).astype("<i8")


def _attributes(layout: Layout, attributes: dict) -> dict:
    """Root attributes as stored; the caller's come first, so that a contradiction names their constant."""
    own = {"texts": list(layout.texts), "embedding": list(layout.embedding)}
    own |= {"frame": layout.frame, "patch_size": layout.patch, "format": FORMAT}
    stored = {**attributes, **own}
    return {key: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for key, v in stored.items()}


def _stored_attributes(file: h5py.File) -> dict:
    return {key: v.tolist() if isinstance(v, (np.generic, np.ndarray)) else v for key, v in file.attrs.items()}


def create(path: Path, layout: Layout, attributes: dict) -> None:
    """Lay out a cache with no image done. Raises UserError where the disk is full or not writable."""
    known, n, k, p = _known(layout), len(layout.names), len(layout.texts), (layout.frame // layout.patch) ** 2
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        needed = sum(bytes_per_image(layout.embedding, k, size, p) for size in layout.sizes)
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(f"{path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
                            "make room, or set RUN_DIR or FEATURES to a place on another disk")
        with h5py.File(unfinished, "w", libver="v110") as file:  # from which version on HDF5 checks its own structures
            file.attrs.update(_attributes(layout, attributes))
            for name, values in {**known, "done": np.zeros(n, np.uint8)}.items():
                if values.dtype.kind == "S":
                    values = values.astype(h5py.string_dtype("utf-8", values.itemsize))
                file.create_dataset(name, data=values)
            pixels = int(known["label_offsets"][-1])
            for name, (shape, dtype) in _schema(n, k, layout.embedding, p, pixels, len(layout.shots)).items():
                if name not in file:
                    _allocate(file, name, shape, dtype)
        with open(unfinished, "r+b") as file:
            _reserve(file.fileno(), os.path.getsize(unfinished))
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's where it cannot write as it closes the file
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else "it cannot be written to its end"
        raise UserError(f"{path} cannot be created ({reason}): make room, or set another RUN_DIR or "
                        "FEATURES") from error


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An empty dataset whose place in the file is fixed from now on (create_dataset allocates on writing)."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # or the whole file would be written twice
    if name in CHUNKED:
        properties.set_chunk((1, *shape[1:]))
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                os.truncate(fd, 0)  # give back what was reserved
                raise  # any other: a file system that cannot reserve


def _open(path: Path) -> h5py.File:
    """Open a cache for reading. Raises UserError naming the file where its parts do not fit each other."""
    try:
        file = h5py.File(path, "r")
        stored, n = _stored_attributes(file), len(file["names"])
        if stored["format"] != FORMAT:
            raise UserError(f"{path} has cache format {stored['format']}, this code reads {FORMAT}: {AGAIN}")
        texts, embedding = json.loads(stored["texts"]), json.loads(stored["embedding"])
        frame, patch = stored["frame"], stored["patch_size"]
        _require(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts),
                 "texts are no texts")
        _require(isinstance(frame, int) and isinstance(patch, int) and 0 < patch <= frame and frame % patch == 0,
                 f"PATCH_SIZE={patch} does not divide a frame of {frame}")
        p, pixels = (frame // patch) ** 2, int(file["label_offsets"][-1])
        for name, (shape, dtype) in _schema(n, len(texts), embedding, p, pixels, len(file["shots"])).items():
            if (file[name].shape, file[name].dtype) != (shape, dtype):
                raise ValueError(f"/{name} is {file[name].dtype} {file[name].shape} and not {dtype} {shape}")
        filters = file["embeddings"].id.get_create_plist().get_nfilters()
        if filters or file["embeddings"].chunks != (1, *embedding):
            chunk = "x".join(map(str, (1, *embedding)))
            raise UserError(f"{path}: /embeddings was compressed or chunked anew by another tool: undo it with "
                            f"h5repack -f NONE -l embeddings:CHUNK={chunk}, or {AGAIN}")
        sizes, shots, split = (file[name][:] for name in ("sizes", "shots", "split"))
        _require((sizes > 0).all() and np.array_equal(file["label_offsets"][:], _label_offsets(sizes)),
                 "/sizes and /label_offsets contradict each other")
        _require(len(split) == n and set(split) <= {b"train", b"test"}, "/split holds another word than train and test")
        _require((shots >= 0).all() and (shots < (n, len(texts))).all() and (split[shots[:, 0]] == b"train").all()
                 and len(np.unique(shots, axis=0)) == len(shots),
                 "/shots names other than training samples, or one twice")
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        if getattr(error, "errno", None):  # the system's complaint, not HDF5's
            raise UserError(f"{path} cannot be opened ({os.strerror(error.errno)}): {MEND}") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a feature cache ({reason}): {AGAIN}") from error
    return file


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _require_attributes(path: Path, stored: dict) -> None:
    """Raises UserError naming the first attribute that a stage reads and that is missing, or of no sense."""
    fits = {name: isinstance(stored.get(name), kind) for name, kind in WRITTEN.items()}
    fits |= {"branch": stored.get("branch") in ("implicit", "explicit"),
             "precision": stored.get("precision") in ("fp32", "bf16"),
             "image_size": stored.get("image_size") == stored["frame"],
             "clip_size": fits["clip_size"] and stored["clip_size"] > 0}
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise UserError(f"{path} is damaged or not a feature cache (its attribute {wrong[0]} is "
                        f"{stored.get(wrong[0])}): {AGAIN}")


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

    def targets(self, rows: torch.Tensor, every_text: bool,
                generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """M_c and y on the grid, (B, h, w) each, of the rows' texts, or of texts that their images hold, at random."""
        if not every_text or len(self.present[0]) == 1:
            return self.maps[rows], self.truth[rows]
        texts = torch.multinomial(self.present[rows.cpu()].float(), 1, generator=generator)[:, 0].to(rows.device)
        return self.every_map[rows, texts], self.every_truth[rows, texts]


class Cache:
    """A complete cache, read-only. `samples` are int (B, 2) rows (image row, text index), in any order."""

    def __init__(self, path: Path, file: h5py.File):
        self.path, self.file, self.attrs = path, file, _stored_attributes(file)
        self.texts: tuple[str, ...] = tuple(json.loads(self.attrs["texts"]))
        self.channels: int = file["embeddings"].shape[1]  # C
        self.grid: tuple[int, int] = file["embeddings"].shape[2:]  # h, w
        self._names = [os.fsdecode(name) for name in file["names"][:]]
        self._sizes, self._offsets = file["sizes"][:], file["label_offsets"][:]
        self._crc = file["crc"][:]
        self._compared: set[tuple[str, int]] = set()  # dataset and image; once is enough, and reading is to be fast

    @classmethod
    def open(cls, path: Path, task: str | None = None, maker: str = "01_cache_features.py") -> "Cache":
        """Raises UserError where the file is missing, damaged, incomplete, or of another task than `task`.

        task: None for a cache that no stage wrote, and that need not hold the attributes which the stages read.
        maker: the command that writes it, for those sentences.
        """
        if not path.exists():
            raise UserError(f"{path} does not exist: run {maker} first")
        file = _open(path)
        stored, done = _stored_attributes(file), file["done"][:] == 1
        cached = stored.get("task")
        if task is not None and cached != task:
            raise UserError(f"{path} holds features of {cached}, not {task}: set TASK, RUN_DIR or FEATURES")
        if not done.all():
            raise UserError(f"{path} lacks {(~done).sum()} of its {len(done)} images: run "
                            f"{maker} first, it goes on where it stopped")
        if task is not None:
            _require_attributes(path, stored)
        return cls(path, file)

    def identity(self) -> str:
        """16 hex digits over what the features were made of: models, constants, images and masks.

        Two caches with the same identity are interchangeable, though embeddings of another machine round differently.
        """
        made_of = {key: value for key, value in sorted(self.attrs.items()) if key not in NOT_COMPARED}
        content = self._crc[:, [SUMMED.index("pictures"), SUMMED.index("labels")]].tolist()
        told = json.dumps([made_of, self._names, self.file["shots"][:].tolist(), content], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def samples(self, split: str) -> np.ndarray:
        """int64 (S, 2). "train": the drawn shots; "test": each test image with each text present in it.

        Raises UserError where there is no such test image.
        """
        if split == "train":
            return self.file["shots"][:].astype(np.int64)
        present = np.stack([self._compare("present", row, texts) for row, texts in enumerate(self.file["present"][:])])
        samples = np.argwhere((self.file["split"][:] == split.encode())[:, None] & (present == 1))
        if not len(samples):
            raise UserError(f"{self.path} holds no {split} image with {' or '.join(self.texts)} in it: look whether "
                            "the masks hold what TASK names, and run 01_cache_features.py into another RUN_DIR")
        return samples

    def training_set(self, shots: int, rounds: int, device: torch.device) -> "TrainingSet":
        """The first `shots` drawn samples (0: all) on `device`; a smaller draw is part of every larger one (Table 10).

        Raises UserError where there are fewer, or too few to compare, or where one has fewer than `rounds` patches.
        """
        samples = self.samples("train")
        if max(shots, 1) > len(samples):
            raise UserError(f"SHOTS={shots} is more than the {len(samples)} samples drawn in {self.path}: set it "
                            "lower, or run stage 1 with more SHOTS into another RUN_DIR")
        if shots == 1:
            raise UserError("SHOTS=1 is too few: advantages compare samples, so set it to 2 or more")
        samples = samples[:shots or None]
        centres = self.truth_centres(samples)
        fewest = int((centres != 255).sum(1).min())
        if rounds > fewest:
            raise UserError(f"ROUNDS={rounds} is more than the {fewest} patches of one training sample: set it lower")
        texts = range(len(self.texts))
        every = [np.column_stack([samples[:, 0], np.full(len(samples), text)]) for text in texts]
        every_map, every_truth = (torch.stack([read(pairs) for pairs in every], 1)
                                  for read in (self.maps, self.truth_grid))
        return TrainingSet(
            samples, self.embeddings(samples).float().to(device), self.maps(samples).to(device),
            self.truth_grid(samples).to(device), every_map.to(device), every_truth.to(device),
            torch.from_numpy(self.file["present"][:][samples[:, 0]] == 1), centres.to(device),
            [self.label_map(sample) for sample in samples])

    def _compare(self, dataset: str, row: int, values: np.ndarray) -> np.ndarray:
        """`values`, one image's part of a dataset. Raises UserError where they are not what was written."""
        if (dataset, row) not in self._compared:
            if zlib.crc32(values) != self._crc[row, SUMMED.index(dataset)]:
                raise UserError(f"{self.path} is damaged (/{dataset} of {self._names[row]} is not what was written): "
                                f"{AGAIN}")
            self._compared.add((dataset, row))
        return values

    def embedding(self, rows: Sequence[int]) -> torch.Tensor:
        """float16 (B, C, h, w): F of these images."""
        dataset = self.file["embeddings"]
        entries = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
        for index, row in enumerate(rows):  # the chunk as it lies in the file: HDF5's own way takes half as long again
            try:
                dataset.id.read_direct_chunk((int(row), 0, 0, 0), out=entries[index].reshape(-1).view(np.uint8))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{self.path} is damaged (/embeddings of {self._names[row]}: {error}): "
                                f"{AGAIN}") from error
            self._compare("embeddings", int(row), entries[index])
        return torch.from_numpy(entries)

    def embeddings(self, samples: np.ndarray) -> torch.Tensor:
        """float16 (B, C, h, w): F of the samples' images."""
        return self.embedding([row for row, _ in samples])

    def maps(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (B, h, w) in [0, 1]: M_c of each sample's own text."""
        return self._pairs("maps", samples).float()

    def truth_grid(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (B, h, w): see `truth_on_grid`."""
        return self._pairs("truth_grid", samples).float()

    def truth_centres(self, samples: np.ndarray) -> torch.Tensor:
        """uint8 (B, P): see `truth_at_centres`."""
        return self._pairs("truth_centres", samples)

    def _pairs(self, dataset: str, samples: np.ndarray) -> torch.Tensor:
        # one by one: h5py's fancy indexing takes rising rows only
        return torch.from_numpy(np.stack([self._compare(dataset, int(row), self.file[dataset][int(row)])[int(text)]
                                          for row, text in samples]))

    def label_map(self, sample: Sequence[int]) -> np.ndarray:
        """uint8 (H, W), the image's own size: 1 = the sample's text, 0 = anything else, 255 = ignored."""
        row, text = sample
        flat = self._compare("labels", int(row), self.file["labels"][self._offsets[row] : self._offsets[row + 1]])
        return _binary(flat.reshape(self._sizes[row]), text + 1)

    def picture(self, sample: Sequence[int]) -> np.ndarray:
        """uint8 (256, 256, 3), RGB: the squashed image."""
        row = int(sample[0])
        return self._compare("pictures", row, self.file["pictures"][row])

    def name(self, sample: Sequence[int]) -> str:
        return self._names[sample[0]]


def _refuse_contradictions(path: Path, file: h5py.File, layout: Layout, attributes: dict) -> None:
    """Raises UserError at the first attribute or array in which the file differs from a new one."""
    old, new = _stored_attributes(file), _attributes(layout, attributes)
    for key in new:
        if key not in NOT_COMPARED and old.get(key) != new[key]:
            raise UserError(f"{path} was written with {key.upper()}={old.get(key)}, and now it is "
                            f"{new[key]}: {MEND}")
    for name, values in _known(layout).items():
        was, now = file[name][:].tolist(), values.tolist()
        if was != now:
            differ = next((pair for pair in zip(was, now) if pair[0] != pair[1]), (len(was), len(now)))
            then, today = (os.fsdecode(value) if isinstance(value, bytes) else value for value in differ)
            raise UserError(f"{path} was written for other images than DATA_DIR holds now "
                            f"(/{name}: {then} then, {today} now): {MEND}")


def _offsets(file: h5py.File, name: str) -> list[int]:
    """Where each image's entry of a dataset starts in the file, in bytes."""
    dataset, n = file[name], len(file["names"])
    if name in CHUNKED:
        return [dataset.id.get_chunk_info_by_coord((row, 0, 0, 0)).byte_offset for row in range(n)]
    row = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    starts = file["label_offsets"][:-1] if name == "labels" else np.arange(n) * row
    return (dataset.id.get_offset() + starts).tolist()


class CacheWriter:
    """Fills a cache image by image, in any order; a context manager. HDF5 has the file closed meanwhile."""

    def __init__(self, path: Path, file: h5py.File):
        self.path, self.fd = path, os.open(path, os.O_RDWR)
        self.names, self.sizes = [os.fsdecode(name) for name in file["names"][:]], file["sizes"][:].tolist()
        self.frame, self.patch = int(file.attrs["frame"]), int(file.attrs["patch_size"])
        entry = [name for name in ENTRY if name in file]  # all, but in a file from before there were CRCs
        self.rows = {name: (file[name].shape[1:], file[name].dtype) for name in entry}
        self.offsets = {name: _offsets(file, name) for name in entry}

    @classmethod
    def open_or_create(cls, path: Path, layout: Layout, attributes: dict) -> "CacheWriter":
        """Go on with the file at `path`, or create it.

        attributes: what the features depend on, under the constants' names in lower case ("seed" for SEED),
        and "time" and "versions", the two that may differ from the file's.
        Raises UserError naming the constant where the file contradicts `attributes` or `layout`.
        """
        if not path.exists():
            create(path, layout, attributes)
        with _open(path) as file:
            _refuse_contradictions(path, file, layout, attributes)
            return cls(path, file)

    def missing(self) -> list[int]:
        """The rows that are not done, read afresh from the file."""
        flags = os.pread(self.fd, len(self.names), self.offsets["done"][0])
        return [row for row, flag in enumerate(flags) if flag != 1]

    def write(self, row: int, embedding, maps, labels: np.ndarray, picture: np.ndarray) -> None:
        """Write one image's entry, then mark it done. A row that is done already is left as it is.

        embedding: (C, h, w) and maps: (K, h, w), tensors or arrays, stored as float16. labels: uint8 (H, W).
        picture: uint8 (256, 256, 3). Raises UserError naming the image, with nothing written, where the
        embedding or a map is not finite in float16 or the label map has another size than the layout says.
        """
        if row not in self.missing():
            return
        name, size = self.names[row], tuple(self.sizes[row])
        if labels.shape != size:
            raise UserError(f"{name} is now {labels.shape} pixels, but {size} in {self.path}: {MEND}")
        entry = {"labels": labels, "pictures": picture}
        for dataset, values in (("embeddings", embedding), ("maps", maps)):
            entry[dataset] = torch.as_tensor(values).detach().to("cpu", torch.float16).numpy()
            if not np.isfinite(entry[dataset]).all():
                what = {"embeddings": "SAM's embedding", "maps": "the CLIP map"}[dataset]
                raise UserError(f"{what} of {name} holds NaN or infinite values: set PRECISION to fp32, "
                                "or check the weights")
        texts, grid = range(1, len(entry["maps"]) + 1), entry["embeddings"].shape[1:]
        centres = [truth_at_centres(labels, k, self.frame, self.patch) for k in texts]
        present = [len(texts) == 1 or (labels == k).any() for k in texts]
        entry["truth_grid"] = np.stack([truth_on_grid(labels, k, grid) for k in texts])
        entry["truth_centres"], entry["present"] = np.stack(centres), np.array(present, np.uint8)
        if "crc" in self.rows:
            entry["crc"] = np.array([zlib.crc32(np.ascontiguousarray(entry[dataset])) for dataset in SUMMED], "<u4")
        for dataset, values in entry.items():  # before the first byte: a wrong size would hit a neighbour
            shape, dtype = self.rows[dataset]
            shape = size if dataset == "labels" else shape
            if (values.shape, values.dtype) != (shape, dtype):
                raise ValueError(f"{dataset}: {values.dtype} {values.shape}, expected {dtype} {shape}")
        for dataset, values in entry.items():
            self._put(dataset, row, values)
        os.fsync(self.fd)  # the data are on the disk before the flag that vouches for them
        self._put("done", row, np.ones((), np.uint8))  # synced with the next entry, or by `close`

    def _put(self, name: str, row: int, values: np.ndarray) -> None:
        data, offset = memoryview(values.tobytes()), self.offsets[name][row]
        while data:  # a signal may cut a write short
            try:
                written = os.pwrite(self.fd, data, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error  # pwrite knows no name
            data, offset = data[written:], offset + written

    def close(self) -> None:
        os.fsync(self.fd)
        os.close(self.fd)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()
