"""The metrics of a document with several answers, which lm-eval calls repeats.

    metrics("math_verify", scores, forms)    mean of the scores, pass@k, majority@n and agreement
    matched(answers, gold)                   the same, where the right answers are those that equal a text
    single_or_all, all_answers               a task file's last filter, where lm-eval's own tasks have take_first

Each value is one document's. lm-eval averages the values over documents, so the standard error is over documents: the n
answers of a document form one cluster.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile

from sdar_lm_eval.tasks.extraction import INVALID

AGREEMENT = "agreement"
"""The metric that says how often a document's answers agree; neither a high nor a low value is better."""


def metrics(name: str, scores: Sequence[float], forms: Sequence[Hashable] | None = None) -> dict[str, float]:
    """Return a document's metrics: `name` alone for a single answer, and for n answers those below.

    - `name`: the mean of the scores.
    - `pass@k` for k = 2, 4, 8, … and n: whether at least one of k answers is right (`pass_at`).
    - `majority@n`: the score of the most frequent form (`majority`).
    - `agreement`: how often two answers have the same form (`agreement`).

    Args:
        name: the task's metric of one answer.
        scores: (n,) each answer's score, 1.0 (right) or 0.0.
        forms: (n,) what is equal for two answers that are the same answer; None: an answer in which nothing is found.
            Answers with equal forms have equal scores. Without forms there is no majority and no agreement.
    """
    n = len(scores)
    found = {name: sum(scores) / n}
    if n == 1:
        return found
    right = sum(score == 1 for score in scores)
    found |= {f"pass@{k}": pass_at(k, n, right) for k in ks(n)}
    if forms is not None:
        found |= {f"majority@{n}": majority(forms, scores), AGREEMENT: agreement(forms)}
    return found


def exact_match(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return a document's `matched`: a metric as lm-eval calls it, for a task file's `metric_list`.

    Args:
        references: the gold answer alone.
        predictions: what the filters made of the document's only request: an answer, or the list of its answers.
    """
    (gold,) = references
    return matched(answers_of(predictions), gold)


def matched(answers: Sequence[str], gold: str) -> dict[str, float]:
    """Return a document's `metrics`. The right answers are those that equal `gold`; `[invalid]` is no answer."""
    scores = [float(answer == gold) for answer in answers]
    return metrics("exact_match", scores, [None if answer == INVALID else answer for answer in answers])


def ks(n: int) -> list[int]:
    """Return the k of which n answers have a pass@k: the powers of two between 1 and n, and n."""
    return [*takewhile(lambda k: k < n, (2**power for power in range(1, n + 1))), n]


def pass_at(k: int, n: int, right: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k answers is right.

    The estimate is the share of the subsets of k of the n answers in which an answer is right. Source: M. Chen et al.,
    Evaluating large language models trained on code, arXiv 2107.03374, equation 1.

    Args:
        k: 1 to n.
        n: number of answers.
        right: number of right answers.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[Hashable], scores: Sequence[float]) -> float:
    """Return the score of the most frequent vote (X. Wang et al., self-consistency, arXiv 2203.11171).

    Where several votes are the most frequent, each is equally likely to win, so the value is the mean of their scores.
    An answer whose vote is None does not vote. The value is 0.0 where no answer votes.

    Args:
        votes: (n,) what each answer votes for.
        scores: (n,) each answer's score; answers with equal votes have equal scores.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    score_of = dict(zip(votes, scores, strict=True))
    won = [score_of[vote] for vote, count in counts.items() if count == most]
    return sum(won) / len(won) if won else 0.0


def agreement(votes: Sequence[Hashable]) -> float:
    """Return the share of the pairs of different answers whose votes are equal; None equals no vote.

    Source: the agreement on one subject of J. Fleiss, Measuring nominal scale agreement among many raters,
    Psychological Bulletin 76 (1971), equation 2.

    Args:
        votes: (n,) what each answer votes for, n at least 2.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    return sum(math.comb(count, 2) for count in counts.values()) / math.comb(len(votes), 2)


def single_or_all(responses: Iterable[Sequence[str]], docs: object) -> list[str | list[str]]:
    """Return `all_answers`, with an answer in place of a list of one answer."""
    return [answers[0] if len(answers) == 1 else answers for answers in all_answers(responses, docs)]


def all_answers(responses: Iterable[Sequence[str]], docs: object) -> list[list[str]]:
    """Return as many answers of each document, the first ones.

    On several ranks lm-eval repeats the last document's requests of a rank that has fewer documents. Such a document
    has more responses than the others.
    """
    of_docs = [list(of_doc) for of_doc in responses]
    number = min(map(len, of_docs), default=0)
    return [of_doc[:number] for of_doc in of_docs]


def answers_of(results: Sequence[str | Sequence[str]]) -> Sequence[str]:
    """Return the filtered answers of a document from what lm-eval hands to `process_results`.

    Args:
        results: what the filters made of the document's only request: an answer, or the list of its answers.
    """
    (answers,) = results
    return [answers] if isinstance(answers, str) else answers
