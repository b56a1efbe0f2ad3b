"""Log-likelihoods on a GPU, against the CPU's. `python -m pytest tests/gpu` on a machine with CUDA."""

from __future__ import annotations

import json

import pytest
import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import PROBLEMS, PROMPT
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.fixture(scope="module")
def texts(demo):
    """(prompt, answer) tokens of 40 problems."""
    problems = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:40]]
    encode = demo.tokenizer.encode
    return [
        (
            tuple(encode(f"<|im_start|>user\n{PROMPT.format(**p)}<|im_end|>\n<|im_start|>assistant\n")),
            tuple(encode(f"{p['answer']}<|im_end|>")),
        )
        for p in problems
    ]


def score(engine, texts, config):
    requests = [ScoreRequest(prompt, answer[:m]) for prompt, answer in texts for m in (1, 2, len(answer))]
    # Whole texts behind one token, longer than a row of a forward.
    joined = [token for prompt, answer in texts for token in prompt + answer]
    requests += [ScoreRequest(tuple(joined[:1]), tuple(joined[1:2000])), ScoreRequest(texts[0][0][:1], texts[0][0][1:])]
    results = dict(engine.score(requests, config))
    return [results[i] for i in range(len(requests))]


@pytest.mark.parametrize(
    "config",
    [LikelihoodConfig("chain"), LikelihoodConfig("nelbo"), LikelihoodConfig("nelbo", mc_samples=16, block_length=8)],
    ids=["chain", "nelbo", "sampled"],
)
@pytest.mark.parametrize("kernels", [False, True], ids=["modules", "kernels"])
def test_float32_scores_are_the_cpus(demo, texts, config, kernels):
    on_gpu = score(make_engine("native", demo, device="cuda", dtype="float32", kernels=kernels), texts, config)
    on_cpu = score(make_engine("native", demo, device="cpu"), texts, config)
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert gpu.log_likelihood == pytest.approx(cpu.log_likelihood, rel=1e-4, abs=1e-4)
        assert gpu.standard_error == pytest.approx(cpu.standard_error, rel=1e-3, abs=1e-4)
        assert (gpu.clean_tokens, gpu.noised_tokens) == (cpu.clean_tokens, cpu.noised_tokens)


def test_bfloat16_scores_are_near(demo, texts):
    low = score(make_engine("native", demo, device="cuda", dtype="bfloat16"), texts, LikelihoodConfig())
    high = score(make_engine("native", demo, device="cpu"), texts, LikelihoodConfig())
    for a, b in zip(low, high, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=0.05, abs=0.3)


def test_generation_and_scoring_take_turns(demo, texts):
    engine = make_engine("native", demo, device="cuda", dtype="float32")
    wanted = [GenerationRequest(prompt, 32, DecodingConfig(temperature=0)) for prompt, _ in texts]

    def both():
        answers = {i: result.token_ids for i, result in engine.generate(wanted)}
        return answers, [r.log_likelihood for r in score(engine, texts, LikelihoodConfig())]

    first, second = both(), both()
    assert first[0] == second[0]
    assert first[1] == pytest.approx(second[1], abs=1e-4)
