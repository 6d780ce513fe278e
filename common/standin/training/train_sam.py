"""Trains the SAM stand-in from scratch, as SAM was trained: clicks, then clicks on the errors.

    python -m common.standin.training.train_sam

We estimate three hours on both threads of a 2-core CPU, and six where it has no AVX-512. The first
phases see smaller pictures, since the encoder is convolutional and the cost of a step grows with
the picture. A stopped training goes on from its last save. With another number of threads other
weights result: each thread draws clicks for a part of the batch.

Each step embeds a batch of scenes and asks for one target in each. Some batches are prompted as
people do it: up to nine clicks, each in the middle of the largest error. The others are decoded
three times: after the first prompt (one click, a positive and a negative one, or a click and a
box), after a few corrective clicks, and after up to 17 points in all. There, corrective clicks are
drawn from the error region, or from the 10 x 10 patch centres among which AlignSAM's agent chooses.

Targets are single things, unions of several or of all of one kind (so that prompts can collect
disjoint parts), shadows, mirrors and defocused regions. None has a name. Neither the scenes of the
demo tasks nor the names of their targets are used.

Clicks alone teach edges, but no kinds of things. SAM's encoder therefore starts from masked
pretraining; here a linear head on the embedding learns facts about each place (auxiliary.py), at
first alone and then together with the clicks.
"""

import common.runtime.first  # noqa: F401  before torch

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from common.runtime import checkpoint, files, script, settings
from common.runtime.workers import side_by_side
from common.standin.model import IMAGE_SIZE, STRIDE, WEIGHTS, WIDTH, build_sam, new_sam
from common.standin.scenes import GENERATOR
from common.standin.training import auxiliary
from common.standin.training.store import load_scenes, save_weights

SCENES = Path("data/standin")  # where the training scenes are kept, and the state of a training
TRAIN, HELD_OUT = 8000, 400  # scenes
PHASES = (  # pixels a side, optimiser steps, greatest rate, with clicks or the auxiliary task alone
    (192, 1500, 2e-3, False),
    (192, 5000, 6e-4, True),
    (IMAGE_SIZE, 2000, 4e-4, True),
    (IMAGE_SIZE, 450, 2.5e-4, True),
    (IMAGE_SIZE, 1900, 3e-4, True),
)
BATCH = 16  # scenes a step
AUXILIARY = 0.3  # weight of the auxiliary loss; the loss of the clicks has weight 1
ONE_BY_ONE = 0.4  # share of the batches that are prompted as the test prompts them
SHARES = {  # how often each sort of target is drawn: shadows more often, as they are the hardest
    "thing": 0.28, "kind": 0.12, "union": 0.12, "shadow": 0.32, "mirror": 0.09, "blur": 0.07,
}
TEST_SHARES = {  # and in the test
    "thing": 0.36, "kind": 0.16, "union": 0.16, "shadow": 0.14, "mirror": 0.1, "blur": 0.08,
}
SEED = 0
SAVE_EVERY = 100  # steps: a stopped training goes on from there
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with bfloat16 on a GPU alone
_PIXEL = STRIDE // auxiliary.FINE  # pixels a side of one of a low-resolution mask
LEAST_TARGET, GREATEST_TARGET = 1 / 768, 0.8  # shares of the scene
PATCHES = 10  # a side, as many as AlignSAM's agent has


class Scenes(NamedTuple):
    """Scenes to train on."""

    images: np.ndarray  # (N, s, s, 3) uint8
    maps: np.ndarray  # (N, 5, s, s) uint8, as from `load_scenes`
    things: list[list[dict]]  # of each scene
    shapes: np.ndarray  # (N, n, 11) float32, of auxiliary.shapes_of_scenes


def decode(sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor,
           boxes: Tensor | None = None, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All four masks of B different images, with gradients.

    It is MaskDecoder.predict_masks without repeat_interleave, which is for one image with many
    prompts. embeddings: (B, C, g, g). points: (B, N, 2) in input pixels. labels: (B, N). boxes:
    (B, 4). masks: (B, 1, m, m). Returns logits (B, 4, m, m) and predicted IoUs (B, 4).
    """
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder((points, labels), boxes, masks)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(embeddings), -1, -1), sparse], dim=1)
    positions = sam.prompt_encoder.get_dense_pe().expand_as(dense)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda" and sam.training):
        queries, keys = decoder.transformer(embeddings + dense, positions, tokens)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(embeddings.shape))
        hyper_in = [mlp(queries[:, 1 + i])
                    for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        hyper_in = torch.stack(hyper_in, 1)
        quality = decoder.iou_prediction_head(queries[:, 0])
    logits = torch.einsum("bkc,bchw->bkhw", hyper_in.float(), upscaled.float())
    return logits, quality.float()


def draw_target(maps: np.ndarray, things: list[dict], rng: np.random.Generator,
                shares: dict[str, float]) -> tuple[np.ndarray, str]:
    """One target of a scene, (s, s) bool, and its sort, which is for reports only.

    maps: (5, s, s), as from `load_scenes`. The sort is a key of `shares`, or "background" where
    20 attempts give no target of a useful size.
    """
    instances, _, shadow, mirror, blur = maps
    for _ in range(20):
        sort = str(rng.choice(list(shares), p=list(shares.values())))
        if sort == "shadow":
            target = shadow > 0
            if rng.random() < 0.5 and target.any():  # one connected part of it
                parts, count = ndimage.label(target)
                target = parts == rng.integers(1, count + 1)
        elif sort in ("mirror", "blur"):
            target = (mirror if sort == "mirror" else blur) > 0
        elif not things:
            continue
        elif sort == "kind":
            kind = rng.choice(things)["kind"]
            numbers = [i for i, thing in enumerate(things, 1) if thing["kind"] == kind]
            target = np.isin(instances, numbers)
        else:
            count = 1 if sort == "thing" else min(len(things), int(rng.integers(2, 5)))
            numbers = rng.choice(len(things), count, replace=False) + 1
            target = np.isin(instances, numbers)
        if LEAST_TARGET <= target.mean() <= GREATEST_TARGET:
            return target, sort
    return instances == 0, "background"


def in_mask_pixels(areas: np.ndarray, size: int) -> Tensor:
    """The share of each mask pixel that areas (B, s, s) bool cover, (B, m, m) float.

    size: pixels a side of the picture that the stand-in sees. A share has the middle of its pixel,
    as a mask that is enlarged assumes; one of the scene's pixels under it would lie beside that.
    """
    before, after = areas.shape[2], size // _PIXEL
    finer = after // math.gcd(before, after)  # so that a mask pixel is made of whole small ones
    covered = F.interpolate(torch.from_numpy(areas).float()[:, None], (before * finer,) * 2)
    return F.avg_pool2d(covered, before * finer // after)[:, 0]


def clicks_in(region: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """`count` places drawn uniformly from each region (B, m, m) bool.

    Returns (B, count, 2), as (x, y) in input pixels.
    """
    weights, side = region.flatten(1).float() + 1e-9, region.shape[2]
    pixels = torch.multinomial(weights, count, replacement=True, generator=draws)
    return (torch.stack([pixels % side, pixels // side], 2) + 0.5) * _PIXEL


def label_of(points: Tensor, targets: Tensor, pixel: int = _PIXEL) -> Tensor:
    """1 where the target (B, m, m) lies under the point (B, N, 2), else 0; (B, N) int64.

    pixel: input pixels a side of one of the target's.
    """
    column, row = (points / pixel).long().clamp(0, targets.shape[2] - 1).unbind(2)
    image = torch.arange(len(points), device=points.device)[:, None]
    return targets[image, row, column].long()


def boxes_around(targets: Tensor, draws: torch.Generator) -> Tensor:
    """The bounding boxes of targets (B, m, m) bool with some noise: x0, y0, x1, y1, (B, 4)."""
    rows_hit, columns_hit = targets.any(2).float(), targets.any(1).float()
    first = torch.stack([columns_hit.argmax(1), rows_hit.argmax(1)], 1)
    from_end = torch.stack([columns_hit.flip(1).argmax(1), rows_hit.flip(1).argmax(1)], 1)
    boxes = torch.cat([first, targets.shape[2] - from_end], 1).float() * _PIXEL
    return boxes + 3 * torch.randn(boxes.shape, generator=draws, device=boxes.device)


def first_prompt(targets: Tensor, rng: np.random.Generator,
                 draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """One click on the target, a click on it and one beside it, or a click and a box.

    targets: (B, m, m) bool. Returns points (B, N, 2), labels (B, N) and boxes (B, 4) or None.
    """
    points = clicks_in(targets, 1, draws)
    style = rng.choice(("click", "pair", "box"), p=(0.45, 0.4, 0.15))
    if style == "pair":
        points = torch.cat([points, clicks_in(~targets, 1, draws)], 1)
    boxes = boxes_around(targets, draws) if style == "box" else None
    return points, label_of(points, targets), boxes


def corrections(logits: Tensor, targets: Tensor, count: int, rng: np.random.Generator,
                draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` further clicks, each with its true label, for logits and targets (B, m, m).

    They lie in the error region, or on patch centres. Returns points (B, count, 2) and labels
    (B, count).
    """
    if rng.random() < 0.5:
        error = (logits > 0) != targets
        has_error = error.flatten(1).any(1)[:, None, None]
        points = clicks_in(torch.where(has_error, error, targets), count, draws)
    else:  # half of the time mostly on the target, as a trained agent chooses them
        size = targets.shape[2] * _PIXEL
        cells = torch.arange(PATCHES, device=targets.device).add(0.5) * (size / PATCHES)
        centres = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), 2).flatten(0, 1)
        on_target = label_of(centres.expand(len(targets), -1, -1), targets).float()
        preference = float(rng.random() < 0.5)
        patches = torch.multinomial(0.05 + on_target * preference, count, generator=draws)
        points = centres[patches]
    return points, label_of(points, targets)


def mask_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """SAM's loss, 20 focal + 1 Dice, of each mask.

    logits: (B, K, m, m). shares: (B, m, m), of each mask pixel that the target covers, which both
    losses take as a probability. Returns (B, K). The focal loss has no class weights: with them, so
    short a training ends in empty masks.
    """
    truth = shares[:, None].expand(logits.shape)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missed = (truth - probability).abs()
    focal = (missed ** 2 * entropy).mean((2, 3))
    intersection = (probability * truth).sum((2, 3))
    areas = probability.sum((2, 3)) + truth.sum((2, 3))
    dice = 1 - (2 * intersection + 1) / (areas + 1)
    return 20 * focal + dice


def iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of logits (B, ..., h, w) > 0 with targets of the same shape, (B, ...)."""
    found = logits > 0
    return (found & targets).sum((-2, -1)) / (found | targets).sum((-2, -1)).clamp(min=1)


def quality_loss(quality: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the predicted IoUs (B, K) of masks (B, K, m, m), a scalar."""
    true_iou = iou(logits.detach(), targets[:, None].expand(logits.shape))
    return F.mse_loss(quality, true_iou)


def next_click(found: np.ndarray, target: np.ndarray, pixel: int) -> tuple[float, float]:
    """The most interior pixel of the largest error, (x, y) in input pixels.

    found, target: (m, m) bool, one of whose pixels is `pixel` input pixels a side. If there is no
    error, it is that of the target.
    """
    parts, count = ndimage.label(found != target)
    if count:
        largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
        region = parts == largest
    else:
        region = target
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return (x + 0.5) * pixel, (y + 0.5) * pixel


def next_clicks(found: Tensor, targets: Tensor, pixel: int = _PIXEL) -> tuple[Tensor, Tensor]:
    """The next click on each of B images, and its true label, for found and targets (B, m, m) bool.

    pixel: input pixels a side of one of theirs. Returns points (B, 1, 2) and labels (B, 1).
    """
    places = [next_click(mask, target, pixel)
              for mask, target in zip(found.cpu().numpy(), targets.cpu().numpy())]
    points = torch.tensor(places, dtype=torch.float32, device=targets.device)[:, None]
    return points, label_of(points, targets, pixel)


def click_loss(sam: Sam, embeddings: Tensor, shares: Tensor, clicks: list[int],
               one_by_one: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """SAM's loss of some prompts in a row, and the IoU (B,) after the last.

    embeddings: (B, C, g, g). shares: (B, m, m), of each mask pixel that the target covers. clicks:
    how many each prompt adds to the one before. one_by_one: whether they are chosen as the test
    chooses them. The single-mask token learns from the first and the last two prompts. The other
    three tokens learn from the first one, and only the best of them.
    """
    targets = shares >= 0.5
    # a generator of its own: parts of a batch draw at the same time
    draws = torch.Generator(shares.device).manual_seed(int(rng.integers(2**31)))
    if one_by_one:
        points, labels = next_clicks(torch.zeros_like(targets), targets)
        boxes = None
    else:
        points, labels, boxes = first_prompt(targets, rng, draws)
    logits, quality = decode(sam, embeddings, points, labels, boxes)
    losses = mask_loss(logits, shares)
    best_of_three = losses[:, 1:].min(1).values.mean()
    loss = losses[:, 0].mean() + 0.5 * best_of_three + quality_loss(quality, logits, targets)
    learned = max(len(clicks) - 2, 0)  # from here on with gradients

    for index, count in enumerate(clicks):
        last = logits[:, 0].detach()
        if one_by_one:
            new_points, new_labels = next_clicks(last > 0, targets)
        else:
            new_points, new_labels = corrections(last, targets, count, rng, draws)
        points, labels = torch.cat([points, new_points], 1), torch.cat([labels, new_labels], 1)
        last_mask = last[:, None] if not one_by_one and rng.random() < 0.25 else None
        boxes = boxes if rng.random() < 0.5 else None
        with torch.set_grad_enabled(index >= learned):
            logits, quality = decode(sam, embeddings, points, labels, boxes, last_mask)
        if index >= learned:
            single_mask_loss = mask_loss(logits, shares)[:, 0].mean()
            loss = loss + single_mask_loss + quality_loss(quality, logits, targets)
    return loss, iou(logits[:, 0].detach(), targets)


def click_gradients(sam: Sam, embeddings: Tensor, shares: Tensor,
                    rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Backward of `click_loss`, one part of the batch on each core.

    Adds to the gradients of sam's prompt encoder and mask decoder. Returns the gradient of the
    embeddings (B, C, g, g) and the IoU after the last prompt (B,).
    """
    parameters = [*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()]
    one_by_one = rng.random() < ONE_BY_ONE
    if one_by_one:
        clicks = [1] * int(rng.integers(1, 9))
    else:
        clicks = [int(rng.integers(1, 5)), int(rng.integers(1, 12))]
    count = torch.get_num_threads() if DEVICE == "cpu" else 1
    parts = torch.arange(len(shares), device=shares.device).chunk(count)

    def compute(part: tuple[Tensor, int]) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the embeddings and of all parameters, and IoUs, of one part."""
        rows, seed = part
        with torch.enable_grad():
            own = embeddings[rows].detach().requires_grad_()
            loss, ious = click_loss(sam, own, shares[rows], clicks, one_by_one,
                                    np.random.default_rng(seed))
            loss = loss * (len(rows) / len(shares))
            gradients = torch.autograd.grad(loss, [own, *parameters], allow_unused=True)
        return gradients, ious

    seeds = rng.integers(2**31, size=len(parts)).tolist()
    results = side_by_side(compute, zip(parts, seeds), shares.device)
    for gradients, _ in results:
        for parameter, gradient in zip(parameters, gradients[1:]):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    of_embeddings = torch.cat([gradients[0] for gradients, _ in results])
    return of_embeddings, torch.cat([ious for _, ious in results])


@torch.no_grad()
def corrective_clicks(sam: Sam, images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
                      clicks: int) -> tuple[Tensor, list[str]]:
    """The standard protocol: each click goes to the middle of the largest error.

    images: (N, s, s, 3), of the size that the stand-in sees. maps: (N, 5, s, s). One target is
    drawn for each scene. Masks are enlarged to s x s and compared there, as in stage 4. Returns the
    IoU after each click, (N, clicks), and the sort of each target.
    """
    size = images.shape[1]
    rng = np.random.default_rng(1)
    scores, sorts = [], []
    for start in range(0, len(images), BATCH):
        chunk = slice(start, start + BATCH)
        drawn = [draw_target(scene_maps, inventory, rng, TEST_SHARES)
                 for scene_maps, inventory in zip(maps[chunk], things[chunk])]
        targets = torch.from_numpy(np.stack([target for target, _ in drawn])).to(sam.device)
        sorts += [sort for _, sort in drawn]
        pictures = to_pictures(images[chunk]).to(sam.device)
        embeddings = sam.image_encoder(sam.preprocess(pictures)).float()

        found = torch.zeros_like(targets)
        points = torch.zeros(len(targets), 0, 2, device=sam.device)
        labels = label_of(points, targets, 1)
        ious = []
        for _ in range(clicks):
            new_points, new_labels = next_clicks(found, targets, 1)
            points, labels = torch.cat([points, new_points], 1), torch.cat([labels, new_labels], 1)
            single_mask = decode(sam, embeddings, points, labels)[0][:, :1]
            logits = F.interpolate(single_mask, (size, size), mode="bilinear")[:, 0]
            found = logits > 0
            ious.append(iou(logits, targets).cpu())
        scores.append(torch.stack(ious, 1))
    return torch.cat(scores), sorts


def to_pictures(images: np.ndarray) -> Tensor:
    """Images (B, s, s, 3) uint8 to (B, 3, s, s) float in 0..255."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Images (B, s, s, 3) uint8, at `size` pixels a side."""
    if size == images.shape[1]:
        return images
    pictures = [Image.fromarray(image).resize((size, size), Image.BILINEAR) for image in images]
    return np.stack(pictures)


def set_size(sam: Sam, size: int) -> None:
    """Makes the stand-in expect pictures of `size` pixels a side."""
    prompts, grid = sam.prompt_encoder, size // STRIDE
    sam.image_encoder.img_size = size
    prompts.input_image_size, prompts.image_embedding_size = (size, size), (grid, grid)


def init_cross_attention(sam: Sam) -> None:
    """Gives every cross-attention equal query and key projections, larger than usual.

    A prompt's token and the image under it carry the same positional code. With equal projections
    a token attends to its own place from the first step. With independent ones, to learn this
    alone takes more than a thousand steps.
    """
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        attention.q_proj.weight.data *= 2.5
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())


def flip_at_random(images: np.ndarray, maps: np.ndarray, shapes: np.ndarray,
                   rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flips a whole batch left to right, top to bottom, both or not at all.

    images: (B, s, s, 3). maps: (B, 5, s, s). shapes: (B, n, 11), of which the first two are the
    centre's x and y; it is changed in place.
    """
    if rng.random() < 0.5:
        images, maps = images[:, :, ::-1], maps[..., ::-1]
        shapes[..., 0] = 1 - shapes[..., 0]
    if rng.random() < 0.5:
        images, maps = images[:, ::-1], maps[..., ::-1, :]
        shapes[..., 1] = 1 - shapes[..., 1]
    return images, maps, shapes


def report(sam: Sam, images: np.ndarray, maps: np.ndarray, things: list[list[dict]]) -> None:
    """Prints the mean IoU after 1 to 9 corrective clicks, over all targets and for each sort."""
    curves, sorts = corrective_clicks(sam, images, maps, things, 9)
    rows = {"all targets": curves}
    for wanted in sorted(set(sorts)):
        rows[wanted] = curves[torch.tensor([sort == wanted for sort in sorts])]
    for name, some_curves in rows.items():
        values = " ".join(f"{value:.3f}" for value in some_curves.mean(0))
        print(f"held-out IoU after clicks 1 to 9, {name}: {values}", flush=True)


def train_step(sam: Sam, head: nn.Module, optimizer: torch.optim.Optimizer, scenes: Scenes,
               size: int, with_clicks: bool,
               rng: np.random.Generator) -> tuple[float, float, float]:
    """One step of a phase, on a batch of scenes; sam and head are changed in place.

    Returns the auxiliary loss, the norm of all gradients, and the mean IoU after the last prompt,
    which is NaN without clicks.
    """
    # a batch of scenes
    rows = np.sort(rng.choice(len(scenes.images), BATCH, replace=False))
    images = resize(scenes.images[rows], size)
    images, maps, shapes = flip_at_random(images, scenes.maps[rows], scenes.shapes[rows], rng)

    # embed it once, and ask for facts about each cell
    pictures = to_pictures(images).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        inputs = sam.preprocess(pictures).contiguous(memory_format=torch.channels_last)
        embeddings = sam.image_encoder(inputs)
    embeddings = embeddings.float().contiguous()
    cells = np.arange(size // STRIDE) + 0.5
    middle = (cells * (STRIDE * maps.shape[2] / size)).astype(int)
    at_centres = maps[:, :2, middle[:, None], middle]
    instances, surfaces = torch.from_numpy(at_centres).long().to(DEVICE).unbind(1)
    things_here, shade = (in_mask_pixels(maps[:, layer] > 0, size).to(DEVICE) for layer in (0, 2))
    loss = auxiliary.loss(head(embeddings), pictures, instances, surfaces, things_here, shade,
                          torch.from_numpy(shapes).to(DEVICE))
    optimizer.zero_grad()

    # ask for targets by clicks, and send both gradients back through the encoder
    reached = math.nan
    if with_clicks:
        targets = np.stack([draw_target(scene_maps, scenes.things[row], rng, SHARES)[0]
                            for scene_maps, row in zip(maps, rows)])
        shares = in_mask_pixels(targets, size).to(DEVICE)
        gradient, ious = click_gradients(sam, embeddings, shares, rng)
        reached = ious.mean().item()
        torch.autograd.backward([AUXILIARY * loss, embeddings], [None, gradient])
    else:
        loss.backward()
    norm = nn.utils.clip_grad_norm_([*sam.parameters(), *head.parameters()], 1.0)
    optimizer.step()
    return loss.item(), norm.item(), reached


def main() -> None:
    settings.positive(globals(), "TRAIN", "HELD_OUT", "BATCH", "SAVE_EVERY", "PATCHES")
    settings.at_most(globals(), TRAIN, "BATCH")
    script.device(DEVICE)
    files.lock(SCENES, "set another SCENES")
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    scenes = Scenes(images[:TRAIN], maps[:TRAIN], things[:TRAIN],
                    auxiliary.shapes_of_scenes(maps[:TRAIN, 0]))
    torch.manual_seed(SEED)
    sam = new_sam().to(DEVICE).train()
    init_cross_attention(sam)
    sam.image_encoder.to(memory_format=torch.channels_last)
    head = nn.Conv2d(WIDTH, auxiliary.CHANNELS, 1).to(DEVICE)

    path, generator = SCENES / "sam.pt", torch.Generator().manual_seed(SEED)
    mend = "set the constant back, or delete the file"
    made_with = {"phases": PHASES, "train": TRAIN, "batch": BATCH, "auxiliary": AUXILIARY,
                 "one_by_one": ONE_BY_ONE, "shares": SHARES, "least_target": LEAST_TARGET,
                 "greatest_target": GREATEST_TARGET, "patches": PATCHES, "seed": SEED,
                 "generator": GENERATOR}
    saved = checkpoint.resume(path, "make standin", made_with, {"phase": int, "step": int}, {},
                              mend, sam=sam, head=head, generator=generator)
    for phase in range(saved["phase"] if saved else 0, len(PHASES)):
        size, steps, rate, with_clicks = PHASES[phase]
        set_size(sam, size)
        parameters = [*sam.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.07)
        done = 0
        if saved and saved["phase"] == phase:
            checkpoint.restore(path, saved, mend, optimizer=optimizer, schedule=schedule)
            done = saved["step"]
        print(f"{steps} steps at {size} x {size} pixels, "
              f"{'with clicks' if with_clicks else 'the encoder alone'}"
              f"{f'; {done} of them are done' if done else ''}", flush=True)

        started, ious = time.time(), []
        for step in range(done + 1, steps + 1):
            # all that is random in a step follows from one number: training can go on at any
            seed = torch.randint(2**31, (), generator=generator).item()
            torch.manual_seed(seed)
            loss, norm, reached = train_step(sam, head, optimizer, scenes, size, with_clicks,
                                             np.random.default_rng(seed))
            script.require_finite({"the loss": loss, "the gradient": norm},
                                  f"in step {step} of phase {phase + 1}",
                                  f"lower its rate in PHASES, and delete {path}")
            schedule.step()
            ious.append(reached)
            if step % SAVE_EVERY and step < steps:
                continue
            checkpoint.save_training(
                path, made_with, [], finished=phase == len(PHASES) - 1 and step == steps,
                phase=phase, step=step, sam=sam, head=head, optimizer=optimizer,
                schedule=schedule, generator=generator)
            clicked = f"  IoU at the last prompt {np.mean(ious[-50:]):.3f}" if with_clicks else ""
            print(f"step {step}/{steps}  auxiliary loss {loss:.3f}{clicked}  "
                  f"{(time.time() - started) / (step - done):.2f} s a step", flush=True)
    save_weights(sam, WEIGHTS)
    print(f"wrote {WEIGHTS}; to train from scratch again, delete {path}", flush=True)
    report(build_sam().to(DEVICE), images[TRAIN:], maps[TRAIN:], things[TRAIN:])  # as written


if __name__ == "__main__":
    script.run(main, globals())
