"""The semantic recalibration module's branches, its loss and its sampling."""

import math

import pytest
import torch

from common.runtime.errors import UserError
from common.srm import build_srm, sample_at, srm_loss, train_step


@pytest.mark.parametrize("branch", ["implicit", "explicit"])
def test_the_branches_answer_on_the_grid(branch):
    state = torch.randn(2, 8, 12, 9)
    assert build_srm(branch, 8)(state, state).shape == (2, 12, 9)


def test_only_the_explicit_branch_looks_at_the_semantic_state():
    torch.manual_seed(0)
    s_c, other, s_t = torch.randn(3, 1, 8, 6, 6)
    s_c, other, s_t = s_c.expand(2, -1, -1, -1), other.expand(2, -1, -1, -1), s_t.expand(2, -1, -1, -1)
    implicit, explicit = build_srm("implicit", 8), build_srm("explicit", 8)
    assert torch.equal(implicit(s_c, s_t), implicit(other, s_t))
    assert not torch.allclose(explicit(s_c, s_t), explicit(other, s_t))


def test_the_explicit_branch_joins_both_states_place_by_place():
    torch.manual_seed(0)
    states = torch.randn(1, 16, 6, 6)
    changed = states.clone()
    changed[..., 2, 3] += 1
    srm = build_srm("explicit", 8)
    moved = (srm.join(changed) != srm.join(states)).any(1)[0]
    assert moved.nonzero().tolist() == [[2, 3]]


def test_self_attention_relates_distant_places():
    torch.manual_seed(0)
    s_c, s_t = torch.randn(2, 1, 8, 40, 40)
    changed = s_t.clone()
    changed[..., 0, 0] += 50
    srm = build_srm("explicit", 8)
    far = (srm(s_c, changed) - srm(s_c, s_t)).abs()[0, 20:, 20:]  # beyond the reach of two 3 x 3 convolutions
    assert far.max() > 0


def test_an_unknown_branch_is_named():
    with pytest.raises(UserError, match="BRANCH=both is neither implicit nor explicit"):
        build_srm("both", 8)


def test_the_loss_equals_dice_and_cross_entropy_by_hand():
    logits = torch.zeros(1, 2, 2)  # probability one half everywhere
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    dice = 1 - (2 * 0.5 + 1) / (2.0 + 1.0 + 1)
    assert srm_loss(logits, truth).item() == pytest.approx(dice + math.log(2))


def test_cells_without_truth_do_not_count():
    torch.manual_seed(0)
    logits, truth = torch.randn(1, 4, 4), torch.rand(1, 4, 4)
    truth[0, :, 2:] = -1
    other = logits.clone()
    other[0, :, 2:] = 9
    assert torch.equal(srm_loss(logits, truth), srm_loss(other, truth))
    assert srm_loss(logits, truth) == srm_loss(logits[:, :, :2], truth[:, :, :2])


@pytest.mark.parametrize("branch", ["implicit", "explicit"])
def test_training_steps_learn_what_is_foreground(branch):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    srm = build_srm(branch, 16)
    optimizer = torch.optim.Adam(srm.parameters(), 3e-3)
    kinds = torch.randn(2, 16)  # the embeddings of background and of foreground, which is left of a random column

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        truth = (torch.arange(8) < torch.randint(1, 8, (4, 1, 1), generator=generator)).float().expand(4, 8, 8)
        return kinds[truth.long()].permute(0, 3, 1, 2), truth

    for _ in range(60):
        state, truth = draw()
        train_step(srm, optimizer, state, state, truth, generator)
    state, truth = draw()
    assert ((srm(state, state) > 0) == (truth > 0.5)).float().mean() > 0.95


def test_a_training_step_hides_channels_by_the_generators_draw():
    torch.manual_seed(0)
    state, truth = torch.randn(2, 16, 4, 4), torch.ones(2, 4, 4)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        srm = build_srm("implicit", 16)
        optimizer = torch.optim.SGD(srm.parameters(), 0.0)
        losses.append(train_step(srm, optimizer, state, state, truth, torch.Generator().manual_seed(seed))[0])
    assert losses[0] == losses[1] != losses[2]


def test_samples_at_cell_centres_are_the_cells_and_halfway_their_mean():
    values = torch.arange(16.0).view(1, 4, 4)
    points = torch.tensor([[[100.0, 100.0], [700.0, 300.0], [200.0, 100.0]]])  # (x, y) in a frame of 800
    assert torch.allclose(sample_at(values, points, 800), torch.tensor([[0.0, 7.0, 0.5]]))
