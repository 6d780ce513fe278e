"""CLIP Surgery against its authors' own outputs; what `load_clip` says of unusable weights."""

import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from common.frozen import clip_surgery, clip_weights
from common.frozen.clip_surgery import (
    ClipSurgery,
    encode_texts,
    feature_surgery,
    min_max,
    single_text_similarity,
    surgery_tokens,
)
from common.frozen.clip_weights import absolute_clip, load_clip
from common.runtime.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "data" / "clip_surgery_golden.npz")
# Rows 0 to 2 of the golden tokens; row 3 stands for the empty string.
CLASSES = ("first", "second", "third")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"out/{name}"])


def golden_state() -> dict[str, torch.Tensor]:
    return {key.removeprefix("weights/"): torch.from_numpy(GOLDEN[key]) for key in GOLDEN.files
            if key.startswith("weights/")}


def golden_config() -> dict:
    """open_clip's config of the golden network: 7 blocks of width 64, 64 px, patches of 16."""
    size = {
        key.removeprefix("config/"): int(GOLDEN[key]) for key in GOLDEN.files if "config/" in key
    }
    return {
        "embed_dim": size["embed"],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": size["res"],
            "layers": size["layers"],
            "width": size["width"],
            "patch_size": size["patch"],
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": size["vocab"],
            "width": size["tw"],
            "heads": size["tw"] // 64,
            "layers": size["tl"],
        },
    }


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    model = open_clip.CLIP(**golden_config()).eval().requires_grad_(False)
    model.load_state_dict(golden_state(), strict=True)
    return model


def golden_tokenizer(prompts: list[str]) -> torch.Tensor:
    """A prompt about a class becomes its golden tokens: their mean is the golden feature."""
    rows = [
        next((row for row, text in enumerate(CLASSES) if text in prompt), 3) for prompt in prompts
    ]
    return golden("tokens")[rows]


golden_tokenizer.encode = str.split  # a tokenizer also tells how long a text is


def resized_as_by_the_authors(maps: torch.Tensor) -> torch.Tensor:
    """The stored maps were stretched bilinearly to 64 x 64 and have the classes last."""
    return F.interpolate(maps, (64, 64), mode="bilinear").permute(0, 2, 3, 1)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_token_features_are_the_authors(model):
    assert_equal(surgery_tokens(model.visual, golden("image")), golden("image_features"))


def test_text_features_are_the_authors(model):
    ours = encode_texts(model, golden_tokenizer, [*CLASSES, ""])
    assert_equal(ours, golden("text_features"))


def test_feature_surgery_is_the_authors_for_each_image_of_a_batch():
    ours = feature_surgery(golden("image_features"), golden("text_features")[:3])
    assert_equal(ours, golden("multi_similarity"))


def test_similarity_to_one_text_is_the_authors():
    text = golden("text_features")
    ours = single_text_similarity(golden("image_features"), text[:1], text[3:])
    assert_equal(ours, golden("single_similarity"))


@pytest.mark.parametrize("texts, name", [(CLASSES, "multi_map"), (CLASSES[:1], "single_map")])
def test_maps_are_the_authors_in_a_batch_and_image_by_image(model, texts, name):
    surgery = ClipSurgery(model, golden_tokenizer, 96, texts)
    raw = golden("image") * surgery.std + surgery.mean  # the stored images are normalised already
    assert_equal(resized_as_by_the_authors(surgery.maps(raw)), golden(name))
    single = torch.cat([surgery.maps(image[None]) for image in raw])
    assert_equal(resized_as_by_the_authors(single), golden(name))


def test_the_class_token_is_open_clips_own_image_feature(model):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_equal(
        surgery_tokens(model.visual, images)[:, 0], model.encode_image(images, normalize=True)
    )


@pytest.mark.parametrize("size", [64, 100, 200])
def test_images_of_any_size_and_either_dtype_give_one_cell_per_patch(model, size):
    surgery = ClipSurgery(model, golden_tokenizer, 128, CLASSES)
    images = torch.randint(
        0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)
    ).byte()
    maps = surgery.maps(images)
    assert maps.shape == (2, 3, 8, 8) and maps.dtype == torch.float32
    assert_equal(maps.amin(dim=(2, 3)), torch.zeros(2, 3))
    assert_equal(maps.amax(dim=(2, 3)), torch.ones(2, 3))
    assert_equal(surgery.maps(images / 255), maps)


def test_an_image_is_shrunk_as_by_pillow(model):
    surgery = ClipSurgery(model, golden_tokenizer, 128, CLASSES)
    image = torch.rand(3, 500, 500, generator=torch.Generator().manual_seed(0))
    channels = [Image.fromarray(channel.numpy()) for channel in image]
    shrunk = [np.asarray(channel.resize((128, 128), Image.BILINEAR)) for channel in channels]
    assert_equal(surgery.maps(image[None]), surgery.maps(torch.from_numpy(np.stack(shrunk))[None]))


def test_a_constant_similarity_gives_zeros():
    assert min_max(torch.full((1, 4, 2), 0.3)).eq(0).all()


def test_min_max_stretches_a_small_span_too():
    similarity = torch.tensor([0.3, 0.30005, 0.3001])[None, :, None]
    torch.testing.assert_close(min_max(similarity)[0, :, 0], torch.tensor([0, 0.5, 1]),
                               atol=1e-3, rtol=0)


def test_min_max_is_taken_per_image_and_class():
    similarity = torch.tensor(
        [[[0.0, 3.0], [1.0, 5.0], [4.0, 4.0]], [[-1.0, 0.0], [0.0, 9.0], [1.0, 0.0]]]
    )
    expected = torch.tensor(
        [[[0.0, 0.0], [0.25, 1.0], [1.0, 0.5]], [[0.0, 0.0], [0.5, 1.0], [1.0, 0.0]]]
    )
    assert_equal(min_max(similarity), expected)


def test_each_text_is_put_into_85_different_prompts(model):
    asked = []

    def tokenizer(prompts):
        asked.append(prompts)
        return golden_tokenizer(prompts)

    encode_texts(model, tokenizer, ["shadow", "glass"])
    for text, prompts in zip(("shadow", "glass"), asked, strict=True):
        assert len(prompts) == len(set(prompts)) == 85
        assert all(text in prompt for prompt in prompts)
        assert f"a photo of a {text}." in prompts and f"this is one {text} in the scene." in prompts


def test_prompts_are_normalised_before_they_are_averaged():
    class LengthCoder(torch.nn.Module):
        """Encodes a prompt as one of two vectors of very different lengths."""

        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.conv1 = torch.nn.Conv2d(3, 1, 1)

        def encode_text(self, tokens):
            return torch.where(tokens > 0, torch.tensor([100.0, 0.0]), torch.tensor([0.0, 1.0]))

    def odd(prompts):
        return torch.arange(len(prompts))[:, None] % 2

    expected = F.normalize(torch.tensor([[42.0, 43.0]]), dim=-1)  # of 85 prompts 42 are odd
    assert_equal(encode_texts(LengthCoder(), odd, ["shadow"]), expected)


def test_an_input_size_that_patches_do_not_tile_is_named(model):
    with pytest.raises(
        UserError, match="CLIP_SIZE=100 is not a multiple of CLIP's patch size 16: set 112"
    ):
        ClipSurgery(model, golden_tokenizer, 100, CLASSES)


def add_standin(folder: Path, monkeypatch) -> None:
    (folder / "clip_config.json").write_text(json.dumps(golden_config()))
    safetensors.torch.save_file(golden_state(), folder / "clip.safetensors")
    monkeypatch.setattr(clip_weights, "STANDIN", folder)


def test_the_standin_is_loaded_in_float32_without_gradients(model, tmp_path, monkeypatch):
    add_standin(tmp_path, monkeypatch)  # float16 on disk
    loaded, tokenizer = load_clip("demo", "cpu")
    assert tokenizer(["shadow"]).shape == (1, 77)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_equal(surgery_tokens(loaded.visual, golden("image")), golden("image_features"))


@pytest.mark.parametrize("missing", ["clip_config.json", "clip.safetensors"])
def test_a_missing_file_of_the_standin_is_named(tmp_path, monkeypatch, missing):
    add_standin(tmp_path, monkeypatch)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} does not exist: restore common/standin"):
        load_clip("demo", "cpu")


def test_the_official_architecture_is_loaded_from_a_file_and_mapped(tmp_path, monkeypatch):
    # 85 take long on a CPU.
    monkeypatch.setattr(clip_surgery, "TEMPLATES", clip_surgery.TEMPLATES[:2])
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    weights = {key: value.half() for key, value in open_clip.CLIP(**config).state_dict().items()}
    checkpoint = tmp_path / "clip.pt"
    state = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 1, "state_dict": state}, checkpoint)
    model, tokenizer = load_clip(f"ViT-B-16-quickgelu/{checkpoint}", "cpu")
    assert_equal(model.visual.proj, weights["visual.proj"].float())
    maps = ClipSurgery(model, tokenizer, 224, ("shadow", "glass")).maps(torch.rand(1, 3, 800, 800))
    assert maps.shape == (1, 2, 14, 14)
    assert maps.min() == 0 and maps.max() == 1


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(
        UserError, match="'ViT-B' is not a model of open_clip: .*ViT-B-16-quickgelu"
    ):
        load_clip("ViT-B/16/openai", "cpu")


@pytest.mark.parametrize("name", ["RN50-quickgelu/openai", "ViT-B-16-SigLIP/webli",
                                  "ViT-L-14-CLIPA/datacomp1b", "convnext_base/laion400m_s13b_b51k",
                                  "coca_ViT-B-32/laion2b_s13b_b90k",
                                  "ViT-H-14-worldwide/metaclip2_worldwide"])
def test_a_model_that_surgery_does_not_fit_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"'{name.split('/')[0]}' is not a plain CLIP ViT"):
        load_clip(name, "cpu")


@pytest.mark.parametrize("source", ["opnai", "weights/gone.pt", "/weights/gone.pt"])
def test_neither_a_tag_nor_a_file_is_named_with_the_tags_there_are(source):
    with pytest.raises(
        UserError, match=rf"^{source} does not exist: name in CLIP .*ViT-B-16-quickgelu \(openai, "
    ):
        load_clip(f"ViT-B-16-quickgelu/{source}", "cpu")


def test_a_weights_files_path_is_kept_so_that_other_folders_understand_it(tmp_path, monkeypatch):
    (tmp_path / "openai").touch()
    (tmp_path / "mine.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert absolute_clip("ViT-B-16-quickgelu/mine.pt") == f"ViT-B-16-quickgelu/{tmp_path}/mine.pt"
    for name in ("ViT-B-16-quickgelu/openai", "demo", "ViT-B-16-quickgelu/gone.pt"):
        assert absolute_clip(name) == name


def test_a_model_without_weights_is_named_with_the_tags_there_are():
    with pytest.raises(UserError, match="CLIP=ViT-B-16-quickgelu names no weights: .*openai"):
        load_clip("ViT-B-16-quickgelu", "cpu")


def test_quickgelu_weights_under_a_model_without_it_are_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: pytest.fail("downloaded"))
    with pytest.raises(UserError, match="write 'ViT-B-16-quickgelu/openai'"):
        load_clip("ViT-B-16/openai", "cpu")


def test_openais_own_weights_in_a_file_are_refused_without_quickgelu(tmp_path):
    # The three sizes are what OpenAI's files hold beside the weights.
    checkpoint = tmp_path / "openai.pt"
    torch.save({"input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
                "vocab_size": torch.tensor(49408)}, checkpoint)
    with pytest.raises(UserError, match=f"write 'ViT-B-16-quickgelu/{checkpoint}'"):
        load_clip(f"ViT-B-16/{checkpoint}", "cpu")


def test_openais_own_weights_in_a_file_are_loaded(tmp_path, monkeypatch):
    add_standin(tmp_path, monkeypatch)
    extra = {key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")}
    safetensors.torch.save_file(golden_state() | extra, tmp_path / "clip.safetensors")
    loaded, _ = load_clip("demo", "cpu")
    assert_equal(loaded.visual.proj, golden_state()["visual.proj"].float())


def test_a_failed_download_is_one_sentence(monkeypatch):
    def refuse(tag):
        raise URLError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    with pytest.raises(
        UserError, match=r"'ViT-B-16-quickgelu/openai' could not be downloaded .*no network"
    ):
        load_clip("ViT-B-16-quickgelu/openai", "cpu")


def test_weights_of_another_shape_are_named(tmp_path):
    checkpoint = tmp_path / "small.safetensors"
    safetensors.torch.save_file(golden_state(), checkpoint)
    with pytest.raises(UserError, match=f"'{checkpoint}' does not fit 'ViT-S-32/"):
        load_clip(f"ViT-S-32/{checkpoint}", "cpu")


def test_weights_with_a_flipped_bit_are_named(tmp_path):
    checkpoint = tmp_path / "flipped.pt"
    torch.save({"visual.proj": torch.zeros(64, 64)}, checkpoint)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, where torch.load looks at nothing
    checkpoint.write_bytes(content)
    assert torch.load(checkpoint, weights_only=True)["visual.proj"].count_nonzero() == 1
    with pytest.raises(
        UserError, match=f"'{checkpoint}' cannot be read as weights .*is not what was written"
    ):
        load_clip(f"ViT-S-32/{checkpoint}", "cpu")


@pytest.mark.parametrize("name", ["wild.pt", "wild.safetensors"])
def test_weights_that_are_not_finite_are_named(tmp_path, name):
    checkpoint, weights = tmp_path / name, {"visual.proj": torch.full((2, 2), float("nan"))}
    save = safetensors.torch.save_file if name.endswith("s") else torch.save
    save(weights, checkpoint)
    with pytest.raises(UserError, match=f"'{checkpoint}' holds NaN or infinite values"):
        load_clip(f"ViT-S-32/{checkpoint}", "cpu")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "code.pt"])
def test_a_file_that_holds_no_plain_weights_is_named_and_runs_nothing(tmp_path, name):
    checkpoint = tmp_path / name
    if name == "code.pt":
        torch.save({"state_dict": Touch(tmp_path / "ran")}, checkpoint)
    else:
        checkpoint.write_bytes(b"these are no weights")
    with pytest.raises(UserError, match=f"'{checkpoint}' cannot be read as weights"):
        load_clip(f"ViT-S-32/{checkpoint}", "cpu")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore")  # torch says that TorchScript is deprecated
def test_a_torchscript_file_is_named_with_the_way_to_extract_its_weights(tmp_path):
    checkpoint = tmp_path / "ViT-B-16.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), checkpoint)
    with pytest.raises(UserError, match=r"torch\.jit\.load\('in\.pt', 'cpu'\)\.state_dict\(\)"):
        load_clip(f"ViT-B-16-quickgelu/{checkpoint}", "cpu")


def test_the_words_that_clip_does_not_see_are_said(capsys):
    model, tokenizer = load_clip("demo", "cpu")
    ClipSurgery(model, tokenizer, 64, ["rusty bolt"])
    assert capsys.readouterr().out == ""
    ClipSurgery(model, tokenizer, 64, [" ".join(["rusty"] * 70 + ["bolt"])])
    said = capsys.readouterr().out
    assert said.startswith("CLIP reads only the beginning") and said.strip().endswith("rusty bolt")
