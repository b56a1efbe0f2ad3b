"""Tasks of the multiple-choice and the perplexity kind through lm_eval, on folders of data made here, with the demo.

The YAMLs in `likelihood_tasks/` have the shape of hellaswag, arc, mmlu and wikitext.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from demo_training import BLOCK_SIZE, add_noise, block_diffusion_mask
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sdar_lm_eval import Checkpoint
from sdar_lm_eval.demo import PROBLEMS, PROMPT
from sdar_lm_eval.lm.model import SDARLM

TASKS = Path(__file__).parent / "likelihood_tasks"
CHANCE = 0.25
DOCUMENTS = 12  # of a task


@pytest.fixture(scope="module")
def lm() -> SDARLM:
    return SDARLM("demo")


def problems() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROBLEMS.read_text().splitlines()]


def chat(question: str) -> str:
    return f"<|im_start|>user\n{PROMPT.format(question=question)}<|im_end|>\n<|im_start|>assistant\n"


def choices_of(number: int, rng: random.Random) -> tuple[list[int], int]:
    """Return four numbers near each other in a random order, and where the right one stands."""
    near = [number + d for d in (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20) if number + d >= 0]
    choices = [number, *rng.sample(near, 3)]
    rng.shuffle(choices)
    return choices, choices.index(number)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the folders that the YAMLs name, and make theirs the current one."""
    rng, rows = random.Random(0), {}
    for problem in problems()[:60]:
        question, answer = problem["question"], problem["answer"]
        working, _, final = answer.rpartition(" ")
        choices, right = choices_of(int(final), rng)
        texts = [re.sub(rf"\b{final}\b", str(choice), answer) for choice in choices]
        arc = {"text": texts, "label": ["A", "B", "C", "D"]}
        rows.setdefault("arc/test", []).append({"question": question, "choices": arc, "answerKey": "ABCD"[right]})
        steps = "two_steps" if answer.count("\n") < 4 else "three_steps"
        rows.setdefault(f"mmlu_{steps}/test", []).append(
            {"question": chat(question) + working, "choices": [str(c) for c in choices], "answer": right}
        )
        first, after, rest = answer.partition("\n")[0].partition("= ")
        result = re.match(r"\d+", rest)
        assert result is not None
        choices, right = choices_of(int(result[0]), rng)
        endings = [f"{choice}{rest[result.end() :]}" for choice in choices]
        query = chat(question) + first + after.strip()
        rows.setdefault("hellaswag/validation", []).append({"query": query, "endings": endings, "label": str(right)})
        page = f"{chat(question)}{answer}<|im_end|>"
        words = answer.split(" ")
        rng.shuffle(words)
        shuffled = f"{chat(question)}{' '.join(words)}<|im_end|>"
        rows.setdefault("wikitext/test", []).append({"page": page, "shuffled": shuffled})
    for steps in ("two_steps", "three_steps"):
        rows[f"mmlu_{steps}/validation"] = rows[f"mmlu_{steps}/test"][:2]
    for name, documents in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    return tmp_path


def evaluate(lm: SDARLM, *tasks: str, **settings: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = lm_eval.simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, limit=settings.pop("limit"), **settings
    )
    assert results is not None
    return dict(results)


def test_the_command_line_scores_multiple_choice_and_perplexity(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kw: stock(**(kw | {"include_defaults": False})))
    command = f"lm_eval run --model sdar --model_args pretrained=demo,trace=trace.jsonl --include_path {TASKS}"
    command += f" --limit {DOCUMENTS} --tasks hellaswag_demo,mmlu_demo,wikitext_demo,wikitext_demo_shuffled"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output_path", "results", "--log_samples"])
    cli_evaluate()
    (path,) = data.glob("results/*/results_*.json")
    written = json.loads(path.read_text())
    results, info = written["results"], written["config"]["sdar_lm_eval"]
    assert results["hellaswag_demo"]["acc,none"] > 0.9 > 3 * CHANCE
    assert results["hellaswag_demo"]["acc_norm,none"] > 0.9
    assert results["mmlu_demo"]["acc,none"] > 0.9
    assert results["mmlu_demo_two_steps"]["acc,none"] > 0.9
    assert results["mmlu_demo_three_steps"]["acc,none"] > 0.9
    own, shuffled = (results[task]["word_perplexity,none"] for task in ("wikitext_demo", "wikitext_demo_shuffled"))
    assert 10 * own < shuffled
    choices = 4 * DOCUMENTS + 4 * sum(len(list(path.open())) for path in data.glob("results/*/samples_mmlu*.jsonl"))
    assert info["likelihood"] == "chain"
    assert info["run"]["likelihoods"]["requests"] == choices + 2 * DOCUMENTS
    _, *trace = map(json.loads, Path("trace.jsonl").read_text().splitlines())
    assert len(trace) == choices + 2 * DOCUMENTS
    assert len({(line["task"], line["document"]) for line in trace}) >= 4 * DOCUMENTS
    assert all(line["log_likelihood"] < 0 and line["standard_error"] == 0 for line in trace)


def test_the_chat_template_is_the_harness_s_business(lm: SDARLM, data: Path) -> None:
    templated = evaluate(lm, "arc_demo", apply_chat_template=True, limit=5)
    assert templated["results"]["arc_demo"]["acc,none"] > 0.9 > 3 * CHANCE
    sample = templated["samples"]["arc_demo"][0]
    assert sample["arguments"][0][0].startswith("<|im_start|>user\n")
    plain = evaluate(lm, "arc_demo", limit=5)
    for request, other in zip(plain["samples"]["arc_demo"], templated["samples"]["arc_demo"], strict=True):
        context, continuation = request["arguments"][0]
        assert "<|im_start|>" not in context
        instance = Instance("loglikelihood", {}, (f"<|im_start|>user\n{context}<|im_end|>\n<|im_start|>assistant\n",
                            continuation.removeprefix(" ")), 0, ("arc_demo", 0, 1))  # fmt: skip
        ((log_likelihood, _),) = lm.loglikelihood([instance], disable_tqdm=True)
        assert other["resps"][0][0][0] == pytest.approx(log_likelihood, abs=1e-4)


def test_nelbo_prefers_the_same_answers(lm: SDARLM, data: Path) -> None:
    bound = SDARLM("demo", likelihood="nelbo")
    found = evaluate(bound, "hellaswag_demo", limit=8)
    assert found["results"]["hellaswag_demo"]["acc,none"] > 0.9
    assert found["config"]["sdar_lm_eval"]["mc_samples"] == 256
    chain = evaluate(lm, "hellaswag_demo", limit=8)
    log_likelihoods = [
        [sample["resps"][0][0][0] for sample in results["samples"]["hellaswag_demo"]] for results in (found, chain)
    ]
    assert log_likelihoods[0] != pytest.approx(log_likelihoods[1], abs=0.01)
    assert log_likelihoods[0] == pytest.approx(log_likelihoods[1], abs=5)


def test_few_shot_examples_of_a_group(lm: SDARLM, data: Path) -> None:
    results = evaluate(lm, "mmlu_demo", num_fewshot=2, limit=2)
    contexts = [s["arguments"][0][0] for s in results["samples"]["mmlu_demo_two_steps"]]
    assert all(context.count("<|im_start|>user") == 3 for context in contexts)
    assert set(results["groups"]["mmlu_demo"]) >= {"acc,none"}


@pytest.mark.slow
def test_nelbo_per_token_is_the_training_loss() -> None:
    """On problems that training did not see, with the loss of `tools/demo_training.py`: noised halves, weights.

    After its end of turn a text went on with the end of text, which was learnt up to the end of the block.
    """
    checkpoint = Checkpoint.open("demo")
    tokenizer, end = checkpoint.tokenizer, checkpoint.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    requests, texts, spans = [], [], []
    for problem in problems()[:16]:
        # Tokens and not text, of which the harness would count the prompt's last line break with the answer.
        prompt = tokenizer.encode(chat(problem["question"]), add_special_tokens=False)
        answer = tokenizer.encode(problem["answer"] + "<|im_end|>", add_special_tokens=False)
        answer += [end] * (-(len(prompt) + len(answer)) % BLOCK_SIZE)
        requests.append((("", ""), prompt, answer))
        texts.append(prompt + answer)
        spans.append((len(prompt), len(texts[-1])))
    scores = SDARLM("demo", likelihood="nelbo")._loglikelihood_tokens(requests)
    tokens = sum(last - first for first, last in spans)
    ours = -sum(log_likelihood for log_likelihood, _ in scores) / tokens

    n = max(last for _, last in spans)
    ids = torch.full((len(texts), n), end)
    is_answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (text, (first, last)) in enumerate(zip(texts, spans, strict=True)):
        ids[row, :last], is_answer[row, first:last] = torch.tensor(text), True
    model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    attention = block_diffusion_mask(n, BLOCK_SIZE)[None, None]
    positions = torch.arange(n).repeat(2)[None]
    torch.manual_seed(0)
    losses = []
    for _ in range(12):
        noised, masked, weights = add_noise(ids, is_answer, checkpoint.mask_token_id)
        with torch.no_grad():
            hidden = model.model(
                torch.cat([noised, ids], dim=1), attention_mask=attention, position_ids=positions
            ).last_hidden_state[:, :n]
            logits = model.lm_head(hidden[masked])
        loss = torch.nn.functional.cross_entropy(logits, ids[masked], reduction="none")
        losses.append(float((loss * weights[masked]).sum() / is_answer.sum()))
    mean = sum(losses) / len(losses)
    error = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
    assert error < 0.05 * mean
    assert abs(ours - mean) < 3 * error
