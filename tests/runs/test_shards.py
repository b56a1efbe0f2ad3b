from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.runs import shards
from sdar_lm_eval.runs.shards import document_counts, share_of, task_manager


@pytest.mark.parametrize("number", [1, 2, 3, 7, 20])
def test_each_document_is_in_one_share(number: int) -> None:
    documents = {"a": 7, "b": 1, "c": 5}
    shares = [share_of(documents, shard, number) for shard in range(1, number + 1)]
    dealt = sorted((task, place) for share in shares for task, places in share.items() for place in places)
    assert dealt == sorted((task, place) for task, count in documents.items() for place in range(count))
    sizes = [sum(map(len, share.values())) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(places and places == sorted(places) for share in shares for places in share.values())


def test_documents_of_tasks() -> None:
    assert document_counts(["gsm8k_sdar_demo"], None) == {"gsm8k_sdar_demo": 200}
    assert document_counts(["gsm8k_sdar_demo"], 12) == {"gsm8k_sdar_demo": 12}
    assert document_counts(["gsm8k_sdar_demo"], 999) == {"gsm8k_sdar_demo": 200}


def test_groups_are_their_tasks() -> None:
    class Task:
        OUTPUT_TYPE = "generate_until"

    one, two = Task(), Task()
    assert shards._leaves({"group": {"inner": {"a": one}}, "b": two}) == {"a": one, "b": two}


def test_the_harness_s_tasks_are_read_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(task_manager(["gsm8k_sdar_demo", "sdar_bench"]).all_tasks) > {"gsm8k_sdar", "mmlu_sdar"}
    assert "gsm8k_cot" not in task_manager(["gsm8k_sdar_demo"]).all_tasks
    made = []
    monkeypatch.setattr(shards, "TaskManager", lambda **kw: made.append(kw) or TaskManager(include_defaults=False))
    task_manager(["gsm8k_cot"])
    assert made == [{}]


def test_tasks_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = task_manager(["gsm8k_sdar_demo"])
    with pytest.raises(UserError, match=r"--tasks gsm8k_zdar: unknown to the harness\. Did you mean 'gsm8k_sdar'\?"):
        document_counts(["gsm8k_zdar"], None, ours)

    class Task:
        OUTPUT_TYPE = "multiple_choice"

    monkeypatch.setattr(shards, "get_task_dict", lambda *_: {"arc": Task()})
    with pytest.raises(UserError, match="--tasks arc: ask for log-likelihoods"):
        document_counts(["gsm8k_sdar_demo"], None, ours)


def test_programs_that_the_harness_would_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Task:
        OUTPUT_TYPE = "generate_until"
        UNSAFE_CODE = True

    monkeypatch.setattr(shards, "get_task_dict", lambda *_: {"humaneval": Task()})
    with pytest.raises(UserError, match=r"--tasks humaneval: .* Choose humaneval_sdar or mbpp_sdar, whose programs"):
        document_counts(["gsm8k_sdar_demo"], None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"),
            r"\(Couldn't reach 'openai/gsm8k' on the Hub\)\. Check",
        ),
        (
            ValueError("\n#####\n code_eval executes untrusted code.\n#####"),
            r"\(code_eval executes untrusted code\.\)\.",
        ),
        (OSError(), r"\(OSError\)\."),
        (UserError("gsm8k_dir is 3, which is no path."), "^gsm8k_dir is 3, which is no path"),
    ],
)
def test_tasks_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(shards, "get_task_dict", broken)
    with pytest.raises(UserError, match=told):
        document_counts(["gsm8k_sdar_demo"], None)
