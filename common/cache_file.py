"""The feature cache's file format: HDF5 that any reader opens, also while it is being written.

N images, K texts, S drawn training samples, P = (frame / patch_size)^2 patch centres, and an
embedding of C x h x w:

    /names          (N,)              utf-8    image names
    /split          (N,)              utf-8    "train" or "test"
    /sizes          (N, 2)            int32    height, width of image and label map, in pixels
    /shots          (S, 2)            int32    drawn training samples: image row, text index;
                                               the first n of them are the draw of n
    /done           (N,)              uint8    1 = the image's entry is whole, 0 = do not read it
    /embeddings     (N, C, h, w)      float16  SAM's image embedding F, one image a chunk
    /maps           (N, K, h, w)      float16  CLIP Surgery's maps M_c, in [0, 1]
    /truth_grid     (N, K, h, w)      float16  foreground share of each grid cell, -1 = all ignored
    /truth_centres  (N, K, P)         uint8    truth under each patch centre: 1, 0, 255 = ignored
    /present        (N, K)            uint8    1 = the image has foreground of text k; 1 where K = 1
    /pictures       (N, 256, 256, 3)  uint8    the squashed image, RGB, for drawing
    /labels         (sum of H * W,)   uint8    label maps: 0 background, k + 1 = text k, 255 ignored
    /label_offsets  (N + 1,)          int64    map i is labels[o[i]:o[i + 1]].reshape(sizes[i])
    /crc            (N, 7)            uint32   CRC-32 of the image's part of each dataset of SUMMED

Root attributes: `format`, `texts` (JSON), `embedding` (JSON: [C, h, w]), `frame`, `patch_size`, and
what the writing script adds: numbers and strings as they are, anything else as JSON.

A kill does no harm. `create` lays out the whole file under another name, reserves its space and
renames it; HDF5 never opens it for writing again. An entry's bytes go straight to the offsets that
HDF5 reports and are synced; only then is its `done` byte set. So a kill can neither damage HDF5's
own structures nor leave a half-written entry that counts as whole. Once the file exists, several
processes may write different images. Needs `os.pwrite` (Linux, macOS, WSL). Where SKIP has changed
the images, a second file is laid out and filled with the entries that stay, and then renamed.

Damage by a disk or a copy is noticed: HDF5 keeps checksums of its own structures (readers need
HDF5 1.10 or newer), and each image's part of a dataset is compared with its CRC when it is first
read.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from common.frozen.clip_weights import absolute_clip
from common.frozen.sam_weights import absolute_sam
from common.images import composed
from common.label_maps import IGNORE
from common.layers import interval_overlaps
from common.open_mark import IN_USE, unmarked
from common.runtime.errors import UserError, some
from common.runtime.reading import reading
from common.runtime.settings import require_same

FORMAT = 2  # raised whenever the schema above changes
PICTURE = 256  # side of /pictures, pixels
CHUNKED = ("embeddings", "maps", "truth_grid", "pictures")  # one image a chunk; others contiguous
SUMMED = (*CHUNKED, "truth_centres", "present", "labels")
ENTRY = (*SUMMED, "crc", "done")  # what is written image by image
NOT_COMPARED = ("time", "versions")  # attributes in which a resumed run may differ from the file
ADDED = {"encoder_fingerprint", "clip_setup"}  # that older caches lack
KNOWN_BY = {"sam": ("sam_fingerprint", "encoder_fingerprint"),
            "clip": ("clip_fingerprint", "clip_setup")}
MEND = "set another RUN_DIR or FEATURES, or delete the file"
AGAIN = "delete it and run 01_cache_features.py again"


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


# ---- what is stored of an image ------------------------------------------------------------------


def truth_on_grid(label_map: np.ndarray, label: int, grid: tuple[int, int]) -> np.ndarray:
    """Foreground share of each cell of an h x w grid laid over the (squashed) label map.

    label_map: uint8 (H, W). Returns float16 (h, w): area of `label` / area not ignored, -1 where
    all is ignored. A pixel that lies in several cells counts in each by the area it covers there.
    """
    down, across = (_cell_overlaps(size, cells) for size, cells in zip(label_map.shape, grid))
    valid = down @ (label_map != IGNORE) @ across.T
    foreground = down @ (label_map == label) @ across.T
    return np.where(valid > 0, foreground / np.maximum(valid, 1), -1).astype(np.float16)


def _cell_overlaps(pixels: int, cells: int) -> np.ndarray:
    """float64 (cells, pixels): how much of each pixel of a line lies in each of its equal cells.

    The unit is 1 / cells of a pixel. All overlaps are then whole numbers, and sums are exact.
    """
    edges, pixel_edges = np.arange(cells + 1) * pixels, np.arange(pixels + 1) * cells
    return interval_overlaps(edges, pixel_edges).astype(np.float64)


def truth_at_centres(label_map: np.ndarray, label: int, frame: int, patch: int) -> np.ndarray:
    """Truth under the patch centres (Eq. 3), row by row: uint8 (P,).

    label_map: uint8 (H, W). Returns 1 where it is `label`, 0 where it is not, 255 = ignored. The
    centre (cx, cy) of the frame lies on pixel x = floor(cx / frame * W), y = floor(cy / frame * H).
    """
    twice = (2 * np.arange(frame // patch) + 1) * patch  # 2 cx: whole, so floor is exact
    y, x = (twice * size // (2 * frame) for size in label_map.shape)
    return binary(label_map[np.ix_(y, x)], label).reshape(-1)


def binary(label_map: np.ndarray, label: int) -> np.ndarray:
    """uint8, the same shape: 1 = `label`, 0 = another one, 255 = ignored."""
    return np.where(label_map == IGNORE, IGNORE, label_map == label).astype(np.uint8)


def bytes_per_image(embedding: Sequence[int], texts: int, size: Sequence[int],
                    patches: int = 100) -> int:
    """Bytes that one image takes in the cache, without its name.

    embedding: (C, h, w). texts: K. size: (H, W) of the image.
    """
    schema = _schema(1, texts, embedding, patches, size[0] * size[1], 0)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in schema.values())


# ---- the file as a whole -------------------------------------------------------------------------


def _schema(n: int, k: int, embedding: Sequence[int], p: int, pixels: int,
            s: int) -> dict[str, tuple]:
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


def _attributes(layout: Layout, made_with: dict) -> dict:
    """Root attributes as stored.

    The script's come first, so that a message about a difference names one of its constants.
    """
    stored = made_with | {
        "texts": list(layout.texts), "embedding": list(layout.embedding),
        "frame": layout.frame, "patch_size": layout.patch, "format": FORMAT}
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else json.dumps(value)
            for name, value in stored.items()}


def stored_attributes(file: h5py.File) -> dict:
    """The root attributes as Python's own numbers, strings and lists."""
    return {name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
            for name, value in file.attrs.items()}


def create(path: Path, layout: Layout, made_with: dict) -> None:
    """Lays out a cache with no image done. Raises UserError where it cannot be written."""
    known, n, k = _known(layout), len(layout.names), len(layout.texts)
    p, pixels = (layout.frame // layout.patch) ** 2, int(known["label_offsets"][-1])
    unfinished = path.with_name(path.name + ".tmp")
    if path.is_symlink():  # to nothing: renaming would put a file in the link's place
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: mend the "
                        "link, or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        needed = sum(bytes_per_image(layout.embedding, k, size, p) for size in layout.sizes)
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(f"{path} needs {needed / 1e9:.2f} GB and its disk has "
                            f"{free / 1e9:.2f} GB free: make room, or set RUN_DIR or FEATURES to a "
                            "place on another disk")
        with h5py.File(unfinished, "w", libver="v110") as file:  # the first with checksums
            file.attrs.update(_attributes(layout, made_with))
            for name, values in {**known, "done": np.zeros(n, np.uint8)}.items():
                if values.dtype.kind == "S":
                    values = values.astype(h5py.string_dtype("utf-8", values.itemsize))
                file.create_dataset(name, data=values)
            schema = _schema(n, k, layout.embedding, p, pixels, len(layout.shots))
            for name, (shape, dtype) in schema.items():
                if name not in file:
                    _allocate(file, name, shape, dtype)
        with open(unfinished, "r+b") as file:
            _reserve(file.fileno(), os.path.getsize(unfinished))
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's where closing the file fails
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else "it cannot be written to its end"
        raise UserError(f"{path} cannot be created ({reason}): make room, or set another RUN_DIR "
                        "or FEATURES") from error


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An empty dataset whose place in the file is fixed from now on.

    h5py's create_dataset would allocate it only when it is first written.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # or the whole file would be written twice
    if name in CHUNKED:
        properties.set_chunk((1, *shape[1:]))
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)


def _reserve(fd: int, size: int) -> None:
    """Claims the file's space on the disk, where the file system can."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                os.truncate(fd, 0)  # give back what was reserved
                raise
            # any other error: a file system that cannot reserve space


def open_file(path: Path, maker: str = "01_cache_features.py") -> h5py.File:
    """A cache opened for reading. Where a program died that had it open for writing, it is mended.

    maker: the command that writes it. Raises UserError where it cannot be read, where another
    process has it open for writing, or where its parts do not fit each other.
    """
    try:
        missing = f"run {maker} first, or set FEATURES to a cache that is there"
        with reading(path, missing), unmarked(path) as left_open:
            file = _opened(path)
            _check_schema(path, file)
            _check_values(file)
            if left_open:
                _check_sums(file)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError,
            RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a feature cache ({reason}): {AGAIN}") from error
    return file


def _opened(path: Path) -> h5py.File:
    """The file opened by HDF5, with its lock for reading where the file system has locks."""
    try:
        return h5py.File(path, "r")
    except BlockingIOError as error:
        raise UserError(IN_USE.format(path)) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return h5py.File(path, "r", locking=False)


def _check_schema(path: Path, file: h5py.File) -> None:
    """Raises ValueError or UserError unless every dataset has the table's shape and dtype."""
    stored, n = stored_attributes(file), len(file["names"])
    if stored["format"] != FORMAT:
        raise UserError(f"{path} has cache format {stored['format']}, this code reads {FORMAT}: "
                        f"{AGAIN}")
    texts, embedding = json.loads(stored["texts"]), json.loads(stored["embedding"])
    frame, patch = stored["frame"], stored["patch_size"]
    _require(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts),
             "texts are no texts")
    whole = isinstance(frame, int) and isinstance(patch, int)
    _require(whole and 0 < patch <= frame and frame % patch == 0,
             f"PATCH_SIZE={patch} does not divide a frame of {frame}")
    p, pixels = (frame // patch) ** 2, int(file["label_offsets"][-1])
    schema = _schema(n, len(texts), embedding, p, pixels, len(file["shots"]))
    for name, (shape, dtype) in schema.items():
        there = file[name]
        _require((there.shape, there.dtype) == (shape, dtype),
                 f"/{name} is {there.dtype} {there.shape} and not {dtype} {shape}")
    filters = file["embeddings"].id.get_create_plist().get_nfilters()
    if filters or file["embeddings"].chunks != (1, *embedding):
        chunk = "x".join(map(str, (1, *embedding)))
        raise UserError(f"{path}: /embeddings was compressed or chunked anew by another tool: undo "
                        f"it with h5repack -f NONE -l embeddings:CHUNK={chunk}, or {AGAIN}")


def _check_values(file: h5py.File) -> None:
    """Raises ValueError unless sizes, splits and shots make sense together."""
    sizes, shots, split = (file[name][:] for name in ("sizes", "shots", "split"))
    n, texts = len(file["names"]), file["maps"].shape[1]
    _require((sizes > 0).all() and np.array_equal(file["label_offsets"][:], _label_offsets(sizes)),
             "/sizes and /label_offsets contradict each other")
    _require(len(split) == n and set(split) <= {b"train", b"test"},
             "/split holds another word than train and test")
    within = (shots >= 0).all() and (shots < (n, texts)).all()
    once = len(np.unique(shots, axis=0)) == len(shots)
    _require(within and (split[shots[:, 0]] == b"train").all() and once,
             "/shots names other than training samples, or one twice")
    _skipped(file)  # raises ValueError or TypeError where that is no list


def _check_sums(file: h5py.File) -> None:
    """Raises ValueError unless every part of every entry that is done fits its CRC."""
    offsets = file["label_offsets"][:]
    for row in np.flatnonzero(file["done"][:] == 1):
        for name, crc in zip(SUMMED, file["crc"][row]):
            part = slice(*offsets[row:row + 2]) if name == "labels" else row
            values = np.ascontiguousarray(file[name][part])
            _require(zlib.crc32(values) == crc, f"/{name} of image {row} is not what was written")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


# ---- writing it, image by image ------------------------------------------------------------------


def _difference(file: h5py.File, layout: Layout) -> str | None:
    """Where the file's images, sizes and samples first differ from the layout's; None if nowhere.

    Names count as equal in either form of Unicode.
    """
    for name, values in _known(layout).items():
        was, now = file[name][:].tolist(), values.tolist()
        if values.dtype.kind == "S":
            was, now = ([composed(os.fsdecode(one)) for one in both] for both in (was, now))
        if was != now:
            pairs = [(then, today) for then, today in zip(was, now) if then != today]
            then, today = pairs[0] if pairs else (len(was), len(now))
            return f"/{name}: {then} then, {today} now"
    return None


def _places(file: h5py.File) -> list[str]:
    """split/name of every image, as `Sample.place` has it."""
    pairs = zip(file["split"][:], file["names"][:])
    return [composed(os.fsdecode(split + b"/" + name)) for split, name in pairs]


def _skipped(file: h5py.File) -> set[str]:
    """The places (split/name) that SKIP left out when the file was laid out."""
    return set(json.loads(stored_attributes(file).get("skip", "[]")))


def known_places(path: Path) -> set[str]:
    """split/name of all images that the cache at `path` holds or left out; none without a file."""
    if not path.exists():
        return set()
    with open_file(path) as file:
        return set(_places(file)) | _skipped(file)


def _lay_out_anew(path: Path, unfinished: Path, layout: Layout, made_with: dict) -> None:
    """Replaces the cache by one of this layout, with all entries that both have.

    unfinished: where it lies until it holds them. The old file stays so long: a kill loses nothing.
    """
    create(unfinished, layout, made_with)
    with CacheWriter.open(path) as old, CacheWriter.open(unfinished) as new:
        row_of = {(old.places[row], *old.sizes[row]): row for row in old.done()}
        keys = [(place, *size) for place, size in zip(new.places, new.sizes)]
        kept = [(row, row_of[key]) for row, key in enumerate(keys) if key in row_of]
        print(f"SKIP has changed: {path} is laid out anew, and {len(kept)} of its {len(keys)} "
              "images are taken over")
        for row, old_row in kept:
            new.copy(row, old, old_row)
    os.replace(unfinished, path)


def _entry_offsets(file: h5py.File, name: str) -> list[int]:
    """Where each image's entry of a dataset starts in the file, in bytes."""
    dataset, n = file[name], len(file["names"])
    if name in CHUNKED:
        chunks = [dataset.id.get_chunk_info_by_coord((row, 0, 0, 0)) for row in range(n)]
        return [chunk.byte_offset for chunk in chunks]
    row_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    starts = file["label_offsets"][:-1] if name == "labels" else np.arange(n) * row_bytes
    return (dataset.id.get_offset() + starts).tolist()


class CacheWriter:
    """Fills a cache image by image, in any order; a context manager.

    HDF5 has the file closed meanwhile.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.fd = path, os.open(path, os.O_RDWR)
        self.names = [os.fsdecode(name) for name in file["names"][:]]
        self.places = _places(file)
        self.sizes = file["sizes"][:].tolist()
        self.frame, self.patch = int(file.attrs["frame"]), int(file.attrs["patch_size"])
        self.rows = {name: (file[name].shape[1:], file[name].dtype) for name in ENTRY}
        self.offsets = {name: _entry_offsets(file, name) for name in ENTRY}

    @classmethod
    def open(cls, path: Path) -> "CacheWriter":
        with open_file(path) as file:
            return cls(path, file)

    @classmethod
    def open_or_create(cls, path: Path, layout: Layout, made_with: dict,
                       there: Collection[str] | None = None) -> "CacheWriter":
        """Goes on with the file at `path`, or creates it.

        made_with: what the cached features depend on, under the constants' names in lower case
        ("seed" for SEED), and "time" and "versions", the two that may differ from the file's.
        "skip", if given, is the list of the places (split/name) that SKIP leaves out. If it is
        another one than the file's, so may be the images: then the file is laid out anew, with all
        entries that stay.
        there: places of all samples on the disk, None if that does not matter.
        Raises UserError naming the constant where the file contradicts `made_with` or `layout`, or
        the images where some are neither there nor skipped.
        """
        if not path.exists():
            create(path, layout, made_with)
            return cls.open(path)
        now, skip = _attributes(layout, made_with), set(made_with.get("skip", ()))
        with open_file(path) as file:
            stored = stored_attributes(file)
            for name, absolute in (("sam", absolute_sam), ("clip", absolute_clip)):
                # older caches keep paths as they were given
                stored[name] = absolute(str(stored.get(name)))
                if all(known in now and stored.get(known) == now[known]
                       for known in KNOWN_BY[name]):
                    stored[name] = now[name]  # the same model, in another place now
            for name in ADDED & now.keys():
                stored.setdefault(name, now[name])
            # a constant that is stored only where it is set (FOREGROUND) may be in the file alone
            wanted = now | {name: "empty" for name in stored if name not in now}
            compared = {name: value for name, value in wanted.items()
                        if name not in (*NOT_COMPARED, "skip")}
            stored["prompt"], compared["prompt"] = stored["texts"], compared.pop("texts")
            require_same(path, stored, compared, f"set it back, {MEND}")
            difference, skipped, held = _difference(file, layout), _skipped(file), _places(file)
        if path.is_symlink():  # it stays one if the file is laid out anew
            path = path.resolve()
        unfinished = path.with_name(path.name + ".new")
        for left in (unfinished, unfinished.with_name(unfinished.name + ".tmp")):
            left.unlink(missing_ok=True)  # by a kill
        explained = {*held} if there is None else {*there, *skip}
        gone = [place for place in held if place not in explained]
        if difference and gone:
            raise UserError(f"{path} holds {some(gone)}, and DATA_DIR no longer does: put them "
                            f"back, name them in SKIP, or {MEND}")
        if difference and skip == skipped:
            raise UserError(f"{path} was made from other images than DATA_DIR holds now "
                            f"({difference}): {MEND}")
        if difference:
            _lay_out_anew(path, unfinished, layout, made_with)
        return cls.open(path)

    def missing(self) -> list[int]:
        """The rows that are not done, read afresh from the file."""
        flags = os.pread(self.fd, len(self.names), self.offsets["done"][0])
        return [row for row, flag in enumerate(flags) if flag != 1]

    def done(self) -> list[int]:
        """The rows that are done, read afresh from the file."""
        return sorted({*range(len(self.names))} - {*self.missing()})

    def picture(self, row: int) -> np.ndarray:
        """The small copy of an image that is done, uint8 (256, 256, 3)."""
        return self._get("pictures", row)

    def require_masks(self, sums: Sequence[int]) -> None:
        """Raises UserError naming the images that are done and have other masks now.

        sums: CRC-32 of the label map of each row, as the masks are now.
        """
        column = SUMMED.index("labels")
        changed = [self.places[row] for row in self.done()
                   if self._get("crc", row)[column] != sums[row]]
        if changed:
            raise UserError(f"the masks of {some(changed)} are others now than those in {self.path}"
                            f": put them back, {MEND}")

    def write(self, row: int, embedding: np.ndarray | torch.Tensor, maps: np.ndarray | torch.Tensor,
              label_map: np.ndarray, picture: np.ndarray) -> None:
        """Writes one image's entry, then marks it done. A row that is done is left as it is.

        embedding: (C, h, w) and maps: (K, h, w), stored as float16. label_map: uint8 (H, W).
        picture: uint8 (256, 256, 3). Raises UserError naming the image, with nothing written, where
        the embedding or a map is not finite in float16 or the label map has another size than the
        layout says.
        """
        if row not in self.missing():
            return
        name, size = self.names[row], tuple(self.sizes[row])
        if label_map.shape != size:
            raise UserError(f"{name} is now {label_map.shape} pixels, but {size} in {self.path}: "
                            f"{MEND}")
        entry = {
            "embeddings": _as_float16(embedding, f"SAM's embedding of {name}"),
            "maps": _as_float16(maps, f"the CLIP map of {name}"),
            "pictures": picture,
            "labels": label_map,
        }
        labels, grid = range(1, len(entry["maps"]) + 1), entry["embeddings"].shape[1:]
        centres = [truth_at_centres(label_map, k, self.frame, self.patch) for k in labels]
        present = [len(labels) == 1 or (label_map == k).any() for k in labels]
        entry["truth_grid"] = np.stack([truth_on_grid(label_map, k, grid) for k in labels])
        entry["truth_centres"] = np.stack(centres)
        entry["present"] = np.array(present, np.uint8)
        sums = [zlib.crc32(np.ascontiguousarray(entry[dataset])) for dataset in SUMMED]
        entry["crc"] = np.array(sums, "<u4")
        # checked before the first byte is written: a wrong size would hit a neighbour
        for dataset, values in entry.items():
            shape, dtype = self.rows[dataset]
            shape = size if dataset == "labels" else shape
            if (values.shape, values.dtype) != (shape, dtype):
                raise ValueError(f"{dataset}: {values.dtype} {values.shape}, expected {dtype} "
                                 f"{shape}")
        for dataset, values in entry.items():
            self._put(dataset, row, values)
        os.fsync(self.fd)  # the data are on the disk before the flag that vouches for them
        self._put("done", row, np.ones((), np.uint8))  # synced with the next entry, or by `close`

    def copy(self, row: int, other: "CacheWriter", other_row: int) -> None:
        """Takes over the entry of an image of the same size, byte for byte, with its CRCs."""
        for dataset in ENTRY:
            shape, dtype = self.rows[dataset]
            shape = self.sizes[row] if dataset == "labels" else shape
            size = math.prod(shape) * dtype.itemsize
            data = os.pread(other.fd, size, other.offsets[dataset][other_row])
            self._put(dataset, row, np.frombuffer(data, np.uint8))

    def _get(self, dataset: str, row: int) -> np.ndarray:
        """One image's part of a dataset other than the labels, whose sizes differ."""
        shape, dtype = self.rows[dataset]
        data = os.pread(self.fd, math.prod(shape) * dtype.itemsize, self.offsets[dataset][row])
        return np.frombuffer(data, dtype).reshape(shape)

    def _put(self, dataset: str, row: int, values: np.ndarray) -> None:
        data, offset = memoryview(values.tobytes()), self.offsets[dataset][row]
        while data:  # a signal may cut a write short
            try:
                written = os.pwrite(self.fd, data, offset)
            except OSError as error:  # pwrite does not know the file's name
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            data, offset = data[written:], offset + written

    def close(self) -> None:
        os.fsync(self.fd)
        os.close(self.fd)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _as_float16(values: np.ndarray | torch.Tensor, what: str) -> np.ndarray:
    """Raises UserError naming `what` where a value is not finite in float16."""
    stored = torch.as_tensor(values).detach().to("cpu", torch.float16).numpy()
    if not np.isfinite(stored).all():
        raise UserError(f"{what} holds NaN or infinite values: set PRECISION to fp32, or check the "
                        "weights")
    return stored
