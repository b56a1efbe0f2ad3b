"""The page of runs: what is embedded, without a browser. test_page_in_browser.py opens the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from written_runs import add_thoughts, large_run, record, write_answers

from sdar_lm_eval.commands import main
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.changed import changed_documents
from sdar_lm_eval.report.compare import compare_runs
from sdar_lm_eval.report.compare_text import p_as_text
from sdar_lm_eval.report.denoising import read_denoising
from sdar_lm_eval.report.page.data import collect
from sdar_lm_eval.report.page.embedding import allowed_in_html, embedded, extract
from sdar_lm_eval.report.page.overview import key_of, pairs_of, rate_rows, score_rows, settings_rows, speeds_of
from sdar_lm_eval.report.page.rendering import page_of
from sdar_lm_eval.report.runs import Run, read_runs

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028\u2029\x00\ud800'\"&amp;{{7*7}}"
)


class _Parsed(HTMLParser):
    """The elements of a page, and what stands in its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.contents: list[tuple[str, dict[str, str | None], str]] = []
        self.policy = ""
        self.text = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self._open = (tag, given) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.contents.append((*self._open, data))
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def part(self, name: str) -> Any:
        return next(extract(text) for _, given, text in self.contents if given.get("id") == f"data-{name}")


def _two(tmp_path: Path) -> list[Run]:
    answers_a = [["it is 7"], ["it is 8"], ["it is 7"], ["?"], ["it is 7"]]
    answers_b = [["so 7"], ["so 7"], ["so 8"], ["so 7"], ["so 7"]]
    a = write_answers(tmp_path / "a", answers_a, extracted=["7", "8", "7", "[invalid]", "7"], settings={"top_k": 1})
    b = write_answers(tmp_path / "b", answers_b, settings={"top_k": 2})
    return read_runs([a, b])


def test_scores_of_other_numbers_of_documents_say_so(tmp_path: Path) -> None:
    folders = [write_answers(tmp_path / name, [["7"]] * number) for name, number in (("a", 1200), ("b", 4), ("c", 4))]
    folders.append(write_answers(tmp_path / "other", [["7"]], task="other"))
    runs = read_runs(folders)

    def counted(*runs: Run) -> set[str]:
        task = runs[0].tasks[0]
        return {row.documents for row in score_rows(runs, [(task, [None] * len(runs))], collect(runs, [task]))}

    assert counted(*runs) == {"1,200 / 4 / 4 / –"}
    assert counted(*runs[1:]) == {"4"}


def test_what_is_embedded_comes_back() -> None:
    value = {HOSTILE: [1, None, "…", HOSTILE]}
    text = embedded(value)
    assert ascii(extract(text)) == ascii(value) and re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert allowed_in_html(f"a{HOSTILE}") == "a" + HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")


def test_the_policy_allows_the_script_and_the_style_and_nothing_else(tmp_path: Path) -> None:
    parsed = _Parsed(page_of(_two(tmp_path)))
    code = {tag: text for tag, given, text in parsed.contents if given.get("type") is None}
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in code.items()
    }
    directives = dict(part.strip().split(" ", 1) for part in parsed.policy.split(";"))
    assert directives["default-src"] == "'none'" and directives["base-uri"] == "'none'"
    assert directives["script-src"] == hashes["script"] and directives["style-src"] == hashes["style"]
    assert not re.search(r"https?://|\beval\b|innerHTML|insertAdjacentHTML|document\.write", code["script"])


def test_a_document_has_each_runs_outcome(tmp_path: Path) -> None:
    runs = _two(tmp_path)
    documents = collect(runs, ["gsm8k_sdar"])
    assert [row.document for row in documents.rows] == [0, 1, 2, 3, 4]
    assert documents.tasks[0]["filters"] == ["strict-match", "flexible-extract"] and documents.tasks[0]["main"] == 0
    of_a, of_b = zip(*(row.outcomes for row in documents.rows), strict=True)
    assert [each.extracted[1] for each in of_a] == ["7", "8", "7", None, "7"]
    assert [each.scores[1] for each in of_b] == [1, 1, 0, 1, 1] and {each.cut for each in of_b} == {None}
    differing = [row.document for row in documents.rows if row.outcomes[0].scores != row.outcomes[1].scores]  # type: ignore[union-attr]
    changed = changed_documents(*runs, "gsm8k_sdar", "exact_match", "flexible-extract")
    assert differing == [each.document_a for each in changed] == [1, 2, 3]


def test_the_numbers_of_the_comparison_are_those_of_compare(tmp_path: Path) -> None:
    runs = _two(tmp_path)
    one = compare_runs(*runs).differences[0]
    text = _Parsed(page_of(runs)).text
    assert one.p is not None and p_as_text(one.p) in text and f"{100 * one.difference:+.1f}" in text
    assert f"{100 * one.low:+.1f} to {100 * one.high:+.1f}" in text  # type: ignore[operator]
    assert "hold for runs and documents that were chosen before any score was seen" in text


def test_a_comparison_begins_with_its_conclusion(tmp_path: Path) -> None:
    runs = read_runs([write_answers(tmp_path / name, [[f"it is {7 + (name == 'a')}"]] * 7) for name in "abc"])
    says = "is better: 7 documents changed from wrong to right, none the other way (p = 0.016"
    assert f"gsm8k_sdar: B {says})" in _Parsed(page_of(runs[:2])).text
    assert f"gsm8k_sdar: C {says}; 0.031 after Holm's adjustment)" in _Parsed(page_of(runs)).text
    folders = [tmp_path / "many" / name for name in "ab"]
    for number in range(9):
        for folder in folders:
            wrong = folder.name == "a" and number == 0
            write_answers(folder, [[f"it is {7 + wrong}"]] * 10, task=f"task{number}", date=number)
    (pair,) = pairs_of(runs := read_runs(folders), runs[0].tasks, collect(runs, runs[0].tasks))
    assert [each.split(":")[0] for each in pair.conclusions] == ["task0", "8 of 9 scores"]


def test_a_group_has_a_row_and_its_tasks_a_family(tmp_path: Path) -> None:
    folders = [write_answers(tmp_path / name, [[f"it is {7 + (name == 'a')}"]] * 7, task="part") for name in "ab"]
    for folder, value in zip(folders, (0.0, 1.0), strict=True):
        results = json.loads((folder / "results_1.json").read_text())
        results["results"]["whole"] = {f"exact_match,{name}": value for name in ("strict-match", "flexible-extract")}
        results["group_subtasks"] = {"whole": ["part"]}
        (folder / "results_1.json").write_text(json.dumps(results))
    runs = read_runs(folders)
    ((group, task),) = (pair.rows for pair in pairs_of(runs, ["part"], collect(runs, ["part"])))
    assert (group.task, group.family, group.a, group.only_b_link) == ("whole", "", "0.0 ± 0.0", "")
    assert (task.task, task.family, task.a) == ("part", "whole", "0.0 ± 0.0") and task.only_b_link
    assert group.p == group.p_holm == task.p == task.p_holm == "0.016"
    assert "0.016 within whole" in _Parsed(page_of(runs)).text


def test_repeats_of_another_seed_are_answers_of_one_run(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_answers(tmp_path, [[f"it is {6 + seed % 2}"]], date=seed, seed=seed)
    (run,) = read_runs([tmp_path])
    documents = collect([run], ["gsm8k_sdar"])
    outcome = documents.rows[0].outcomes[0]
    assert outcome is not None and outcome.answers == 3 and outcome.scores[0] == pytest.approx(2 / 3)
    assert documents.texts[0][0] == ["it is 7", "it is 6", "it is 7"]
    assert "66.7" in _Parsed(page_of([run])).text


def test_a_score_of_the_first_of_several_answers_is_not_shown_beside_the_others(tmp_path: Path) -> None:
    run = write_answers(tmp_path, [["it is 7", "it is 8"]])
    documents = collect(read_runs([run]), ["gsm8k_sdar"])
    outcome = documents.rows[0].outcomes[0]
    assert outcome is not None and outcome.scores == [1.0, 1.0]
    first, second = documents.details[0][2][0]  # type: ignore[index, misc]
    assert first == [[1.0, 1.0], ["7", "7"], None] and second == [[None, None], ["", ""], None]  # type: ignore[has-type]


def test_a_records_tokens_steps_and_confidences(tmp_path: Path) -> None:
    texts = ["it", " is", " ", "😀7", " and", " more"]
    line = record(0, texts, [1, 0, 0, 2, 0, 0], [1, 2, 3, 4, 5, 6], prompt_tokens=7, finish_reason="length")
    folder = write_answers(tmp_path, [["it is 😀7"]], records=[line])
    (known,) = read_denoising(next(folder.glob("denoising*")))
    documents = collect(read_runs([folder]), ["gsm8k_sdar"])
    (units, tokens) = documents.texts[0][0][0]  # type: ignore[misc]
    assert [list(documents.tokens)[token] for token in tokens] == texts  # type: ignore[has-type]
    assert units == len("it is ") + 3  # type: ignore[has-type]  # an emoji is two UTF-16 code units
    embedded_record = documents.details[0][2][0][0][2]  # type: ignore[index]
    assert known.global_steps is not None
    summed = [sum(embedded_record["steps"][: place + 1]) for place in range(6)]
    assert summed == list(known.global_steps) and embedded_record["confidences"] == [1, 2, 3, 4, 5, 6]
    assert embedded_record["blocks"] == [block.start for block in known.blocks] == [0, 1, 5]
    outcome = documents.rows[0].outcomes[0]
    assert outcome is not None and outcome.cut == 1


def test_thoughts_stand_beside_their_answers(tmp_path: Path) -> None:
    run = add_thoughts(write_answers(tmp_path, [["it is 7"], [""], ["7"]]), {0: ("hm", True), 1: ("hm, hm", False)})
    details = collect(read_runs([run]), ["gsm8k_sdar"]).details
    assert [answer[3:] for *_, ((answer,),) in details] == [[["hm", True]], [["hm, hm", False]], []]


def test_log_likelihoods_are_shown_by_choice(tmp_path: Path) -> None:
    folder = write_answers(tmp_path, [["7"]], task="mmlu_x")
    results = json.loads((folder / "results_1.json").read_text())
    results["configs"]["mmlu_x"]["output_type"] = "multiple_choice"
    results["results"]["mmlu_x"] = {"acc,none": 1.0}
    (folder / "results_1.json").write_text(json.dumps(results))
    line = {
        "doc_id": 0, "filter": "none", "acc": 1.0, "target": "1", "doc": {"question": "?", "choices": ["no", "yes"]},
        "arguments": {"gen_args_0": {"arg_0": "?", "arg_1": " A"}, "gen_args_1": {"arg_0": "?", "arg_1": " B"}},
        "resps": [[["-2.5", "False"]], [["-0.25", "True"]]], "filtered_resps": [["-2.5", "False"], ["-0.25", "True"]],
    }  # fmt: skip
    (folder / "samples_mmlu_x_1.jsonl").write_text(json.dumps(line) + "\n")
    documents = collect(read_runs([folder]), ["mmlu_x"])
    assert documents.rows[0].gold == "1: yes" and not documents.tasks[0]["extracts"]
    (text,) = documents.texts[0][0]
    assert [each.split() for each in str(text).split("\n")] == [["-2.500", "A"], ["▸", "-0.250", "B"]]


def test_a_chat_models_messages_are_its_prompt(tmp_path: Path) -> None:
    """lm_eval's API models send a named tuple of one JSON text, which its samples file has as a list."""
    folder = write_answers(tmp_path, [["it is 7"]], model="local-chat-completions")
    samples = next(folder.glob("samples*"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        line["arguments"]["gen_args_0"]["arg_0"] = ['[{"role": "user"}]']
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect(read_runs([folder]), ["gsm8k_sdar"]).details[0][0] == '[{"role": "user"}]'


def test_the_chart_stands_in_the_page_without_styles(tmp_path: Path) -> None:
    """The policy forbids style attributes."""
    text = page_of(_two(tmp_path))
    chart = re.search(r"<svg role=.*?</svg>", text, re.DOTALL)
    assert chart is not None and "tokens per forward" in chart[0] and 'font-size="' in chart[0]
    assert not re.search(r"\bstyle=", text.partition("<body>")[2].partition("<script")[0])
    assert "1.50" in _Parsed(text).text and "900" in _Parsed(text).text
    one = page_of(read_runs([tmp_path / "a"]))
    assert 'id="charts"' not in one


def test_a_task_of_log_likelihoods_has_no_speeds(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        folder = write_answers(tmp_path / name, [["it is 7"]], settings={"x": name})
        results = json.loads((folder / "results_1.json").read_text())
        results["config"]["sdar_lm_eval"]["run"]["forwards"] = {}
        (folder / "results_1.json").write_text(json.dumps(results))
        runs += read_runs([folder])
    text = page_of(runs)
    assert 'id="charts"' not in text and "tokens/s" not in _Parsed(text).text


def test_tokens_per_second_are_the_runs_and_no_tasks(tmp_path: Path) -> None:
    """lm_eval decodes all tasks of a run together, so a run of fewer tasks has another speed in the same task."""
    first, other = (write_answers(tmp_path / name, [["it is 7"]], task="one") for name in "ab")
    more = write_answers(tmp_path / "more", [["it is 7"]], task="two")
    results, two = (json.loads((folder / "results_1.json").read_text()) for folder in (other, more))
    for part in ("results", "configs", "n-samples"):
        results[part] |= two[part]
    (other / "results_1.json").write_text(json.dumps(results))
    (more / "samples_two_1.jsonl").rename(other / "samples_two_1.jsonl")
    runs = read_runs([first, other])
    points = [(task, speeds_of(runs, task)) for task in ("one", "two")]
    (row,) = rate_rows(points)
    assert (row.task, len(row.of_runs)) == ("all tasks of the run", 2) and "–" not in row.of_runs
    assert [each.task for each in rate_rows(points[:1])] == ["one"]
    assert "all tasks of the run" in _Parsed(page_of(runs)).text
    (other / "results_1.json").write_text(json.dumps(results | {"results": {"one": results["results"]["one"]}}))
    two["config"]["sdar_lm_eval"]["run"]["generation_seconds"] *= 2
    (other / "results_2.json").write_text(json.dumps(two | {"date": 2.0}))
    runs = read_runs([first, other])
    of_files = rate_rows([(task, speeds_of(runs, task)) for task in ("one", "two")])
    assert [(each.task, each.of_runs) for each in of_files] == [("one", ("900", "900")), ("two", ("–", "450"))]


def test_a_run_without_scores_before_one_with_scores(tmp_path: Path) -> None:
    """Both have speeds, and the page judges by the metric of the run that was scored."""
    predicted, other, scored = (
        write_answers(tmp_path / name, [["it is 7"]]) for name in ("predicted", "other", "scored")
    )
    results = {"results": {"gsm8k_sdar": {"bypass,strict-match": 999, "bypass,flexible-extract": 999}}}
    for file in (predicted / "results_1.json", other / "results_1.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | results))
    unscored = read_runs([predicted, other])
    (pair,) = pairs_of(unscored, ["gsm8k_sdar"], collect(unscored, ["gsm8k_sdar"]))
    (warning,) = pair.warnings
    assert warning.endswith("has no score of gsm8k_sdar. Evaluate again, without --predict_only.")
    runs = read_runs([predicted, scored])
    assert [None if each is None else each.tokens_per_forward for each in speeds_of(runs, "gsm8k_sdar")] == [1.5, 1.5]
    (task,) = collect(runs, ["gsm8k_sdar"]).tasks
    assert task["metrics"][task["main"]][0] == "exact_match"
    assert 'id="charts"' not in page_of(runs)


def test_runs_of_one_folder_have_the_folders_that_tell_them_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_answers(tmp_path / name, [["it is 7"]], settings={"x": name})
    text = _Parsed(page_of(read_runs([tmp_path]))).text
    assert str(tmp_path / "one") in text and str(tmp_path / "two") in text


def test_a_date_that_no_calendar_has_is_not_shown(tmp_path: Path) -> None:
    folder = write_answers(tmp_path, [["it is 7"]], date=10**9)
    assert "evaluated 2001-09-09" in _Parsed(page_of(read_runs([folder]))).text
    file = next(folder.glob("results*"))
    file.write_text(file.read_text().replace('"date": 1000000000.0', '"date": 1e300'))
    assert "evaluated" not in _Parsed(page_of(read_runs([folder]))).text


def test_groups_come_before_their_tasks(tmp_path: Path) -> None:
    folder = write_answers(tmp_path, [["it is 7"], ["it is 8"]], task="part")
    results = json.loads((folder / "results_1.json").read_text())
    results["results"]["whole"] = {"acc,none": 0.25, "acc_stderr,none": 0.01}
    results["group_subtasks"] = {"whole": ["part"]}
    (folder / "results_1.json").write_text(json.dumps(results))
    text = _Parsed(page_of(read_runs([folder]))).text
    assert text.index("25.0 ± 1.0") < text.index("50.0")


def test_hostile_texts_make_no_element(tmp_path: Path) -> None:
    plain = _Parsed(page_of(_two(tmp_path / "plain")))
    folder = write_answers(
        tmp_path / "hostile", [[HOSTILE]] * 5, gold=[HOSTILE] * 5, questions=[HOSTILE] * 5, settings={"x": HOSTILE}
    )
    write_answers(
        tmp_path / "plain" / "a",
        [["it is 7"]] * 5,
        settings={"remasking_strategy": f"{HOSTILE}$\\frac{{", "confidence_threshold": HOSTILE},
    )
    runs = [read_runs([tmp_path / "plain" / "a"])[0], read_runs([folder])[0]]
    parsed = _Parsed(page_of(runs, title=HOSTILE))
    assert parsed.tags.count("script") == plain.tags.count("script") and parsed.tags.count("img") == 0
    assert page_of(runs, title=HOSTILE).encode("utf-8")
    assert sum(row[2].startswith("</script><script>") for row in parsed.part("index")["documents"]) == 5


def test_settings_that_differ_are_told_from_the_others(tmp_path: Path) -> None:
    differing, common = settings_rows(_two(tmp_path), ["gsm8k_sdar"])
    assert [(row.name, row.of_runs) for row in differing] == [("top_k", ("1", "2"))]
    assert ("block_length", ("4",)) in [(row.name, row.of_runs) for row in common]
    assert [key_of(number) for number in (0, 25, 26, 52)] == ["A", "Z", "AA", "BA"]


def test_a_run_without_samples_has_its_scores(tmp_path: Path) -> None:
    a, b = (write_answers(tmp_path / name, [["it is 7"]], settings={"x": name}) for name in "ab")
    next(b.glob("samples*")).unlink()
    parsed = _Parsed(page_of(read_runs([a, b])))
    assert parsed.text.count("100.0") >= 2 and "has no samples of gsm8k_sdar" in parsed.text
    assert parsed.part("index")["documents"][0][4][1] is None


def test_runs_that_share_no_task_are_shown_without_a_comparison(tmp_path: Path) -> None:
    runs = read_runs([write_answers(tmp_path / name, [["it is 7"]], task=name) for name in ("one", "two")])
    parsed = _Parsed(page_of(runs))
    assert [row[4][0] is None for row in parsed.part("index")["documents"]] == [False, True]
    assert "share no task" in parsed.text
    with pytest.raises(UserError, match=r"--tasks on: no run has it; the runs have one, two. Did you mean 'one'\?"):
        page_of(runs, ["on"])
    assert [task["name"] for task in _Parsed(page_of(runs, ["two"])).part("index")["tasks"]] == ["two"]


def test_long_answers_take_less_than_ten_megabytes(tmp_path: Path) -> None:
    """A tenth of GSM8K's 1,319 questions, of random words, which deflate less than a language does."""
    folder = large_run(tmp_path, documents=132, tokens=512, seed=1)
    assert len(page_of(read_runs([folder]))) < 10e6 / 10


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_answers(tmp_path / "run", [["it is 7"]])
    assert main(["report", str(folder), "-o", str(tmp_path / "r.html"), "--title", "A & B"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'r.html'}: 0.")
    assert "<title>A &amp; B</title>" in (tmp_path / "r.html").read_text("utf-8")
    for output, told in ((tmp_path / "no" / "r.html", "No such file"), (tmp_path, "Is a directory")):
        assert main(["report", str(folder), "-o", str(output)]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("samples_gsm8k_sdar_1.jsonl", b"{"), ("denoising_gsm8k_sdar_1.jsonl.gz", b"no gzip"), ("results_1.json", b"[]")],
)
def test_a_broken_file_is_one_line(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_answers(tmp_path, [["it is 7"]])
    (folder / name).write_bytes(content)
    assert main(["report", str(folder), "-o", str(tmp_path / "r.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sdar_lm_eval: error: ") and error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
