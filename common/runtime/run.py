"""What stages 2 to 4 open before they start: the cache, the device, the patches, SAM's decoder.

Unlike the rest of common/runtime, this module imports the method (the modules in common/).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.cache import Cache
from common.episode import patch_centres
from common.frozen.sam import BatchedPrompter, load_decoder
from common.runtime import distributed, script


@dataclass(frozen=True)
class Run:
    """What stages 2 to 4 share.

    frame: side in pixels of the square picture that points lie in.
    centres: (A, 2) float, (x, y) of the patch centres (Eq. 3) in that picture, on `device`.
    """

    folder: Path
    cache: Cache
    device: torch.device
    frame: int
    centres: Tensor

    def load_prompter(self) -> BatchedPrompter:
        """Loads the prompt encoder and mask decoder of the SAM whose embeddings the cache holds.

        All processes of torchrun must call it. Raises UserError if they cannot be loaded.
        """
        with distributed.rank_0_first():  # missing weights are downloaded once
            return BatchedPrompter(load_decoder(self.cache.attrs, self.device), self.frame)


def open_run(constants: dict[str, object]) -> Run:
    """Opens the run that a script's TASK, RUN_DIR, FEATURES and DEVICE name; writes nothing.

    constants: the script's `globals()`. Raises UserError if the device or the cache is missing,
    or if the cache is damaged, incomplete or of another task.
    """
    device = distributed.own(script.device(constants["DEVICE"]))
    folder = script.run_dir(constants["RUN_DIR"], constants["TASK"])
    cache_path = script.cache_path(constants["FEATURES"], folder)
    stage_1 = script.command("01_cache_features.py", constants)
    cache = Cache.open(cache_path, constants["TASK"], stage_1)
    frame, patch = cache.attrs["image_size"], cache.attrs["patch_size"]
    return Run(folder, cache, device, frame, patch_centres(frame, patch).to(device))
