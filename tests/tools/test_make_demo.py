from __future__ import annotations

import itertools
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

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
from sdar_lm_eval.demo import CHECKPOINT, PROBLEMS
from sdar_lm_eval.engines.registry import make_engine
from sdar_lm_eval.engines.types import GenerationRequest

pytestmark = pytest.mark.slow

MASK = 710


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The bundled tokenizer, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> Any:
    return make.training_texts(tokenizer, seed=0, count=1)


@pytest.fixture
def texts_once(monkeypatch: pytest.MonkeyPatch, texts: Any) -> None:
    """Let trainings share their texts (10,000 at least), which take longer to make than the trainings here."""
    monkeypatch.setattr(make, "training_texts", lambda *_: texts)


@pytest.fixture(scope="module")
def made(texts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes after a step of training, with those texts."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "training_texts", lambda *_: texts)
        patch.setattr("sys.argv", ["make", "--out", str(folder), "--steps", "1", "--batch", "2", "--device", "cpu"])
        make.main()
    return folder


def test_the_bundled_tokenizer_is_that_of_seed_0(made: Path) -> None:
    """Its vocabulary and merges; how the file spells the rest may change between versions of tokenizers."""
    trained = json.loads((made / "checkpoint" / "tokenizer.json").read_text())
    bundled = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    assert trained["model"]["vocab"] == bundled["model"]["vocab"]
    assert trained["model"]["merges"] == bundled["model"]["merges"]
    assert trained["added_tokens"] == bundled["added_tokens"]


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
        prompt, answer = make.chat(problem)
        assert prompt == template.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = template.apply_chat_template([user, {"role": "assistant", "content": problem.answer}], tokenize=False)
        assert whole == prompt + answer + "\n"


def test_training_texts(tokenizer: Any, texts: Any) -> None:
    ids, is_answer = texts
    assert ids.shape == is_answer.shape
    assert ids.shape[1] == make.MAX_TOKENS
    assert len(ids) > 9900  # of 10,000: hardly any is too long
    end = tokenizer.token_to_id("<|endoftext|>")
    problem = next(problems(0, held_out=False))
    prompt, answer = (tokenizer.encode(text).ids for text in make.chat(problem))
    n, total = len(prompt), len(prompt + answer)
    assert ids[0].tolist() == prompt + answer + [end] * (make.MAX_TOKENS - total)
    assert is_answer[0].nonzero()[0].tolist() == list(range(n, -(-total // 4) * 4))


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
    drawn = ["".join(".1"[int(sees)] for sees in row) for row in make.block_diffusion_mask(4, 2)]
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
    noised, masked, weights = make.add_noise(ids, is_answer, MASK)
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
    _, masked, weights = make.add_noise(torch.zeros(is_answer.shape, dtype=torch.long), is_answer, MASK)
    pattern = (masked.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    mean = torch.zeros(16).scatter_add_(0, pattern, weights.max(dim=1).values) / len(pattern)
    expected = torch.zeros(16)
    expected[[1, 2, 4]] = 1 / 3  # 0! 2! / 3!
    expected[[3, 5, 6]] = 1 / 6  # 1! 1! / 3!
    expected[7] = 1 / 3  # 2! 0! / 3!
    torch.testing.assert_close(mean, expected, atol=0.01, rtol=0)


def tiny(tokenizer: Any, **settings: Any) -> Any:
    config = small_config(tie_word_embeddings=True, rope_theta=10000) | {"hidden_size": 128}
    arguments = {"seed": 0, "steps": 25, "batch": 8, "lr": 5e-3, "device": "cpu"} | settings
    return config, make.train(config, tokenizer, **arguments)


def test_training_lowers_the_loss_and_its_checkpoint_opens(
    tokenizer: Any, texts_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(make.logger, "info", lambda text, *values: said.append(text % values))
    config, model = tiny(tokenizer)
    first, last = (float(found) for found in re.findall(r"loss per answer token (\S+)", "\n".join(said)))
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


def test_training_on_a_cpu_repeats(tokenizer: Any, texts_once: None) -> None:
    (_, one), (_, other), (_, differing) = (tiny(tokenizer, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.model.norm.weight, other.model.norm.weight)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, differing.lm_head.weight)


def test_the_command_writes_what_the_package_holds(made: Path) -> None:
    assert (made / "problems.jsonl").read_bytes() == PROBLEMS.read_bytes()
    checkpoint = made / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(path.name for path in CHECKPOINT.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (checkpoint / name).read_text() == (CHECKPOINT / name).read_text()
    assert (checkpoint / "model.safetensors").stat().st_size == (CHECKPOINT / "model.safetensors").stat().st_size
    assert Checkpoint.open(str(checkpoint)).fingerprint != Checkpoint.open("demo").fingerprint
