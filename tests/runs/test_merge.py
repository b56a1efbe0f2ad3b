from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import sdar_lm_eval.tasks
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.account import Account
from sdar_lm_eval.lm.answers import AnswerFolder, Session, read_sessions
from sdar_lm_eval.lm.evaluation import Evaluation
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.gsm8k_json import convert
from sdar_lm_eval.report.results import results_in
from sdar_lm_eval.runs import merge, shards
from sdar_lm_eval.runs.merge import RecordedLM, publish
from sdar_lm_eval.runs.settings import RunSettings, runs_from_flags
from sdar_lm_eval.runs.shards import ANSWERS, answer_shard

FLAGS: dict[str, Any] = {
    "model_name": "demo", "num_samples": 7, "block_length": "4", "denoising_steps": "4", "temperature": "1.0",
    "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": "0.85", "max_gen_length": 64,
    "verbose": False, "engine": "native", "tasks": "gsm8k_sdar_demo",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def _run(**flags: Any) -> RunSettings:
    (run,) = runs_from_flags(**(FLAGS | flags))
    return run


def _texts(path: Path) -> list[str]:
    return [result["generated_text"] for result in json.loads(path.read_text())["results"]]


def _how(record: Denoising) -> tuple[int, int, tuple[int, ...], tuple[int, ...] | None]:
    return record.document, record.repeat, record.token_ids, record.steps


@pytest.mark.slow
def test_shards_become_one_result(tmp_path: Path) -> None:
    run, folder = _run(), tmp_path / "three"
    with pytest.raises(UserError, match="There are no answers yet"):
        publish(run, folder)
    for shard in (1, 3):
        answer_shard(run, folder, shard, 3)
    with pytest.raises(UserError, match=r"2 of 7 documents have no answer yet: gsm8k_sdar_demo 1, gsm8k_sdar_demo 4\."):
        publish(run, folder)
    assert not (folder / run.name).exists()
    answer_shard(run, folder, 2, 3)
    report = publish(run, folder)
    content = json.loads(report.read_text())
    assert [result["idx"] for result in content["results"]] == list(range(7))
    assert content["performance"]["new_tokens"] == sum(
        line["new_tokens"] for session in read_sessions(folder / ANSWERS) for line in session.answers.values()
    )
    assert content["results"] == convert(report.parent)["results"]
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert publish(run, folder) == report
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == written

    # As one, and as one more document after another run's answers.
    alone = tmp_path / "one"
    answer_shard(run, alone, 1, 1)
    whole = publish(run, alone)
    assert _texts(whole) == _texts(report)
    assert json.loads(whole.read_text())["metrics"] == content["metrics"]
    kept = [results_in(path.parent)[0].denoising("gsm8k_sdar_demo") for path in (whole, report)]
    records = [[_how(each) for each in of_run] for of_run in kept]
    assert records[0] == records[1] and [document for document, *_ in records[0]] == list(range(7))
    assert all(steps and max(steps) > 0 for *_, steps in records[0])
    more = _run(num_samples=8)
    answer_shard(more, alone, 1, 1)
    assert sorted(len(session.answers) for session in read_sessions(alone / ANSWERS)) == [1, 7]
    assert _texts(publish(more, alone))[:7] == _texts(report)


def test_documents_of_a_shard_have_the_few_shot_examples_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Path(sdar_lm_eval.tasks.__file__).with_name("gsm8k_sdar_demo.yaml")
    (tmp_path / "shots.yaml").write_text(f"include: {task}\ntask: shots\nnum_fewshot: 2\nfewshot_split: test\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for module in (shards, merge):
        monkeypatch.setattr(module, "task_manager", lambda tasks: manager)
    run = _run(tasks="shots", max_gen_length=4)
    for shard in (1, 2, 3):
        answer_shard(run, tmp_path, shard, 3)
    # Answers to prompts with other examples do not count, and `publish` would refuse the run.
    assert [each["idx"] for each in json.loads(publish(run, tmp_path).read_text())["results"]] == list(range(7))


def test_a_result_that_is_damaged_or_of_other_sources_is_scored_again(tmp_path: Path) -> None:
    run = _run(num_samples=2)
    answer_shard(run, tmp_path, 1, 1)
    report = publish(run, tmp_path)
    first = report.read_text()
    answers = {path: path.read_bytes() for path in (tmp_path / ANSWERS).iterdir()}
    for other in (json.dumps(json.loads(first) | {"results": [], "scored_by": "sources before"}), first[:50], "[]"):
        report.write_text(other)
        publish(run, tmp_path)
        assert json.loads(report.read_text()) == json.loads(first)
    assert len(list(report.parent.rglob("samples_*.jsonl"))) == 1
    assert {path: path.read_bytes() for path in (tmp_path / ANSWERS).iterdir()} == answers


def test_a_part_of_a_larger_run_has_its_share_of_the_time(tmp_path: Path) -> None:
    answer_shard(_run(), tmp_path, 1, 1)
    whole, part = (
        json.loads(publish(_run(num_samples=number), tmp_path).read_text())["performance"] for number in (7, 2)
    )
    assert part["new_tokens"] < whole["new_tokens"]
    assert part["tokens_per_second"] == pytest.approx(whole["tokens_per_second"], rel=0.01)


def test_more_shards_than_documents(tmp_path: Path) -> None:
    answer_shard(_run(num_samples=2), tmp_path, 3, 3)
    assert not list(tmp_path.rglob("*.jsonl"))


MODEL = {"pretrained": "demo", "revision": None, "chat_template": "auto", "max_length": 2048, "dtype": "float32"}


def _session(path: str = "a.jsonl", settings: dict[str, Any] | None = None, **answers: str) -> Session:
    lines = {key: {"key": key, "text": text, "at": 1.0} for key, text in answers.items()}
    return Session(Path(path), settings or {"engine": "native"}, MODEL, 0.0, lines)


def _instance(number: int, **gen_kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (f"prompt {number}", gen_kwargs), 0, ("t", number, 2))


def _keys(*instances: Instance) -> list[str]:
    demo = Checkpoint.open("demo")
    asked = Jobs(demo, Prompts(demo), {}, 2048).of(instances, Evaluation(Account(seed=0)).task_of, seed=0)
    return [asked.jobs[job_id].key for job_id in asked.order]


def test_answers_of_different_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"a\.jsonl and b\.jsonl \(dtype was not given, is 'float32'\)\. Move away"):
        RecordedLM([_session(), _session("b.jsonl", {"engine": "native", "dtype": "float32"})], seed=0)


def test_a_drawn_repeat_is_never_taken_for_another() -> None:
    drawn, greedy = _instance(0, do_sample=True, temperature=1.0), _instance(1)
    asked = [drawn, drawn, greedy, greedy]
    keys = _keys(*asked)
    assert len(set(keys)) == 3
    recorded = dict(zip(keys, ["first", "second", "same", "same"], strict=True))
    assert RecordedLM([_session(**recorded)], seed=0).generate_until(asked) == ["first", "second", "same", "same"]
    with pytest.raises(UserError, match="1 of 2 documents have no answer yet: t 0"):
        RecordedLM([_session(**recorded)], seed=1).generate_until(asked)
    del recorded[keys[1]]
    with pytest.raises(UserError, match="1 of 1 documents have no answer yet: t 0"):
        RecordedLM([_session(**recorded)], seed=0).generate_until([drawn, drawn])


def test_equal_requests_of_two_documents_count_twice() -> None:
    """As on one machine, whose engine answers both; the repeats of a greedy request are one answer."""
    first, second = _instance(0), Instance("generate_until", {}, ("prompt 0", {}), 0, ("t", 1, 2))
    (key,) = set(_keys(first, second))
    forwards = {"prefill": 1, "denoising": 6, "commit": 2}
    counted = {"new_tokens": 8, "prompt_tokens": 5, "forwards": forwards}
    line = {"key": key, "text": "same", "at": 2.0, "task": "t", "document": 0, "repeat": 0, **counted}
    recorded = RecordedLM([Session(Path("a.jsonl"), {"engine": "native"}, MODEL, 0.0, {key: line})], seed=0)
    assert recorded.generate_until([first, first, second, second]) == ["same"] * 4
    run: Any = recorded.get_model_info()["sdar_lm_eval"]
    assert run["run"]["requests"] == run["run"]["tasks"]["t"]["requests"] == 2
    assert (run["run"]["new_tokens"], run["run"]["forwards"]["denoising"]) == (16, 12)


def test_many_missing_documents_are_counted() -> None:
    with pytest.raises(UserError, match=r"20 of 20 documents have no answer yet: t 0, .*, t 7 and 12 more\."):
        RecordedLM([_session()], seed=0).generate_until([_instance(number) for number in range(20)])


def test_log_likelihoods_are_not_recorded() -> None:
    recorded = RecordedLM([_session()], seed=0)
    for method in (recorded.loglikelihood, recorded.loglikelihood_rolling):
        with pytest.raises(UserError, match="asks for log-likelihoods"):
            method([_instance(0)])


def test_other_tasks_have_a_report_without_examples(tmp_path: Path) -> None:
    """Two tasks at once: scores and speed, the examples stay in the samples files."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    run = _run(tasks="gsm8k_sdar_demo,gsm8k_sdar_hash", num_samples=1, max_gen_length=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDAR_GSM8K_DIR", str(tmp_path / "data"))
        answer_shard(run, tmp_path / "run", 1, 1)
        report = publish(run, tmp_path / "run")
    content = json.loads(report.read_text())
    assert set(content) == {"config", "metrics", "performance", "scored_by"}
    assert set(content["metrics"]) == {"gsm8k_sdar_demo", "gsm8k_sdar_hash"}
    assert content["performance"]["requests"] == 2
    assert len(list(report.parent.rglob("samples_*.jsonl"))) == 2


def test_the_folder_of_answers_may_be_shared_by_runs_of_other_settings_only_by_name(tmp_path: Path) -> None:
    AnswerFolder(tmp_path / ANSWERS, {"dtype": "float64"}, lambda: MODEL).put("a", {"text": "x"})
    run = _run(num_samples=1)
    answer_shard(run, tmp_path, 1, 1)
    with pytest.raises(UserError, match="Answers of different settings cannot be one result"):
        publish(run, tmp_path)
