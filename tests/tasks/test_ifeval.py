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
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (2.0, "generate_until", 0)


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


@pytest.mark.parametrize(("key", "sign"), [(1122, "#"), (1129, "!")])
def test_a_letter_that_is_drawn_is_the_prompt_s(key: int, sign: str, offline: Path) -> None:
    """lm-eval's letter frequency knows letters only, and draws one for each other sign that a prompt asks for."""
    doc = {
        "key": key,
        "prompt": f"Contain {sign} four times.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"let_relation": "at least", "letter": sign, "let_frequency": 4}],
    }
    answers = [f"{letter * 4} {letter.upper()} it." for letter in "abcdefghijklmnopqrstuvwxyz"]
    random.seed(0)
    state = random.getstate()
    scores = [score(doc, [answer]) for answer in answers]
    assert random.getstate() == state  # the run's draws stay the same
    for _ in range(5):
        random.random()
        assert [score(doc, [answer]) for answer in answers] == scores
    assert [s["prompt_level_strict_acc"] for s in scores] == [s["prompt_level_loose_acc"] for s in scores]
    assert sum(s["prompt_level_strict_acc"] for s in scores) == 1


def test_other_draws_are_the_prompt_s_too(offline: Path) -> None:
    """A row without the number of placeholders has one drawn."""
    row = miniature.IFEVAL[0] | {"instruction_id_list": ["detectable_content:number_placeholders"]}
    scores = [score(row | {"key": key}, ["[a] [b]"])["prompt_level_strict_acc"] for key in range(20)]
    assert scores == [score(row | {"key": key}, ["[a] [b]"])["prompt_level_strict_acc"] for key in range(20)]
    assert set(scores) == {True, False}


def test_the_real_prompts_load_without_a_word(bench: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert len(load()["train"]) == 541
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


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
