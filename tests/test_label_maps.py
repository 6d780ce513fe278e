"""Masks as people and tools write them, and the label maps read from them."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.datasets import list_samples
from common.images import load_image
from common.label_maps import check_samples, load_label_map, read_mask, untrainable, with_skip
from common.runtime.errors import UserError
from common.tasks import get_task, with_foreground
from tests.small_data import (
    SEEN_AT,
    half,
    label_map_of,
    make,
    make_voc,
    one,
    pair,
    palette_mask,
    photograph,
    picture,
    save,
    seen,
    task_of,
)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("orientation", SEEN_AT)
def test_a_mask_of_the_viewed_photograph_is_left_as_it_is(tmp_path, orientation, scale):
    stored, exif = photograph(orientation)
    mask = 255 * seen(orientation).repeat(scale, 0).repeat(scale, 1)
    sample = one(tmp_path, stored, mask, exif)
    assert (label_map_of(sample) == seen(orientation)).all()


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_stored_pixels_is_turned_with_its_photograph(tmp_path, orientation, scale):
    stored, exif = photograph(orientation)
    sample = one(tmp_path, stored, stored.repeat(scale, 0).repeat(scale, 1), exif)
    assert (label_map_of(sample) == seen(orientation)).all()


def test_a_nearly_square_mask_of_the_stored_pixels_is_still_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # seen a quarter turn clockwise
    sample = one(tmp_path, picture(100, 101), half(100, 101), exif)
    label_map = label_map_of(sample)
    assert label_map.shape == (101, 100)
    assert label_map[:50].all() and not label_map[51:].any()


def test_a_mask_of_a_square_photograph_is_taken_as_viewed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    sample = one(tmp_path, picture(8, 8), half(8, 8), exif)
    assert label_map_of(sample).tolist() == half(8, 8, top=1).tolist()


def bilevel():
    return Image.fromarray(half()).convert("1")


def grey_palette():
    mask = Image.fromarray(half(top=1))
    mask.putpalette([0, 0, 0, 255, 255, 255])
    return mask


@pytest.mark.parametrize("mask", [
    pytest.param(half(), id="255"),
    pytest.param(half(top=128), id="128"),
    pytest.param(half(top=1), id="0 and 1"),
    pytest.param(half().repeat(3).reshape(6, 8, 3), id="RGB"),
    pytest.param(bilevel(), id="1 bit"),
    pytest.param(grey_palette(), id="palette"),
    pytest.param(half().astype(np.uint16) * 257, id="16 bit"),
    pytest.param(half(top=1).astype(np.uint16), id="16 bit, 0 and 1"),
])
def test_binary_masks_of_any_mode_are_read(tmp_path, mask):
    label_map = label_map_of(one(tmp_path, mask=mask))
    assert label_map.dtype == np.uint8
    assert label_map.tolist() == half(top=1).tolist()


def test_grey_levels_up_to_127_on_an_outline_are_background(tmp_path):
    mask = half(60, 80)
    mask[0, 40], mask[0, 41] = 127, 128
    expected = half(60, 80, top=1)
    expected[0, 41] = 1
    sample = one(tmp_path, mask=mask, image=picture(60, 80))
    assert label_map_of(sample).tolist() == expected.tolist()


def ringed():
    mask = half(top=1)
    mask[:, 3] = 255
    return mask


@pytest.mark.parametrize("white", [True, False])
def test_255_beside_0_and_1_is_ignored(tmp_path, white):
    task = replace(task_of("folder"), white_is_foreground=white)
    sample = one(tmp_path, mask=ringed())
    label_map = load_label_map(sample, task, (6, 8))
    assert label_map[0].tolist() == ([1, 1, 1, 255, 0, 0, 0, 0] if white
                                     else [0, 0, 0, 255, 1, 1, 1, 1])


def test_a_dark_palette_colour_on_black_is_foreground(tmp_path):
    mask = Image.fromarray(half(top=1))
    mask.putpalette([0, 0, 0, 128, 0, 0])  # the red that labelme writes
    assert label_map_of(one(tmp_path, mask=mask)).tolist() == half(top=1).tolist()


def two_colours():
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[:, :2], mask[:, 2:4] = (0, 128, 0), (255, 255, 0)
    return mask


def dark_on_yellow():
    mask = np.full((6, 8, 3), (255, 255, 0), np.uint8)
    mask[:, :4] = (0, 0, 160)
    return mask


def white_with_alpha():
    mask = np.full((6, 8, 4), 255, np.uint8)
    mask[..., 3] = half()
    return mask


@pytest.mark.parametrize("mask, said", [
    (two_colours(), r"holds several colours .#ffff00, #008000.: .*FOREGROUND=#ffff00, for one"),
    (dark_on_yellow(), "holds several colours .#ffff00, #0000a0."),
    (white_with_alpha(), "has its shape in its transparency"),
])
def test_a_mask_that_is_not_white_on_black_is_refused_and_not_guessed(tmp_path, mask, said):
    with pytest.raises(UserError, match=rf"x\.png {said}"):
        label_map_of(one(tmp_path, mask=mask))


def test_transparency_that_says_the_same_as_the_colours_is_no_fault(tmp_path):
    mask = np.repeat(half()[..., None], 4, 2)
    assert label_map_of(one(tmp_path, mask=mask)).tolist() == half(top=1).tolist()


def test_a_binary_mask_that_holds_class_numbers_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.png holds the grey level 15 .*FOREGROUND=15"):
        label_map_of(one(tmp_path, mask=half(top=15)))


@pytest.mark.parametrize("top", [1, 3])
def test_the_noise_of_an_empty_jpeg_mask_is_background(tmp_path, top):
    mask = np.full((16, 16), top, np.uint8)
    sample = one(tmp_path, mask=mask, image=picture(16, 16), mask_name="x.jpg")
    assert load_image(sample.mask).max() == top  # what JPEG itself makes of it
    assert not label_map_of(sample).any()


def test_voc_masks_are_read_as_indices_with_255_kept(tmp_path):
    sample = list_samples(get_task("voc"), make_voc(tmp_path))[0]
    with Image.open(sample.mask) as stored:
        assert stored.mode == "P"
    assert label_map_of(sample, "voc").tolist() == [[0, 1, 2, 255], [0, 0, 20, 255]]


def test_an_index_beyond_the_classes_is_named_with_its_file(tmp_path):
    sample = list_samples(get_task("voc"), make_voc(tmp_path))[0]
    with pytest.raises(UserError, match=r"a\.png holds the index 20,.* 1 to 6"):
        label_map_of(sample, "demo_semantic")


@pytest.mark.parametrize("mask, file_format, said", [
    (picture(), "PNG", "holds RGB pixels and no palette indices: save each class as its number"),
    (half(top=3), "JPEG", "is a JPEG inside"),
])
def test_a_voc_mask_whose_class_numbers_are_lost_is_named(tmp_path, mask, file_format, said):
    sample = one(tmp_path)
    Image.fromarray(mask).save(sample.mask, format=file_format)
    with pytest.raises(UserError, match=rf"x\.png {said}"):
        label_map_of(sample, "voc")


def write_png(path, width, depth, colour, rows):
    """A PNG of a depth that Pillow cannot write. rows: bytes; colour: 0 for grey, 2 for RGB."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))


FOUR_BITS = (8, 4, 0, [b"\x33\x33\0\0"] * 6)  # width 8, of 6 rows, the left half is 3


def test_a_number_is_not_looked_for_in_4_bits_of_grey_nor_black_in_the_lower_half_of_16_bits(
        tmp_path):
    sample = one(tmp_path)
    write_png(sample.mask, *FOUR_BITS)
    with pytest.raises(UserError, match=r"x\.png has fewer than 8 bits of grey"):
        asked(sample, "51")
    with pytest.raises(UserError, match=r"x\.png has fewer than 8 bits of grey"):
        label_map_of(sample, "voc")
    write_png(sample.mask, 8, 16, 2, [b"\0\x01" * 12 + b"\0" * 24] * 6)
    with pytest.raises(UserError, match=r"x\.png has 16 bits a channel"):
        label_map_of(sample)


def test_a_colour_image_of_12_bits_in_16_is_refused(tmp_path):
    path = tmp_path / "deep.png"
    write_png(path, 4, 16, 2, [b"\x0f\xff" * 12] * 4)
    with pytest.raises(UserError, match=r"deep\.png has 16 bits a channel, of which it uses 12 at"):
        load_image(path)
    write_png(path, 4, 16, 2, [b"\x10\x00" * 12] * 4)
    assert load_image(path).max() == 16


def test_grey_class_numbers_of_8_bits_are_read_as_voc_masks(tmp_path):
    assert label_map_of(one(tmp_path, mask=half(top=20)), "voc").max() == 20


def test_a_mask_of_another_size_is_resized_to_the_nearest_label(tmp_path):
    mask = np.array([[0, 1, 20], [255, 2, 0]], np.uint8)
    label_map = label_map_of(one(tmp_path, picture(4, 6), palette_mask(mask)), "voc")
    assert label_map.tolist() == mask.repeat(2, 0).repeat(2, 1).tolist()


@pytest.mark.parametrize("width, fits", [(985, True), (1015, True), (975, False), (1025, False)])
def test_a_mask_may_differ_from_its_images_aspect_by_2_percent(tmp_path, width, fits):
    sample = one(tmp_path, picture(200, 200), half(1000, width))
    if fits:
        assert label_map_of(sample).shape == (200, 200)
    else:
        with pytest.raises(UserError, match=rf"x\.png is {width} x 1000, .* x\.jpg of 200 x 200"):
            label_map_of(sample)


def test_a_mask_that_is_no_picture_is_named(tmp_path):
    sample = one(tmp_path)
    sample.mask.write_text("polygons")
    with pytest.raises(UserError, match=r"x\.png"):
        label_map_of(sample)


@pytest.mark.parametrize("label_map, state", [
    ([[0, 0]], "empty"), ([[1, 1]], "full"), ([[0, 255]], "empty"), ([[3, 255]], "full"),
    ([[255, 255]], "empty")])
def test_an_empty_or_a_full_training_mask_cannot_be_trained_on(label_map, state):
    assert untrainable(np.array(label_map, np.uint8)).startswith(state)


@pytest.mark.parametrize("label_map", [[[0, 1]], [[2, 3]], [[0, 255, 20]]])
def test_a_mask_with_something_and_something_else_can_be_trained_on(label_map):
    assert untrainable(np.array(label_map, np.uint8)) is None


def asked(sample, foreground):
    """The first row of the label map with that FOREGROUND."""
    task = with_foreground(task_of("folder"), foreground)
    return load_label_map(sample, task, (6, 8))[0].tolist()


def numbers():
    """0, 0, 1, 1, 3, 3, 255, 255 in every row."""
    return np.repeat(np.array([[0, 1, 3, 255]], np.uint8), 2, 1).repeat(6, 0)


@pytest.mark.parametrize("mask", [
    pytest.param(numbers(), id="grey"), pytest.param(palette_mask(numbers()), id="palette"),
    pytest.param(np.repeat(numbers()[..., None], 3, 2), id="RGB"),
    pytest.param(numbers().astype(np.uint16), id="16 bit")])
@pytest.mark.parametrize("foreground, row", [
    ("3", [0, 0, 0, 0, 1, 1, 255, 255]), ("7", [0, 0, 0, 0, 0, 0, 255, 255]),
    ("255", [0, 0, 0, 0, 0, 0, 1, 1]), ("any", [0, 0, 1, 1, 1, 1, 255, 255])])
def test_foreground_names_a_number_and_255_is_ignored_unless_it_is_named(
        tmp_path, mask, foreground, row):
    assert asked(one(tmp_path, mask=mask), foreground) == row


@pytest.mark.parametrize("foreground, row", [
    ("#008000", [1, 1, 0, 0, 0, 0, 0, 0]), ("#FFFF00", [0, 0, 1, 1, 0, 0, 0, 0]),
    ("any", [1, 1, 1, 1, 0, 0, 0, 0]), ("#000000", [0, 0, 0, 0, 1, 1, 1, 1])])
def test_foreground_names_a_colour(tmp_path, foreground, row):
    assert asked(one(tmp_path, mask=two_colours()), foreground) == row


def test_what_is_transparent_is_not_the_foreground_that_is_named(tmp_path):
    assert asked(one(tmp_path, mask=white_with_alpha()), "any") == half(top=1)[0].tolist()


@pytest.mark.parametrize("mask, name, foreground, said", [
    (two_colours(), "x.png", "3", "holds colours, and FOREGROUND=3 is a number"),
    (half(top=3), "x.jpg", "3", "is compressed with loss"),
    (half(top=3), "x.webp", "any", "is compressed with loss"),
    (palette_mask(numbers()), "x.gif", "3", "is a GIF, whose palette indices change"),
    (np.maximum(half(top=170), half(width=8)[:, ::-1]), "x.png", "any",
     "holds the grey levels 170 and 255, which may be to ignore")])
def test_a_mask_in_which_foreground_cannot_be_told_is_refused(tmp_path, mask, name, foreground,
                                                              said):
    with pytest.raises(UserError, match=rf"{name} {said}"):
        asked(one(tmp_path, mask=mask, mask_name=name), foreground)


@pytest.mark.parametrize("foreground", ["0", "-1", "red", "#ff00", "#gg0000", "3.5", "100000"])
def test_a_foreground_that_is_no_number_colour_or_any_is_refused(foreground):
    with pytest.raises(UserError, match=f"FOREGROUND={foreground} must be a grey level"):
        with_foreground(task_of("folder"), foreground)


def test_foreground_is_for_the_task_folder_alone():
    assert with_foreground(task_of("voc"), "") == task_of("voc")
    with pytest.raises(UserError, match="FOREGROUND=3 is for TASK=folder"):
        with_foreground(task_of("voc"), "3")


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_with_exif_data_of_its_own_is_turned_by_these_alone(tmp_path, orientation):
    stored, exif = photograph(orientation)
    sample = one(tmp_path, stored, None, exif)
    Image.fromarray(stored).save(sample.mask, exif=exif)
    assert (label_map_of(sample) == seen(orientation)).all()


def test_a_mask_that_exif_data_of_its_own_have_turned_is_not_turned_again(tmp_path):
    stored, exif = photograph(6)
    sample = one(tmp_path, stored, None, exif)
    Image.fromarray(255 * seen(6)).save(sample.mask, exif=exif)  # turned already, by its look
    with pytest.raises(UserError, match=r"x\.png is 48 x 16, which does not fit x\.jpg of 16 x 48"):
        label_map_of(sample)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (0, 128, 0), (90, 40, 10)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_one_colour_on_black_is_foreground_however_dark(tmp_path, colour, mode):
    mask = (half(top=1)[..., None] * np.array(colour)).astype(np.uint8)
    sample = one(tmp_path, mask=Image.fromarray(mask).convert(mode))
    label_map, how = read_mask(sample, task_of("folder"), (6, 8))
    assert label_map.tolist() == half(top=1).tolist()
    assert how == f"#{bytes(colour).hex()} on black"


def test_an_edge_brighter_than_the_brightest_colour_is_foreground(tmp_path):
    mask = (half(top=1)[..., None] * np.array((200, 50, 50))).astype(np.uint8)
    mask[:2][half(top=1)[:2] == 1] = (204, 46, 46)  # a darker sum, a brighter red
    label_map, how = read_mask(one(tmp_path, mask=mask), task_of("folder"), (6, 8))
    assert label_map.tolist() == half(top=1).tolist() and how == "#c83232 on black"


def test_a_mask_without_a_known_pixel_is_named_before_anything_is_computed(tmp_path):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    for sample in samples:
        save(sample.mask, half(top=3))
    save(samples[2].mask, np.full((6, 8), 255, np.uint8))
    task = with_foreground(task_of("folder"), "3")
    with pytest.raises(UserError, match=f"^{samples[2].mask} holds nothing but 255 .ignore.; or "
                                        f"leave them out by SKIP={samples[2].place}$"):
        check_samples(samples, task)


@pytest.mark.parametrize("first, second, said", [
    (palette_mask(half(top=1)), (half(top=1)[..., None] * [0, 0, 255]).astype(np.uint8),
     "several colours .#800000 in .*#0000ff in"),
    (half(), palette_mask(half(top=1)),
     "several colours .#800000 in train_b.png, white in train_a.png"),
    (half(), ringed(), "255 is ignored beside 0 and 1 in train_b.png, and is all that train_a.png"),
])
def test_masks_that_are_plain_one_by_one_may_not_contradict_each_other(tmp_path, first, second,
                                                                       said):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    masks = [first, second, first, first]
    for sample, mask in zip(samples, masks):
        save(sample.mask, mask)
    with pytest.raises(UserError, match=said):
        check_samples(samples, task_of("folder"))


def test_white_in_a_palette_does_not_contradict_white_levels(tmp_path):
    samples = list_samples(task_of("folder"), make(tmp_path, "folder"))
    save(samples[0].mask, grey_palette())
    assert [sample.how for sample in check_samples(samples, task_of("folder"))] == [
        "palette indices 0 and 1", *["0 and 255"] * 3]


def test_what_foreground_names_may_be_missing_from_a_mask_and_that_is_said(tmp_path):
    task = with_foreground(task_of("folder"), "7")
    assert read_mask(one(tmp_path, mask=numbers()), task, (6, 8))[1] == (
        "FOREGROUND=7 (not in it), 255 = ignored")


def test_all_faults_of_the_masks_are_said_at_once_before_anything_is_computed(tmp_path):
    root = make(tmp_path, "folder")
    samples = list_samples(task_of("folder"), root)
    crc = zlib.crc32(half(top=1))
    assert check_samples(samples, task_of("folder")) == [((6, 8), "0 and 255", 0.5, crc)] * 4
    for sample in samples[1:3]:
        Image.fromarray(half(top=15)).save(sample.mask)
    with pytest.raises(UserError) as error:
        check_samples(samples, task_of("folder"))
    assert all(f"{sample.mask} holds the grey level 15" in str(error.value)
               for sample in samples[1:3])
    for number in range(12):
        pair(root / "test/images", root / "test/masks", f"bad{number:02}")
        Image.fromarray(half(top=15)).save(root / f"test/masks/bad{number:02}.png")
    with pytest.raises(UserError, match="; and 4 more; or leave them out by SKIP=test/") as error:
        check_samples(list_samples(task_of("folder"), root), task_of("folder"))
    assert str(error.value).partition("SKIP=")[2].count("/") == 14  # all of them


def test_a_skip_that_is_proposed_is_one_word_of_the_shell():
    assert with_skip({"train/my photo": "it is full"}).endswith("SKIP='train/my photo'")


@pytest.mark.parametrize("count, listed", [(100, True), (101, False)])
def test_a_whole_data_set_of_faults_is_not_listed_in_one_skip(count, listed):
    said = with_skip({f"train/{number}": "it is full" for number in range(count)})
    assert said.endswith("out by SKIP=names.txt, a list of their names") != listed
    assert ("train/99" in said) == listed and f"and {count - 10} more" in said


@pytest.mark.parametrize("name", ["cuhk", "sbu", "msd", "duts", "demo_shadow"])
@pytest.mark.parametrize("palette", [False, True])
def test_in_the_papers_data_sets_a_level_of_1_beside_white_is_noise(tmp_path, name, palette):
    mask = half()
    mask[0, 7] = 1
    if palette:
        mask = Image.fromarray(mask)
        mask.putpalette(np.arange(256).repeat(3).tolist())  # a grey ramp
    sample = one(tmp_path, mask=mask)
    assert load_label_map(sample, task_of(name), (6, 8)).tolist() == half(top=1).tolist()


def test_a_grey_ramp_as_a_palette_is_read_as_its_levels(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30], mask[:3, :3] = 255, 1
    mask = Image.fromarray(mask)
    mask.putpalette(np.arange(256).repeat(3).tolist())
    with pytest.raises(UserError, match="much more 255, .* set FOREGROUND=1 if that is meant"):
        label_map_of(one(tmp_path, mask=mask))


@pytest.mark.parametrize("orientation, said", [(1, False), (2, True), (3, True), (4, True),
                                               (6, False)])
def test_photographs_that_exif_turns_without_a_trace_in_their_shape_are_named(
        tmp_path, capsys, orientation, said):
    stored, exif = photograph(orientation)
    sample = one(tmp_path, stored, 255 * seen(orientation), exif)
    check_samples([sample], task_of("folder"))
    assert (f"EXIF turns or mirrors {sample.image.name}, " in capsys.readouterr().out) == said


@pytest.mark.parametrize("orientation", [6, 7])
def test_a_square_photograph_that_exif_turns_by_a_quarter_is_named(tmp_path, capsys, orientation):
    stored, exif = photograph(orientation)
    sample = one(tmp_path, stored[:, :16], 255 * seen(orientation)[:16, :16], exif)
    check_samples([sample], task_of("folder"))
    assert "EXIF turns or mirrors x.jpg, " in capsys.readouterr().out


def test_1_beside_255_is_black_where_there_is_no_0(tmp_path):
    mask = np.where(half() > 0, 255, 1).astype(np.uint8)  # as some tools save black and white
    assert np.array_equal(label_map_of(one(tmp_path, mask=mask)), half(top=1))


def test_foreground_1_and_any_find_what_a_mask_of_1_bit_has(tmp_path):
    mask = Image.fromarray(half()).convert("1")
    for foreground in ("1", "any"):
        assert asked(one(tmp_path, mask=mask), foreground) == half(top=1)[0].tolist()


def test_vocs_palette_ends_at_its_20th_class(tmp_path):
    assert label_map_of(one(tmp_path, mask=palette_mask(half(top=20))), "voc").max() == 20
    with pytest.raises(UserError, match="21"):
        label_map_of(one(tmp_path, mask=palette_mask(half(top=21))), "voc")


@pytest.mark.parametrize("task", ["folder", "voc"])
@pytest.mark.parametrize("orientation", [*range(2, 9)])
def test_a_masks_own_exif_data_turn_it(tmp_path, task, orientation):
    stored, exif = photograph(orientation)
    exif_of_image = Image.Exif()
    exif_of_image[0x0112] = orientation
    sample = one(tmp_path, stored, stored, exif_of_image)
    mask = Image.fromarray(stored if task == "folder" else (stored > 0).astype(np.uint8))
    mask.save(sample.mask, exif=exif)
    assert np.array_equal(label_map_of(sample, task), seen(orientation))


def test_the_share_of_foreground_is_that_of_the_pixels_that_count(tmp_path):
    mask = np.array([[1, 1, 0, 255], [1, 0, 0, 255]], np.uint8)
    sample = one(tmp_path, picture(2, 4), palette_mask(mask))
    assert [checked.foreground for checked in check_samples([sample], task_of("voc"))] == [0.5]


def test_an_image_of_several_classes_may_hold_nothing_but_ignored_pixels(tmp_path):
    sample = one(tmp_path, picture(2, 4), palette_mask(np.full((2, 4), 255)))
    assert [checked.foreground for checked in check_samples([sample], task_of("voc"))] == [0.0]


@pytest.mark.parametrize("alpha, found", [(127, 0), (128, 1)])
def test_what_is_more_than_half_transparent_is_not_the_foreground_that_is_named(
        tmp_path, alpha, found):
    mask = np.zeros((6, 8, 4), np.uint8)
    mask[:, :4], mask[..., 3] = [255, 0, 0, 0], 255
    mask[:, :4, 3] = alpha
    assert asked(one(tmp_path, mask=mask), "#ff0000") == [found] * 4 + [0] * 4


def test_numbers_below_0_are_refused_where_foreground_names_one(tmp_path):
    mask = half().astype(np.int32) - 1
    with pytest.raises(UserError, match="holds the number -1: save it with numbers from 0 on"):
        asked(one(tmp_path, mask=mask, mask_name="x.tiff"), "3")


@pytest.mark.parametrize("level, refused", [(63, False), (64, True)])
def test_255_beside_a_light_grey_is_not_ignored_in_silence(tmp_path, level, refused):
    mask = half(top=level)
    mask[:, 7] = 255
    if refused:
        with pytest.raises(UserError, match="and 255, which may be to ignore or a target too"):
            asked(one(tmp_path, mask=mask), "any")
    else:
        assert asked(one(tmp_path, mask=mask), "any") == [1] * 4 + [0] * 3 + [255]


@pytest.mark.parametrize("ignored, refused", [(4, False), (5, True)])
def test_255_is_ignored_beside_1_up_to_four_times_as_much_of_it(tmp_path, ignored, refused):
    mask = np.zeros((6, 8), np.uint8)
    mask[:, 0], mask[:, 1:1 + ignored] = 1, 255
    if refused:
        with pytest.raises(UserError, match="much more 255"):
            label_map_of(one(tmp_path, mask=mask))
    else:
        assert np.array_equal(label_map_of(one(tmp_path, mask=mask)), mask)


def test_255_that_marks_much_more_than_1_is_not_ignored_in_silence(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30], mask[:3, :3] = 255, 1
    with pytest.raises(UserError, match="much more 255, .* set FOREGROUND=1 if that is meant"):
        label_map_of(one(tmp_path, mask=mask))


def test_a_mask_of_many_levels_is_not_told_to_name_one_of_them(tmp_path):
    blocks = np.linspace(60, 230, 16).astype(np.uint8).reshape(4, 4)
    mask = np.pad(np.kron(blocks, np.ones((10, 10), np.uint8)), 4)
    with pytest.raises(UserError, match="save it with the two levels 0 and 255$"):
        label_map_of(one(tmp_path, mask=mask))
