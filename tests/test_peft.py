"""SAMed and MSA: what is changed in SAM, what is trained, and the program that trains them."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam

from common.cache import Cache
from common.frozen.mobile_sam import build_mobile_sam
from common.frozen.sam import SamEmbedder, full_masks, squash
from common.images import load_image
from common.results import given_masks
from common.results.pictures import save_picture
from common.rivals import adapters, lora, peft
from common.rivals.finetuned import FineTuned, loss, low_resolution, turned
from common.runtime import files
from common.runtime.errors import UserError
from common.standin.model import Residual, build_sam
from common.standin.scenes import draw_for_task
from tests.conftest import draw_data, one_thread, run
from tests.small_data import make_voc

METHODS = ("SAMed", "MSA")


def demo() -> Sam:
    return build_sam().requires_grad_(False)


def mobile() -> Sam:
    torch.manual_seed(0)
    return build_mobile_sam().eval().requires_grad_(False)


def picture_for(sam: Sam) -> np.ndarray:
    side = sam.image_encoder.img_size
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def stir(model: FineTuned) -> None:
    """Random numbers in the place of what begins at zero."""
    torch.manual_seed(1)
    for weight in model.trained().values():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)


def one_step_back(model: FineTuned, sam: Sam) -> None:
    target = torch.zeros([4 * cells for cells in sam.prompt_encoder.image_embedding_size])
    target[:9] = 1
    loss(model.logits(picture_for(sam)), target.to(torch.uint8)).backward()


# ---- what is changed in SAM

@pytest.mark.parametrize("name", ["demo", "tiny", "vit_b"])
def test_the_first_forward_pass_is_that_of_the_frozen_sam(name, request):
    frozen = demo() if name == "demo" else request.getfixturevalue(name)
    picture, pe = picture_for(frozen), frozen.prompt_encoder.get_dense_pe()
    with torch.no_grad():
        embedding = SamEmbedder(frozen).embed(picture[None])
        sparse, dense = frozen.prompt_encoder(points=None, boxes=None, masks=None)
        expected = frozen.mask_decoder.predict_masks(embedding, pe, sparse, dense)[0][0, 0]
        for method in METHODS:
            logits = FineTuned(copy.deepcopy(frozen), method, texts=1).logits(picture)
            if name == "vit_b":  # without AVX-512 a copy of the weights computes other last digits
                torch.testing.assert_close(logits[1], expected, rtol=0, atol=2e-6)
            else:
                assert torch.equal(logits[1], expected), method
            assert not logits[0].any(), method


@pytest.mark.parametrize("method", METHODS)
def test_segment_anythings_own_encoder_computes_the_same_with_what_was_added(method, tiny):
    sam = copy.deepcopy(tiny)
    pixels = sam.preprocess(torch.randn(1, 3, 256, 256))
    before = sam.image_encoder(pixels)
    model = FineTuned(sam, method, texts=1, precision="fp32")
    stir(model)
    picture = picture_for(sam)
    pixels = sam.preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None])
    official = sam.image_encoder(pixels)
    torch.testing.assert_close(model.embedder.forward(picture[None]), official)
    assert (official - before).abs().max() > 0.01


@pytest.mark.parametrize("method, patterns", [
    ("SAMed", ("qkv.parametrizations.weight.0.", "prompt_encoder.no_mask_embed.",
               "mask_decoder.")),
    ("MSA", (".attn.proj.1.", ".mlp.adapter.", "mask_decoder.")),
])
@pytest.mark.parametrize("name", ["tiny", "mobile"])
def test_only_the_named_weights_receive_gradients(method, patterns, name, tiny):
    sam = copy.deepcopy(tiny) if name == "tiny" else mobile()
    model = FineTuned(sam, method, texts=1)
    reached = set(model.trained())
    if name == "tiny":  # MobileSAM's 1024 pixels a side take long
        one_step_back(model, sam)
        assert reached == {key for key, weight in sam.named_parameters() if weight.grad is not None}
    for key in reached:
        assert any(pattern in key for pattern in patterns), key
    for pattern in patterns:
        assert any(pattern in key for key in reached), pattern
    blocks = 2 if name == "tiny" else 10  # MobileSAM's first stage has no attention
    encoder = [key for key in reached if key.startswith("image_encoder.")]
    assert len(encoder) == blocks * (4 if method == "SAMed" else 8)


@pytest.mark.parametrize("method, kind, each", [
    ("SAMed", torch.nn.Conv2d, 2), ("MSA", Residual, 4)])
def test_in_the_stand_in_convolutions_or_residual_blocks_are_changed(method, kind, each):
    sam = demo()
    count = each * sum(isinstance(module, kind) for module in sam.image_encoder.modules())
    model = FineTuned(sam, method, texts=1)
    one_step_back(model, sam)
    reached = {key for key, weight in sam.named_parameters() if weight.grad is not None}
    assert reached == set(model.trained())
    assert sum(key.startswith("image_encoder.") for key in reached) == count


def test_the_keys_rows_of_every_attention_stay_as_they_were(tiny):
    sam = copy.deepcopy(tiny)
    stir(FineTuned(sam, "SAMed", texts=1))
    for block, frozen in zip(sam.image_encoder.blocks, tiny.image_encoder.blocks):
        changed = (block.attn.qkv.weight != frozen.attn.qkv.weight).any(1).view(3, -1)
        assert changed.all(1).tolist() == [True, False, True]
        assert not changed[1].any()


def test_mobile_sams_queries_and_values_change_and_its_keys_do_not():
    sam = mobile()
    attention = sam.image_encoder.stages[1].blocks[0].attn
    before = attention.qkv.weight.clone()
    stir(FineTuned(sam, "SAMed", texts=1))
    changed = (attention.qkv.weight != before).any(1).float()
    # as its forward pass splits them
    query, key, value = changed.view(attention.num_heads, -1).split(
        [attention.key_dim, attention.key_dim, attention.val_dim], 1)
    assert query.all() and value.all() and not key.any()


def test_a_convolutions_update_has_low_rank():
    sam = demo()
    layer = sam.image_encoder.middle[1].body[0]
    before = layer.weight.clone()
    stir(FineTuned(sam, "SAMed", texts=1))
    update = (layer.weight - before).detach().flatten(1)
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 4  # the authors'


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_the_first_step_reaches_every_update_and_every_adapter(name, tiny):
    """What begins at zero must not stay there: one of two factors alone may be zero."""
    for method in METHODS:
        sam = demo() if name == "demo" else copy.deepcopy(tiny)
        model = FineTuned(sam, method, texts=1)
        one_step_back(model, sam)
        at_zero = {key: weight for key, weight in model.trained().items()
                   if not weight.any() and (".b." in key or ".up.weight" in key)}
        assert at_zero
        for key, weight in at_zero.items():
            assert weight.grad.any(), key


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_each_of_the_decoders_adapters_changes_the_mask(name, tiny):
    sam = demo() if name == "demo" else copy.deepcopy(tiny)
    model, picture = FineTuned(sam, "MSA", texts=1), picture_for(sam)
    parts = {key: part for key, part in sam.mask_decoder.named_modules()
             if isinstance(part, adapters.Adapter)}
    blocks = range(len(sam.mask_decoder.transformer.layers))
    assert set(parts) == {f"transformer.layers.{block}.{part}" for block in blocks for part in (
        "cross_attn_token_to_image.out_proj.1", "mlp.adapter",
        "cross_attn_image_to_token.out_proj.1")}
    with torch.no_grad():
        before = model.logits(picture)[1]
        for key, part in parts.items():
            torch.nn.init.normal_(part.up.weight, std=0.1)
            assert (model.logits(picture)[1] - before).abs().max() > 1e-4, key
            part.up.weight.zero_()


def test_an_adapter_is_a_quarter_as_wide_inside_and_counts_half_beside_an_mlp():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    beside = adapters.Beside(torch.nn.Linear(8, 8), 8)
    down, up = beside.adapter.down, beside.adapter.up
    assert down.weight.shape == (2, 8) and up.weight.shape == (8, 2)
    torch.nn.init.normal_(up.weight)
    expected = beside.mlp(x) + 0.5 * up(F.gelu(down(x)))
    torch.testing.assert_close(beside(x), expected)
    torch.testing.assert_close(adapters.after(beside.mlp)(x), beside.mlp(x))  # up is zero
    behind = adapters.Adapter(8)
    behind.load_state_dict(beside.adapter.state_dict())
    torch.testing.assert_close(behind(x), x + up(F.gelu(down(x))))


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_merged_lora_equals_unmerged(name, tiny):
    sam = demo() if name == "demo" else copy.deepcopy(tiny)
    names = set(sam.image_encoder.state_dict())
    model = FineTuned(sam, "SAMed", texts=1)
    stir(model)
    picture = picture_for(sam)
    with torch.no_grad():
        unmerged = model.logits(picture)
        lora.merge(sam)
        assert torch.equal(model.logits(picture), unmerged)
    assert set(sam.image_encoder.state_dict()) == names


@pytest.mark.parametrize("method", METHODS)
def test_each_class_and_the_background_begin_with_the_same_mask(method):
    sam = demo()
    model = FineTuned(sam, method, texts=3)
    with torch.no_grad():
        logits = model.logits(picture_for(sam))
    assert logits.shape == (4, *(4 * cells for cells in sam.prompt_encoder.image_embedding_size))
    for one in logits[1:]:
        torch.testing.assert_close(one, logits[0])
    assert sum("mask_tokens" in name or "hypernetworks" in name for name in model.trained()) == 25


# ---- how it is trained

def test_the_loss_of_one_text_is_that_of_a_foreground_probability():
    logits, target = torch.randn(2, 6, 5), torch.zeros(6, 5, dtype=torch.uint8)
    logits[0], target[:2], target[5] = 0, 1, 255
    seen, truth = logits[1, :5], (target[:5] == 1).float()
    dice = []
    for probability, own in ((seen.sigmoid(), truth), (1 - seen.sigmoid(), 1 - truth)):
        areas = (probability**2).sum() + own.sum()
        dice.append(1 - 2 * (probability * own).sum() / areas)
    expected = 0.2 * F.binary_cross_entropy_with_logits(seen, truth) + 0.8 * sum(dice) / 2
    torch.testing.assert_close(loss(logits, target), expected)


def test_a_class_that_a_picture_does_not_hold_counts_in_the_cross_entropy_alone():
    logits, target = torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
    target[0] = 1
    sure = logits.clone()
    sure[0, 1:], sure[1, 0], sure[2] = 50, 50, -50
    assert loss(sure, target) < 1e-4  # though class 2 has no place at all
    held = [1 - 2 * count / 3 / (16 / 9 + count) for count in (12, 4)]
    torch.testing.assert_close(loss(logits, target),
                               torch.tensor(0.8 * sum(held) / 2 + 0.2 * np.log(3)).float(),
                               rtol=1e-5, atol=0)


def test_a_picture_has_eight_views():
    square = np.arange(9).reshape(3, 3)
    views = {turned(square, view).tobytes() for view in range(8)}
    assert len(views) == 8 and np.array_equal(turned(square, 0), square)
    colours = turned(np.stack([square] * 3, 2), 5)
    assert np.array_equal(colours[..., 1], turned(square, 5))


def test_the_rate_rises_and_falls(monkeypatch):
    for name, value in {"STEPS": 10, "WARM_UP": 4, "METHOD": "MSA"}.items():
        monkeypatch.setattr(peft, name, value)
    monkeypatch.setattr(peft, "LEARNING_RATE", {"MSA": 2.0})
    rates = [peft.learning_rate(step) for step in range(1, 11)]
    assert rates[:4] == [0.5, 1, 1.5, 2]
    assert rates[4:] == pytest.approx([2 * (left / 7) ** 0.9 for left in (6, 5, 4, 3, 2, 1)])


@pytest.mark.parametrize("method, rate", [("SAMed", 0.003), ("MSA", 0.003)])
def test_two_pictures_are_learned_by_heart(method, rate):
    torch.manual_seed(0)
    sam = demo()
    model = FineTuned(sam, method, texts=1)
    optimizer = torch.optim.AdamW(model.trained().values(), rate)
    scenes = [draw_for_task("saliency", "train", index) for index in range(2)]
    pictures = [squash(scene.image, sam.image_encoder.img_size) for scene in scenes]
    truths = [scene.label_map("saliency") for scene in scenes]
    grid = tuple(4 * cells for cells in sam.prompt_encoder.image_embedding_size)
    targets = [torch.from_numpy(low_resolution(truth, grid)) for truth in truths]
    for _ in range(20):
        total = sum(loss(model.logits(*pair[:1]), pair[1]) for pair in zip(pictures, targets))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for picture, truth in zip(pictures, truths):
        labels = model.segment(picture, truth.shape)
        assert (labels & truth).sum() / (labels | truth).sum() > 0.8


def test_a_mask_is_that_of_full_masks():
    sam = demo()
    model = FineTuned(sam, "MSA", texts=1)
    picture = picture_for(sam)
    with torch.no_grad():
        expected = full_masks(model.logits(picture)[1], (130, 170))
    assert np.array_equal(model.segment(picture, (130, 170)) == 1, expected.numpy())


# ---- the program

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the small data set and its cache."""
    folder = tmp_path_factory.mktemp("peft")
    draw_data(folder)
    done = run(folder, "01_cache_features.py")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def train_in(place, monkeypatch):
    """A function that runs the program in this process, with constants; returns the run folder."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(files, "lock", lambda folder: None)  # this process locks it for each call
    few = {"TASK": "folder", "DATA_DIR": "data", "DEVICE": "cpu", "STEPS": 2, "WARM_UP": 1,
           "BATCH_SIZE": 2, "SAVE_EVERY": 1, "LOG_EVERY": 1,
           "FEATURES": str(place / "runs/folder/features.h5")}

    def train(folder: str, **constants) -> Path:
        for name, value in (few | {"RUN_DIR": folder} | constants).items():
            monkeypatch.setattr(peft, name, value)
        peft.main()
        return Path(folder)

    return train


def state_of(folder: Path, method: str = "samed") -> dict:
    content = torch.load(folder / f"{method}.pt", weights_only=True)
    content.pop("seconds")
    return content


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def masks_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*_masks/*.png")}


def break_in(monkeypatch, what: str, calls: int) -> None:
    """Ctrl-C when the program calls its function `what` for the time after so many `calls`."""
    function, left = getattr(peft, what), [calls]

    def broken(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(peft, what, broken)


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_written_under_the_names_and_in_the_sizes_of_the_images(
        method, train_in, capsys):
    folder = train_in(f"names-{method}", METHOD=method)
    masks = folder / f"{method.lower()}_masks"
    images = {path.stem: path for path in Path("data/test/images").iterdir()}
    assert {path.stem for path in masks.glob("*.png")} == set(images)
    for stem, image in images.items():
        with Image.open(masks / f"{stem}.png") as mask:
            assert mask.mode == "L" and set(np.unique(np.asarray(mask))) <= {0, 255}
            assert np.asarray(mask).shape == load_image(image).shape[:2]
    log = (folder / f"{method.lower()}_log.csv").read_text().splitlines()
    assert log[0] == "step,loss,learning_rate" and [row[0] for row in log[1:]] == ["1", "2"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"next: python 04_evaluate.py TASK=folder RUN_DIR={folder} FEATURES={peft.FEATURES} "
        f"ROWS=none MASKS={method}:{masks} RESULTS={method.lower()}.json")
    training = given_masks.training_of(masks)["training"]
    assert training == state_of(folder, method.lower())["settings"]
    assert (training["method"], training["steps"], training["warm_up"]) == (method, 2, 1)


def test_a_checkpoint_holds_trained_weights_alone(train_in):
    content = state_of(train_in("alone"))
    model = FineTuned(demo(), "SAMed", texts=1)
    assert content["weights"].keys() == model.trained().keys() and content["finished"]
    model.load_state_dict(content["weights"])
    with pytest.raises(ValueError, match="other weights are trained"):
        FineTuned(demo(), "MSA", texts=1).load_state_dict(content["weights"])


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_started_again_it_ends_with_the_same_weights_and_masks(
        method, train_in, monkeypatch):
    straight = train_in(f"straight-{method}", METHOD=method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_in(patch, "loss", 3)  # in the second of two steps
        train_in(f"killed-{method}", METHOD=method)
    killed = Path(f"killed-{method}")
    assert state_of(killed, method.lower())["step"] == 1 and not masks_of(killed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_in(patch, "save_picture", 2)
        train_in(f"killed-{method}", METHOD=method)
    assert len(masks_of(killed)) == 2
    with monkeypatch.context() as patch:
        break_in(patch, "save_picture", 4)  # the other four of six
        train_in(f"killed-{method}", METHOD=method)
    assert masks_of(killed) == masks_of(straight)
    assert same(state_of(killed, method.lower()), state_of(straight, method.lower()))


def test_on_cuda_it_ends_as_on_the_cpu(train_in):
    rehearsal = pytest.importorskip("tests.pretend_cuda", exc_type=ImportError,
                                    reason="this torch has other private names")
    with one_thread():  # as each picture has on a CPU
        cpu = train_in("cpu", PRECISION="fp32")
        with rehearsal.pretend(float("inf")):
            gpu = train_in("gpu", PRECISION="fp32", DEVICE="cuda")
    assert same(state_of(cpu), state_of(gpu)) and masks_of(cpu) == masks_of(gpu)


def test_a_cpu_trains_in_fp32_unless_bf16_is_asked_for(train_in, monkeypatch):
    monkeypatch.setattr("common.frozen.sam.has_bf16", lambda device: True)
    for precision, taken in (("auto", "fp32"), ("bf16", "bf16")):
        assert state_of(train_in(precision, PRECISION=precision))["settings"]["precision"] == taken


def test_masks_of_other_weights_are_made_again_and_missing_ones_too(train_in, monkeypatch):
    folder = train_in("again")
    first = masks_of(folder)
    (folder / "samed_masks/3.png").unlink()
    train_in("again")
    assert masks_of(folder) == first
    for path in folder.glob("samed_masks/*.png"):
        save_picture(Image.new("L", (1, 1)), path)
    kept = masks_of(folder)
    train_in("again")
    assert masks_of(folder) == kept
    (folder / "samed.pt").unlink()
    train_in("again", SEED=1, LEARNING_RATE={"SAMed": 0.05})
    assert masks_of(folder).keys() == first.keys()
    assert not set(masks_of(folder).values()) & set(kept.values())
    assert json.loads((folder / "samed_masks/masks.json").read_text())["images"] == 6


def test_each_picture_is_trained_with_its_own_label_map(train_in, monkeypatch):
    shown = []

    def noting(model, pair):
        picture, target, _ = pair
        shown.append((int(picture[0, 0, 0]), int(target[0, 0])))
        return 0.5, [torch.zeros_like(weight) for weight in model.trained().values()]

    def marked(path, run, row, side):
        return np.full((side, side, 3), row, np.uint8)

    monkeypatch.setattr(peft, "read_picture", marked)
    monkeypatch.setattr(Cache, "every_label", lambda cache, row: row)
    monkeypatch.setattr(peft, "low_resolution", lambda row, size: np.full(size, row, np.uint8))
    monkeypatch.setattr(peft, "gradients_of", noting)
    monkeypatch.setattr(peft, "write_masks", lambda *arguments: None)
    train_in("pairs", BATCH_SIZE=8)
    assert len(shown) == 2 * 8 and all(picture == target for picture, target in shown)
    assert len(set(shown)) == 8  # all drawn samples


def test_a_mask_is_white_where_its_text_was_found(tmp_path, monkeypatch):
    answers = {4: np.array([[1, 2, 0], [2, 2, 0]]), 7: np.array([[0, 1, 1], [2, 0, 0]])}
    test_set = np.array([[4, 0], [4, 1], [7, 1]])
    cache = SimpleNamespace(samples=lambda split: {"test": test_set}[split], size=lambda row: row)
    run = SimpleNamespace(cache=cache, attributes={"sam": "demo"})
    model = SimpleNamespace(segment=lambda picture, size: answers[picture],
                            sam=SimpleNamespace(image_encoder=SimpleNamespace(img_size=8)))
    monkeypatch.setattr(peft, "read_picture", lambda path, run, row, side: row)
    names = {4: ["a-star", "a-ring"], 7: ["b-star", "b-ring"]}
    peft.write_masks(model, run, {4: None, 7: None}, names, {}, "0", tmp_path)
    found = {path.stem: np.asarray(Image.open(path)) // 255 for path in tmp_path.glob("*.png")}
    assert found.keys() == {"a-star", "a-ring", "b-ring"}  # the image b holds no star
    for name, mask in (("a-star", answers[4] == 1), ("a-ring", answers[4] == 2),
                       ("b-ring", answers[7] == 2)):
        assert np.array_equal(found[name], mask), name


@pytest.mark.parametrize("view", range(8))
def test_a_picture_and_its_label_map_are_turned_together(view, monkeypatch):
    marked = np.arange(16, dtype=np.uint8).reshape(4, 4)
    seen = {}

    def logits(picture):
        seen["picture"] = picture
        return torch.ones(1, requires_grad=True)

    def one(logits, target):
        seen["target"] = target.numpy()
        return logits.sum()

    weight = torch.ones(1, requires_grad=True)
    model = SimpleNamespace(sam=SimpleNamespace(device=torch.device("cpu")),
                            trained=lambda: {"weight": weight},
                            logits=lambda picture: logits(picture) * weight)
    monkeypatch.setattr(peft, "loss", one)
    assert peft.gradients_of(model, (marked, marked, view)) == (1, (torch.ones(1),))
    assert np.array_equal(seen["picture"], turned(marked, view))
    assert np.array_equal(seen["target"], seen["picture"])


def test_a_step_goes_along_the_mean_gradient_at_the_rate_of_that_step(train_in, monkeypatch):
    per_picture, steps = iter([1.0, 3.0, 2.0, 6.0]), []

    def gradients_of(model, shown):
        value = next(per_picture)
        return value, [torch.full_like(weight, value) for weight in model.trained().values()]

    def step(optimizer):
        (group,) = optimizer.param_groups
        grads = {value for weight in group["params"] for value in weight.grad.unique().tolist()}
        steps.append((grads, group["lr"], group["weight_decay"]))

    monkeypatch.setattr(peft, "gradients_of", gradients_of)
    monkeypatch.setattr(peft, "side_by_side", lambda compute, parts, _: list(map(compute, parts)))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    folder = train_in("mean", WEIGHT_DECAY=0.25, LEARNING_RATE={"SAMed": 2.0})
    rates = [peft.learning_rate(step) for step in (1, 2)]
    assert steps == [({2.0}, rates[0], 0.25), ({4.0}, rates[1], 0.25)]
    assert [row["loss"] for row in state_of(folder)["log"]] == [2, 4]


def test_a_row_of_the_log_is_the_mean_since_the_row_before_and_the_last_step_has_one(
        train_in, monkeypatch):
    losses = iter([1.0, 3.0, 8.0])
    monkeypatch.setattr(peft, "gradients_of", lambda model, shown: (
        next(losses), [torch.zeros_like(weight) for weight in model.trained().values()]))
    monkeypatch.setattr(peft, "side_by_side", lambda compute, parts, _: list(map(compute, parts)))
    folder = train_in("rows", STEPS=3, BATCH_SIZE=1, LOG_EVERY=2, SAVE_EVERY=3)
    rows = [(row["step"], row["loss"]) for row in state_of(folder)["log"]]
    assert rows == [(2, 2.0), (3, 8.0)]


@pytest.mark.parametrize("augment", [True, False])
def test_views_are_shown_unless_augment_is_off(augment, train_in, monkeypatch):
    gradients_of, views = peft.gradients_of, []

    def noting(model, shown):
        views.append(shown[2])
        return gradients_of(model, shown)

    monkeypatch.setattr(peft, "gradients_of", noting)
    train_in(f"augment-{augment}", AUGMENT=augment)
    assert len(views) == 4 and any(views) == augment


def test_the_first_shots_are_trained_on(train_in, monkeypatch):
    seen = []
    monkeypatch.setattr(peft, "train", lambda *given: seen.append(given[3]) or "")
    train_in("shots-all")
    train_in("shots-3", SHOTS=3)
    assert len(seen[0]) == 8 and seen[1] == seen[0][:3]
    with pytest.raises(UserError, match="SHOTS=9 is more than the 8 samples drawn in "):
        train_in("shots-9", SHOTS=9)


def test_a_data_set_of_classes_has_a_mask_for_each_class_in_an_image(
        tmp_path, monkeypatch, train_in):
    monkeypatch.chdir(tmp_path)
    make_voc(tmp_path / "voc", train=("c", "a"), test=("b",))
    done = run(tmp_path, "01_cache_features.py", "TASK=voc", "DATA_DIR=voc", "SHOTS=2", "PROMPT=")
    assert done.returncode == 0, done.stderr
    seen = []
    monkeypatch.setattr(peft, "loss", lambda logits, target: (
        seen.append((logits.shape, np.unique(target).tolist())), logits.mean())[1])
    folder = train_in("runs/voc", TASK="voc", DATA_DIR="voc", FEATURES="")
    assert seen[0] == ((21, 128, 128), [0, 1, 2, 20, 255])
    assert set(masks_of(folder)) == {"b-aeroplane.png", "b-bicycle.png", "b-tvmonitor.png"}


@pytest.mark.parametrize("constants, sentence", [
    ({"METHOD": "LoRA"}, "METHOD=LoRA is unknown: set SAMed or MSA"),
    ({"WARM_UP": 3}, "WARM_UP=3 is more than STEPS=2: set it lower"),
    ({"DATA_DIR": "nowhere"}, "nowhere"),
    ({"SAM": "gone.pth"}, "gone.pth does not exist"),
])
def test_what_cannot_be_is_refused_before_anything_is_written(constants, sentence, train_in):
    with pytest.raises(UserError, match=sentence):
        train_in("refused", **constants)
    assert not Path("refused/samed.pt").exists()


@pytest.fixture
def copied(place, train_in) -> Path:
    """A copy of the data set, to be harmed; it lies in the current folder."""
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("data", "copy")
    return Path("copy/train/images")


def drawn(folder: Path) -> Path:
    """The image file of the first training sample."""
    with_cache = peft.open_run({"TASK": "folder", "DEVICE": "cpu", "RUN_DIR": "",
                                "FEATURES": "runs/folder/features.h5"})
    return folder / (with_cache.cache.name(with_cache.cache.drawn(0)[0]) + ".jpg")


def test_images_that_are_gone_or_have_another_size_are_named_at_once(copied, train_in):
    (copied.parent / "masks" / drawn(copied).with_suffix(".png").name).unlink()
    drawn(copied).unlink()
    Image.new("RGB", (20, 10)).save("copy/test/images/3.jpg")
    Image.new("L", (20, 10)).save("copy/test/masks/3.png")
    name = drawn(copied).stem
    with pytest.raises(UserError, match="^2 images of .*features.h5 are not in copy, or have "
                       fr"another size now \(train/{name}, test/3\): set DATA_DIR"):
        train_in("harmed", DATA_DIR="copy")


def test_another_picture_of_the_same_size_is_refused(copied, train_in):
    image = load_image(drawn(copied))
    Image.fromarray(255 - image).save(drawn(copied))
    with pytest.raises(UserError, match="is not the picture that .*features.h5 was made from"):
        train_in("other", DATA_DIR="copy")


def test_a_file_of_the_users_is_named_before_training(train_in):
    Path("theirs/samed_masks").mkdir(parents=True)
    Image.new("L", (9, 9)).save("theirs/samed_masks/3.png")
    with pytest.raises(UserError, match=r"theirs/samed_masks/3.png was not written by AlignSAM"):
        train_in("theirs")
    assert not Path("theirs/samed.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(train_in):
    train_in("settings")
    with pytest.raises(UserError, match="samed.pt was made with SEED=0, and now it is 1"):
        train_in("settings", SEED=1)
