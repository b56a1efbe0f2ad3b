"""A model over an engine that answers from a script, and what puts requests to it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.engines.types import EngineInfo, GenerationRequest, GenerationResult
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.lm.model import SDARLM

GREEDY = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 32}
SAMPLED = {"until": [], "do_sample": True, "max_gen_toks": 32}
# A template that begins a conversation with the BOS, and one of which nothing is constant.
BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
BARE_TEMPLATE = "{% for m in messages %}{{ m.content }}!{% endfor %}"

Answer = Callable[[GenerationRequest], str]


class ScriptedEngine:
    """Answers with `answer(request)`, the last request first; stops with `error` after `answers_before_error`."""

    def __init__(self, checkpoint: Any, answer: Answer, options: Mapping[str, Any]) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.answer = answer
        self.options = options
        self.requests: list[GenerationRequest] = []
        self.answers_before_error: int | None = None
        self.error: Exception = EngineError("out of luck")
        self.info = EngineInfo("scripted", device="cpu", dtype="float32", max_active=7)
        self.prepared: list[GenerationRequest] = []
        self.closed = False

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        self.prepared = list(requests)

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, GenerationResult]]:
        assert self.prepared == list(requests)  # so that loading is not counted as generation
        for count, (index, request) in enumerate(reversed(list(enumerate(requests)))):
            if count == self.answers_before_error:
                raise self.error
            self.requests.append(request)
            ids = tuple(self.tokenizer.encode(self.answer(request), add_special_tokens=False))
            yield (
                index,
                GenerationResult(ids, "stop", 1, len(ids), 2, 0.5, unmasked_at=ids, confidences=(0.5,) * len(ids)),
            )

    def peak_memory_bytes(self) -> int:
        return 1 << 30

    def close(self) -> None:
        self.closed = True


class ScriptedLM(SDARLM):
    """An SDARLM over a ScriptedEngine, with short-cuts for tests."""

    engine: ScriptedEngine

    def prompt_of(self, context: str, **gen_kwargs: Any) -> str:
        """Return what reaches the engine for a context, special tokens included."""
        self.generate_until([request(context, GREEDY | gen_kwargs)])
        return str(self.tokenizer.decode(self.engine.requests[-1].prompt_ids))


def echo(engine_request: GenerationRequest) -> str:
    """An answer that tells requests and draws apart."""
    digest = hash((engine_request.prompt_ids, engine_request.seed if not engine_request.decoding.greedy else 0))
    return f"{digest % 100003}"


MakeLM = Callable[..., ScriptedLM]


def request(context: str, gen_kwargs: dict[str, Any] | None = None, repeats: int = 1, doc_id: int = 0) -> Instance:
    arguments = (context, copy.deepcopy(GREEDY if gen_kwargs is None else gen_kwargs))
    return Instance("generate_until", {"question": context}, arguments, 0, ("a_task", doc_id, repeats))


def requests_of(count: int, gen_kwargs: dict[str, Any] = GREEDY, repeats: int = 1) -> list[Instance]:
    """As the harness hands them over: each Instance `repeats` times in a row."""
    made = [request(f"Question {i}" + " and more" * (i % 3), gen_kwargs, repeats, i) for i in range(count)]
    return [instance for instance in made for _ in range(repeats)]


def checkpoint_with(folder: Path, *, template: str | None = None, bos: bool = False) -> Path:
    """Make a checkpoint like the demo's with another chat template (or none), and a tokenizer that writes a BOS."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if bos:
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [707], "tokens": ["<|endoftext|>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


DATA = """
import datasets
def load(**_):
    rows = [{"question": f"Question {i}", "answer": str(i)} for i in range(5)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows), "train": datasets.Dataset.from_list(rows)})
def copies(documents):
    return datasets.concatenate_datasets([documents.select([0, 1])] * 3)
def backwards(documents):
    return documents.select(range(4, -1, -1))
"""


Evaluate = Callable[..., dict[str, Any]]


def cached(lm: SDARLM, path: Path) -> Any:
    """The model as the harness wraps it for `--use_cache`."""
    return CachingLM(lm, str(path))
