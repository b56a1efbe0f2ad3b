"""What decoding answers, to be compared with what it answered before.

    python tests/golden/answers.py          stores today's answers in answers.json, under today's ANSWER_REVISION

`answers()` runs the demo checkpoint in float32 on the CPU: every strategy, greedy and sampled, filters, a penalty, both
methods of log-likelihood. The requests are made of token ids, so neither prompts nor tasks matter here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import prompts
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest

STORED = Path(__file__).with_name("answers.json")

SETTINGS: dict[str, dict[str, Any]] = {
    "static": {"remasking_strategy": "low_confidence_static", "temperature": 0},
    "static, 2 steps": {"remasking_strategy": "low_confidence_static", "temperature": 0, "denoising_steps": 2},
    "sequential": {"remasking_strategy": "sequential", "temperature": 0},
    "dynamic": {"remasking_strategy": "low_confidence_dynamic", "temperature": 0, "confidence_threshold": 0.3},
    "entropy_bounded": {"remasking_strategy": "entropy_bounded", "temperature": 0, "eb_threshold": 1.0},
    "random": {"remasking_strategy": "random", "temperature": 0},
    "blocks of 8": {"remasking_strategy": "low_confidence_dynamic", "temperature": 0, "block_length": 8},
    "sampled": {"remasking_strategy": "low_confidence_dynamic", "temperature": 1.0},
    "sampled, filtered": {"remasking_strategy": "low_confidence_static", "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalty": {"remasking_strategy": "low_confidence_dynamic", "temperature": 0, "repetition_penalty": 1.3},
}


def answers() -> dict[str, Any]:
    """Setting -> the answers' token ids, and method -> log-likelihoods rounded to 1e-4 nats."""
    demo = Checkpoint.open("demo")
    asked = prompts(demo)[:4]
    engine = make_engine("native", demo, device="cpu", dtype="float32")
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        requests = [
            GenerationRequest(prompt, 24, DecodingConfig(**settings), frozenset(demo.stop_ids), seed=seed)
            for seed, prompt in enumerate(asked)
        ]
        results = sorted(engine.generate(requests), key=lambda pair: pair[0])
        found[name] = [list(result.token_ids) for _, result in results]
    pairs = [ScoreRequest(prompt, tuple(demo.tokenizer.encode(" It is 42."))) for prompt in asked]
    for method in ("chain", "nelbo"):
        results = sorted(engine.score(pairs, LikelihoodConfig(method=method)), key=lambda pair: pair[0])
        found[method] = [round(result.log_likelihood, 4) for _, result in results]
    return found


if __name__ == "__main__":
    from sdar_lm_eval.revision import ANSWER_REVISION

    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in answers().items()]
    STORED.write_text(f'{{"revision": {ANSWER_REVISION}, "answers": {{\n' + ",\n".join(lines) + "\n}}\n")
