from __future__ import annotations

import pytest
from jetengine_standin import VERSIONS, standin
from support import random_checkpoint, read_weights, write_weights

from sdar_lm_eval import Checkpoint, make_engine

KINDS = ("native", *(f"jetengine {version}" for version in VERSIONS))


@pytest.fixture(scope="session")
def demo():
    return Checkpoint.open("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint of random weights, large ones, so that no two tokens are nearly as probable.

    The mask token never is the most probable one, as in any trained model.
    """
    folder = random_checkpoint(tmp_path_factory.mktemp("tiny"), head_dim=32)
    weights = read_weights(folder)
    weights["lm_head.weight"][Checkpoint.open(str(folder)).mask_token_id] = 0
    write_weights(folder, weights)
    return Checkpoint.open(str(folder))


@pytest.fixture(scope="module", params=KINDS)
def open_engine(request):
    """Every kind of engine in turn: a function that opens one, for a checkpoint and options."""
    name, _, version = request.param.partition(" ")
    if name == "native":
        yield lambda checkpoint, **options: make_engine("native", checkpoint, device="cpu", **options)
    else:
        with standin(version) as shared:
            shared.faults.alone = False
            yield lambda checkpoint, **options: make_engine("jetengine", checkpoint, **options)


@pytest.fixture(params=VERSIONS)
def jetengine(request):
    """What the stand-in for a version of JetEngine shares with tests; once for each version."""
    with standin(request.param) as shared:
        shared.version = request.param
        yield shared


@pytest.fixture
def jetengine_020():
    with standin("0.2.0") as shared:
        yield shared


@pytest.fixture
def jetengine_010():
    with standin("0.1.0") as shared:
        yield shared
