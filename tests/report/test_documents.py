"""Documents of several runs, by the keys that pair them."""

from __future__ import annotations

from pathlib import Path

from run_files import write_run

from sdar_lm_eval.report.documents import by_key, documents_of
from sdar_lm_eval.report.runs import read_runs

SCORES = {"t": {"right,none": [1.0, 0.0]}}


def test_documents_are_paired_by_their_hashes(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(first), SCORES, documents=[first, first + 1]) for first in (0, 1)]
    for folder in folders:
        (file,) = folder.glob("samples_*")
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(f'{{"doc_id": {i}, {line.partition(", ")[2]}' for i, line in enumerate(lines)))
    one, other = by_key(read_runs(folders), "t")
    assert [(one[key].question, other[key].question) for key in one if key in other] == [("Question 1?",) * 2]


def test_a_score_of_several_answers_need_not_average_to_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path, SCORES, aggregated={"right,none": 0.9})
    (file,) = tmp_path.glob("samples_*")
    file.write_text(file.read_text().replace('"resps": [[', '"resps": [["other", '))
    (run,) = read_runs([tmp_path])
    assert [list(answer.scores.values()) for each in documents_of(run, "t") for answer in each.answers] == [
        [1.0], [1.0], [0.0], [0.0]
    ]  # fmt: skip
