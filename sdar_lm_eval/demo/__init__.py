"""The bundled checkpoint (`pretrained=demo`), its problems, and how both are made (`make.py`)."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROBLEMS = Path(__file__).parent / "problems.jsonl"
