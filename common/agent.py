"""The prompting agent: actor and critic on the 10 x 10 action grid, and PPO's update (paper, section 3.2)."""

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from common.layers import conv_block

WIDTH = 32  # channels of actor and critic: 50 images cannot train more
LOGIT_SCALE = 10  # of the actor's output: at the paper's learning rate, E K steps move an unscaled logit too little


def trunk(channels: int) -> nn.Sequential:
    """(B, C, g, g) to (B, WIDTH, g, g), one feature per action. The norms keep places visible where M is small."""
    return nn.Sequential(*conv_block(channels, WIDTH, 1), *conv_block(WIDTH, WIDTH, 3))


class Actor(nn.Module):
    """pi_theta: the state on the action grid (B, C, g, g) to one logit per patch (B, g * g), row by row."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk(channels), nn.Conv2d(WIDTH, 1, 1)
        nn.init.zeros_(self.head.weight)  # the first policy is the uniform one
        nn.init.zeros_(self.head.bias)

    def forward(self, state: Tensor) -> Tensor:
        return LOGIT_SCALE * self.head(self.trunk(state)).flatten(1)


class Critic(nn.Module):
    """V_omega: the state on the action grid (B, C, g, g) to its value (B,), as `scale` times an output of order 1."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.trunk, self.head, self.scale = trunk(channels), nn.Linear(WIDTH, 1), scale

    def forward(self, state: Tensor) -> Tensor:
        return self.scale * self.head(self.trunk(state).mean((2, 3)))[:, 0]


def pool_state(state: Tensor, side: int) -> Tensor:
    """The state s_t (B, C, h, w) averaged over each of the side x side patches: what actor and critic read.

    Where a patch ends inside a cell, the cell counts by the share that lies in the patch.
    """
    down, across = (_overlap(side, cells).to(state) for cells in state.shape[2:])
    return down @ state @ across.T


def _overlap(patches: int, cells: int) -> Tensor:
    """(patches, cells): the share of each of `patches` equal parts of a line in each of `cells` equal ones."""
    ends, borders = torch.arange(patches + 1)[:, None] / patches, torch.arange(cells + 1) / cells
    shared = torch.minimum(ends[1:], borders[1:]) - torch.maximum(ends[:-1], borders[:-1])
    return shared.clamp(min=0) * patches


def policy(logits: Tensor, allowed: Tensor) -> Categorical:
    """pi(. | s_t) over the patches (B, N) that are still allowed (B, N) bool; there must be one in each row."""
    return Categorical(logits=logits.masked_fill(~allowed, float("-inf")))


def pick(distribution: Categorical, generator: torch.Generator) -> Tensor:
    """(B,) actions drawn from the policy, by a generator on the CPU whatever the policy's device."""
    drawn = torch.multinomial(distribution.probs.cpu(), 1, generator=generator)[:, 0]
    return drawn.to(distribution.probs.device)


def entropy(distribution: Categorical) -> Tensor:
    """(B,) entropy in nats; torch's own is NaN where an action has probability 0."""
    return -torch.where(distribution.probs > 0, distribution.probs * distribution.logits, 0.0).sum(-1)


def returns(rewards: Tensor, last_value: Tensor, gamma: float) -> Tensor:
    """Eq. 6: Q(s_t, a_t) = sum over k = t..T of gamma^(k-t) r_k, + gamma^(T-t+1) V(s_{T+1}).

    rewards (T, B), last_value (B,) = V(s_{T+1}); returns (T, B).
    """
    targets, running = torch.empty_like(rewards), last_value
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * running
        targets[t] = running
    return targets


def normalise(advantages: Tensor) -> Tensor:
    """Advantages (T, B) with mean 0 and deviation 1 within each round.

    The paper is silent. Eq. 6 closes each return with V(s_{T+1}), so while the critic is still learning its error grows
    from the last round to the first and would drown the choice of action; within a round it is the same for all.
    """
    return (advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, keepdim=True) + 1e-8)


def ppo_update(actor: Actor, critic: Critic, optimizer: torch.optim.Optimizer, states: Tensor, actions: Tensor,
               allowed: Tensor, old_log_probs: Tensor, targets: Tensor, advantages: Tensor, epochs: int,
               clip_range: float) -> dict[str, float]:
    """K epochs of full-batch updates on one roll-out (Eqs. 8 to 10); returns diagnostics of the last epoch.

    states (N, C, g, g) pooled, actions (N,), allowed (N, A) bool, old_log_probs, targets and advantages (N,).
    """
    states = states.contiguous(memory_format=torch.channels_last)  # as the norms read them: a seventh of the time saved
    for _ in range(epochs):
        distribution = policy(actor(states), allowed)
        log_ratio = distribution.log_prob(actions) - old_log_probs
        ratio = log_ratio.exp()  # Eq. 8, same action and state above and below the line
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()  # Eq. 9
        values = critic(states)
        value_loss = F.mse_loss(values, targets)  # Eq. 10
        loss = policy_loss + value_loss  # no parameter is shared, so the sum trains each by its own loss
        if not loss.isfinite():
            break  # stage 3 says so; a step would spread it over the weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return {
            "policy_loss": policy_loss.item(), "value_loss": value_loss.item(),
            "entropy": entropy(distribution).mean().item(),
            "kl": ((ratio - 1) - log_ratio).mean().item(),  # Schulman's estimator k3 of KL(old || new)
            "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean().item(),
            "explained_variance": (1 - (targets - values).var() / targets.var()).item(),
        }
