"""The tasks: what is segmented, by which text, with which branch of the SRM, on which data."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from common.runtime.errors import UserError

# In the order of VOC's palette indices 1 to 20 (0 is the background, 255 is to be ignored).
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# Indices 1 to 6 of the data set that this project draws.
DEMO_CLASSES = ("star", "ring", "cross", "leaf", "brick", "ball")


@dataclass(frozen=True)
class Task:
    """One segmentation task.

    name: what the scripts' TASK and the run folders call it.
    title: its name in figures and messages.
    dataset: the layout on disk, see `common.datasets.FOLDERS`.
    texts: the prompts for CLIP; label k of a label map (1-based) is the k-th text. A task with one
        text is binary.
    branch: of the SRM. "implicit" sees s_t only, "explicit" sees s_c and s_t (paper, section 3.3).
    paper: key of this task in the paper's tables, None if the paper has no such task.
    home: where to download the data set, "" if there is nothing to download.
    white_is_foreground: whether white marks the foreground in its binary masks; otherwise black.
    foreground: what marks it in masks of several levels or colours: a grey level or palette index,
        a colour ("#ff0000"), or "any" for all but 0 and black. None for plain binary masks.
    """

    name: str
    title: str
    dataset: Literal["cuhk", "sbu", "msd", "duts", "voc", "folder"]
    texts: tuple[str, ...]
    branch: Literal["implicit", "explicit"]
    paper: str | None
    home: str = ""
    white_is_foreground: bool = True
    foreground: int | str | None = None


def _paper(name: str, title: str, branch: str, texts: tuple[str, ...], home: str) -> Task:
    """A task of the paper, whose name is also its layout and its key in the paper's tables."""
    return Task(name, title, name, texts, branch, name, home)


def _demo(name: str, title: str, dataset: str, branch: str, *texts: str) -> Task:
    """A task on pictures that this project draws."""
    return Task(name, f"{title} (drawn demo)", dataset, texts, branch, None)


# The paper's five tasks have the paper's texts and branches (section 4 and Table 4). Each drawn
# demo task has the layout and the branch of the one it mimics.
TASKS = (
    _paper("cuhk", "Defocus blur (CUHK)", "implicit", ("defocus background",),
           "http://www.cse.cuhk.edu.hk/leojia/projects/dblurdetect/dataset.html"),
    _paper("sbu", "Shadow (SBU)", "explicit", ("shadow",),
           "https://www3.cs.stonybrook.edu/~cvl/content/datasets/shadow_db/SBU-shadow.zip"),
    _paper("msd", "Mirror (MSD)", "implicit", ("glass",),
           "https://mhaiyang.github.io/ICCV2019_MirrorNet/index.html"),
    _paper("duts", "Saliency (DUTS)", "implicit", ("saliency object",),
           "http://saliencydetection.net/duts/"),
    _paper("voc", "Semantic segmentation (VOC 2012)", "explicit", VOC_CLASSES,
           "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"),
    _demo("demo_blur", "Blur", "cuhk", "implicit", "blurred region"),
    _demo("demo_shadow", "Shadow", "sbu", "explicit", "shadow"),
    _demo("demo_mirror", "Mirror", "msd", "implicit", "mirror"),
    _demo("demo_saliency", "Saliency", "duts", "implicit", "salient object"),
    _demo("demo_semantic", "Semantic segmentation", "voc", "explicit", *DEMO_CLASSES),
)


def get_task(name: str, prompt: str = "") -> Task:
    """The task of that name.

    prompt: the text of the task "folder" (your own pictures). The other tasks have texts of their
        own, which `with_prompt` replaces. A folder task takes the explicit branch, since a text
        names its target; for a target that no text names well, set BRANCH=implicit in stage 2.
    Raises UserError for an unknown name, listing the tasks, and for "folder" without a prompt.
    """
    if name == "folder":
        prompt = prompt.strip()
        if not prompt:
            raise UserError('the task "folder" needs a text that names what its masks mark: set '
                            'PROMPT="dog", for one')
        return Task("folder", f"Own pictures ({prompt})", "folder", (prompt,), "explicit", None)
    for task in TASKS:
        if task.name == name:
            return task
    names = ", ".join(task.name for task in TASKS)
    raise UserError(f'there is no task "{name}": choose one of {names}, folder')


def with_prompt(task: Task, prompt: str) -> Task:
    """The task with `prompt` in the place of its one text; unchanged if `prompt` is empty.

    Raises UserError if the task has several texts.
    """
    prompt = prompt.strip()
    if not prompt:
        return task
    if len(task.texts) > 1:
        raise UserError(f'PROMPT="{prompt}" cannot stand for the {len(task.texts)} texts of '
                        f"{task.name}: leave it out")
    return replace(task, texts=(prompt,))


def with_foreground(task: Task, foreground: str) -> Task:
    """The task "folder" with what the constant FOREGROUND says; unchanged if that is empty.

    Raises UserError for another task, and for what is no level, index, colour or "any".
    """
    foreground = foreground.strip().lower()
    if not foreground:
        return task
    if task.name != "folder":
        raise UserError(f"FOREGROUND={foreground} is for TASK=folder, and {task.name} has masks of "
                        "its own kind: leave it out")
    if re.fullmatch("[0-9]{1,5}", foreground) and int(foreground):
        return replace(task, foreground=int(foreground))
    if foreground == "any" or re.fullmatch("#[0-9a-f]{6}", foreground):
        return replace(task, foreground=foreground)
    raise UserError(f"FOREGROUND={foreground} must be a grey level or palette index above 0 "
                    "(FOREGROUND=3, for one), a colour (FOREGROUND=#ff0000), or any")
