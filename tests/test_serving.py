"""Our tasks on an SDAR that somebody serves: through the harness's own model for OpenAI's protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import sdar_lm_eval.tasks
from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, make_engine

pytest.importorskip("tenacity", reason="lm-eval's API models need lm_eval[api]")
GREEDY = DecodingConfig(temperature=0)
DOCUMENTS = 3


class Server(ThreadingHTTPServer):
    """What a server of SDAR has to do: the chat template once, greedy at temperature 0, the end left out."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.payloads: list[dict[str, Any]] = []
        self.checkpoint = Checkpoint.open("demo")
        self.engine = make_engine("native", self.checkpoint, device="cpu")

    def answer(self, payload: dict[str, Any]) -> str:
        assert payload["temperature"] == 0
        tokenizer = self.checkpoint.tokenizer
        prompt = tokenizer.apply_chat_template(payload["messages"], tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer.encode(prompt, add_special_tokens=False))
        request = GenerationRequest(ids, payload["max_tokens"], GREEDY, frozenset(self.checkpoint.stop_ids))
        return self.checkpoint.decode(dict(self.engine.generate([request]))[0].token_ids)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.payloads.append(payload)
        message = {"role": "assistant", "content": self.server.answer(payload)}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def evaluate(**model: Any) -> tuple[dict[str, Any], list[str]]:
    tasks = TaskManager(include_path=str(Path(sdar_lm_eval.tasks.__file__).parent), include_defaults=False)
    results = lm_eval.simple_evaluate(
        **model, tasks=["gsm8k_sdar_demo"], task_manager=tasks, limit=DOCUMENTS, bootstrap_iters=0
    )
    samples = [s for s in results["samples"]["gsm8k_sdar_demo"] if s["filter"] == "strict-match"]
    return results["results"]["gsm8k_sdar_demo"], [s["resps"][0][0] for s in samples]


def test_a_served_model_scores_what_it_scores_here(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
    theirs, their_texts = evaluate(
        model="local-chat-completions",
        model_args={"model": "sdar", "base_url": url, "num_concurrent": 1},
        apply_chat_template=True,
    )
    ours, our_texts = evaluate(model="sdar", model_args={"pretrained": "demo", "device": "cpu"})
    assert their_texts == our_texts
    assert theirs["exact_match,strict-match"] == ours["exact_match,strict-match"]
    assert all(their_texts)
    for payload in server.payloads:
        (turn,) = payload["messages"]
        assert turn["role"] == "user"
        assert "<|im_start|>" not in turn["content"]  # the template is the server's business
        assert (payload["max_tokens"], payload["temperature"]) == (128, 0)
        assert not any(payload["stop"])
    assert len(server.payloads) == DOCUMENTS
