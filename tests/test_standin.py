"""The demo's scenes, the five data sets made of them, and the stand-ins trained on such scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage
from torch.nn import functional as F

from common.datasets import list_samples
from common.frozen import clip_weights
from common.images import load_image
from common.label_maps import load_label_map
from common.runtime import checkpoint, files
from common.runtime.errors import UserError
from common.standin import model, scenes
from common.standin.training import auxiliary, store, train_clip, train_sam
from common.standin.training.store import draw_small
from common.standin.training.train_sam import HELD_OUT, TRAIN, corrective_clicks
from common.tasks import DEMO_CLASSES, get_task
from tests.conftest import one_thread


@pytest.mark.parametrize("effect", scenes.EFFECTS)
def test_scenes_are_the_same_for_the_same_seed_and_hold_their_target(effect):
    one, again = (scenes.draw_for_task(effect, "test", 3) for _ in range(2))
    other = scenes.draw_for_task(effect, "test", 4)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.label_map(effect), again.label_map(effect))
    assert not np.array_equal(one.image, other.image)
    assert 0.01 <= (one.label_map(effect) > 0).mean() <= 0.75


def test_the_frame_of_a_mirror_is_plain():
    for index in range(3):
        scene = scenes.draw_for_task("mirror", "train", index)
        mirror = scene.mirror > 0
        around = ndimage.binary_dilation(mirror, iterations=2) & ~mirror & (scene.instances == 0)
        assert around.any() and (scene.surface[around] == scenes.SURFACES.index("plain")).all()


def test_training_scenes_are_no_scenes_of_a_demo_task(monkeypatch):
    seeds = []
    draw_scene = scenes.draw_scene

    def noting(rng, effect=None):
        seeds.append(tuple(rng.bit_generator.seed_seq.entropy))
        return draw_scene(rng, effect)

    monkeypatch.setattr(scenes, "draw_scene", noting)
    for index in (0, 1, 2, 8399):
        scenes.draw_for_training(index)
    trained_on = {seed[:2] for seed in seeds}
    seeds.clear()
    for effect in scenes.EFFECTS:
        for split in ("train", "test"):
            scenes.draw_for_task(effect, split, 0)
    assert trained_on == {(0, 0)}
    assert {seed[:2] for seed in seeds} == {(0, 1)}  # so none can be the same
    assert len(set(seeds)) == len(seeds)


def test_kept_scenes_are_used_again_but_none_of_another_generator_or_size(tmp_path):
    folder = tmp_path / "scenes"
    images, maps, things = store.load_scenes(folder, 2)
    image, its_maps, its_things = draw_small(1)
    assert np.array_equal(images[1], image) and np.array_equal(maps[1], its_maps)
    assert things[1] == json.loads(json.dumps(its_things))
    times = [path.stat().st_mtime_ns for path in folder.iterdir()]
    assert len(store.load_scenes(folder, 1)[0]) == 1
    assert times == [path.stat().st_mtime_ns for path in folder.iterdir()]
    with pytest.raises(UserError, match="holds 2 scenes, but 3 are needed: delete things.json"):
        store.load_scenes(folder, 3)
    content = json.loads((folder / "things.json").read_text())
    for other in (content | {"generator": 0}, content | {"side": 192}, content["things"]):
        (folder / "things.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="scenes of another generator or size: delete thi"):
            store.load_scenes(folder, 2)


def test_weights_that_are_missing_damaged_or_another_models_are_named(tmp_path, monkeypatch):
    path = tmp_path / "sam.safetensors"
    monkeypatch.setattr(model, "WEIGHTS", path)
    mend = "restore it from the repository, or train it with `make standin`"
    with pytest.raises(UserError, match=f"sam.safetensors does not exist: {mend}"):
        model.build_sam()
    store.save_weights(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=f"sam.safetensors is damaged or another.*: {mend}"):
        model.build_sam()
    sam = model.new_sam()
    store.save_weights(sam, path)
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # others may read it too
    (tmp_path / "any").unlink()
    assert list(tmp_path.iterdir()) == [path]
    for name, value in model.build_sam().state_dict().items():
        assert torch.equal(value, sam.state_dict()[name].half().float())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"sam.safetensors is damaged or another.*: {mend}"):
        model.build_sam()


def test_the_shape_of_a_thing_is_told_by_its_outline():
    y, x = np.mgrid[-100:100, -100:100] + 0.5
    disc = auxiliary.shape_of(np.hypot(x - 20, y) < 60)
    centre_x, centre_y, area, stretch, kurtosis, hole, fill, three, four, five, six = disc
    assert (centre_x, centre_y) == pytest.approx((0.6, 0.5), abs=1e-6)
    assert area == pytest.approx(np.log(np.pi * 0.3 ** 2), abs=0.01)
    assert stretch == pytest.approx(0, abs=0.01)
    assert kurtosis == pytest.approx(4 / 3, abs=0.01)  # of a disc: (1/3) / (1/2)^2
    assert (hole, three, four, five, six) == pytest.approx((0, 0, 0, 0, 0), abs=0.01)
    # the greatest radius is the 98th percentile, so 98 % of the disc lie within it
    assert fill == pytest.approx(1 / 0.98, abs=0.01)

    ring = auxiliary.shape_of((np.hypot(x, y) < 60) & (np.hypot(x, y) > 30))
    assert ring[5] == pytest.approx(1 / 3, abs=0.01)  # a hole of 30^2 in 60^2 - 30^2

    square = auxiliary.shape_of((abs(x) < 50) & (abs(y) < 50))
    turned = auxiliary.shape_of((abs(x + y) < 50) & (abs(x - y) < 50))
    assert square[8] > 0.1 > max(square[[7, 9, 10]])
    assert turned[3:] == pytest.approx(square[3:], abs=0.03)


def test_sharpness_falls_where_the_image_is_blurred():
    stripes = np.zeros((96, 96, 3), np.float32)
    stripes[:, np.arange(96) // 24 % 2 == 1] = 200
    blurred = ndimage.gaussian_filter(stripes, (0, 3, 0))
    images = torch.from_numpy(np.stack([stripes, blurred])).permute(0, 3, 1, 2)
    sharp, soft = auxiliary.statistics(images)
    assert sharp.shape == (auxiliary.STATISTICS, 96 // model.STRIDE, 96 // model.STRIDE)
    sharper = sharp[14] > soft[14] + 0.3  # the steepest edge in proportion to the range
    assert sharper[3:-3, 3:-3].all()
    mean_colour = sharp[:3].mean((1, 2))
    assert torch.allclose(mean_colour, torch.full((3,), 100 / 64 - 2), atol=0.01)


def test_the_auxiliary_loss_is_least_for_the_true_centre_and_outline():
    side, grid = 96, 96 // model.STRIDE
    instances = np.zeros((1, side, side), np.uint8)
    instances[0, 16:40, 8:80] = 1
    of_ground = np.full(auxiliary.SHAPE, np.nan, np.float32)
    of_thing = auxiliary.shape_of(instances[0] == 1)
    shapes = torch.from_numpy(np.stack([of_ground, of_thing]))[None]
    half = model.STRIDE // 2
    cells = torch.from_numpy(instances[:, half::model.STRIDE, half::model.STRIDE]).long()
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255
    truth = torch.zeros(1, auxiliary.CHANNELS, grid, grid)
    offset_x = auxiliary.CHANNELS - auxiliary.SHAPE  # the first channel of the shape
    offset_y = offset_x + 1
    truth[:, offset_x:] = shapes[0, 1, :, None, None]
    centres = (torch.arange(grid) + 0.5) / grid
    truth[:, offset_x] = auxiliary.CENTRE * (44 / side - centres[None, :])  # to the right
    truth[:, offset_y] = auxiliary.CENTRE * (28 / side - centres[:, None])  # down

    fine = torch.from_numpy(instances[:, ::2, ::2]).float()  # 4 x 4 mask pixels a cell

    def loss(answers):
        return auxiliary.loss(answers, picture, cells, cells, fine, fine, shapes).item()

    least = loss(truth)
    crossed, off_the_thing, on_the_thing = truth.clone(), truth.clone(), truth.clone()
    crossed[:, [offset_x, offset_y]] = truth[:, [offset_y, offset_x]]
    off_the_thing[:, offset_x:, -1] += 5  # no thing there: nothing is asked
    on_the_thing[:, offset_x + 2, grid // 4] += 5
    assert loss(crossed) > least + 1 and loss(on_the_thing) > least + 0.1
    assert loss(off_the_thing) == least


def test_things_and_shade_are_asked_for_at_each_pixel_of_a_mask():
    grid = 3
    things, shade = (torch.zeros(1, 4 * grid, 4 * grid) for _ in range(2))
    things[0, 6, 9] = 1  # cell row 1, column 2; in the cell row 2, column 1
    shade[0, 3, 4] = 1  # cell row 0, column 1; in the cell row 3, column 0
    surface, numbers, thing, dark, shape = torch.zeros(
        1, auxiliary.CHANNELS, grid, grid).split(auxiliary.SECTIONS, 1)
    picture = torch.zeros(1, 3, grid * model.STRIDE, grid * model.STRIDE)
    cells = torch.zeros(1, grid, grid, dtype=torch.int64)
    shapes = torch.full((1, 1, auxiliary.SHAPE), torch.nan)

    def loss():
        answers = torch.cat([surface, numbers, thing, dark, shape], 1)
        return auxiliary.loss(answers, picture, cells, cells, things, shade, shapes).item()

    unsure = loss()
    thing -= 20
    thing[0, 2 * 4 + 1, 1, 2] = 20
    knows_things = loss()
    assert knows_things == pytest.approx(unsure - np.log(2), abs=1e-4)
    dark -= 20
    dark[0, 3 * 4, 0, 1] = 20
    assert loss() == pytest.approx(knows_things - auxiliary.SHADE * np.log(2), abs=1e-4)


def test_training_asks_for_the_facts_of_the_picture_that_is_embedded(monkeypatch):
    rng = np.random.default_rng(0)
    maps = (rng.random((4, 5, 64, 64)) < 0.3).astype(np.uint8)
    things_of_scene = [[{"kind": "star"}]] * 4
    images = 255 * np.stack([maps[:, 0], maps[:, 2], maps[:, 1]], 3)  # things, shade, surface
    monkeypatch.setattr(train_sam, "BATCH", 2)
    asked = []

    def noting(answers, pictures, instances, surfaces, things, shade, shapes):
        asked.append((pictures > 127, instances, surfaces, things, shade))
        return answers.sum()

    monkeypatch.setattr(auxiliary, "loss", noting)
    sam = model.new_sam()
    train_sam.set_size(sam, 64)
    head = torch.nn.Conv2d(model.WIDTH, auxiliary.CHANNELS, 1)
    shapes = np.zeros((4, 2, auxiliary.SHAPE), np.float32)
    kept = train_sam.Scenes(images, maps, things_of_scene, shapes)
    optimizer = torch.optim.SGD(sam.parameters(), 1e-4)
    for _ in range(6):
        train_sam.train_step(sam, head, optimizer, kept, 64, False, rng)
    assert len(asked) == 6
    for picture, instances, surfaces, things, shade in asked:
        shares = F.avg_pool2d(picture.float(), 2)
        assert torch.equal(things, shares[:, 0])
        assert torch.equal(shade, shares[:, 1])
        assert torch.equal(instances > 0, picture[:, 0, 4::8, 4::8])
        assert torch.equal(surfaces > 0, picture[:, 2, 4::8, 4::8])


def test_clicks_teach_the_encoder_too(monkeypatch):
    monkeypatch.setattr(train_sam, "BATCH", 2)
    monkeypatch.setattr(train_sam, "AUXILIARY", 0.0)
    images, maps = np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 5, 64, 64), np.uint8)
    images[:, 20:50, 20:50] = 255
    maps[:, 0, 20:50, 20:50] = 1
    scenes_of_stars = train_sam.Scenes(images, maps, [[{"kind": "star"}]] * 2,
                                       np.zeros((2, 2, auxiliary.SHAPE), np.float32))
    sam = model.new_sam()
    train_sam.set_size(sam, 64)
    head = torch.nn.Conv2d(model.WIDTH, auxiliary.CHANNELS, 1)
    parameters = [*sam.image_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-4)
    for with_clicks in (False, True):
        train_sam.train_step(sam, head, optimizer, scenes_of_stars, 64, with_clicks,
                             np.random.default_rng(0))
        gradients = [weight.grad for weight in sam.image_encoder.parameters()]
        assert all(gradient.any() for gradient in gradients)
        assert bool(head.weight.grad.any()) != with_clicks  # of weight 0 beside the clicks


@pytest.fixture
def small_training(tmp_path, monkeypatch):
    """Both trainings on 12 scenes, for a few steps; a function that returns their weights."""
    for program in (train_sam, train_clip):
        for name, value in {"TRAIN": 10, "HELD_OUT": 2, "BATCH": 4, "SAVE_EVERY": 1,
                            "SCENES": tmp_path}.items():
            monkeypatch.setattr(program, name, value)
        monkeypatch.setattr(program, "report", lambda *arguments: None)
    monkeypatch.setattr(train_sam, "PHASES", ((64, 2, 2e-3, False), (64, 3, 4e-4, True)))
    monkeypatch.setattr(train_sam, "ONE_BY_ONE", 0)  # where clicks are drawn by chance
    monkeypatch.setattr("common.runtime.files.lock", lambda *arguments: None)
    monkeypatch.setattr(train_sam, "WEIGHTS", tmp_path / "sam.safetensors")
    monkeypatch.setattr(train_clip, "STEPS", 4)
    monkeypatch.setattr(train_clip, "WARM_UP", 2)
    (tmp_path / "clip_config.json").write_bytes(
        (clip_weights.STANDIN / "clip_config.json").read_bytes())
    monkeypatch.setattr(train_clip, "STANDIN", tmp_path)

    def train(program) -> dict[str, torch.Tensor]:
        with one_thread():
            program.main()
        return load_file(tmp_path / f"{'sam' if program is train_sam else 'clip'}.safetensors")

    return train


@pytest.mark.parametrize("program, stop", [
    (train_sam, 1), (train_sam, 2), (train_sam, 4), (train_clip, 1), (train_clip, 3)])
def test_a_stopped_training_of_a_stand_in_goes_on_as_if_it_had_not_stopped(
        program, stop, small_training, tmp_path, monkeypatch):
    expected = small_training(program)
    state = tmp_path / ("sam.pt" if program is train_sam else "clip.pt")
    state.unlink()
    save, saved = checkpoint.save_training, []

    def save_and_stop(*arguments, **parts):
        save(*arguments, **parts)
        saved.append(parts["step"])
        if len(saved) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_training", save_and_stop)
    with pytest.raises(KeyboardInterrupt), one_thread():
        program.main()
    again = small_training(program)
    assert len(saved) == (5 if program is train_sam else 4)  # each step once
    for name, weight in expected.items():
        assert torch.equal(again[name], weight), name
    monkeypatch.setattr(program, "SEED", 1)
    with pytest.raises(UserError, match=f"{state.name} was made with SEED=0, and now it is 1: "
                                        "set the constant back, or delete the file$"):
        program.main()


def test_a_state_of_other_networks_is_named_with_what_to_do(small_training, tmp_path, monkeypatch):
    small_training(train_sam)
    monkeypatch.setattr(auxiliary, "CHANNELS", auxiliary.CHANNELS + 1)
    with pytest.raises(UserError, match="sam.pt does not fit .*: set the constant back, or delete "
                                        "the file$"):
        train_sam.main()


@pytest.mark.parametrize("program", [train_sam, train_clip])
@pytest.mark.parametrize("name, value, message", [
    ("SAVE_EVERY", 0, "SAVE_EVERY=0 must be greater than 0"),
    ("BATCH", 10**5, "BATCH=100000 .* set it to 8000 or less"),
    ("DEVICE", "abacus", "DEVICE=abacus is not on this machine")])
def test_a_setting_of_a_stand_ins_training_that_makes_no_sense_is_named(
        program, name, value, message, monkeypatch):
    monkeypatch.setattr(program, name, value)
    with pytest.raises(UserError, match=message):
        program.main()


@pytest.mark.parametrize("program", [train_sam, train_clip])
def test_two_trainings_do_not_share_a_folder(program, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    files.lock(tmp_path)
    monkeypatch.setattr(program, "SCENES", tmp_path)
    with pytest.raises(UserError, match=f"in {tmp_path}: wait until .*, or set another SCENES$"):
        program.main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_ends_the_drawing_of_scenes_and_they_are_drawn_again(tmp_path):
    (tmp_path / "images.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left .*'{tmp_path}'"):
        store.load_scenes(tmp_path, 2)
    (tmp_path / "images.npy").unlink()
    assert len(store.load_scenes(tmp_path, 2)[0]) == 2
    (tmp_path / "maps.npy").write_bytes((tmp_path / "maps.npy").read_bytes()[:-9])
    mend = "delete things.json there, and they are drawn again"
    with pytest.raises(UserError, match=f"the scenes in .* are damaged .*: {mend}"):
        store.load_scenes(tmp_path, 2)
    (tmp_path / "maps.npy").write_bytes(b"")
    with pytest.raises(UserError, match=f"maps.npy is an empty file: delete it, and {mend}"):
        store.load_scenes(tmp_path, 2)
    np.save(tmp_path / "maps.npy", np.zeros((1, 5, 256, 256), np.uint8))
    with pytest.raises(UserError, match=f"damaged .not all .* the same number of .*: {mend}"):
        store.load_scenes(tmp_path, 2)


def test_only_things_that_can_be_seen_have_a_shape():
    instances = np.zeros((2, 40, 40), np.uint8)
    instances[0, 5:15, 5:15], instances[0, 20:23, 20:23] = 1, 2  # the second is too small
    instances[1, 5:15, 5:35] = 1
    instances[1, 8:12, 20:23] = 0  # a hole
    shapes = auxiliary.shapes_of_scenes(instances)
    assert shapes.shape == (2, 3, auxiliary.SHAPE)
    known = ~np.isnan(shapes).any(2)
    assert known.tolist() == [[False, True, False], [False, True, False]]
    small, large = shapes[known][:, 2:6]
    assert small == pytest.approx(-large, abs=1e-4)  # standardised
    assert abs(large) == pytest.approx(np.ones(4), abs=1e-4)
    assert large[0] > 0 and large[1] > 0  # larger, longer
    assert large[3] > 0  # with a hole


@pytest.mark.parametrize("effect", scenes.EFFECTS)
def test_a_demo_data_set_is_read_by_the_benchmarks_own_adapter(effect, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "TRAIN_SCENES", 3)
    monkeypatch.setattr(scenes, "TEST_SCENES", 2)
    scenes.write_dataset(effect, tmp_path)
    task = get_task(f"demo_{effect}")
    samples = list_samples(task, tmp_path)
    assert [sample.split for sample in samples].count("train") == 3
    tests = [sample for sample in samples if sample.split == "test"]
    assert len(tests) == 2
    for index, sample in enumerate(sorted(tests, key=lambda sample: sample.name)):
        scene = scenes.draw_for_task(effect, "test", index)
        assert np.array_equal(load_label_map(sample, task, (256, 256)), scene.label_map(effect))
        assert np.abs(load_image(sample.image).astype(int) - scene.image).mean() < 6  # JPEG


def test_clicks_on_several_cores_give_the_gradients_of_the_whole_batch(monkeypatch):
    torch.manual_seed(0)
    sam = model.new_sam().eval()
    train_sam.set_size(sam, 64)
    monkeypatch.setattr(train_sam, "ONE_BY_ONE", 1)  # as these clicks are not drawn at random
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(train_sam, "side_by_side",
                        lambda compute, parts, device: [compute(part) for part in parts])
    targets = torch.zeros(5, 32, 32, dtype=torch.bool)
    for number, target in enumerate(targets):
        target[3 + number:20, 5:9 + 2 * number] = True
    embeddings = torch.randn(5, model.WIDTH, 8, 8, requires_grad=True)
    shares = targets.float()
    gradient, ious = train_sam.click_gradients(sam, embeddings, shares, np.random.default_rng(0))
    weights = list(sam.mask_decoder.parameters())
    gradients = [weight.grad for weight in weights]

    sam.zero_grad()
    rng = np.random.default_rng(0)
    rng.random()  # decides that clicks come one by one
    clicks = [1] * int(rng.integers(1, 9))
    assert len(clicks) > 2
    loss, expected = train_sam.click_loss(sam, embeddings, shares, clicks, True, rng)
    loss.backward()
    torch.testing.assert_close(ious, expected)
    assert embeddings.grad.abs().max() > 1e-6
    torch.testing.assert_close(gradient, embeddings.grad, rtol=1e-3, atol=1e-7)
    for own, weight in zip(gradients, weights, strict=True):
        torch.testing.assert_close(own, weight.grad, rtol=1e-3, atol=1e-6)


def test_the_clicks_of_a_part_do_not_depend_on_which_core_is_first(monkeypatch):
    sam = model.new_sam().eval()
    train_sam.set_size(sam, 64)
    monkeypatch.setattr(train_sam, "ONE_BY_ONE", 0)  # these are drawn at random
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    embeddings, found = torch.randn(6, model.WIDTH, 8, 8), []
    shares = torch.zeros(6, 32, 32)
    shares[:, 5:20, 8:20] = 1
    for turn in (1, -1, 1, -1):
        monkeypatch.setattr(
            train_sam, "side_by_side", lambda compute, parts, device, turn=turn:
            [compute(part) for part in list(parts)[::turn]][::turn])
        rng = np.random.default_rng(len(found) // 2)
        found.append(train_sam.click_gradients(sam, embeddings, shares, rng)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])


def test_each_click_goes_to_the_middle_of_the_largest_error_with_its_true_label():
    targets = torch.zeros(2, 64, 64, dtype=torch.bool)
    targets[:, 10:21, 30:41] = True
    found = torch.zeros_like(targets)
    found[1] = targets[1]
    found[1, 40:61, 2:23] = True  # too much, and more than all of the target
    points, labels = train_sam.next_clicks(found, targets)
    assert points.tolist() == [[[71.0, 31.0]], [[25.0, 101.0]]]  # x, y; a pixel is 2 x 2
    assert labels.tolist() == [[1], [0]]


def test_smaller_pictures_keep_their_place():
    image = np.zeros((1, 256, 256, 3), np.uint8)
    image[:, :128, :64] = 255
    small = train_sam.resize(image, 192)
    assert small.shape == (1, 192, 192, 3)
    assert small[0, :95, :47].min() == 255 and small[0, 97:].max() == 0


@pytest.mark.parametrize("size", [192, 256])
def test_a_target_keeps_its_area_and_its_place_where_it_becomes_as_coarse_as_a_mask(size):
    y, x = np.mgrid[:256, :256] + 0.5
    disc = np.hypot(x - 83.3, y - 140.6) < 21.7
    shares = train_sam.in_mask_pixels(disc[None], size)[0].numpy()
    side = 256 / len(shares)
    assert len(shares) == size // 2
    assert shares.sum() * side ** 2 == pytest.approx(disc.sum(), rel=1e-4)
    rows, columns = np.indices(shares.shape)
    for coarse, fine in ((columns, x), (rows, y)):
        place = ((coarse + 0.5) * side * shares).sum() / shares.sum()
        assert place == pytest.approx(fine[disc].mean(), abs=0.05)  # pixels of the scene


def test_the_report_compares_masks_at_the_size_of_the_scene(monkeypatch):
    maps = np.zeros((1, 5, 256, 256), np.uint8)
    maps[0, 0, 41:62, 33:54] = 1  # half of a mask pixel on each side
    drawn, draw_target = [], train_sam.draw_target

    def noting(*arguments):
        drawn[:] = [draw_target(*arguments)]
        return drawn[0]

    monkeypatch.setattr(train_sam, "draw_target", noting)
    monkeypatch.setattr(
        train_sam, "decode", lambda *arguments:
        ((train_sam.in_mask_pixels(drawn[0][0][None], 256) - 0.5)[:, None], None))
    images, things = np.zeros((1, 256, 256, 3), np.uint8), [[{"kind": "ball"}]]
    ious, sorts = corrective_clicks(model.new_sam().eval(), images, maps, things, 2)
    assert sorts[0] in ("thing", "kind", "union")
    assert ious.min() > 0.98  # all but the corners


def test_the_loss_of_a_mask_is_least_at_the_share_of_each_pixel_that_is_covered(monkeypatch):
    shares = torch.tensor([0.0, 0.25, 0.75, 1.0]).view(1, 2, 2)
    losses = {}
    for off in (-1.0, -0.1, 0.0, 0.1, 1.0):
        logits = torch.logit(shares, 1e-4)[:, None] + off
        losses[off] = train_sam.mask_loss(logits, shares).item()
    assert min(losses, key=losses.get) == 0.0, losses

    sam, given, mask_loss = model.new_sam().eval(), [], train_sam.mask_loss
    train_sam.set_size(sam, 64)

    def noting(logits, shares):
        given.append(shares)
        return mask_loss(logits, shares)

    monkeypatch.setattr(train_sam, "mask_loss", noting)
    shares, embeddings = torch.rand(2, 32, 32), torch.randn(2, model.WIDTH, 8, 8)
    train_sam.click_loss(sam, embeddings, shares, [1, 1], False, np.random.default_rng(0))
    assert len(given) == 3 and all(torch.equal(shares, one) for one in given)


def test_training_draws_its_targets_by_the_shares_that_were_set(monkeypatch):
    monkeypatch.setattr(train_sam, "BATCH", 2)
    monkeypatch.setattr(train_sam, "SHARES", {"mirror": 0.5, "blur": 0.5})
    given, drawn = [], []

    def noting(maps, things, rng, shares):
        given.append(shares)
        drawn.append(rng.random((64, 64)) < 0.5)
        return drawn[-1], "thing"

    def clicked(sam, embeddings, shares, rng):
        assert torch.equal(shares, train_sam.in_mask_pixels(np.stack(drawn), 64))
        return torch.zeros_like(embeddings), torch.zeros(2)

    monkeypatch.setattr(train_sam, "draw_target", noting)
    monkeypatch.setattr(train_sam, "click_gradients", clicked)
    sam = model.new_sam()
    train_sam.set_size(sam, 64)
    head = torch.nn.Conv2d(model.WIDTH, auxiliary.CHANNELS, 1)
    kept = train_sam.Scenes(np.zeros((2, 64, 64, 3), np.uint8), np.ones((2, 5, 64, 64), np.uint8),
                            [[]] * 2, np.zeros((2, 2, auxiliary.SHAPE), np.float32))
    optimizer = torch.optim.SGD(sam.parameters(), 1e-4)
    train_sam.train_step(sam, head, optimizer, kept, 64, True, np.random.default_rng(0))
    assert given == [train_sam.SHARES] * 2


@pytest.mark.parametrize("program, name", [(train_sam, "sam"), (train_clip, "clip")])
def test_a_training_that_computes_nan_keeps_its_last_state_and_the_weights(
        program, name, small_training, tmp_path, monkeypatch):
    save, kept = checkpoint.save_training, []

    def save_and_spoil(path, *arguments, **parts):
        save(path, *arguments, **parts)
        kept.append(path.read_bytes())
        for weight in parts["sam" if name == "sam" else "model"].parameters():
            weight.data.fill_(torch.nan)

    monkeypatch.setattr(checkpoint, "save_training", save_and_spoil)
    with pytest.raises(UserError, match=f"loss is nan in step 2.*: lower .*delete .*{name}.pt"):
        small_training(program)
    assert len(kept) == 1 and (tmp_path / f"{name}.pt").read_bytes() == kept[0]
    weights = tmp_path / f"{name}.safetensors"
    assert not weights.exists()
    (tmp_path / f"{name}.pt").unlink()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *of: torch.tensor(torch.nan))
    with pytest.raises(UserError, match="the gradient is nan in step 1"):
        small_training(program)
    with pytest.raises(UserError, match=f"is not finite in float16, so .*{weights.name} is not"):
        store.save_weights(torch.nn.Embedding.from_pretrained(torch.full((2, 2), 1e6)), weights)


def test_captions_compete_for_a_crop_and_those_that_claim_nothing_do_not():
    true = torch.tensor([[True, False, True, True], [False, False, False, True],
                         [False, True, False, True]])  # the last caption claims nothing
    similarity = torch.tensor([[0.3, 0.1, 0.2, 9.0], [0.5, 0.5, 0.5, 0.0], [0.4, 0.1, 0.0, -9.0]])
    scale = torch.tensor(10.0).log()
    e = np.exp
    first = -np.log((e(3) + e(2)) / (e(3) + e(1) + e(2)))
    last = -np.log(e(1) / (e(4) + e(1) + e(0)))  # nothing is true of the crop between them
    found = train_clip.choice_loss(similarity, true, scale)
    assert found.item() == pytest.approx((first + last) / 2, rel=1e-5)


def test_regions_are_things_and_effects_and_some_more_often():
    maps = np.zeros((5, 40, 40), np.uint8)
    maps[0, :10, :10], maps[0, 20:30, 5:15] = 1, 3  # the second thing is hidden
    maps[2, 30:, 30:] = 1  # a shadow
    things = [{"kind": "ball"}, {"kind": "star"}, {"kind": "ring"}]
    regions = {"ball": maps[0] == 1, "ring": maps[0] == 3, "shadow": maps[2] > 0,
               "ground": (maps[0] == 0) & (maps[2] == 0)}
    rng, counts = np.random.default_rng(0), dict.fromkeys(regions, 0)
    for _ in range(2000):
        drawn = train_clip.choose_region(maps, things, rng)
        name, = [name for name, region in regions.items() if np.array_equal(region, drawn)]
        counts[name] += 1
    expected = {"ball": 0.85 / 7, "ring": 0.85 * 3 / 7, "shadow": 0.85 * 3 / 7, "ground": 0.15}
    for name, share in expected.items():  # within four standard deviations
        assert counts[name] / 2000 == pytest.approx(share, abs=4 * (share / 2000) ** 0.5), name


def test_a_patch_is_named_for_what_covers_half_of_it():
    maps = np.zeros((5, 10, 10), np.uint8)
    maps[0, :, :4], maps[0, :, 4:] = 1, 2
    maps[4, :7] = 1  # defocus on 70 %
    things = [{"kind": kind, "colour": "red", "surface": "dots", "salient": False}
              for kind in ("ring", "ball")]
    everywhere = np.ones((10, 10), bool)
    of_patch = train_clip.words_of(maps, things, everywhere, 0.5)
    assert of_patch == {"blur", "ball", "red ball", "dots ball"}
    of_region = train_clip.words_of(maps, things, everywhere, 0.2)
    assert of_region == of_patch | {"ring", "red ring", "dots ring"}
    maps[4, 1:] = 0  # 10 %
    assert "blur" not in train_clip.words_of(maps, things, everywhere, 0.04)
    assert "blur" in train_clip.words_of(maps, things, everywhere, 0.03)


def test_a_patch_of_a_crop_lies_on_the_thing_or_right_beside_it():
    rng = np.random.default_rng(0)
    region = np.zeros((85, 85), bool)
    region[40:50, 60:64] = True
    near = ndimage.binary_dilation(region, np.ones((3, 3)), iterations=22)  # two patches away
    patches = [train_clip.choose_patch(region, rng) for _ in range(50)]
    assert all(patch.any() and near[patch].all() for patch in patches)
    assert {int(patch.sum()) for patch in patches} <= {100, 110, 121}  # 10 or 11 pixels a side
    on_thing = [patch[region].any() for patch in patches]
    assert any(on_thing) and not all(on_thing)
    weights = train_clip.patch_weights(patches[0])
    assert weights.sum() == pytest.approx(1) and weights.max() > 0.8  # it is the crop's own patch


def test_single_patches_of_a_batch_are_judged_more_strictly_than_regions(monkeypatch):
    maps = np.zeros((1, 5, 256, 256), np.uint8)
    maps[0, 0, 20:220, 20:220] = 1
    things = [[{"kind": "ball", "colour": "red", "surface": "dots", "salient": False}]]
    monkeypatch.setattr(train_clip, "TRAIN", 1)
    monkeypatch.setattr(train_clip, "BATCH", 1)
    judged, words_of = [], train_clip.words_of

    def noting(maps, things, region, least):
        judged.append((region.mean(), least))
        return words_of(maps, things, region, least)

    monkeypatch.setattr(train_clip, "words_of", noting)
    images = np.zeros((1, 256, 256, 3), np.uint8)
    weights = train_clip.draw_batch(images, maps, things, np.random.default_rng(0))[1]
    (crop, least), *regions = judged
    assert (crop, least) == (1, 0.015)
    assert len(regions) == weights.shape[1] == train_clip.REGIONS + train_clip.PATCHES
    for (share, least), spread in zip(regions, (weights[0] > 0).sum(1), strict=True):
        assert (least == 0.5) == (share < 0.02) == (spread <= 4)  # a patch is 1 / 64 of a crop


def test_a_window_has_the_scale_of_the_maps_and_lies_in_the_scene():
    rng = np.random.default_rng(0)
    region = np.zeros((256, 256), bool)
    region[250:, 3:9] = True  # in a corner
    for _ in range(50):
        rows, columns = train_clip.choose_window(region, rng)
        side = rows.stop - rows.start
        assert side == columns.stop - columns.start and 68 <= side <= 106  # 256 / 3 by SCALES
        assert min(rows.start, columns.start) >= 0 and max(rows.stop, columns.stop) <= 256
        assert region[rows, columns].any()


def test_the_pointing_game_looks_where_the_highest_cell_lies():
    class Maps:
        def maps(self, images):
            maps = torch.zeros(len(images), 2, 24, 24)  # a cell is 10 2/3 pixels a side
            maps[:, 0, 23, 2] = maps[:, 1, 4, 20] = 1
            return maps

    targets = np.zeros((2, 2, 256, 256), bool)
    targets[:, 0, 246:, 22:32] = True  # the whole cell, but for its edge
    targets[0, 1, :43] = True  # not under the other cell; and in the second scene nowhere
    scores = train_clip.pointing_game(Maps(), np.zeros((2, 256, 256, 3), np.uint8), targets)
    assert scores == [(1.0, 10 * 10 / 256 ** 2), (0.0, 43 / 256)]


def test_the_classes_of_demo_semantic_are_the_kinds_that_are_drawn():
    assert DEMO_CLASSES == scenes.KINDS


def test_the_weights_are_small_float16_and_complete():
    folder = model.WEIGHTS.parent
    files = [folder / "sam.safetensors", folder / "clip.safetensors"]
    assert sum(file.stat().st_size for file in files) < 20e6
    for file in files:
        dtypes = {value.dtype for value in load_file(file).values()}
        assert dtypes <= {torch.float16, torch.int64}
    config = json.loads((folder / "clip_config.json").read_text())
    assert config["vision_cfg"]["layers"] >= 7  # as both paths of CLIP Surgery need


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray, list[list[dict]]]:
    """Images, maps and things of the scenes that the stand-ins were not trained on."""
    drawn = [draw_small(TRAIN + index) for index in range(HELD_OUT)]
    images, maps, things = zip(*drawn)
    return np.stack(images), np.stack(maps), list(things)


@pytest.fixture(scope="module")
def curve(held_out) -> np.ndarray:
    """Mean IoU of the SAM stand-in after 1 to 8 corrective clicks."""
    ious, _ = corrective_clicks(model.build_sam(), *held_out, 8)
    return ious.mean(0).numpy()


def test_the_sam_stand_in_reaches_its_mark_after_3_clicks(curve):
    assert curve[2] >= 0.80, curve
    assert curve[7] > curve[2] > curve[0] > 0.3, curve


def test_the_sam_stand_in_reaches_its_mark_after_8_clicks(curve):
    assert curve[7] >= 0.85, curve


def test_the_maps_of_the_clip_stand_in_find_what_each_text_names(held_out):
    scores = train_clip.report(*clip_weights.load_clip("demo", "cpu"), *held_out)
    assert len(scores) == 4 + len(scenes.KINDS)
    for text, (hit, chance) in scores.items():
        # twice as much as chance would be more than always for blur, which is on half of a picture
        assert hit >= (chance + 0.1 if text == "blurred region" else 2 * chance), text
