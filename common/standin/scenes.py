"""Small synthetic pictures, each determined by its seed.

A scene is a textured ground with objects of six kinds on it. They cast soft shadows. A mirror may
reflect the rest of the scene, parts may be out of focus, some objects stand out in colour and
others hide. `write_dataset` writes scenes as five data sets in the on-disk layouts of the five
benchmarks, so that the demo runs the same code as real data.
"""

import functools
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
# The kinds of objects, in palette order. demo_semantic uses these names for its classes.
KINDS = ("star", "ring", "cross", "leaf", "brick", "ball")
# The ways in which an object or the ground may be painted.
SURFACES = ("plain", "stripes", "checks", "dots", "veins", "mortar", "gloss", "noise")
GROUND_SURFACE_SHARES = (0.2, 0.06, 0.06, 0.06, 0.06, 0.06, 0.0, 0.5)  # in the order of SURFACES
TYPICAL_SURFACE = {
    "star": "dots", "ring": "stripes", "cross": "checks", "leaf": "veins", "brick": "mortar",
    "ball": "gloss",
}
EFFECTS = ("semantic", "shadow", "mirror", "blur", "saliency")  # the target of demo_<effect>
COLOURS = {
    "red": (200, 50, 45), "orange": (225, 135, 40), "yellow": (220, 200, 60),
    "green": (70, 150, 60), "cyan": (60, 175, 180), "blue": (55, 85, 190),
    "purple": (130, 65, 165), "pink": (220, 120, 165), "brown": (120, 80, 50),
    "grey": (140, 140, 140), "white": (225, 225, 220), "black": (45, 45, 48),
}
MIN_AREA = 60  # visible pixels; an object that shows fewer is hidden and gets no label
GRID_Y, GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)  # pixel coordinates, (S, S) each


@dataclass
class Thing:
    """One object of a scene: its kind, colour and surface by name, and whether it stands out."""
    kind: str
    colour: str
    surface: str
    salient: bool


@dataclass
class Scene:
    """A picture and its ground truth.

    image: (S, S, 3) uint8. instances: (S, S) uint8, 0 = ground, i = things[i - 1]. surface:
    (S, S) uint8, index into SURFACES. shadow, mirror, blur: (S, S) bool.
    """
    image: np.ndarray
    things: list[Thing]
    instances: np.ndarray
    surface: np.ndarray
    shadow: np.ndarray
    mirror: np.ndarray
    blur: np.ndarray

    def label_map(self, effect: str) -> np.ndarray:
        """The label map of `demo_<effect>`, (S, S) uint8.

        Its values are 0 and 1; for "semantic" they are 0 and 1 + the index into KINDS.
        """
        if effect in ("shadow", "mirror", "blur"):
            return getattr(self, effect).astype(np.uint8)
        if effect == "saliency":
            values = [0] + [int(thing.salient) for thing in self.things]
        else:
            values = [0] + [1 + KINDS.index(thing.kind) for thing in self.things]
        return np.array(values, np.uint8)[self.instances]


# -------------------------------------------------------------------------------------------------
# Outlines and surfaces. u, v are coordinates in the object's own frame, from about -1 to 1.

def outline(kind: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which places lie inside an object of that kind, bool. Each one is drawn a bit differently."""
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    amplitude, folds, phase = rng.uniform(0, 0.07), rng.integers(2, 5), rng.uniform(0, 6.3)
    rho = rho * (1 + amplitude * np.sin(folds * theta + phase))
    if kind == "star":
        tip = np.abs((theta * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 0 in the notches, 1 at the tips
        return rho < rng.uniform(0.4, 0.5) + 0.55 * tip
    if kind == "ring":
        return (rho < 1) & (rho > rng.uniform(0.45, 0.6))
    if kind == "cross":
        arm = rng.uniform(0.28, 0.38)
        upright = (np.abs(u) < arm) & (np.abs(v) < 1)
        return upright | ((np.abs(v) < arm) & (np.abs(u) < 1))
    if kind == "leaf":
        return np.abs(v) < rng.uniform(0.4, 0.55) * (1 - u * u)
    if kind == "brick":
        return (np.abs(u) < 1) & (np.abs(v) < rng.uniform(0.45, 0.7))
    return rho < 0.85  # ball


def paint(surface: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator,
          scale: float = 1.0) -> np.ndarray:
    """How much brighter or darker a surface is at each place: a factor minus 1, about 0.

    `scale` stretches the pattern.
    """
    u, v = u / scale + rng.uniform(0, 1), v / scale + rng.uniform(0, 1)
    depth = rng.uniform(0.16, 0.3)
    if surface == "plain":
        return 0.12 * (u * rng.uniform(-1, 1) + v * rng.uniform(-1, 1))
    if surface == "stripes":
        return depth * np.sign(np.sin(rng.uniform(9, 13) * u))
    if surface == "checks":
        frequency = rng.uniform(7, 10)
        return depth * np.sign(np.sin(frequency * u) * np.sin(frequency * v))
    if surface == "dots":
        frequency = rng.uniform(9, 13)
        dot = np.cos(frequency * u) * np.cos(frequency * v) > 0.35
        return depth * np.where(dot, 1.3, -0.4)
    if surface == "veins":
        vein = np.abs(np.sin(8 * (u + np.abs(v - 0.5)))) > 0.85
        return depth * np.where(vein, -1.5, 0.3)
    if surface == "mortar":
        row = np.floor(v * 4)
        between_rows = np.abs(v * 4 % 1 - 0.5) > 0.4
        between_bricks = np.abs((u * 2.5 + 0.5 * row) % 1 - 0.5) > 0.44
        return depth * np.where(between_rows | between_bricks, 1.6, -0.2)
    if surface == "gloss":
        highlight = np.exp(-((u - 0.2) ** 2 + (v - 0.1) ** 2) / 0.18)
        return 0.75 * highlight - 0.3 * np.hypot(u - 0.2, v - 0.1)
    return noise(u.shape, rng, coarse=4) * depth * 1.5


def noise(shape: tuple[int, int], rng: np.random.Generator, coarse: int) -> np.ndarray:
    """Smooth noise from about -1 to 1, float32 of that shape.

    It is the sum of random values on a grid of `coarse` cells a side and on one four times finer.
    """
    total = np.zeros(shape, np.float32)
    for cells, weight in ((coarse, 0.6), (coarse * 4, 0.4)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.BICUBIC))
    return total


def soften(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask (S, S) bool with a soft edge of about `radius` pixels, float32 in [0, 1]."""
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates x, y in a frame that is turned by `angle`, in radians."""
    return x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)


# -------------------------------------------------------------------------------------------------
# A scene. Random numbers are drawn in a fixed order. A different order changes every scene, so then
# raise GENERATOR (below).

def _visible(shift: int) -> slice:
    """Where a line of SIZE pixels, moved by `shift`, still covers its first place."""
    return slice(max(shift, 0), SIZE + min(shift, 0))


class SceneDrawing:
    """A scene while it is drawn: at first the bare ground, then what the methods add to it.

    What is drawn later stands in front. canvas: (S, S, 3) float32 in 0..255. The other maps are
    those of `Scene`.
    """

    def __init__(self, rng: np.random.Generator, casts_shadows: bool) -> None:
        self.rng, self.casts_shadows = rng, casts_shadows
        self.canvas = np.zeros((SIZE, SIZE, 3), np.float32)
        self.surface = np.zeros((SIZE, SIZE), np.uint8)
        self.instances = np.zeros((SIZE, SIZE), np.uint8)
        self.shadow = np.zeros((SIZE, SIZE), bool)
        self.mirror = np.zeros((SIZE, SIZE), bool)
        self.blur = np.zeros((SIZE, SIZE), bool)
        self.things: list[Thing] = []

        self.ground_colours = rng.choice(list(COLOURS), 2, replace=False)
        self._paint_ground()
        light = rng.uniform(0, 2 * np.pi)
        self.throw = np.array([np.cos(light), np.sin(light)])  # unit vector away from the light
        self.darkness = rng.uniform(0.42, 0.62)  # brightness of a full shadow

    def _paint_ground(self) -> None:
        """Paints the whole ground, and half of the time another surface on one side of a line."""
        rng = self.rng
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0.25, 0.75) * SIZE
        across = (GRID_X - SIZE / 2) * np.sin(angle) + (GRID_Y - SIZE / 2) * np.cos(angle)
        side = across + SIZE / 2 > offset
        for part, colour in zip((np.ones_like(side), side), self.ground_colours):
            surface = str(rng.choice(SURFACES, p=GROUND_SURFACE_SHARES))
            # grounds are less colourful than things
            tone = 0.55 * np.array(COLOURS[colour]) + 0.45 * rng.uniform(70, 190)
            u, v = turned(GRID_X, GRID_Y, rng.uniform(0, np.pi))
            u, v = u / SIZE * 4, v / SIZE * 4
            pattern = 0.6 * paint(surface, u, v, rng, scale=rng.uniform(0.8, 2))
            pattern = pattern + 0.1 * noise((SIZE, SIZE), rng, 8)
            self.canvas[part] = (tone * (1 + pattern[..., None]))[part]
            self.surface[part] = SURFACES.index(surface)
            if rng.random() < 0.5:
                break

    def _own_frame(self, radius: float, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates u, v (S, S) of an object at that place, turned and stretched at random."""
        turn, stretch = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.8, 1.2)
        along, across = turned(GRID_X - centre[0], GRID_Y - centre[1], turn)
        return along / (radius * stretch), across / (radius / stretch)

    def _cast(self, inside: np.ndarray, reach: float) -> None:
        """Darkens what lies in the shadow of `inside` (S, S) bool.

        reach: how far the shadow is thrown, in pixels.
        """
        dx, dy = np.round(self.throw * reach).astype(int)
        moved = np.zeros_like(inside)
        moved[_visible(dy), _visible(dx)] = inside[_visible(-dy), _visible(-dx)]
        strength = soften(moved, self.rng.uniform(1.0, 2.2))
        strength *= ~self.shadow  # there is one light: shadows do not add up
        self.canvas *= (1 - (1 - self.darkness) * strength)[..., None]
        self.shadow |= strength > 0.5

    def place(self, thing: Thing, radius: float, centre: np.ndarray) -> None:
        """Draws an object of `radius` pixels at `centre` (x, y)."""
        rng = self.rng
        u, v = self._own_frame(radius, centre)
        inside = outline(thing.kind, u, v, rng)
        if self.casts_shadows:
            self._cast(inside, radius * rng.uniform(0.5, 1.1))
        alpha = soften(inside, 0.6)[..., None]
        shading = u * self.throw[0] + v * self.throw[1]
        pattern = paint(thing.surface, u, v, rng) + 0.15 * shading * -1
        tone = np.array(COLOURS[thing.colour]) * rng.uniform(0.85, 1.1) + rng.normal(0, 6, 3)
        self.canvas[:] = self.canvas * (1 - alpha) + tone * (1 + pattern[..., None]) * alpha
        self.things.append(thing)
        self.instances[inside] = len(self.things)
        self.surface[inside] = SURFACES.index(thing.surface)
        for effect in (self.shadow, self.mirror, self.blur):
            effect[inside] = False

    def cast_from_outside(self, radius: float, centre: np.ndarray) -> None:
        """Draws only the shadow of something that stands outside the picture."""
        u, v = self._own_frame(radius, centre)
        kind = str(self.rng.choice(KINDS))
        self._cast(outline(kind, u, v, self.rng), 0)

    def place_panes(self) -> None:
        """Draws one or two framed panes: a mirror, and perhaps a painting, which looks like one."""
        rng = self.rng
        before = self.canvas.copy()
        for index in range(int(rng.integers(1, 3))):
            centre, turn = rng.uniform(60, SIZE - 60, 2), rng.uniform(-0.4, 0.4)
            half = rng.uniform(26, 62, 2)
            u, v = turned(GRID_X - centre[0], GRID_Y - centre[1], turn)
            u, v = u / half[0], v / half[1]
            is_round = rng.random() < 0.4
            reach = np.hypot(u, v) if is_round else np.maximum(np.abs(u), np.abs(v))
            pane = reach < 1
            frame = (reach < 1 + 5 / half.min()) & ~pane
            self.canvas[frame] = self._any_colour() * rng.uniform(0.6, 1)
            self.surface[frame] = SURFACES.index("plain")
            if index == 0:
                shift = int(rng.integers(40, SIZE - 40))
                flipped = np.roll(before[:, ::-1], shift, axis=1)
                bluish = np.array((200, 215, 230))  # as glass is, a little
                self.canvas[pane] = (0.8 * flipped + 0.2 * bluish)[pane]
                self.surface[pane] = np.roll(self.surface[:, ::-1], shift, axis=1)[pane]
                self.mirror[pane] = True
            else:
                surface = str(rng.choice(SURFACES))
                tone = self._any_colour()
                self.canvas[pane] = (tone * (1 + paint(surface, u, v, rng)[..., None]))[pane]
                self.surface[pane] = SURFACES.index(surface)
                self.mirror[pane] = False
            self.mirror[frame] = False
            self.instances[pane | frame] = 0
            self.shadow[pane | frame] = False

    def _any_colour(self) -> np.ndarray:
        return np.array(COLOURS[str(self.rng.choice(list(COLOURS)))])

    def defocus_all(self) -> None:
        """Puts all that is drawn so far out of focus."""
        self.canvas[:] = self._defocused()
        self.blur[:] = True

    def defocus_region(self) -> None:
        """Puts one side of the picture out of focus, beyond a wavy line."""
        along, _ = turned(GRID_X - SIZE / 2, GRID_Y - SIZE / 2, self.rng.uniform(0, 2 * np.pi))
        wavy = along + 12 * noise((SIZE, SIZE), self.rng, 3)
        self._defocus_softly(wavy > self.rng.uniform(-30, 50))

    def defocus_objects(self) -> None:
        """Puts half of the objects out of focus."""
        half = max(1, len(self.things) // 2)
        numbers = self.rng.choice(len(self.things), half, replace=False) + 1
        self._defocus_softly(np.isin(self.instances, numbers))

    def _defocus_softly(self, region: np.ndarray) -> None:
        self.blur[:] = region
        alpha = soften(region, 1.0)[..., None]
        self.canvas[:] = self.canvas * (1 - alpha) + self._defocused() * alpha

    def _defocused(self) -> np.ndarray:
        picture = Image.fromarray(self.canvas.clip(0, 255).astype(np.uint8))
        lens = ImageFilter.GaussianBlur(self.rng.uniform(2.2, 4.5))
        return np.asarray(picture.filter(lens), np.float32)

    def finish(self) -> Scene:
        """Adds a gradient of light and the noise of a sensor, and forgets hidden objects."""
        from_centre = (GRID_X - SIZE / 2) * self.throw[0] + (GRID_Y - SIZE / 2) * self.throw[1]
        shade = 1 + 0.12 * from_centre / -SIZE
        sensor_noise = self.rng.normal(0, self.rng.uniform(1.5, 4), self.canvas.shape)
        image = (self.canvas * shade[..., None] + sensor_noise).clip(0, 255).astype(np.uint8)
        scene = Scene(image, self.things, self.instances, self.surface, self.shadow, self.mirror,
                      self.blur)
        return _drop_hidden(scene)


def draw_scene(rng: np.random.Generator, effect: str | None = None) -> Scene:
    """Draws one scene.

    `effect` makes sure that there is something to ask for (with "mirror", a mirror). None mixes
    all effects.
    """
    has = _choose_effects(rng, effect)
    drawing = SceneDrawing(rng, has["shadow"])
    plan = _plan_things(rng, has, drawing.ground_colours)
    spots = _spread(len(plan), rng)
    if has["shadow"] and rng.random() < 0.4:
        drawing.cast_from_outside(rng.uniform(40, 80), rng.uniform(0, SIZE, 2))

    # Objects are drawn from far to near. The nearest ones stand in front of the mirror, or in
    # focus in front of a blurred scene.
    near = int(rng.integers(1, 4))
    for index, ((thing, radius), spot) in enumerate(zip(plan, spots)):
        if index == len(plan) - near:
            if has["mirror"]:
                drawing.place_panes()
            blurred_part = rng.choice(("behind", "region", "objects"))
            if has["blur"] and blurred_part == "behind":
                drawing.defocus_all()
        drawing.place(thing, radius, spot)
    if has["blur"] and blurred_part == "region":
        drawing.defocus_region()
    if has["blur"] and blurred_part == "objects":
        drawing.defocus_objects()
    return drawing.finish()


def _choose_effects(rng: np.random.Generator, effect: str | None) -> dict[str, bool]:
    """Which effects the scene has: the one asked for (or any one), and others by chance."""
    wanted = rng.choice(EFFECTS) if effect is None else effect
    chances = {"shadow": 0.35, "mirror": 0.2, "blur": 0.15, "saliency": 0.3}
    has = {name: rng.random() < chance for name, chance in chances.items()}
    has[wanted] = True
    if effect not in (None, "blur"):
        has["blur"] = False  # in the other tasks defocus would only hide the target
    return has


def _plan_things(rng: np.random.Generator, has: dict[str, bool],
                 ground_colours: np.ndarray) -> list[tuple[Thing, float]]:
    """5 to 10 objects, each with its radius in pixels: a few kinds, several objects of each."""
    kinds = rng.choice(KINDS, rng.integers(2, 5), replace=False)
    count = int(rng.integers(5, 11))

    def distance_to_grounds(colour: str) -> float:
        return min(_distance(colour, ground) for ground in ground_colours)

    hiding = [name for name in COLOURS if _distance(name, ground_colours[0]) < 110]
    loud = [name for name in COLOURS if distance_to_grounds(name) > 150] or ["white"]
    loud_colours = rng.choice(loud, min(2, len(loud)), replace=False)
    loud_count = int(rng.integers(1, 4)) if has["saliency"] else 0

    plan = []
    for index in range(count):
        kind = str(rng.choice(kinds))
        salient = index < loud_count
        if salient:
            colour, radius = str(rng.choice(loud_colours)), rng.uniform(20, 42)
        elif has["saliency"]:
            colour, radius = str(rng.choice(hiding)), rng.uniform(12, 30)
        else:
            as_dark_as_shadow = has["shadow"] and rng.random() < 0.3
            colour = "black" if as_dark_as_shadow else str(rng.choice(list(COLOURS)))
            small, large = rng.uniform(11, 20), rng.uniform(20, 45)
            radius = float(rng.choice([small, large], p=(0.55, 0.45)))
        is_typical = rng.random() < 0.75
        surface = TYPICAL_SURFACE[kind] if is_typical else str(rng.choice(SURFACES))
        plan.append((Thing(kind, colour, surface, salient), radius))
    rng.shuffle(plan)
    return plan


def _distance(one: str, other: str) -> float:
    """How far apart two colours of COLOURS are, as the length of their difference in RGB."""
    return float(np.linalg.norm(np.subtract(COLOURS[one], COLOURS[other], dtype=np.float64)))


def _spread(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` places (x, y) that keep apart, (count, 2).

    Each one is the farthest from those before it among ten random places.
    """
    spots = [rng.uniform(20, SIZE - 20, 2)]
    for _ in range(count - 1):
        tries = rng.uniform(14, SIZE - 14, (10, 2))
        gaps = np.linalg.norm(tries[:, None] - np.array(spots)[None], axis=2).min(1)
        spots.append(tries[gaps.argmax()])
    return np.array(spots)


def _drop_hidden(scene: Scene) -> Scene:
    """Forgets objects of which fewer than MIN_AREA pixels show, and renumbers the others."""
    areas = np.bincount(scene.instances.ravel(), minlength=len(scene.things) + 1)
    kept = [i for i in range(1, len(scene.things) + 1) if areas[i] >= MIN_AREA]
    renumber = np.zeros(len(scene.things) + 1, np.uint8)
    renumber[kept] = np.arange(1, len(kept) + 1)
    scene.instances = renumber[scene.instances]
    scene.things = [scene.things[i - 1] for i in kept]
    return scene


def draw_for_task(effect: str, split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of demo_<effect>; split is "train" or "test".

    It is drawn again until its target covers 1 to 75 % of it, so that it can be asked for. Raises
    RuntimeError if that fails 100 times.
    """
    for attempt in range(100):
        split_number = ("train", "test").index(split)
        entropy = [seed, 1, EFFECTS.index(effect), split_number, index, attempt]
        scene = draw_scene(np.random.default_rng(entropy), effect)
        share = (scene.label_map(effect) > 0).mean()
        if 0.01 <= share <= 0.75:
            return scene
    raise RuntimeError(f"no scene for demo_{effect} in 100 attempts")


def draw_for_training(index: int, seed: int = 0) -> Scene:
    """Scene `index` for training the stand-ins.

    Its seed is never that of a demo task, because the second number is 0 here and 1 there.
    """
    return draw_scene(np.random.default_rng([seed, 0, index]))


# -------------------------------------------------------------------------------------------------
# Data sets on disk

TRAIN_SCENES, TEST_SCENES = 120, 240
# Raise this with every change to the scenes, so that old ones on a disk are not used as new ones.
GENERATOR = 2
PALETTE = [0, 0, 0, 220, 60, 60, 60, 160, 220, 230, 190, 60, 80, 170, 80, 150, 90, 60,
           160, 100, 200]  # RGB, 7 entries


def paths(effect: str, split: str, index: int) -> tuple[str, str]:
    """Where the benchmark's own layout keeps the image and the mask of scene `index`.

    Both paths are relative to the data folder.
    """
    name = f"{'tr' if split == 'train' else 'te'}{index:04d}"
    if effect == "blur":
        # CUHK has one folder, and its test set is what test.txt lists
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
    folder = "VOCdevkit/VOC2012"
    return f"{folder}/JPEGImages/{name}.jpg", f"{folder}/SegmentationClass/{name}.png"


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, then moves that file to `path`: no reader meets half a file.

    A scene is always drawn with the same bytes, so a file that is there already is the same, or is
    not ours: then raises UserError.

    It differs from files.write_atomic in two ways. Two processes may write the same file at once,
    and it does not wait for the disk, which would take long for thousands of pictures.
    """
    # The name begins with a dot, so a file that a kill leaves behind is not listed as a picture.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        if path.exists() and path.read_bytes() != temporary.read_bytes():
            raise UserError(f"{path} is there already and is not what this generator draws, so it "
                            "is not replaced: move the data folder away")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_text(path: Path, text: str) -> None:
    put(path, lambda temporary: temporary.write_text(text))


def write_scene(job: tuple[str, str, int, Path]) -> str:
    """Draws and writes one scene of a job (effect, split, index, folder); returns its name."""
    effect, split, index, folder = job
    image_path, mask_path = (folder / path for path in paths(effect, split, index))
    scene = draw_for_task(effect, split, index)
    mask = Image.fromarray(scene.label_map(effect) * (1 if effect == "semantic" else 255))
    if effect == "semantic":
        mask.putpalette(PALETTE)
    put(image_path, functools.partial(Image.fromarray(scene.image).save, quality=92))
    put(mask_path, mask.save)
    return image_path.stem


def write_dataset(effect: str, folder: Path) -> None:
    """Writes demo_<effect> to `folder`, unless all of it is there.

    The last file written, scenes.txt, says that the data set is complete. Raises UserError if the
    folder was drawn by another version of the generator.
    """
    mark = folder / "scenes.txt"
    description = (f"{TRAIN_SCENES} training and {TEST_SCENES} test scenes of demo_{effect}, "
                   f"drawn by generator {GENERATOR}\n")
    if mark.exists():
        if mark.read_text() != description:
            raise UserError(f"{folder} was drawn by another version of the scene generator: "
                            "delete the folder")
        return
    jobs = [(effect, "train", index, folder) for index in range(TRAIN_SCENES)]
    jobs += [(effect, "test", index, folder) for index in range(TEST_SCENES)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(write_scene, jobs, chunksize=8)
        names = list(tqdm(drawn, f"drawing demo_{effect}", total=len(jobs)))
    training_names = "\n".join(names[:TRAIN_SCENES]) + "\n"
    test_names = "\n".join(names[TRAIN_SCENES:]) + "\n"
    if effect == "blur":
        put_text(folder / "test.txt", test_names)
    if effect == "semantic":
        lists = folder / "VOCdevkit/VOC2012/ImageSets/Segmentation"
        put_text(lists / "train.txt", training_names)
        put_text(lists / "val.txt", test_names)
    put_text(mark, description)
