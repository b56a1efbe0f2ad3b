"""The registered lm_eval model: Instance -> GenerationRequest -> engine -> text, in the harness's order.

One class for every engine: it owes the harness its contract (order, caching, truncation, chat template, ranks), and the
engine owes it tokens.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import sdar_lm_eval
from sdar_lm_eval.answers import AnswerFolder, differences
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import (
    GenerationRequest,
    GenerationResult,
    LikelihoodConfig,
    Scorer,
    ScoreRequest,
    ScoreResult,
    make_engine,
    to_number,
)
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.gen_kwargs import (
    GENERATION_SETTINGS,
    MAX_TOKENS_SPELLINGS,
    Generation,
    check_names,
    read_generation,
    to_bool,
)
from sdar_lm_eval.ranks import Ranks
from sdar_lm_eval.report.live import Live
from sdar_lm_eval.report.run import Counts, RunReport, facts_of

logger = logging.getLogger(__name__)
# Our messages go where lm_eval's go, at its verbosity.
logging.getLogger("sdar_lm_eval").parent = logging.getLogger("lm_eval")

DEFAULT_CHECKPOINT = "JetLM/SDAR-4B-Chat"
CHAT_TEMPLATE_MODES = ("auto", "on", "off")
MODEL_ARGUMENTS = (
    "pretrained", "revision", "dtype", "device", "max_length", "max_active", "seed", "chat_template", "trace",
    "batch_size", "max_batch_size", "trust_remote_code", "likelihood", "mc_samples", "verbose", "answers",
)  # fmt: skip
TOKENIZED_TOGETHER = 1000  # prompts: what a tokenizer makes of them takes five times the memory of their tokens
PROCESS = os.getpid()  # a forked one has another
# What a run's cached answers depend on, kept in the cache itself; see `set_cache_hook`.
FINGERPRINT_KEY = "sdar_lm_eval/fingerprint"

_Key = tuple[int, int]  # identity of an Instance, repeat


@dataclass(frozen=True)
class _Settings:
    """What all requests with the same gen_kwargs share."""

    generation: Generation
    described: dict[str, Any]
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """One answer to be made.

    Attributes:
        until: the answer is cut before the earliest of these texts.
        own_key: where the cache keeps the answer for a later run, if the harness will not read its own key back.
    """

    instance: Any
    repeat: int
    request: GenerationRequest
    until: tuple[str, ...]
    own_key: str | None


@dataclass
class _ScoreJob:
    """One log-likelihood to be computed: the sum over its pieces, which is one but for rolling windows."""

    instance: Any
    pieces: list[ScoreRequest]
    results: list[ScoreResult]

    def result(self) -> ScoreResult:
        return ScoreResult(
            log_likelihood=math.fsum(result.log_likelihood for result in self.results),
            is_greedy=all(result.is_greedy for result in self.results),
            standard_error=math.hypot(*(result.standard_error for result in self.results)),
            clean_tokens=sum(result.clean_tokens for result in self.results),
            noised_tokens=sum(result.noised_tokens for result in self.results),
        )


class SDARLM(TemplateLM):  # type: ignore[misc]
    """`lm_eval --model sdar`: an SDAR checkpoint on the native engine.

    Args:
        pretrained: hub id, folder, or `demo` (the bundled small checkpoint).
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16, float16, or auto: float32 on the CPU, the checkpoint's own on a GPU.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one. `--device cuda:0` counts as auto: the harness passes
            it when nobody asked.
        max_length: most tokens of prompt and answer; longer prompts lose their beginning. Default: the checkpoint's.
        max_active: sequences that run at once; default: 32 on the CPU, 256 on a GPU, or as many as fit.
            `--batch_size N` with N > 1 is another way to say it; 1 and auto, which the harness passes when nobody
            asked, leave it to the engine.
        kv_pages: KV storage in pages of 16 tokens; default: what the requests need, as far as memory allows.
        kernels: run a dense model with Triton kernels and CUDA graphs; default: on GPUs, where triton is installed.
        reproducible: answers are the same to the bit whatever runs beside them (default: only but for rounding). It
            takes the kernels.
        share_prefixes: prompts that begin alike share the KV of that beginning (default; false: for comparison).
        seed: of sampled answers; each draws by (seed, task, prompt, repeat), whatever else is in the batch.
        chat_template: auto (the checkpoint's chat template, where it has one, for prompts that are not in one yet: each
            becomes one user turn, or the turns its task says it has), on (the same, and an error where there is none),
            off. Of generated answers only: log-likelihoods are of the text as it comes, which `--apply_chat_template`
            puts into the template.
        trace: file that gets a JSON line for each finished request; with several ranks, one file each.
        verbose: log each example when its answer is there, right or wrong where the task has a judge (report/live.py).
        answers: folder that keeps finished answers, for this run to go on from; several processes may share it.
        likelihood: chain (exact) or nelbo (the diffusion bound), see `sdar_lm_eval/likelihood.py`; at temperature 1,
            whatever the decoding settings.
        mc_samples: masks a block under nelbo; blocks with no more masks than that are computed without sampling.
        decoding settings: see `DecodingConfig`; and do_sample, max_gen_toks, until. A task's or `--gen_kwargs`' win.

    Raises:
        UserError: an unknown argument, a value out of range, or a checkpoint that cannot be run.
    """

    ENGINE = "native"
    ENGINE_ARGUMENTS: tuple[str, ...] = ("kv_pages", "kernels", "reproducible", "share_prefixes")

    def __init__(self, pretrained: str = DEFAULT_CHECKPOINT, **arguments: Any) -> None:
        super().__init__()
        started = time.perf_counter()
        check_names(arguments, "model_args", also=MODEL_ARGUMENTS + self.ENGINE_ARGUMENTS)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if to_bool("trust_remote_code", arguments.get("trust_remote_code", False)):
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run.")
        self._template_mode = _one_of("chat_template", arguments.get("chat_template", "auto"), CHAT_TEMPLATE_MODES)
        self._seed = int(to_number("seed", arguments.get("seed", 0), whole=True))
        max_active = _max_active(arguments)

        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.world_size
        # What lm_eval up to 0.4.12 calls in the place of `all_gather` and `barrier`.
        self.accelerator = types.SimpleNamespace(gather=self.all_gather, wait_for_everyone=self.barrier)
        if self._rank > 0:
            logging.getLogger("sdar_lm_eval").setLevel(logging.ERROR)  # rank 0 says it for all

        revision = arguments.get("revision")
        self.checkpoint = Checkpoint.open(str(pretrained), None if revision is None else str(revision))
        self.tokenizer = self.checkpoint.tokenizer
        self._has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self._template_mode == "on" and not self._has_template:
            raise UserError(
                f"chat_template=on, but checkpoint {pretrained!r} has no chat template; use chat_template=off."
            )
        self._base = {"block_length": self.checkpoint.block_length} | {
            name: value for name, value in arguments.items() if name in GENERATION_SETTINGS
        }
        self._default = read_generation({}, self._base)
        self._max_length = int(
            to_number("max_length", arguments.get("max_length", self.checkpoint.max_length), whole=True)
        )
        self._likelihood = LikelihoodConfig(
            method=str(arguments.get("likelihood", LikelihoodConfig.method)),
            mc_samples=arguments.get("mc_samples", LikelihoodConfig.mc_samples),
            block_length=self._default.decoding.block_length,
            seed=self._seed,
        )
        if "mc_samples" in arguments and self._likelihood.method == "chain":
            logger.warning("mc_samples=%s has no effect: likelihood=chain samples nothing.", arguments["mc_samples"])
        if any(name in arguments for name in MAX_TOKENS_SPELLINGS):  # else each task says how long its answers are
            self._room_for_prompt(self._default.max_gen_toks)
        self._warn_of_untrained()

        trace = arguments.get("trace")
        if trace is not None and self._world_size > 1:
            trace = f"{trace}.rank{self._rank}"
        self.report = RunReport(None if trace is None else Path(str(trace)))
        self._verbose = to_bool("verbose", arguments.get("verbose", False))
        self._engine = make_engine(
            self.ENGINE,
            self.checkpoint,
            device=self._device_of_rank(str(arguments.get("device", "auto"))),
            dtype=str(arguments.get("dtype", "auto")),
            max_active=max_active,
            **{name: arguments[name] for name in self.ENGINE_ARGUMENTS if name in arguments},
        )
        self._device: str = self._engine.info["device"]
        if self._device == "cpu":
            self._ranks.share_cpu()
        self.report.counts.load_seconds = time.perf_counter() - started
        self._counts_of_ranks = [self.report.counts]
        self._decoding_of_tasks: dict[str, dict[str, Any]] = {}
        self._harness_templates = False
        self._said_template = self._said_plain = False
        self._answers: AnswerFolder | None = None
        if arguments.get("answers") is not None:
            folder = Path(str(arguments["answers"]))
            self._answers = AnswerFolder(folder, self._fingerprint(), lambda: self.get_model_info()["sdar_lm_eval"])
        logger.info("%s", self._describe())

    # How the harness makes a model

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> SDARLM:
        """Make the model from `--model_args` and what the harness adds; a user's model_args win over the latter."""
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if added.get("device") == "cuda:0":  # lm_eval's default, given or not
            del added["device"]
        return cls(**(added | dict(arg_dict)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> SDARLM:
        """The same from "name=value,name=value"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # Text and tokens

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a request does not say."""
        return self._default.max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text, or a token that ends answers where it names none."""
        eos = self.tokenizer.eos_token_id
        return int(self.checkpoint.stop_ids[0] if eos is None else eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty prompt: the beginning of text where the tokenizer has one, else its end."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name in the harness's cache of built requests; it asks only when it applies the chat template itself."""
        self._harness_templates = True
        return self.checkpoint.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize; by default special tokens are added unless the text begins with one already (no second BOS).

        Nor are they to a text in the chat template, which writes the BOS itself where there is to be one.
        """
        if add_special_tokens is None:
            add_special_tokens = self._wants_special_tokens(string)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _wants_special_tokens(self, string: str) -> bool:
        bos = self.tokenizer.bos_token
        return not (bos and string.startswith(bos)) and not self._is_rendered(string)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return self.checkpoint.decode(tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt, its last message is left open to be continued.

        Raises:
            UserError: the checkpoint has no chat template.
        """
        if not self._has_template:
            raise UserError(
                f"checkpoint {self.checkpoint.name!r} has no chat template; leave out --apply_chat_template."
            )
        return self._render(chat_history, add_generation_prompt)

    def _render(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # What the harness asks for

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests; returns texts in their order, cut before the earliest `until`.

        Each finished answer goes to the harness's cache at once. See `lm_eval.api.model.LM.generate_until`.

        Raises:
            UserError: a request's settings are unknown or out of range; raised before anything runs.
            EngineError: the engine stopped; finished answers are in the cache.
        """
        return self._of_own(requests, lambda own: self._generate(own, disable_tqdm), "")

    def _of_own(self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], blank: Any) -> list[Any]:
        """Answers to requests; a blank to those for a borrowed document, whose answers nobody reads (ranks.py)."""
        idle = [self._ranks.is_idle(request.task_name) for request in requests]
        answers = iter(answer([request for request, is_idle in zip(requests, idle, strict=True) if not is_idle]))
        return [blank if is_idle else next(answers) for is_idle in idle]

    def _generate(self, requests: Sequence[Any], disable_tqdm: bool) -> list[str]:
        keys, jobs = self._jobs(requests)
        self._harness_templates = False
        answers = {key: kept for key, job in jobs.items() if (kept := self._recall(job)) is not None}
        # Longest first: prompts of like length are prefilled together, and no long one is left for the end.
        missing = sorted((key for key in jobs if key not in answers), key=lambda k: -len(jobs[k].request.prompt_ids))
        started = time.perf_counter()
        self._engine.prepare([jobs[key].request for key in missing])
        self.report.counts.load_seconds += time.perf_counter() - started
        live = Live((job.instance for job in jobs.values()), len(jobs), whole=self._world_size == 1)
        for key, text in answers.items():
            live.judge(jobs[key].instance, text)
        self.report.start(len(jobs), finished=len(answers), show=self._rank == 0 and not disable_tqdm, live=live)
        if answers:
            logger.info("%d of %d answers are there already, and are not computed again.", len(answers), len(jobs))
        if self._answers is not None:
            self._answers.begin()
        with self._told_in_the_end():
            for index, result in self._engine.generate([jobs[key].request for key in missing]):
                job = jobs[missing[index]]
                text = _cut(self.tok_decode(result.token_ids), job.until)
                answers[missing[index]] = text
                self._keep(job, text, result)
                verdict = live.judge(job.instance, text)
                if self._verbose:
                    self.report.tell(live.example(job.instance, job.request, result, text, verdict))
                self.report.add(
                    result,
                    text,
                    prompt_tokens=len(job.request.prompt_ids),
                    task=job.instance.task_name,
                    document=job.instance.doc_id,
                    repeat=job.repeat,
                )
        if len(answers) < len(jobs):
            raise EngineError(f"the {self.ENGINE} engine answered {len(answers)} of {len(jobs)} requests.")
        return [answers[key] for key in keys]

    @contextlib.contextmanager
    def _told_in_the_end(self) -> Iterator[None]:
        """What ends a run of requests, also one that ends with an error."""
        try:
            yield
        finally:
            self.report.stop(self._engine.peak_memory_bytes())
            if self._answers is not None:
                self._answers.finish()
            if self._world_size == 1:  # else `barrier` says it for all
                logger.info("%s", self.report.counts)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihoods in nats, and whether greedy decoding gives the continuation.

        Contexts are taken as they come, in no chat template unless the harness applied it. Each finished score goes to
        the harness's cache at once. See `lm_eval.api.model.LM.loglikelihood`, and `sdar_lm_eval/likelihood.py`.

        Raises:
            UserError: the engine computes no log-likelihoods, or a continuation is too long; raised before anything
                runs.
            EngineError: the engine stopped; finished scores are in the cache.
        """
        return self._of_own(
            requests, lambda own: self._score("loglikelihood", own, self._pair_of, disable_tqdm), (0.0, False)
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in nats, by the harness's rolling windows; errors as for `loglikelihood`.

        A window's context and scored tokens together are at most `max_length`.
        """
        scores = self._of_own(
            requests,
            lambda own: self._score("loglikelihood_rolling", own, self._windows_of, disable_tqdm),
            (0.0, False),
        )
        return [log_likelihood for log_likelihood, _ in scores]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score ((context, continuation), context ids, continuation ids), without cache, trace or summary."""
        pieces = [self._fit(list(context), list(continuation))[0] for _, context, continuation in requests]
        results = dict(self._scorer("a caller").score(pieces, self._likelihood))
        return [(results[i].log_likelihood, results[i].is_greedy) for i in range(len(pieces))]

    def _score(
        self, kind: str, requests: Sequence[Any], pieces_of: Any, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Score requests whose `args` `pieces_of` turns into (context ids, continuation ids) pairs."""
        if not requests:
            return []
        scorer = self._scorer(f"task {requests[0].task_name!r}")
        jobs: dict[tuple[str, ...], _ScoreJob] = {}
        truncated = 0
        for instance in requests:
            if instance.args not in jobs:  # several ranks pad with copies
                fitted = [self._fit(*pair) for pair in pieces_of(*instance.args)]
                jobs[instance.args] = _ScoreJob(instance, [piece for piece, _ in fitted], [])
                truncated += any(cut for _, cut in fitted)
        if self._has_template and not self._said_plain and not self._is_rendered(requests[0].args[0]):
            self._said_plain = True
            logger.info(
                "Log-likelihoods are of the text as it comes, in no chat template (chat_template=%s is for generated "
                "answers); --apply_chat_template lets the harness apply it.",
                self._template_mode,
            )
        self._harness_templates = False
        if truncated:
            logger.warning(
                "%d of %d contexts are longer than max_length=%d leaves room for; they lost their beginning.",
                truncated,
                len(jobs),
                self._max_length,
            )
        flat = [(job, piece) for job in jobs.values() for piece in job.pieces]
        empty = [job for job in jobs.values() if not job.pieces]
        if empty:
            logger.warning(
                "%d of %d texts to be scored have no tokens; their log-likelihood is 0.", len(empty), len(jobs)
            )
        mask = self.checkpoint.mask_token_id
        if impossible := sum(any(mask in p.continuation_ids for p in job.pieces) for job in jobs.values()):
            logger.warning(
                "%d of %d texts to be scored contain the mask token %r, which is never generated; their log-likelihood "
                "is -inf, and so a perplexity is infinite. Take it out of the documents.",
                impossible,
                len(jobs),
                self.tokenizer.convert_ids_to_tokens(mask),
            )
        self.report.start(len(jobs), show=self._rank == 0 and not disable_tqdm, scoring=True)
        with self._told_in_the_end():
            for job in empty:
                self._keep_score(kind, job)
            for index, result in scorer.score([piece for _, piece in flat], self._likelihood):
                job, _ = flat[index]
                job.results.append(result)
                if len(job.results) == len(job.pieces):
                    self._keep_score(kind, job)
        missing = sum(len(job.results) < len(job.pieces) for job in jobs.values())
        if missing:
            raise EngineError(f"the {self.ENGINE} engine scored {len(jobs) - missing} of {len(jobs)} requests.")
        scores = {args: job.result() for args, job in jobs.items()}
        return [(scores[r.args].log_likelihood, scores[r.args].is_greedy) for r in requests]

    def _keep_score(self, kind: str, job: _ScoreJob) -> None:
        result = job.result()
        answer = result.log_likelihood if kind == "loglikelihood_rolling" else (result.log_likelihood, result.is_greedy)
        self.cache_hook.add_partial(kind, job.instance.args, answer)
        self.report.add_score(
            result,
            context_tokens=sum(len(piece.context_ids) for piece in job.pieces),
            tokens=sum(len(piece.continuation_ids) for piece in job.pieces),
            task=job.instance.task_name,
            document=job.instance.doc_id,
            likelihood=self._likelihood.method,
        )

    def _scorer(self, who: str) -> Scorer:
        if isinstance(self._engine, Scorer):
            return self._engine
        raise UserError(
            f"{who} asks for log-likelihoods, which the {self.ENGINE} engine does not compute. Use --model sdar, or "
            "a task that generates (output_type generate_until), such as gsm8k_sdar."
        )

    def _pair_of(self, context: str, continuation: str) -> list[tuple[list[int], list[int]]]:
        """Tokens of a context and its continuation, by the harness's rules; none where the latter has none."""
        if context:
            context_ids, continuation_ids = self._encode_pair(context, continuation)
        else:
            context_ids, continuation_ids = self._behind_prefix(continuation)
        return [(context_ids or [self.prefix_token_id], continuation_ids)] if continuation_ids else []

    def _windows_of(self, text: str) -> list[tuple[list[int], list[int]]]:
        prefix, ids = self._behind_prefix(text)
        windows = get_rolling_token_windows(ids, prefix[0], max_seq_len=max(self._max_length - 1, 1), context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _behind_prefix(self, text: str) -> tuple[list[int], list[int]]:
        """The prefix token, and the tokens of a text that nothing stands before; not twice if it begins with it."""
        ids = self.tok_encode(text, add_special_tokens=False)
        return [self.prefix_token_id], ids[1:] if ids[:1] == [self.prefix_token_id] else ids

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[ScoreRequest, bool]:
        """The request, and whether its context had to lose its beginning."""
        room = self._max_length - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens and one of context are more than "
                f"max_length={self._max_length}. Raise max_length (the checkpoint allows {self.checkpoint.max_length})."
            )
        return ScoreRequest(tuple(context[-room:]), tuple(continuation)), len(context) > room

    def get_model_info(self) -> dict[str, Any]:
        """Facts for `results["config"]`."""
        return {
            "model_revision": self.checkpoint.revision,
            "model_dtype": self._engine.info["dtype"],
            "sdar_lm_eval": {
                "version": sdar_lm_eval.__version__,
                "pretrained": self.checkpoint.name,
                "checkpoint_fingerprint": self.checkpoint.fingerprint,
                "mask_token_id": self.checkpoint.mask_token_id,
                "block_size": self.checkpoint.block_length,
                "stop_ids": list(self.checkpoint.stop_ids),
                "max_length": self._max_length,
                "seed": self._seed,
                "chat_template": self._template_mode,
                "ranks": self._world_size,
                "decoding": self._default.as_dict(),
                "decoding_of_tasks": self._decoding_of_tasks,
                **self._likelihood.as_dict(),
                **self._engine.info,
                "run": Counts.of_ranks(self._counts_of_ranks).as_dict(),
            },
        }

    # Cache

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's cache, and refuse one that holds another model's or other settings' answers.

        The harness's keys hold a prompt and its gen_kwargs, not the model nor its arguments.

        Raises:
            UserError: the cache was made otherwise; says how, and what to do.
        """
        super().set_cache_hook(cache_hook)
        cache = cache_hook.dbdict
        if cache is None:
            return
        mine = self._fingerprint()
        if FINGERPRINT_KEY not in cache:
            if len(cache):
                raise UserError(
                    f"--use_cache: {cache.filename} holds answers of another model (none of this package's). "
                    "Give another path, or delete the file."
                )
            cache[FINGERPRINT_KEY] = json.dumps(mine)
            return
        theirs = json.loads(cache[FINGERPRINT_KEY])
        if changes := differences(theirs, mine):
            raise UserError(
                f"--use_cache: {cache.filename} was made with other settings ({changes}). "
                "Run with those settings, give another path, or delete the file."
            )

    def _fingerprint(self) -> dict[str, Any]:
        """All that changes answers beside what the harness's keys hold."""
        do_sample, temperature = self._base.get("do_sample"), self._base.get("temperature")
        return {
            "sdar_lm_eval": sdar_lm_eval.__version__,
            "engine": self.ENGINE,
            "engine_version": self._engine.info.get("engine_version"),
            "checkpoint": self.checkpoint.fingerprint,
            "dtype": self._engine.info["dtype"],
            "max_length": self._max_length,
            "chat_template": self._template_mode,
            "seed": self._seed,
            **self._likelihood.as_dict(),
            **self._default.as_dict(),
            # As given: they hold for tasks that name the other one, or neither.
            "do_sample": None if do_sample is None else to_bool("do_sample", do_sample),
            "temperature": None if temperature is None else to_number("temperature", temperature, whole=False),
        }

    def _keep(self, job: _Job, text: str, result: GenerationResult) -> None:
        if self._answers is not None:
            name = {"task": job.instance.task_name, "document": job.instance.doc_id, "repeat": job.repeat}
            facts = facts_of(result, text, prompt_tokens=len(job.request.prompt_ids))
            self._answers.keep(job.instance, job.repeat, name | facts)
        self.cache_hook.add_partial("generate_until", job.instance.args, text)
        if job.own_key is not None and self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict[job.own_key] = text

    def _recall(self, job: _Job) -> str | None:
        if self._answers is not None and (kept := self._answers.recall(job.instance, job.repeat)) is not None:
            return kept
        cache = self.cache_hook.dbdict
        if job.own_key is None or cache is None or job.own_key not in cache:
            return None
        return str(cache[job.own_key])

    def _own_key(self, instance: Any, generation: Generation, seed: int) -> str | None:
        """Key for an answer that the harness will not read back, since its own key is the same for all repeats.

        Ours holds the seed, which differs by repeat, so the answer that is read is the one that would be drawn again.

        Raises:
            UserError: drawn repeats that the harness will read back as one.
        """
        if instance.args[1].get("do_sample"):  # the harness's test, which takes any text for true
            content = json.dumps([instance.args, seed], default=str)
            return f"sdar_lm_eval/sampled/{hashlib.sha256(content.encode()).hexdigest()}"
        if generation.is_drawn and (instance.repeats or 1) > 1 and self.cache_hook.dbdict is not None:
            raise UserError(
                f"--use_cache: task {instance.task_name!r} draws {instance.repeats} answers to each prompt, but "
                "without do_sample=true the harness keeps one for all of them. Add --gen_kwargs do_sample=true, or "
                "leave out --use_cache."
            )
        return None

    # Requests

    def _jobs(self, requests: Sequence[Any]) -> tuple[list[_Key], dict[_Key, _Job]]:
        """What there is to do, and the key of each request's answer.

        The harness gives K repeats as the same Instance, K times. On several ranks it also pads with copies of the last
        one; those count as its repeats over again, so they get the same answers and cost nothing. So do repeats of an
        answer without chance.
        """
        keys: list[_Key] = []
        seen: collections.Counter[int] = collections.Counter()
        settings: dict[str, _Settings] = {}
        asked: dict[_Key, tuple[Any, _Settings]] = {}
        for instance in requests:
            gen_kwargs = instance.args[1]
            name = json.dumps(gen_kwargs, default=str)
            if name not in settings:
                settings[name] = self._read(gen_kwargs)
            generation = settings[name].generation
            repeat = seen[id(instance)] % max(instance.repeats or 1, 1) if generation.is_drawn else 0
            seen[id(instance)] += 1
            key = (id(instance), repeat)
            keys.append(key)
            asked[key] = instance, settings[name]
        prompts = self._encode_prompts([instance.args[0] for instance, _ in asked.values()])
        jobs: dict[_Key, _Job] = {}
        truncated = 0
        for (key, (instance, own)), ids in zip(asked.items(), prompts, strict=True):
            repeat, generation = key[1], own.generation
            self._decoding_of_tasks[str(instance.task_name)] = own.described
            room = self._room_for_prompt(generation.max_gen_toks)
            truncated += len(ids) > room
            seed = _seed_of(self._seed, instance.task_name, instance.args[0], repeat)
            request = GenerationRequest(
                prompt_ids=tuple(ids[-room:]),
                max_new_tokens=generation.max_gen_toks,
                decoding=generation.decoding,
                stop_ids=own.stop_ids,
                stop_strings=own.stop_strings,
                seed=seed,
                record_steps=self.report.tracing or self._verbose,
            )
            own_key = self._own_key(instance, generation, seed)
            jobs[key] = _Job(instance, repeat, request, generation.until, own_key)
        if truncated:
            logger.warning(
                "%d of %d prompts are longer than max_length - max_gen_toks allows; they lost their beginning.",
                truncated,
                len(jobs),
            )
        return keys, jobs

    def _read(self, gen_kwargs: Mapping[str, Any]) -> _Settings:
        generation = read_generation(gen_kwargs, self._base)
        if generation.decoding.block_length != self._default.decoding.block_length:
            self._warn_of_block_length(generation.decoding.block_length)
        stop_ids, stop_strings = set(self.checkpoint.stop_ids), []
        for text in generation.until:
            ids = self.tok_encode(text, add_special_tokens=False)
            # A special token has no text in the answer, so only its id can stop there.
            if len(ids) == 1 and ids[0] in self.tokenizer.all_special_ids:
                stop_ids.add(ids[0])
            else:
                stop_strings.append(text)
        return _Settings(generation, generation.as_dict(), frozenset(stop_ids), tuple(stop_strings))

    def _encode_prompts(self, contexts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, in the chat template where it is to be applied; together, which is quicker."""
        texts = [self._in_template(context) for context in contexts]
        prompts: list[list[int]] = [[] for _ in texts]
        for special in (False, True):
            some = [i for i, (_, wants_special) in enumerate(texts) if wants_special == special]
            for begin in range(0, len(some), TOKENIZED_TOGETHER):
                part = some[begin : begin + TOKENIZED_TOGETHER]
                with _parallel_tokenizing(alone=self._world_size == 1):
                    ids_of = self.tokenizer([texts[i][0] for i in part], add_special_tokens=special)["input_ids"]
                for i, ids in zip(part, ids_of, strict=True):
                    prompts[i] = ids
        return [prompt or [self.prefix_token_id] for prompt in prompts]

    def _in_template(self, context: str) -> tuple[str, bool]:
        """A prompt as it is tokenized, and whether special tokens are added."""
        if self._has_template and self._template_mode != "off" and not self._is_rendered(context):
            if not self._said_template:
                self._said_template = True
                logger.info(
                    "Prompts are put into the checkpoint's chat template as one user turn, or as the turns that their "
                    "task says they are made of (chat_template=%s); --apply_chat_template lets the harness do it, "
                    "chat_template=off leaves them as they are.",
                    self._template_mode,
                )
            # Some of our tasks' prompts are a TurnsPrompt.
            turns = getattr(context, "turns", None) or [{"role": "user", "content": context}]
            return self._render(turns), False  # a chat template writes the BOS itself, where there is to be one
        return context, self._wants_special_tokens(context)

    def _is_rendered(self, context: str) -> bool:
        """Whether a prompt is in the chat template already, by the harness or by its task."""
        if not self._has_template:
            return False
        if not self._opening:
            return self._harness_templates
        return context.lstrip().removeprefix(self.tokenizer.bos_token or "").startswith(self._opening)

    @functools.cached_property
    def _opening(self) -> str:
        """How every conversation in the chat template begins, the BOS left out; "" where all may differ."""
        conversations = [[{"role": "user", "content": text}] for text in ("a", "b")]
        texts = [self._render(conversation) for conversation in conversations]
        try:
            texts.append(self._render([{"role": "system", "content": "c"}, *conversations[0]]))
        except Exception as error:  # whatever a template raises that has no system turns
            logger.debug("The chat template has no system turn: %s", error)
        common = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
        return "".join(characters[0] for characters in common).removeprefix(self.tokenizer.bos_token or "")

    def _room_for_prompt(self, max_gen_toks: int) -> int:
        room = self._max_length - max_gen_toks
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_gen_toks} must be below max_length={self._max_length}, to leave room for a prompt. "
                f"Lower max_gen_toks or raise max_length (the checkpoint allows {self.checkpoint.max_length})."
            )
        return room

    # Ranks

    @property
    def device(self) -> str:
        """Where the engine runs."""
        return self._device

    def all_gather(self, tensor: Any) -> Any:
        """Concatenate each rank's tensor."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect each rank's object on rank `dst`."""
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all ranks. The harness does so after generation, so rank 0 learns here what the others counted."""
        counts = self._ranks.gather_object(self.report.counts)
        if counts is not None:
            self._counts_of_ranks = counts
            logger.info("%d ranks: %s", self._world_size, Counts.of_ranks(counts))
        self._ranks.barrier()

    def _device_of_rank(self, device: str) -> str:
        """A GPU for each rank of a machine, where the user named none."""
        if self._world_size > 1 and device in ("auto", "cuda"):
            import torch

            if torch.cuda.is_available():
                return f"cuda:{self._ranks.local_rank % torch.cuda.device_count()}"
        return device

    def _warn_of_block_length(self, block_length: int) -> None:
        if block_length != self.checkpoint.block_length:
            logger.warning(
                "block_length=%d, but checkpoint %r was trained with %d; answers will be worse.",
                block_length,
                self.checkpoint.name,
                self.checkpoint.block_length,
            )

    def _warn_of_untrained(self) -> None:
        """Warn of settings that go beyond what the checkpoint was trained for."""
        self._warn_of_block_length(self._default.decoding.block_length)
        if self._max_length > self.checkpoint.max_length:
            logger.warning(
                "max_length=%d, but checkpoint %r was trained for %d tokens; longer prompts get worse answers.",
                self._max_length,
                self.checkpoint.name,
                self.checkpoint.max_length,
            )

    def _describe(self) -> str:
        info = self._engine.info
        settings = ", ".join(f"{name}={value}" for name, value in self._default.as_dict().items())
        return (
            f"{self.checkpoint.name} on the {self.ENGINE} engine ({info['device']}, {info['dtype']}, up to "
            f"{info['max_active']} sequences at once); unless a task says otherwise: {settings}"
        )


class SDARJetEngineLM(SDARLM):
    """`lm_eval --model sdar-jetengine`: an SDAR checkpoint on JetEngine.

    Args:
        gpu_memory_utilization: the part of the GPU's memory that JetEngine may fill; default: what the requests need.
        tensor_parallel_size: GPUs that share the weights (JetEngine 0.1.0 only).
        enforce_eager: go without CUDA graphs.
        all others: those of `SDARLM` but for kv_pages, kernels, reproducible and share_prefixes.

    Raises:
        UserError: as `SDARLM`, and for what JetEngine cannot do.
        EngineError: JetEngine, something that it needs, or a GPU is missing.
    """

    ENGINE = "jetengine"
    ENGINE_ARGUMENTS = ("gpu_memory_utilization", "tensor_parallel_size", "enforce_eager")


class SDARLMDeployLM(SDARLM):
    """`lm_eval --model sdar-lmdeploy`: an SDAR checkpoint on LMDeploy's PyTorch engine.

    Args:
        tensor_parallel_size: GPUs that share the weights.
        data_parallel_size: how many processes `accelerate launch` started, each with its copy of the weights; needs
            not be given.
        cache_max_entry_count: the part of the memory that the weights leave, for keys and values; default 0.8.
        all others: those of `SDARLM` but for kv_pages, kernels, reproducible and share_prefixes.

    Raises:
        UserError: as `SDARLM`, and for what LMDeploy cannot do.
        EngineError: LMDeploy, something that it needs, or a GPU is missing.
    """

    ENGINE = "lmdeploy"
    ENGINE_ARGUMENTS = ("tensor_parallel_size", "data_parallel_size", "cache_max_entry_count")


@contextlib.contextmanager
def _parallel_tokenizing(*, alone: bool) -> Iterator[None]:
    """Tokenize many texts by all cores, if the process has them to itself; lm_eval switches that off.

    It does so because tokenizers that have run in parallel warn in every process forked afterwards, unless they are
    told what to do there. They are: to do without, once this is over. A forked process itself has to, always, since the
    threads stay behind.
    """
    if not alone or os.getpid() != PROCESS:
        yield
        return
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before or "false"


def _cut(text: str, until: Sequence[str]) -> str:
    """Text before the earliest of the stop strings."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]


def _seed_of(seed: int, task: str | None, context: str, repeat: int) -> int:
    """A request's seed, from what it is and not from where it stands: the same with --limit and on any rank."""
    digest = hashlib.sha256(json.dumps([seed, task, context, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    # `on` and `off` may have become booleans on their way.
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    if text not in allowed:
        raise UserError(f"{name}={value!r} is unknown; choose {', '.join(allowed)}.")
    return str(text)


def _max_active(arguments: Mapping[str, Any]) -> int | None:
    """Sequences at once: max_active, else a batch size that somebody asked for, else up to the engine."""
    if "max_active" in arguments:
        return int(to_number("max_active", arguments["max_active"], whole=True))
    name, value = "batch_size", arguments.get("batch_size", 1)
    if isinstance(value, str) and value.startswith("auto"):
        name, value = "max_batch_size", arguments.get("max_batch_size")
        if value is None:
            return None
    number = int(to_number(name, value, whole=True))
    if number < 1:
        raise UserError(f"{name}={number} is out of range: it must be 1 or more.")
    return None if name == "batch_size" and number == 1 else number
