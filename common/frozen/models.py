"""What is cached of a picture: SAM's image embedding F and CLIP Surgery's maps M_c."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from common.frozen.clip_surgery import ClipSurgery
from common.frozen.sam import SamEmbedder, squash


class FrozenModels:
    """F and M_c of a picture, by SAM's encoder and CLIP Surgery together.

    Stage 1 and images of one's own both come through here, so that the inputs of a trained run are
    made as those it was trained on, but for the cache's rounding to float16. frame: side in pixels
    of the square that points lie in.
    """

    def __init__(self, embedder: SamEmbedder, surgery: ClipSurgery, frame: int) -> None:
        self.embedder, self.surgery, self.frame = embedder, surgery, frame

    def see(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A picture uint8 (H, W, 3) as SAM and as CLIP see it, squares of their sizes.

        Neither model runs here, so any thread may call it.
        """
        side = (self.surgery.image_size, self.surgery.image_size)
        for_sam = squash(image, self.embedder.sam.image_encoder.img_size, self.frame)
        return for_sam, np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))

    def compute(self, seen: Sequence[tuple[np.ndarray, np.ndarray]],
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """F (B, C, h, w) and M_c (B, K, h, w), resized to h x w, both float32.

        seen: B pictures as `see` returns them.
        """
        for_sam, for_clip = (np.stack(pictures) for pictures in zip(*seen))
        embeddings = self.embedder.embed(for_sam)
        maps = self.surgery.maps(torch.from_numpy(for_clip).permute(0, 3, 1, 2))
        return embeddings, F.interpolate(maps, embeddings.shape[2:], mode="bilinear")
