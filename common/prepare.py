"""What stage 1 settles before any model is loaded: the task, its data, and how masks were read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.images import Sample
from common.label_maps import Checked
from common.runtime import distributed
from common.tasks import Task, get_task, with_prompt


def open_task(constants: dict[str, object]) -> tuple[Task, Path]:
    """The task, and the folder of its data; the data of a demo task are drawn if they are missing.

    constants: stage 1's `globals()`. Raises UserError for an unknown task or a PROMPT that does not
    suit it.
    """
    name, prompt = constants["TASK"], constants["PROMPT"]
    task = with_prompt(get_task(name, prompt), prompt)
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
    ends = [(shares[index], images[index].place)
            for index in (min(range(len(shares)), key=shares.__getitem__),
                          max(range(len(shares)), key=shares.__getitem__))]
    smallest, largest = (f"{share:.1%} ({place})" for share, place in ends)
    return (f"masks: {', '.join(f'{how} in {count}' for how, count in ways)}; foreground "
            f"{sum(shares) / len(shares):.1%} on average, from {smallest} to {largest}")
