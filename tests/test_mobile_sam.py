"""MobileSAM against its authors' own code, on seeded weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from common.frozen import mobile_sam
from common.frozen.sam import BatchedPrompter, SamEmbedder, squash
from common.frozen.sam_weights import load_decoder, load_sam, sam_fingerprint
from common.results import bench
from common.runtime.errors import UserError
from tests.data.seeded_weights import fill

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "data" / "mobilesam_golden.npz"))


@pytest.fixture(scope="module")
def published(golden) -> dict[str, torch.Tensor]:
    """A checkpoint with the names, shapes and types of the authors' one, and seeded weights."""
    weights = {}
    for key, shape, dtype in zip(golden["keys"], golden["shapes"], golden["dtypes"]):
        sizes = [int(size) for size in shape.split(",") if size]
        weights[str(key)] = torch.zeros(sizes, dtype=getattr(torch, dtype.removeprefix("torch.")))
    fill(weights)
    return weights


@pytest.fixture(scope="module")
def file(published, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.pt"
    torch.save(published, path)
    return path


@pytest.fixture(scope="module")
def sam(file) -> Sam:
    return load_sam(str(file), CPU)


@pytest.fixture(scope="module")
def picture(golden) -> np.ndarray:
    """uint8 (1024, 1024, 3), of which the golden embedding is.

    How the last bit of the bilinear resize is rounded depends on the machine. So the few pixels
    that lie on a rounding tie are kept in the file.
    """
    generator = torch.Generator().manual_seed(7)
    noise = torch.rand(1, 3, 1024, 1024, generator=generator)
    blobs = torch.rand(1, 3, 32, 32, generator=generator)
    blobs = F.interpolate(blobs, (1024, 1024), mode="bilinear")
    pixels = ((noise * 0.2 + blobs * 0.8) * 255).round().byte().numpy()
    pixels.ravel()[golden["ties"]] = golden["tie_values"]
    return pixels[0].transpose(1, 2, 0)


@pytest.fixture(scope="module")
def embedding(sam, picture) -> torch.Tensor:
    return SamEmbedder(sam, "fp32").embed(picture[None])


def test_the_embedding_is_that_of_the_authors_code(embedding, golden):
    assert embedding.shape == (1, 256, 64, 64) and embedding.dtype == torch.float32
    expected = torch.from_numpy(golden["embedding"])
    assert_close(embedding[0, :, ::4, ::4], expected, atol=1e-4, rtol=0)
    assert_close(embedding.mean((2, 3))[0], torch.from_numpy(golden["embedding_mean"]),
                 atol=1e-4, rtol=0)


def test_every_key_of_the_checkpoint_has_its_place_but_those_of_the_classifier(published):
    built = mobile_sam.build_mobile_sam().state_dict()
    renamed = mobile_sam.own_names(published)
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in built.items()}
    assert len(published) == 439 and len(renamed) == 435


def test_bfloat16_keeps_the_embedding_to_a_cosine_of_0_999(sam, picture, embedding):
    rounded = SamEmbedder(sam, "bf16").embed(picture[None])
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, embedding), "nothing ran in bfloat16"
    assert F.cosine_similarity(rounded, embedding, dim=1).min() >= 0.999


def test_attention_is_fused_on_a_cpu(sam):
    attention = sam.image_encoder.stages[1].blocks[0].attn
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        attention(torch.randn(2, 49, 128))
    called = {event.key for event in recorded.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not any("softmax" in name for name in called)


def test_a_picture_is_embedded_and_prompted_as_the_predictor_does(sam, picture):
    photo = picture[:300, :500]
    predictor = SamPredictor(sam)
    squashed = Image.fromarray(photo).resize((800, 800), Image.Resampling.BILINEAR)
    predictor.set_image(np.asarray(squashed))
    ours = SamEmbedder(sam, "fp32").embed(squash(photo, 1024)[None])
    assert_close(ours, predictor.features, atol=1e-4, rtol=1e-4)

    points, labels = np.array([[100.0, 700.0], [420.0, 80.0]]), np.array([1, 0])
    _, _, expected = predictor.predict(points, labels, multimask_output=False)
    prompter = BatchedPrompter(sam)
    logits, _ = prompter.decode(prompter.prepare(ours), torch.tensor(points)[None],
                                torch.tensor(labels)[None])
    assert_close(logits[0], torch.from_numpy(expected[0]), atol=1e-3, rtol=1e-3)


def test_mobile_sam_is_recognised_by_its_keys_and_a_wrong_name_is_refused(file, published, sam):
    assert_close(load_sam(f"mobile_sam:{file}", CPU).state_dict(), sam.state_dict(),
                 atol=0, rtol=0)
    with pytest.raises(UserError, match=f"holds mobile_sam, not vit_b; write mobile_sam:{file}"):
        load_sam(f"vit_b:{file}", CPU)


def test_a_mobile_sam_that_lacks_a_weight_is_refused(published, tmp_path):
    published = {key: value for key, value in published.items() if "layers.2.blocks.5" not in key}
    torch.save(published, tmp_path / "part.pt")
    with pytest.raises(UserError, match="part.pt does not fit mobile_sam .*Missing key"):
        load_sam(str(tmp_path / "part.pt"), CPU)


def test_the_fingerprint_tells_mobile_sam_from_the_sam_whose_decoder_it_has(sam):
    own = sam_fingerprint(sam)
    assert sam_fingerprint(Sam(torch.nn.Identity(), sam.prompt_encoder, sam.mask_decoder)) != own


def test_a_cache_of_mobile_sam_gets_its_decoder(file, sam):
    decoder = load_decoder({"sam": str(file), "sam_fingerprint": sam_fingerprint(sam)}, CPU)
    assert decoder.image_encoder.img_size == 1024
    assert not list(decoder.image_encoder.parameters())


def test_the_benchmark_takes_mobile_sam_with_random_weights(monkeypatch):
    monkeypatch.setattr(bench, "SAM", "mobile_sam")
    monkeypatch.setattr(bench, "load_sam", None)  # nothing is loaded
    first, again = (bench.build_sam(CPU) for _ in range(2))
    assert isinstance(first.image_encoder, mobile_sam.MobileEncoder)
    assert_close(first.state_dict(), again.state_dict(), atol=0, rtol=0)
