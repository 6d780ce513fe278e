"""Synthetic photographs-in-miniature, deterministic from a seed.

A scene is a textured ground with objects of six kinds on it. Light casts soft shadows, a mirror may reflect the rest
of the scene, parts may be out of focus, some objects stand out in colour and others hide. `write_dataset` writes them
as five data sets in the on-disk layouts of the five benchmarks, so that the demo runs the code that real data run.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from common.runtime.errors import UserError

SIZE = 256  # pixels a side of a scene
KINDS = ("star", "ring", "cross", "leaf", "brick", "ball")  # what demo_semantic calls its classes, in palette order
SURFACES = ("plain", "stripes", "checks", "dots", "veins", "mortar", "gloss", "noise")  # how anything may be painted
TYPICAL_SURFACE = {"star": "dots", "ring": "stripes", "cross": "checks", "leaf": "veins", "brick": "mortar",
                   "ball": "gloss"}
EFFECTS = ("semantic", "shadow", "mirror", "blur", "saliency")  # demo_<effect> is the task that asks for it
COLOURS = {"red": (200, 50, 45), "orange": (225, 135, 40), "yellow": (220, 200, 60), "green": (70, 150, 60),
           "cyan": (60, 175, 180), "blue": (55, 85, 190), "purple": (130, 65, 165), "pink": (220, 120, 165),
           "brown": (120, 80, 50), "grey": (140, 140, 140), "white": (225, 225, 220), "black": (45, 45, 48)}
MIN_AREA = 60  # visible pixels below which an object no longer counts: what is nearly hidden can't be labelled


@dataclass
class Thing:
    """One object of a scene: its kind, colour and surface by name, and whether it stands out."""
    kind: str
    colour: str
    surface: str
    salient: bool


@dataclass
class Scene:
    """image (S, S, 3) uint8; instances (S, S) uint8, 0 = ground, i = things[i - 1]; surface (S, S) uint8, index into
    SURFACES; shadow, mirror, blur (S, S) bool."""
    image: np.ndarray
    things: list[Thing]
    instances: np.ndarray
    surface: np.ndarray
    shadow: np.ndarray
    mirror: np.ndarray
    blur: np.ndarray

    def labels(self, effect: str) -> np.ndarray:
        """The ground truth of `demo_<effect>`: (S, S) uint8, 0 or 1; for "semantic" 0 or 1 + index into KINDS."""
        if effect in ("shadow", "mirror", "blur"):
            return getattr(self, effect).astype(np.uint8)
        if effect == "saliency":
            values = [0] + [int(thing.salient) for thing in self.things]
        else:
            values = [0] + [1 + KINDS.index(thing.kind) for thing in self.things]
        return np.array(values, np.uint8)[self.instances]


# ---------------------------------------------------------------------------------------------------------------------
# outlines and surfaces: functions of local coordinates u, v (the object's own frame, about -1..1)

def outline(kind: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boolean inside-test of the kind's outline, each drawn a little differently."""
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    rho = rho * (1 + rng.uniform(0, 0.07) * np.sin(rng.integers(2, 5) * theta + rng.uniform(0, 6.3)))
    if kind == "star":
        phase = np.abs((theta * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 0 in the notches, 1 at the tips
        return rho < rng.uniform(0.4, 0.5) + 0.55 * phase
    if kind == "ring":
        return (rho < 1) & (rho > rng.uniform(0.45, 0.6))
    if kind == "cross":
        arm = rng.uniform(0.28, 0.38)
        return ((np.abs(u) < arm) & (np.abs(v) < 1)) | ((np.abs(v) < arm) & (np.abs(u) < 1))
    if kind == "leaf":
        return np.abs(v) < rng.uniform(0.4, 0.55) * (1 - u * u)
    if kind == "brick":
        return (np.abs(u) < 1) & (np.abs(v) < rng.uniform(0.45, 0.7))
    return rho < 0.85  # ball


def paint(surface: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Brightness modulation about 0 of a surface at local coordinates; `scale` stretches the pattern."""
    u, v = u / scale + rng.uniform(0, 1), v / scale + rng.uniform(0, 1)
    depth = rng.uniform(0.16, 0.3)
    if surface == "plain":
        return 0.12 * (u * rng.uniform(-1, 1) + v * rng.uniform(-1, 1))
    if surface == "stripes":
        return depth * np.sign(np.sin(rng.uniform(9, 13) * u))
    if surface == "checks":
        k = rng.uniform(7, 10)
        return depth * np.sign(np.sin(k * u) * np.sin(k * v))
    if surface == "dots":
        k = rng.uniform(9, 13)
        return depth * np.where(np.cos(k * u) * np.cos(k * v) > 0.35, 1.3, -0.4)
    if surface == "veins":
        return depth * np.where(np.abs(np.sin(8 * (u + np.abs(v - 0.5)))) > 0.85, -1.5, 0.3)
    if surface == "mortar":
        row = np.floor(v * 4)
        gap = (np.abs(v * 4 % 1 - 0.5) > 0.4) | (np.abs((u * 2.5 + 0.5 * row) % 1 - 0.5) > 0.44)
        return depth * np.where(gap, 1.6, -0.2)
    if surface == "gloss":
        return 0.75 * np.exp(-((u - 0.2) ** 2 + (v - 0.1) ** 2) / 0.18) - 0.3 * np.hypot(u - 0.2, v - 0.1)
    return noise(u.shape, rng, coarse=4) * depth * 1.5


def noise(shape: tuple[int, int], rng: np.random.Generator, coarse: int) -> np.ndarray:
    """Smooth noise in about -1..1: random values on a coarse grid and on one four times finer, upsampled."""
    total = np.zeros(shape, np.float32)
    for cells, weight in ((coarse, 0.6), (coarse * 4, 0.4)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.BICUBIC))
    return total


def soften(mask: np.ndarray, radius: float) -> np.ndarray:
    """(S, S) float in 0..1: the mask with a soft edge of about `radius` pixels."""
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# a scene

def draw_scene(rng: np.random.Generator, effect: str | None = None) -> Scene:
    """Draws one scene. `effect` makes sure that it can be asked for (a mirror is there, ...); None mixes them all."""
    wanted = rng.choice(EFFECTS) if effect is None else effect
    has = {name: rng.random() < chance for name, chance in
           (("shadow", 0.35), ("mirror", 0.2), ("blur", 0.15), ("saliency", 0.3))}
    has[wanted] = True
    if wanted != "blur":
        has["blur"] &= effect is None  # elsewhere defocus would only hide the target
    grid_y, grid_x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

    # ground: one or two painted surfaces
    ground_colours = rng.choice(list(COLOURS), 2, replace=False)
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    surface = np.zeros((SIZE, SIZE), np.uint8)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(0.25, 0.75) * SIZE
    side = (grid_x - SIZE / 2) * np.sin(angle) + (grid_y - SIZE / 2) * np.cos(angle) + SIZE / 2 > offset
    for part, name in ((np.ones_like(side), ground_colours[0]), (side, ground_colours[1])):
        kind = rng.choice(SURFACES, p=(0.2, 0.06, 0.06, 0.06, 0.06, 0.06, 0.0, 0.5))
        tone = 0.55 * np.array(COLOURS[name]) + 0.45 * rng.uniform(70, 190)  # grounds are less colourful than things
        turn = rng.uniform(0, np.pi)
        u = (grid_x * np.cos(turn) + grid_y * np.sin(turn)) / SIZE * 4
        v = (-grid_x * np.sin(turn) + grid_y * np.cos(turn)) / SIZE * 4
        pattern = 0.6 * paint(str(kind), u, v, rng, scale=rng.uniform(0.8, 2)) + 0.1 * noise((SIZE, SIZE), rng, 8)
        canvas[part] = (tone * (1 + pattern[..., None]))[part]
        surface[part] = SURFACES.index(str(kind))
        if rng.random() < 0.5:
            break

    light = rng.uniform(0, 2 * np.pi)
    throw = np.array([np.cos(light), np.sin(light)])
    instances = np.zeros((SIZE, SIZE), np.uint8)
    shadow = np.zeros((SIZE, SIZE), bool)
    mirror = np.zeros((SIZE, SIZE), bool)
    blur = np.zeros((SIZE, SIZE), bool)
    things: list[Thing] = []
    dark = rng.uniform(0.42, 0.62)

    def cast(inside: np.ndarray, reach: float) -> None:
        """Darkens what lies under the shadow of `inside`, thrown `reach` pixels away from the light."""
        dx, dy = np.round(throw * reach).astype(int)
        moved = np.zeros_like(inside)
        moved[max(dy, 0):SIZE + min(dy, 0), max(dx, 0):SIZE + min(dx, 0)] = \
            inside[max(-dy, 0):SIZE + min(-dy, 0), max(-dx, 0):SIZE + min(-dx, 0)]
        strength = soften(moved, rng.uniform(1.0, 2.2))
        strength *= ~shadow  # one light: shadows do not add up
        canvas[:] *= (1 - (1 - dark) * strength)[..., None]
        shadow[:] |= strength > 0.5

    def place(thing: Thing | None, radius: float, centre: np.ndarray) -> None:
        """Draws one object (None: only the shadow of something outside the picture)."""
        turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.2)
        dx, dy = grid_x - centre[0], grid_y - centre[1]
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / (radius * stretch)
        v = (-dx * np.sin(turn) + dy * np.cos(turn)) / (radius / stretch)
        inside = outline(thing.kind if thing else str(rng.choice(KINDS)), u, v, rng)
        if has["shadow"]:
            cast(inside, radius * rng.uniform(0.5, 1.1) if thing else 0)
        if thing is None:
            return
        alpha = soften(inside, 0.6)[..., None]
        pattern = paint(thing.surface, u, v, rng) + 0.15 * (u * throw[0] + v * throw[1]) * -1  # soft shading
        tone = np.array(COLOURS[thing.colour]) * rng.uniform(0.85, 1.1) + rng.normal(0, 6, 3)
        canvas[:] = canvas * (1 - alpha) + tone * (1 + pattern[..., None]) * alpha
        things.append(thing)
        instances[inside] = len(things)
        surface[inside] = SURFACES.index(thing.surface)
        shadow[inside] = mirror[inside] = blur[inside] = False

    # what stands on it: a few kinds, several of each, far to near
    kinds = rng.choice(KINDS, rng.integers(2, 5), replace=False)
    count = int(rng.integers(5, 11))
    hiding = [name for name in COLOURS if _distance(name, ground_colours[0]) < 110] or [ground_colours[0]]
    loud = [name for name in COLOURS if min(_distance(name, ground) for ground in ground_colours) > 150] or ["white"]
    loud_colours = rng.choice(loud, min(2, len(loud)), replace=False)
    loud_count = int(rng.integers(1, 4)) if has["saliency"] else 0
    plan = []
    for index in range(count):
        kind = str(rng.choice(kinds))
        salient = index < loud_count
        if has["saliency"]:
            colour = str(rng.choice(loud_colours)) if salient else str(rng.choice(hiding))
            radius = rng.uniform(20, 42) if salient else rng.uniform(12, 30)
        else:
            colour = "black" if has["shadow"] and rng.random() < 0.3 else str(rng.choice(list(COLOURS)))
            radius = float(rng.choice([rng.uniform(11, 20), rng.uniform(20, 45)], p=(0.55, 0.45)))
        painted = TYPICAL_SURFACE[kind] if rng.random() < 0.75 else str(rng.choice(SURFACES))
        plan.append((Thing(kind, colour, painted, salient), radius))
    rng.shuffle(plan)
    spots = _spread(len(plan), rng)

    if has["shadow"] and rng.random() < 0.4:
        place(None, rng.uniform(40, 80), rng.uniform(0, SIZE, 2))
    near = int(rng.integers(1, 4))  # how many objects stand before the mirror, or in focus before a blurred scene
    for index, ((thing, radius), spot) in enumerate(zip(plan, spots)):
        if index == len(plan) - near:
            if has["mirror"]:
                _mirrors(canvas, mirror, instances, shadow, surface, rng, grid_x, grid_y)
            style = rng.choice(("behind", "region", "objects"))
            if has["blur"] and style == "behind":
                canvas[:] = _defocus(canvas, rng)
                blur[:] = True
        place(thing, radius, spot)
    if has["blur"] and style != "behind":
        if style == "region":
            turn = rng.uniform(0, 2 * np.pi)
            along = (grid_x - SIZE / 2) * np.cos(turn) + (grid_y - SIZE / 2) * np.sin(turn)
            blur[:] = along + 12 * noise((SIZE, SIZE), rng, 3) > rng.uniform(-30, 50)
        else:
            shown = rng.choice(len(things), max(1, len(things) // 2), replace=False) + 1
            blur[:] = np.isin(instances, shown)
        alpha = soften(blur, 1.0)[..., None]
        canvas[:] = canvas * (1 - alpha) + _defocus(canvas, rng) * alpha

    # light over all, sensor noise
    shade = 1 + 0.12 * ((grid_x - SIZE / 2) * throw[0] + (grid_y - SIZE / 2) * throw[1]) / -SIZE
    canvas = canvas * shade[..., None] + rng.normal(0, rng.uniform(1.5, 4), canvas.shape)
    return _drop_hidden(Scene(canvas.clip(0, 255).astype(np.uint8), things, instances, surface, shadow, mirror, blur))


def _distance(one: str, other: str) -> float:
    return float(np.linalg.norm(np.subtract(COLOURS[one], COLOURS[other], dtype=np.float64)))


def _spread(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` centres that keep apart: of ten random ones each, the one farthest from those before."""
    spots = [rng.uniform(20, SIZE - 20, 2)]
    for _ in range(count - 1):
        tries = rng.uniform(14, SIZE - 14, (10, 2))
        gaps = np.linalg.norm(tries[:, None] - np.array(spots)[None], axis=2).min(1)
        spots.append(tries[gaps.argmax()])
    return np.array(spots)


def _defocus(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(2.2, 4.5))), np.float32)


def _mirrors(canvas, mirror, instances, shadow, surface, rng, grid_x, grid_y) -> None:
    """One or two framed panes. One shows the flipped scene (the mirror); a second may be a painting, the decoy."""
    before = canvas.copy()
    for index in range(int(rng.integers(1, 3))):
        centre, turn = rng.uniform(60, SIZE - 60, 2), rng.uniform(-0.4, 0.4)
        half = rng.uniform(26, 62, 2)
        u = ((grid_x - centre[0]) * np.cos(turn) + (grid_y - centre[1]) * np.sin(turn)) / half[0]
        v = (-(grid_x - centre[0]) * np.sin(turn) + (grid_y - centre[1]) * np.cos(turn)) / half[1]
        reach = np.hypot(u, v) if rng.random() < 0.4 else np.maximum(np.abs(u), np.abs(v))
        pane, frame = reach < 1, (reach < 1 + 5 / half.min()) & (reach >= 1)
        canvas[frame] = np.array(COLOURS[str(rng.choice(list(COLOURS)))]) * rng.uniform(0.6, 1)
        if index == 0:
            shift = int(rng.integers(40, SIZE - 40))
            flipped = np.roll(before[:, ::-1], shift, axis=1)
            canvas[pane] = (0.8 * flipped + 0.2 * np.array((200, 215, 230)))[pane]  # glass is a little bluish
            surface[pane] = np.roll(surface[:, ::-1], shift, axis=1)[pane]
            mirror[pane] = True
        else:
            kind = str(rng.choice(SURFACES))
            tone = np.array(COLOURS[str(rng.choice(list(COLOURS)))])
            canvas[pane] = (tone * (1 + paint(kind, u, v, rng)[..., None]))[pane]
            surface[pane] = SURFACES.index(kind)
            mirror[pane] = False
        mirror[frame] = False
        instances[pane | frame] = 0
        shadow[pane | frame] = False


def _drop_hidden(scene: Scene) -> Scene:
    """Forgets objects of which too little can be seen, and renumbers the rest."""
    areas = np.bincount(scene.instances.ravel(), minlength=len(scene.things) + 1)
    kept = [i for i in range(1, len(scene.things) + 1) if areas[i] >= MIN_AREA]
    renumber = np.zeros(len(scene.things) + 1, np.uint8)
    renumber[kept] = np.arange(1, len(kept) + 1)
    scene.instances = renumber[scene.instances]
    scene.things = [scene.things[i - 1] for i in kept]
    return scene


def draw_for_task(effect: str, split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of demo_<effect>; redrawn until its target covers 1 to 75 % of it, so that it can be asked for."""
    for attempt in range(100):
        entropy = [seed, 1, EFFECTS.index(effect), ("train", "test").index(split), index, attempt]
        scene = draw_scene(np.random.default_rng(entropy), effect)
        share = (scene.labels(effect) > 0).mean()
        if 0.01 <= share <= 0.75:
            return scene
    raise RuntimeError(f"no scene for demo_{effect} in 100 attempts")


def draw_for_training(index: int, seed: int = 0) -> Scene:
    """Scene `index` for training the stand-ins. Its seeds are never those of a demo task (second number 0, not 1)."""
    return draw_scene(np.random.default_rng([seed, 0, index]))


# ---------------------------------------------------------------------------------------------------------------------
# data sets on disk

TRAIN_SCENES, TEST_SCENES = 120, 240
GENERATOR = 1  # to be raised with every change to the scenes, so that old ones on a disk are not taken for new ones
PALETTE = [0, 0, 0, 220, 60, 60, 60, 160, 220, 230, 190, 60, 80, 170, 80, 150, 90, 60, 160, 100, 200]  # RGB, 7 entries


def paths(effect: str, split: str, index: int) -> tuple[str, str]:
    """Where the benchmark's own layout keeps scene `index`: its image and its mask, below the data folder."""
    name = f"{'tr' if split == 'train' else 'te'}{index:04d}"
    if effect == "blur":  # CUHK: one folder; the last 100 by name are its test set unless test.txt lists others
        number = index + 1 + (TRAIN_SCENES if split == "test" else 0)
        return f"image/out_of_focus{number:04d}.jpg", f"gt/out_of_focus{number:04d}.png"
    if effect == "shadow":
        folder = "SBUTrain4KRecoveredSmall" if split == "train" else "SBU-Test"
        return f"{folder}/ShadowImages/{name}.jpg", f"{folder}/ShadowMasks/{name}.png"
    if effect == "mirror":
        return f"{split}/image/{name}.jpg", f"{split}/mask/{name}.png"
    if effect == "saliency":
        folder = "DUTS-TR" if split == "train" else "DUTS-TE"
        return f"{folder}/{folder}-Image/{name}.jpg", f"{folder}/{folder}-Mask/{name}.png"
    return f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write(temporary path)` make the file, then puts it in `path`'s place, so that nobody reads half of it.

    Unlike files.write_atomic for two processes that write the same file at once, and without waiting for the disk,
    which for thousands of pictures would take long.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # hidden: what a kill leaves of it is no picture
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scene(job: tuple[str, str, int, Path]) -> str:
    """Draws and writes one scene; returns its name."""
    effect, split, index, folder = job
    image_path, mask_path = (folder / path for path in paths(effect, split, index))
    scene = draw_for_task(effect, split, index)
    labels = Image.fromarray(scene.labels(effect) * (1 if effect == "semantic" else 255))
    if effect == "semantic":
        labels.putpalette(PALETTE)
    put(image_path, lambda temporary: Image.fromarray(scene.image).save(temporary, quality=92))
    put(mask_path, labels.save)
    return image_path.stem


def write_dataset(effect: str, folder: Path) -> None:
    """Writes demo_<effect> below `folder`, unless it is there whole. The last file written marks it as whole."""
    mark = folder / "scenes.txt"
    told = f"{TRAIN_SCENES} training and {TEST_SCENES} test scenes of demo_{effect}, drawn by generator {GENERATOR}\n"
    if mark.exists():
        if mark.read_text() != told:
            raise UserError(f"{folder} was drawn by another version of the scene generator: delete the folder")
        return
    jobs = [(effect, split, index, folder) for split, count in (("train", TRAIN_SCENES), ("test", TEST_SCENES))
            for index in range(count)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        names = list(tqdm(pool.map(write_scene, jobs, chunksize=8), f"drawing demo_{effect}", total=len(jobs)))
    training, test = ("\n".join(some) + "\n" for some in (names[:TRAIN_SCENES], names[TRAIN_SCENES:]))
    if effect == "blur":
        put(folder / "test.txt", lambda temporary: temporary.write_text(test))
    if effect == "semantic":
        lists = folder / "VOCdevkit/VOC2012/ImageSets/Segmentation"
        put(lists / "train.txt", lambda temporary: temporary.write_text(training))
        put(lists / "val.txt", lambda temporary: temporary.write_text(test))
    put(mark, lambda temporary: temporary.write_text(told))
