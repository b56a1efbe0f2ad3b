from __future__ import annotations

import collections
import itertools
import json
import re

import pytest
from demo_problems import STORIES, Problem, is_held_out, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from make_demo import problems_jsonl

from sdar_lm_eval.demo import PROBLEMS

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
EVENT = re.compile(r"(gives|loses|sells|buys|finds|brings) (\d+)")


def take(count: int, seed: int = 0, *, held_out: bool = False) -> list[Problem]:
    return list(itertools.islice(problems(seed, held_out=held_out), count))


def result(problem: Problem) -> int:
    return int(problem.answer.rpartition("#### ")[2])


def numbers_in(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\d+", text)}


def solution(problem: Problem) -> int:
    """What the question asks, from its words and not from its answer."""
    question, (a, b, *rest) = problem.question, problem.numbers
    match problem.story, rest:
        case "ledger", _:
            events = EVENT.findall(question)
            assert [int(n) for _, n in events] == [b, *rest]
            return a + sum(int(n) if verb in ("buys", "finds", "brings") else -int(n) for verb, n in events)
        case "compare", []:
            assert f"has {a} " in question
            return a + a + (b if f"has {b} more than" in question else -b)
        case "groups", [n]:
            return a * b + (-n if re.search(rf"(?<!It) takes {n} |{n} of them are taken out", question) else n)
        case "bill", [each]:
            return a + b * each
        case "change", [each]:
            return a - b * each
        case "pages", [second]:
            return a - b - second
        case "machine", [broken]:
            return a * b - broken
        case "share", [extra]:
            assert a % b == 0
            return a // b + extra
        case "bus", [on]:
            assert f"{b} get off" in question
            return a - b + on
        case "savings", [before]:
            return a * b + before
    raise AssertionError(problem)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), held_out=st.booleans())
def test_every_answer_is_right(seed: int, held_out: bool) -> None:
    for problem in take(30, seed, held_out=held_out):
        assert result(problem) == solution(problem), problem
        *steps, last = problem.answer.split("\n")
        assert last == f"#### {result(problem)}"
        known = set(problem.numbers)
        values = []
        for left, sign, right, value in (found.groups() for step in steps for found in EQUATION.finditer(step)):
            a, b = int(left), int(right)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if sign == "/" else 0}[sign]
            assert int(value) == exact, problem
            assert {a, b} <= known, problem  # of the question, or found before
            known.add(int(value))
            values.append(int(value))
        assert 1 <= len(values) <= 3
        assert all(0 <= value < 1000 for value in values)
        assert values[-1] == result(problem)
        if not EQUATION.search(steps[-1]):
            assert numbers_in(steps[-1]) == {result(problem)}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), held_out=st.booleans())
def test_a_question_names_its_numbers_and_not_its_result_alone(seed: int, held_out: bool) -> None:
    for problem in take(30, seed, held_out=held_out):
        assert set(problem.numbers) <= numbers_in(problem.question)
        assert all(0 < number < 1000 for number in numbers_in(problem.question))
        assert len(numbers_in(problem.question)) <= len(problem.numbers) + 1  # a distractor
        assert "  " not in problem.question
        assert problem.question.isascii()


def test_training_and_test_share_no_combination_of_numbers() -> None:
    train = {tuple(sorted(problem.numbers)) for seed in (0, 1) for problem in take(5000, seed)}
    test = {tuple(sorted(problem.numbers)) for seed in (0, 1) for problem in take(2000, seed, held_out=True)}
    assert not train & test
    assert len(test) > 2000


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 999), min_size=2, max_size=4), shuffle=st.randoms())
def test_the_split_knows_no_order(numbers: list[int], shuffle: object) -> None:
    other = list(numbers)
    shuffle.shuffle(other)  # type: ignore[attr-defined]
    assert is_held_out(tuple(numbers)) == is_held_out(tuple(other))


def test_one_combination_in_twenty_is_held_out() -> None:
    held_out = sum(is_held_out((a, b)) for a in range(200) for b in range(a, 200))
    assert held_out / 20_100 == pytest.approx(1 / 20, abs=0.005)


def test_every_story_is_in_the_test_set_equally() -> None:
    stories = collections.Counter(problem.story for problem in take(200, held_out=True))
    assert set(stories.values()) == {20}
    assert len(stories) == len(STORIES)
    questions = [json.loads(line)["question"] for line in PROBLEMS.read_text().splitlines()]
    assert questions == [problem.question for problem in take(200, held_out=True)]
    assert len(set(questions)) == 200


def test_the_same_seed_gives_the_same_problems() -> None:
    assert take(50, 7) == take(50, 7)
    assert take(50, 7) != take(50, 8)
    assert take(50, 7) != take(50, 7, held_out=True)


def test_the_bundled_problems_are_those_of_seed_0() -> None:
    assert problems_jsonl(0).encode() == PROBLEMS.read_bytes()


def test_the_answer_is_not_determined_by_the_question() -> None:
    """What makes parallel decoding hard: the wordings of a step and of the end, and the order of operands, are free."""
    answers = [problem.answer for problem in take(3000)]
    openings = collections.Counter(re.split(r" \d|\d", answer)[0] for answer in answers)
    assert set(openings) == {"That is", "This makes", "We get", "So there are", ""}
    assert min(openings.values()) > 400
    products = [found.groups() for answer in answers for found in re.finditer(r"(\d+) \* (\d+)", answer)]
    assert 0.4 < sum(int(a) > int(b) for a, b in products) / len(products) < 0.6
