"""A sweep on this machine: refused before it runs, killed and started again, repeated, in part failing."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from support import QUICK_START, ROOT, environment, fork_of

from sdar_lm_eval import arguments
from sdar_lm_eval.engines.adapters.jetengine.engine import JetEngine
from sdar_lm_eval.engines.native.engine import NativeEngine
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import EngineError, Interrupted, UserError
from sdar_lm_eval.lm.answers import read_sessions
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.points import points_of
from sdar_lm_eval.report.results import Results, results_in
from sdar_lm_eval.report.runs import read_runs
from sdar_lm_eval.runs import local
from sdar_lm_eval.runs.earlier import BESIDE_ANSWERS, DEFAULTS
from sdar_lm_eval.runs.plan import Plan, SweepArguments, plan
from sdar_lm_eval.runs.shards import ANSWERS
from sdar_lm_eval.settings import ModelSettings

GRIDS = ({"strategy": "static", "steps": "4,2"}, {"strategy": "dynamic", "threshold": "0.5"})
FOLDERS = ["strategy=static,steps=4", "strategy=static,steps=2", "strategy=dynamic,threshold=0.5"]
TASK = f"include: {ROOT}/sdar_lm_eval/tasks/gsm8k_sdar_demo.yaml\ntask: short\nnum_fewshot: null\n"
TASK += "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 16}\n"
SCORED = TASK.replace("task: short", "task: scored") + "output_type: loglikelihood_rolling\n"
SCORED += "metric_list: [{metric: word_perplexity}]\n"
DOCUMENTS = 10


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """What takes seconds of an evaluation, and is of no interest here; one thread, as in processes that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        patch.setattr("lm_eval.tasks.TaskManager", _without_stock_tasks())
        patch.setattr("sdar_lm_eval.runs.shards.TaskManager", _without_stock_tasks())
        yield
    torch.set_num_threads(threads)


def _without_stock_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return lambda include_path, **settings: TaskManager(include_path=include_path, include_defaults=False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "short.yaml").write_text(TASK)
    (folder / "other.yaml").write_text(TASK.replace("task: short", "task: other").replace("16", "12"))
    (folder / "fixed.yaml").write_text(TASK.replace("task: short\nnum_fewshot: null", "task: fixed\nnum_fewshot: 0"))
    (folder / "scored.yaml").write_text(SCORED)
    (folder / "programs.yaml").write_text(TASK.replace("task: short", "task: programs") + "unsafe_code: true\n")
    return str(folder)


def asked(output: Path | None, include_path: str | None, **question: Any) -> SweepArguments:
    given: dict[str, Any] = {
        "model": "sdar", "model_args": {"pretrained": "demo"}, "tasks": ("short",), "grids": GRIDS, "gen_kwargs": {},
        "limit": 2, "output": output, "include_path": include_path,
    }  # fmt: skip
    return SweepArguments(**(given | question))


def silent(*_: object) -> None:
    """Hear nothing."""


def swept(planned: Plan) -> local.Outcome:
    outcome = local.run(planned, silent)
    assert not outcome.failed
    return outcome


def results_of(output: Path) -> dict[str, Results]:
    return {folder: results_in(output / folder)[-1] for folder in FOLDERS}


def counts(results: Results) -> tuple[int, int]:
    run = results.ours.part("run")
    return run.whole("requests") or 0, run.whole("stored_requests") or 0


def answers(results: Results) -> dict[tuple[int, str], tuple[str, ...]]:
    return {(sample.document, sample.filter): sample.responses for sample in results.samples("short")}


def kept(output: Path, folder: str) -> int:
    return sum(len(session.answers) for session in read_sessions(output / folder / ANSWERS))


@pytest.mark.slow
def test_a_killed_sweep_computes_only_what_is_missing(tasks: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdar_lm_eval", "sweep", "--model_args", "pretrained=demo,max_active=1"]
    command += ["--include_path", tasks, "--tasks", "short", "--limit", str(DOCUMENTS), "--output_path", "swept"]
    command += ["--strategy", "static", "--steps", "4,2", "--and", "--strategy", "dynamic", "--threshold", "0.5"]
    variables, log, output = environment(QUICK_START), tmp_path / "log.txt", tmp_path / "swept"
    with log.open("w") as written:
        running = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=written, stderr=written)
        deadline = time.monotonic() + 300
        while kept(output, FOLDERS[1]) < 2:
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(fork_of(running.pid), signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    there = kept(output, FOLDERS[1])
    assert 2 <= there < DOCUMENTS and kept(output, FOLDERS[2]) == 0
    (first,) = (output / FOLDERS[0]).rglob("results_*.json")
    before = first.stat().st_mtime_ns
    assert not any((output / FOLDERS[1]).rglob("results_*.json"))

    # Without the server of forks, whose processes all have the same memory addresses.
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before
    found = results_of(output)
    assert [counts(found[folder]) for folder in FOLDERS] == [
        (DOCUMENTS, 0), (DOCUMENTS - there, there), (DOCUMENTS, 0)
    ]  # fmt: skip
    assert [kept(output, folder) for folder in FOLDERS] == [DOCUMENTS] * 3

    question = asked(tmp_path / "unbroken", tasks, limit=DOCUMENTS)
    unbroken = swept(plan(question)).runs
    assert [run.path.name for run in unbroken] == FOLDERS
    for run in unbroken:
        (whole,) = run.of_tasks["short"]
        mine = found[run.path.name]
        assert answers(mine) == answers(whole) and len(answers(mine)) == 2 * DOCUMENTS
        assert mine.scores.content == whole.scores.content
        assert [d.token_ids for d in mine.denoising("short")] == [d.token_ids for d in whole.denoising("short")]
    # The resumed combination's tokens, forwards and time are those of all its answers.
    (resumed,) = points_of(read_runs([output / FOLDERS[1]]), "short")
    (whole,) = points_of([run for run in unbroken if run.path.name == FOLDERS[1]], "short")
    assert resumed.tokens_per_forward == whole.tokens_per_forward
    assert resumed.tokens_per_second is not None and not resumed.note


@pytest.mark.slow
def test_what_changes_is_computed_anew(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = ({"threshold": "0.5,0.9"},)
    first = plan(asked(tmp_path, tasks, grids=grids))
    assert [each.results() for each in first.evaluations] == [None, None]
    swept(first)
    with monkeypatch.context() as patch:  # nothing is left to do: the weights are not loaded
        patch.setattr(local, "_loaded", lambda _: pytest.fail("loaded"))
        again = swept(plan(asked(tmp_path, tasks, grids=({"threshold": "0.9,0.5"},))))
        assert [run.label for run in again.runs] == ["confidence_threshold=0.9", "confidence_threshold=0.5"]
        swept(plan(asked(tmp_path, tasks, grids=grids, seed=9)))  # greedy: the seed has no say

    def each(**changed: Any) -> list[tuple[int, int]]:
        outcome = swept(plan(asked(tmp_path, tasks, grids=grids, **changed)))
        return [counts(run.of_tasks[next(iter(run.of_tasks))][0]) for run in outcome.runs]

    assert each(limit=3) == [(1, 2), (1, 2)]  # the answers to the first documents are there
    assert each(tasks=("other",)) == [(2, 0), (2, 0)]
    assert each() == [(2, 0), (2, 0)]  # the first results, since nothing replaced them
    with monkeypatch.context() as patch:
        patch.setattr("sdar_lm_eval.runs.plan.scored_by", lambda: "other sources")
        assert each() == [(0, 2), (0, 2)]  # scored again, from the answers
    (damaged,) = (first.evaluations[0].folder / first.evaluations[0].name).rglob("results_*.json")
    damaged.write_text(damaged.read_text()[:100])
    assert each() == [(0, 2), (0, 2)]


@pytest.mark.parametrize("damage", ["lost lines", "no samples", "no scores"])
def test_damaged_results_are_written_anew(damage: str, tasks: str, tmp_path: Path) -> None:
    def sweep() -> Results:
        return swept(plan(asked(tmp_path, tasks, grids=({"threshold": "0.5"},)))).runs[0].of_tasks["short"][0]

    first = sweep()
    samples, before = first.samples_file("short"), answers(first)
    if damage == "lost lines":
        samples.write_text(samples.read_text().partition("\n")[0] + "\n")
    elif damage == "no samples":
        samples.unlink()
    else:
        first.file.write_text(json.dumps({**first.content.content, "results": {}}))
    again = sweep()
    assert counts(again) == (0, 2) and answers(again) == before


def test_answers_are_scored_again_where_a_function_of_the_task_changed(tmp_path: Path) -> None:
    folder, grids = tmp_path / "tasks", ({"threshold": "0.5"},)
    folder.mkdir()
    (folder / "short.yaml").write_text(
        TASK + "process_results: !function scoring.score\nmetric_list: [{metric: acc}]\n"
    )

    def sweep_of(score: int) -> tuple[tuple[int, int], object]:
        (folder / "scoring.py").write_text(f"def score(doc, results):\n    return {{'acc': {score}}}\n")
        (run,) = swept(plan(asked(tmp_path / "swept", str(folder), grids=grids))).runs
        (results,) = run.of_tasks["short"]
        return counts(results), results.scores.part("short").content["acc,strict-match"]

    assert sweep_of(1) == ((2, 0), 1)
    assert sweep_of(1) == ((2, 0), 1)  # the results that are there
    assert sweep_of(0) == ((0, 2), 0)


def test_answers_are_scored_again_where_documents_or_helpers_of_the_task_changed(tmp_path: Path) -> None:
    folder, grids = tmp_path / "tasks", ({"threshold": "0.5"},)
    folder.mkdir()
    (folder / "short.yaml").write_text(
        "task: short\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ngeneration_kwargs: {until: [], max_gen_toks: 8}\n"
        "process_results: !function scoring.score\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "scoring.py").write_text(
        "def score(doc, results):\n    from helper_of_scoring import factor\n\n"
        "    return {'acc': factor() * int(doc['answer'])}\n"
    )

    def sweep_of(answer: int, factor: int) -> tuple[tuple[int, int], object]:
        (folder / "questions.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": str(answer)}) + "\n")
        (folder / "helper_of_scoring.py").write_text(f"def factor():\n    return {factor}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            patch.delitem(sys.modules, "helper_of_scoring", raising=False)
            (run,) = swept(plan(asked(tmp_path / "swept", str(folder), grids=grids))).runs
        (results,) = run.of_tasks["short"]
        return counts(results), results.scores.part("short").content["acc,none"]

    assert sweep_of(1, 1) == ((1, 0), 1)
    assert sweep_of(1, 1) == ((1, 0), 1)  # the results that are there
    assert sweep_of(0, 1) == ((0, 1), 0)
    assert sweep_of(1, 100) == ((0, 1), 100)
    assert sweep_of(1, 10) == ((0, 1), 10)  # the helper alone has changed


def test_a_file_that_makes_prompts_or_gold_answers_is_part_of_the_sweep(tmp_path: Path) -> None:
    """As answers have keys of what was sent, new prompts are answered; new gold answers only score again."""
    folder, grids = tmp_path / "tasks", ({"threshold": "0.5"},)
    folder.mkdir()
    (folder / "short.yaml").write_text(
        "include: " + TASK.partition("include: ")[2].partition("\n")[0] + "\ntask: short\n"
        "doc_to_text: !function asking.text\ndoc_to_target: !function asking.gold\n"
        "generation_kwargs: {until: [], max_gen_toks: 8}\n"
    )
    read = f"open({str(folder)!r} + '/' + name).read()"
    (folder / "asking.py").write_text(
        f"def text(doc, name='text.txt'):\n    return doc['question'] + {read}\n\n"
        f"def gold(doc, name='gold.txt'):\n    return {read}\n"
    )

    def sweep_of(text: str, gold: str) -> tuple[int, int]:
        (folder / "text.txt").write_text(text)
        (folder / "gold.txt").write_text(gold)
        (run,) = swept(plan(asked(tmp_path / "swept", str(folder), grids=grids))).runs
        return counts(run.of_tasks["short"][0])

    assert [sweep_of("a", "1"), sweep_of("b", "1"), sweep_of("b", "2")] == [(2, 0), (2, 0), (0, 2)]


def test_results_of_another_precision_are_refused(tasks: str, tmp_path: Path) -> None:
    """As those of a GPU would be, where weights are loaded for a combination that is missing."""
    swept(plan(asked(tmp_path, tasks, grids=({"threshold": "0.5"},))))
    (file,) = tmp_path.rglob("results_*.json")
    content = json.loads(file.read_text())
    content["config"]["sdar_lm_eval"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"dtype was 'bfloat16', is 'float32'\. Give another --output_path"):
        local.run(plan(asked(tmp_path, tasks, grids=({"threshold": "0.9"},))), silent)
    assert [*tmp_path.rglob("results_*.json")] == [file]


@pytest.fixture(scope="module")
def finished(tasks: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    swept(plan(asked(output, tasks, grids=({"threshold": "0.5"},))))
    return output


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"model_args": {"pretrained": "demo", "dtype": "bfloat16"}}, "dtype was 'float32', is 'bfloat16'"),
        ({"model_args": {"pretrained": "demo", "reproducible": True}, "grids": ({"threshold": "0.9"},)},
         "reproducible was not given, is true"),
        ({"model_args": {"pretrained": "demo", "reproducible": True}, "tasks": ("other",)}, "reproducible was not"),
        ({"model": "sdar-lmdeploy"}, "model was 'sdar', is 'sdar-lmdeploy'"),
        ({"gen_kwargs": {"max_gen_toks": 8}}, "max_gen_toks was not given, is 8"),
        ({"num_fewshot": 1}, "num_fewshot was not given, is 1"),
        ({"model_args": {"pretrained": "demo", "block_length": 2}}, "block_length was not given, is 2"),
        ({"model_args": {"pretrained": "demo", "max_length": 99}}, "max_length was not given, is 99"),
        ({"model_args": {"pretrained": "demo", "max_length": 99}, "grids": ({"threshold": "0.9"},)}, "max_length"),
    ],
)  # fmt: skip
def test_results_of_another_model_or_of_other_settings_stay(
    question: Mapping[str, Any], told: str, tasks: str, finished: Path
) -> None:
    with pytest.raises(UserError, match=rf"--output_path .* other settings: .*{told}.* Give another --output_path"):
        plan(asked(finished, tasks, **({"grids": ({"threshold": "0.5"},)} | question)))


@pytest.mark.parametrize("damage", ["asked", "dtype", "run"])
def test_a_damaged_file_hides_no_other_results(damage: str, tasks: str, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    shutil.copytree(output / "threshold=0.5", output / "threshold=0.6")
    (file,) = (output / "threshold=0.6").rglob("results_*.json")
    content = json.loads(file.read_text())
    content["config"]["sdar_lm_eval"] = {**content["config"]["sdar_lm_eval"], damage: 5} if damage != "run" else 5
    file.write_text(json.dumps(content))
    assert len(plan(asked(output, tasks, grids=({"threshold": "0.5,0.6"},))).earlier) == 1
    with pytest.raises(UserError, match="num_fewshot was not given, is 1"):
        plan(asked(output, tasks, grids=({"threshold": "0.5"},), num_fewshot=1))


def test_a_checkpoint_is_its_content_not_its_path(tasks: str, finished: Path, tmp_path: Path) -> None:
    def planned(folder: Path) -> Plan:
        return plan(asked(finished, tasks, grids=({"threshold": "0.5"},), model_args={"pretrained": str(folder)}))

    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "sdar_lm_eval" / "demo" / "checkpoint", copy)
    assert planned(copy).evaluations
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(config | {"changed": 1}))
    with pytest.raises(UserError, match=r"pretrained was 'demo', is '.*copy'; checkpoint was '\w+', is '\w+'"):
        planned(copy)


@pytest.mark.parametrize(
    "same", [{"dtype": "float32"}, {"dtype": "auto"}, {"chat_template": "auto", "think_end_token": "auto"}, {"seed": 5}]
)
def test_model_args_are_compared_by_what_they_mean(same: Mapping[str, Any], tasks: str, finished: Path) -> None:
    """The results' dtype is `auto`, which is float32 on the CPU."""
    assert plan(asked(finished, tasks, model_args={"pretrained": "demo", **same})).evaluations


@pytest.mark.parametrize(
    "same",
    [
        {"num_fewshot": 0},
        {"gen_kwargs": {"do_sample": False, "steps": 4, "max_new_tokens": 16}},
        {"model_args": {"pretrained": "demo", "reproducible": False, "record_steps": True, "block_length": 4}},
    ],
)
def test_a_default_that_is_named_is_no_other_setting(
    same: Mapping[str, Any], tasks: str, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    for threshold, found in (("0.5", (0, 2)), ("0.6", (2, 0))):  # the results are replaced, the answers stay
        (run,) = swept(plan(asked(output, tasks, grids=({"threshold": threshold},), **same))).runs
        assert counts(run.of_tasks["short"][0]) == found


def test_the_defaults_are_those_of_the_arguments() -> None:
    of_engines = (inspect.signature(engine).parameters.values() for engine in (NativeEngine, JetEngine))
    known = {each.name: each.default for of_engine in of_engines for each in of_engine}
    known |= vars(ModelSettings.read("demo", {}, "native")) | {"answer_prefix": ""}
    assert {name: known[name] for name in DEFAULTS} == DEFAULTS


def test_a_task_without_examples_keeps_them_out(tasks: str) -> None:
    both = plan(asked(None, tasks, tasks=("short", "fixed"), num_fewshot=1)).evaluations[0].effect
    assert [both[task]["num_fewshot"] for task in ("short", "fixed")] == [1, 0]


def test_a_setting_may_have_its_short_name(tasks: str, tmp_path: Path) -> None:
    for name in ("block", "block_length"):
        model_args = {"pretrained": "demo", name: 2}
        swept(plan(asked(tmp_path, tasks, grids=({"threshold": "0.5"},), model_args=model_args)))


def test_a_sweep_goes_on_with_fewer_sequences_at_once(tasks: str, finished: Path) -> None:
    less_memory = {"pretrained": "demo", **dict.fromkeys(("max_active", "kv_pages"), 64), "batch_size": 2}
    assert plan(asked(finished, tasks, grids=({"threshold": "0.5"},), model_args=less_memory)).evaluations
    known = set().union(*(get_type_hints(getattr(arguments, spec.arguments)) for spec in ENGINES.values()))
    assert known.issuperset(BESIDE_ANSWERS)


def test_repeats_are_of_what_is_drawn(tasks: str, tmp_path: Path) -> None:
    grids = ({"temperature": "0,1"}, {"strategy": "random"})
    planned = plan(asked(tmp_path, tasks, grids=grids, repeats=3, seed=7))
    assert [(each.settings, each.seed) for each in planned.evaluations] == [
        ({"temperature": 0.0}, None),
        *(({"temperature": 1.0}, seed) for seed in (7, 8, 9)),
        *(({"remasking_strategy": "random"}, seed) for seed in (7, 8, 9)),
    ]
    runs = swept(planned).runs
    assert [len(run.of_tasks["short"]) for run in runs] == [1, 3, 3]
    assert [results.ours.whole("seed") for results in runs[1].of_tasks["short"]] == [7, 8, 9]
    assert runs[1].of_tasks["short"][0].decoding_of("short").number("temperature") == 1.0
    drawn = [json.dumps(sorted(answers(results).values())) for results in runs[1].of_tasks["short"]]
    assert len(set(drawn)) == 3
    assert [point.repeats for point in points_of(runs, "short")] == [1, 3, 3]
    # A folder of a sweep is runs to every other command, repeats included.
    assert sorted(len(run.of_tasks["short"]) for run in read_runs([tmp_path])) == [1, 3, 3]
    seeds = plan(asked(tmp_path, tasks, grids=grids, model_args={"pretrained": "demo", "seed": 7})).evaluations
    assert all(each.results() is not None for each in seeds)  # model_args' seed is the first repeat's


def test_one_that_fails_is_told_and_the_others_go_on(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generate = NativeEngine.generate

    def fail(self: NativeEngine, requests: Any) -> Any:
        threshold = requests[0].decoding.confidence_threshold if requests else None
        if threshold == 0.6:
            raise EngineError("out of memory")
        if threshold == 0.7:
            raise ZeroDivisionError("a mistake")
        return generate(self, requests)

    planned = plan(asked(tmp_path, tasks, grids=({"threshold": "0.5:0.8"},)))
    monkeypatch.setattr(NativeEngine, "generate", fail)
    planned.evaluations[0].folder.write_text("a file where the combination's folder should be")
    told: list[tuple[int, bool, str | None]] = []
    outcome = local.run(planned, lambda number, each, results, error: told.append((number, results is not None, error)))
    assert [(number, there) for number, there, _ in told] == [(1, False), (2, False), (3, False), (4, True)]
    assert [run.label for run in outcome.runs] == ["confidence_threshold=0.8"]
    assert list(outcome.failed) == [f"confidence_threshold={t}" for t in (0.5, 0.6, 0.7)]
    first, second, third = outcome.failed.values()
    assert "cannot be written" in first
    assert (second, third) == ("out of memory", "ZeroDivisionError('a mistake')")
    assert "confidence_threshold=0.7 failed" in caplog.text and "a mistake" in caplog.text
    planned.evaluations[0].folder.unlink()
    monkeypatch.setattr(NativeEngine, "generate", generate)
    assert len(swept(planned).runs) == 4


def test_a_full_disk(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval only warns of it; what is half there is no result."""
    from lm_eval.loggers import EvaluationTracker

    save = EvaluationTracker.save_results_samples

    def cut(self: EvaluationTracker, task_name: str, samples: Any) -> None:
        save(self, task_name, samples[:1])

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", cut)
    planned = plan(asked(tmp_path, tasks, grids=({"threshold": "0.5"},)))
    outcome = local.run(planned, silent)
    assert not outcome.runs and "lm_eval could not write its results" in next(iter(outcome.failed.values()))
    assert not (planned.evaluations[0].folder / planned.evaluations[0].name).exists()
    monkeypatch.undo()
    (run,) = swept(planned).runs
    assert counts(run.of_tasks["short"][0]) == (0, 2)


def test_one_sweep_at_a_time(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(asked(tmp_path / "s", tasks))
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / local.LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"Another sweep works in .*s\. Wait until that sweep ends"):
            local.run(planned, silent)
    (tmp_path / "s" / local.LOCK).unlink()
    (tmp_path / "s" / local.LOCK).mkdir()  # as a lock file of another user, a folder cannot be opened
    with pytest.raises(UserError, match=r"--output_path .*s cannot be written: .*\. Name another folder\."):
        local.run(planned, silent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="A sweep runs in one process"):
        local.run(planned, silent)


def test_an_interrupt_says_what_is_finished(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = local._evaluate

    def interrupted(each: Any, planned: Plan, lm: SDARLM) -> Results:
        if each.settings["confidence_threshold"] == 0.6:
            raise KeyboardInterrupt
        return evaluate(each, planned, lm)

    monkeypatch.setattr(local, "_evaluate", interrupted)
    with pytest.raises(Interrupted, match=r"1 of 2 evaluations are finished in .*Run the same command again"):
        local.run(plan(asked(tmp_path, tasks, grids=({"threshold": "0.5:0.6"},))), silent)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"grids": ({"steps": "2,8"},)},
         r"denoising_steps=8 is out of range: .* The sweep asks for it at denoising_steps=8\. Nothing was run"),
        ({"grids": ({"strategy": "sequentially"},)}, "'sequentially' is unknown; choose one of"),
        ({"grids": ({"threshold": "0.5:2"},)}, r"confidence_threshold=1\.1 is out of range"),
        ({"grids": ({"block": "three"},)}, "--block_length='three' is not a whole number"),
        ({"gen_kwargs": {"treshold": 1}}, "'treshold' is unknown. Did you mean 'threshold'"),
        ({"gen_kwargs": {"max_gen_toks": 100_000}}, "must be below max_length"),
        ({"model": "sdr"}, "--model sdr: a sweep varies .* Did you mean 'sdar'. Choose sdar, sdar-jetengine"),
        ({"model": "sdar-jetengine", "grids": ({"block": "3", "steps": "1"},)},
         "block_length=3 is not for --model sdar-jetengine, which takes 1, 2, 4"),
        ({"model_args": {"pretrained": "demo", "devise": "cpu"}}, "'devise' is unknown. Did you mean 'device'"),
        ({"model_args": {"pretrained": "demo", "answers": "x"}}, "answers=… is not for a sweep"),
        ({"model_args": {"pretrained": "/nowhere"}}, "pretrained='/nowhere': no such folder"),
        ({"tasks": ("shorter",)}, "--tasks shorter: unknown to the harness"),
        ({"tasks": ("short", "scored")}, "--tasks scored: scored by log-likelihoods, which decoding settings do not"),
        ({"tasks": ("programs",)}, "--tasks programs: scored by running programs .* Give --confirm_run_unsafe_code"),
        ({"include_path": "missing"}, "--include_path missing: no such folder"),
        ({"repeats": 0}, "--repeats 0 is out of range"),
        ({"limit": 0}, "--limit 0: give a number of documents above 0"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_runs(
    question: Mapping[str, Any], message: str, tasks: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        plan(asked(tmp_path / "s", **({"include_path": tasks} | question)))
    assert not (tmp_path / "s").exists()


def test_folders_are_named_by_settings(tasks: str, tmp_path: Path) -> None:
    grids = ({"steps": "2", "strategy": "static", "threshold": "0.5,0.6"}, {"top_p": "0.9", "temperature": "0.7"})
    planned = plan(asked(tmp_path, tasks, grids=grids, limit=0.01))
    assert [each.folder.name for each in planned.evaluations] == [
        "strategy=static,steps=2",
        "temperature=0.7,top_p=0.9",
    ]
    assert [each.name for each in planned.evaluations] == ["short-first-0.01", "short-first-0.01-seed-1234"]
    assert planned.copies == 1
    assert planned.evaluations[1].gen_kwargs["do_sample"] is True
    default = plan(asked(None, tasks)).output
    assert default == Path("sweeps/demo-short")
    assert plan(asked(tmp_path, tasks, confirm_run_unsafe_code=True, tasks=("programs",))).tasks == ("programs",)
    long = plan(asked(None, tasks, gen_kwargs={}, tasks=("short", "other"), model_args={"pretrained": "demo"}))
    assert long.output == Path("sweeps/demo-short+other")
