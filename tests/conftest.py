"""Fixtures that more than one file of tests uses."""

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam


@pytest.fixture(scope="session")
def vit_b() -> Sam:
    """segment_anything's own ViT-B with seeded random weights: the real architecture, nothing to download.

    Every weight gets a little noise, because what is 0 or 1 at the start (position embeddings, biases, the
    scale of norms) would hide an error.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = sam_model_registry["vit_b"]()
        with torch.no_grad():
            for weight in sam.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return sam.eval().requires_grad_(False)
