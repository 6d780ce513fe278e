"""A thousand masks as tools export them, each read as it is meant or refused, from one seed."""

import pytest

from tests.faults.mask_faults import OTHER, PLAIN, masks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return masks(tmp_path_factory.mktemp("masks"), 1000, seed=0, only="")


def test_no_mask_is_misread_in_silence_and_no_plain_one_is_refused(found):
    assert found.violations == []


def test_every_kind_is_tried_and_most_masks_that_are_not_plain_are_refused(found):
    for kind in (*PLAIN, *OTHER):
        name = kind.__name__.replace("_", " ")
        usual, other = ("read", "refused") if kind in PLAIN else ("refused", "read")
        assert found.tried[f"{name}: {usual}"] > 50 > found.tried.get(f"{name}: {other}", 0)
