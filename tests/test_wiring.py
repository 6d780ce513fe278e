"""The wires between the functions: what each stage hands to which, held where it is handed over."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.agent import Actor, Critic, Learner, policy, pool_state
from common.baselines import Baselines
from common.cache import Cache, TrainingSet, Truth
from common.episode import Episode, patch_centres
from common.metrics import Score, count_pixels, grid_iou, pool, summarise
from common.results.outputs import Report
from common.runtime import checkpoint
from common.runtime.errors import UserError
from common.srm import build_srm
from tests.conftest import load_script

ROUNDS, IMAGES = 4, 300


class Alternating:
    """A SAM that is sure of foreground everywhere after an odd number of points, else of none."""

    frame, max_batch = 800, 1000

    def prepare(self, embeddings):
        return embeddings

    def decode(self, embeddings, points, labels):
        sure = 8.0 if points.shape[1] % 2 else -8.0
        return torch.full((len(embeddings), 40, 40), sure), torch.ones(len(embeddings))


def srm(s_c, s_t):
    """Foreground exactly where the state is not empty."""
    return 20 * (s_t.mean(1) - 0.5)


@pytest.fixture
def rolled_out(monkeypatch):
    """Stage 3's roll-out of 300 images, and when the SRM learnt; patches 50 to 99 are ignored."""
    stage = load_script("03_train_agent.py")
    monkeypatch.setattr(stage, "ROUNDS", ROUNDS)
    learnt_after = []

    def train_srm(learner, episode, shots, recipe, generator):
        learnt_after.append(episode.points.shape[1])
        return 0.0, 0.0

    monkeypatch.setattr(stage, "train_srm", train_srm)
    torch.manual_seed(0)
    truth = torch.randint(2, (IMAGES, 100)).to(torch.uint8)
    truth[:, 50:] = 255
    upper = np.zeros((20, 20), np.uint8)
    upper[:10] = 1
    label_maps = [upper, upper, 1 - upper] * (IMAGES // 3)
    shots = SimpleNamespace(truth_centres=truth, label_maps=label_maps)
    actor, critic = Actor(4), Critic(4, 1.0)
    torch.nn.init.normal_(actor.head.weight)
    embeddings = 0.5 + torch.rand(IMAGES, 4, 10, 10)
    episode = Episode(Alternating(), embeddings, torch.zeros(IMAGES, 10, 10),
                      patch_centres(800, 80), truth != 255)
    learner = Learner(srm, actor, critic, None, None)
    generator = torch.Generator().manual_seed(0)
    rollout, _ = stage.roll_out(learner, episode, shots, {}, generator)
    return SimpleNamespace(rollout=rollout, episode=episode, actor=actor, critic=critic,
                           embeddings=embeddings, truth=truth, learnt_after=learnt_after)


def test_the_start_points_are_one_of_foreground_and_one_of_background(rolled_out):
    assert rolled_out.episode.labels[:, :2].tolist() == [[1, 0]] * IMAGES
    above = rolled_out.episode.points[:, :2, 1] < 400
    assert above.tolist() == [[True, False], [True, False], [False, True]] * (IMAGES // 3)


def test_labels_are_the_srms_on_the_mask_before_the_point(rolled_out):
    full = (rolled_out.rollout.masks.mean((2, 3)) > 0.5).long()  # M_{t-1} is full or empty
    assert full[:, 0].tolist() == [0, 1, 0, 1]  # two points, three, four, five
    assert torch.equal(rolled_out.rollout.labels, full)
    assert torch.equal(rolled_out.episode.labels[:, 2:], full.T)


def test_actions_are_drawn_from_the_policy_and_not_its_maximum(rolled_out):
    rollout = rolled_out.rollout
    for t in range(ROUNDS):
        state = pool_state(rolled_out.embeddings * rollout.masks[t][:, None], 10)
        with torch.no_grad():
            distribution = policy(rolled_out.actor(state), rollout.allowed[t])
            value = rolled_out.critic(state)
        assert torch.allclose(rollout.log_probs[t], distribution.log_prob(rollout.actions[t]),
                              atol=1e-5)
        assert torch.allclose(rollout.values[t], value, atol=1e-5)
    likeliest = distribution.probs.argmax(1)
    share = (rollout.actions[-1] == likeliest).float().mean()
    expected = distribution.probs.amax(1).mean()
    assert expected < 0.9 and abs(share - expected) < 4 * (expected / IMAGES) ** 0.5


def test_rewards_belong_to_the_actions_and_ignored_patches_are_never_chosen(rolled_out):
    rollout = rolled_out.rollout
    on_truth = rolled_out.truth.gather(1, rollout.actions.T).T
    assert (on_truth != 255).all()
    assert torch.equal(rollout.rewards, on_truth * 2.0 - 1)
    chosen = patch_centres(800, 80)[rollout.actions.T]
    assert torch.equal(rolled_out.episode.points[:, 2:], chosen)
    for t in range(ROUNDS):
        assert not rollout.allowed[t].gather(1, rollout.actions[:t].T).any()
        assert rollout.allowed[t].sum(1).tolist() == [50 - t] * IMAGES


def test_the_srm_learns_before_any_mask_and_before_each_step(rolled_out):
    assert rolled_out.learnt_after == [0, *range(2, 2 + ROUNDS)]


def test_the_srm_learns_in_the_states_of_the_samples_whose_truth_it_is_given(monkeypatch):
    stage, steps = load_script("03_train_agent.py"), []
    monkeypatch.setattr(stage, "SRM_BATCH", 3)
    monkeypatch.setattr(stage, "train_step", lambda *given: steps.append(given) or (0.0, 1.0))
    torch.manual_seed(0)
    episode = Episode(Alternating(), torch.rand(6, 4, 10, 10), torch.rand(6, 10, 10),
                      patch_centres(800, 80))
    episode.mask, truth = torch.rand(6, 10, 10), torch.rand(6, 10, 10)
    asked = []

    def maps_and_truth(rows, every_text, generator):
        asked.append(every_text)
        return episode.maps[rows], truth[rows]

    shots = SimpleNamespace(samples=range(6), truth=truth, maps_and_truth=maps_and_truth)
    learner = Learner(srm, None, None, None, "the SRM's optimiser")
    recipe = {"srm_steps": 4, "every_text": "as stage 2 chose"}
    stage.train_srm(learner, episode, shots, recipe, torch.Generator().manual_seed(0))
    batches, asked = set(), set(asked)
    for its_srm, optimizer, s_c, s_t, y, _ in steps:
        rows = [int((truth == one).all(2).all(1).nonzero()) for one in y]
        assert torch.equal(s_c, episode.embeddings[rows] * episode.maps[rows][:, None])
        assert torch.equal(s_t, episode.embeddings[rows] * episode.mask[rows][:, None])
        assert its_srm is srm and optimizer == "the SRM's optimiser" and len(set(rows)) == 3
        batches.add(tuple(rows))
    assert len(steps) == 4 and len(batches) > 1 and asked == {"as stage 2 chose"}


class Stop(Exception):
    """Ends a stage's main where a test has seen enough."""


@pytest.fixture
def in_workplace(workplace, tmp_path, monkeypatch):
    """Loads a stage for the small data set; some of its patches are ignored."""
    (tmp_path / "srm.pt").write_bytes((workplace / "runs/folder/srm.pt").read_bytes())
    training_set = Cache.training_set

    def some_ignored(*arguments):
        shots = training_set(*arguments)
        shots.truth_centres[:, ::2] = 255
        return shots

    monkeypatch.setattr(Cache, "training_set", some_ignored)

    def load(name: str, run_dir=tmp_path, **constants):
        stage = load_script(name)
        constants |= {"TASK": "folder", "RUN_DIR": str(run_dir), "DEVICE": "cpu", "ROUNDS": 3,
                      "FEATURES": str(workplace / "runs/folder/features.h5")}
        if name != "04_evaluate.py":
            constants["SRM_BATCH"] = 4
        for constant, value in constants.items():
            monkeypatch.setattr(stage, constant, value)
        return stage

    return load


def test_targets_bootstrap_from_the_last_state_and_advantages_subtract_its_value(
        in_workplace, monkeypatch):
    stage, seen = in_workplace("03_train_agent.py"), SimpleNamespace(steps=0)
    roll_out, train_step = stage.roll_out, stage.train_step

    def recording_roll_out(learner, episode, *more):
        seen.episode, answer = episode, roll_out(learner, episode, *more)
        return answer

    def counting_step(*arguments):
        seen.steps += 1
        return train_step(*arguments)

    def update(actor, critic, ppo, states, rollout, targets, advantages, **more):
        seen.critic, seen.states, seen.rollout = critic, states, rollout
        seen.targets, seen.advantages = targets, advantages
        raise Stop

    monkeypatch.setattr(stage, "roll_out", recording_roll_out)
    monkeypatch.setattr(stage, "train_step", counting_step)
    monkeypatch.setattr(stage, "ppo_update", update)
    with pytest.raises(Stop):
        stage.main()
    episode, rollout = seen.episode, seen.rollout
    assert seen.steps == 5 * (3 + 1)  # q of the explicit branch, before any mask and in each round
    last = pool_state(episode.embeddings * episode.mask[:, None], 10)
    with torch.no_grad():
        running = seen.critic(last)  # V(s_{T+1}), of F * M_T
    for t in (2, 1, 0):
        running = rollout.rewards[t] + 0.99 * running
        assert torch.allclose(seen.targets[t], running, atol=1e-4)
        advantage = running - rollout.values[t]
        advantage = (advantage - advantage.mean()) / advantage.std()
        assert torch.allclose(seen.advantages[t], advantage, atol=1e-3)
        state = pool_state(episode.embeddings * rollout.masks[t][:, None], 10)
        assert torch.allclose(seen.states.unflatten(0, (3, -1))[t], state, atol=1e-5)
    assert (rollout.actions % 2 == 1).all()  # the even patches are ignored


@pytest.mark.parametrize("branch, srm_steps", [("explicit", 5), ("implicit", 1)])
def test_stage_3_goes_on_with_the_srm_of_stage_2_and_trains_as_its_constants_say(
        in_workplace, monkeypatch, tmp_path, branch, srm_steps):
    of_stage_2 = torch.load(tmp_path / "srm.pt", weights_only=True)
    of_stage_2["settings"] |= {"shots": 3, "every_text": True, "residual": 0.25, "branch": branch}
    if branch == "implicit":
        of_stage_2["srm"] = build_srm(branch, 64).state_dict()
    torch.save(of_stage_2, tmp_path / "srm.pt")
    stage = in_workplace("03_train_agent.py", SHOTS=3, SEED=7, EPOCHS=6, CLIP_RANGE=0.3, GAMMA=0.75,
                         LEARNING_RATE=3e-5)
    seen, roll_out = SimpleNamespace(), stage.roll_out

    def recording(learner, episode, shots, made_with, generator):
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())
        assert learner.srm.state_dict().keys() == of_stage_2["srm"].keys()
        for name, value in learner.srm.state_dict().items():
            assert torch.equal(value, of_stage_2["srm"][name]), name
        seen.learner, seen.episode, seen.shots, seen.made_with = learner, episode, shots, made_with
        return roll_out(learner, episode, shots, made_with, generator)

    def update(actor, critic, ppo, states, rollout, targets, advantages, **more):
        seen.update, seen.more = (actor, critic, ppo), more
        raise Stop

    monkeypatch.setattr(stage, "roll_out", recording)
    monkeypatch.setattr(stage, "ppo_update", update)
    with pytest.raises(Stop):
        stage.main()
    learner = seen.learner
    assert seen.update == (learner.actor, learner.critic, learner.ppo)
    assert seen.more == {"epochs": 6, "clip_range": 0.3}
    assert learner.critic.scale == 4  # the bound of a return, 1 / (1 - 0.75)
    for optimizer, networks in ((learner.ppo, (learner.actor, learner.critic)),
                                (learner.srm_optimizer, (learner.srm,))):
        [group] = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam
        assert group["lr"] == 3e-5 and set(group["params"]) == {
            weight for network in networks for weight in network.parameters()}
    drawn = stage.open_run(vars(stage)).cache.drawn(3)
    assert np.array_equal(seen.shots.samples, drawn) and len(seen.episode.embeddings) == 3
    assert seen.episode.residual == 0.25 and seen.made_with["every_text"] is True
    assert seen.made_with["srm_steps"] == srm_steps
    assert torch.equal(seen.episode.maps, seen.shots.maps)
    assert not torch.equal(seen.shots.maps, seen.shots.truth)


def test_the_logged_iou_of_the_training_samples_is_of_their_last_masks(in_workplace, monkeypatch):
    stage, seen = in_workplace("03_train_agent.py", EPISODES=1, EPOCHS=1), SimpleNamespace()
    roll_out, save = stage.roll_out, stage.checkpoint.save_training

    def recording(learner, episode, shots, *more):
        seen.episode, seen.shots = episode, shots
        return roll_out(learner, episode, shots, *more)

    def saving(path, made_with, log, *more, **parts):
        seen.log = log
        save(path, made_with, log, *more, **parts)

    monkeypatch.setattr(stage, "roll_out", recording)
    monkeypatch.setattr(stage.checkpoint, "save_training", saving)
    stage.main()
    [row] = seen.log
    expected = grid_iou(seen.episode.mask, seen.shots.truth)
    assert row["training_iou"] == expected
    assert expected != grid_iou(seen.shots.maps, seen.shots.truth)


def test_stage_3_saves_no_weights_of_an_episode_whose_loss_is_not_finite(
        in_workplace, monkeypatch, tmp_path):
    stage = in_workplace("03_train_agent.py", EPISODES=1, EPOCHS=1)
    update = stage.ppo_update
    monkeypatch.setattr(stage, "ppo_update",
                        lambda *given, **more: update(*given, **more) | {"value_loss": math.inf})
    with pytest.raises(UserError, match="^value loss is inf in episode 1: lower LEARNING_RATE and "
                                        "delete what this stage has saved"):
        stage.main()
    assert not (tmp_path / "agent.pt").exists()


@pytest.mark.parametrize("name", ["steps", "states", "join_kernel"])
def test_an_srm_of_an_earlier_format_is_named(in_workplace, tmp_path, name):
    content = torch.load(tmp_path / "srm.pt", weights_only=True)
    del content["settings"][name]
    torch.save(content, tmp_path / "srm.pt")
    with pytest.raises(UserError, match="srm.pt is damaged or was not written by .*02_train_srm"):
        in_workplace("03_train_agent.py").main()


def test_networks_of_another_number_of_heads_or_logit_scale_are_not_taken_for_these(
        in_workplace, workplace, monkeypatch, tmp_path):
    stage_3, stage_4 = in_workplace("03_train_agent.py"), in_workplace("04_evaluate.py")
    (tmp_path / "agent.pt").write_bytes((workplace / "runs/folder/agent.pt").read_bytes())
    content = torch.load(tmp_path / "agent.pt", weights_only=True)
    assert content["settings"].pop("heads") == 4
    torch.save(content, tmp_path / "agent.pt")  # as from before it was recorded: it was 4
    assert stage_4.open_run(vars(stage_4)).load_agent(vars(stage_4))
    monkeypatch.setattr("common.runtime.run.LOGIT_SCALE", 7)
    with pytest.raises(UserError, match="agent.pt was made with LOGIT_SCALE=10, and now it is 7"):
        stage_4.main()
    monkeypatch.setattr("common.runtime.run.HEADS", 8)
    with pytest.raises(UserError, match="agent.pt was made with HEADS=4, and now it is 8"):
        stage_4.main()
    monkeypatch.setattr(stage_3, "HEADS", 8)
    with pytest.raises(UserError, match="srm.pt was made with HEADS=4, and now it is 8"):
        stage_3.main()


def test_the_scripts_constants_are_the_papers():
    two, three = load_script("02_train_srm.py"), load_script("03_train_agent.py")
    assert (three.EPISODES, three.EPOCHS, three.ROUNDS, two.ROUNDS) == (50, 20, 15, 15)
    assert (three.GAMMA, three.CLIP_RANGE, three.LEARNING_RATE) == (0.99, 0.20, 1e-4)
    assert three.SRM_STEPS == {"implicit": 1, "explicit": 5}
    assert load_script("04_evaluate.py").ROUNDS == 15
    assert load_script("01_cache_features.py").SHOTS == 50


@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_stage_2_learns_in_f_times_map_and_f_times_mask(
        in_workplace, monkeypatch, tmp_path, residual):
    states, every_text = {"no mask": 0.0, "test-time start": 0.0, "true start": 1.0}, residual > 0
    stage = in_workplace("02_train_srm.py", tmp_path / "new", STATES=states, SEED=1,
                         RESIDUAL=residual, EVERY_TEXT=every_text, LEARNING_RATE=0.02)
    seen, reach_state = SimpleNamespace(), stage.reach_state
    maps_and_truth = TrainingSet.maps_and_truth

    def asking(shots, rows, every_text, generator):
        seen.every_text = every_text
        seen.maps, seen.truth = maps_and_truth(shots, rows, every_text, generator)
        return seen.maps, seen.truth

    def recording(kind, episode, *more):
        seen.seed = more[-1].initial_seed()
        reach_state(kind, episode, *more)
        seen.episode = episode

    def step(srm, optimizer, s_c, s_t, y, generator):
        seen.s_c, seen.s_t, seen.y = s_c, s_t, y
        seen.rate = optimizer.param_groups[0]["lr"]
        raise Stop

    monkeypatch.setattr(TrainingSet, "maps_and_truth", asking)
    monkeypatch.setattr(stage, "reach_state", recording)
    monkeypatch.setattr(stage, "train_step", step)
    with pytest.raises(Stop):
        stage.main()
    episode = seen.episode
    assert episode.mask.min() < 0.5 and not torch.equal(episode.mask, episode.maps)
    assert torch.equal(seen.s_c, episode.embeddings * seen.maps[:, None])
    assert torch.equal(seen.y, seen.truth) and not torch.equal(seen.y, seen.maps)
    kept = residual + (1 - residual) * episode.mask[:, None]
    assert torch.allclose(seen.s_t, episode.embeddings * kept)
    assert seen.rate == 0.02 and seen.seed == 1 and bool(seen.every_text) == every_text
    assert not episode.allowed[:, ::2].any() and episode.allowed[:, 1::2].all()
    shots = stage.open_run(vars(stage)).cache.training_set(0, 3, torch.device("cpu"))
    for points, embedding in zip(episode.points, episode.embeddings):  # P_0 by its own truth
        own = [torch.equal(embedding, other) for other in shots.embeddings]
        label_map = shots.label_maps[own.index(True)]
        columns, rows = (points[:2] / 800 * torch.tensor(label_map.shape[::-1])).long().T
        assert label_map[rows, columns].tolist() == [1, 0]


def test_stage_2_meets_every_kind_of_state(in_workplace, monkeypatch, tmp_path):
    stage, kinds = in_workplace("02_train_srm.py", tmp_path / "new", STEPS=65), []
    monkeypatch.setattr(stage, "reach_state", lambda kind, *more: kinds.append(kind))
    monkeypatch.setattr(stage, "print_held_out_accuracy", lambda *arguments: None)
    stage.main()
    assert len(kinds) == 65 and set(kinds) == set(stage.STATES)
    logged = checkpoint.read_log(tmp_path / "new/srm_log.csv")
    assert [row["step"] for row in logged] == [10, 20, 30, 40, 50, 60, 65]  # and the last one
    monkeypatch.setattr(stage, "STATES", {"no mask": 0.2, "test-time-start": 0.8})
    with pytest.raises(UserError, match="STATES=.* names another kind of state: keep the names"):
        stage.main()


def test_the_reported_miou_is_that_of_the_last_mask(workplace):
    results = json.loads((workplace / "runs/folder/results.json").read_text())
    for row, scores in results["rows"].items():
        assert scores["mIoU"] == pytest.approx(results["iou_per_round"][row][-1], abs=1e-12)
        assert scores["mIoU"] != results["iou_per_round"][row][0]
    # each row of all rounds is prompted in its own way
    rows = ("AlignSAM", "w/o RL", "w/o SRM")
    assert len({tuple(results["iou_per_round"][row]) for row in rows}) == 3


def test_stage_4_has_the_actor_and_srm_that_stage_3_ended_with_and_its_shots(
        in_workplace, monkeypatch, workplace, tmp_path):
    content = torch.load(workplace / "runs/folder/agent.pt", weights_only=True)
    for part in ("actor", "srm"):
        content[part] = {name: torch.randn_like(value) for name, value in content[part].items()}
    content["settings"]["shots"] = 3
    torch.save(content, tmp_path / "agent.pt")
    stage = in_workplace("04_evaluate.py", ROWS=("PerSAM",))
    trained = stage.open_run(vars(stage)).load_agent(vars(stage))
    for part, network in (("actor", trained.actor), ("srm", trained.srm)):
        assert network.state_dict().keys() == content[part].keys() and not network.training
        for name, value in network.state_dict().items():
            assert torch.equal(value, content[part][name]), name
    given = []

    def prepare(*arguments):
        given.extend(arguments)
        raise Stop

    monkeypatch.setattr(stage.Baselines, "prepare", prepare)
    with pytest.raises(Stop):
        stage.main()
    rows, cache, shots, prompter, device = given
    assert (rows, shots, device.type) == (["PerSAM"], 3, "cpu")


class Places:
    """A trained run whose samples, by their image row, have embeddings of their own."""

    actor, srm = Actor(4).eval(), staticmethod(srm)

    def truth(self, samples):
        return Truth([np.zeros((8, 8), np.uint8)] * len(samples),
                     torch.zeros(len(samples), 100, dtype=torch.uint8))

    def embeddings(self, samples):
        return torch.stack([torch.full((4, 10, 10), row / 10) for row, _ in samples])

    def maps(self, samples):
        return torch.stack([torch.full((10, 10), row / 20) for row, _ in samples])

    def new_episode(self, embeddings, maps):
        return Episode(Alternating(), embeddings, maps, patch_centres(800, 80))


def test_random_patches_belong_to_a_place_in_the_test_set_and_a_seed_whatever_the_batch(
        monkeypatch):
    stage, places = load_script("04_evaluate.py"), Places()
    test_set = np.array([[5, 0], [6, 0], [7, 0], [8, 0]])

    def actions(numbers, row="w/o RL"):
        return stage.segment(row, numbers, test_set, places, places, None)[2]

    together = actions([0, 1, 2, 3])
    assert torch.equal(actions([2, 3]), together[2:])
    assert len({tuple(each) for each in together.tolist()}) == 4
    monkeypatch.setattr(stage, "SEED", 1)
    assert not torch.equal(actions([0, 1, 2, 3]), together)
    assert torch.equal(actions([2, 3], "AlignSAM"), actions([0, 1], "AlignSAM"))  # not random


def test_rows_without_rounds_segment_the_batch_by_their_own_means():
    stage, places = load_script("04_evaluate.py"), Places()
    test_set = np.array([[2, 1], [6, 0], [12, 1]])
    persam = SimpleNamespace(segment=lambda embedding, target: (embedding[0] + target, None))
    baselines = Baselines(persam, {0: torch.tensor(100.0), 1: torch.tensor(200.0)}, threshold=0.4)
    logits = {}
    for row, (_, _, rounds) in stage._ROWS.items():
        if rounds == "none":
            truth, [logits[row]], actions, episode = stage.segment(
                row, [2, 1], test_set, places, places, baselines)
            assert len(truth.label_maps) == 2 and actions.shape == (2, 0)
    assert logits["PerSAM"][:, 0, 0].tolist() == pytest.approx([201.2, 100.6])
    # y_r = sigmoid(20 (F - 0.5)) without a mask, of F = 1.2 and 0.6
    expected = torch.tensor([14.0, 2.0]).sigmoid() - 0.5
    assert torch.allclose(logits["SRM alone"][:, 3, 3], expected)
    # the map is 0.6 and 0.3, the threshold 0.4
    assert logits["CLIP Surgery alone"][:, 5, 5].tolist() == pytest.approx([0.2, -0.1])
    # the last of the loop above: half of T = 15 points, and one, of each label
    assert episode.labels.tolist() == [[1] * 8 + [0] * 8] * 2
    assert torch.equal(logits["CLIP Surgery points"], episode.logits)
    assert len(logits) == 4


def test_stage_1_draws_its_samples_by_its_seed(monkeypatch, workplace):
    monkeypatch.chdir(workplace)
    stage, given = load_script("01_cache_features.py"), []

    def draw(*arguments):
        given.extend(arguments)
        raise Stop

    monkeypatch.setattr(stage, "draw_shots", draw)
    constants = {"TASK": "folder", "PROMPT": "a", "DATA_DIR": "data", "SHOTS": 5, "SEED": 9}
    for name, value in constants.items():
        monkeypatch.setattr(stage, name, value)
    with pytest.raises(Stop):
        stage.main()
    assert given[2:4] == [5, 9]


def test_stage_4_scores_the_last_mask_and_counts_no_ignored_patch_as_a_hit():
    stage = load_script("04_evaluate.py")
    truth = np.zeros((8, 8), np.uint8)
    truth[:, :4] = 1
    at_centres = torch.tensor([[1, 0, 255, 1]])
    left = torch.full((1, 8, 8), -1.0)
    left[:, :, :4] = 1.0
    episode = SimpleNamespace(points=torch.zeros(1, 6, 2), labels=torch.zeros(1, 6))
    answer = (
        stage.Truth([truth], at_centres),
        [-left, left],
        torch.tensor([[0, 1, 2, 3]]),
        episode,
    )
    drawing = SimpleNamespace(draw=lambda *arguments: {})
    [score] = stage.evaluate("AlignSAM", lambda row, numbers: answer, [7], drawing)
    assert (score.number, score.chosen, score.hits) == (7, 4, 2)
    assert score.metrics["IoU"] == 1 and score.ious == [0.0, 1.0]
    assert score.counts == (32, 0, 32, 0)


def test_persams_target_is_of_the_samples_own_class(monkeypatch):
    class FakePerSAM:
        def __init__(self, sam, frame):
            pass

        def target(self, embeddings, truth):
            return embeddings.mean((0, 2, 3))

        def segment(self, embedding, target):
            return target, None

    monkeypatch.setattr("common.baselines.PerSAM", FakePerSAM)
    splits = {"train": np.array([[0, 1], [1, 0], [2, 1]]), "test": np.array([[5, 1], [6, 0]])}
    cache = SimpleNamespace(
        texts=("a", "b"), samples=splits.get,
        embeddings=lambda samples: torch.tensor((samples[:, 0] + 1.0) ** 2).view(-1, 1, 1, 1),
        truth_grid=lambda samples: torch.ones(len(samples), 1, 1))
    prompter, device = SimpleNamespace(sam=None, frame=800), torch.device("cpu")
    baselines = Baselines.prepare(["PerSAM"], cache, 0, prompter, device)
    episode = SimpleNamespace(embeddings=torch.zeros(3, 1, 1, 1))
    masks = baselines.segment("PerSAM", episode, np.array([[5, 1], [6, 0], [7, 1]]), None, 8)
    assert masks.flatten().tolist() == [5.0, 4.0, 5.0]  # the mean of 1 and 9 for b, 4 for a
    baselines = Baselines.prepare(["PerSAM"], cache, 2, prompter, device)
    assert baselines.targets[1].item() == 1.0 and baselines.targets[0].item() == 4.0


def test_clip_surgerys_threshold_is_of_the_training_samples(monkeypatch):
    monkeypatch.setattr("common.baselines.PerSAM", lambda sam, frame: None)
    monkeypatch.setattr("common.baselines.best_threshold", lambda maps, truths: (maps, truths))
    splits = {"train": np.array([[3, 0], [1, 0], [2, 0]]), "test": np.array([[5, 0], [6, 0]])}
    cache = SimpleNamespace(texts=("a",), samples=splits.get,
                            label_map=lambda sample: int(sample[0]),
                            maps=lambda samples: samples[:, 0].tolist())
    prompter = SimpleNamespace(sam=None, frame=800)
    for shots, rows in ((0, [3, 1, 2]), (2, [3, 1])):
        prepared = Baselines.prepare(["CLIP Surgery alone"], cache, shots, prompter, None)
        assert prepared.threshold == (rows, rows) and not prepared.targets


def test_the_foreground_rate_attainable_counts_patches_on_foreground_and_at_most_t():
    at_centres = torch.zeros(3, 100, dtype=torch.uint8)
    at_centres[0, :1], at_centres[1, 5:25], at_centres[2, 40:46] = 1, 1, 1
    at_centres[:, 50:] = 255
    cache = SimpleNamespace(attrs={"sam": "demo", "clip": "demo"},
                            truth_centres=lambda samples: at_centres)
    samples = np.array([[0, 0], [1, 0], [2, 0]])
    report = SimpleNamespace(
        cache=cache, trained={"settings": {"task": "voc", "seed": 0, "branch": "explicit"}},
        drawing=SimpleNamespace(samples=samples, classes=None), given={}, _of_rows=lambda name: {},
        made_with={"evaluation_rounds": 15, "evaluation_seed": 0, "sample_actions": False})
    attainable = Report.content(report, None)["foreground_rate_attainable"]
    assert attainable == pytest.approx((1 + 15 + 6) / (3 * 15))


def test_pooled_metrics_count_all_pixels_together():
    one, other = np.array([[1, 1, 0, 255]], np.uint8), np.array([[1, 0, 0, 0]], np.uint8)
    first = count_pixels(np.array([[True, False, False, True]]), one)
    second = count_pixels(np.array([[True, True, False, False]]), other)
    assert first == (1, 0, 1, 1) and second == (1, 1, 2, 0)
    assert pool([first, second]) == {
        "IoU": pytest.approx(2 / 4),
        "BER": pytest.approx((1 / 3 + 1 / 4) / 2),
    }
    assert pool([(0, 0, 5, 0)]) == {"IoU": 1.0, "BER": 0.0}


def test_a_summary_pools_each_class_and_gives_a_foreground_rate_to_rows_of_t_patches():
    good = {"IoU": 1.0, "F": 1.0, "BER": 0.0, "E": 1.0, "MAE": 0.0}
    scores = [Score(0, good, (2, 0, 2, 0), [0.5, 1.0], 2, 1),
              Score(1, good | {"IoU": 0.0}, (0, 3, 0, 1), [0.0, 0.0], 2, 2)]
    summary = summarise(scores, ["a", "b"], 2)
    assert summary["metrics"]["FR"] == 3 / 4 and summary["metrics"]["mIoU"] == 0.5
    assert summary["metrics"]["pooled"]["IoU"] == 0.5  # the mean over the two classes
    assert summarise(scores, None, 2)["metrics"]["pooled"]["IoU"] == pytest.approx(2 / 6)
    assert summary["metrics"]["per_class"]["a"]["pooled"]["IoU"] == 1.0
    assert summary["metrics"]["per_class"]["b"]["pooled"]["IoU"] == 0.0
    assert summary["iou_per_round"] == [0.25, 0.5]
    assert "FR" not in summarise(scores, None, 15)["metrics"]
