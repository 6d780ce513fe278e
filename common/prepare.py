"""What stage 1 needs beside the models: the task and its data, and how its masks were read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.images import Sample, load_image
from common.label_maps import Checked, load_label_map
from common.runtime import distributed
from common.runtime.errors import UserError
from common.tasks import Task, get_task, with_foreground, with_prompt


def open_task(constants: dict[str, object]) -> tuple[Task, Path]:
    """The task, and the folder of its data; the data of a demo task are drawn if they are missing.

    constants: stage 1's `globals()`. Raises UserError for an unknown task, or a PROMPT or
    FOREGROUND that does not suit it.
    """
    name, prompt = constants["TASK"], constants["PROMPT"]
    task = with_foreground(with_prompt(get_task(name, prompt), prompt), constants["FOREGROUND"])
    if name == "cuhk":
        task = replace(task, white_is_foreground=constants["CUHK_WHITE_IS_BLURRED"])
    data_dir = Path(constants["DATA_DIR"] or f"data/{name}").expanduser()
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

    Raises UserError that names SKIP beside what is wrong with either.
    """
    try:
        image = load_image(sample.image)
        return image, load_label_map(sample, task, image.shape[:2])
    except UserError as error:
        raise UserError(f"{error}; or leave it out by SKIP={sample.place}") from error
