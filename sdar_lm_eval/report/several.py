"""The metrics of a document's several answers, told by their names; tasks/repeated.py computes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OF_SEVERAL = re.compile(r"(?P<kind>pass|majority)@(?P<k>\d+)|agreement")


def is_of_several(metric: str) -> bool:
    """Return whether a metric is one of a document's several answers: pass@2, majority@3, agreement, not pass@1."""
    found = _OF_SEVERAL.fullmatch(metric)
    return found is not None and found["k"] != "1"


def is_better_when_higher(metric: str, said: object) -> bool | None:
    """Return whether higher values of a metric are better; None where neither its name nor the results file says.

    Args:
        metric: the metric's name.
        said: the results file's value. For `agreement`, lm_eval writes what the task says of its own metric.
    """
    found = _OF_SEVERAL.fullmatch(metric)
    if found is not None:
        return True if found["kind"] else None
    return said if isinstance(said, bool) else None


def smaller_passes(metrics: Iterable[str]) -> set[str]:
    """Return the pass@k of several answers but the one with the largest k."""
    found = {name: int(match["k"]) for name in metrics if (match := re.fullmatch(r"pass@(?P<k>\d+)", name))}
    largest = max(found.values(), default=0)
    return {name for name, k in found.items() if 1 < k < largest}
