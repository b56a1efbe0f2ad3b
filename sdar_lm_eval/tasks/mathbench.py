r"""Functions that the MathBench task files name: the data, the prompts, the filter, the scores.

MathBench (arXiv 2405.12209) has two parts, each with a set of questions for every stage of education and language.
Single-choice questions are asked four times, with the options in four orders, and count only if all four answers are
right. Such a question is one document with four requests. Source: configs/datasets/MathBench and datasets/mathbench.py
in opencompass of JetAstra/SDAR at c2041a8.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from sdar_lm_eval.tasks.data import Archive, Columns, Source, dataset, documents
from sdar_lm_eval.tasks.first_option import LETTERS, first_option
from sdar_lm_eval.tasks.opencompass_math import prediction
from sdar_lm_eval.tasks.set_score import SetScore

ORDERS = ("ABCD", "BCDA", "CDAB", "DABC")
"""The orders of the options. Order `BCDA` shows option B as A, C as B, D as C and A as D."""

_CHOICE, _CLOZE = "single_choice", "cloze"
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "a": {
        **{
            stage: tuple(f"{_CHOICE}_{language}" for language in ("cn", "en"))
            for stage in ("college", "high", "middle")
        },
        "primary": (f"{_CLOZE}_cn", f"{_CLOZE}_en"),
        "arithmetic": (f"{_CLOZE}_en",),
    },
    "t": {
        f"{stage}_knowledge": (f"{_CHOICE}_cn", f"{_CHOICE}_en") for stage in ("college", "high", "middle", "primary")
    },
}
"""Part (application, theory) -> stage -> its sets of questions."""

_PROMPTS = {
    "single_choice_cn": (
        "问题: 以下是一道关于数学的单项选择题，请你一步一步推理，并在最后用“所以答案为选项X”给出答案，其中“X”为"
        "选项A，B，C，D中你认为正确的选项。下面是你要回答的问题\n{}\n让我们一步一步思考："
    ),
    "single_choice_en": (
        "Question: Here is a multiple-choice question about mathematics. Please reason through it step by step, and at "
        'the end, provide your answer option with "Therefore, the correct answer is option X", Where "X" is the '
        "correct option you think from A，B，C，D. Here is the question you need to answer:\n{}\n"
        "Let's think step by step:"
    ),
    "cloze_cn": "{}\n请一步一步推理，并在最后用\\boxed{{}}给出你的答案。",
    "cloze_en": "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
}


class Row(TypedDict):
    """A row of the data set; `options` is empty where the question has none, `answer` a letter where it has some."""

    question: str
    options: list[str]
    answer: str


class Question(Row):
    """A document: a row, its stage (`college`), and its set of questions (`single_choice_cn`)."""

    stage: str
    set: str


class Asked(Question, total=False):
    """A document in one of its `orders`, by default in the first."""

    order: str


def _choice_row(row: Columns) -> Row:
    question, given, answer = row.text("question"), row.items("options"), row.text("answer")
    options = [str(option) for option in given if isinstance(option, (str, int, float))]
    if len(options) < len(given) or len(options) < len(LETTERS):
        raise row.malformed("options", f"{len(LETTERS)} strings")
    if answer not in tuple(LETTERS):
        raise row.malformed("answer", "A, B, C or D")
    # As in OpenCompass, of more options than four the first four count.
    return Row(question=question.strip(), options=options[: len(LETTERS)], answer=answer)


def _cloze_row(row: Columns) -> Row:
    return Row(question=row.text("question").strip(), options=[], answer=row.text("answer").strip())


MATHBENCH = Source(
    title="MathBench",
    folder="mathbench",
    hub=Archive(
        "http://opencompass.oss-cn-shanghai.aliyuncs.com/datasets/data/mathbench_v1.zip",
        md5="50257a910ca43d1f61a610a79fdb16b5",
    ),
    config=None,
    files=("{config}.jsonl", "mathbench_v1/{config}.jsonl"),
    where="what http://opencompass.oss-cn-shanghai.aliyuncs.com/datasets/data/mathbench_v1.zip unpacks to",
    row='{"question": "…", "options": ["…", "…", "…", "…"], "answer": "A"}',
    parse=_choice_row,
)
_CLOZE_SETS = dataclasses.replace(MATHBENCH, row='{"question": "…", "answer": "…"}', parse=_cloze_row)


def load(*, part: str, **metadata: object) -> datasets.DatasetDict:
    """Return the questions of a part, the first of each set before the second of each: `--limit` asks of all sets.

    Raises:
        UserError: the data cannot be used, or cannot be downloaded.
    """
    sets = []
    for stage, names in PARTS[part].items():
        for name in names:
            source = _CLOZE_SETS if name.startswith(_CLOZE) else MATHBENCH
            rows = documents(source, "test", metadata, config=f"{stage}/{name}")
            sets.append([Question(stage=stage, set=name, **row) for row in rows])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*sets))
    return dataset(test=[question for question in in_turn if question is not None])


def orders(doc: Question) -> tuple[str, ...]:
    """Return the orders in which a question's options are shown; one, which says nothing, without options."""
    return ORDERS if doc["options"] else ORDERS[:1]


def question(doc: Asked) -> str:
    """Return the user's turn (OpenCompass, mathbench_prompt.py), with the line break its chat models get."""
    text = doc["question"]
    if doc["options"]:
        shown = (doc["options"][LETTERS.index(letter)] for letter in doc.get("order", ORDERS[0]))
        text += "\n" + "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, shown, strict=True))
    return _PROMPTS[doc["set"]].format(text) + "\n"


def gold(doc: Question, order: str) -> str:
    """Return the right answer; of a question with options, the letter that the right one has in this order."""
    return LETTERS[order.index(doc["answer"])] if doc["options"] else doc["answer"]


def target(doc: Question) -> str:
    """Return the right answer of each order, divided by spaces, as samples files show them."""
    return " ".join(gold(doc, order) for order in orders(doc))


class CircularTask(ConfigurableTask):
    """lm-eval's task from a YAML file, which asks each document once for each of its `orders`."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def fewshot_context(self, doc: Any, num_fewshot: int, *others: Any, **settings: Any) -> list[str]:
        """Return the prompt of each order."""
        build = super().fewshot_context
        return [build({**doc, "order": order}, num_fewshot, *others, **settings) for order in orders(doc)]

    def construct_requests(self, doc: Any, ctx: Sequence[str], **settings: Any) -> list[Instance]:
        """Return a request for each prompt."""
        build = super().construct_requests
        requests = [build(doc, prompt, **settings) for prompt in ctx]
        for number, request in enumerate(requests):
            request.idx = number
        return requests


def filter_answer(responses: Iterable[Iterable[str]], docs: Sequence[Question]) -> list[list[str]]:
    """Apply `answer_of` to each request's responses (one, or one a repeat)."""
    return [[answer_of(doc, response) for response in of_doc] for of_doc, doc in zip(responses, docs, strict=True)]


def answer_of(doc: Question, response: str) -> str:
    """Return the answer that a response gives: a letter or `[invalid]`, or the text that answers a cloze question."""
    return first_option(response) if doc["options"] else prediction(response)


def score(doc: Question, results: Sequence[str]) -> dict[str, float | None]:
    """Return whether the answers in all orders are right, for each metric; None for the other stages' metrics."""
    rights = [found == gold(doc, order) for found, order in zip(results, orders(doc), strict=True)]
    right = SetScore.of(doc["stage"], doc["set"], all(rights))
    stages = next(part for part in PARTS.values() if doc["stage"] in part)
    return {
        "stage_mean": right,
        "stage_mean_stderr": right,
        "exact_match": float(right),
        **{stage: right if stage == doc["stage"] else None for stage in stages},
    }


def mean_of_stages(scores: Iterable[SetScore | None]) -> float | str:
    """Return the mean over stages of the mean over a stage's sets; "N/A", as lm-eval has it, where there is no score.

    The sets that `--limit` leaves out are left out of the means.
    """
    return _over_stages(scores, lambda values: sum(values) / len(values), lambda means: sum(means) / len(means))


def stderr_of_stages(scores: Iterable[SetScore | None]) -> float | str:
    """Return the standard error of `mean_of_stages`; "N/A" where a set has one score only."""
    return _over_stages(scores, _stderr, lambda errors: math.hypot(*errors) / len(errors))


def _over_stages(
    scores: Iterable[SetScore | None],
    of_set: Callable[[Sequence[float]], float],
    combined: Callable[[Sequence[float]], float],
) -> float | str:
    stages: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        if score is not None:
            stages.setdefault(score.stage, {}).setdefault(score.set, []).append(score)
    if not stages:
        return "N/A"
    mean = combined([combined([of_set(values) for values in sets.values()]) for sets in stages.values()])
    return "N/A" if math.isnan(mean) else mean


def _stderr(values: Sequence[float]) -> float:
    mean, number = sum(values) / len(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1) / number) if number > 1 else math.nan
