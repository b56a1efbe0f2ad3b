"""Functions that the IFEval task file names: the data and the score, which is lm-eval's own.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.tasks.data import Columns, RowError, Source, dataset, documents, require


class Prompt(TypedDict):
    """A document: a prompt, the instructions it holds, and the arguments of each."""

    key: int
    prompt: str
    instruction_id_list: list[object]
    kwargs: list[object]


def _prompt(row: Columns) -> Prompt:
    prompt = Prompt(
        key=row.whole("key"),
        prompt=row.text("prompt"),
        instruction_id_list=row.items("instruction_id_list"),
        kwargs=row.items("kwargs"),
    )
    if len(prompt["instruction_id_list"]) != len(prompt["kwargs"]):
        raise RowError(f"{len(prompt['instruction_id_list'])} instructions, but {len(prompt['kwargs'])} kwargs.")
    return prompt


IFEVAL = Source(
    title="IFEval",
    folder="ifeval",
    hub="google/IFEval",
    config=None,
    files=("{split}.jsonl", "ifeval_input_data.jsonl", "input_data.jsonl"),
    where="https://huggingface.co/datasets/google/IFEval/resolve/main/ifeval_input_data.jsonl",
    row='{"key": 1000, "prompt": "…", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}',
    parse=_prompt,
)


def load(**metadata: object) -> datasets.DatasetDict:
    """Return the 541 prompts, whose split the hub calls `train`.

    Raises:
        UserError: the data cannot be used, or something that the scoring needs is not installed.
    """
    require(IFEVAL.title, "langdetect", "immutabledict", "nltk")
    rows = documents(IFEVAL, "train", metadata)
    _require_punkt()
    _require_scorable(rows)
    return dataset(train=rows)


def _require_punkt() -> None:
    """Check for the data by which nltk finds sentences, which lm-eval's scoring downloads if it can."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise UserError(
                "IFEval is scored with nltk's punkt_tab, which cannot be downloaded. Where there is a network, run "
                "`python -m nltk.downloader -d FOLDER punkt_tab`; then set NLTK_DATA=FOLDER."
            ) from None


def _require_scorable(rows: Iterable[Prompt]) -> None:
    """Score an answer to each prompt, before a model answers them all for a row that ends the scoring."""
    for row in rows:
        try:
            score(row, ["An answer."])
        except Exception as error:  # whatever an instruction's code makes of wrong arguments
            instructions, arguments = shown(row["instruction_id_list"]), shown(row["kwargs"])
            raise UserError(
                f"IFEval: the prompt with key {row['key']} cannot be scored ({type(error).__name__}: {error}). Its "
                f"'instruction_id_list' is {instructions}, its 'kwargs' {arguments}: both must be as {IFEVAL.hub} has "
                "them."
            ) from error


def score(doc: Prompt, results: Sequence[str]) -> dict[str, bool | list[bool]]:
    """Return lm-eval's four scores: by prompt or instruction, strict or loose.

    lm-eval's code draws what a prompt leaves open, each time that the code scores: keys 1122 and 1129 ask for the signs
    `#` and `!`, but the code knows letters only, and draws a letter. Here the prompt's key seeds the draws, so strict
    and loose scores have the same draws. The run's random state stays as it is.
    """
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0  # langdetect draws: unseeded, one answer could score differently each time
    prompt = utils.InputExample(
        key=doc["key"],
        instruction_id_list=doc["instruction_id_list"],
        prompt=doc["prompt"],
        kwargs=doc["kwargs"],
    )
    followed = {}
    for name, follows in (
        ("strict", utils.test_instruction_following_strict),
        ("loose", utils.test_instruction_following_loose),
    ):
        with _drawn_by(doc["key"]):
            followed[name] = follows(prompt, results[0])
    return {
        f"{level}_level_{name}_acc": value
        for name, found in followed.items()
        for level, value in (("prompt", found.follow_all_instructions), ("inst", found.follow_instruction_list))
    }


@contextlib.contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Seed Python's draws, and give the state back that they had before."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def mean_of_instructions(items: Sequence[Sequence[bool]]) -> float:
    """Return the mean over all prompts' instructions, each counted once."""
    followed = [one for item in items for one in item]
    return sum(followed) / len(followed)
