from __future__ import annotations

import csv
import json
from pathlib import Path

import lm_eval
import miniature
import pytest
from scripted import TASKS, conversations, evaluate, load_task, manager, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.first_option import INVALID, first_option
from sdar_lm_eval.tasks.mmlu import answer, filter_first_option, load, question, score

# OpenCompass at SDAR c2041a8, opencompass/configs/datasets/mmlu/mmlu_gen_4d595a.py
ROUND = """There is a single choice question about college biology. Answer the question by replying A, B, C or D.
Question: {}
A. {}
B. two
C. three
D. four
Answer: 
"""  # noqa: W291


def _conversation(number: int) -> list[dict[str, str]]:
    turns = []
    for shot, letter in enumerate("ABCDA"):
        turns.append({"role": "user", "content": ROUND.format(f"dev {shot} of college_biology?", f"one {shot}")})
        turns.append({"role": "assistant", "content": f"{letter}\n"})
    test = {"role": "user", "content": ROUND.format(f"test {number} of college_biology?", f"one {number}")}
    return [*turns, test]


def test_a_round(offline: Path) -> None:
    data = load(subject="college_biology", pretrained="x", version=1.0)
    assert {split: len(rows) for split, rows in data.items()} == {"dev": 6, "test": 2}
    assert question(data["test"][1]) == ROUND.format("test 1 of college_biology?", "one 1")
    assert answer(data["test"][1]) == "C\n"


@pytest.mark.parametrize("multiturn", [True, False])
def test_shots_are_rounds_under_a_chat_template(multiturn: bool, offline: Path) -> None:
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn}
    _, requests = evaluate(lambda doc: "A", "mmlu_sdar_college_biology", **chat)
    assert [json.loads(context) for context, _ in requests] == [_conversation(0), _conversation(1)]
    assert requests[0][1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}


def test_a_system_instruction_comes_first(offline: Path) -> None:
    _, requests = evaluate(
        lambda doc: "A", "mmlu_sdar_college_biology", apply_chat_template=True, system_instruction="Be brief.", limit=1
    )
    assert json.loads(requests[0][0]) == [{"role": "system", "content": "Be brief."}, *_conversation(0)]


def test_more_shots_than_there_are(offline: Path) -> None:
    """The miniature has six."""
    with pytest.raises(UserError, match=r"with 7 shots, but its 'dev' data has 6\. .* run with --num_fewshot 6\."):
        evaluate(lambda doc: "A", "mmlu_sdar_college_biology", num_fewshot=7)


def test_other_numbers_of_shots(offline: Path) -> None:
    _, requests = evaluate(
        lambda doc: "A", "mmlu_sdar_college_biology", num_fewshot=2, limit=1, apply_chat_template=True
    )
    assert json.loads(requests[0][0]) == _conversation(0)[:4] + _conversation(0)[-1:]


def test_without_a_chat_template_it_is_one_text(offline: Path) -> None:
    prompt = prompts(load_task("mmlu_sdar_college_biology"))[1]
    contents = [turn["content"] for turn in _conversation(1)]
    shots = [question + answer for question, answer in zip(contents[:-1:2], contents[1::2], strict=True)]
    assert prompt == "\n".join([*shots, contents[-1]])


def test_every_prompt_is_the_released_evaluation_s(bench: Path, tmp_path: Path) -> None:
    """OpenCompass's MMLUDataset (opencompass/datasets/mmlu.py) opens CSV files as text: `\\r\\n` becomes `\\n`."""

    def as_released(subject: str, split: str) -> list[str]:
        file = tmp_path / f"{subject}_{split}.csv"
        lines = (bench / "mmlu" / subject / f"{split}.jsonl").read_text("utf-8").split("\n")
        with file.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows(
                [(row := json.loads(line))["question"], *row["choices"]] for line in lines if line
            )
        with file.open(encoding="utf-8") as text:
            rows = [dict(zip(["input", *"ABCD"], row, strict=True)) for row in csv.reader(text)]
        hint = (
            f"There is a single choice question about {subject.replace('_', ' ')}. Answer the question by replying A, "
            "B, C or D."
        )
        template = "\nQuestion: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer: \n"
        return [hint + template.format(**row) for row in rows]

    prompts_of = {}
    for subject in miniature.SUBJECTS:
        data = load(subject=subject)
        prompts_of[subject] = as_released(subject, "test")
        assert [question(doc) for doc in data["test"]] == prompts_of[subject]
        assert [question(doc) for doc in data["dev"]] == as_released(subject, "dev")
    assert sum(map(len, prompts_of.values())) == 14_042

    subject = "college_mathematics"  # its fourth shot has such a line break
    shots = as_released(subject, "dev")
    asked = conversations(load_task(f"mmlu_sdar_{subject}"))
    users = [[turn["content"] for turn in turns if turn["role"] == "user"] for turns in asked]
    assert users == [[*shots, prompt] for prompt in prompts_of[subject]]
    assert not any("\r" in turn["content"] for turns in asked for turn in turns)


def test_line_breaks_are_line_feeds(tmp_path: Path) -> None:
    row = miniature.mmlu("virology", "dev")[0] | {"question": "a\r\nb\rc\nd", "choices": ["1\r\n", "2", "3", "4\r5"]}
    for split in ("dev", "test"):
        miniature.write_jsonl(tmp_path / "virology" / f"{split}.jsonl", [row])
    (found,) = load(subject="virology", mmlu_dir=tmp_path)["test"]
    assert (found["question"], found["choices"]) == ("a\nb\nc\nd", ["1\n", "2", "3", "4\n5"])


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B\n", "B"),
        (" B.", "B"),
        ("B. Mitochondria", "B"),
        ("B: Mitochondria", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("Answer: B", "B"),
        ("ANSWER : B because A is wrong, as C is", "B"),
        ("The answer is B and not C for once", "B"),
        ("The answer is (B)", "B"),
        ("The answer is: **B** as shown", "B"),
        ("A is wrong. The correct answer is B because", "B"),
        ("the correct answer is option B, since A fails", "B"),
        ("A and C fail.\nThe correct answer is:\n$$\\boxed{B}$$ as shown", "B"),
        ("The correct option is \\boxed{B} I think", "B"),
        ("The answer to the question is B here", "B"),
        ("Let me think. Mitochondria make it, so B", "B"),
        # What ends a response beats what begins it: the same letters, read otherwise than meant.
        ("C. Vitamin A", "A"),
        ("The answer is B, not C", "C"),
        ("A careful reader says (B) here", "A"),
        ("Because of 10 cells (C)", "C"),
        ("Of 10 cells, Cells die: B dies in all", "B"),  # after a 1, alphabetically
        ("Dogs choose (B) here", "D"),
        ("answer: b", INVALID),
        ("none of them", INVALID),
        ("", INVALID),
    ],
)
def test_the_letter_of_a_response(response: str, letter: str) -> None:
    assert first_option(response) == letter


def test_scores(offline: Path) -> None:
    rows = list(load(subject="virology")["test"])
    assert filter_first_option([["B", "C."], ["x"]], rows) == [["B", "C"], [INVALID]]
    assert score(rows[0], ["B"]) == {"exact_match": 1.0}
    assert score(rows[0], ["C"]) == score(rows[0], [INVALID]) == {"exact_match": 0.0}


def test_the_subjects() -> None:
    names = sorted(name for name in manager().all_tasks if name.startswith("mmlu_sdar_"))
    assert names == [f"mmlu_sdar_{subject}" for subject in miniature.SUBJECTS]
    assert len(names) == 57
    for name in names:
        text = (TASKS / "mmlu_subjects" / f"{name}.yaml").read_text()
        subject = name.removeprefix("mmlu_sdar_")
        assert text == f"include: ../_mmlu_common_yaml\ntask: {name}\ndataset_kwargs:\n  subject: {subject}\n"


def test_each_subject_counts_once(tmp_path: Path) -> None:
    """Subjects of 1 and 3 questions: all right in the small one, none in the large one, is a half and not a quarter."""
    for subject in miniature.SUBJECTS:
        rows = miniature.mmlu(subject, "test")
        small = subject < "h"
        miniature.write_jsonl(tmp_path / subject / "test.jsonl", rows[:1] if small else [*rows, rows[0]])
        miniature.write_jsonl(tmp_path / subject / "dev.jsonl", miniature.mmlu(subject, "dev"))
    results, requests = evaluate(
        lambda doc: "B." if doc["subject"] < "h" else "It is D", "mmlu_sdar", {"mmlu_dir": str(tmp_path)}
    )
    few = sum(subject < "h" for subject in miniature.SUBJECTS)
    assert results["groups"]["mmlu_sdar"]["exact_match,first-option"] == pytest.approx(few / 57)
    assert len(requests) == few + 3 * (57 - few)
    assert results["n-shot"]["mmlu_sdar_virology"] == 5


def test_the_plain_command_asks_in_rounds(offline: Path) -> None:
    """SDAR models put the turns into their own template, so both commands give the model the same text."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in _conversation(0))
    for chat in (False, True):
        results = lm_eval.simple_evaluate(
            "sdar",
            model_args="pretrained=demo",
            tasks=["mmlu_sdar_college_biology"],
            task_manager=manager(),
            gen_kwargs={"max_gen_toks": 4},
            apply_chat_template=chat,
            limit=1,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        assert results is not None
        (told,) = results["config"]["sdar_lm_eval"]["prompts"].values()
        assert told["example"] == f"{turns}<|im_start|>assistant\n"
