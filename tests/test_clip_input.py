"""What CLIP is given, and how its maps reach the grid, against open_clip and literal figures."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam

from common.frozen.clip_surgery import ClipSurgery, encode_texts, min_max, surgery_tokens
from common.frozen.clip_weights import load_clip
from common.frozen.models import FrozenModels
from common.frozen.sam import SamEmbedder
from common.frozen.sam_weights import load_sam
from tests.conftest import one_thread

SIZE = 64  # of the small CLIP's picture, in patches of 16
CONFIG = {"embed_dim": 32, "quick_gelu": True,
          "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 16},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1,
                       "layers": 1}}

# A colour and what it becomes by the mean and deviation that OpenAI published for CLIP.
RED, RED_FOR_CLIP = (255, 0, 0), (1.9303361, -1.7520971, -1.4802198)
GREEN, GREEN_FOR_CLIP = (0, 255, 0), (-1.7922626, 2.0748837, -1.4802198)
BLUE, BLUE_FOR_CLIP = (0, 0, 255), (-1.7922626, -1.7520971, 2.1458969)
WHITE, WHITE_FOR_CLIP = (255, 255, 255), (1.9303361, 2.0748837, 2.1458969)


@pytest.fixture(scope="module")
def small() -> open_clip.CLIP:
    """A random CLIP that open_clip itself built."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


def noise(height: int, width: int) -> np.ndarray:
    """A uint8 picture in which no two channels, rows or columns are alike."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def flag(height: int, width: int) -> np.ndarray:
    """Four quarters: red and green above, blue and white below."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return picture


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.tensor(picture).permute(2, 0, 1)[None]


def close(ours: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that fills with what `module` is called with, in the order of the images."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        with one_thread():  # several would work side by side, in any order
            yield seen
    finally:
        hook.remove()


def reaching(model: open_clip.CLIP, surgery: ClipSurgery, images: torch.Tensor) -> torch.Tensor:
    """What the first layer of the image tower is given, (B, 3, S, S)."""
    with inputs_of(model.visual.conv1) as seen:
        surgery.maps(images)
    return torch.cat(seen)


def test_a_picture_reaches_clip_as_open_clips_own_preprocessing_makes_it(small, tokenizer):
    picture = noise(SIZE, SIZE)  # of CLIP's own size, so that no resizing differs
    expected = open_clip.image_transform(SIZE, is_train=False)(Image.fromarray(picture))[None]
    surgery = ClipSurgery(small, tokenizer, SIZE, ["shadow"])
    close(reaching(small, surgery, as_tensor(picture)), expected)
    close(reaching(small, surgery, as_tensor(picture) / 255), expected)


def test_colours_reach_clip_in_the_order_rgb_by_openais_published_figures(small, tokenizer):
    colours = torch.tensor([RED, GREEN, BLUE, WHITE], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    given = reaching(small, ClipSurgery(small, tokenizer, SIZE, ["shadow"]), images)
    expected = torch.tensor([RED_FOR_CLIP, GREEN_FOR_CLIP, BLUE_FOR_CLIP, WHITE_FOR_CLIP])
    close(given[:, :, 0, 0], expected)
    assert torch.equal(given, given[:, :, :1, :1].expand_as(given))


@pytest.mark.parametrize("name, expected", [
    ("ViT-B-16-quickgelu/openai", WHITE_FOR_CLIP),
    ("ViT-B-16-quickgelu/{file}", WHITE_FOR_CLIP),
    ("ViT-L-14/laion2b_s32b_b82k", (1.0, 1.0, 1.0)),  # was trained with 0.5 and 0.5
])
def test_a_loaded_clip_is_given_the_colours_it_was_trained_with(
        small, tokenizer, tmp_path, monkeypatch, name, expected):
    file = tmp_path / "clip.pt"
    torch.save(small.state_dict(), file)
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: CONFIG)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: file)
    model, _ = load_clip(name.format(file=file), "cpu")
    white = torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    given = reaching(model, ClipSurgery(model, tokenizer, SIZE, ["shadow"]), white)
    close(given[0, :, 0, 0], torch.tensor(expected))


def test_the_map_of_a_single_text_subtracts_the_empty_string_in_every_template(small, tokenizer):
    """Li et al.: the feature of "" is averaged over the same 85 templates as that of a text."""
    of_the_scene = ("there is a {} in the scene.", "there is the {} in the scene.",
                    "this is a {} in the scene.", "this is the {} in the scene.",
                    "this is one {} in the scene.")
    prompts = [template("") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    prompts += [template.format("") for template in of_the_scene]
    one_by_one = [small.encode_text(tokenizer(prompt), normalize=True) for prompt in prompts]
    empty = F.normalize(torch.cat(one_by_one).mean(0), dim=-1)

    picture = noise(SIZE, SIZE)
    text = encode_texts(small, tokenizer, ["shadow"])[0]
    seen = open_clip.image_transform(SIZE, is_train=False)(Image.fromarray(picture))[None]
    patches = surgery_tokens(small.visual, seen)[:, 1:]
    expected = min_max(patches @ (text - empty)[:, None]).view(1, 1, 4, 4)
    close(ClipSurgery(small, tokenizer, SIZE, ["shadow"]).maps(as_tensor(picture)), expected, 1e-3)


@pytest.fixture(scope="module")
def sam() -> Sam:
    """The stand-in, which sees 256 x 256 pixels."""
    return load_sam("demo", torch.device("cpu"))


def frozen_models(sam: Sam, small: open_clip.CLIP, tokenizer, clip_size: int) -> FrozenModels:
    surgery = ClipSurgery(small, tokenizer, clip_size, ["shadow", "glass"])
    return FrozenModels(SamEmbedder(sam, "fp32"), surgery, 800)


@pytest.fixture(scope="module")
def frozen(sam, small, tokenizer) -> FrozenModels:
    """The two together; CLIP is made to see 192 x 192 pixels."""
    return frozen_models(sam, small, tokenizer, 192)


def squashed_by_torch(picture: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3) float, by torch's own antialiased bilinear filter."""
    image = as_tensor(picture).float()
    square = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    return square[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("shape", [(300, 500), (700, 90), (64, 64)])
def test_sam_and_clip_see_the_same_picture_each_squashed_once_to_its_own_size(frozen, shape):
    picture = noise(*shape)
    for_sam, for_clip = frozen.see(picture)
    for seen, side in ((for_sam, 256), (for_clip, 192)):
        assert seen.shape == (side, side, 3) and seen.dtype == np.uint8
        assert np.abs(seen - squashed_by_torch(picture, side)).max() < 1.01  # Pillow rounds twice


@pytest.mark.parametrize("shape", [(300, 500), (700, 90)])
def test_quarters_of_a_picture_reach_both_models_in_their_places_and_colours(
        small, sam, frozen, shape):
    black = np.zeros((9, 9, 3), np.uint8)
    with inputs_of(small.visual.conv1) as by_clip, inputs_of(sam.image_encoder) as by_sam:
        frozen.compute([frozen.see(black), frozen.see(flag(*shape))])
    for_clip, for_sam = torch.cat(by_clip), torch.cat(by_sam)
    assert for_clip.shape == (2, 3, 192, 192) and for_sam.shape == (2, 3, 256, 256)
    corners = [(row, column) for row in (0, -1) for column in (0, -1)]
    expected = torch.tensor([RED_FOR_CLIP, GREEN_FOR_CLIP, BLUE_FOR_CLIP, WHITE_FOR_CLIP])
    close(torch.stack([for_clip[1, :, row, column] for row, column in corners]), expected)
    mean, deviation = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])  # SAM's
    expected = (torch.tensor([RED, GREEN, BLUE, WHITE]) - mean) / deviation
    close(torch.stack([for_sam[1, :, row, column] for row, column in corners]), expected)


def stretched_by_numpy(maps: np.ndarray, side: int) -> np.ndarray:
    """(..., h, w) to (..., side, side): linear between the centres of cells, along either axis."""
    for axis in (-2, -1):
        cells = maps.shape[axis]
        centres = (np.arange(side) + 0.5) / side * cells - 0.5
        maps = np.apply_along_axis(
            lambda line, at=centres: np.interp(at, np.arange(len(line)), line), axis, maps)
    return maps


@pytest.mark.parametrize("patches", [16, 40])  # a side: fewer and more than the embedding has cells
def test_maps_are_stretched_bilinearly_from_clips_grid_to_that_of_the_embedding(
        sam, small, tokenizer, patches):
    frozen = frozen_models(sam, small, tokenizer, 16 * patches)
    seen = [frozen.see(noise(200, 300)), frozen.see(noise(300, 200))]
    embeddings, maps = frozen.compute(seen)
    assert embeddings.shape == (2, 64, 32, 32)
    surgery = ClipSurgery(small, tokenizer, 16 * patches, ["shadow", "glass"])
    raw = surgery.maps(torch.cat([as_tensor(for_clip) for _, for_clip in seen]))
    assert raw.shape == (2, 2, patches, patches)
    close(maps, torch.from_numpy(stretched_by_numpy(raw.numpy(), 32)).float())


def test_the_embedding_is_that_of_the_picture_for_sam(sam, frozen):
    seen = [frozen.see(noise(200, 300)), frozen.see(noise(300, 200))]
    expected = SamEmbedder(sam, "fp32").embed(np.stack([for_sam for for_sam, _ in seen]))
    assert torch.equal(frozen.compute(seen)[0], expected)
