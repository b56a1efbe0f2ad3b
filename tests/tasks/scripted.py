"""Runs our task files through lm-eval with a model that answers what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import sdar_lm_eval.tasks

TASKS = Path(sdar_lm_eval.tasks.__file__).parent

Answer = Callable[[dict[str, Any]], str]


class FixedLM(LM):
    """Answers each document with what a function of it says; keeps the requests.

    The function finds the request's number among the document's under "request".
    """

    tokenizer_name = "fixed"

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.requests += [request.args for request in requests]
        return [self.answer({**request.doc, "request": request.idx}) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "fixed"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history)


def manager(**metadata: object) -> TaskManager:
    """Our tasks alone, without the seconds that the stock ones take."""
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"pretrained": "x", **metadata})


def load_task(name: str, **metadata: object) -> Any:
    """A task, or a group as lm-eval has it."""
    return manager(**metadata).load_task_or_group(name)[name]


def prompts(task: Any, **chat: Any) -> list[Any]:
    """What a task asks, document by document."""
    task.build_all_requests(rank=0, world_size=1, **chat)
    return [instance.args[0] for instance in task.instances]


def conversations(task: Any) -> list[Any]:
    """The turns that a task asks in under a chat template, document by document."""
    chat = {"apply_chat_template": True, "chat_template": FixedLM(str).apply_chat_template}
    return [json.loads(prompt) for prompt in prompts(task, **chat)]


def evaluate(answer: Answer, name: str, metadata: dict[str, object] | None = None, **settings: Any) -> Any:
    """Run a task or group, and return its results and what the model was asked."""
    model = FixedLM(answer)
    results = lm_eval.simple_evaluate(
        model,
        tasks=[name],
        task_manager=manager(**metadata or {}),
        **{"bootstrap_iters": 0, "verbosity": "ERROR"} | settings,
    )
    return results, model.requests
