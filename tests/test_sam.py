"""The frozen SAM against segment_anything's own SamPredictor; downloads against a local server."""

import copy
import hashlib
import os
import pickle
import sys
import threading
import types
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor
from segment_anything.modeling import (
    Sam,
)
from torch.testing import assert_close

from common.frozen import sam_weights
from common.frozen.sam import BatchedPrompter, SamEmbedder, full_masks, probability_grid, squash
from common.frozen.sam_weights import (
    absolute_sam,
    download_checkpoint,
    encoder_fingerprint,
    load_cached_sam,
    load_decoder,
    load_sam,
    sam_fingerprint,
)
from common.runtime.errors import UserError
from common.standin import model as standin

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def demo() -> Sam:
    return load_sam("demo", CPU)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """uint8 (300, 500, 3): soft blobs under fine noise."""
    random = np.random.default_rng(0)
    blobs = Image.fromarray(random.integers(0, 256, (6, 10, 3), dtype=np.uint8)).resize((500, 300))
    noise = random.integers(-20, 21, (300, 500, 3))
    return (np.asarray(blobs) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def predictor_features(vit_b: Sam, picture: np.ndarray) -> torch.Tensor:
    """The embedding that segment_anything itself computes of the picture squashed to 800 x 800."""
    predictor = SamPredictor(vit_b)
    predictor.set_image(
        np.asarray(Image.fromarray(picture).resize((800, 800), Image.Resampling.BILINEAR))
    )
    return predictor.features


# Embedding

def test_the_embedding_is_the_one_that_the_predictor_computes(vit_b, picture, predictor_features):
    embedding = SamEmbedder(vit_b, "fp32").embed(squash(picture, 1024)[None])
    assert embedding.shape == (1, 256, 64, 64) and embedding.dtype == torch.float32
    assert_close(embedding, predictor_features, atol=1e-4, rtol=1e-4)


def test_bfloat16_keeps_the_embedding_to_a_cosine_of_0_999(vit_b, picture, predictor_features):
    embedding = SamEmbedder(vit_b, "bf16").embed(squash(picture, 1024)[None])
    assert embedding.dtype == torch.float32
    assert not torch.equal(embedding, predictor_features), "nothing ran in bfloat16"
    assert F.cosine_similarity(embedding, predictor_features, dim=1).min() >= 0.999


@pytest.mark.parametrize("supported", [True, False])
def test_auto_precision_is_bfloat16_only_where_the_processor_has_it(
    tiny, picture, monkeypatch, supported
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    images = squash(picture, 256)[None]
    auto, fp32 = SamEmbedder(tiny).embed(images), SamEmbedder(tiny, "fp32").embed(images)
    assert torch.equal(auto, fp32) == (not supported)


def test_an_unknown_precision_is_named():
    with pytest.raises(UserError, match="PRECISION=fp16 is unknown: set auto, fp32 or bf16"):
        SamEmbedder(None, "fp16")


def test_a_batch_of_pictures_embeds_as_the_predictor_embeds_each(tiny, picture):
    images = np.stack([squash(p, 256) for p in (picture, 255 - picture, picture[:, ::-1])])
    embeddings = SamEmbedder(tiny, "fp32").embed(images)
    predictor = SamPredictor(tiny)
    for image, embedding in zip(images, embeddings):
        predictor.set_image(image)
        assert_close(embedding, predictor.features[0], atol=1e-4, rtol=1e-4)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.1


def test_a_sam_smaller_than_the_frame_gets_the_picture_resized_once(picture):
    def resized(image: torch.Tensor, size: int) -> torch.Tensor:
        return F.interpolate(image, (size, size), mode="bilinear", antialias=True)

    original = torch.tensor(picture).permute(2, 0, 1)[None].float()
    once, twice = resized(original, 256), resized(resized(original, 800), 256)
    small = torch.tensor(squash(picture, 256)).permute(2, 0, 1)[None]
    # PIL rounds to whole levels after each of its two passes.
    assert (small - once).abs().max() <= 2
    assert (twice - once).abs().max() > 4


# Decoding

def predict_one(sam: Sam, embedding: torch.Tensor, points: torch.Tensor, labels: torch.Tensor):
    """Low-resolution logits and predicted IoU of one image of 800 x 800, by SamPredictor."""
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size, predictor.input_size = (800, 800), (sam.image_encoder.img_size,) * 2
    _, iou, logits = predictor.predict(points.numpy(), labels.numpy(), multimask_output=False)
    return torch.tensor(logits[0]), torch.tensor(iou[0])


@pytest.mark.parametrize("points_per_image", [1, 2, 17])
@pytest.mark.parametrize("name", ["vit_b", "tiny", "demo"])
def test_a_batch_of_different_images_decodes_as_the_predictor_decodes_each(
    name, points_per_image, request
):
    sam = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(points_per_image)
    grid = sam.prompt_encoder.image_embedding_size
    embeddings = torch.randn((3, sam.prompt_encoder.embed_dim, *grid), generator=generator).half()
    points = 800 * torch.rand((3, points_per_image, 2), generator=generator)
    labels = torch.randint(-1, 2, (3, points_per_image), generator=generator)

    prompter = BatchedPrompter(sam, max_batch=2)
    prepared = prompter.prepare(embeddings)
    logits, iou = prompter.decode(prepared, points, labels)

    assert logits.shape == (3, 4 * grid[0], 4 * grid[1]) and logits.dtype == torch.float32
    for i in range(3):
        expected_logits, expected_iou = predict_one(
            sam, embeddings[i].float(), points[i], labels[i]
        )
        assert_close(logits[i], expected_logits, atol=1e-4, rtol=1e-4)
        assert_close(iou[i], expected_iou, atol=1e-4, rtol=1e-4)


def test_one_preparation_serves_every_round(tiny):
    prompter = BatchedPrompter(tiny, max_batch=2)
    embeddings, points = torch.randn(3, 16, 16, 16), 800 * torch.rand(3, 4, 2)
    labels = torch.tensor([[1, 0, 1, 0]]).expand(3, 4)
    prepared = prompter.prepare(embeddings)
    for count in (4, 1, 2):
        once = prompter.decode(prepared, points[:, :count], labels[:, :count])
        afresh = prompter.decode(prompter.prepare(embeddings), points[:, :count], labels[:, :count])
        assert torch.equal(once[0], afresh[0]) and torch.equal(once[1], afresh[1])


def test_points_are_scaled_from_the_frame_that_they_lie_in(tiny):
    embeddings, points = torch.randn(2, 16, 16, 16), 800 * torch.rand(2, 3, 2)
    labels, answers = torch.ones(2, 3, dtype=torch.int64), []
    for frame in (800, 400):
        prompter = BatchedPrompter(tiny, frame=frame)
        answers.append(prompter.decode(prompter.prepare(embeddings), points * frame / 800, labels))
    assert_close(*(logits for logits, _ in answers))


def test_a_decoded_mask_can_enter_a_trained_network(tiny):
    prompter = BatchedPrompter(tiny)
    logits, _ = prompter.decode(
        prompter.prepare(torch.randn(1, 16, 16, 16)),
        torch.full((1, 1, 2), 400.0),
        torch.ones(1, 1, dtype=torch.int64),
    )
    weight = torch.zeros((), requires_grad=True)
    (weight * logits).sum().backward()
    assert_close(weight.grad, logits.sum())


def test_a_cell_of_the_probability_grid_averages_probabilities_not_logits():
    # Half of each cell of 4 columns is surely foreground, by a logit that would outweigh any other
    # in a mean. The two columns in its middle, all that a plain bilinear sample sees, are
    # background.
    columns = torch.tensor([1000.0, -10.0, -10.0, 1000.0]).repeat(8)
    grid = probability_grid(columns.expand(1, 24, 32), (6, 8))
    assert grid.shape == (1, 6, 8)
    assert_close(grid[:, :, 1:-1], torch.full((1, 6, 6), 0.5), atol=1e-3, rtol=0)


def test_a_full_mask_agrees_with_the_predictors_outside_its_outline(vit_b):
    coarse = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(coarse, (256, 256), mode="bicubic")
    mask = full_masks(logits[0, 0], (300, 500))
    official = vit_b.postprocess_masks(logits, (1024, 1024), (300, 500))[0, 0]
    assert mask.dtype == torch.bool and mask.shape == (300, 500)
    away = official.abs() > 0.01
    assert away.float().mean() > 0.95
    assert torch.equal(mask[away], official[away] > 0)


def test_the_fingerprint_changes_with_any_weight_of_the_decoder_or_the_prompt_encoder(tiny):
    same, decoder, prompts = (copy.deepcopy(tiny) for _ in range(3))
    decoder.mask_decoder.output_hypernetworks_mlps[0].layers[-1].bias[-1] += 1e-3
    prompts.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix[0, 0] += 1e-3
    assert sam_fingerprint(same) == sam_fingerprint(tiny)
    assert len({sam_fingerprint(s) for s in (tiny, decoder, prompts)}) == 3


def test_a_sam_with_another_image_encoder_is_not_the_one_that_made_the_cache(demo, monkeypatch):
    other = copy.deepcopy(demo)
    next(other.image_encoder.parameters()).view(-1)[-1] += 1e-3
    assert sam_fingerprint(other) == sam_fingerprint(demo)
    attributes = {"sam": "demo", "sam_fingerprint": sam_fingerprint(demo),
                  "encoder_fingerprint": encoder_fingerprint(demo)}
    load_cached_sam(attributes, CPU)
    monkeypatch.setattr(sam_weights, "load_sam", lambda *_: other)
    with pytest.raises(UserError, match="SAM=demo is not the one that made the cache"):
        load_cached_sam(attributes, CPU)


# Loading

@pytest.fixture(scope="module")
def vit_b_file(vit_b, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(vit_b.state_dict(), path)
    yield path
    path.unlink()  # 375 MB


@pytest.mark.parametrize("prefix", ["", "vit_b:"])
def test_a_checkpoint_is_loaded_from_a_path_and_frozen(vit_b, vit_b_file, prefix):
    sam = load_sam(f"{prefix}{vit_b_file}", CPU)
    assert_close(sam.state_dict(), vit_b.state_dict(), atol=0, rtol=0)
    assert not sam.training and not any(p.requires_grad for p in sam.parameters())


def in_the_name(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def with_an_optimizer(weights: dict) -> dict:
    """As a training script saves them; AdamW keeps two tensors for each parameter."""
    state = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer = {"state": {0: state, 1: state}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
    return {"model": weights, "optimizer": optimizer, "epoch": 3}


def with_a_compiled_encoder(weights: dict) -> dict:
    return {name.replace("image_encoder.", "image_encoder._orig_mod."): value
            for name, value in weights.items()}


def by_modules(weights: dict) -> dict:
    parts = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def in_itself(weights: dict) -> dict:
    content = {"model": weights}
    content["self"] = content
    return content


@pytest.mark.parametrize("wrap", [
    with_an_optimizer,
    lambda weights: with_an_optimizer(in_the_name("module.", weights)),
    lambda weights: {"state_dict": in_the_name("model.sam.", weights)},
    lambda weights: {"checkpoint": {"net": {"ema": weights}}, "best": torch.tensor(0.5)},
    lambda weights: in_the_name("module._orig_mod.", weights),
    lambda weights: in_the_name("sam.", weights) | {"head.weight": torch.zeros(2)},
    with_a_compiled_encoder,
    by_modules,
    in_itself,
], ids=["optimizer", "parallel", "lightning", "deep", "compiled", "beside-a-head", "encoder-alone",
        "modules", "endless"])
def test_a_checkpoint_that_a_training_script_wrapped_is_unwrapped(tiny, monkeypatch, tmp_path,
                                                                  wrap):
    empty = copy.deepcopy(tiny)
    for weight in empty.state_dict().values():
        weight.zero_()
    monkeypatch.setitem(sam_weights.ARCHITECTURES, "vit_b", lambda: empty)
    monkeypatch.setitem(sam_weights.SIZE_OF_WIDTH, 32, "vit_b")
    torch.save(wrap(dict(tiny.state_dict())), tmp_path / "wrapped.pth")
    sam = load_sam(str(tmp_path / "wrapped.pth"), CPU)
    assert_close(sam.state_dict(), tiny.state_dict(), atol=0, rtol=0)


def test_a_safetensors_file_is_read(vit_b, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(vit_b.state_dict(), path)
    assert_close(load_sam(str(path), CPU).state_dict(), vit_b.state_dict(), atol=0, rtol=0)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="mine.safetensors cannot be read"):
        load_sam(str(path), CPU)
    path.unlink()


@pytest.mark.parametrize("key, model", [
    ("detector.backbone.vision_backbone.trunk.patch_embed.proj.weight", "SAM 3"),
    ("detector_model.vision_encoder.backbone.embeddings.patch_embeddings.projection.weight",
     "SAM 3"),
    ("sam_mask_decoder.iou_token.weight", "SAM 2"),
    ("vision_encoder.backbone.patch_embed.projection.weight", "SAM 2"),
    ("mask_decoder.hf_token.weight", "HQ-SAM"),
    ("mask_decoder.hq_token.weight", "HQ-SAM"),
    ("prompt_encoder.bbox_top_left_embeddings.weight", "EfficientSAM"),
    ("image_encoder.blocks.0.Adapter.channel.0.weight", "SAM-Med2D or another SAM with adapters"),
    ("image_encoder.blocks.0.MLP_Adapter.D_fc1.weight", "SAM-Med2D or another SAM with adapters"),
    ("model.22.proto.cv1.conv.weight", "FastSAM, a YOLO"),
    ("shared_image_embedding.positional_embedding", "a SAM under Hugging Face's key names"),
])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_model_of_the_family_is_refused_by_name(tmp_path, prefix, key, model):
    weights = {key: torch.zeros(1), "image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}
    torch.save({"model": in_the_name(prefix, weights)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth holds {model}.* is not read here: set SAM to "
                                        "vit_h, vit_l, vit_b, mobile_sam or the path"):
        load_sam(str(tmp_path / "other.pth"), CPU)


def test_sam_3_which_holds_a_sam_2_is_called_sam_3(tmp_path):
    torch.save({"tracker.sam_mask_decoder.iou_token.weight": torch.zeros(1),
                "detector.backbone.text.weight": torch.zeros(1)}, tmp_path / "sam3.pt")
    with pytest.raises(UserError, match="sam3.pt holds SAM 3"):
        load_sam(str(tmp_path / "sam3.pt"), CPU)


def test_a_yolo_that_was_pickled_whole_is_refused_by_name(tmp_path, monkeypatch):
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    network = type("SegmentationModel", (), {"__module__": "ultralytics.nn.tasks"})
    sys.modules["ultralytics.nn.tasks"].SegmentationModel = network
    torch.save({"model": network(), "epoch": -1}, tmp_path / "FastSAM-s.pt")
    with pytest.raises(UserError, match="FastSAM-s.pt holds FastSAM or another YOLO"):
        load_sam(str(tmp_path / "FastSAM-s.pt"), CPU)


def test_the_stand_in_is_loaded_and_frozen(demo):
    assert not demo.training and not any(p.requires_grad for p in demo.parameters())
    assert_close(demo.state_dict(), standin.build_sam().state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    "width, found, wanted",
    [(1280, "vit_h", "vit_b"), (1024, "vit_l", "vit_b"), (768, "vit_b", "vit_h")],
)
def test_the_width_of_the_weights_tells_the_model_and_a_wrong_name_is_refused(
    tmp_path, width, found, wanted
):
    path = tmp_path / f"sam_{wanted}.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, width)}, path)
    with pytest.raises(UserError, match=f"holds {found}, not {wanted}"):
        load_sam(f"{wanted}:{path}", CPU)


@pytest.mark.parametrize("prefix", ["", "vit_b:"])
def test_a_missing_checkpoint_is_named(tmp_path, prefix):
    with pytest.raises(UserError, match=f"^{tmp_path}/none.pth does not exist: set SAM to"):
        load_sam(f"{prefix}{tmp_path}/none.pth", CPU)


@pytest.mark.parametrize("name", ["", "vit_b:"])
def test_a_name_without_a_file_is_answered_with_those_there_are(name):
    with pytest.raises(UserError, match=f"SAM={name} names no file: set it to one of vit_h, "):
        load_sam(name, CPU)


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, tmp_path / "part.pth")
    with pytest.raises(
        UserError, match="part.pth does not fit vit_b .*Missing key"
    ):
        load_sam(f"{tmp_path}/part.pth", CPU)


@pytest.mark.parametrize("content", [
    {"model": {}}, [1, 2], {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 160)},
], ids=["nested", "list", "width"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth is not a checkpoint of SAM's"):
        load_sam(f"{tmp_path}/other.pth", CPU)


def test_a_file_that_torch_cannot_read_is_refused(tmp_path):
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 8, 8, 768)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (b"<!DOCTYPE html>", b"hello world", whole[:len(whole) // 2]):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(UserError, match="broken.pth cannot be read as a PyTorch file"):
            load_sam(f"{tmp_path}/broken.pth", CPU)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 8, 8, 768)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, where torch.load looks at nothing
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["image_encoder.pos_embed"].count_nonzero() == 1
    with pytest.raises(
        UserError, match="flipped.pth cannot be read as a PyTorch file .*: it is damaged"
    ):
        load_sam(str(path), CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(tmp_path, value):
    path = tmp_path / "wild.pth"
    torch.save({"image_encoder.pos_embed": torch.full((1, 8, 8, 768), value)}, path)
    with pytest.raises(UserError, match="wild.pth holds NaN or infinite values"):
        load_sam(str(path), CPU)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, protocol):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    if protocol == "torch":
        torch.save({"image_encoder.pos_embed": Malicious(marker)}, path)
        torch_load = partial(torch.load, path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
        torch_load = partial(pickle.loads, path.read_bytes())
    with pytest.raises(UserError, match="evil.pth was refused: .* could run code when loaded"):
        load_sam(str(path), CPU)
    assert not marker.exists()
    torch_load()
    assert marker.exists(), "the pickle is harmless, so this test shows nothing"


# Downloading

class Server:
    """A local web server with one file, which it may cut off or send without heeding Range."""

    def __init__(self, content: bytes):
        self.content, self.cut_at, self.heeds_range = content, None, True
        self.ranges = []  # the Range header of each request
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                start = int(asked[len("bytes="):-1]) if asked and server.heeds_range else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(server.content) - start))
                self.end_headers()
                self.wfile.write(server.content[start:server.cut_at])

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/sam_vit_b.pth"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves CONTENT as vit_b; the cache is `tmp_path / "cache"`."""
    server = Server(CONTENT)
    monkeypatch.setenv("ALIGNSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(sam_weights.CHECKPOINTS, "vit_b",
                        (server.url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()))
    yield server
    server.close()


def cached(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


def test_a_checkpoint_is_downloaded_once(server, tmp_path):
    path = download_checkpoint("vit_b")
    assert path == tmp_path / "cache" / "sam_vit_b.pth"
    assert download_checkpoint("vit_b") == path
    assert cached(tmp_path) == {"sam_vit_b.pth": CONTENT}
    assert server.ranges == [None]


def test_load_sam_reads_what_it_downloaded(server):
    with pytest.raises(UserError, match="cache/sam_vit_b.pth cannot be read as a PyTorch file"):
        load_sam("vit_b", CPU)
    assert server.ranges == [None]


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(server, tmp_path):
    server.cut_at = 40_000
    with pytest.raises(UserError, match="run again to go on"):
        download_checkpoint("vit_b")
    assert cached(tmp_path) == {"sam_vit_b.pth.part": CONTENT[:40_000]}
    server.cut_at = None
    download_checkpoint("vit_b")
    assert cached(tmp_path) == {"sam_vit_b.pth": CONTENT}
    assert server.ranges == [None, "bytes=40000-"]


@pytest.mark.parametrize("have, heeds_range", [(40_000, False), (100_001, True)],
                         ids=["range-ignored", "part-too-long"])
def test_a_download_starts_over_where_it_cannot_go_on(server, tmp_path, have, heeds_range):
    server.heeds_range = heeds_range
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sam_vit_b.pth.part").write_bytes(bytes(have))
    download_checkpoint("vit_b")
    assert cached(tmp_path) == {"sam_vit_b.pth": CONTENT}


def test_a_download_with_a_wrong_hash_is_deleted(server, tmp_path):
    server.content = bytes(len(CONTENT))
    with pytest.raises(UserError, match="wrong SHA-256 and was deleted"):
        download_checkpoint("vit_b")
    assert cached(tmp_path) == {}


def test_a_download_of_a_wrong_size_is_not_kept(server, tmp_path):
    server.content = b"<html>Please log in to this network</html>"
    with pytest.raises(UserError, match="the file has 42 bytes, not 100000"):
        download_checkpoint("vit_b")
    assert cached(tmp_path) == {}


@pytest.mark.parametrize("content", [CONTENT[:-1], bytes(len(CONTENT))], ids=["cut-off", "altered"])
def test_a_damaged_file_put_there_by_hand_is_refused_but_kept(server, tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sam_vit_b.pth").write_bytes(content)
    with pytest.raises(
        UserError, match="cache/sam_vit_b.pth is not the published vit_b checkpoint or is cut off"
    ):
        download_checkpoint("vit_b")
    assert cached(tmp_path) == {"sam_vit_b.pth": content}


def test_without_a_network_the_message_says_what_to_put_where(server, tmp_path):
    server.close()
    with pytest.raises(UserError) as error:
        download_checkpoint("vit_b")
    assert f"{server.url} could not be downloaded" in str(error.value)
    assert f"by hand to {tmp_path}/cache/sam_vit_b.pth." in str(error.value)


def test_a_checkpoints_path_is_kept_so_that_other_folders_understand_it(tmp_path, monkeypatch):
    (tmp_path / "half.pth").touch()
    (tmp_path / "vit_h").touch()
    monkeypatch.chdir(tmp_path)
    assert absolute_sam("half.pth") == f"{tmp_path}/half.pth"
    assert absolute_sam("vit_b:./half.pth") == f"vit_b:{tmp_path}/half.pth"
    for name in ("vit_h", "demo", "gone.pth"):
        assert absolute_sam(name) == name


def test_a_decoder_that_never_saw_the_cached_embeddings_is_refused(demo):
    attributes = {"sam": "demo", "sam_fingerprint": sam_fingerprint(demo)}
    decoder = load_decoder(attributes, CPU)
    assert decoder.image_encoder.img_size == 256 and not list(decoder.image_encoder.parameters())
    with pytest.raises(UserError, match="SAM=demo is not the one that made the cache"):
        load_decoder(attributes | {"sam_fingerprint": "0" * 16}, CPU)
