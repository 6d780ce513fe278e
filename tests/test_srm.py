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
    s_c, other, s_t = torch.randn(3, 2, 8, 6, 6)
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
    far = (srm(s_c, changed) - srm(s_c, s_t)).abs()[0, 20:, 20:]  # no convolution reaches there
    assert far.max() > 0


def test_the_explicit_branch_takes_the_semantic_state_first():
    torch.manual_seed(0)
    s_c, other, s_t = torch.randn(3, 2, 8, 6, 6)
    srm = build_srm("explicit", 8)
    torch.nn.init.zeros_(srm.join[0][0].weight[:, :8])  # the weights of s_c
    assert torch.equal(srm(s_c, s_t), srm(other, s_t))
    assert not torch.allclose(srm(s_c, s_t), srm(s_c, other))


def without_attention(channels: int) -> torch.nn.Module:
    """An explicit branch whose self-attention adds nothing."""
    srm = build_srm("explicit", channels)
    torch.nn.init.zeros_(srm.attended.weight)
    torch.nn.init.zeros_(srm.attended.bias)
    return srm


def test_what_self_attention_finds_is_added_to_the_joined_states():
    torch.manual_seed(0)
    s_c, s_t = torch.randn(2, 2, 8, 6, 5)
    srm = without_attention(8)
    passed_on = srm.join(torch.cat([s_c, s_t], 1))
    assert torch.equal(srm(s_c, s_t), srm.head(srm.decode(passed_on))[:, 0])


def test_self_attention_is_torchs_own_with_four_heads():
    torch.manual_seed(0)
    s_c, s_t = torch.randn(2, 2, 8, 6, 5)
    srm = build_srm("explicit", 8).requires_grad_(False)
    torch.nn.init.normal_(srm.query_key_value.weight, std=0.3)  # or every place attends alike
    torch.nn.init.normal_(srm.norm.weight)
    joined = srm.join(torch.cat([s_c, s_t], 1))
    tokens = srm.norm(joined.flatten(2).transpose(1, 2))

    def by_torch(heads: int) -> torch.Tensor:
        attention = torch.nn.MultiheadAttention(64, heads, batch_first=True).requires_grad_(False)
        attention.in_proj_weight.copy_(srm.query_key_value.weight)
        attention.in_proj_bias.copy_(srm.query_key_value.bias)
        attention.out_proj.load_state_dict(srm.attended.state_dict())
        attended = attention(tokens, tokens, tokens)[0].transpose(1, 2).view(2, 64, 6, 5)
        return srm.head(srm.decode(joined + attended))[:, 0]

    ours = srm(s_c, s_t)
    torch.testing.assert_close(ours, by_torch(4), atol=1e-6, rtol=0)
    assert all((ours - by_torch(heads)).abs().max() > 1e-2 for heads in (1, 2, 8))


@pytest.mark.parametrize("branch", ["implicit", "explicit"])
def test_convolutions_carry_a_place_two_cells_far_and_no_farther(branch):
    """Two 3 x 3 convolutions do, in either branch; self-attention is out of the way here."""
    torch.manual_seed(0)
    srm = without_attention(8) if branch == "explicit" else build_srm(branch, 8)
    state = torch.randn(1, 8, 11, 12)
    changed = state.clone()
    changed[..., 5, 6] += 5
    moved = (srm(changed, changed) - srm(state, state))[0].abs() > 1e-6
    neighbourhood = torch.zeros(11, 12, dtype=torch.bool)
    neighbourhood[3:8, 4:9] = True
    assert torch.equal(moved, neighbourhood)


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


def test_both_parts_of_the_loss_are_averaged_over_images_whatever_the_number_of_cells():
    sure, unsure = math.log(3), -math.log(3)  # probabilities 3/4 and 1/4
    logits = torch.tensor([[[sure, sure], [sure, sure]], [[unsure, 9.0], [9.0, 9.0]]])
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, -1.0], [-1.0, -1.0]]])
    four_cells = 1 - (2 * 0.75 + 1) / (3 + 1 + 1) - (math.log(0.75) + 3 * math.log(0.25)) / 4
    one_cell = 1 - (2 * 0.25 + 1) / (0.25 + 1 + 1) - math.log(0.25)
    assert srm_loss(logits[:1], truth[:1]).item() == pytest.approx(four_cells)
    assert srm_loss(logits[1:], truth[1:]).item() == pytest.approx(one_cell)
    assert srm_loss(logits, truth).item() == pytest.approx((four_cells + one_cell) / 2)


def test_an_image_without_any_truth_has_no_loss():
    assert srm_loss(torch.randn(1, 4, 4), torch.full((1, 4, 4), -1.0)).item() == 0


@pytest.mark.parametrize("branch", ["implicit", "explicit"])
def test_training_steps_learn_what_is_foreground(branch):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    srm = build_srm(branch, 16)
    optimizer = torch.optim.Adam(srm.parameters(), 3e-3)
    kinds = torch.randn(2, 16)  # the embeddings of background and of foreground

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        """States of four images, and their truth: foreground lies left of a random column."""
        column = torch.randint(1, 8, (4, 1, 1), generator=generator)
        truth = (torch.arange(8) < column).float().expand(4, 8, 8)
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
        generator = torch.Generator().manual_seed(seed)
        losses.append(train_step(srm, optimizer, state, state, truth, generator)[0])
    assert losses[0] == losses[1] != losses[2]


class Recording(torch.nn.Module):
    """An SRM that keeps what it is given, and answers `logits` (B, h, w) whatever that is."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, s_c: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
        self.s_c, self.s_t = s_c, s_t
        return self.logits


def step(srm: Recording, s_c: torch.Tensor, s_t: torch.Tensor, truth: torch.Tensor):
    optimizer = torch.optim.SGD(srm.parameters(), 1.0)
    return train_step(srm, optimizer, s_c, s_t, truth, torch.Generator().manual_seed(0))


def test_training_hides_two_channels_in_five_and_makes_up_for_them():
    srm = Recording(torch.zeros(20, 2, 3))
    step(srm, torch.full((20, 500, 2, 3), 2.0), torch.ones(20, 500, 2, 3), torch.ones(20, 2, 3))
    kept = srm.s_t[..., 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.02)
    expected = torch.where(kept, 1 / 0.6, 0.0)[..., None, None].expand(-1, -1, 2, 3)
    assert torch.allclose(srm.s_t, expected)  # a channel is hidden in all places
    assert torch.allclose(srm.s_c, 2 * expected)  # and from both states
    assert len({tuple(row.tolist()) for row in kept}) == 20  # others for each sample


def test_accuracy_is_the_share_of_known_cells_on_the_right_side_of_one_half():
    srm = Recording(torch.tensor([[[0.3, -0.3], [-0.3, -0.3]]]))
    truth = torch.tensor([[[0.6, 0.4], [-1.0, 0.6]]])  # right, right, unknown, wrong
    state = torch.ones(1, 4, 2, 2)
    assert step(srm, state, state, truth)[1] == pytest.approx(2 / 3)


def test_a_training_step_forgets_earlier_gradients():
    fresh, stale = Recording(torch.zeros(1, 2, 2)), Recording(torch.zeros(1, 2, 2))
    stale.logits.grad = torch.full((1, 2, 2), 100.0)
    state, truth = torch.ones(1, 4, 2, 2), torch.ones(1, 2, 2)
    assert step(fresh, state, state, truth) == step(stale, state, state, truth)
    assert torch.equal(fresh.logits, stale.logits) and fresh.logits.abs().min() > 0


def test_samples_at_cell_centres_are_the_cells_and_halfway_their_mean():
    values = torch.arange(16.0).view(1, 4, 4)
    points = torch.tensor([[[100.0, 100.0], [700.0, 300.0], [200.0, 100.0]]])  # in a frame of 800
    assert torch.allclose(sample_at(values, points, 800), torch.tensor([[0.0, 7.0, 0.5]]))


def test_beyond_the_last_cells_centre_a_sample_is_that_of_the_border():
    values = torch.arange(1.0, 16.0).view(1, 3, 5)
    points = torch.tensor([[[0, 0], [800, 0], [0, 800], [800, 800], [400, 800]]])
    expected = torch.tensor([[1.0, 5.0, 11.0, 15.0, 13.0]])
    assert torch.allclose(sample_at(values, points, 800), expected)
