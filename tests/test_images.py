"""The oddities of real picture files."""

import numpy as np
import pytest
from PIL import Image

from common.images import image_size, load_image
from common.runtime.errors import UserError
from tests.small_data import (
    SEEN_AT,
    half,
    label_map_of,
    one,
    palette_mask,
    photograph,
    picture,
    save,
    seen,
)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_grey_and_cmyk_jpegs_come_out_as_rgb(tmp_path, mode):
    colour = {"L": 128, "RGB": (200, 30, 60), "CMYK": (55, 225, 195, 0)}[mode]
    path = save(tmp_path / "x.jpg", Image.new(mode, (16, 8), colour), quality=95)
    image = load_image(path)
    expected = (128, 128, 128) if mode == "L" else (200, 30, 60)
    assert image.shape == (8, 16, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 6  # JPEG's loss


def test_palette_and_16_bit_pngs_come_out_as_rgb(tmp_path):
    path = save(tmp_path / "palette.png", palette_mask([[0, 1], [2, 3]]))
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert load_image(path).reshape(4, 3).tolist() == colours
    path = save(tmp_path / "deep.png", np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    assert load_image(path)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_floats_and_few_bits_in_16_are_refused_by_name_and_true_16_bits_are_not(tmp_path):
    bright = np.full((6, 8), 4096, np.uint16)
    assert load_image(save(tmp_path / "16.png", bright)).tolist() == picture(value=16).tolist()
    assert load_image(save(tmp_path / "8.png", half().astype(np.uint16))).max() == 255
    twelve_bits = bright - 1
    for name, values in (("12.png", twelve_bits), ("12.tif", twelve_bits.astype(np.int32)),
                         ("float.tif", bright.astype(np.float32) / 4096)):
        path = save(tmp_path / name, values)
        with pytest.raises(UserError, match=rf"{path} .*: save it with 8 bits a channel"):
            load_image(path)
    with pytest.raises(UserError, match=r"masks/x\.png .* end at 4095"):
        label_map_of(one(tmp_path, mask=twelve_bits))


@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])  # right or wrong, it does not matter
@pytest.mark.parametrize("options", [
    {"format": "JPEG"}, {"format": "MPO"}, {"format": "PNG"}, {"format": "WEBP"},
    {"format": "TIFF"}, {"format": "TIFF", "compression": "tiff_lzw"},
    {"format": "TIFF", "compression": "jpeg"},
], ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("orientation", SEEN_AT)
def test_photographs_of_any_format_are_turned_as_exif_says(tmp_path, orientation, options,
                                                           extension):
    stored, exif = photograph(orientation)
    path = save(tmp_path / f"x.{extension}", stored, exif=exif, **options)
    image = load_image(path)
    assert ((image[..., 0] > 127) == seen(orientation)).all()
    assert image_size(path) == image.shape[:2] == seen(orientation).shape


def test_negative_numbers_are_refused_and_not_taken_for_black(tmp_path):
    path = save(tmp_path / "x.tif", np.array([[-1, 0], [1, 1]], np.int32))
    with pytest.raises(UserError, match=rf"{path} holds negative numbers"):
        load_image(path)


@pytest.mark.parametrize("read", [load_image, image_size])
@pytest.mark.parametrize("extension", ["gif", "tif", "webp", "png"])
def test_a_file_of_several_pages_or_frames_is_refused(tmp_path, read, extension):
    frames = [Image.fromarray(picture(value=value)) for value in (10, 90, 200)]
    path = save(tmp_path / f"x.{extension}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=rf"{path} holds 3 pages or frames"):
        read(path)


def test_the_second_picture_in_a_cameras_jpeg_is_passed_over(tmp_path):
    photo, preview = Image.fromarray(picture(value=90)), Image.fromarray(picture(3, 4))
    path = save(tmp_path / "x.jpg", photo, format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as stored:
        assert stored.n_frames == 2
    assert load_image(path).shape == (*image_size(path), 3) == (6, 8, 3)


def test_the_size_is_read_from_the_header_of_a_jpeg(tmp_path, monkeypatch):
    path = save(tmp_path / "x.jpg", picture(30, 40))
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load",
                        lambda self: pytest.fail("decoded"))
    assert image_size(path) == (30, 40)


@pytest.mark.parametrize("read", [load_image, image_size])
@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_a_file_that_is_no_picture_is_named(tmp_path, read, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read(path)


@pytest.mark.parametrize("kind", ["a link to nothing", "a folder"])
def test_what_is_no_file_is_named_as_a_broken_picture_is(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"cannot read .*x\.png as a picture .*replace it"):
        load_image(path)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_truncated_image_is_named(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"short.{extension}", noise)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"short\.{extension}"):
        load_image(path)
