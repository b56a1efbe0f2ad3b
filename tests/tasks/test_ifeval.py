from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import miniature
import nltk
import pytest
from scripted import evaluate, load_task, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.ifeval import load, mean_of_instructions, score


def test_what_it_asks(offline: Path) -> None:
    task = load_task("ifeval_sdar")
    # OpenCompass at SDAR c2041a8, opencompass/configs/datasets/IFEval/IFEval_gen_353ae7.py: the prompt alone
    assert prompts(task) == [f"{row['prompt']}\n" for row in miniature.IFEVAL]
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (1.0, "generate_until", 0)


@pytest.mark.parametrize(
    ("number", "response", "strict", "loose"),
    [
        (0, "Rain falls.", [True], [True]),
        (0, "Rain, as it falls.", [False], [False]),
        (0, "Sure, here it is:\nRain falls.", [False], [True]),  # loose: without the first line
        (0, "", [False], [False]),
        (1, "The rain falls. It falls on the roof.", [True, True], [True, True]),
        (1, "The rain falls. It falls.", [False, True], [False, True]),
        (1, "The RAIN falls on the roof.", [True, False], [True, False]),
    ],
)
def test_scores(number: int, response: str, strict: list[bool], loose: list[bool], offline: Path) -> None:
    assert score(load()["train"][number], [response]) == {
        "prompt_level_strict_acc": all(strict),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": all(loose),
        "inst_level_loose_acc": loose,
    }


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "KeyError: 'punctuation:no_coma'"),
        ({"kwargs": ["no comma"]}, "AttributeError"),
        ({"kwargs": [{"commas": 3}]}, "unexpected keyword argument 'commas'"),
    ],
)
def test_a_row_that_ends_the_scoring_is_found_before_answers_are_made(
    row: dict[str, Any], says: str, offline: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own" / "train.jsonl"
    miniature.write_jsonl(file, [*miniature.IFEVAL, miniature.IFEVAL[0] | {"key": 7} | row])
    with pytest.raises(UserError, match=r"the prompt with key 7 cannot be scored .*both must be as google/IFEval") as e:
        load(ifeval_dir=str(file.parent))
    assert says in str(e.value)


def test_that_check_leaves_the_draws_of_a_run_as_they_are(offline: Path, tmp_path: Path) -> None:
    """A row without the number of placeholders has one drawn."""
    row = miniature.IFEVAL[0] | {"instruction_id_list": ["detectable_content:number_placeholders"]}
    file = miniature.write_jsonl(tmp_path / "own" / "train.jsonl", [row])
    before = random.getstate()
    load(ifeval_dir=str(file.parent))
    assert random.getstate() == before
    score(row, ["."])
    assert random.getstate() != before


def test_a_language_is_told_the_same_each_time(offline: Path) -> None:
    doc = {
        "key": 1,
        "prompt": "In German.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    }
    # Without a seed langdetect takes this for German in every third draw.
    answers = {score(doc, ["Adresse"])["prompt_level_strict_acc"] for _ in range(30)}
    assert len(answers) == 1
    assert score(doc, ["Der Regen fällt auf das Dach und läuft in den Garten."])["prompt_level_strict_acc"]


def test_the_mean_of_instructions() -> None:
    assert mean_of_instructions([[True], [True, False, False]]) == 0.5


def test_an_evaluation(offline: Path) -> None:
    results, _ = evaluate(lambda doc: "The rain falls. It falls, on a roof.", "ifeval_sdar")
    scores = results["results"]["ifeval_sdar"]
    assert scores["prompt_level_strict_acc,none"] == 0.5
    assert scores["inst_level_strict_acc,none"] == pytest.approx(2 / 3)


def test_no_sentence_splitter(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda name, quiet: False)
    with pytest.raises(UserError, match=r"nltk.downloader -d FOLDER punkt_tab`; then set NLTK_DATA=FOLDER\.$"):
        load()
    monkeypatch.setattr(nltk, "download", lambda name, quiet: True)
    assert len(load()["train"]) == 2
