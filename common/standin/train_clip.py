"""Trains the CLIP stand-in from scratch on crops of scenes and captions of what is in them.

    python -m common.standin.train_clip           about 40 minutes on 2 CPU cores, a few minutes on a GPU

The model is open_clip's `CLIP` at small size. Captions name kinds of things (with colour or surface, or without),
shadows, mirrors, defocus and salient objects, in CLIP Surgery's own templates. In a batch of so few concepts many
captions are true of many crops, so every pair is judged by itself: the contrastive loss is the sigmoid one (Zhai et al.,
SigLIP, arXiv 2303.15343). It is taken twice: on the class token, and on CLIP Surgery's second path pooled over the
patches, so that what a text means is found where it is. No pixel labels are used: only which words are true of a crop.
"""

import json
import time

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip_surgery import STANDIN, TEMPLATES, ClipSurgery, surgery_tokens
from common.standin.scenes import KINDS
from common.standin.store import load_scenes
from common.standin.train_sam import HELD_OUT, SCENES, TRAIN

STEPS = 2400  # optimiser steps
BATCH = 64  # crops and captions a step
LEARNING_RATE = 1e-3  # AdamW, 200 warm-up steps, cosine to zero
REPORT = 150  # held-out scenes of the pointing game
SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CROP = 64  # pixels a side that the image tower is trained at: a thing or two; maps are made at three times that
EFFECT_WORDS = {"shadow": ("shadow", "shadow", "cast shadow"), "mirror": ("mirror", "mirror", "glass"),
                "blur": ("blurred region", "blurred region", "defocus background"),
                "salient": ("salient object", "salient object", "saliency object")}


def inventory(maps: np.ndarray, things: list[dict]) -> set[str]:
    """What is true of a crop, as words: kinds, colours and surfaces with kinds, effects; from its maps (5, s, s)."""
    instances, _, shadow, mirror, blur = maps
    area = instances.size
    words = {name for name, layer, least in (("shadow", shadow, 0.02), ("mirror", mirror, 0.04), ("blur", blur, 0.08))
             if (layer > 0).mean() > least}
    for index, count in enumerate(np.bincount(instances.ravel(), minlength=len(things) + 1)[1:]):
        thing = things[index]
        if count > 0.012 * area:
            words |= {thing["kind"], f"{thing['colour']} {thing['kind']}", f"{thing['surface']} {thing['kind']}"}
            words |= {"salient"} if thing["salient"] else set()
    return words


def write_caption(words: set[str], focus: str, rng: np.random.Generator) -> tuple[str, set[str]]:
    """A caption of one or two of the words, and which words it claims; now and then the empty one, true of all."""
    if not words or rng.random() < 0.04:
        return TEMPLATES[rng.integers(len(TEMPLATES))](""), set()
    about = [word for word in sorted(words) if word == focus or word.endswith(f" {focus}")]
    names = about if about and rng.random() < 0.75 else sorted(words)
    plain = [word for word in names if " " not in word]
    names = plain if plain and rng.random() < 0.65 else names
    claimed = set(rng.choice(names, min(len(names), 1 + int(rng.random() < 0.15)), replace=False).tolist())
    spoken = [str(rng.choice(EFFECT_WORDS[word])) if word in EFFECT_WORDS else word for word in sorted(claimed)]
    return TEMPLATES[rng.integers(len(TEMPLATES))](" and a ".join(spoken)), claimed


def choose_window(maps: np.ndarray, things: list[dict], rng: np.random.Generator) -> tuple[tuple[slice, slice], str]:
    """A square window of the scene, mostly about one thing or effect in it, and what it is about ("" if anything)."""
    instances, _, shadow, mirror, blur = maps
    size, side, focus = len(instances), int(rng.integers(40, 129)), ""
    centre = rng.uniform(0, size, 2)
    regions = [(thing["kind"], instances == i + 1) for i, thing in enumerate(things)]
    regions += [(name, layer > 0) for name, layer in (("shadow", shadow), ("mirror", mirror), ("blur", blur)) if layer.any()] * 2
    if regions and rng.random() < 0.7:
        focus, region = regions[rng.integers(len(regions))]
        rows, columns = np.nonzero(region)
        if len(rows):
            if focus in EFFECT_WORDS:
                at = rng.integers(len(rows))
                centre = np.array([rows[at], columns[at]])
            else:
                side = int(np.clip(max(np.ptp(rows), np.ptp(columns)) * rng.uniform(1.2, 2.5), 32, 128))
                centre = np.array([rows.mean(), columns.mean()]) + rng.normal(0, 0.12 * side, 2)
    top, left = np.clip(centre - side / 2, 0, size - side).astype(int)
    return (slice(top, top + side), slice(left, left + side)), focus


def draw_batch(images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
               rng: np.random.Generator) -> tuple[Tensor, list[str], Tensor]:
    """Crops (B, 3, 64, 64) uint8, captions, and which caption is true of which crop (B, B) bool."""
    crops, captions, claims, truths = [], [], [], []
    for row in rng.choice(TRAIN, BATCH, replace=False):
        window, focus = choose_window(maps[row], things[row], rng)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        crop = Image.fromarray(images[row][window][:, flip]).resize((CROP, CROP), Image.BILINEAR)
        crops.append(np.asarray(crop))
        truths.append(inventory(maps[row][(slice(None), *window)], things[row]))
        caption, claimed = write_caption(truths[-1], focus, rng)
        captions.append(caption)
        claims.append(claimed)
    true = np.array([[claimed <= words for claimed in claims] for words in truths])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), captions, torch.from_numpy(true)


def pair_loss(similarity: Tensor, true: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss over all (B, B) pairs; true and false ones weigh the same, however many there are of each."""
    losses = F.softplus((scale.exp() * similarity + bias) * torch.where(true, -1, 1))
    return (losses[true].mean() + losses[~true].mean()) / 2


def pointing_game(surgery: ClipSurgery, images: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Share of scenes whose map's highest patch lies on the target, and the same for a random place.

    images (N, s, s, 3) uint8; targets (N, K, s, s) bool, one per text; scenes without a target do not count.
    """
    hits, chance = [], []
    for start in range(0, len(images), BATCH):
        chunk = torch.from_numpy(images[start:start + BATCH].copy()).permute(0, 3, 1, 2)
        for maps, truth in zip(surgery.maps(chunk).cpu().numpy(), targets[start:start + BATCH]):
            for one, mask in zip(maps, truth):
                if mask.any():
                    y, x = np.unravel_index(one.argmax(), one.shape)
                    cell = mask.shape[0] // one.shape[0]
                    hits.append(mask[y * cell + cell // 2, x * cell + cell // 2])
                    chance.append(mask.mean())
    return float(np.mean(hits)), float(np.mean(chance))


def report(model: open_clip.CLIP, tokenizer, images: np.ndarray, maps: np.ndarray, things: list[list[dict]]) -> None:
    """Prints pointing-game accuracy per text against chance, on held-out scenes."""
    instances = maps[:, 0]
    salient = np.stack([np.isin(i, [1 + n for n, t in enumerate(ts) if t["salient"]]) for i, ts in zip(instances, things)])
    kinds = np.stack([[np.isin(i, [1 + n for n, t in enumerate(ts) if t["kind"] == kind]) for kind in KINDS]
                      for i, ts in zip(instances, things)])
    targets = {("shadow",): maps[:, 2:3] > 0, ("mirror",): maps[:, 3:4] > 0, ("blurred region",): maps[:, 4:5] > 0,
               ("salient object",): salient[:, None], KINDS: kinds}
    for texts, truth in targets.items():
        surgery = ClipSurgery(model, tokenizer, 3 * CROP, texts)
        hit, chance = pointing_game(surgery, images, truth)
        print(f"  {', '.join(texts)}: pointing game {hit:.3f}, chance {chance:.3f}", flush=True)


def main() -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    config = json.loads((STANDIN / "clip_config.json").read_text())
    model = open_clip.CLIP(**config).to(DEVICE)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    scales = nn.Parameter(torch.full((2,), 10.0, device=DEVICE).log())  # of the class token's and the patches' loss
    biases = nn.Parameter(torch.full((2,), -3.0, device=DEVICE))
    optimizer = torch.optim.AdamW([*model.parameters(), scales, biases], lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=200 / STEPS)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=DEVICE).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD, device=DEVICE).view(3, 1, 1)
    started, losses = time.time(), []

    for step in range(1, STEPS + 1):
        crops, captions, true = draw_batch(images, maps, things, rng)
        true = true.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            tokens = surgery_tokens(model.visual, (crops.to(DEVICE) / 255 - mean) / deviation)
            texts = F.normalize(model.encode_text(tokenizer(captions).to(DEVICE)), dim=-1)
        tokens, texts = tokens.float(), texts.float()
        patches = torch.einsum("ind,td->itn", tokens[:, 1:], texts)
        pooled = torch.logsumexp(20 * patches, 2) / 20 - np.log(patches.shape[2]) / 20  # a soft maximum over patches
        loss = pair_loss(tokens[:, 0] @ texts.T, true, scales[0], biases[0])
        loss = loss + pair_loss(pooled, true, scales[1], biases[1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}/{STEPS}  loss {np.mean(losses[-50:]):.3f}  {(time.time() - started) / step:.2f} s a step",
                  flush=True)
        if step % 600 == 0 or step == STEPS:
            model.eval()
            report(model, tokenizer, images[TRAIN:][:REPORT], maps[TRAIN:][:REPORT], things[TRAIN:][:REPORT])
            model.logit_scale.data = scales[0].data.clone()  # CLIP's own name for it
            weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, STANDIN / "clip.safetensors")
            model.train()


if __name__ == "__main__":
    main()
