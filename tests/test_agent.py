"""Actor, critic and PPO's update against values computed by hand and against closed forms."""

import math

import pytest
import torch

from common import agent
from common.agent import (Actor, Critic, Rollout, entropy, normalise, pick, policy, pool_state,
                          returns)


def test_returns_equal_hand_computed_values():
    rewards = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    last_value = torch.tensor([4.0, 0.0])
    # column 0: 1 + 0.5 * (-1 + 0.5 * (1 + 0.5 * 4)) = 1.25, and so on backwards
    expected = torch.tensor([[1.25, -1.25], [0.5, -0.5], [3.0, 1.0]])
    assert torch.equal(returns(rewards, last_value, 0.5), expected)


def test_the_return_of_a_constant_reward_is_the_geometric_series():
    targets = returns(torch.ones(15, 1), torch.zeros(1), 0.99)
    assert targets[0].item() == pytest.approx((1 - 0.99 ** 15) / (1 - 0.99), rel=1e-5)


def test_advantages_are_normalised_within_each_round():
    advantages = normalise(torch.tensor([[1.0, 2.0, 3.0], [-100.0, -90.0, -80.0]]))
    assert torch.allclose(advantages, torch.tensor([[-1.0, 0.0, 1.0]]).expand(2, -1))


def ppo_update(actor, critic, optimizer, states, actions, allowed, log_probs, targets, advantages, *more):
    """agent.ppo_update on a roll-out of a single round."""
    rollout = Rollout(None, allowed[None], actions[None], log_probs[None], None, None, None)
    return agent.ppo_update(actor, critic, optimizer, states, rollout, targets[None], advantages[None], *more)


def toy(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States on a 3 x 3 grid whose first channel marks one patch, that patch, and a random choice of action."""
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
        log = ppo_update(actor, critic, optimizer, states, actions, allowed, old_log_probs, rewards, rewards, 10, 0.2)
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
    old_log_probs = log_probs - advantages * math.log(1.5)  # ratio 1.5 where it should rise, else 1 / 1.5
    weights = [parameter.clone() for parameter in actor.parameters()]
    ppo_update(actor, critic, torch.optim.SGD(actor.parameters(), 1.0), states, actions, allowed, old_log_probs,
               advantages, advantages, 1, 0.2)
    assert all(torch.equal(old, new) for old, new in zip(weights, actor.parameters()))
    inside = log_probs - advantages * math.log(1.1)  # within the range it does move
    ppo_update(actor, critic, torch.optim.SGD(actor.parameters(), 1.0), states, actions, allowed, inside, advantages,
               advantages, 1, 0.2)
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
    log = ppo_update(actor, critic, optimizer, states, actions, allowed, old, targets, torch.randn(len(states)), 300,
                     0.2)
    assert log["explained_variance"] > 0.9


def test_a_patch_that_is_not_allowed_has_no_probability_and_entropy_stays_finite():
    allowed = torch.zeros(2, 100, dtype=torch.bool)
    allowed[:, :7] = True
    distribution = policy(torch.randn(2, 100) * 0, allowed)
    assert distribution.probs[:, 7:].sum() == 0
    assert torch.allclose(entropy(distribution), torch.full((2,), math.log(7)))
    drawn = torch.cat([pick(distribution, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert set(drawn.tolist()) == set(range(7))


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
