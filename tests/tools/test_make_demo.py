from __future__ import annotations

import copy
import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import demo_decoding as decoding
import demo_training as training
import make_demo as make
import pytest
import torch
from demo_problems import problems
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from support import small_config

import sdar_lm_eval.tasks
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.demo import CHECKPOINT, PROBLEMS, prompts
from sdar_lm_eval.engines.registry import make_engine
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.tasks.generated import KINDS, documents

pytestmark = pytest.mark.slow

MASK = 710


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The bundled tokenizer, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def problem_texts(tokenizer: Any) -> training.Texts:
    return training.tokenized(tokenizer, make.problem_chats(0), 1, make.PROBLEM_TOKENS)


@pytest.fixture(scope="module")
def task_texts(tokenizer: Any) -> training.Texts:
    return training.tokenized(tokenizer, make.task_chats(0), 1, make.TASK_TOKENS)


def test_numbers_are_single_digits(tokenizer: Any) -> None:
    assert tokenizer.encode("12 + 340").tokens == ["1", "2", "Ġ+", "Ġ", "3", "4", "0"]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_every_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_prompt_is_that_of_the_task() -> None:
    folder = Path(sdar_lm_eval.tasks.__file__).parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load_task_or_group("gsm8k_sdar_demo")["gsm8k_sdar_demo"]
    for line in PROBLEMS.read_text().splitlines()[:20]:
        document = json.loads(line)
        assert task.doc_to_text(document) == make.PROMPT.format(question=document["question"])


def test_training_texts_are_conversations_in_the_chat_template() -> None:
    template = Checkpoint.open("demo").tokenizer
    for problem in itertools.islice(problems(0, held_out=False), 20):
        user = {"role": "user", "content": make.PROMPT.format(question=problem.question)}
        prompt, answer = make.chat(user["content"], problem.answer)
        assert prompt == template.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = template.apply_chat_template([user, {"role": "assistant", "content": problem.answer}], tokenize=False)
        assert whole == prompt + answer + "\n"


def test_training_texts(tokenizer: Any, problem_texts: training.Texts, task_texts: training.Texts) -> None:
    end = tokenizer.token_to_id("<|endoftext|>")
    for texts, chats, longest in (
        (problem_texts, make.problem_chats(0), make.PROBLEM_TOKENS),
        (task_texts, make.task_chats(0), make.TASK_TOKENS),
    ):
        assert texts.ids.shape == texts.is_answer.shape == (len(texts.ids), longest)
        assert len(texts.ids) > 9900  # of 10,000: hardly any is too long
        prompt, answer = (tokenizer.encode(text).ids for text in next(chats))
        n, total = len(prompt), len(prompt + answer)
        assert texts.ids[0].tolist() == prompt + answer + [end] * (longest - total)
        assert texts.is_answer[0].nonzero().flatten().tolist() == list(range(n, -(-total // 4) * 4))


def test_no_test_document_is_in_the_training(tokenizer: Any, task_texts: training.Texts) -> None:
    """Nor is a line, a set of symbols or a grid of theirs."""
    learnt = {tokenizer.decode(ids.tolist()) for ids in task_texts.ids}
    of_kind = Counter(document.partition("user\n")[2].partition(":")[0].split()[0] for document in learnt)
    assert len(of_kind) == 10 and min(of_kind.values()) > 300  # first words of the questions; three have two kinds
    for kind in KINDS:
        for document in documents(kind, "demo", 100):
            prompt, answer = make.chat(document["question"], "")
            assert not any(prompt in text for text in learnt)
            assert len(tokenizer.encode(prompt + document["answer"] + answer).ids) <= make.TASK_TOKENS


def test_the_mask_of_block_diffusion() -> None:
    """Two blocks of two: rows and columns are noised 0 1 | 2 3, then clean 0 1 | 2 3."""
    expected = [
        "11.. ....",
        "11.. ....",
        "..11 11..",
        "..11 11..",
        ".... 11..",
        ".... 11..",
        ".... 1111",
        ".... 1111",
    ]
    drawn = ["".join(".1"[int(sees)] for sees in row) for row in training.block_diffusion_mask(4, 2)]
    assert [f"{row[:4]} {row[4:]}" for row in drawn] == expected


@settings(max_examples=50, deadline=None)
@given(
    answers=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_noise(answers: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    places = torch.arange(12)
    is_answer = torch.stack([(places >= start) & (places < start + length) for start, length in answers])
    ids = torch.randint(0, 700, is_answer.shape)
    noised, masked, weights = training.add_noise(ids, is_answer, MASK)
    assert not (masked & ~is_answer).any()
    assert torch.equal(noised, torch.where(masked, MASK, ids))
    assert (weights[~masked] == 0).all()
    for answer, mask, weight in zip(*(t.reshape(-1, 4) for t in (is_answer, masked, weights)), strict=True):
        m, k = int(answer.sum()), int(mask.sum())
        assert (1 <= k <= m) if m else k == 0
        torch.testing.assert_close(weight.sum(), torch.tensor(float(m)))  # k tokens of weight m / k
        assert len(set(weight[mask].tolist())) <= 1


def test_noise_is_the_bound_of_block_diffusion() -> None:
    """In expectation a pattern of k masked tokens out of m weighs (k-1)! (m-k)! / m!, as with t ~ U(0, 1) and 1 / t."""
    torch.manual_seed(0)
    is_answer = torch.tensor([[False, True, True, True]]).expand(60_000, -1)
    _, masked, weights = training.add_noise(torch.zeros(is_answer.shape, dtype=torch.long), is_answer, MASK)
    pattern = (masked.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    mean = torch.zeros(16).scatter_add_(0, pattern, weights.max(dim=1).values) / len(pattern)
    expected = torch.zeros(16)
    expected[[1, 2, 4]] = 1 / 3  # 0! 2! / 3!
    expected[[3, 5, 6]] = 1 / 6  # 1! 1! / 3!
    expected[7] = 1 / 3  # 2! 0! / 3!
    torch.testing.assert_close(mean, expected, atol=0.01, rtol=0)


def tiny(tokenizer: Any, texts: training.Texts, seed: int = 0, steps: int = 25) -> Any:
    config = small_config(tie_word_embeddings=True, rope_theta=10000) | {"hidden_size": 128}
    model = make.new_model(config, seed=seed, device="cpu")
    training.learn(model, tokenizer, texts, steps=steps, batch=8, lr=5e-3)
    return config, model


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that trainings log, the sums of their parts: of the first step and of the last."""
    said: list[float] = []

    def info(text: str, *values: Any) -> None:
        if found := re.search(r"loss per answer token ([\d. +]+)  ", text % values):
            said.append(sum(map(float, found[1].split(" + "))))

    monkeypatch.setattr(training.logger, "info", info)
    return said


def test_training_lowers_the_loss_and_its_checkpoint_opens(
    tokenizer: Any, problem_texts: training.Texts, tmp_path: Path, losses: list[float]
) -> None:
    config, model = tiny(tokenizer, problem_texts)
    first, last = losses
    assert 5 < first < 9  # about log(711)
    assert last < first - 2
    make.write_checkpoint(tmp_path, model, config, tokenizer)
    checkpoint = Checkpoint.open(str(tmp_path))
    loaded = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16().float()), name
    prompt = tuple(checkpoint.tokenizer.encode("What is 2 + 3?"))
    request = GenerationRequest(prompt, 8, DecodingConfig(temperature=0))
    [(_, result)] = make_engine("native", checkpoint, device="cpu").generate([request])
    assert len(result.token_ids) == 8


def test_training_on_a_cpu_repeats(tokenizer: Any, problem_texts: training.Texts) -> None:
    (_, one), (_, other), (_, differing) = (tiny(tokenizer, problem_texts, seed, steps=2) for seed in (0, 0, 1))
    assert torch.equal(one.model.norm.weight, other.model.norm.weight)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, differing.lm_head.weight)


def divergence(model: Any, other: Any, texts: training.Texts, mask_id: int) -> float:
    """From `other` to the model on noised texts, in nats a masked token."""
    torch.manual_seed(5)
    clean = texts.ids[:32].long()
    noised, masked, _ = training.add_noise(clean, texts.is_answer[:32], mask_id)
    with torch.no_grad():
        now, before = (training.masked_logits(m, noised, clean, masked).log_softmax(-1) for m in (model, other))
    return float((before.exp() * (before - now)).sum(-1).mean())


def test_the_second_training_learns_and_forgets_less(
    tokenizer: Any, problem_texts: training.Texts, task_texts: training.Texts, losses: list[float]
) -> None:
    _, before = tiny(tokenizer, problem_texts, steps=40)
    beside, alone = copy.deepcopy(before), copy.deepcopy(before)
    settings = {"steps": 25, "batch": 8, "lr": 2e-3}
    losses.clear()
    training.learn_beside(beside, tokenizer, task_texts, problem_texts, **settings)  # type: ignore[arg-type]
    first, last = losses
    assert last < first - 1
    training.learn(alone, tokenizer, task_texts, **settings)  # type: ignore[arg-type]
    kept, forgotten = (divergence(model, before, problem_texts, MASK) for model in (beside, alone))
    assert kept < 0.5 * forgotten


def test_nothing_is_forgotten_where_nothing_is_learnt(
    tokenizer: Any, problem_texts: training.Texts, monkeypatch: pytest.MonkeyPatch, losses: list[float]
) -> None:
    _, model = tiny(tokenizer, problem_texts, steps=5)
    monkeypatch.setattr(training, "_likelihood_bound", lambda *_: torch.zeros(()))
    losses.clear()
    training.learn_beside(model, tokenizer, problem_texts, problem_texts, steps=1, batch=8, lr=0.0)
    assert losses == [0.0]


STRATEGIES = {
    "4 steps": {"remasking_strategy": "low_confidence_static"},
    "1 step": {"remasking_strategy": "low_confidence_static", "denoising_steps": 1},
    "dynamic 0.85": {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.85},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_quick_decoding_is_that_of_the_engine(name: str, tokenizer: Any) -> None:
    """Beside the native engine, on the bundled checkpoint in float32."""
    checkpoint = Checkpoint.open("demo")
    model = make.new_model(make.make_config(tokenizer), seed=1, device="cpu")
    make.load_weights(model, CHECKPOINT)
    asked = prompts(checkpoint)[:8]
    (rule,) = (rule for rule in decoding.RULES if rule.name == name)
    length = -(-max(map(len, asked)) // 4) * 4 + 24
    decoded = decoding.decode(model, asked, length, MASK, 709, rule).tolist()
    stop_ids = frozenset(checkpoint.stop_ids)
    requests = [
        GenerationRequest(prompt, 24, DecodingConfig(temperature=0, **STRATEGIES[name]), stop_ids)  # type: ignore[arg-type]
        for prompt in asked
    ]
    for index, result in make_engine("native", checkpoint, device="cpu", dtype="float32").generate(requests):
        answer = decoded[index][len(asked[index]) :]
        assert tuple(answer[: len(result.token_ids)]) == result.token_ids


def test_the_accuracy_of_the_bundled_checkpoint(tokenizer: Any) -> None:
    model = make.new_model(make.make_config(tokenizer), seed=1, device="cpu")
    make.load_weights(model, CHECKPOINT)
    sets = make.test_questions(0, 5)
    assert list(sets) == ["word problems", *KINDS]
    questions, new_tokens = sets["word problems"]
    assert len(questions) == 5 and not questions[0].is_right("#### 1260") and questions[0].is_right("#### 126")
    assert decoding.accuracy(model, tokenizer, questions, new_tokens, decoding.RULES[0]) >= 0.7
    for kind in KINDS:
        (question, *_), _ = sets[kind]
        document = documents(kind, "demo", 1)[0]
        assert question.is_right(document["answer"]) and not question.is_right("Nobody")
        assert question.prompt == make.chat(document["question"], "")[0]


def test_the_command_writes_what_the_package_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step of each training. Versions of tokenizers may spell the rest of tokenizer.json otherwise."""
    words = f"make --out {tmp_path} --steps 1 --task_steps 1 --batch 2 --limit 1 --device cpu"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(decoding, "RULES", decoding.RULES[:1])
    make.main()
    assert (tmp_path / "problems.jsonl").read_bytes() == PROBLEMS.read_bytes()
    checkpoint = tmp_path / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(path.name for path in CHECKPOINT.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (checkpoint / name).read_text() == (CHECKPOINT / name).read_text()
    assert (checkpoint / "model.safetensors").stat().st_size == (CHECKPOINT / "model.safetensors").stat().st_size
    assert Checkpoint.open(str(checkpoint)).fingerprint != Checkpoint.open("demo").fingerprint
    trained, bundled = (json.loads((folder / "tokenizer.json").read_text()) for folder in (checkpoint, CHECKPOINT))
    assert trained["model"]["vocab"] == bundled["model"]["vocab"]
    assert trained["model"]["merges"] == bundled["model"]["merges"]
    assert trained["added_tokens"] == bundled["added_tokens"]
