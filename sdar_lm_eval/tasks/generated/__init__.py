"""Documents that are generated from a seed: the kinds of task of `parallel_bench_sdar`.

    for document in documents("shuffle", "chat", 100): …        the same documents on every machine
    is_right(document, KINDS["shuffle"].form("chat").strict(response))

A *kind* draws cases, writes their questions, and says whether an answer is right. Where several answers are right, each
of them counts. The tasks follow the kinds of ParallelBench (Kang et al. 2025, arXiv 2510.04767,
github.com/furiosa-ai/ParallelBench), which measures what parallel decoding loses: an answer's tokens depend on each
other, so tokens that are drawn at once may not fit together. Wordings, words and code are this package's own.

The modules need the standard library only.
"""

from __future__ import annotations

from sdar_lm_eval.tasks.generated.documents import (
    KINDS,
    Document,
    documents,
    is_held_out,
    is_right,
    stream,
)
from sdar_lm_eval.tasks.generated.kind import Answer, Case, Form, Kind, Size

__all__ = [
    "KINDS",
    "Answer",
    "Case",
    "Document",
    "Form",
    "Kind",
    "Size",
    "documents",
    "is_held_out",
    "is_right",
    "stream",
]
