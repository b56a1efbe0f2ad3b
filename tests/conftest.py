from __future__ import annotations

import logging
import os

import pytest

# Tensors here are small: a second thread waits more than it computes, above all where the machine is shared. Read by
# torch when it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _caplog_hears_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval, once it has run in this process, keeps its log (and ours, which joins it) from the root logger."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
