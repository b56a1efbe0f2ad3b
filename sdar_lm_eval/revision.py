"""The revision of decoding."""

ANSWER_REVISION = 1
"""Stored answers of another revision are not read back (`lm/store.py`, Modal's folders).

Raise it when the same request gets another answer than before; `tests/golden` fails until then. What only counts,
reports or rearranges code leaves it alone, so finished answers stay good.
"""
