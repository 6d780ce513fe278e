"""The wires between the functions: what each stage hands to which, held where it is handed over."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.agent import Actor, Critic, Learner, policy, pool_state
from common.baselines import Baselines
from common.cache import Cache
from common.episode import Episode, patch_centres
from common.metrics import Score, count_pixels, pool, summarise
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
    label_map = np.zeros((20, 20), np.uint8)
    label_map[:10] = 1
    shots = SimpleNamespace(truth_centres=truth, label_maps=[label_map] * IMAGES)
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
    rows = rolled_out.episode.points[:, :2, 1]
    assert (rows[:, 0] < 400).all() and (rows[:, 1] > 400).all()


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
    shots = SimpleNamespace(
        samples=range(6), truth=truth,
        maps_and_truth=lambda rows, every_text, generator: (episode.maps[rows], truth[rows]))
    learner = Learner(srm, None, None, None, "the SRM's optimiser")
    recipe = {"srm_steps": 4, "every_text": False}
    stage.train_srm(learner, episode, shots, recipe, torch.Generator().manual_seed(0))
    batches = set()
    for its_srm, optimizer, s_c, s_t, y, _ in steps:
        rows = [int((truth == one).all(2).all(1).nonzero()) for one in y]
        assert torch.equal(s_c, episode.embeddings[rows] * episode.maps[rows][:, None])
        assert torch.equal(s_t, episode.embeddings[rows] * episode.mask[rows][:, None])
        assert its_srm is srm and optimizer == "the SRM's optimiser" and len(set(rows)) == 3
        batches.add(tuple(rows))
    assert len(steps) == 4 and len(batches) > 1


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
                      "FEATURES": str(workplace / "runs/folder/features.h5"), "SRM_BATCH": 4}
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


def test_stage_2_learns_in_f_times_map_and_f_times_mask(in_workplace, monkeypatch, tmp_path):
    states = {"no mask": 0.0, "test-time start": 0.0, "true start": 1.0}
    stage = in_workplace("02_train_srm.py", tmp_path / "new", STATES=states, SEED=1)
    seen, reach_state = SimpleNamespace(), stage.reach_state

    def recording(kind, episode, *more):
        reach_state(kind, episode, *more)
        seen.episode = episode

    def step(srm, optimizer, s_c, s_t, y, generator):
        seen.s_c, seen.s_t, seen.y = s_c, s_t, y
        raise Stop

    monkeypatch.setattr(stage, "reach_state", recording)
    monkeypatch.setattr(stage, "train_step", step)
    with pytest.raises(Stop):
        stage.main()
    episode = seen.episode
    assert episode.mask.min() < 0.5 and not torch.equal(episode.mask, episode.maps)
    assert torch.equal(seen.s_c, episode.embeddings * episode.maps[:, None])
    assert torch.equal(seen.s_t, episode.embeddings * episode.mask[:, None])
    assert not episode.allowed[:, ::2].any() and episode.allowed[:, 1::2].all()
    shots = stage.open_run(vars(stage)).cache.training_set(0, 3, torch.device("cpu"))
    for points, embedding in zip(episode.points, episode.embeddings):  # P_0 by its own truth
        own = [torch.equal(embedding, other) for other in shots.embeddings]
        label_map = shots.label_maps[own.index(True)]
        columns, rows = (points[:2] / 800 * torch.tensor(label_map.shape[::-1])).long().T
        assert label_map[rows, columns].tolist() == [1, 0]


def test_the_reported_miou_is_that_of_the_last_mask(workplace):
    results = json.loads((workplace / "runs/folder/results.json").read_text())
    for row, scores in results["rows"].items():
        assert scores["mIoU"] == pytest.approx(results["iou_per_round"][row][-1], abs=1e-12)
        assert scores["mIoU"] != results["iou_per_round"][row][0]
    # each row is prompted in its own way
    assert len({tuple(after) for after in results["iou_per_round"].values()}) == 4


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
    training = np.array([[0, 1], [1, 0], [2, 1]])
    cache = SimpleNamespace(
        texts=("a", "b"), samples=lambda split: training,
        embeddings=lambda samples: torch.tensor((samples[:, 0] + 1.0) ** 2).view(-1, 1, 1, 1),
        truth_grid=lambda samples: torch.ones(len(samples), 1, 1))
    prompter, device = SimpleNamespace(sam=None, frame=800), torch.device("cpu")
    baselines = Baselines.prepare(["PerSAM"], cache, 0, prompter, device)
    episode = SimpleNamespace(embeddings=torch.zeros(3, 1, 1, 1))
    masks = baselines.segment("PerSAM", episode, np.array([[5, 1], [6, 0], [7, 1]]), None, 8)
    assert masks.flatten().tolist() == [5.0, 4.0, 5.0]  # the mean of 1 and 9 for b, 4 for a
    baselines = Baselines.prepare(["PerSAM"], cache, 2, prompter, device)
    assert baselines.targets[1].item() == 1.0 and baselines.targets[0].item() == 4.0


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
