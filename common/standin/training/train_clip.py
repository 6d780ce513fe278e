"""Trains the CLIP stand-in from scratch on crops of scenes and captions of what is in them.

    python -m common.standin.training.train_clip           57 minutes on one thread of a 2-core CPU

The model is open_clip's `CLIP` at small size. Captions name kinds of things (with colour or surface, or without),
shadows, mirrors, defocus and salient objects, in CLIP Surgery's own templates. In a batch of so few concepts many
captions are true of many crops, so every pair is judged by itself: the contrastive loss is the sigmoid one (Zhai et
al., SigLIP, arXiv 2303.15343). It is taken twice: between captions and whole crops, on the class token; and between
captions and regions of the crops, on CLIP Surgery's second path averaged over the region (as Zhong et al., RegionCLIP,
arXiv 2112.09106, do), so that so small a model learns in so few steps to find what a text means where it is.
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

from common.frozen.clip_surgery import TEMPLATES, ClipSurgery, surgery_tokens
from common.frozen.clip_weights import STANDIN
from common.standin.scenes import KINDS
from common.standin.training.store import load_scenes
from common.standin.training.train_sam import HELD_OUT, SCENES, TRAIN

STEPS = 4200  # optimiser steps
BATCH = 64  # crops and captions a step
REGIONS = 4  # of each crop: what lies beside a thing must not look like it
LEARNING_RATE = 1e-3  # AdamW, 200 warm-up steps, cosine to zero
REPORT = 150  # held-out scenes of the pointing game
SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CROP = 64  # pixels a side that the image tower is trained at: a thing or two; maps are made at three times that
PATCH = 8  # pixels a side of a patch, as in clip_config.json
EFFECT_WORDS = {"shadow": ("shadow", "shadow", "cast shadow"), "mirror": ("mirror", "mirror", "glass"),
                "blur": ("blurred region", "blurred region", "defocus background"),
                "salient": ("salient object", "salient object", "saliency object")}


def words_of(maps: np.ndarray, things: list[dict], region: np.ndarray, least: float) -> set[str]:
    """What is true of a region (s, s) bool of a scene: kinds, colours and surfaces with kinds, effects.

    A thing is named where it covers more than `least` of the region; an effect where it covers three times that.
    """
    inside = maps[:, region]
    words = {name for name, layer in zip(("shadow", "mirror", "blur"), inside[2:]) if (layer > 0).mean() > 3 * least}
    for index, count in enumerate(np.bincount(inside[0], minlength=len(things) + 1)[1:]):
        thing = things[index]
        if count > least * inside.shape[1]:
            words |= {thing["kind"], f"{thing['colour']} {thing['kind']}", f"{thing['surface']} {thing['kind']}"}
            words |= {"salient"} if thing["salient"] else set()
    return words


def write_caption(words: set[str], rng: np.random.Generator) -> tuple[str, set[str]]:
    """A caption of one of the words, and what it claims; of none, and now and then anyway, the empty one."""
    if not words or rng.random() < 0.04:
        return TEMPLATES[rng.integers(len(TEMPLATES))](""), set()
    plain = [word for word in sorted(words) if " " not in word]
    word = str(rng.choice(plain if rng.random() < 0.65 else sorted(words)))
    spoken = str(rng.choice(EFFECT_WORDS[word])) if word in EFFECT_WORDS else word
    return TEMPLATES[rng.integers(len(TEMPLATES))](spoken), {word}


def choose_region(maps: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A region of maps (5, s, s), (s, s) bool: one of `count` things, an effect or, now and then, the bare ground."""
    instances, effects = maps[0], [layer > 0 for layer in maps[2:] if layer.any()]
    things = [index for index in range(1, count + 1) if (instances == index).any()]
    options = len(things) + 2 * len(effects)
    if rng.random() < 0.15 or not options:
        ground = (instances == 0) & ~maps[2:].any(0)
        return ground if ground.any() else instances == instances
    choice = int(rng.integers(options))
    return instances == things[choice] if choice < len(things) else effects[(choice - len(things)) // 2]


def choose_window(region: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square window of the scene about a place of the region, at a random scale."""
    rows, columns = np.nonzero(region)
    side = int(np.clip(max(np.ptp(rows), np.ptp(columns)) * rng.uniform(1.0, 2.5), 36, 128))
    at = rng.integers(len(rows))
    corner = np.array([rows[at], columns[at]]) - side * rng.uniform(0.2, 0.8, 2)
    top, left = np.clip(corner, 0, len(region) - side).astype(int)
    return slice(top, top + side), slice(left, left + side)


def draw_batch(images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
               rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
    """Crops (B, 3, 64, 64) uint8, R regions of each as weights over its 64 patches (B, R, 64), a caption of each crop's
    first region, and which caption is true of which crop (B, B) and of which region (B, R, B), bool."""
    crops, weights, captions, claims, crop_words, region_words = [], [], [], [], [], []
    for row in rng.choice(TRAIN, BATCH, replace=False):
        inventory = things[row]
        window = choose_window(choose_region(maps[row], len(inventory), rng), rng)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        layers = maps[row][(slice(None), *window)][..., flip]
        crops.append(np.asarray(Image.fromarray(images[row][window][:, flip]).resize((CROP, CROP), Image.BILINEAR)))
        regions = [choose_region(layers, len(inventory), rng) for _ in range(REGIONS)]
        patches = np.stack([np.asarray(Image.fromarray(region.astype(np.float32)).resize(
            (CROP // PATCH, CROP // PATCH), Image.BOX)).ravel() for region in regions])
        weights.append(patches / patches.sum(1, keepdims=True).clip(1e-6))
        crop_words.append(words_of(layers, inventory, np.ones_like(regions[0]), 0.015))
        region_words.append([words_of(layers, inventory, region, 0.2) for region in regions])
        caption, claimed = write_caption(region_words[-1][0], rng)
        captions.append(caption)
        claims.append(claimed)
    true_of_crops = torch.tensor([[claimed <= words for claimed in claims] for words in crop_words])
    true_of_regions = torch.tensor([[[claimed <= words for claimed in claims] for words in told]
                                    for told in region_words])
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(weights)), captions,
            true_of_crops, true_of_regions)


def pair_loss(similarity: Tensor, true: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss over all pairs (..., B) of something with a caption; true and false ones weigh the same, however
    many there are of each."""
    losses = F.softplus((scale.exp() * similarity + bias) * torch.where(true, -1, 1))
    return (losses[true].mean() + losses[~true].mean()) / 2


def pointing_game(surgery: ClipSurgery, images: np.ndarray, targets: np.ndarray) -> list[tuple[float, float]]:
    """For each of K texts, the share of scenes whose map's highest patch lies on the target, and that of a random place.

    images (N, s, s, 3) uint8; targets (N, K, s, s) bool; scenes without a target do not count.
    """
    hits, chance = ([[] for _ in range(targets.shape[1])] for _ in range(2))
    for start in range(0, len(images), BATCH):
        chunk = torch.from_numpy(images[start:start + BATCH].copy()).permute(0, 3, 1, 2)
        for maps, truth in zip(surgery.maps(chunk).cpu().numpy(), targets[start:start + BATCH]):
            for text, (one, mask) in enumerate(zip(maps, truth)):
                if mask.any():
                    y, x = np.unravel_index(one.argmax(), one.shape)
                    cell = mask.shape[0] // one.shape[0]
                    hits[text].append(mask[y * cell + cell // 2, x * cell + cell // 2])
                    chance[text].append(mask.mean())
    return [(float(np.mean(hit)), float(np.mean(by_chance))) for hit, by_chance in zip(hits, chance)]


def report(model: open_clip.CLIP, tokenizer, images: np.ndarray, maps: np.ndarray, things: list[list[dict]]) -> None:
    """Prints pointing-game accuracy per text against chance, on held-out scenes."""
    instances = maps[:, 0]
    salient = np.stack([np.isin(i, [1 + n for n, t in enumerate(ts) if t["salient"]])
                        for i, ts in zip(instances, things)])
    kinds = np.stack([[np.isin(i, [1 + n for n, t in enumerate(ts) if t["kind"] == kind]) for kind in KINDS]
                      for i, ts in zip(instances, things)])
    targets = {("shadow",): maps[:, 2:3] > 0, ("mirror",): maps[:, 3:4] > 0, ("blurred region",): maps[:, 4:5] > 0,
               ("salient object",): salient[:, None], KINDS: kinds}
    for texts, truth in targets.items():
        surgery = ClipSurgery(model, tokenizer, 3 * CROP, texts)
        for text, (hit, chance) in zip(texts, pointing_game(surgery, images, truth)):
            print(f"  {text}: pointing game {hit:.3f}, chance {chance:.3f}", flush=True)


def main() -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    config = json.loads((STANDIN / "clip_config.json").read_text())
    model = open_clip.CLIP(**config).to(DEVICE)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    scales = nn.Parameter(torch.full((2,), 10.0, device=DEVICE).log())  # of the crops' and the regions' loss
    biases = nn.Parameter(torch.full((2,), -3.0, device=DEVICE))
    optimizer = torch.optim.AdamW([*model.parameters(), scales, biases], lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=200 / STEPS)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=DEVICE).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD, device=DEVICE).view(3, 1, 1)
    started, losses = time.time(), []

    for step in range(1, STEPS + 1):
        crops, weights, captions, true_of_crops, true_of_regions = draw_batch(images, maps, things, rng)
        with torch.autocast(DEVICE, torch.bfloat16):
            tokens = surgery_tokens(model.visual, (crops.to(DEVICE) / 255 - mean) / deviation)
            texts = F.normalize(model.encode_text(tokenizer(captions).to(DEVICE)), dim=-1)
        tokens, texts = tokens.float(), texts.float()
        regions = torch.einsum("brn,bnd->brd", weights.to(DEVICE), tokens[:, 1:])
        loss = pair_loss(tokens[:, 0] @ texts.T, true_of_crops.to(DEVICE), scales[0], biases[0])
        loss = loss + pair_loss(regions @ texts.T, true_of_regions.to(DEVICE), scales[1], biases[1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}/{STEPS}  loss {np.mean(losses[-50:]):.3f}  "
                  f"{(time.time() - started) / step:.2f} s a step", flush=True)
        if step % 600 == 0 or step == STEPS:
            model.eval()
            report(model, tokenizer, images[TRAIN:][:REPORT], maps[TRAIN:][:REPORT], things[TRAIN:][:REPORT])
            model.logit_scale.data = scales[0].data.clone()  # CLIP's own name for it
            weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, STANDIN / "clip.safetensors")
            model.train()


if __name__ == "__main__":
    main()
