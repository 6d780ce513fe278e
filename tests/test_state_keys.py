"""Names and shapes of the trained weights: agents that were saved earlier must go on loading."""

import pytest

from common.agent import Actor, Critic
from common.srm import build_srm

TRUNK = {
    "trunk.0.weight": (32, 5, 1, 1), "trunk.0.bias": (32,),
    "trunk.1.weight": (32,), "trunk.1.bias": (32,),
    "trunk.3.weight": (32, 32, 3, 3), "trunk.3.bias": (32,),
    "trunk.4.weight": (32,), "trunk.4.bias": (32,),
}  # of a state of 5 channels, as all below
ACTOR = TRUNK | {"head.weight": (1, 32, 1, 1), "head.bias": (1,)}
CRITIC = TRUNK | {"head.weight": (1, 32), "head.bias": (1,)}
IMPLICIT = {
    "branch.0.0.weight": (64, 5, 3, 3), "branch.0.0.bias": (64,),
    "branch.0.1.weight": (64,), "branch.0.1.bias": (64,),
    "branch.1.0.weight": (64, 64, 3, 3), "branch.1.0.bias": (64,),
    "branch.1.1.weight": (64,), "branch.1.1.bias": (64,),
    "head.weight": (1, 64, 1, 1), "head.bias": (1,),
}
EXPLICIT = {
    "join.0.0.weight": (64, 10, 1, 1), "join.0.0.bias": (64,),
    "join.0.1.weight": (64,), "join.0.1.bias": (64,),
    "join.1.0.weight": (64, 64, 1, 1), "join.1.0.bias": (64,),
    "join.1.1.weight": (64,), "join.1.1.bias": (64,),
    "join.2.0.weight": (64, 64, 1, 1), "join.2.0.bias": (64,),
    "join.2.1.weight": (64,), "join.2.1.bias": (64,),
    "norm.weight": (64,), "norm.bias": (64,),
    "query_key_value.weight": (192, 64), "query_key_value.bias": (192,),
    "attended.weight": (64, 64), "attended.bias": (64,),
    "decode.0.weight": (64, 64, 3, 3), "decode.0.bias": (64,),
    "decode.1.weight": (64,), "decode.1.bias": (64,),
    "head.weight": (1, 64, 3, 3), "head.bias": (1,),
}


@pytest.mark.parametrize("network, expected", [
    (Actor(5), ACTOR),
    (Critic(5, 2.0), CRITIC),
    (build_srm("implicit", 5), IMPLICIT),
    (build_srm("explicit", 5), EXPLICIT),
], ids=["actor", "critic", "implicit SRM", "explicit SRM"])
def test_weights_keep_their_names_and_shapes(network, expected):
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    assert shapes == expected
