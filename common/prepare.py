"""What stage 1 needs beside the models: the task and its data, decoded ahead of the models."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cache_file import MEND, PICTURE, CacheWriter
from common.images import Sample, load_image
from common.label_maps import Checked, load_label_map
from common.runtime import distributed
from common.runtime.errors import UserError, some
from common.runtime.files import expanded
from common.tasks import Task, get_task, with_foreground, with_prompt

LIKE = 4  # grey levels, mean difference of two pictures from which they are different ones


def open_task(constants: dict[str, object]) -> tuple[Task, Path]:
    """The task, and the folder of its data; the data of a demo task are drawn if they are missing.

    constants: stage 1's `globals()`. Raises UserError for an unknown task, or a PROMPT or
    FOREGROUND that does not suit it.
    """
    name, prompt = constants["TASK"], constants["PROMPT"]
    task = with_foreground(with_prompt(get_task(name, prompt), prompt), constants["FOREGROUND"])
    if name == "cuhk":
        task = replace(task, white_is_foreground=constants["CUHK_WHITE_IS_BLURRED"])
    data_dir = expanded(constants["DATA_DIR"] or f"data/{name}")
    if name.startswith("demo_") and not constants["DATA_DIR"]:
        from common.standin.scenes import write_dataset
        with distributed.rank_0_first():
            write_dataset(name.removeprefix("demo_"), data_dir)
    elif "demo" in (constants["SAM"], constants["CLIP"]):
        print("SAM=demo and CLIP=demo are small stand-ins: see the README for the real models")
    return task, data_dir


def mask_summary(images: Sequence[Sample], checked: Sequence[Checked]) -> str:
    """A line on how the masks were read and how much foreground they hold.

    checked: of `check_samples`, for each image. A wrong reading shows in these numbers.
    """
    ways = Counter(one.how for one in checked).most_common()
    shares = [one.foreground for one in checked]
    ends = (f"{shares[index]:.1%} ({images[index].place})"
            for index in (np.argmin(shares), np.argmax(shares)))
    return (f"masks: {', '.join(f'{how} in {count}' for how, count in ways)}; foreground "
            f"{np.mean(shares):.1%} on average, from {' to '.join(ends)}")


def read_sample(sample: Sample, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 (H, W, 3), and its label map, uint8 (H, W).

    Raises UserError naming what is wrong with either.
    """
    image = load_image(sample.image)
    return image, load_label_map(sample, task, image.shape[:2])


def small_picture(image: np.ndarray) -> np.ndarray:
    """The copy of an image uint8 (H, W, 3) that a cache keeps, uint8 (256, 256, 3)."""
    return np.asarray(Image.fromarray(image).resize((PICTURE, PICTURE), Image.Resampling.BILINEAR))


def looks_like(image: np.ndarray, kept: np.ndarray) -> bool:
    """Whether an image uint8 (H, W, 3) is that of which a cache keeps this copy.

    Another version of a decoder may change a pixel by a level or two, so they need not be equal.
    """
    return np.abs(small_picture(image).astype(int) - kept).mean() <= LIKE


def require_pictures(writer: CacheWriter, images: Sequence[Sample], workers: int) -> None:
    """Raises UserError naming the images that are done and look otherwise now.

    images: of all rows of the cache. workers: threads that read them.
    """
    rows = distributed.share(writer.done())
    with ThreadPoolExecutor(workers) as pool:
        alike = pool.map(lambda row: looks_like(load_image(images[row].image),
                                                writer.picture(row)), rows)
        bar = tqdm(zip(rows, alike), "checking images", len(rows), leave=False,
                   disable=distributed.RANK > 0)
        changed = [(row, images[row].place) for row, same in bar if not same]
    if changed := distributed.gather(changed):
        raise UserError(f"the images {some([place for _, place in changed])} are others now than "
                        f"those in {writer.path}: put them back, {MEND}")


class Decoded(NamedTuple):
    """One image, ready for the models and the cache."""

    row: int  # in the cache
    seen: tuple[np.ndarray, np.ndarray]  # what SAM and CLIP see, see `FrozenModels.see`
    label_map: np.ndarray  # uint8 (H, W)
    picture: np.ndarray  # uint8 (256, 256, 3)


def decode_ahead(rows: Sequence[int], images: Sequence[Sample], task: Task, see: Callable,
                 workers: int, broken: list[tuple[int, str]]) -> Iterator[Decoded]:
    """The images of these rows, in their order, read by threads while the models compute.

    images: of all rows of the cache. see: `FrozenModels.see`. workers: how many threads there are;
    each is up to eight images ahead. broken: takes (row, what is wrong) of images and masks that
    cannot be read; the others go on.
    """
    def decode(row: int) -> Decoded:
        image, label_map = read_sample(images[row], task)
        return Decoded(row, see(image), label_map, small_picture(image))

    with ThreadPoolExecutor(workers) as pool:
        waiting = ((row, pool.submit(decode, row)) for row in rows)
        ahead = deque(islice(waiting, 8 * workers))
        while ahead:
            row, decoding = ahead.popleft()
            try:
                decoded = decoding.result()
            except UserError as error:
                broken.append((row, str(error)))
            else:
                yield decoded
            ahead.extend(islice(waiting, 1))
