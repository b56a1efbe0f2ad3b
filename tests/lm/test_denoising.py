"""How answers were written is kept beside lm_eval's samples: exactly what the engine reported, document by document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import lm_eval
import numpy as np
import pytest
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

import sdar_lm_eval.tasks
from sdar_lm_eval import SDARLM
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.denoising import keep_beside_samples
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.denoising import (
    FORMAT,
    Denoising,
    DenoisingLine,
    denoising_file,
    read_denoising,
    write_denoising,
)
from sdar_lm_eval.report.results import results_in

TASK = "gsm8k_sdar_demo"
TASKS = TaskManager(include_path=str(Path(sdar_lm_eval.tasks.__file__).parent), include_defaults=False)


@pytest.fixture(autouse=True)
def _no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def evaluate(lm: Any, tracker: EvaluationTracker, **settings: Any) -> dict[str, Any]:
    settings = {"limit": 3} | settings
    results = lm_eval.simple_evaluate(
        lm, tasks=[TASK], task_manager=TASKS, evaluation_tracker=tracker, bootstrap_iters=0, **settings
    )
    assert results is not None
    return dict(results)


def save(tracker: EvaluationTracker, results: dict[str, Any]) -> Path:
    """Save as lm_eval's command line does; returns the results file."""
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)
    path = Path(tracker.output_path)
    return results_in(path.parent if path.suffix else path)[-1].file


def records(results: Path) -> list[Denoising]:
    return results_in(results)[0].denoising(TASK)


class OtherLM(LM):
    """A model of another package, whose answers have no records."""

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return ["" for _ in requests]

    loglikelihood = loglikelihood_rolling = generate_until  # type: ignore[assignment]


@pytest.fixture(scope="module")
def lm() -> SDARLM:
    return SDARLM("demo", max_gen_toks=24)


def test_what_the_engine_reported(lm: SDARLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, reported = [], {}
    generate = lm.engine.generate

    def watch(requests: Any) -> Any:
        asked.extend(requests)
        for index, result in generate(requests):
            reported[requests[index].prompt_ids] = result
            yield index, result

    monkeypatch.setattr(lm.engine, "generate", watch)
    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(lm, tracker, samples={TASK: [7, 2]}, limit=None, gen_kwargs="max_gen_toks=24")
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"][TASK]}
    prompts = {s["doc_id"]: tuple(lm.tok_encode(s["arguments"][0][0])) for s in results["samples"][TASK]}
    kept = records(save(tracker, results))
    assert [record.document for record in kept] == [2, 7]
    for record in kept:
        result = reported[prompts[record.document]]
        assert (record.token_ids, record.steps) == (result.token_ids, result.unmasked_at)
        assert record.confidences == pytest.approx(result.confidences, abs=1e-4)
        assert "".join(record.texts) == texts[record.document]
        assert record.prompt_tokens == len(prompts[record.document])
        assert record.forwards["denoising"] == result.denoising_forwards
        assert record.global_steps is not None and max(record.global_steps) + 1 <= result.denoising_forwards
        assert [i for block in record.blocks for i in block] == list(range(len(record.token_ids)))
        assert {(record.prompt_tokens + block.stop) % 4 for block in record.blocks[:-1]} == {0}


def test_a_tracker_keeps_the_records_of_its_last_evaluation(lm: SDARLM, tmp_path: Path) -> None:
    """Whatever the model does between an evaluation and the saving of its samples."""
    first, second = (EvaluationTracker(output_path=str(tmp_path / name)) for name in ("first", "second"))
    results = evaluate(lm, first), evaluate(lm, second, limit=2)
    lm.evaluation_begins(seed=0, cached=False, template=None)
    kept = [records(save(tracker, each)) for tracker, each in zip((first, second), results, strict=True)]
    assert [len(each) for each in kept] == [3, 2]
    assert [(each.token_ids, each.steps) for each in kept[0][:2]] == [(each.token_ids, each.steps) for each in kept[1]]
    again = evaluate(lm, first, limit=1)
    assert len(records(save(first, again))) == 1

    others = evaluate(OtherLM(), first, limit=1)
    assert records(save(first, others)) == []


@pytest.mark.parametrize("output", ["out", "out/name.json"])
def test_where_the_file_is(lm: SDARLM, tmp_path: Path, output: str) -> None:
    tracker = EvaluationTracker(output_path=str(tmp_path / output))
    file = save(tracker, evaluate(lm, tracker, limit=1))
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    assert denoising_file(samples).parent == file.parent and len(records(file)) == 1


def test_it_may_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = EvaluationTracker(output_path=str(tmp_path))
    with SDARLM("demo", max_gen_toks=8, record_steps=False, answers=tmp_path / "answers") as lm:
        assert records(save(tracker, evaluate(lm, tracker, limit=1))) == []
        assert not list(tmp_path.rglob("denoising_*"))
    answers = EvaluationTracker(output_path=str(tmp_path / "again"))
    caplog.set_level("INFO")
    with SDARLM("demo", max_gen_toks=8, answers=tmp_path / "answers") as lm:  # finds an answer that has no record
        assert records(save(answers, evaluate(lm, answers, limit=1))) == []
        assert lm.counts.stored_requests == 1
    assert "Stored answers without a denoising record: 1. A run with record_steps=false" in caplog.text


def test_a_full_disk_costs_the_records_alone(
    lm: SDARLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: Path, task: str, lines: Iterable[DenoisingLine]) -> None:
        def cut() -> Iterator[DenoisingLine]:
            yield next(iter(lines))
            raise OSError(28, "No space left on device")

        write_denoising(file, task, cut())

    monkeypatch.setattr("sdar_lm_eval.lm.denoising.write_denoising", full)
    tracker = EvaluationTracker(output_path=str(tmp_path))
    file = save(tracker, evaluate(lm, tracker, limit=1))
    assert records(file) == [] and len(results_in(file)[0].samples(TASK)) == 2
    assert "(No space left on device). The run has no denoising records of" in caplog.text


def test_scores_have_no_records(lm: SDARLM, tmp_path: Path) -> None:
    lm.evaluation_begins(seed=0, cached=False, template=None)
    assert lm.loglikelihood([]) == [] and list(lm.denoising_lines()(TASK)) == []


HEAD = {"format": FORMAT, "version": 1, "task": TASK}
LINE = {
    "document": 0, "repeat": 0, "block_length": 4, "prompt_tokens": 6, "token_ids": [1, 2, 3], "texts": ["a", "b", "c"],
    "steps": [1, 0, 0], "confidences": [5000, 10000, 0], "finish_reason": "stop",
    "forwards": {"prefill": 1, "denoising": 3, "commit": 1}, "seconds": 0.5,
}  # fmt: skip


def test_a_tasks_name_may_be_a_pattern(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.output_path: str | None = str(tmp_path)
            self.date_id = "now"

        def save_results_samples(self, task_name: str, samples: object) -> None:
            (tmp_path / f"samples_{task_name}_now.jsonl").write_text("")

    tracker = Tracker()
    keep_beside_samples(tracker, lambda task: iter([cast("DenoisingLine", LINE)]))
    tracker.save_results_samples("t", [])
    tracker.save_results_samples("[t]*", [])
    assert len(list(tmp_path.glob("denoising_*"))) == 2


def _file(folder: Path, *lines: object) -> Path:
    file = folder / "denoising_x_1.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return file


def test_reading(tmp_path: Path) -> None:
    (record,) = read_denoising(_file(tmp_path, HEAD, LINE | {"of a later version": 1}))
    assert record.blocks == [range(2), range(2, 3)]
    assert record.steps == (1, 0, 0) and record.global_steps == (1, 0, 2)
    assert record.confidences == (0.5, 1.0, 0.0)
    (record,) = read_denoising(_file(tmp_path, HEAD, LINE | {"steps": None, "confidences": None}))
    assert record.steps is record.global_steps is None
    empty: dict[str, object] = {"token_ids": [], "texts": [], "steps": [], "confidences": []}
    (record,) = read_denoising(_file(tmp_path, HEAD, LINE | empty))
    assert record.blocks == [] and record.global_steps == ()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((), "holds no denoising records"),
        (({"format": "another"}, LINE), "holds no denoising records"),
        ((HEAD | {"version": 2}, LINE), "has version 2 of the denoising format; this package reads version 1"),
        ((HEAD, {}), "cannot be read"),
        ((HEAD, LINE | {"steps": [1]}), "lists of different lengths"),
        ((HEAD, LINE | {"block_length": 0}), "cannot be read"),
        ((HEAD, LINE | {"steps": []}), "lists of different lengths"),
        ((HEAD, LINE | {"confidences": []}), "lists of different lengths"),
        ((HEAD, LINE | {"confidences": None}), "steps without confidences"),
        ((HEAD, LINE | {"confidences": [5000, 10000, float("nan")]}), "numbers below 0, or none"),
        ((HEAD, LINE | {"steps": [0, -1, 0]}), "numbers below 0"),
        ((HEAD, LINE | {"steps": [0, float("inf"), 0]}), "cannot be read"),
        ((HEAD, LINE | {"seconds": float("nan")}), "numbers below 0, or none"),
        ((HEAD, LINE | {"forwards": {"denoising": "many"}}), "cannot be read"),
        ((HEAD, LINE | {"forwards": [3, 1]}), "cannot be read"),
        ((HEAD, LINE | {"token_ids": "ab"}), "cannot be read"),
        ((HEAD, [1]), "cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, lines: tuple[object, ...], told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_denoising(_file(tmp_path, *lines))
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [5, 40])
def test_a_cut_file_is_one_line(tmp_path: Path, cut: int) -> None:
    file = _file(tmp_path, HEAD, LINE)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="cannot be read"):
        read_denoising(file)
    file.write_text("no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_denoising(file)


def test_records_are_small(tmp_path: Path) -> None:
    """A run of 1,319 answers of 512 tokens: under 8 MB."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoin shrdlu 0123456789"), rng.integers(1, 8))) for _ in range(20_000)]
    lines = []
    for document in range(100):
        tokens = (rng.zipf(1.2, 512) % len(words)).tolist()
        confidences = np.rint(10_000 * rng.beta(5, 0.5, 512)).astype(int).tolist()
        steps = rng.integers(0, 4, 512).tolist()
        line: Any = LINE | {"document": document, "token_ids": tokens, "texts": [words[i] for i in tokens]}
        lines.append(line | {"steps": steps, "confidences": confidences})
    file = tmp_path / "denoising_x_1.jsonl.gz"
    write_denoising(file, "x", lines)
    assert file.stat().st_size < 100 / 1319 * 8e6 and len(read_denoising(file)) == 100


def test_pieces_of_bytes_that_encode_no_character() -> None:
    """An answer in a loop of such bytes: each token is read a few times, not once for each token behind it."""
    read: list[int] = []

    class Bytes:
        chat_template = None
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def encode(self, text: str, **_: object) -> list[int]:
            return list(text.encode())

        def decode(self, ids: list[int], **_: object) -> str:
            read.append(len(ids))
            return bytes(ids).decode(errors="replace")

    checkpoint: Any = SimpleNamespace(
        tokenizer=Bytes(), name="bytes", stop_ids=(0,), decode=Bytes().decode, special_token=lambda text: None
    )
    prompts = Prompts(checkpoint)
    assert prompts.pieces([*"aé".encode(), *"日😀b".encode()]) == ["a", "", "é", "", "", "日", "", "", "", "😀", "b"]
    loop = [0x9F] * 3000
    assert "".join(prompts.pieces([*loop, *"日b".encode()])) == "\ufffd" * 3000 + "日b"
    assert max(read) <= 6


@pytest.mark.parametrize("output", ["file/runs", "file", "file/results.json"])
def test_an_output_path_that_cannot_be_written_is_said_before_the_evaluation(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lm = SDARLM("demo")
    with pytest.raises(UserError, match=r"--output_path .*file.* cannot be written: .*\. Name another folder\."):
        evaluate(lm, EvaluationTracker(output_path=str(tmp_path / output)))
