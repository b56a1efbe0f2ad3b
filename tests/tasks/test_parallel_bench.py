"""The task files of parallel_bench_sdar, through lm-eval."""

from __future__ import annotations

import statistics
from typing import Any

import lm_eval
import pytest
from scripted import TASKS, conversations, evaluate, load_task, manager, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.generated import KINDS, documents
from sdar_lm_eval.tasks.generated.kind import SIZES
from sdar_lm_eval.tasks.generated.waiting_line import WAITING_LINE
from sdar_lm_eval.tasks.parallel_bench import INVALID, load

SUFFIX = {"chat": "", "demo": "_demo"}
TASK_NAMES = {(kind, size): f"parallel_bench_sdar_{kind}{SUFFIX[size]}" for kind in KINDS for size in SIZES}
GROUPS = ("parallel_bench_sdar", "parallel_bench_sdar_waiting_line", "parallel_bench_sdar_puzzle")


def test_these_are_the_tasks() -> None:
    known = {name for name in manager().all_tasks if name.startswith("parallel_bench")}
    assert known == {*TASK_NAMES.values(), *(f"{group}{suffix}" for group in GROUPS for suffix in SUFFIX.values())}
    assert len(list((TASKS / "parallel_bench").iterdir())) == len(known)


@pytest.mark.parametrize("kind,size", TASK_NAMES)
def test_what_a_task_asks(kind: str, size: Any) -> None:
    task = load_task(TASK_NAMES[kind, size])
    drawn, shots = documents(kind, size, 100), documents(kind, size, 4, held_out=False)
    turns = [("user", shots[0]["question"]), ("assistant", shots[0]["answer"])] if size == "chat" else []
    assert [[(turn["role"], turn["content"]) for turn in turns] for turns in conversations(task)] == [
        [*turns, ("user", document["question"])] for document in drawn
    ]
    assert [task.doc_to_target(document) for document in task.test_docs()] == [each["answer"] for each in drawn]
    longest = {"chat": 256, "demo": 64}[size]
    assert all(
        instance.args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": longest}
        for instance in task.instances
    )
    assert (task.VERSION, task.OUTPUT_TYPE) == (1.0, "generate_until")


def test_without_a_chat_template_the_shot_and_the_question_are_one_text() -> None:
    task = load_task("parallel_bench_sdar_reverse")
    document, shot = documents("reverse", "chat", 1)[0], documents("reverse", "chat", 1, held_out=False)[0]
    assert prompts(task)[0] == f"{shot['question']}{shot['answer']}\n\n{document['question']}"


def test_too_many_shots() -> None:
    with pytest.raises(UserError, match="5 shots, but its 'dev' data has 4"):
        evaluate(str, "parallel_bench_sdar_copy", num_fewshot=5, limit=1)


def test_scores_of_a_group() -> None:
    """Half of the kinds are answered right, and the others beside talk; each task counts once."""

    def answer(doc: dict[str, Any]) -> str:
        if doc["kind"] in ("copy", "sudoku", "words_to_sentence"):
            return str(doc["answer"])
        if doc["kind"] in ("shuffle", "latin_square", "insert_index"):
            return f"Here you are:\n\n{doc['answer']}"
        return "I do not know."

    results, requests = evaluate(answer, "parallel_bench_sdar", limit=5)
    assert len(requests) == 5 * len(KINDS)
    scores = results["results"]
    right = {kind: scores[TASK_NAMES[kind, "chat"]]["exact_match,strict-match"] for kind in KINDS}
    assert right == {kind: float(kind in ("copy", "sudoku", "words_to_sentence")) for kind in KINDS}
    lenient = {kind: scores[TASK_NAMES[kind, "chat"]]["exact_match,flexible-extract"] for kind in KINDS}
    assert sum(lenient.values()) == 6
    for group, kinds in {
        "parallel_bench_sdar": list(KINDS),
        "parallel_bench_sdar_puzzle": ["latin_square", "sudoku"],
        "parallel_bench_sdar_waiting_line": list(WAITING_LINE),
    }.items():
        assert scores[group]["exact_match,strict-match"] == pytest.approx(statistics.mean(right[k] for k in kinds))
        assert scores[group]["exact_match,flexible-extract"] == pytest.approx(
            statistics.mean(lenient[k] for k in kinds)
        )
    samples = {(s["doc_id"], s["filter"]): s for s in results["samples"]["parallel_bench_sdar_insert_index"]}
    assert samples[0, "strict-match"]["filtered_resps"] == [[INVALID]]
    assert samples[0, "flexible-extract"]["filtered_resps"] == [[samples[0, "strict-match"]["target"]]]


def test_all_repeats_of_a_document_count() -> None:
    """Two of three answers are right: another order, and one behind a thought."""
    task = load_task("parallel_bench_sdar_shuffle_demo")
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        document = instance.doc
        instance.resps = [document["answer"], " ".join(document["given"]), f"<think>Hm.</think> {document['answer']}"]
    task.apply_filters()
    for instance in task.instances:
        for found in instance.filtered_resps.values():
            assert task.process_results(instance.doc, [found])["exact_match"] == pytest.approx(2 / 3)


def test_another_seed_gives_other_documents() -> None:
    first, again, other = (
        [row["question"] for row in load(kind="sort", size="chat", **metadata)["test"]]
        for metadata in ({}, {"parallel_bench_seed": 0}, {"parallel_bench_seed": 1})
    )
    assert first == again and not set(first) & set(other)
    asked = prompts(load_task("parallel_bench_sdar_sort_demo", parallel_bench_seed=7))
    assert asked == [document["question"] for document in documents("sort", "demo", 100, seed=7)]


@pytest.mark.parametrize("seed", [-1, "1", 1.5, True, None])
def test_a_seed_that_is_none(seed: object) -> None:
    with pytest.raises(UserError, match=r"parallel_bench_seed is .*a whole number from 0"):
        load(kind="copy", size="demo", parallel_bench_seed=seed)


def test_the_demo_model() -> None:
    results = lm_eval.simple_evaluate(
        "sdar",
        model_args="pretrained=demo",
        tasks=["parallel_bench_sdar_demo"],
        task_manager=manager(),
        limit=2,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert results is not None
    for kind in KINDS:
        samples = results["samples"][TASK_NAMES[kind, "demo"]]
        assert len(samples) == 4  # of two documents by two filters
        assert results["results"][TASK_NAMES[kind, "demo"]]["exact_match,strict-match"] == pytest.approx(
            statistics.mean(s["exact_match"] for s in samples if s["filter"] == "strict-match")
        )
