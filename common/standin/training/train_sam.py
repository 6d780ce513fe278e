"""Trains the SAM stand-in from scratch, the way SAM was trained: clicks, then clicks where the mask is wrong.

    python -m common.standin.training.train_sam            50 minutes on both threads of a 2-core CPU

Each step embeds a batch of scenes, asks for two targets a scene and decodes three times: after the first prompt (one
click, a positive and a negative one, or a box), after a few corrective clicks, and after up to 17 points in all, drawn
from the error region and from the 10 x 10 patch centres that AlignSAM's agent chooses among. Targets are single things,
unions of several or of all of one kind (prompting must be able to collect disjoint parts), shadows, mirrors and
defocused regions, without names. Before that, and beside it, a linear head on the embedding learns nameless facts about
each place (auxiliary.py), as SAM's encoder starts from masked pretraining: clicks alone teach edges, but no kinds of
things. Neither the demo tasks' scenes nor the names of their targets are used.
"""

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
PRETRAINING = 1500  # optimiser steps of the encoder alone, on the auxiliary head
STEPS = 5000  # optimiser steps with clicks
BATCH = 16  # scenes a step
AUXILIARY = 0.3  # weight of the auxiliary head beside clicks
TARGETS = 2  # targets a scene: the encoder's work is shared
PRETRAINING_RATE, LEARNING_RATE = 2e-3, 6e-4  # AdamW, a short warm-up, cosine to zero
SHARES = {"thing": 0.36, "kind": 0.16, "union": 0.16, "shadow": 0.14, "mirror": 0.1, "blur": 0.08}  # of the targets
SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = IMAGE_SIZE // 2  # side of the decoder's low-resolution masks, at which targets and clicks live


def decode(sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor, boxes: Tensor | None = None,
           masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All four masks (B, 4, 96, 96) and predicted IoUs (B, 4) for B different images, with gradients.

    MaskDecoder.predict_masks without its repeat_interleave, which is for one image with many prompts.
    """
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder((points, labels), boxes, masks)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(embeddings), -1, -1), sparse], dim=1)
    positions = sam.prompt_encoder.get_dense_pe().expand_as(dense)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=sam.training):
        hs, src = decoder.transformer(embeddings + dense, positions, tokens)
        fine = decoder.output_upscaling(src.transpose(1, 2).reshape(embeddings.shape))
        weights = torch.stack([mlp(hs[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
        quality = decoder.iou_prediction_head(hs[:, 0])
    return torch.einsum("bkc,bchw->bkhw", weights.float(), fine.float()), quality.float()


def draw_target(maps: np.ndarray, things: list[dict], rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One nameless target of a scene, (96, 96) bool, covering at least 12 of its low-resolution pixels; and its share.

    The share (see `SHARES`) is for reports only.
    """
    instances, _, shadow, mirror, blur = maps[:, ::2, ::2]
    for _ in range(20):
        what = rng.choice(list(SHARES), p=list(SHARES.values()))
        if what == "shadow":
            target = shadow > 0
            if rng.random() < 0.5 and target.any():  # one connected part of it
                parts, count = ndimage.label(target)
                target = parts == rng.integers(1, count + 1)
        elif what in ("mirror", "blur"):
            target = {"mirror": mirror, "blur": blur}[what] > 0
        elif not things:
            continue
        elif what == "kind":
            kind = rng.choice(things)["kind"]
            target = np.isin(instances, [i + 1 for i, thing in enumerate(things) if thing["kind"] == kind])
        else:
            count = 1 if what == "thing" else min(len(things), int(rng.integers(2, 5)))
            target = np.isin(instances, rng.choice(len(things), count, replace=False) + 1)
        if 12 <= target.sum() <= 0.8 * target.size:
            return target, what
    return instances == 0, "background"


def clicks_in(region: Tensor, count: int) -> Tensor:
    """(B, count, 2) points (x, y) in input pixels, drawn uniformly from each region (B, 96, 96) bool."""
    weights = region.flatten(1).float() + 1e-9
    chosen = torch.multinomial(weights, count, replacement=True)
    return (torch.stack([chosen % LOW, chosen // LOW], 2) + 0.5) * (IMAGE_SIZE / LOW)


def label_of(points: Tensor, targets: Tensor) -> Tensor:
    """(B, N) int: 1 where the target (B, 96, 96) lies under the point."""
    column, row = (points * (LOW / IMAGE_SIZE)).long().clamp(0, LOW - 1).unbind(2)
    return targets[torch.arange(len(points), device=points.device)[:, None], row, column].long()


def corrections(logits: Tensor, targets: Tensor, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` further clicks: from the error region, or any patch centres, each with its true label."""
    if rng.random() < 0.5:
        error = (logits > 0) != targets
        points = clicks_in(torch.where(error.flatten(1).any(1)[:, None, None], error, targets), count)
    else:  # patch centres, half of the time mostly on the target, as a trained agent chooses them
        cells = torch.arange(10, device=targets.device).add(0.5) * (IMAGE_SIZE / 10)
        centres = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), 2).flatten(0, 1)
        on_target = label_of(centres.expand(len(targets), -1, -1), targets).float()
        chosen = torch.multinomial(0.05 + on_target * float(rng.random() < 0.5), count)
        points = centres[chosen]
    return points, label_of(points, targets)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """SAM's 20 focal + 1 Dice for masks (B, K, 96, 96) against targets (B, 96, 96); (B, K)."""
    truth = targets[:, None].expand(logits.shape).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missed = (1 - probability) * truth + probability * (1 - truth)
    focal = (missed ** 2 * entropy).mean((2, 3))  # unweighted: weighted, so short a training ends in empty masks
    dice = 1 - (2 * (probability * truth).sum((2, 3)) + 1) / (probability.sum((2, 3)) + truth.sum((2, 3)) + 1)
    return 20 * focal + dice


def iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of logits (B, ..., h, w) > 0 with targets of the same shape, (B, ...)."""
    found = logits > 0
    return (found & targets).sum((-2, -1)) / (found | targets).sum((-2, -1)).clamp(min=1)


@torch.no_grad()
def corrective_clicks(sam: Sam, images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
                      clicks: int) -> tuple[Tensor, list[str]]:
    """IoU (targets, clicks) after each click of the standard protocol, the most interior pixel of the largest error;
    and each target's share."""
    rng, scores, shares = np.random.default_rng(1), [], []
    for start in range(0, len(images), BATCH):
        chunk = slice(start, start + BATCH)
        drawn, share = zip(*(draw_target(m, t, rng) for m, t in zip(maps[chunk], things[chunk])))
        targets = torch.from_numpy(np.stack(drawn))
        shares += share
        pictures = torch.from_numpy(images[chunk].copy()).permute(0, 3, 1, 2).float().to(sam.device)
        embeddings = sam.image_encoder(sam.preprocess(pictures)).float()
        found, points, row = torch.zeros_like(targets), [], []
        for _ in range(clicks):
            places = []
            for mask, target in zip(found.numpy(), targets.numpy()):
                parts, count = ndimage.label(mask != target)
                part = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else target
                inside = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
                y, x = np.unravel_index(inside.argmax(), inside.shape)
                places.append([(x + 0.5) * 2, (y + 0.5) * 2])
            points.append(torch.tensor(places, dtype=torch.float32))
            at = torch.stack(points, 1)
            logits, _ = decode(sam, embeddings, at.to(sam.device), label_of(at, targets).to(sam.device))
            found = (logits[:, 0] > 0).cpu()
            row.append(iou(logits[:, 0].cpu(), targets))
        scores.append(torch.stack(row, 1))
    return torch.cat(scores), shares


def look_where_you_are(sam: Sam) -> None:
    """Starts every cross-attention with equal query and key projections, widened.

    A prompt's token and the image under it carry the same positional code, so a token attends to its own place from the
    first step. From independent projections that alone takes over a thousand steps to be found.
    """
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        attention.q_proj.weight.data *= 2.5
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())


def click_loss(sam: Sam, embeddings: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
    """SAM's loss of three prompts in a row for targets (B, 96, 96) bool in embeddings (B, C, g, g); the last IoU."""
    # first prompt: one click, one of each label, or a box; SAM's best of three masks counts for a single click
    loss, points, boxes, previous = 0, clicks_in(targets, 1), None, None
    style = rng.choice(("click", "pair", "box"), p=(0.45, 0.4, 0.15))
    if style == "pair":
        points = torch.cat([points, clicks_in(~targets, 1)], 1)
    labels = label_of(points, targets)
    if style == "box":
        rows_hit, columns_hit = targets.any(2).float(), targets.any(1).float()
        first = torch.stack([columns_hit.argmax(1), rows_hit.argmax(1)], 1)
        last = LOW - torch.stack([columns_hit.flip(1).argmax(1), rows_hit.flip(1).argmax(1)], 1)
        boxes = torch.cat([first, last], 1).float() * (IMAGE_SIZE / LOW)
        boxes = boxes + torch.randn_like(boxes) * 3
    for extra in (0, int(rng.integers(1, 5)), int(rng.integers(1, 12))):
        if extra:
            more, more_labels = corrections(logits[:, 0].detach(), targets, extra, rng)
            points, labels = torch.cat([points, more], 1), torch.cat([labels, more_labels], 1)
            previous = logits[:, :1].detach() if rng.random() < 0.25 else None
            boxes = boxes if rng.random() < 0.5 else None
        logits, quality = decode(sam, embeddings, points, labels, boxes, previous)
        losses = mask_loss(logits, targets)
        loss = loss + losses[:, 0].mean() + (0 if extra else 0.5 * losses[:, 1:].min(1).values.mean())
        loss = loss + F.mse_loss(quality, iou(logits.detach(), targets[:, None].expand(logits.shape)))
    return loss, iou(logits[:, 0].detach(), targets).mean().item()


def main() -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    shapes = auxiliary.shapes_of_scenes(maps[:TRAIN, 0])
    sam = new_sam().to(DEVICE)
    look_where_you_are(sam)
    sam.image_encoder.to(memory_format=torch.channels_last)
    head = nn.Conv2d(WIDTH, auxiliary.CHANNELS, 1).to(DEVICE)
    parameters = [*sam.parameters(), *head.parameters()]
    started, ious = time.time(), []

    for step in range(1, PRETRAINING + STEPS + 1):
        if step in (1, PRETRAINING + 1):  # the encoder alone, then all of it
            rate, steps = (PRETRAINING_RATE, PRETRAINING) if step == 1 else (LEARNING_RATE, STEPS)
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.07)

        # scenes, flipped at random
        rows = np.sort(rng.choice(TRAIN, BATCH, replace=False))
        picture, layers, outlines = images[rows], maps[rows], shapes[rows]
        if rng.random() < 0.5:
            picture, layers, outlines[..., 0] = picture[:, :, ::-1], layers[..., ::-1], 1 - outlines[..., 0]
        if rng.random() < 0.5:
            picture, layers, outlines[..., 1] = picture[:, ::-1], layers[..., ::-1, :], 1 - outlines[..., 1]

        # embed once, check what the embedding knows
        picture = torch.from_numpy(picture.copy()).permute(0, 3, 1, 2).float().to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            embeddings = sam.image_encoder(sam.preprocess(picture).contiguous(memory_format=torch.channels_last))
        embeddings = embeddings.float().contiguous()
        centres = layers[:, :2, STRIDE // 2::STRIDE, STRIDE // 2::STRIDE].copy()
        instances, surfaces = torch.from_numpy(centres).long().to(DEVICE).unbind(1)
        loss = auxiliary.loss(head(embeddings), picture, instances, surfaces, torch.from_numpy(outlines).to(DEVICE))

        # ask for targets, click, correct
        if step > PRETRAINING:
            targets = np.stack([draw_target(layers[i], things[row], rng)[0]
                                for _ in range(TARGETS) for i, row in enumerate(rows)])
            clicks, last = click_loss(sam, embeddings.repeat(TARGETS, 1, 1, 1), torch.from_numpy(targets).to(DEVICE),
                                      rng)
            loss = AUXILIARY * loss + clicks
            ious.append(last)

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            reached = f"  IoU at the last prompt {np.mean(ious[-50:]):.3f}" if ious else ""
            print(f"step {step}/{PRETRAINING + STEPS}  loss {loss.item():.3f}{reached}  "
                  f"{(time.time() - started) / step:.2f} s a step", flush=True)
        if step > PRETRAINING and ((step - PRETRAINING) % 1000 == 0 or step == PRETRAINING + STEPS):
            sam.eval()
            curves, shares = corrective_clicks(sam, images[TRAIN:], maps[TRAIN:], things[TRAIN:], 9)
            of = {share: torch.tensor([one == share for one in shares]) for share in sorted(set(shares))}
            for share, chosen in {"all targets": slice(None), **of}.items():
                print(f"held-out IoU after clicks 1 to 9, {share}: "
                      + " ".join(f"{value:.3f}" for value in curves[chosen].mean(0)), flush=True)
            save_file({name: value.half().contiguous() for name, value in sam.state_dict().items()}, WEIGHTS)
            sam.train()


if __name__ == "__main__":
    main()
