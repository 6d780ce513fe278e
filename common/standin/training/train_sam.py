"""Trains the SAM stand-in from scratch, as SAM was trained: clicks, then clicks on the errors.

    python -m common.standin.training.train_sam

This takes 50 minutes on both threads of a 2-core CPU.

Each step embeds a batch of scenes, asks for two targets in each scene and decodes three times:
after the first prompt (one click, a positive and a negative one, or a click and a box), after a few
corrective clicks, and after up to 17 points in all. Corrective clicks are drawn from the error
region, or from the 10 x 10 patch centres among which AlignSAM's agent chooses.

Targets are single things, unions of several or of all of one kind (so that prompts can collect
disjoint parts), shadows, mirrors and defocused regions. None has a name. Neither the scenes of the
demo tasks nor the names of their targets are used.

Clicks alone teach edges, but no kinds of things. SAM's encoder therefore starts from masked
pretraining; here a linear head on the embedding learns facts about each place (auxiliary.py), at
first alone and then together with the clicks.
"""

import common.runtime.first  # noqa: F401  before torch

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy import ndimage
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from common.standin.model import IMAGE_SIZE, STRIDE, WEIGHTS, WIDTH, new_sam
from common.standin.training import auxiliary
from common.standin.training.store import load_scenes

SCENES = Path("data/standin")  # where the training scenes are kept
TRAIN, HELD_OUT = 8000, 400  # scenes
PRETRAINING = 1500  # optimiser steps of the encoder alone, on the auxiliary task
STEPS = 5000  # optimiser steps with clicks
BATCH = 16  # scenes a step
AUXILIARY = 0.3  # weight of the auxiliary loss; the loss of the clicks has weight 1
TARGETS = 2  # targets in each scene; they share one run of the encoder
PRETRAINING_RATE, LEARNING_RATE = 2e-3, 6e-4  # of AdamW: a short warm-up, then cosine to zero
SHARES = {  # how often each sort of target is drawn
    "thing": 0.36, "kind": 0.16, "union": 0.16, "shadow": 0.14, "mirror": 0.1, "blur": 0.08,
}
SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = IMAGE_SIZE // 2  # side of the decoder's low-resolution masks; targets have this size too
LEAST_TARGET, GREATEST_TARGET = 12, 0.8  # low-resolution pixels; share of the scene
PATCHES = 10  # a side, as many as AlignSAM's agent has


def decode(sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor,
           boxes: Tensor | None = None, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All four masks of B different images, with gradients.

    It is MaskDecoder.predict_masks without repeat_interleave, which is for one image with many
    prompts. embeddings: (B, C, g, g). points: (B, N, 2) in input pixels. labels: (B, N). boxes:
    (B, 4). masks: (B, 1, 96, 96). Returns logits (B, 4, 96, 96) and predicted IoUs (B, 4).
    """
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder((points, labels), boxes, masks)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(embeddings), -1, -1), sparse], dim=1)
    positions = sam.prompt_encoder.get_dense_pe().expand_as(dense)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=sam.training):
        queries, keys = decoder.transformer(embeddings + dense, positions, tokens)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(embeddings.shape))
        hyper_in = [mlp(queries[:, 1 + i])
                    for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        hyper_in = torch.stack(hyper_in, 1)
        quality = decoder.iou_prediction_head(queries[:, 0])
    logits = torch.einsum("bkc,bchw->bkhw", hyper_in.float(), upscaled.float())
    return logits, quality.float()


def draw_target(maps: np.ndarray, things: list[dict],
                rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One target of a scene, (96, 96) bool, and its sort, which is for reports only.

    maps: (5, s, s), as from `load_scenes`. The sort is a key of SHARES, or "background" where
    20 attempts give no target of a useful size.
    """
    instances, _, shadow, mirror, blur = maps[:, ::2, ::2]
    for _ in range(20):
        sort = str(rng.choice(list(SHARES), p=list(SHARES.values())))
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
        if LEAST_TARGET <= target.sum() <= GREATEST_TARGET * target.size:
            return target, sort
    return instances == 0, "background"


def clicks_in(region: Tensor, count: int) -> Tensor:
    """`count` places drawn uniformly from each region (B, 96, 96) bool.

    Returns (B, count, 2), as (x, y) in input pixels.
    """
    weights = region.flatten(1).float() + 1e-9
    pixels = torch.multinomial(weights, count, replacement=True)
    return (torch.stack([pixels % LOW, pixels // LOW], 2) + 0.5) * (IMAGE_SIZE / LOW)


def label_of(points: Tensor, targets: Tensor) -> Tensor:
    """1 where the target (B, 96, 96) lies under the point (B, N, 2), else 0; (B, N) int64."""
    column, row = (points * (LOW / IMAGE_SIZE)).long().clamp(0, LOW - 1).unbind(2)
    image = torch.arange(len(points), device=points.device)[:, None]
    return targets[image, row, column].long()


def boxes_around(targets: Tensor) -> Tensor:
    """The bounding boxes of targets (B, 96, 96) bool with some noise: x0, y0, x1, y1, (B, 4)."""
    rows_hit, columns_hit = targets.any(2).float(), targets.any(1).float()
    first = torch.stack([columns_hit.argmax(1), rows_hit.argmax(1)], 1)
    from_end = torch.stack([columns_hit.flip(1).argmax(1), rows_hit.flip(1).argmax(1)], 1)
    boxes = torch.cat([first, LOW - from_end], 1).float() * (IMAGE_SIZE / LOW)
    return boxes + torch.randn_like(boxes) * 3


def first_prompt(targets: Tensor,
                 rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """One click on the target, a click on it and one beside it, or a click and a box.

    targets: (B, 96, 96) bool. Returns points (B, N, 2), labels (B, N) and boxes (B, 4) or None.
    """
    points = clicks_in(targets, 1)
    style = rng.choice(("click", "pair", "box"), p=(0.45, 0.4, 0.15))
    if style == "pair":
        points = torch.cat([points, clicks_in(~targets, 1)], 1)
    boxes = boxes_around(targets) if style == "box" else None
    return points, label_of(points, targets), boxes


def corrections(logits: Tensor, targets: Tensor, count: int,
                rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` further clicks, each with its true label, for logits and targets (B, 96, 96).

    They lie in the error region, or on patch centres. Returns points (B, count, 2) and labels
    (B, count).
    """
    if rng.random() < 0.5:
        error = (logits > 0) != targets
        has_error = error.flatten(1).any(1)[:, None, None]
        points = clicks_in(torch.where(has_error, error, targets), count)
    else:  # half of the time mostly on the target, as a trained agent chooses them
        cells = torch.arange(PATCHES, device=targets.device).add(0.5) * (IMAGE_SIZE / PATCHES)
        centres = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), 2).flatten(0, 1)
        on_target = label_of(centres.expand(len(targets), -1, -1), targets).float()
        preference = float(rng.random() < 0.5)
        patches = torch.multinomial(0.05 + on_target * preference, count)
        points = centres[patches]
    return points, label_of(points, targets)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """SAM's loss, 20 focal + 1 Dice, of each mask.

    logits: (B, K, 96, 96). targets: (B, 96, 96) bool. Returns (B, K). The focal loss has no class
    weights: with them, so short a training ends in empty masks.
    """
    truth = targets[:, None].expand(logits.shape).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missed = (1 - probability) * truth + probability * (1 - truth)
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
    """Squared error of the predicted IoUs (B, K) of masks (B, K, 96, 96), a scalar."""
    true_iou = iou(logits.detach(), targets[:, None].expand(logits.shape))
    return F.mse_loss(quality, true_iou)


def click_loss(sam: Sam, embeddings: Tensor, targets: Tensor,
               rng: np.random.Generator) -> tuple[Tensor, float]:
    """SAM's loss of three prompts in a row, and the mean IoU after the last.

    embeddings: (B, C, g, g). targets: (B, 96, 96) bool. The single-mask token learns from every
    prompt. The other three tokens learn from the first one, and only the best of them.
    """
    points, labels, boxes = first_prompt(targets, rng)
    more_clicks = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    logits, quality = decode(sam, embeddings, points, labels, boxes)
    losses = mask_loss(logits, targets)
    best_of_three = losses[:, 1:].min(1).values.mean()
    loss = losses[:, 0].mean() + 0.5 * best_of_three + quality_loss(quality, logits, targets)

    for count in more_clicks:
        new_points, new_labels = corrections(logits[:, 0].detach(), targets, count, rng)
        points, labels = torch.cat([points, new_points], 1), torch.cat([labels, new_labels], 1)
        last_mask = logits[:, :1].detach() if rng.random() < 0.25 else None
        boxes = boxes if rng.random() < 0.5 else None
        logits, quality = decode(sam, embeddings, points, labels, boxes, last_mask)
        single_mask_loss = mask_loss(logits, targets)[:, 0].mean()
        loss = loss + single_mask_loss + quality_loss(quality, logits, targets)
    return loss, iou(logits[:, 0].detach(), targets).mean().item()


def next_click(found: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The most interior pixel of the largest error, (x, y) in input pixels.

    found, target: (96, 96) bool. If there is no error, it is that of the target.
    """
    parts, count = ndimage.label(found != target)
    if count:
        largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
        region = parts == largest
    else:
        region = target
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return (x + 0.5) * (IMAGE_SIZE / LOW), (y + 0.5) * (IMAGE_SIZE / LOW)


@torch.no_grad()
def corrective_clicks(sam: Sam, images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
                      clicks: int) -> tuple[Tensor, list[str]]:
    """The standard protocol: each click goes to the middle of the largest error.

    images: (N, s, s, 3). maps: (N, 5, s, s). One target is drawn for each scene. Returns the IoU
    after each click, (N, clicks), and the sort of each target.
    """
    rng = np.random.default_rng(1)
    scores, sorts = [], []
    for start in range(0, len(images), BATCH):
        chunk = slice(start, start + BATCH)
        drawn = [draw_target(scene_maps, inventory, rng)
                 for scene_maps, inventory in zip(maps[chunk], things[chunk])]
        targets = torch.from_numpy(np.stack([target for target, _ in drawn]))
        sorts += [sort for _, sort in drawn]
        pictures = to_pictures(images[chunk]).to(sam.device)
        embeddings = sam.image_encoder(sam.preprocess(pictures)).float()

        found = torch.zeros_like(targets)
        points = torch.zeros(len(targets), 0, 2)
        ious = []
        for _ in range(clicks):
            places = [next_click(mask, target)
                      for mask, target in zip(found.numpy(), targets.numpy())]
            points = torch.cat([points, torch.tensor(places, dtype=torch.float32)[:, None]], 1)
            labels = label_of(points, targets)
            logits, _ = decode(sam, embeddings, points.to(sam.device), labels.to(sam.device))
            single_mask = logits[:, 0].cpu()
            found = single_mask > 0
            ious.append(iou(single_mask, targets))
        scores.append(torch.stack(ious, 1))
    return torch.cat(scores), sorts


def to_pictures(images: np.ndarray) -> Tensor:
    """Images (B, s, s, 3) uint8 to (B, 3, s, s) float in 0..255."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()


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


def main() -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    shapes = auxiliary.shapes_of_scenes(maps[:TRAIN, 0])
    sam = new_sam().to(DEVICE)
    init_cross_attention(sam)
    sam.image_encoder.to(memory_format=torch.channels_last)
    head = nn.Conv2d(WIDTH, auxiliary.CHANNELS, 1).to(DEVICE)
    parameters = [*sam.parameters(), *head.parameters()]
    started, ious = time.time(), []

    for step in range(1, PRETRAINING + STEPS + 1):
        with_clicks = step > PRETRAINING
        if step in (1, PRETRAINING + 1):  # each of the two phases has its own schedule
            rate, steps = (LEARNING_RATE, STEPS) if with_clicks else (PRETRAINING_RATE, PRETRAINING)
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.07)

        # a batch of scenes
        rows = np.sort(rng.choice(TRAIN, BATCH, replace=False))
        batch = flip_at_random(images[rows], maps[rows], shapes[rows], rng)
        batch_images, batch_maps, batch_shapes = batch

        # embed it once, and ask for facts about each cell
        pictures = to_pictures(batch_images).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            inputs = sam.preprocess(pictures).contiguous(memory_format=torch.channels_last)
            embeddings = sam.image_encoder(inputs)
        embeddings = embeddings.float().contiguous()
        at_centres = batch_maps[:, :2, STRIDE // 2::STRIDE, STRIDE // 2::STRIDE].copy()
        instances, surfaces = torch.from_numpy(at_centres).long().to(DEVICE).unbind(1)
        loss = auxiliary.loss(head(embeddings), pictures, instances, surfaces,
                              torch.from_numpy(batch_shapes).to(DEVICE))

        # ask for targets by clicks
        if with_clicks:
            targets = []
            for _ in range(TARGETS):
                for scene_maps, row in zip(batch_maps, rows):
                    target, _ = draw_target(scene_maps, things[row], rng)
                    targets.append(target)
            targets = torch.from_numpy(np.stack(targets)).to(DEVICE)
            clicks, last_iou = click_loss(sam, embeddings.repeat(TARGETS, 1, 1, 1), targets, rng)
            loss = AUXILIARY * loss + clicks
            ious.append(last_iou)

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            reached = f"  IoU at the last prompt {np.mean(ious[-50:]):.3f}" if ious else ""
            print(f"step {step}/{PRETRAINING + STEPS}  loss {loss.item():.3f}{reached}  "
                  f"{(time.time() - started) / step:.2f} s a step", flush=True)
        is_last = step == PRETRAINING + STEPS
        if with_clicks and ((step - PRETRAINING) % 1000 == 0 or is_last):
            sam.eval()
            report(sam, images[TRAIN:], maps[TRAIN:], things[TRAIN:])
            weights = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
            save_file(weights, WEIGHTS)
            sam.train()


if __name__ == "__main__":
    main()
