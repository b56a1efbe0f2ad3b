"""The registered lm_eval model: Instance -> GenerationRequest -> engine -> text, in the harness's order.

One class for every engine: it owes the harness its contract (order, caching, truncation, chat template, ranks), the engine
owes it tokens.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

import sdar_lm_eval
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import DECODING_SETTINGS, GenerationRequest, make_engine, to_number
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.gen_kwargs import GENERATION_SETTINGS, Generation, check_names, read_generation, to_bool
from sdar_lm_eval.ranks import Ranks
from sdar_lm_eval.report.run import RunReport

logger = logging.getLogger(__name__)
# Our messages go where lm_eval's go, at its verbosity.
logging.getLogger("sdar_lm_eval").parent = logging.getLogger("lm_eval")

DEFAULT_CHECKPOINT = "JetLM/SDAR-4B-Chat"
CHAT_TEMPLATE_MODES = ("auto", "on", "off")
MODEL_ARGUMENTS = (
    "pretrained", "revision", "dtype", "device", "max_length", "max_active", "kv_pages", "seed", "chat_template", "trace",
    "batch_size", "max_batch_size", "trust_remote_code",
)  # fmt: skip
# What a run's cached answers depend on, kept in the cache itself; see `set_cache_hook`.
FINGERPRINT_KEY = "sdar_lm_eval/fingerprint"


@dataclass(frozen=True)
class _Job:
    """One answer to be made: a request of the harness (one repeat of it) and the engine's request."""

    instance: Any
    repeat: int
    generation: Generation
    request: GenerationRequest


class SDARLM(TemplateLM):  # type: ignore[misc]
    """`lm_eval --model sdar`: an SDAR checkpoint on the native engine.

    Args:
        pretrained: hub id, folder, or `demo` (the bundled small checkpoint).
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16, float16, or auto: float32 on the CPU, the checkpoint's own on a GPU.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one.
        max_length: most tokens of prompt and answer; longer prompts lose their beginning. Default: the checkpoint's.
        max_active: sequences that run at once; default: as many as fit. `--batch_size N` with N > 1 is another way
            to say it; 1 and auto, which the harness passes when nobody asked, leave it to the engine.
        kv_pages: KV storage in pages of 16 tokens; default: what the requests need, as far as memory allows.
        seed: of sampled answers; each draws by (seed, document, repeat), whatever else is in the batch.
        chat_template: auto (the checkpoint's chat template, where it has one, for prompts that the harness did not put
            into one), on (the same, and an error where there is none), off.
        trace: file that gets a JSON line for each finished request.
        decoding settings: see `DecodingConfig`; and max_gen_toks, until. A task's or `--gen_kwargs`' values win.

    Raises:
        UserError: an unknown argument, a value out of range, or a checkpoint that cannot be run.
    """

    ENGINE = "native"

    def __init__(self, pretrained: str = DEFAULT_CHECKPOINT, **arguments: Any) -> None:
        super().__init__()
        check_names(arguments, "model_args", also=MODEL_ARGUMENTS)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if arguments.get("trust_remote_code") and to_bool("trust_remote_code", arguments["trust_remote_code"]):
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run.")
        self._template_mode = _one_of("chat_template", arguments.get("chat_template", "auto"), CHAT_TEMPLATE_MODES)
        self._seed = int(to_number("seed", arguments.get("seed", 0), whole=True))
        settings = {name: arguments[name] for name in GENERATION_SETTINGS if name in arguments}

        started = time.perf_counter()
        revision = arguments.get("revision")
        self.checkpoint = Checkpoint.open(str(pretrained), None if revision is None else str(revision))
        self.tokenizer = self.checkpoint.tokenizer
        self._settings = {"block_length": self.checkpoint.block_length} | settings
        if "block_length" in settings:
            self._warn_of_block_length(settings["block_length"])
        self._max_length = int(to_number("max_length", arguments.get("max_length", self.checkpoint.max_length), whole=True))
        default = read_generation({}, self._settings)
        self._room_for_prompt(default.max_gen_toks)
        self._has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self._template_mode == "on" and not self._has_template:
            raise UserError(f"chat_template=on, but checkpoint {pretrained!r} has no chat template; use chat_template=off.")

        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.world_size
        self._engine = make_engine(
            self.ENGINE,
            self.checkpoint,
            device=self._device_of_rank(str(arguments.get("device", "auto"))),
            dtype=str(arguments.get("dtype", "auto")),
            max_active=_max_active(arguments),
            kv_pages=arguments.get("kv_pages"),
        )
        self._device = self._engine.info["device"]
        trace = arguments.get("trace")
        if trace is not None and self._world_size > 1:
            trace = f"{trace}.rank{self._rank}"
        self._tracing = trace is not None
        self.report = RunReport(
            time.perf_counter() - started, None if trace is None else Path(str(trace)), show=self._rank == 0
        )
        self._default = default
        self._harness_templates = False
        self._said_template = False
        logger.info("%s", self._describe())

    # How the harness makes a model

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None) -> SDARLM:
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
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

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
        """Tokenize; by default special tokens are added unless the text begins with one already (no second BOS)."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return self.checkpoint.decode(tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt, its last message is left open to be continued.

        Raises:
            UserError: the checkpoint has no chat template.
        """
        if not self._has_template:
            raise UserError(f"checkpoint {self.checkpoint.name!r} has no chat template; leave out --apply_chat_template.")
        self._harness_templates = True
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
        jobs = self._jobs(requests)
        self._harness_templates = False
        answers: dict[tuple[int, int], str] = {}
        for key, job in jobs.items():
            if (kept := self._recall(job)) is not None:
                answers[key] = kept
        # Longest first: prompts of like length are prefilled together, and no long one is left for the end.
        missing = sorted((key for key in jobs if key not in answers), key=lambda k: -len(jobs[k].request.prompt_ids))
        self.report.start(len(jobs), finished=len(answers))
        try:
            for index, result in self._engine.generate([jobs[key].request for key in missing]):
                job = jobs[missing[index]]
                text = _cut(self.tok_decode(result.token_ids), job.generation.until)
                answers[missing[index]] = text
                self._keep(job, text)
                self.report.add(
                    result,
                    text,
                    prompt_tokens=len(job.request.prompt_ids),
                    task=job.instance.task_name,
                    document=job.instance.doc_id,
                    repeat=job.repeat,
                )
        finally:
            self.report.stop(self._engine.peak_memory_bytes())
        return [answers[key] for key in self._keys(requests)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Not answered: see the error."""
        raise UserError(
            f"task {requests[0].task_name!r} asks for log-likelihoods, which --model sdar does not compute yet. "
            "It answers generative tasks (output_type generate_until), such as gsm8k_sdar."
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not answered: see the error."""
        self.loglikelihood(requests)
        return []

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood refuses before this")

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
                "decoding": self._default.decoding.as_dict() | {"max_gen_toks": self._default.max_gen_toks},
                **self._engine.info,
                "run": self.report.as_dict(),
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
        differing = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if differing:
            changes = "; ".join(f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}" for name in differing)
            raise UserError(
                f"--use_cache: {cache.filename} was made with other settings ({changes}). "
                "Run with those settings, give another path, or delete the file."
            )

    def _fingerprint(self) -> dict[str, Any]:
        """All that changes answers beside what the harness's keys hold."""
        decoding = self._default.decoding.as_dict()
        return {
            "sdar_lm_eval": sdar_lm_eval.__version__,
            "engine": self.ENGINE,
            "checkpoint": self.checkpoint.fingerprint,
            "dtype": self._engine.info["dtype"],
            "max_length": self._max_length,
            "chat_template": self._template_mode,
            "seed": self._seed,
            **{name: decoding[name] for name in DECODING_SETTINGS},
            "max_gen_toks": self._default.max_gen_toks,
            "until": list(self._default.until),
        }

    def _keep(self, job: _Job, text: str) -> None:
        self.cache_hook.add_partial("generate_until", job.instance.args, text)
        if job.generation.do_sample and self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict[_sampled_key(job)] = text

    def _recall(self, job: _Job) -> str | None:
        """A sampled answer of an earlier run with this cache.

        The harness never reads sampled answers back, since repeats share a key; ours are keyed by seed, document and
        repeat, so the answer that is read is the one that would be drawn again.
        """
        cache = self.cache_hook.dbdict
        if not job.generation.do_sample or cache is None:
            return None
        key = _sampled_key(job)
        return str(cache[key]) if key in cache else None

    # Requests

    @staticmethod
    def _keys(requests: Sequence[Any]) -> list[tuple[int, int]]:
        """(identity, repeat) of each request: the harness gives K repeats as the same Instance, K times.

        On several ranks it also pads with copies of the last one; those count as its repeats over again, so they get the
        same answers and cost nothing.
        """
        seen: collections.Counter[int] = collections.Counter()
        keys = []
        for instance in requests:
            keys.append((id(instance), seen[id(instance)] % max(instance.repeats or 1, 1)))
            seen[id(instance)] += 1
        return keys

    def _jobs(self, requests: Sequence[Any]) -> dict[tuple[int, int], _Job]:
        jobs = {}
        truncated = 0
        for key, instance in zip(self._keys(requests), requests, strict=True):
            if key in jobs:
                continue
            context, gen_kwargs = instance.args[:2]
            generation = read_generation(gen_kwargs, self._settings)
            room = self._room_for_prompt(generation.max_gen_toks)
            ids = self._encode_prompt(context)
            if len(ids) > room:
                truncated += 1
                ids = ids[-room:]
            jobs[key] = _Job(instance, key[1], generation, self._request(ids, generation, instance, key[1]))
        if truncated:
            logger.warning(
                "%d of %d prompts are longer than max_length - max_gen_toks allows; they lost their beginning.",
                truncated,
                len(jobs),
            )
        return jobs

    def _request(self, ids: list[int], generation: Generation, instance: Any, repeat: int) -> GenerationRequest:
        single, several = set(), []
        for text in generation.until:
            tokens = self.tok_encode(text, add_special_tokens=False)
            # A special token has no text in the answer, so only its id can stop there.
            if len(tokens) == 1 and tokens[0] in self.tokenizer.all_special_ids:
                single.add(tokens[0])
            else:
                several.append(text)
        return GenerationRequest(
            prompt_ids=tuple(ids),
            max_new_tokens=generation.max_gen_toks,
            decoding=generation.decoding,
            stop_ids=frozenset(self.checkpoint.stop_ids) | single,
            stop_strings=tuple(several),
            seed=_seed_of(self._seed, instance.task_name, instance.args[0], repeat),
            record_steps=self._tracing,
        )

    def _encode_prompt(self, context: str) -> list[int]:
        if self._template_mode != "off" and self._has_template and not self._harness_templates:
            opening = self._render([{"role": "user", "content": ""}]).split("user", 1)[0]
            if not (opening and opening in context):
                if not self._said_template:
                    self._said_template = True
                    logger.info(
                        "Prompts are put into the checkpoint's chat template as one user turn (chat_template=%s); "
                        "--apply_chat_template lets the harness do it, chat_template=off leaves them as they are.",
                        self._template_mode,
                    )
                context = self._render([{"role": "user", "content": context}])
            return self.tok_encode(context, add_special_tokens=False)
        if not context:
            return [self.prefix_token_id]
        return self.tok_encode(context, add_special_tokens=False if self._harness_templates else None)

    def _room_for_prompt(self, max_gen_toks: int) -> int:
        room = self._max_length - max_gen_toks
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_gen_toks} must be below max_length={self._max_length}, to leave room for a prompt. "
                f"Lower max_gen_toks or raise max_length (the checkpoint allows {self.checkpoint.max_length})."
            )
        return room

    # Ranks

    def all_gather(self, tensor: Any) -> Any:
        """Concatenate each rank's tensor."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect each rank's object on rank `dst`."""
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._ranks.barrier()

    def _device_of_rank(self, device: str) -> str:
        """A GPU for each rank of a machine, where the user named none."""
        if self._world_size > 1 and device in ("auto", "cuda"):
            import torch

            if torch.cuda.is_available():
                return f"cuda:{self._ranks.local_rank % torch.cuda.device_count()}"
        return device

    def _warn_of_block_length(self, block_length: Any) -> None:
        if int(to_number("block_length", block_length, whole=True)) != self.checkpoint.block_length:
            logger.warning(
                "block_length=%s, but checkpoint %r was trained with %d; answers will be worse.",
                block_length,
                self.checkpoint.name,
                self.checkpoint.block_length,
            )

    def _describe(self) -> str:
        info = self._engine.info
        decoding = ", ".join(f"{name}={value}" for name, value in self._default.decoding.as_dict().items())
        return (
            f"{self.checkpoint.name} on the {self.ENGINE} engine ({info['device']}, {info['dtype']}, up to "
            f"{info['max_active']} sequences at once); unless a task says otherwise: {decoding}, "
            f"max_gen_toks={self._default.max_gen_toks}"
        )


def _cut(text: str, until: Sequence[str]) -> str:
    """Text before the earliest of the stop strings."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]


def _seed_of(seed: int, task: str | None, context: str, repeat: int) -> int:
    """A request's seed, from what it is and not from where it stands: the same with --limit and on any rank."""
    digest = hashlib.sha256(json.dumps([seed, task, context, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _sampled_key(job: _Job) -> str:
    digest = hashlib.sha256(json.dumps([job.instance.args, job.request.seed], default=str).encode()).hexdigest()
    return f"sdar_lm_eval/sampled/{digest}"


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    # `on` and `off` may have become booleans on their way.
    text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if text not in allowed:
        raise UserError(f"{name}={value!r} is unknown; choose {', '.join(allowed)}.")
    return str(text)


def _max_active(arguments: Mapping[str, Any]) -> int | None:
    if "max_active" in arguments:
        return int(to_number("max_active", arguments["max_active"], whole=True))
    batch_size = arguments.get("batch_size", 1)
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        return None
    number = int(to_number("batch_size", batch_size, whole=True))
    return number if number > 1 else None
