"""The columns of SDAR's published tables, and this package's tasks that reproduce them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.report.published import (
    GSM8K,
    HUMANEVAL,
    IFEVAL,
    MATH500,
    MATHBENCH,
    MBPP,
    MMLU,
    SCI_TASKS,
    TRADO_TASKS,
    sampled,
)
from sdar_lm_eval.report.runs import Metric


@dataclass(frozen=True)
class Column:
    """A column of a published table.

    Attributes:
        title: the column's title in the published table.
        task: this package's task, or group of tasks, that reproduces the column.
        metric: the task's metric and filter, as results files spell them.
        questions: number of questions (documents) in the benchmark; None where no source says.
        shots: number of few-shot examples before each question.
        weighted: whether the score is not the plain mean over the task's questions. Its standard error is then known
            only where the task computes one.
        caveat: what besides chance may explain a difference from a published score; "" where nothing is known.
    """

    title: str
    task: str
    metric: str
    questions: int | None
    shots: int = 0
    weighted: bool = False
    caveat: str = ""


COLUMNS = (
    Column("MMLU (5-shot)", MMLU, "exact_match,first-option", 14042, shots=5),
    Column("GSM8K", GSM8K, "exact_match,opencompass", 1319),
    Column("MATH500", MATH500, "math_verify,none", 500),
    Column("HumanEval", HUMANEVAL, "pass@1,code-block", 164),
    Column("MBPP (sanitized)", MBPP, "pass@1,code-block", 257),
    Column("IFEval (prompt strict)", IFEVAL, "prompt_level_strict_acc,none", 541),
    Column("MathBench", MATHBENCH, "stage_mean,opencompass", 3709, weighted=True),
)
"""SDAR's table (arXiv 2510.06303, table 1); the tasks are those of `tasks/sdar_bench.yaml`."""

_RULE = "here a rule scores alone; there a judge model may look at what the rule finds wrong"
_TWIN = "here a rule scores; there probably a judge model"
_SCI = {
    "MMLU-Pro": ("exact_match,opencompass", 12032, _RULE),
    "AIME 2024": ("math_verify,opencompass", 30, _RULE),
    "AIME 2025": ("math_verify,opencompass", 30, _RULE),
    "LMB-hard": ("math_verify,opencompass", None, _RULE),
    "LCB-v5": ("pass@1,opencompass", 167, ""),
    "LCB-v6": ("pass@1,opencompass", 175, ""),
    "GPQA-diamond": ("exact_match,opencompass", 198, _RULE),
    "ProteinLMBench": ("exact_match,opencompass", 944, _TWIN),
}


def _sci(protocol: str) -> tuple[Column, ...]:
    columns = []
    for title, task in SCI_TASKS.items():
        metric, questions, caveat = _SCI[title]
        name = sampled(task) if protocol == "S" else task
        columns.append(Column(f"{title} ({protocol})", name, metric, questions, caveat=caveat))
    return tuple(columns)


_SCI_GREEDY, _SCI_SAMPLED = _sci("G"), _sci("S")
SCI_COLUMNS = (*_SCI_GREEDY, *_SCI_SAMPLED)
"""The reproducible columns of SDAR-30B-A3B-Sci's table (JetAstra/SDAR's README, part II): greedy (G), and sampled at
temperature 1 (S)."""

_TRADO = {
    "MATH500": (500, ""),
    "GSM8K": (1319, ""),
    "AIME 2024": (30, "no mean of three answers to each of 30 questions is the published score"),
}


def _trado(protocol: str, ending: str) -> tuple[Column, ...]:
    columns = []
    for title, task in TRADO_TASKS.items():
        questions, caveat = _TRADO[title]
        columns.append(
            Column(f"{title} ({protocol})", f"{task}{ending}", "is_equal,last-box", questions, caveat=caveat)
        )
    return tuple(columns)


TRADO_COLUMNS = (_trado("dynamic", ""), _trado("static", "_static"), _trado("thinking", "_think"))
"""The reproducible columns of dLLM-RL's table, by protocol; the tasks are those of `tasks/trado*.yaml`."""

TABLES = (COLUMNS, _SCI_GREEDY, _SCI_SAMPLED, *TRADO_COLUMNS)
"""The published tables, each with its columns: SDAR's, SDAR-30B-A3B-Sci's greedy and sampled, dLLM-RL's three."""


def main_metric(task: str, metrics: Sequence[Metric]) -> Metric | None:
    """Return the metric that counts where nobody chooses one: the published column's, else the task's first.

    Args:
        task: the task's name.
        metrics: the task's metrics in a run.
    """
    columns = {column.task: column.metric for table in TABLES for column in table}
    wanted = columns.get(task)
    return next((each for each in metrics if each.key.in_results == wanted), next(iter(metrics), None))
