"""A run folder opened for stages 2 to 4: its cache, device and patches, and SAM's live decoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.cache import Cache
from common.episode import patch_centres
from common.frozen.sam import BatchedPrompter
from common.frozen.sam_weights import load_decoder
from common.runtime import distributed, script


@dataclass(frozen=True)
class Run:
    """What stages 2 to 4 share. centres: (A, 2) float, the patch centres (Eq. 3), on `device`."""

    folder: Path
    cache: Cache
    device: torch.device
    frame: int  # side in pixels of the squashed picture that points lie in
    centres: Tensor

    def load_prompter(self) -> BatchedPrompter:
        """SAM's prompt encoder and mask decoder, the ones whose embeddings the cache holds.

        Raises UserError where they cannot be had. All processes of torchrun must call it.
        """
        with distributed.rank_0_first():  # weights that are not there yet are downloaded once
            return BatchedPrompter(load_decoder(self.cache.attrs, self.device), self.frame)


def open_run(constants: dict[str, object]) -> Run:
    """The run that a script's TASK, RUN_DIR, FEATURES and DEVICE name; nothing is written.

    constants: the script's `globals()`. Raises UserError where the device or the cache is missing,
    or where the cache is damaged, incomplete or of another task.
    """
    device = distributed.own(script.device(constants["DEVICE"]))
    folder = script.run_dir(constants["RUN_DIR"], constants["TASK"])
    path = script.cache_path(constants["FEATURES"], folder)
    stage_1 = script.command("01_cache_features.py", constants)
    cache = Cache.open(path, constants["TASK"], stage_1)
    frame, patch = cache.attrs["image_size"], cache.attrs["patch_size"]
    return Run(folder, cache, device, frame, patch_centres(frame, patch).to(device))
