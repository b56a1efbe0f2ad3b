"""`sdar_lm_eval show`: which documents are listed, and how an answer is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_files import write_run

from sdar_lm_eval.commands import main
from sdar_lm_eval.report.denoising import Denoising, DenoisingLine, denoising_file, write_denoising
from sdar_lm_eval.report.terminal import LEVELS, denoised_text

TASK = "riddles"


def line(document: int, texts: list[str], finish: str = "stop", repeat: int = 0) -> DenoisingLine:
    steps = [i % 3 for i in range(len(texts))]
    return {
        "document": document, "repeat": repeat, "block_length": 4, "prompt_tokens": 6,
        "token_ids": list(range(len(texts))), "texts": texts, "steps": steps, "confidences": [9000] * len(texts),
        "finish_reason": finish, "forwards": {"prefill": 1, "denoising": 6, "commit": 2}, "seconds": 0.25,
    }  # fmt: skip


def sample(document: int, answer: str, score: float, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": document, "doc": {"question": f"Riddle {document}?"}, "target": "42", "resps": [[answer]],
        "filtered_resps": [answer.rpartition(" ")[2] if score else "[invalid]"], "filter": "last-word", "acc": score,
        "arguments": {"gen_args_0": {"arg_0": f"user: Riddle {document}?", "arg_1": {}}}, "doc_hash": str(document),
        "prompt_hash": "p", "target_hash": "t",
    } | more  # fmt: skip


def make_run(folder: Path, samples: list[dict[str, Any]], lines: list[DenoisingLine], **config: Any) -> Path:
    folder.mkdir(parents=True)
    score = sum(each["acc"] for each in samples) / len(samples)
    results = {
        "results": {TASK: {"alias": TASK, "acc,last-word": score, "acc_stderr,last-word": 0.1}},
        "configs": {TASK: {"output_type": "generate_until"}}, "n-samples": {TASK: {"effective": len(samples)}},
        "date": 1.0, "config": {"model": "sdar", "model_args": {"pretrained": "demo"} | config},
    }  # fmt: skip
    (folder / "results_1.json").write_text(json.dumps(results))
    file = folder / f"samples_{TASK}_1.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in samples))
    if lines:
        write_denoising(denoising_file(file), TASK, lines)
    return folder


def test_thoughts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole where the run has no denoising record; the answer that ended in its thought can be listed."""
    thoughts = [{"thoughts": [[{"text": "Hm", "ended": True}]]}, {"thoughts": [[{"text": "Hm, hm", "ended": False}]]}]
    samples = [sample(3, "It is 42", 1.0, **thoughts[0]), sample(5, "", 0.0, **thoughts[1]), sample(8, "So 42", 1.0)]
    run = str(make_run(tmp_path / "run", samples, [line(5, ["Hm,", " hm"], "repetition")]))
    first = shown(capsys, run, "--doc", "3")
    assert first.index("Hm\n") < first.index("It is 42")
    second = shown(capsys, run, "--doc", "5")
    assert "The answer ended while the model was thinking: its scored text is empty." in second
    assert "The answer ended in a loop (stop_repetition)." in second
    listed = shown(capsys, run, "--only", "thinking")
    assert "1 of 3 documents" in listed
    assert "wrong thinking" in listed
    answers = [each["answers"][0] for each in json.loads(shown(capsys, run, "--json"))]
    assert [(each.get("thought"), each.get("thought_ended")) for each in answers] == [
        ("Hm", True), ("Hm, hm", False), (None, None),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = [sample(3, "It is 42", 1.0), sample(5, "None\nat all", 0.0), sample(8, "So 42", 1.0)]
    lines = [line(3, ["It", " is", " ", "42"]), line(5, ["None", "\n", "at", " all"], "length")]
    return make_run(tmp_path / "run", samples, [*lines, line(8, ["So", " 42"])])


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


def documents(out: str) -> list[int]:
    return [int(row.split()[0]) for row in out.splitlines()[2:]]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), [3, 5, 8]),
        (("--only", "right"), [3, 8]),
        (("--only", "wrong"), [5]),
        (("--only", "invalid"), [5]),
        (("--only", "cut"), [5]),
        (("--search", "riddle 8"), [8]),
        (("--search", "AT ALL"), [5]),
        (("--search", "nowhere"), []),
        (("--only", "right", "--search", "it is"), [3]),
    ],
)
def test_which_documents(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], found: list[int]
) -> None:
    out = shown(capsys, str(folder), *words)
    assert f"riddles, acc of last-word 66.7 ± 10.0%; {len(found)} of 3 documents" in out
    assert documents(out) == found
    listed = json.loads(shown(capsys, str(folder), *words, "--json"))
    assert [each["document"] for each in listed] == found


def test_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [" ".join(row.split()) for row in shown(capsys, str(folder)).splitlines()]
    assert rows[2] == "3 4 8 ✓ right 42 42 Riddle 3?"
    assert rows[3] == "5 4 8 ✗ wrong cut nothing 42 Riddle 5?"


def test_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(folder), "--doc", "5")
    assert "riddles 5  ✗ wrong" in out and "user: Riddle 5?" in out
    assert "4 tokens, 6 denoising and 2 commit forwards, 0.50 tokens per forward, 0.25 s" in out
    assert "None₁⏎₂\n│at₃ all₁\n" in out  # the prompt has two tokens of the first block
    assert "The answer ended at the limit of new tokens." in out
    assert "last-word: nothing\ngold: 42" in out
    (document,) = json.loads(shown(capsys, str(folder), "--doc", "5", "--json"))
    assert document["answers"][0]["denoising"]["steps"] == [0, 1, 2, 0]


def test_tokens_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.split() for row in shown(capsys, str(folder), "--doc", "5", "--tokens").splitlines()]
    assert ["1", "1", "1", "0.9000", "'None'"] in rows  # the prompt has two tokens of the first block
    assert ["3", "2", "3", "0.9000", "'at'"] in rows


def test_colours_say_the_confidence() -> None:
    low, middle, high = 0.3, 0.9, 0.999
    record = Denoising(0, 0, 4, 4, (1, 2, 3), ("a", "b", "c"), (0, 0, 1), (low, middle, high), "stop", {}, 0.1)
    text = denoised_text(record)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert text.plain == "a₁b₁c₂"
    assert (styles["a"], styles["b"]) == (LEVELS[0][1], LEVELS[-1][1]) and "c" not in styles


def test_the_legend_explains_colours_where_there_are_colours(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = str(documents(shown(capsys, str(folder)))[0])
    plain = shown(capsys, str(folder), "--doc", first)
    assert "border between blocks" in plain and "below 0.5" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "below 0.5" in shown(capsys, str(folder), "--doc", first)


def test_a_run_without_records_and_several_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = sample(1, "a 1", 1.0, resps=[["a 1", "b 2"]])
    out = shown(capsys, str(make_run(tmp_path / "hf", [two], [])), "--doc", "1")
    assert "answer 1 of 2" in out and "b 2" in out
    assert out.count("The run has no record of how the answer was written.") == 2
    out = shown(
        capsys, str(make_run(tmp_path / "sdar", [two], [line(1, ["a"]), line(1, ["b"], repeat=1)])), "--doc", "1"
    )
    assert "a₁" in out and "b₁" in out


def test_a_run_of_log_likelihoods_lacks_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"gen_args_0": {"arg_0": "?", "arg_1": " no"}, "gen_args_1": {"arg_0": "?", "arg_1": " yes"}}
    more = {"arguments": scores, "resps": [[[-2.5, "False"]], [[-0.5, "True"]]], "filter": "none"}
    folder = make_run(tmp_path / "run", [sample(1, "", 1.0, filtered_resps=["B"], **more)], [])
    file = folder / "results_1.json"
    text = file.read_text().replace('"generate_until"', '"multiple_choice"')
    file.write_text(text.replace("last-word", "none"))
    out = shown(capsys, str(folder), "--doc", "1")
    assert "▸     -0.500   yes" in out
    assert "no record" not in out
    assert "\nchosen: B\n" in out


def test_a_task_without_filters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm_eval names the missing filter "none". An answer that is scored whole is not printed twice."""
    samples = [
        sample(i, "It is 42", 1.0, filtered_resps=[kept], filter="none") for i, kept in enumerate(["It is 42", "42"])
    ]
    folder = make_run(tmp_path / "run", samples, [])
    file = folder / "results_1.json"
    file.write_text(file.read_text().replace("last-word", "none"))
    whole, part = (shown(capsys, str(folder), "--doc", number) for number in "01")
    assert whole.count("It is 42") == 1 and "none" not in whole + part
    assert "\nextracted: 42\n" in part


def test_the_answers_of_several_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run has another numbering, so only the hash pairs its document with the first run's."""
    other = sample(0, "So 41", 0.0, doc_hash="5", prompt="")
    other["arguments"] = {"gen_args_0": {"arg_0": "Riddle 5?", "arg_1": {}}}
    second = make_run(tmp_path / "second", [other], [line(0, ["So", " 41"])], dtype="float16")
    out = shown(capsys, str(folder), str(second), "--doc", "5")
    assert out.count("user: Riddle 5?") == 1
    first, found, rest = out.partition(f"{second}\nanswer  ✗ wrong")
    assert found and f"{folder}\nanswer  ✗ wrong" in first
    assert "None₁⏎₂\n│at₃ all₁\n" in first and "So₁ 41₂" in rest
    assert (
        "This run's prompt differs. `show` of this run alone, with --doc 0, prints the prompt." in rest
        and "differs" not in first
    )
    (samples,) = second.glob("samples*")
    messages = json.dumps([[json.dumps([{"role": "user", "content": "Riddle 5?"}])]])
    samples.write_text(samples.read_text().replace('"Riddle 5?"', messages[1:-1]))
    served = "This run sent chat messages. `show` of this run alone, with --doc 0, prints the prompt."
    assert served in shown(capsys, str(folder), str(second), "--doc", "5")
    listed = json.loads(shown(capsys, str(folder), str(second), "--doc", "5", "--json"))
    assert [(each["run"], each["document"], each["answers"][0]["text"]) for each in listed] == [
        (str(folder), 5, "None\nat all"), (str(second), 0, "So 41"),
    ]  # fmt: skip
    (tmp_path / "both").mkdir()
    for run in (folder, second):
        run.rename(tmp_path / "both" / run.name)
    assert shown(capsys, str(tmp_path / "both"), "--doc", "5").count("answer  ✗ wrong") == 2


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*words: str) -> str:
        assert main(["show", *words]) == 1
        return capsys.readouterr().err

    assert "--doc 4: the run has no such document of riddles. It has 3 documents, 3 to 8." in error_of(
        str(folder), "--doc", "4"
    )
    assert "no task 'riddle'; give --task riddles. Did you mean 'riddles'?" in error_of(str(folder), "--task", "riddle")
    assert "no such score: --metric f1. Its scores: acc of last-word." in error_of(str(folder), "--metric", "f1")
    make_run(folder / "another", [sample(3, "It is 42", 1.0)], [], dtype="float16")
    told = error_of(str(folder))
    assert "holds 2 runs. Name the results file or the folder of one:" in told and "another/results_1.json" in told
    several = str(folder / "results_1.json"), str(folder / "another")
    assert "2 were given. --doc N prints the runs' answers to document N; sdar_lm_eval compare" in error_of(*several)
    assert f"--doc 5: {several[1]} has no answer to this document of {several[0]}. Leave out the run, or" in error_of(
        *several, "--doc", "5"
    )
    unscored = make_run(tmp_path / "unscored", [sample(3, "It is 42", 1.0)], [])
    file = unscored / "results_1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"results": {TASK: {"alias": TASK}}}))
    assert "has no score of riddles. Evaluate again, without --predict_only." in error_of(str(unscored))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"results": {TASK: {"bypass,last-word": 999}}}))
    assert "bypass of last-word –; 1 of 1 documents" in shown(capsys, str(unscored))
    for choice in (("--only", "right"), ("--only", "wrong"), ("--metric", "exact_match")):
        assert "has no score of riddles. Evaluate again, without --predict_only." in error_of(str(unscored), *choice)
    (folder / f"samples_{TASK}_1.jsonl").unlink()
    assert "has no samples of riddles. Evaluate again with --log_samples." in error_of(str(folder / "results_1.json"))


@pytest.mark.parametrize(
    ("metric", "values", "value", "told", "verdicts"),
    [
        ("word_perplexity", [[-270.0, 33], [-90.0, 12]], 2979.96, "word_perplexity of last-word 2980", [None, None]),
        ("f1", [[0, 0], [1, 1], [1, 0]], 2 / 3, "f1 of last-word 66.7%", [None] * 3),
        ("instructions", [[True, False], [True]], 2 / 3, "instructions of last-word 66.7%", [0.5, 1.0]),
        ("perplexity", [-2.0, -4.0], 20.0855, "perplexity of last-word 20.09", [-2.0, -4.0]),
        ("acc", [1.0, 0.0, 1.0], 0.6, "acc of last-word 60.0%", [1.0, 0.0, 1.0]),  # of more documents than there are
    ],
)
def test_the_metric_is_lm_evals_and_pairs_are_no_scores(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    values: list[Any],
    value: float,
    told: str,
    verdicts: list[float | None],
) -> None:
    samples = [sample(i, "It is 42", 1.0, **{metric: each}) for i, each in enumerate(values)]
    folder = make_run(tmp_path / "run", [each | {"acc": 1} for each in samples], [])
    results = json.loads((folder / "results_1.json").read_text()) | {"results": {TASK: {f"{metric},last-word": value}}}
    (folder / "results_1.json").write_text(json.dumps(results))
    (folder / f"samples_{TASK}_1.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    assert f": {TASK}, {told}; {len(values)} of {len(values)}" in shown(capsys, str(folder))
    assert [each["score"] for each in json.loads(shown(capsys, str(folder), "--json"))] == verdicts
    if verdicts == [None] * len(values):
        assert main(["show", str(folder), "--only", "wrong"]) == 1
        assert f"--only wrong: {metric} of last-word in {TASK} has no score of single documents. Leave" in (
            capsys.readouterr().err
        )


def test_right_is_0_where_lower_values_are_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_run(tmp_path / "run", {"task": {"error,none": [1, 0, 0.5]}}, better={"error": False}))
    of_kinds = [json.loads(shown(capsys, folder, "--only", kind, "--json")) for kind in ("right", "wrong")]
    assert [[each["document"] for each in listed] for listed in of_kinds] == [[1], [0, 2]]
    assert shown(capsys, folder).count("✗ wrong") == shown(capsys, folder, "--doc", "0").count("✗ wrong") - 1 == 1


def test_the_prompt_of_a_served_model_is_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Riddle 5?", "type": "text"}]
    sent = {"arguments": {"gen_args_0": {"arg_0": [json.dumps(messages)], "arg_1": {}}}}  # as lm_eval writes it
    folder = make_run(tmp_path / "run", [sample(5, "It is 42", 1.0) | sent], [])
    assert "\nsystem: Be brief.\n\nuser: Riddle 5?\n" in shown(capsys, str(folder), "--doc", "5")


SAMPLED = {"resps": [["So 41", "It is 42", "Is it 43"]]}


@pytest.mark.parametrize(
    ("kept", "scores", "found"),
    [
        ([["41", "42", "[invalid]"]], [0, 1, 0], [("41", [0]), ("42", [1]), (None, [0])]),  # a mean over the answers
        (["41"], 0.0, [("41", [0]), ("absent", []), ("absent", [])]),  # the first answer counts
    ],
)
def test_each_of_several_answers_has_its_own_extracted_text_and_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: Any, scores: Any, found: list[Any]
) -> None:
    folder = make_run(tmp_path / "run", [sample(3, "", 0.0) | SAMPLED | {"filtered_resps": kept}], [])
    file = next(folder.glob("samples*"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"acc": scores}) + "\n")
    (document,) = json.loads(shown(capsys, str(folder), "--json"))
    answers = document["answers"]
    assert [each["text"] for each in answers] == SAMPLED["resps"][0]
    told = [(a["extracted"].get("last-word", "absent"), [s["value"] for s in a["scores"]]) for a in answers]
    assert told == found
    assert document["score"] == pytest.approx(sum(scores) / 3 if isinstance(scores, list) else scores)
    invalid = documents(shown(capsys, str(folder), "--only", "invalid"))
    assert invalid == ([3] if isinstance(scores, list) else [])


def test_nothing_acts_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences of answers, markup in names of folders, and characters without UTF-8."""
    escape = "\x1b]0;title\x07\x1b[2J\x9b1m\ud83d 42"
    samples = [sample(3, escape, 1.0, doc={"question": escape}, filtered_resps=[escape], target=escape)]
    for name, lines in (("[bold]:smile:", []), ("[/x]", [line(3, ["\x1b[2J", "\x9b1m", " 42"])])):
        folder = make_run(tmp_path / name, samples, lines)
        for words in ((), ("--doc", "3")):
            out = shown(capsys, str(folder), *words)
            assert not set(out) & set("\x1b\x07\x9b\ud83d") and "␛[2J" in out
            assert words or str(folder) in out.replace("\n", "")


def test_a_narrow_terminal_has_the_documents_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    folder = make_run(tmp_path / "run", [sample(1234, "It is 42", 1.0)], [line(1234, ["It", " is", " 42"])])
    assert documents(shown(capsys, str(folder))) == [1234]


def test_a_superscript_is_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doc = {"question": "Which power?", "choices": ["a", "b", "c"]}
    folder = make_run(tmp_path / "run", [sample(3, "It is ²", 1.0, doc=doc, target="²")], [])
    assert "gold: ²" in shown(capsys, str(folder), "--doc", "3")
