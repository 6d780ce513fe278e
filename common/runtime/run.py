"""What stages 2 to 4 and peft open first: the cache, the device, the patches, SAM's decoder.

Unlike the rest of common/runtime, this module imports the method (the modules in common/).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.agent import LOGIT_SCALE, Actor
from common.cache import Cache
from common.episode import Episode, patch_centres
from common.frozen.sam import BatchedPrompter
from common.frozen.sam_weights import load_decoder
from common.runtime import checkpoint, distributed, script, settings
from common.runtime.errors import UserError
from common.srm import HEADS, build_srm


@dataclass(frozen=True)
class Trained:
    """What stage 3 ended with, on the run's device and in eval mode."""

    content: dict  # of agent.pt
    actor: Actor
    srm: nn.Module
    prompter: BatchedPrompter
    centres: Tensor  # (A, 2)

    def new_episode(self, embeddings: Tensor, maps: Tensor) -> Episode:
        """An episode of F (B, C, h, w) and M_c (B, h, w), of any float type on any device."""
        embeddings, maps = (values.to(self.centres.device).float() for values in (embeddings, maps))
        residual = self.content["settings"]["residual"]
        return Episode(self.prompter, embeddings, maps, self.centres, residual=residual)

    @property
    def made_with(self) -> dict:
        """The settings of stages 2 and 3, and fingerprints of what they trained."""
        return self.content["settings"] | {
            "actor": checkpoint.fingerprint(self.content["actor"]),
            "trained_srm": checkpoint.fingerprint(self.content["srm"])}


@dataclass(frozen=True)
class Run:
    """What stages 2 to 4 share.

    attributes: the cache's, with SAM and CLIP replaced where the script's constants name others.
    frame: side in pixels of the square picture that points lie in.
    centres: (A, 2) float, (x, y) of the patch centres (Eq. 3) in that picture, on `device`.
    """

    folder: Path
    cache: Cache
    attributes: dict
    device: torch.device
    frame: int
    centres: Tensor

    def load_prompter(self) -> BatchedPrompter:
        """Loads the prompt encoder and mask decoder of the SAM whose embeddings the cache holds.

        All processes of torchrun must call it. Raises UserError if they cannot be loaded.
        """
        with distributed.rank_0_first():  # missing weights are downloaded once
            return BatchedPrompter(load_decoder(self.attributes, self.device), self.frame)

    def load_agent(self, constants: dict[str, object]) -> Trained:
        """The agent of this run, and SAM's live decoder. constants: the script's `globals()`.

        Raises UserError if stage 3 is not finished, or if the cache or stage 2's SRM is not the one
        that the agent was trained from, and all that `load_prompter` raises.
        """
        path, srm_path = self.folder / "agent.pt", self.folder / "srm.pt"
        stage_2, stage_3 = (script.command(name, constants, ("SAM",))
                            for name in ("02_train_srm.py", "03_train_agent.py"))
        wanted = {"task": constants["TASK"], "heads": HEADS, "logit_scale": LOGIT_SCALE,
                  "features": self.cache.identity()}
        content = checkpoint.load_finished(path, stage_3, wanted)
        if srm_path.exists():
            now = checkpoint.load(srm_path, stage_2, srm=dict)["srm"]
            settings.require_same(path, content["settings"], {"srm": checkpoint.fingerprint(now)})
        actor = Actor(self.cache.channels).to(self.device).eval()
        srm = build_srm(content["settings"]["branch"], self.cache.channels).to(self.device).eval()
        checkpoint.restore(path, content, actor=actor, srm=srm)
        return Trained(content, actor, srm, self.load_prompter(), self.centres)


def open_run(constants: dict[str, object]) -> Run:
    """Opens the run that a script's TASK, RUN_DIR, FEATURES and DEVICE name; writes nothing.

    SAM and CLIP, where the script has them and they are not empty, stand for the cache's.

    constants: the script's `globals()`. Raises UserError if the device or the cache is missing, if
    the cache is damaged, incomplete or of another task, or if there are fewer patches than ROUNDS
    (where the script has it).
    """
    device = distributed.own(script.device(constants["DEVICE"]))
    folder = script.run_dir(constants["RUN_DIR"], constants["TASK"])
    cache_path = script.cache_path(constants["FEATURES"], folder)
    stage_1 = script.command("01_cache_features.py", constants)
    cache = Cache.open(cache_path, constants["TASK"], stage_1)
    given = {name.lower(): constants.get(name) for name in ("SAM", "CLIP")}
    attributes = cache.attrs | {name: value for name, value in given.items() if value}
    frame = cache.attrs["image_size"]
    centres = patch_centres(frame, cache.attrs["patch_size"]).to(device)
    if constants.get("ROUNDS", 0) > len(centres):
        raise UserError(f"ROUNDS={constants['ROUNDS']} is more than the {len(centres)} patches "
                        "there are: set it lower")
    return Run(folder, cache, attributes, device, frame, centres)
