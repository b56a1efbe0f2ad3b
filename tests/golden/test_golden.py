"""Decoding answers what it answered when `ANSWER_REVISION` was last raised."""

from __future__ import annotations

import json

import pytest
from answers import SETTINGS, STORED, answers

from sdar_lm_eval.revision import ANSWER_REVISION

STORE = "store today's answers: python tests/golden/answers.py"


@pytest.fixture(scope="module")
def today():
    return answers()


def test_other_answers_are_another_revision(today):
    stored = json.loads(STORED.read_text())
    if stored["revision"] != ANSWER_REVISION:
        pytest.fail(f"ANSWER_REVISION is {ANSWER_REVISION}, the stored answers are of {stored['revision']}; {STORE}")
    known = stored["answers"]
    changed = [name for name in known | today if not _alike(known.get(name), today.get(name))]
    assert not changed, f"these answer otherwise now: raise sdar_lm_eval/revision.py's ANSWER_REVISION, then {STORE}"


def _alike(known, found):
    """Tokens are equal; scores but for another CPU's rounding."""
    if known is None or found is None or isinstance(known[0], list):
        return known == found
    return found == pytest.approx(known, abs=1e-3)


def test_each_setting_has_a_say(today):
    """Else a change of one would go unnoticed."""
    assert len({json.dumps(today[name]) for name in SETTINGS}) == len(SETTINGS)
