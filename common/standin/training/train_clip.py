"""Trains the CLIP stand-in from scratch on crops of scenes and captions of what is in them.

    python -m common.standin.training.train_clip

We estimate an hour on one thread of a 2-core CPU, and an hour and a half on both threads of one
without AVX-512. It uses the scenes of train_sam.py. A stopped training goes on from its last save.

The model is open_clip's `CLIP` at a small size. Captions name kinds of things (alone, or with a
colour or surface), shadows, mirrors, defocus and salient objects, in CLIP Surgery's own templates.

With so few concepts, many captions in a batch are true of many crops. So every pair of a crop and a
caption is judged by itself, with the sigmoid loss (Zhai et al., SigLIP, arXiv 2303.15343), and
captions compete for each crop with CLIP's softmax, in which several may be true: most false pairs
of the sigmoid are of bare ground, and say little of which thing is where.

Both losses are taken twice. The first time they are between captions and whole crops, on the class
token. The second time they are between captions and regions of the crops, on the mean over the
region of CLIP Surgery's second path (as in Zhong et al., RegionCLIP, arXiv 2112.09106). The regions
let such a small model learn, in few steps, where a named thing is. Some are whole things, and some
are single patches on a thing or beside it: a map must be high on a ring and low in its hole.
"""

import common.runtime.first  # noqa: F401  before torch

import json
import time
from collections.abc import Callable

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.frozen.clip_surgery import TEMPLATES, ClipSurgery, surgery_tokens
from common.frozen.clip_weights import STANDIN, load_clip
from common.runtime import checkpoint, files, script, settings
from common.standin.scenes import GENERATOR, KINDS
from common.standin.training.store import FIELDS, load_scenes, save_weights
from common.standin.training.train_sam import HELD_OUT, SCENES, TRAIN

STEPS = 3600  # optimiser steps
BATCH = 64  # crops and captions a step
REGIONS = 4  # of each crop: a thing must look different from what lies beside it
PATCHES = 8  # of each crop: single patches that are regions of their own
LEARNING_RATE = 1e-3  # of AdamW: a warm-up, then cosine to zero
WARM_UP = 200  # steps
SEED = 0
SAVE_EVERY = 100  # steps: a stopped training goes on from there
REPORT_EVERY = 600  # steps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Pixels a side of a crop, which shows a thing or two. Maps are made of images three times as large:
# whole scenes.
CROP = 64
# Sides of a window, in shares of the one that has the scale of the maps. A window that is magnified
# more looks blurred.
SCALES = 0.8, 1.25
PATCH = 8  # pixels a side of a patch, as in clip_config.json
# How often crops and regions show an effect, or a thing of a kind, in shares of how often they show
# a thing of any other kind. Rings are the hardest: a piece of one is a piece of anything.
SHARES = {"shadow": 3, "mirror": 3, "blur": 3, "ring": 3}
EFFECT_WORDS = {  # how captions may call an effect
    "shadow": ("shadow", "shadow", "cast shadow"),
    "mirror": ("mirror", "mirror", "glass"),
    "blur": ("blurred region", "blurred region", "defocus background"),
    "salient": ("salient object", "salient object", "saliency object"),
}


def words_of(maps: np.ndarray, things: list[dict], region: np.ndarray, least: float) -> set[str]:
    """What is true of a region of a scene: kinds, colours and surfaces with kinds, effects.

    maps: (5, s, s), as from `load_scenes`. region: (s, s) bool. A thing is named where it covers
    more than `least` of the region, and an effect where it covers three times that, or 0.6.
    """
    inside = maps[:, region]
    words = set()
    for name, effect in zip(FIELDS[2:], inside[2:], strict=True):
        if (effect > 0).mean() > min(3 * least, 0.6):
            words.add(name)
    areas = np.bincount(inside[0], minlength=len(things) + 1)[1:]
    for thing, area in zip(things, areas, strict=True):
        if area > least * inside.shape[1]:
            kind = thing["kind"]
            words |= {kind, f"{thing['colour']} {kind}", f"{thing['surface']} {kind}"}
            if thing["salient"]:
                words.add("salient")
    return words


def write_caption(words: set[str], rng: np.random.Generator) -> tuple[str, set[str]]:
    """A caption with one of the words, and the set of what it claims, which is that word.

    Where there are no words, and now and then where there are, the caption claims nothing. Effects
    are rarer than things, so half of the captions that could name one must; the others may.
    """
    if not words or rng.random() < 0.04:
        return TEMPLATES[rng.integers(len(TEMPLATES))](""), set()
    effects = sorted(words & set(EFFECT_WORDS))
    single = [word for word in sorted(words) if " " not in word]
    if effects and rng.random() < 0.5:
        word = str(rng.choice(effects))
    else:
        word = str(rng.choice(single if rng.random() < 0.65 else sorted(words)))
    spoken = str(rng.choice(EFFECT_WORDS[word])) if word in EFFECT_WORDS else word
    return TEMPLATES[rng.integers(len(TEMPLATES))](spoken), {word}


def choose_region(maps: np.ndarray, things: list[dict], rng: np.random.Generator) -> np.ndarray:
    """One thing, one effect or, now and then, the bare ground: a region (s, s) bool.

    maps: (5, s, s). things: of the scene.
    """
    instances = maps[0]
    numbers = np.flatnonzero(np.bincount(instances.ravel(), minlength=1 + len(things))[1:])
    options = {number: SHARES.get(things[number]["kind"], 1) for number in numbers}
    effects = dict(zip(FIELDS[2:], maps[2:] > 0, strict=True))
    options |= {name: SHARES[name] for name, layer in effects.items() if layer.any()}
    if rng.random() < 0.15 or not options:
        ground = (instances == 0) & ~maps[2:].any(0)
        return ground if ground.any() else np.ones_like(ground)
    shares = np.array(list(options.values()))
    choice = list(options)[rng.choice(len(options), p=shares / shares.sum())]
    return effects[choice] if choice in effects else instances == choice + 1


def choose_window(region: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square window of the scene around a place in the region (s, s), at a random scale."""
    rows, columns = np.nonzero(region)
    side = int(len(region) / 3 * rng.uniform(*SCALES))
    place = rng.integers(len(rows))
    corner = np.array([rows[place], columns[place]]) - side * rng.uniform(0.2, 0.8, 2)
    top, left = np.clip(corner, 0, len(region) - side).astype(int)
    return slice(top, top + side), slice(left, left + side)


def choose_patch(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the crop's patches, in the region (h, h) bool or right beside it: (h, h) bool."""
    edges = np.linspace(0, len(region), CROP // PATCH + 1).round().astype(int)
    places = np.argwhere(region)
    place = places[rng.integers(len(places))] + rng.uniform(-1, 1, 2) * edges[1]
    row, column = (np.searchsorted(edges, place, "right") - 1).clip(0, CROP // PATCH - 1)
    patch = np.zeros_like(region)
    patch[edges[row]:edges[row + 1], edges[column]:edges[column + 1]] = True
    return patch


def patch_weights(region: np.ndarray) -> np.ndarray:
    """The share of the region (h, w) bool in each of the crop's 64 patches; the sum is 1."""
    grid = (CROP // PATCH, CROP // PATCH)
    picture = Image.fromarray(region.astype(np.float32)).resize(grid, Image.BOX)
    shares = np.asarray(picture).ravel()
    return shares / shares.sum().clip(1e-6)


def draw_batch(images: np.ndarray, maps: np.ndarray, things: list[list[dict]],
               rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
    """Crops of scenes, regions of them, and a caption of the first region of each crop.

    Returns crops (B, 3, 64, 64) uint8; regions as weights of their 64 patches (B, R, 64) float32;
    captions; and which captions are true of each crop (B, B) and of each region (B, R, B), bool.
    """
    crops, weights, captions, claims, crop_words, region_words = [], [], [], [], [], []
    for row in rng.choice(TRAIN, BATCH, replace=False):
        scene_maps = np.array(maps[row])
        rows, columns = choose_window(choose_region(scene_maps, things[row], rng), rng)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        crop_maps = np.ascontiguousarray(scene_maps[:, rows, columns][..., flip])
        crop = Image.fromarray(images[row][rows, columns][:, flip])
        crops.append(np.asarray(crop.resize((CROP, CROP), Image.BILINEAR)))

        regions = [choose_region(crop_maps, things[row], rng) for _ in range(REGIONS)]
        regions += [choose_patch(choose_region(crop_maps, things[row], rng), rng)
                    for _ in range(PATCHES)]
        weights.append(np.stack([patch_weights(region) for region in regions]))
        everywhere = np.ones_like(regions[0])
        crop_words.append(words_of(crop_maps, things[row], everywhere, 0.015))
        # a patch is named for what covers half of it: a map is read at the middle of a cell
        least = [0.2] * REGIONS + [0.5] * PATCHES
        words = [words_of(crop_maps, things[row], region, share)
                 for region, share in zip(regions, least, strict=True)]
        region_words.append(words)
        caption, claimed = write_caption(words[0], rng)
        captions.append(caption)
        claims.append(claimed)

    def truths(words: set[str]) -> list[bool]:
        """Which captions are true where these words are."""
        return [claimed <= words for claimed in claims]

    true_of_crops = torch.tensor([truths(words) for words in crop_words])
    true_of_regions = torch.tensor([[truths(words) for words in regions]
                                    for regions in region_words])
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2),
            torch.from_numpy(np.stack(weights)), captions, true_of_crops, true_of_regions)


def pair_loss(similarity: Tensor, true: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss over all pairs of something with a caption, a scalar.

    similarity, true: (..., B). True and false pairs weigh the same, however many there are.
    """
    losses = F.softplus((scale.exp() * similarity + bias) * torch.where(true, -1, 1))
    return (losses[true].mean() + losses[~true].mean()) / 2


def choice_loss(similarity: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy between "one of the true captions" and the softmax over all, a scalar.

    similarity, true: (..., B). Captions that claim nothing do not compete, and what no other
    caption is true of does not count.
    """
    claims_something = ~true.flatten(0, -2).all(0)
    logits, true = scale.exp() * similarity[..., claims_something], true[..., claims_something]
    of_true = logits.masked_fill(~true, -torch.inf).logsumexp(-1)
    return (logits.logsumexp(-1) - of_true)[true.any(-1)].mean()


def pointing_game(surgery: ClipSurgery, images: np.ndarray,
                  targets: np.ndarray) -> list[tuple[float, float]]:
    """How often the highest patch of a text's map lies on the target.

    images: (N, s, s, 3) uint8. targets: (N, K, s, s) bool, for each of the K texts. Scenes without
    a target do not count. Returns for each text the share of hits, and that of a random place.
    """
    texts = range(targets.shape[1])
    hits, chances = [[] for _ in texts], [[] for _ in texts]
    for start in range(0, len(images), BATCH):
        chunk = torch.from_numpy(images[start:start + BATCH].copy()).permute(0, 3, 1, 2)
        scene_maps = surgery.maps(chunk).cpu().numpy()
        for maps, masks in zip(scene_maps, targets[start:start + BATCH]):
            for text in texts:
                mask = masks[text]
                if not mask.any():
                    continue
                y, x = np.unravel_index(maps[text].argmax(), maps[text].shape)
                cell = mask.shape[0] / maps[text].shape[0]
                hits[text].append(mask[int((y + 0.5) * cell), int((x + 0.5) * cell)])
                chances[text].append(mask.mean())
    return [(float(np.mean(hits[text])), float(np.mean(chances[text]))) for text in texts]


def masks_of(instances: np.ndarray, things: list[list[dict]],
             wanted: Callable[[dict], bool]) -> np.ndarray:
    """Where the wanted things are, (N, s, s) bool for instances (N, s, s)."""
    masks = []
    for scene, inventory in zip(instances, things):
        numbers = [number for number, thing in enumerate(inventory, 1) if wanted(thing)]
        masks.append(np.isin(scene, numbers))
    return np.stack(masks)


def report(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, images: np.ndarray,
           maps: np.ndarray, things: list[list[dict]]) -> dict[str, tuple[float, float]]:
    """Prints and returns the pointing game's accuracy and chance for each text, on these scenes.

    images: (N, s, s, 3) uint8. maps: (N, 5, s, s), as from `load_scenes`.
    """
    instances, shadow, mirror, blur = maps[:, 0], maps[:, 2] > 0, maps[:, 3] > 0, maps[:, 4] > 0
    salient = masks_of(instances, things, lambda thing: thing["salient"])
    kinds = [masks_of(instances, things, lambda thing, kind=kind: thing["kind"] == kind)
             for kind in KINDS]
    # CLIP Surgery subtracts what the texts of one set share, so the sets are those of the tasks.
    targets = {
        ("shadow",): [shadow], ("mirror",): [mirror], ("blurred region",): [blur],
        ("salient object",): [salient], KINDS: kinds,
    }
    scores = {}
    for texts, masks in targets.items():
        surgery = ClipSurgery(model, tokenizer, 3 * CROP, texts)
        found = pointing_game(surgery, images, np.stack(masks, 1))
        scores |= dict(zip(texts, found, strict=True))
    for text, (hit, chance) in scores.items():
        print(f"  {text}: pointing game {hit:.3f}, chance {chance:.3f}", flush=True)
    return scores


def main() -> None:
    settings.positive(globals(), "STEPS", "BATCH", "SAVE_EVERY", "REPORT_EVERY", "WARM_UP")
    settings.at_most(globals(), TRAIN, "BATCH")
    settings.at_most(globals(), STEPS, "WARM_UP")
    script.device(DEVICE)
    files.lock(SCENES, "set another SCENES")
    torch.manual_seed(SEED)
    images, maps, things = load_scenes(SCENES, TRAIN + HELD_OUT)
    config = json.loads((STANDIN / "clip_config.json").read_text())
    model = open_clip.CLIP(**config).to(DEVICE)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    pairs = nn.ParameterDict({  # for crops and for regions
        "scales": torch.full((2,), 10.0, device=DEVICE).log(),
        "biases": torch.full((2,), -3.0, device=DEVICE)})
    parameters = [*model.parameters(), *pairs.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS,
                                                   pct_start=WARM_UP / STEPS)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=DEVICE).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD, device=DEVICE).view(3, 1, 1)
    held_out = slice(TRAIN, TRAIN + HELD_OUT)

    path, generator = SCENES / "clip.pt", torch.Generator().manual_seed(SEED)
    made_with = {"steps": STEPS, "train": TRAIN, "batch": BATCH, "regions": REGIONS,
                 "patches": PATCHES, "learning_rate": LEARNING_RATE, "warm_up": WARM_UP,
                 "shares": SHARES, "words": EFFECT_WORDS, "scales": SCALES, "crop": CROP,
                 "patch": PATCH, "seed": SEED, "generator": GENERATOR}
    saved = checkpoint.resume(path, "make standin", made_with, {"step": int}, {},
                              "set the constant back, or delete the file", model=model, pairs=pairs,
                              optimizer=optimizer, schedule=schedule, generator=generator)
    done = saved["step"] if saved else 0
    print(f"{STEPS} steps{f'; {done} of them are done' if done else ''}", flush=True)
    started, losses = time.time(), []
    for step in range(done + 1, STEPS + 1):
        seed = torch.randint(2**31, (), generator=generator).item()
        batch = draw_batch(images, maps, things, np.random.default_rng(seed))
        crops, weights, captions, true_of_crops, true_of_regions = batch
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            tokens = surgery_tokens(model.visual, (crops.to(DEVICE) / 255 - mean) / deviation)
            texts = F.normalize(model.encode_text(tokenizer(captions).to(DEVICE)), dim=-1)
        tokens, texts = tokens.float(), texts.float()
        of_crops, of_patches = tokens[:, 0], tokens[:, 1:]
        of_regions = torch.einsum("brn,bnd->brd", weights.to(DEVICE), of_patches)
        loss = 0
        for similarity, true, scale, bias in zip(
                (of_crops @ texts.T, of_regions @ texts.T),
                (true_of_crops.to(DEVICE), true_of_regions.to(DEVICE)), pairs["scales"],
                pairs["biases"]):
            loss = loss + pair_loss(similarity, true, scale, bias)
            loss = loss + choice_loss(similarity, true, scale)

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        script.require_finite({"the loss": losses[-1], "the gradient": norm}, f"in step {step}",
                              f"lower LEARNING_RATE and delete {path}")
        if step % SAVE_EVERY == 0 or step == STEPS:
            checkpoint.save_training(path, made_with, [], finished=step == STEPS, step=step,
                                     model=model, pairs=pairs, optimizer=optimizer,
                                     schedule=schedule, generator=generator)
            print(f"step {step}/{STEPS}  loss {np.mean(losses[-SAVE_EVERY:]):.3f}  "
                  f"{(time.time() - started) / (step - done):.2f} s a step", flush=True)
        if step % REPORT_EVERY == 0 and step < STEPS:
            report(model.eval(), tokenizer, images[held_out], maps[held_out], things[held_out])
            model.train()
    model.logit_scale.data = pairs["scales"][0].data.clone()  # CLIP's own name for the scale
    save_weights(model, STANDIN / "clip.safetensors")
    print(f"wrote {STANDIN / 'clip.safetensors'}; to train from scratch again, delete {path}")
    as_written = load_clip("demo", DEVICE)
    report(*as_written, images[held_out], maps[held_out], things[held_out])


if __name__ == "__main__":
    script.run(main, globals())
