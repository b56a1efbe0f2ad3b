"""docs/api.ipynb runs, and shows what it says that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import QUICK_START, ROOT, environment

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "docs" / "api.ipynb"


def printed(notebook: Any) -> list[str]:
    """What each cell of code prints and returns, as text; without warnings."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            texts.append("".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs))
    return texts


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(QUICK_START).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    kept = printed(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = printed(notebook)
    assert found[1] == kept[1] and "#### 758" in found[1]  # the answer
    assert found[5] == kept[5] and "▢" in found[5]  # its first steps
    assert "RunFrames('thresholds/threshold=0.5'" in found[9]
    assert "confidence_threshold  0.5  0.85" in found[11]
    assert all(map(bool, kept)) == all(map(bool, found))
