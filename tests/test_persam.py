"""PerSAM against outputs of its authors' code, against SamPredictor, and against cases by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from common.frozen.sam_weights import Headless
from common.rivals.persam import PerSAM, guided_transformer, standardise

GOLDEN = np.load(Path(__file__).parent / "data" / "persam_golden.npz")
GRID = int(GOLDEN["config/grid"])


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"out/{name}"])


def golden_group(prefix: str) -> dict[str, np.ndarray]:
    """The arrays of the golden file whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


@pytest.fixture
def sam() -> Sam:
    """The golden decoder: a new one for each test, because some change it."""
    size = {key: int(value) for key, value in golden_group("config/").items()}
    dim, image = size["dim"], size["image"]
    transformer = TwoWayTransformer(2, dim, size["heads"], size["mlp_dim"])
    sam = Sam(Headless(image),
              PromptEncoder(dim, (GRID, GRID), (image, image), size["mask_in_chans"]),
              MaskDecoder(transformer_dim=dim, transformer=transformer, iou_head_depth=2,
                          iou_head_hidden_dim=size["iou_head_hidden_dim"]))
    weights = golden_group("weights/")
    sam.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return sam.eval().requires_grad_(False)


@pytest.fixture
def loud(sam) -> Sam:
    """The same with logits of size 10, like SAM's.

    The golden ones are too small to have an effect as a mask prompt. A mask prompt passes through
    two channels that are normalised against each other, which makes rounding errors of 1e-4.
    """
    for head in sam.mask_decoder.output_hypernetworks_mlps:
        head.layers[-1].weight *= 100
        head.layers[-1].bias *= 100
    return sam


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-7) -> None:
    """Equal to 1e-7, which golden logits of up to 0.09 need.

    With the biased deviation instead of the unbiased one they would move by only 4e-7.
    """
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def random_case(sam: Sam, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding in the cache's float16 and a target."""
    generator = torch.Generator().manual_seed(seed)
    width = sam.prompt_encoder.embed_dim
    embedding = torch.randn(width, GRID, GRID, generator=generator).half()
    return embedding, torch.randn(width, generator=generator)


# The first pass

# the points are stored in SAM's 128 pixels
@pytest.mark.parametrize("image, frame", [(0, 128), (1, 256)])
def test_guided_logits_are_the_authors(sam, image, frame):
    attention = standardise(golden("similarity")[image, 0]).sigmoid()  # stored on the grid
    points = golden("points")[image] * frame / 128
    logits = PerSAM(sam, frame).guided_pass(golden("embedding")[image], points, attention,
                                            golden("target_embedding")[0, 0])
    assert_equal(logits, golden("guided_logits")[image, 0])


@pytest.mark.parametrize("image", [0, 1])
def test_logits_without_guidance_are_the_authors(sam, image):
    embedding, points = golden("embedding")[image], golden("points")[image]
    logits = PerSAM(sam, frame=128).guided_pass(embedding, points, None, torch.zeros(32))
    assert_equal(logits, golden("plain_logits")[image, 0])


def test_without_similarity_and_target_the_transformer_is_sams(sam):
    generator = torch.Generator().manual_seed(0)
    image, image_pe = torch.randn(2, 1, 32, 6, 10, generator=generator)
    tokens = torch.randn(1, 9, 32, generator=generator)
    transformer = sam.mask_decoder.transformer
    ours = guided_transformer(transformer, image, image_pe, tokens, None, torch.zeros(32))
    for mine, theirs in zip(ours, transformer(image, image_pe, tokens), strict=True):
        assert_equal(mine, theirs, atol=1e-5)  # these are of size 1


# The target

def test_the_target_is_the_mean_of_each_references_mean(sam):
    embeddings = torch.zeros(2, 2, 1, 4, dtype=torch.float16)
    embeddings[0, 0] = torch.tensor([10.0, 20.0, 60.0, 1000.0])
    embeddings[1, 1] = torch.tensor([1.0, 500.0, 500.0, 500.0])
    truth = torch.tensor([[[0.6, 1.0, 0.9, 0.5]], [[0.7, 0.4, 0.0, -1.0]]])  # three cells, one cell
    target = PerSAM(sam).target(embeddings, truth)
    assert target.dtype == torch.float32
    # half of (30, 0) and half of (0, 1): the number of cells does not matter
    assert_equal(target, torch.tensor([15.0, 0.5]))


def test_a_reference_that_fills_half_of_no_cell_counts_with_its_fullest_cells(sam):
    embeddings = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]).expand(1, 3, 1, 5)
    truth = torch.tensor([[[0.2, 0.25, -1.0, 0.25, 0.0]]])
    assert_equal(PerSAM(sam).target(embeddings, truth), torch.full((3,), 505.0))


# All three passes

def test_the_points_are_where_the_embeddings_direction_is_nearest_to_and_farthest_from_target(sam):
    embedding = torch.zeros(32, GRID, GRID)
    embedding[1] = 5.0  # orthogonal to the target
    embedding[:2, 8, 8] = torch.tensor([900.0, 900.0])  # the largest product, but at 45 degrees
    embedding[:2, 2, 2] = torch.tensor([-900.0, 900.0])
    embedding[:2, 3, 10] = torch.tensor([0.1, 0.0])
    embedding[:2, 12, 5] = torch.tensor([-0.1, 0.0])
    target = torch.zeros(32).index_fill(0, torch.tensor(0), 7.0)
    frame = 5 * GRID  # so that a cell has a middle pixel, its third
    _, points = PerSAM(sam, frame).segment(embedding, target)
    assert points.tolist() == [[52.0, 17.0], [27.0, 62.0]]


def test_the_box_holds_the_masks_outermost_pixels_in_the_frame(sam):
    logits = torch.full((64, 64), -1.0)
    logits[10:20, 20:40] = 1.0
    logits[15, 50] = 1.0
    assert PerSAM(sam, frame=128).box(logits).tolist() == [40.0, 20.0, 101.0, 39.0]


def by_the_predictor(persam: PerSAM, embedding: torch.Tensor, target: torch.Tensor,
                     empty: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and points, in other words: the similarity by hand, both refinements by SamPredictor.

    empty: whether the first refined mask must be empty.
    """
    sam, frame = persam.sam, persam.frame
    similarity = F.cosine_similarity(embedding, target[:, None, None], dim=0)[None, None]
    similarity = F.interpolate(similarity, (frame, frame), mode="bilinear")
    pixels = similarity[0, 0].numpy()
    highest, lowest = (np.unravel_index(index, pixels.shape)
                       for index in (pixels.argmax(), pixels.argmin()))
    points = np.array([highest[::-1], lowest[::-1]])
    difference = similarity - similarity.mean()
    deviation = (difference ** 2).sum().div(frame * frame - 1).sqrt()
    attention = F.interpolate(difference / deviation, (GRID, GRID), mode="bilinear").sigmoid()
    logits = persam.guided_pass(embedding, torch.tensor(points).float(), attention[0, 0], target)

    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size = (frame, frame)
    predictor.input_size = (sam.image_encoder.img_size,) * 2
    labels = np.array([1, 0])
    masks, iou, low = predictor.predict(points, labels, mask_input=logits[None].numpy())
    best = iou.argmax()
    y, x = masks[best].nonzero()
    assert (len(y) == 0) == empty
    box = None if empty else np.array([x.min(), y.min(), x.max(), y.max()])
    _, iou, low = predictor.predict(points, labels, box=box, mask_input=low[best, None])
    return torch.tensor(low[iou.argmax()]), torch.tensor(points).float()


@pytest.mark.parametrize("frame, best, threshold", [(128, 0, 5.5), (100, 1, 2.0), (300, 2, 6.0)])
def test_any_of_three_masks_is_refined_as_by_the_predictor_in_a_frame_of_any_size(
        loud, frame, best, threshold):
    loud.mask_decoder.iou_prediction_head.layers[-1].bias[best + 1] += 10  # 0 is the single mask's
    loud.mask_threshold = threshold  # at 0 the box of each noisy mask would be the whole frame
    persam = PerSAM(loud, frame)
    embedding, target = random_case(loud, seed=best)
    logits, points = persam.segment(embedding, target)
    expected_logits, expected_points = by_the_predictor(persam, embedding.float(), target,
                                                        empty=False)
    assert logits.shape == (4 * GRID, 4 * GRID) and logits.dtype == torch.float32
    assert_equal(logits, expected_logits, atol=2e-3)
    assert_equal(points, expected_points)


def test_an_empty_mask_is_refined_without_a_box(loud):
    loud.mask_threshold = float("inf")  # no mask reaches it
    persam = PerSAM(loud, frame=128)
    embedding, target = random_case(loud, seed=0)
    logits, _ = persam.segment(embedding, target)
    expected_logits, _ = by_the_predictor(persam, embedding.float(), target, empty=True)
    assert_equal(logits, expected_logits, atol=2e-3)


def test_the_first_pass_is_guided_by_similarity_and_by_the_length_of_the_target(loud):
    embedding, target = random_case(loud, seed=0)
    persam = PerSAM(loud, frame=128)
    logits, points = persam.segment(embedding, target)
    longer, same_points = persam.segment(embedding, 2 * target)
    assert torch.equal(points, same_points)
    assert (logits - longer).abs().max() > 0.1


def test_an_image_that_is_equally_similar_everywhere_gives_finite_logits(loud):
    embedding, target = random_case(loud, seed=0)
    constant = torch.zeros_like(embedding)  # its similarity has a deviation of exactly 0
    logits, _ = PerSAM(loud, frame=128).segment(constant, target)
    assert logits.isfinite().all()


def test_segmenting_changes_neither_weights_nor_inputs(loud):
    embedding, target = random_case(loud, seed=0)
    embedding = embedding.float()
    before = copy.deepcopy((loud.state_dict(), embedding, target))
    PerSAM(loud, frame=128).segment(embedding, target)
    torch.testing.assert_close((loud.state_dict(), embedding, target), before, atol=0, rtol=0)
