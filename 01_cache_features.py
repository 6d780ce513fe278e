"""Stage 1: SAM's image embeddings and CLIP Surgery's maps, once per image, into one HDF5 file.

    python 01_cache_features.py [NAME=value ...]   NAME is any constant below; `help` lists them
    torchrun --nproc_per_node=4 01_cache_features.py ...   four processes share the images

Nothing inside SAM or CLIP is ever trained, so neither F = E_I(x) nor M_c ever changes. Killed at
any moment, the same command goes on where it stopped.
"""

import common.runtime.first  # noqa: F401  before torch

import importlib.metadata
import time

import torch

from common.cache import Cache
from common.cache_file import CacheWriter, Layout, known_places
from common.datasets import draw_shots, left_out, list_samples, read_skip
from common.frozen.clip_surgery import ClipSurgery
from common.frozen.clip_weights import absolute_clip, clip_setup, load_clip
from common.frozen.models import FrozenModels
from common.frozen.sam import SamEmbedder
from common.frozen.sam_weights import (
    absolute_sam,
    encoder_fingerprint,
    load_sam,
    sam_fingerprint,
)
from common.label_maps import check_samples, with_skip
from common.prepare import Decoded, decode_ahead, mask_summary, open_task, require_pictures
from common.results.data_sheet import draw_data, foreground_line
from common.runtime import checkpoint, distributed, files, script, settings
from common.runtime.batches import in_batches
from common.runtime.errors import UserError
from common.runtime.progress import Bar

# what is segmented
TASK = "demo_saliency"  # demo_blur|shadow|mirror|saliency|semantic, cuhk|sbu|msd|duts|voc, folder
DATA_DIR = ""  # where the data set lies; empty = data/<TASK>
PROMPT = ""  # the target's text: of TASK = "folder", or in place of another task's one text
SKIP = ""  # samples to leave out: name or split/name, joined by commas, or a .txt list of names
CUHK_WHITE_IS_BLURRED = True  # copies of CUHK differ in what white means; false: white is sharp
FOREGROUND = ""  # in masks of several levels or colours (TASK=folder): 3, #ff0000 or any
SHOTS = 50  # labelled training samples drawn (paper, section 4)
SEED = 0  # of that draw

# the frozen models
SAM = "demo"  # vit_h (the paper's), vit_l, vit_b, mobile_sam (fast), a checkpoint's path, or demo
CLIP = "demo"  # an open_clip ViT: name/tag, as ViT-B-16-quickgelu/openai, or name/file; or demo
CLIP_SIZE = 0  # pixels a side that CLIP sees; 0 = 512 (CLIP Surgery's sharper size), 192 for demo
IMAGE_SIZE = 800  # every picture is squashed to this square; points live in it (Eq. 3)
PATCH_SIZE = 80  # actions are the centres of patches of this size: 10 x 10 of them (Eq. 3)

# how it is computed
BATCH_SIZE = 8  # images at a time through SAM and CLIP; halves itself where memory runs out
WORKERS = 4  # threads that decode images ahead of the models
PRECISION = "auto"  # of SAM's encoder: bf16 where the hardware has it, else fp32; or either by name
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # the cache; empty = features.h5 in the run folder


def main() -> None:
    settings.positive(globals(), "SHOTS", "IMAGE_SIZE", "PATCH_SIZE", "BATCH_SIZE", "WORKERS")
    settings.not_negative(globals(), "SEED", "CLIP_SIZE")
    settings.at_most(globals(), 4096, "IMAGE_SIZE", "CLIP_SIZE")
    if SHOTS < 2:
        raise UserError(f"SHOTS={SHOTS} is too few: advantages compare samples, so set 2 or more")
    if IMAGE_SIZE % PATCH_SIZE:
        raise UserError(f"PATCH_SIZE={PATCH_SIZE} does not divide IMAGE_SIZE={IMAGE_SIZE}: set one "
                        "that does")
    device = distributed.own(script.device(DEVICE))
    task, data_dir = open_task(globals())
    run_dir = script.run_dir(RUN_DIR, TASK)
    path, sheet = script.cache_path(FEATURES, run_dir), run_dir / "data.png"
    files.require_ours(sheet)

    # the images: the drawn training samples and the whole test set
    asked = read_skip(SKIP)
    samples = list_samples(task, data_dir, asked)
    skip = left_out(asked, samples, known_places(path))
    drawn = draw_shots(samples, task, SHOTS, SEED, skip)  # (sample, text index) pairs
    shots = list(dict.fromkeys(sample for sample, _ in drawn))  # once, though drawn for two classes
    images = shots + [sample for sample in samples
                      if sample.split == "test" and sample.place not in skip]
    row_of = {sample: row for row, sample in enumerate(images)}
    checked = check_samples(images, task)
    print(mask_summary(images, checked))

    # the frozen models
    with distributed.rank_0_first():  # weights are downloaded once
        sam = load_sam(SAM, device)
        clip, tokenizer = load_clip(CLIP, device)
    embedder = SamEmbedder(sam, PRECISION)
    clip_size = CLIP_SIZE or (192 if CLIP == "demo" else 512)
    frozen = FrozenModels(embedder, ClipSurgery(clip, tokenizer, clip_size, task.texts), IMAGE_SIZE)

    # the cache, laid out before the first image
    layout = Layout(
        names=[sample.name for sample in images], splits=[sample.split for sample in images],
        sizes=[sample.size for sample in checked], texts=task.texts,
        shots=[(row_of[sample], text) for sample, text in drawn],
        embedding=(sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size),
        frame=IMAGE_SIZE, patch=PATCH_SIZE)
    packages = ("torch", "segment_anything", "timm", "open_clip_torch")
    made_with = {
        "task": TASK, "branch": task.branch,
        "sam": absolute_sam(SAM), "sam_fingerprint": sam_fingerprint(sam),
        "encoder_fingerprint": encoder_fingerprint(sam),
        "clip": absolute_clip(CLIP), "clip_fingerprint": checkpoint.fingerprint(clip.state_dict()),
        "clip_setup": clip_setup(clip),
        "clip_size": clip_size, "image_size": IMAGE_SIZE, "shots": SHOTS, "seed": SEED,
        "precision": "bf16" if embedder.bf16 else "fp32",
        **({"cuhk_white_is_blurred": CUHK_WHITE_IS_BLURRED} if TASK == "cuhk" else {}),
        **({"skip": sorted(skip)} if skip else {}),
        **({"foreground": str(task.foreground)} if task.foreground is not None else {}),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "versions": {name: importlib.metadata.version(name) for name in packages}}
    there = {sample.place for sample in samples}
    with distributed.rank_0_first():  # the file is laid out once
        files.lock(path.parent)
        writer = CacheWriter.open_or_create(path, layout, made_with, there)
    writer.require_masks([sample.crc for sample in checked])
    require_pictures(writer, images, WORKERS)

    # F and M_c of the images that are missing, a share for each of torchrun's processes
    def compute(batch: list[Decoded]) -> tuple[torch.Tensor, torch.Tensor]:
        return frozen.compute([image.seen for image in batch])

    mend = "choose a smaller SAM (SAM=mobile_sam is the smallest), PRECISION=bf16 or DEVICE=cpu"
    missing = writer.missing()
    broken = []
    decoded = decode_ahead(distributed.share(missing), images, task, frozen.see, WORKERS, broken)
    bar = Bar(f"embedding {TASK}", len(images), len(images) - len(missing))
    with writer, bar:
        for batch, (embeddings, maps) in in_batches(decoded, BATCH_SIZE, compute, mend):
            for image, embedding, own_maps in zip(batch, embeddings, maps):
                writer.write(image.row, embedding, own_maps, image.label_map, image.picture)
            bar.reach(len(images) - len(writer.missing()))  # counts what other processes wrote
        distributed.barrier()
        bar.reach(len(images) - len(writer.missing()))
    if broken := distributed.gather(broken):  # after hours of work: the others are done
        raise UserError(with_skip({images[row].place: fault for row, fault in broken})
                        + "; what was computed of the others is kept")

    print(f"{len(images)} images ({len(drawn)} training samples), "
          f"{path.stat().st_size / 1e6:.0f} MB")
    if distributed.RANK == 0:
        cache = Cache.open(path, TASK)
        draw_data(cache, sheet)
        print(foreground_line(cache, task.paper))
    script.goodbye([path, sheet], script.command("02_train_srm.py", globals()))


if __name__ == "__main__":
    script.run(main, globals(), shared=True)
