from __future__ import annotations

import pytest

from sdar_lm_eval import Checkpoint, make_engine
from sdar_lm_eval.demo import prompts


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.open("demo")


@pytest.fixture(scope="module")
def native(demo):
    """In float32: what another engine makes different is then the other's rounding alone."""
    return make_engine("native", demo, dtype="float32")


@pytest.fixture(scope="module")
def questions(demo):
    return prompts(demo)


@pytest.fixture(scope="module")
def rounded(demo):
    """The same in bfloat16."""
    return make_engine("native", demo, dtype="bfloat16")
