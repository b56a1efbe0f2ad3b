"""Comparisons of runs as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdar_lm_eval.decoding import spelled
from sdar_lm_eval.report import text_table
from sdar_lm_eval.report.changed import ChangedDocument
from sdar_lm_eval.report.compare import Comparison, Difference
from sdar_lm_eval.report.pairing import documents_in_words
from sdar_lm_eval.report.printing import printable
from sdar_lm_eval.report.statistics import ALPHA, FEWEST_DISCORDANT, POWER
from sdar_lm_eval.report.text_table import aligned, escaped, fitted, score, transposed

DocumentsOf = Mapping[tuple[int, int], Sequence[ChangedDocument]]
"""(index of a comparison, index into its `differences`) -> the documents whose scores differ."""

MOST_SENTENCES = 8
"""Most differences of a comparison that get one sentence each. Of more, those without a finding share one sentence."""

_QUESTION = 60
"""Most characters of a question in a list of documents."""

_LEGEND = (
    "± is one standard error. Scores from 0 to 1 are in per cent. The interval is the paired 95% interval of B - A.",
    "only A and only B count the documents that A alone or B alone has right.",
    f"detectable: the smallest true difference that the test finds (p < {ALPHA}) with probability {POWER}.",
    "p and interval hold for runs and documents that were chosen before any score was seen.",
    "The best of many runs looks better than it is, and so does a run that is extended until p is small.",
)
_UNTESTED = "Scores without a test are not in per cent."
_NO_SETTING = "No setting that the files name differs."
_HOLM = (
    f"p (Holm): p after Holm's adjustment for the number of tests. Where no score truly differs, at most {ALPHA:.0%} "
    f"of such tables have a p (Holm) below {ALPHA}.",
    "The intervals and detectable differences are not adjusted.",
)
_FAMILIES = (
    "family: the group within which a test is exploratory. Holm's adjustment counts the tests of each family apart. "
    f"So the {ALPHA:.0%} hold for the rows without a family, and for the rows of each family."
)


def as_text(comparisons: Sequence[Comparison], documents: DocumentsOf | None = None, width: int | None = None) -> str:
    """Return comparisons with one baseline as text for a terminal.

    Args:
        comparisons: comparisons of one run a with other runs, as `adjusted` returns them.
        documents: documents to list below the table; None: none.
        width: as for `fitted`.
    """
    names = _names(comparisons)
    parts = [
        [f"A: {comparisons[0].a.label}", *(f"{n}: {each.b.label}" for n, each in zip(names, comparisons, strict=True))],
        ["Settings that differ:", *("  " + line for line in aligned(rows, left=range(len(rows[0]))))]
        if (rows := _settings_rows(comparisons, names))
        else [_NO_SETTING],
        _settings_of_some(comparisons, names),
        [f"Warning: {text}" for text in _warnings(comparisons, names)],
        fitted(table(comparisons), _left(comparisons), width),
        [*sentences(comparisons), *speeds(comparisons)],
        notes(comparisons),
    ]
    parts += [_listed(comparisons[i], j, changed, width) for (i, j), changed in (documents or {}).items()]
    return printable("\n\n".join("\n".join(lines) for lines in parts if lines))


def as_markdown(comparisons: Sequence[Comparison], documents: DocumentsOf | None = None) -> str:
    """Return comparisons with one baseline as Markdown; the arguments are those of `as_text`."""
    names = _names(comparisons)
    parts = [
        [f"- A: {_code(comparisons[0].a.label)}"]
        + [f"- {name}: {_code(each.b.label)}" for name, each in zip(names, comparisons, strict=True)],
        text_table.as_markdown(rows, left=range(len(rows[0])))
        if (rows := _settings_rows(comparisons, names))
        else [_NO_SETTING],
        [f"- {escaped(line)}" for line in _settings_of_some(comparisons, names)],
        [f"- Warning: {escaped(text)}" for text in _warnings(comparisons, names)],
        text_table.as_markdown(table(comparisons), left=_left(comparisons)),
        [f"- {escaped(line)}" for line in (*sentences(comparisons), *speeds(comparisons))],
        [escaped(" ".join(notes(comparisons)))],
    ]
    for (i, j), changed in (documents or {}).items():
        head, *_ = _listed(comparisons[i], j, changed)
        rows = _document_rows(comparisons[i].differences[j], changed)
        parts += [[escaped(head)], text_table.as_markdown(rows, left=range(len(rows[0])))]
    return printable("\n\n".join("\n".join(lines) for lines in parts if lines))


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """Return CSV with a head and a line for each difference: labels of both runs, fields of `Difference` unrounded."""
    fields = [field.name for field in dataclasses.fields(Difference)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run_a", "run_b", *fields])
    for comparison in comparisons:
        for each in comparison.rows:
            values = dataclasses.asdict(each) | {"equal_filters": " ".join(each.equal_filters)}
            writer.writerow([comparison.a.label, comparison.b.label, *(values[name] for name in fields)])
    return out.getvalue().removesuffix("\n")


def as_json(comparisons: Sequence[Comparison], documents: DocumentsOf | None = None) -> str:
    """Return a JSON list with each comparison's runs, settings, warnings and differences, unrounded; NaN is null."""
    content = [_as_dict(comparison) for comparison in comparisons]
    for (i, j), changed in (documents or {}).items():
        content[i]["differences"][j]["changed"] = [dataclasses.asdict(one) for one in changed]
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "a": comparison.a.label,
        "b": comparison.b.label,
        "settings": {name: {"a": a, "b": b} for name, (a, b) in comparison.settings.items()},
        "warnings": comparison.warnings,
        "speeds": {
            task: {"a": dataclasses.asdict(a), "b": dataclasses.asdict(b)} for task, (a, b) in comparison.speeds.items()
        },
        "groups": [dataclasses.asdict(each) | {"verdict": verdict(each)} for each in comparison.groups],
        "differences": [dataclasses.asdict(each) | {"verdict": verdict(each)} for each in comparison.differences],
    }


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Return the table's cells as text: the head, then a row for each difference."""
    several, holm = len(comparisons) > 1, _tests(comparisons) > 1
    families = any(each.family for each in _rows(comparisons))
    head = ["run"] * several + ["task", "metric", "filter", "documents", "A", "B", "B - A", "95% interval", "p"]
    rows = [[*head, *(["p (Holm)"] * holm), *(["family"] * families), "only A", "only B", "detectable"]]
    for name, comparison in zip(_names(comparisons), comparisons, strict=True):
        for each in comparison.rows:
            filters = each.filter + (f" (+{len(each.equal_filters)})" if each.equal_filters else "")
            row = [name] * several + [each.task, each.metric, filters, f"{each.documents:,}"]
            share = _is_share(each)
            row += [score(each.a, each.a_stderr, share=share), score(each.b, each.b_stderr, share=share)]
            row += [_points(each, each.difference, "+"), _interval(each), p_as_text(each.p)]
            row += [p_as_text(each.p_holm)] * holm + [each.family] * families
            row += [_count(each.only_a), _count(each.only_b), _points(each, each.detectable)]
            rows.append(row)
    return rows


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the sentences of `conclusions`, which several comparisons precede by the run's name."""
    found = []
    for name, comparison in zip(_names(comparisons), comparisons, strict=True):
        run = f"{name}, " if len(comparisons) > 1 else ""
        found += [f"{run}{text}" for text in conclusions(comparison, name)]
    return found


def conclusions(comparison: Comparison, name: str) -> list[str]:
    """Return a sentence for each difference; of many differences, those that are not shown have one sentence together.

    A sentence begins with the task, and with metric and filter where these are needed.

    Args:
        comparison: the comparison.
        name: the compared run's name in the sentences.
    """
    rows = comparison.rows
    undecided = [each for each in rows if each.p_holm is not None and each.p_holm >= ALPHA]
    together = undecided if len(rows) > MOST_SENTENCES else []
    found = [f"{_title(each, rows)}: {verdict(each, name)}" for each in rows if each not in together]
    if together:
        found.append(f"{len(together)} of {len(rows)} scores: No difference shown after Holm's adjustment.")
    return found


def speeds(comparisons: Sequence[Comparison]) -> list[str]:
    """Return a sentence for each task of which both runs report forwards.

    Times depend on the machine, so only JSON has them.
    """
    found = []
    for name, comparison in zip(_names(comparisons), comparisons, strict=True):
        for task, (a, b) in comparison.speeds.items():
            if a.tokens_per_forward and b.tokens_per_forward:
                run = f"{name}, " if len(comparisons) > 1 else ""
                times = b.tokens_per_forward / a.tokens_per_forward
                found.append(
                    f"{run}{task}: tokens per forward {a.tokens_per_forward:.2f} (A) and {b.tokens_per_forward:.2f} "
                    f"({name}), {times:.2f} times."
                )
    return found if len(found) <= MOST_SENTENCES else []


def verdict(difference: Difference, name: str = "B") -> str:
    """Return a sentence that says whether a run is better than the baseline.

    Args:
        difference: the run's difference from the baseline.
        name: the run's name in the sentence.
    """
    each = difference
    if each.p is None or each.p_holm is None:
        return f"No test: {each.test}."
    number = documents_in_words(each.documents)
    if each.p >= ALPHA and each.documents < FEWEST_DISCORDANT:
        return f"No difference shown: {number} cannot show one."
    if each.p >= ALPHA and each.detectable is None:
        return f"No difference shown: both runs have the same score in each of {number}."
    if each.p >= ALPHA:
        shown = _points(each, each.detectable) + _unit(each)
        # "p below", not "shown": among several tests, Holm's adjustment shows such a difference less often.
        power = f"has p below {ALPHA} in {POWER:.0%} of cases"
        return f"No difference shown: with {number}, a true difference of {shown} {power}."
    if each.higher_is_better is None:
        found = "higher" if each.difference > 0 else "lower"
    else:
        found = "better" if (each.difference > 0) == each.higher_is_better else "worse"
    exploratory = f"; exploratory, within {each.family}" if each.family else ""
    if each.p_holm >= ALPHA:
        holm = f"{_p_is(each.p)}; {p_as_text(each.p_holm)} after Holm's adjustment for the number of tests"
        return f"{name} may be {found}: {_change(each)} ({holm}{exploratory})."
    holm = p_as_text(each.p_holm)
    after = "" if holm == p_as_text(each.p) else f"; {holm} after Holm's adjustment"
    return f"{name} is {found}: {_change(each)} ({_p_is(each.p)}{after}{exploratory})."


def _change(each: Difference) -> str:
    if each.only_a is None or each.only_b is None or each.higher_is_better is None:
        return f"by {_points(each, abs(each.difference))}{_unit(each)}"
    more, fewer = max(each.only_a, each.only_b), min(each.only_a, each.only_b)
    way = "wrong to right" if each.only_b > each.only_a else "right to wrong"
    return f"{more:,} documents changed from {way}, {f'{fewer:,}' if fewer else 'none'} the other way"


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    """The names that tables give to the runs that are compared with A. The columns of B are those of B1, B2, …"""
    return ["B"] if len(comparisons) == 1 else [f"B{number}" for number in range(1, len(comparisons) + 1)]


def warnings_of(comparison: Comparison, name: str) -> tuple[str, ...]:
    """Return the warnings of a comparison whose run B has another name beside other runs."""
    return tuple(re.sub(r"\b([Rr]un) B\b", rf"\1 {name}", text) for text in comparison.warnings)


def _tests(comparisons: Sequence[Comparison]) -> int:
    return sum(each.p is not None for each in _rows(comparisons))


def _rows(comparisons: Sequence[Comparison]) -> list[Difference]:
    return [each for comparison in comparisons for each in comparison.rows]


def _left(comparisons: Sequence[Comparison]) -> range:
    """The columns of `table` that hold names."""
    return range(4 if len(comparisons) > 1 else 3)


def notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Return sentences that explain the columns of `table`."""
    found = [*_LEGEND, *(_HOLM if _tests(comparisons) > 1 else ())]
    rows = _rows(comparisons)
    if any(each.family for each in rows):
        found.append(_FAMILIES)
    if any(each.p is None and 0 <= each.a <= 1 and 0 <= each.b <= 1 for each in rows):
        found.append(_UNTESTED)
    equal = dict.fromkeys(name for each in rows for name in each.equal_filters)
    if equal:
        found.append(f"(+N): N further filters give each document the same score in both runs: {', '.join(equal)}.")
    for each in rows:
        if each.p is not None and each.p >= ALPHA and _leaves_out_0(each):  # few documents that differ
            return [
                *found,
                f"The test is stricter than the interval: the interval may exclude 0 where p is above {ALPHA}.",
            ]
    return found


def _leaves_out_0(each: Difference) -> bool:
    """Whether the interval excludes 0."""
    return each.low is not None and each.high is not None and not each.low <= 0 <= each.high


def _settings_rows(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[list[str]]:
    """A head and a row for each setting that differs; a row for each run where there are no more settings than runs."""
    listed_apart = _named_by_some(comparisons)
    settings = list(dict.fromkeys(name for each in comparisons for name in each.settings if name not in listed_apart))
    if not settings:
        return []
    if len(comparisons) == 1:
        rows = [[name, *map(_short, comparisons[0].settings[name])] for name in settings]
        return [["setting", "A", "B"], *rows]
    of_runs = [each.settings for each in comparisons]
    of_a = [next(_short(each[name][0]) for each in of_runs if name in each) for name in settings]
    of_b = [
        [_short(each[name][1]) if name in each else value for name, value in zip(settings, of_a, strict=True)]
        for each in of_runs
    ]
    rows = [["run", *settings], ["A", *of_a], *([name, *values] for name, values in zip(names, of_b, strict=True))]
    narrow = len(settings) <= len(names)
    return rows if narrow else transposed([["setting", *settings], *rows[1:]])


def _named_by_some(comparisons: Sequence[Comparison]) -> dict[str, object]:
    """Setting -> its value, for settings that not all lm_eval models have, and that have one value where they exist.

    Such settings tell the models apart, not the runs.
    """
    values: dict[str, list[object]] = {}
    rows = set()
    for comparison in comparisons:
        for name, pair in comparison.settings.items():
            values.setdefault(name, []).extend(value for value in pair if value is not None)
            if "model" not in comparison.settings or None not in pair:
                rows.add(name)
    return {
        name: found[0]
        for name, found in values.items()
        if name not in rows and all(value == found[0] for value in found)
    }


def _settings_of_some(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    """A line for each set of runs whose files alone name some settings."""
    named: dict[tuple[str, ...], list[str]] = {}
    for name, value in _named_by_some(comparisons).items():
        pairs = [each.settings.get(name) for each in comparisons]
        by_a = any(pair is not None and pair[0] is not None for pair in pairs)
        by_others = (by_a if pair is None else pair[1] is not None for pair in pairs)
        holders = ("A",) * by_a + tuple(run for run, by in zip(names, by_others, strict=True) if by)
        named.setdefault(holders, []).append(f"{name}={_short(value)}")
    return [
        f"Only the files of {' and '.join(filter(None, (', '.join(runs[:-1]), runs[-1])))} name: {', '.join(found)}."
        for runs, found in sorted(named.items())
    ]


def _warnings(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    if len(comparisons) == 1:
        return list(comparisons[0].warnings)
    of_runs = zip(names, comparisons, strict=True)
    return [f"{name}: {text}" for name, comparison in of_runs for text in warnings_of(comparison, name)]


def _listed(
    comparison: Comparison, index: int, changed: Sequence[ChangedDocument], width: int | None = None
) -> list[str]:
    each = comparison.differences[index]
    head = f"{each.task}, {each.metric}, {each.filter}: {len(changed):,} of {each.documents:,} documents differ"
    if not changed:
        return [head + "."]
    lines = aligned(_document_rows(each, changed), left=range(7))
    excess = max(map(len, lines)) + 2 - width if width is not None else 0
    if excess > 0:
        lines = aligned(_document_rows(each, changed, max(_QUESTION - excess, 20)), left=range(7))
    return [head + ":", *("  " + line for line in lines)]


def _document_rows(each: Difference, changed: Sequence[ChangedDocument], question: int = _QUESTION) -> list[list[str]]:
    """A head and a row for each document, with the first `question` characters of its question."""
    right = each.only_a is not None
    rows = [["document", *(["right"] if right else ["A", "B"]), "question", "A's answer", "B's answer", "gold"]]
    for one in changed:
        better = "A" if (one.a > one.b) == (each.higher_is_better is not False) else "B"
        scores = [f"only {better}"] if right else [f"{one.a:.4g}", f"{one.b:.4g}"]
        number = str(one.document_a) if one.document_a == one.document_b else f"{one.document_a} / {one.document_b}"
        texts = [
            _short(one.question, question),
            *(_short(text, 24) for text in (one.filtered_a, one.filtered_b, one.target)),
        ]
        rows.append([number, *scores, *texts])
    return rows


def _title(each: Difference, among: Sequence[Difference]) -> str:
    """The difference's task; also its metric and filter where other differences of the task have others."""
    of_task = [other for other in among if other.task == each.task]
    parts = [each.task]
    if len({other.metric for other in of_task}) > 1:
        parts.append(each.metric)
    if sum(other.metric == each.metric for other in of_task) > 1:
        parts.append(each.filter)
    return ", ".join(parts)


def _is_share(each: Difference) -> bool:
    return each.p is not None and 0 <= each.a <= 1 and 0 <= each.b <= 1


def _unit(each: Difference) -> str:
    return " points" if _is_share(each) else ""


def _points(each: Difference, value: float | None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return ""
    return score(value, None, share=_is_share(each), sign=sign)


def _interval(each: Difference) -> str:
    if each.p is None:
        return "no test"
    return "" if each.low is None else f"{_points(each, each.low, '+')} to {_points(each, each.high, '+')}"


def p_as_text(p: float | None) -> str:
    """Return a p-value as tables show it; "" for None."""
    if p is None:
        return ""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _p_is(p: float) -> str:
    return f"p {p_as_text(p)}" if p < 0.0001 else f"p = {p_as_text(p)}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _short(value: object, most: int = 60) -> str:
    text = "" if value is None else " ".join(spelled(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _finite(value: object) -> object:
    """The value with null for numbers that JSON lacks, and text for objects of other types."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value if isinstance(value, (str, int, type(None))) else str(value)
