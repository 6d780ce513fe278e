"""Actor, critic and PPO's update against values computed by hand and against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import agent
from common.agent import (
    Actor,
    Critic,
    Rollout,
    normalise,
    pick,
    policy,
    pool_state,
    returns,
)


def test_returns_equal_hand_computed_values():
    rewards = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    last_value = torch.tensor([4.0, 0.0])
    # column 0: 1 + 0.5 * (-1 + 0.5 * (1 + 0.5 * 4)) = 1.25, and so on backwards
    expected = torch.tensor([[1.25, -1.25], [0.5, -0.5], [3.0, 1.0]])
    assert torch.equal(returns(rewards, last_value, 0.5), expected)


def test_the_return_of_a_constant_reward_is_the_geometric_series():
    targets = returns(torch.ones(15, 1), torch.zeros(1), 0.99)
    assert targets[0].item() == pytest.approx((1 - 0.99 ** 15) / (1 - 0.99), rel=1e-5)


def test_equal_advantages_become_zeros():
    assert torch.equal(normalise(torch.full((2, 3), 0.5)), torch.zeros(2, 3))


def test_advantages_are_normalised_within_each_round():
    advantages = normalise(torch.tensor([[1.0, 2.0, 3.0], [-100.0, -90.0, -80.0]]))
    assert torch.allclose(advantages, torch.tensor([[-1.0, 0.0, 1.0]]).expand(2, -1))


def ppo_update(actor, critic, optimizer, states, actions, log_probs, targets, advantages,
               epochs):
    """agent.ppo_update on a roll-out of a single round, in which every patch is allowed."""
    allowed = torch.ones(1, len(states), 9, dtype=torch.bool)
    rollout = Rollout(None, allowed, actions[None], log_probs[None], None, None, None)
    return agent.ppo_update(actor, critic, optimizer, states, rollout, targets[None],
                            advantages[None], epochs, 0.2)


def test_an_update_follows_equations_8_to_10_for_several_rounds_and_images():
    """Losses and step of T = 2 rounds of B = 3 images, against the equations written out."""
    torch.manual_seed(0)
    rounds, images, epsilon = 2, 3, 0.2
    actor, critic = Actor(4), Critic(4, 2.0)
    torch.nn.init.normal_(actor.head.weight, std=0.02)
    states = torch.randn(rounds, images, 4, 3, 3)
    allowed = torch.rand(rounds, images, 9) < 0.7
    actions = torch.multinomial(allowed.flatten(0, 1).float(), 1).view(rounds, images)
    advantages, targets = torch.randn(rounds, images), torch.randn(rounds, images)
    old = policy(actor(states.flatten(0, 1)), allowed.flatten(0, 1)).log_prob(actions.flatten())
    old = old.detach().view(rounds, images) + 0.3 * torch.randn(rounds, images)

    policy_losses, value_losses, divergences = [], [], []
    for t in range(rounds):
        for image in range(images):
            logits = actor(states[t, image][None])[0]
            kept = logits[allowed[t, image]].exp().sum()
            log_prob = (logits[actions[t, image]].exp() / kept).log()
            ratio = (log_prob - old[t, image]).exp()
            limited = max(1 - epsilon, min(1 + epsilon, ratio.item()))
            advantage = advantages[t, image]
            free = ratio * advantage
            policy_losses.append(-(free if free <= limited * advantage else limited * advantage))
            value_losses.append((critic(states[t, image][None])[0] - targets[t, image]) ** 2)
            divergences.append((ratio - 1 - ratio.log()).item())
    policy_loss, value_loss = sum(policy_losses) / 6, sum(value_losses) / 6
    parameters = [*actor.parameters(), *critic.parameters()]
    gradients = torch.autograd.grad(policy_loss + value_loss, parameters)
    expected = [weight.detach() - 0.1 * gradient
                for weight, gradient in zip(parameters, gradients)]

    rollout = Rollout(None, allowed, actions, old, None, None, None)
    log = agent.ppo_update(actor, critic, torch.optim.SGD(parameters, 0.1), states.flatten(0, 1),
                           rollout, targets, advantages, 1, epsilon)
    assert log["policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert log["value_loss"] == pytest.approx(value_loss.item(), abs=1e-5)
    assert log["kl"] == pytest.approx(sum(divergences) / 6, abs=1e-5)
    for weight, wanted in zip(parameters, expected):
        torch.testing.assert_close(weight.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_an_update_with_a_loss_that_is_not_finite_leaves_the_weights_alone():
    torch.manual_seed(0)
    states, _, actions = toy()
    actor, critic = Actor(4), Critic(4, 1.0)
    weights = [weight.clone() for weight in actor.parameters()]
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], 0.1)
    numbers = torch.full((len(states),), math.nan)
    log = ppo_update(actor, critic, optimizer, states, actions, numbers, numbers, numbers, 2)
    assert math.isnan(log["policy_loss"])
    assert all(torch.equal(old, new) for old, new in zip(weights, actor.parameters()))


def test_the_log_of_a_roll_out_counts_rewards_and_labels():
    rewards = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    labels = torch.tensor([[1, 1], [0, 1], [0, 0]])
    summary = Rollout(None, None, None, None, None, labels, rewards).summary()
    assert summary == {"return": pytest.approx((1 - 1) / 2), "foreground_rate": 3 / 6,
                       "label_accuracy": pytest.approx(4 / 6)}


def toy(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States on a 3 x 3 grid whose first channel marks a patch, that patch, and a random action."""
    generator = torch.Generator().manual_seed(0)
    marked = torch.randint(9, (count,), generator=generator)
    states = torch.zeros(count, 4, 9)
    states[torch.arange(count), 0, marked] = 3.0
    return states.view(count, 4, 3, 3), marked, torch.randint(9, (count,), generator=generator)


def test_the_update_raises_the_probability_of_rewarded_actions():
    torch.manual_seed(0)
    states, marked, actions = toy()
    actor, critic = Actor(4), Critic(4, 1.0)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-2)
    allowed = torch.ones(len(states), 9, dtype=torch.bool)
    rewards = (actions == marked).float() * 2 - 1
    with torch.no_grad():
        before = policy(actor(states), allowed)
        old_log_probs = before.log_prob(actions)
    for _ in range(5):
        log = ppo_update(actor, critic, optimizer, states, actions, old_log_probs, rewards, rewards,
                         10)
    after = policy(actor(states), allowed)
    rise = after.log_prob(marked) - before.log_prob(marked)
    assert rise.mean() > 0.1 and log["kl"] > 0
    assert log["clip_fraction"] > 0  # the clip was reached, so the rise is bounded by it


def test_actions_beyond_the_clip_range_move_the_actor_no_further():
    torch.manual_seed(0)
    states, _, actions = toy()
    actor, critic = Actor(4), Critic(4, 1.0)
    allowed = torch.ones(len(states), 9, dtype=torch.bool)
    advantages = torch.ones(len(states))
    advantages[::2] = -1.0
    log_probs = policy(actor(states), allowed).log_prob(actions).detach()
    # Ratio 1.5 where it should rise, else 1 / 1.5.
    old_log_probs = log_probs - advantages * math.log(1.5)
    weights = [parameter.clone() for parameter in actor.parameters()]
    ppo_update(actor, critic, torch.optim.SGD(actor.parameters(), 1.0), states, actions,
               old_log_probs, advantages, advantages, 1)
    assert all(torch.equal(old, new) for old, new in zip(weights, actor.parameters()))
    inside = log_probs - advantages * math.log(1.1)  # within the range it does move
    ppo_update(actor, critic, torch.optim.SGD(actor.parameters(), 1.0), states, actions, inside,
               advantages, advantages, 1)
    assert not all(torch.equal(old, new) for old, new in zip(weights, actor.parameters()))


def test_the_critic_learns_the_targets_and_explains_their_variance():
    torch.manual_seed(0)
    states, marked, actions = toy()
    states = states + marked.view(-1, 1, 1, 1) / 4
    actor, critic = Actor(4), Critic(4, 5.0)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-2)
    allowed = torch.ones(len(states), 9, dtype=torch.bool)
    targets = marked.float()
    old = policy(actor(states), allowed).log_prob(actions).detach()
    log = ppo_update(actor, critic, optimizer, states, actions, old, targets,
                     torch.randn(len(states)), 300)
    assert log["explained_variance"] > 0.9


def test_a_patch_that_is_not_allowed_has_no_probability_and_entropy_stays_finite():
    allowed = torch.zeros(2, 100, dtype=torch.bool)
    allowed[:, :7] = True
    distribution = policy(torch.randn(2, 100) * 0, allowed)
    assert distribution.probs[:, 7:].sum() == 0
    assert torch.allclose(distribution.entropy(), torch.full((2,), math.log(7)))
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    drawn = torch.cat([pick(distribution, generator) for generator in generators])
    assert set(drawn.tolist()) == set(range(7))


def test_the_policy_is_the_softmax_over_the_allowed_patches():
    logits = torch.tensor([[1.0, 5.0, 2.0, 0.0], [0.0, 0.0, 3.0, 1.0]])
    allowed = torch.tensor([[True, False, True, True], [True, True, True, False]])
    weights = logits.exp() * allowed
    assert torch.allclose(policy(logits, allowed).probs, weights / weights.sum(1, keepdim=True))


def test_actions_are_drawn_as_often_as_each_images_own_policy_says():
    shares = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.2, 0.2, 0.6]])
    logits = shares.clamp(min=1e-9).log()
    logits[0, 3] = logits[1, 0] = 50.0  # liked most, but not allowed
    distribution = policy(logits.repeat(4000, 1), (shares > 0).repeat(4000, 1))
    drawn = pick(distribution, torch.Generator().manual_seed(0)).view(4000, 2)
    for image in (0, 1):
        frequencies = torch.bincount(drawn[:, image], minlength=4) / 4000
        assert torch.allclose(frequencies, shares[image], atol=0.03)
        assert frequencies[shares[image] == 0] == 0


def test_a_draw_follows_the_given_generator_alone():
    distribution = policy(torch.zeros(50, 100), torch.ones(50, 100, dtype=torch.bool))
    draws = []
    for seed, other in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(other)
        draws.append(pick(distribution, torch.Generator().manual_seed(seed)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_first_policy_is_uniform():
    logits = Actor(8)(torch.randn(3, 8, 10, 10))
    assert logits.shape == (3, 100) and torch.equal(logits, torch.zeros(3, 100))


def test_each_logit_follows_its_own_patch():
    torch.manual_seed(0)
    actor = Actor(1)
    torch.nn.init.normal_(actor.head.weight)
    state = torch.zeros(1, 1, 80, 80)
    base = actor(pool_state(state, 10))
    state[0, 0, 8 * 3:8 * 4, 8 * 7:8 * 8] = 5.0  # row 3, column 7
    change = (actor(pool_state(state, 10)) - base).detach().abs()[0].view(10, 10)
    assert change[3, 7] > 0 and change[2:5, 6:9].sum().item() == pytest.approx(change.sum().item())


def random_agent() -> tuple[Actor, Critic, torch.Tensor]:
    """An actor and a critic (of scale 7) whose every weight is random, and two states."""
    torch.manual_seed(0)
    actor, critic = Actor(4), Critic(4, 7.0)
    for parameter in [*actor.parameters(), *critic.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return actor, critic, torch.randn(2, 4, 10, 10)


def test_logits_are_ten_times_the_actors_output():
    actor, _, state = random_agent()
    assert torch.allclose(actor(state), 10 * actor.head(actor.trunk(state)).view(2, 100))


def test_a_value_is_the_scale_times_the_output_for_the_mean_over_patches():
    _, critic, state = random_agent()
    output = critic.head(critic.trunk(state).view(2, -1, 100).mean(2))
    assert critic(state).shape == (2,)
    assert torch.allclose(critic(state), 7 * output[:, 0])


def test_where_patches_hold_whole_cells_the_pooled_state_is_torchs_average():
    torch.manual_seed(0)
    state = torch.randn(2, 3, 40, 20)
    expected = F.adaptive_avg_pool2d(state, 10)
    assert torch.allclose(pool_state(state, 10), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (64, 64), (24, 64), (7, 12)])
def test_a_cell_that_two_patches_cut_counts_in_each_by_its_share(shape):
    torch.manual_seed(0)
    state = torch.randn(2, 3, *shape)
    fine = state  # with every cell repeated until a patch holds whole ones
    for axis, cells in ((2, shape[0]), (3, shape[1])):
        fine = fine.repeat_interleave(math.lcm(cells, 10) // cells, dim=axis)
    expected = F.avg_pool2d(fine, (fine.shape[2] // 10, fine.shape[3] // 10))
    assert torch.allclose(pool_state(state, 10), expected, atol=1e-5)
