"""Loads, and edits, small checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from support import block_causal, read_weights, reference_logits, write_weights

from sdar_lm_eval.checkpoint import Checkpoint

IDS = torch.randint(0, 700, (18,), generator=torch.Generator().manual_seed(1))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def load(folder: Path, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa"}
    return Checkpoint.open(str(folder)).load_model(**(defaults | settings))


def edit_json(path: Path, leave_out: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in leave_out}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = read_weights(folder)
    change(weights)
    write_weights(folder, weights)


def assert_reference(folder: Path, config: dict[str, Any], attention: str = "sdpa") -> None:
    sees = block_causal(len(IDS), 4)
    mask = sees if attention == "sdpa" else torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    model = load(folder, attention=attention)
    got = model(input_ids=IDS[None], attention_mask=mask[None, None]).logits[0]
    expected = reference_logits(read_weights(folder), config, IDS, sees)
    assert expected.std() > 1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not got.requires_grad
    assert not model.training
