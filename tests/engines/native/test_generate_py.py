"""The engine compared with SDAR's own generate.py; needs a copy of it: SDAR_GENERATE_PY=…/SDAR/generate.py.

The functions of generate.py run unchanged, on transformers' Qwen3 with a shim for the `store_kv` argument. Three of its
strategies run; entropy_bounded stops with an error. Greedy draws replace sampling, since generate.py samples from
torch's global generator.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from test_engine import questions

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, make_engine

SOURCE = os.environ.get("SDAR_GENERATE_PY", "")
COUNT = int(os.environ.get("SDAR_GENERATE_PY_COUNT", 12))

pytestmark = pytest.mark.skipif(not Path(SOURCE).is_file(), reason="SDAR_GENERATE_PY names no file")


class StoreKV(torch.nn.Module):
    """Qwen3 with SDAR's argument `store_kv`: whether the forward's keys and values stay in the cache."""

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, ids, attention_mask, position_ids, past_key_values, use_cache, store_kv):
        out = self.model(
            ids,
            attention_mask=attention_mask[:, None].bool(),
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        if not store_kv:
            past_key_values.crop(-ids.shape[1])
        return out


@pytest.fixture(scope="module")
def sdar():
    spec = importlib.util.spec_from_file_location("sdar_generate", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def greedy(logits, **_):
        confidence, token = logits.float().softmax(-1).max(-1)
        return token, confidence

    module.sample_with_temperature_topk_topp = greedy
    return module


def _above_minus_infinity(values, indices):
    return values[values > -torch.inf], indices[values > -torch.inf]


@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
def test_the_same_tokens(sdar, strategy, steps, monkeypatch):
    checkpoint = Checkpoint.open("demo")
    model = StoreKV(checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa"))
    engine = make_engine("native", checkpoint, device="cpu")
    decoding = DecodingConfig(denoising_steps=steps, remasking_strategy=strategy, temperature=0)
    prompts = questions(checkpoint, COUNT)
    requests = [GenerationRequest(p, 80, decoding, frozenset(checkpoint.stop_ids)) for p in prompts]
    ours = dict(engine.generate(requests))
    if steps < 4:
        # Where a step's quota exceeds the number of masked positions, generate.py's topk also takes positions that are
        # not masked, and overwrites their tokens. Limiting topk to masked positions is the only change to its rules.
        topk = torch.topk
        monkeypatch.setattr(torch, "topk", lambda values, k: _above_minus_infinity(*topk(values, k)))
    differing = []
    for i, prompt in enumerate(prompts):
        out = sdar.block_diffusion_generate(
            model,
            {"input_ids": torch.tensor([prompt])},
            mask_id=checkpoint.mask_token_id,
            gen_length=80,
            block_length=4,
            denoising_steps=steps,
            remasking_strategy=strategy,
            confidence_threshold=0.85,
            stopping_criteria_idx=list(checkpoint.stop_ids),
        )[0, len(prompt) :].tolist()
        ends = [place for place, token in enumerate(out) if token in checkpoint.stop_ids]
        theirs = out[: min([*ends, 80])]
        if list(ours[i].token_ids) != theirs:
            differing.append(i)
    assert not differing, f"{len(differing)} of {len(prompts)} differ: {differing}"
