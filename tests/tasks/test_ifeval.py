from __future__ import annotations

from pathlib import Path

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
