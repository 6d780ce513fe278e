"""The agent (paper, section 3.2): actor and critic on the 10 x 10 action grid, PPO's update."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from common.layers import conv_block, interval_overlaps

WIDTH = 32  # channels of actor and critic: 50 images cannot train more
LOGIT_SCALE = 10  # factor on the actor's output: at the paper's rate logits change too slowly


def trunk(channels: int) -> nn.Sequential:
    """(B, C, g, g) to (B, WIDTH, g, g): one feature vector per action."""
    return nn.Sequential(*conv_block(channels, WIDTH, 1), *conv_block(WIDTH, WIDTH, 3))


class Actor(nn.Module):
    """pi_theta: the state on the action grid to one logit per patch, row by row."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk(channels), nn.Conv2d(WIDTH, 1, 1)
        nn.init.zeros_(self.head.weight)  # the first policy is the uniform one
        nn.init.zeros_(self.head.bias)

    def forward(self, state: Tensor) -> Tensor:
        """state: (B, C, g, g), pooled by `pool_state`. Returns logits (B, g * g)."""
        return LOGIT_SCALE * self.head(self.trunk(state)).flatten(1)


class Critic(nn.Module):
    """V_omega: the state on the action grid to its value, `scale` times an output of order 1."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.trunk, self.head, self.scale = trunk(channels), nn.Linear(WIDTH, 1), scale

    def forward(self, state: Tensor) -> Tensor:
        """state: (B, C, g, g), pooled by `pool_state`. Returns values (B,)."""
        return self.scale * self.head(self.trunk(state).mean((2, 3)))[:, 0]


def pool_state(state: Tensor, side: int) -> Tensor:
    """The state s_t (B, C, h, w) averaged over each of the side x side patches.

    This is what actor and critic read. Where a patch ends inside a cell of the state, the cell
    counts by the share that lies in the patch.
    """
    down, across = (_shares(side, cells, state.device).to(state) for cells in state.shape[2:])
    return down @ state @ across.T


@functools.cache  # made once for a size and device, not in every round
def _shares(patches: int, cells: int, device: torch.device) -> Tensor:
    """float32 (patches, cells): how much of each patch of a line lies in each cell of the state."""
    edges = np.arange(patches + 1, dtype=np.float32) / patches
    cell_edges = np.arange(cells + 1, dtype=np.float32) / cells
    return torch.from_numpy(interval_overlaps(edges, cell_edges) * patches).to(device)


def policy(logits: Tensor, allowed: Tensor) -> Categorical:
    """pi(. | s_t) over the patches that are still allowed.

    logits: (B, A). allowed: bool (B, A), at least one of them in each row.
    """
    return Categorical(logits=logits.masked_fill(~allowed, float("-inf")))


def pick(distribution: Categorical, generator: torch.Generator) -> Tensor:
    """Actions (B,) drawn from the policy; generator: on the CPU whatever the policy's device."""
    drawn = torch.multinomial(distribution.probs.cpu(), 1, generator=generator)[:, 0]
    return drawn.to(distribution.probs.device)


def gumbel_noise(seed: int, number: int, rounds: int, patches: int) -> Tensor:
    """(rounds, A): the patch with the highest logit + noise is a draw from the policy.

    Each sample, by its `number`, has a generator of its own: a draw does not depend on its batch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    uniform = torch.rand(rounds, patches, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log()


class Learner(NamedTuple):
    """What Algorithm 1 trains, and the optimisers; agent.pt keeps each under its name here."""

    srm: nn.Module
    actor: Actor
    critic: Critic
    ppo: torch.optim.Optimizer  # of actor and critic
    srm_optimizer: torch.optim.Optimizer


class Rollout(NamedTuple):
    """One episode of B images and T rounds, in the order of the rounds.

    States are not kept, for they are large: s_t is rebuilt as F * M_{t-1}.
    """

    masks: Tensor  # (T, B, h, w) float: M_{t-1}, the mask that round t starts from
    allowed: Tensor  # (T, B, A) bool: the patches that round t may choose
    actions: Tensor  # (T, B) int64: a_t
    log_probs: Tensor  # (T, B): log pi(a_t | s_t) when a_t was drawn
    values: Tensor  # (T, B): V(s_t)
    labels: Tensor  # (T, B): the label that the SRM gave to a_t
    rewards: Tensor  # (T, B): r_t, +1 on foreground, else -1

    def summary(self) -> dict[str, float]:
        """For the log: mean return without discount, and shares of actions and labels right."""
        on_foreground = self.rewards > 0
        return {"return": self.rewards.sum(0).mean().item(),
                "foreground_rate": on_foreground.float().mean().item(),
                "label_accuracy": (self.labels == on_foreground).float().mean().item()}


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

    The paper is silent. Eq. 6 closes each return with V(s_{T+1}). While the critic is still
    learning, its error grows from the last round to the first and would drown the choice of action.
    Within a round it is nearly the same for all images.
    """
    deviation = advantages.std(1, keepdim=True)
    return (advantages - advantages.mean(1, keepdim=True)) / (deviation + 1e-8)


def ppo_update(actor: Actor, critic: Critic, optimizer: torch.optim.Optimizer, states: Tensor,
               rollout: Rollout, targets: Tensor, advantages: Tensor, epochs: int,
               clip_range: float) -> dict[str, float]:
    """K epochs of full-batch updates on one roll-out (Eqs. 8 to 10).

    states: (T * B, C, g, g), round by round, pooled. targets, advantages: (T, B).
    Returns diagnostics of the last epoch.
    """
    states = states.contiguous(memory_format=torch.channels_last)  # as the norms read them: faster
    actions, allowed = rollout.actions.flatten(), rollout.allowed.flatten(0, 1)
    old_log_probs = rollout.log_probs.flatten()
    targets, advantages = targets.flatten(), advantages.flatten()
    for _ in range(epochs):
        distribution = policy(actor(states), allowed)
        log_ratio = distribution.log_prob(actions) - old_log_probs
        ratio = log_ratio.exp()  # Eq. 8, same action and state above and below the line
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()  # Eq. 9
        values = critic(states)
        value_loss = F.mse_loss(values, targets)  # Eq. 10
        loss = policy_loss + value_loss  # they share no parameter, so each trains its own network
        if not loss.isfinite():
            break  # stage 3 says so; a step would spread it over the weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return {
            "policy_loss": policy_loss.item(), "value_loss": value_loss.item(),
            "entropy": distribution.entropy().mean().item(),
            "kl": ((ratio - 1) - log_ratio).mean().item(),  # Schulman's k3 of KL(old || new)
            "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean().item(),
            "explained_variance": (1 - (targets - values).var() / targets.var()).item(),
        }
