"""The lm_eval model: a request's way from the harness to an engine and back.

One class for every engine: it owes the harness its contract (order, stored answers, truncation, chat template, ranks),
and the engine owes it tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lm_eval.evaluator
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

import sdar_lm_eval
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import LikelihoodConfig
from sdar_lm_eval.engines.registry import ENGINES, make_engine
from sdar_lm_eval.lm.answers import AnswerFolder, expanded
from sdar_lm_eval.lm.evaluation import Evaluation, TaskRequests, facts_of_evaluation, watch
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.likelihoods import Kind, Likelihoods
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.ranks import Ranks
from sdar_lm_eval.lm.rounds import Rounds
from sdar_lm_eval.lm.store import CacheFile, Place, Store, bypass, check_cache
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.trace import Trace
from sdar_lm_eval.revision import ANSWER_REVISION
from sdar_lm_eval.settings import ModelSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sdar_lm_eval.settings import NativeArguments

logger = logging.getLogger(__name__)
# Our messages go where lm_eval's go, at its verbosity.
logging.getLogger("sdar_lm_eval").parent = logging.getLogger("lm_eval")

DEFAULT_CHECKPOINT = "JetLM/SDAR-4B-Chat"
DEFAULT_SEED = 1234  # the harness's own for torch
SAME_ON_ALL_RANKS = ("sdar_lm_eval.checkpoint", "sdar_lm_eval.settings", "sdar_lm_eval.lm.jobs")
"""Loggers whose messages rank 0 says for all."""


class SDARLM(TemplateLM):
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
        reproducible: answers are the same to the bit in any batch (default: up to rounding); needs the kernels.
        share_prefixes: prompts that begin alike share the KV of that beginning (default; false: for comparison).
        seed: of sampled answers; each draws by (seed, task, prompt, repeat), whatever else is in the batch. Default:
            the third of lm_eval's `--seed`.
        chat_template: auto (prompts of generating tasks go into the checkpoint's chat template, where it has one, as by
            `--apply_chat_template`), on (the same, and an error where there is none), off. Log-likelihoods are of the
            text as it comes, unless `--apply_chat_template` is given.
        trace: file that gets a JSON line for each finished request (report/trace.py); a run and a rank has its own.
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
    watched: ClassVar[bool] = True

    def __init__(self, pretrained: str = DEFAULT_CHECKPOINT, **arguments: Unpack[NativeArguments]) -> None:
        super().__init__()
        started = time.perf_counter()
        settings = ModelSettings.read(pretrained, arguments, self.ENGINE)
        watch(lm_eval.evaluator)

        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.world_size
        # What lm_eval up to 0.4.12 calls in the place of `all_gather` and `barrier`.
        self.accelerator = types.SimpleNamespace(gather=self.all_gather, wait_for_everyone=self.barrier)
        if self._rank > 0:
            logging.getLogger("sdar_lm_eval").setLevel(logging.ERROR)  # rank 0 says it for all

        self.checkpoint = Checkpoint.open(settings.pretrained, settings.revision)
        self.tokenizer = self.checkpoint.tokenizer
        self._template_mode, self._seed = settings.chat_template, settings.seed
        self._prompts = Prompts(self.checkpoint, settings.chat_template)
        alone = self._world_size == 1
        self._jobs = Jobs(self.checkpoint, self._prompts, settings.decoding, settings.max_length, alone=alone)
        self._likelihoods = Likelihoods(self.checkpoint, self._prompts, self._jobs)
        self._likelihood = LikelihoodConfig(
            method=settings.likelihood,
            mc_samples=settings.mc_samples or LikelihoodConfig.mc_samples,
            block_length=self._jobs.default.decoding.block_length,
            seed=DEFAULT_SEED if settings.seed is None else settings.seed,
        )
        self._warn(settings)

        self._evaluation = Evaluation(seed=DEFAULT_SEED if settings.seed is None else settings.seed)
        self._all_ranks = [self._evaluation]
        trace = None
        if settings.trace is not None:  # refused before anything is loaded
            trace = Trace(expanded(Path(f"{settings.trace}{'' if alone else f'.rank{self._rank}'}")), self._facts)
        self._engine = make_engine(
            self.ENGINE,
            self.checkpoint,
            device=self._device_of_rank(settings.device),
            dtype=settings.dtype,
            max_active=settings.max_active,
            **settings.engine,
        )
        self._device = self._engine.info.device
        if self._device == "cpu":
            self._ranks.share_cpu()
        self._rounds = Rounds(
            self._engine,
            self.ENGINE,
            jobs=self._jobs,
            likelihoods=self._likelihoods,
            prompts=self._prompts,
            decode=self.tok_decode,
            verbose=settings.verbose,
            alone=alone,
        )
        self._rounds.trace = trace
        self._cache_path: str | None = None
        self._answers = None
        if settings.answers is not None:
            self._answers = AnswerFolder(settings.answers, self._fingerprint(), self._facts)
        self._open_store()
        self._said_template = self._said_plain = False
        self._evaluation.counts.load_seconds = time.perf_counter() - started
        logger.info("%s", self._describe())
        if self._rank > 0:
            _speak_for_itself(self._rank)

    def close(self) -> None:
        """Close the store, the trace file and the engine, which gives its memory back; a second call does nothing."""
        self._rounds.store.close()
        if self._rounds.trace is not None:
            self._rounds.trace.close()
        self._engine.close()

    def __enter__(self) -> SDARLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    # What it learns of an evaluation (evaluation.py)

    @property
    def renders(self) -> bool:
        """Whether prompts of generating tasks go into the chat template where lm_eval's user did not ask for it."""
        return self._prompts.renders

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """Count from zero, sample by the harness's seed unless model_args have one, trace into another file."""
        load_seconds, first = self._evaluation.counts.load_seconds, not self._evaluation.counts.tasks
        self._begin(DEFAULT_SEED if seed is None else seed)
        if first:
            self._evaluation.counts.load_seconds = load_seconds
        self._prompts.choose(template)
        if not cached:  # the file is an earlier evaluation's
            self._cache_path = None
        self._open_store()  # which tries again what could not be written

    def _begin(self, seed: int) -> None:
        self._evaluation = Evaluation(seed=seed if self._seed is None else self._seed)
        self._all_ranks = [self._evaluation]
        self._likelihood = dataclasses.replace(self._likelihood, seed=self._evaluation.seed)
        if self._rounds.trace is not None:
            self._rounds.trace.begin_run()

    def evaluation_ends(self) -> None:
        """What comes now is of no evaluation."""
        self._evaluation.end()
        self._prompts.choose(None)

    def _current(self) -> Evaluation:
        """The evaluation that requests are part of; requests behind an evaluation's end begin their own account."""
        if self._evaluation.over:
            self._begin(DEFAULT_SEED)
        return self._evaluation

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """Learn what lm_eval knows of a task's requests."""
        self._evaluation.add(task, requests)
        self._evaluation.template_hash = self._prompts.template_hash
        if task.templated_by == "sdar_lm_eval" and not self._said_template and self._rank == 0:
            self._said_template = True
            logger.warning(
                "Prompts are put into the checkpoint's chat template, as by --apply_chat_template "
                "(chat_template=%s; chat_template=off leaves them as they are).",
                self._template_mode,
            )
        if task.templated_by is None and task.scored and self.renders and not self._said_plain and self._rank == 0:
            self._said_plain = True
            logger.warning(
                "Log-likelihoods are of the text as it comes, in no chat template (chat_template=%s is for generated "
                "answers); --apply_chat_template lets the harness apply it.",
                self._template_mode,
            )

    # What the harness asks for

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests; returns texts in their order, cut before the earliest `until`.

        Stores each finished answer at once, where a store is given. See `lm_eval.api.model.LM.generate_until`.

        Raises:
            UserError: a request's settings are unknown or out of range; raised before anything runs.
            EngineError: the engine stopped; the store, if any, has what finished.
            Interrupted: the user ended the run; the store, if any, has what finished.
        """
        own = [request for request in requests if not self._is_borrowed(request)]
        answers = iter(self._rounds.generate(own, self._current(), self._shows(disable_tqdm)))
        self._evaluation.template_hash = self._prompts.template_hash
        return ["" if self._is_borrowed(request) else next(answers) for request in requests]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihoods in nats, and whether greedy decoding gives the continuation.

        Contexts are taken as they come, in no chat template unless the harness applied it. Each finished score is
        stored at once. See `lm_eval.api.model.LM.loglikelihood`, and `sdar_lm_eval/likelihood.py`.

        Raises:
            UserError: the engine computes no log-likelihoods, or a continuation is too long; raised before anything
                runs.
            EngineError: the engine stopped; the store, if any, has what finished.
            Interrupted: the user ended the run; the store, if any, has what finished.
        """
        return self._score("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in nats, by the harness's rolling windows; errors as for `loglikelihood`.

        A window's context and scored tokens together are at most `max_length`.
        """
        return [log_likelihood for log_likelihood, _ in self._score("loglikelihood_rolling", requests, disable_tqdm)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score ((context, continuation), context ids, continuation ids), without store, trace or summary."""
        pieces = [self._likelihoods.fit(context, continuation)[0] for _, context, continuation in requests]
        results = dict(self._rounds.scorer("a caller").score(pieces, self._likelihood))
        return [(results[i].log_likelihood, results[i].is_greedy) for i in range(len(pieces))]

    def _score(self, kind: Kind, requests: Sequence[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
        own = [request for request in requests if not self._is_borrowed(request)]
        show = self._shows(disable_tqdm)
        scores = iter(self._rounds.score(kind, own, self._current(), self._likelihood, show))
        return [(0.0, False) if self._is_borrowed(request) else next(scores) for request in requests]

    def _shows(self, disable_tqdm: bool) -> bool:
        return self._rank == 0 and not disable_tqdm

    def _is_borrowed(self, request: Instance) -> bool:
        """Whether nobody reads the answer: the request is for a document of another rank (evaluation.py)."""
        return self._evaluation.task_of(request).borrowed

    # Stored answers

    def check_cache(self, path: str) -> None:
        """Refuse a file of `--use_cache` that cannot be used, before the harness opens it.

        Raises:
            UserError: says why.
        """
        check_cache(path)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's cache file; what is read from it and written to it goes by keys of our own.

        Raises:
            UserError: the file cannot be used.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            self._cache_path = bypass(cache_hook.dbdict)
            self._open_store()

    def _open_store(self) -> None:
        places: list[Place] = []
        if self._cache_path is not None:
            places.append(CacheFile(self._cache_path, self._fingerprint()))
        if self._answers is not None:
            places.append(self._answers)
        self._rounds.store = Store(places)

    def _fingerprint(self) -> dict[str, Any]:
        """All that changes answers beside what their keys hold."""
        return {
            "revision": ANSWER_REVISION,
            "engine": self.ENGINE,
            "engine_version": self._engine.info.engine_version,
            "checkpoint": self.checkpoint.fingerprint,
            "dtype": self._engine.info.dtype,
        }

    # Facts for the results file

    @property
    def counts(self) -> Counts:
        """What this process computed in the current evaluation."""
        return self._evaluation.counts

    def get_model_info(self) -> dict[str, Any]:
        """Facts for `results["config"]`: on the model, and on what the last evaluation did."""
        return {
            "model_revision": self.checkpoint.revision,
            "model_dtype": self._engine.info.dtype,
            "sdar_lm_eval": self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "version": sdar_lm_eval.__version__,
            "answer_revision": ANSWER_REVISION,
            "pretrained": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "checkpoint_fingerprint": self.checkpoint.fingerprint,
            "mask_token_id": self.checkpoint.mask_token_id,
            "block_size": self.checkpoint.block_length,
            "stop_ids": list(self.checkpoint.stop_ids),
            "max_length": self._jobs.max_length,
            "seed": self._evaluation.seed,
            "chat_template": self._template_mode,
            "ranks": self._world_size,
            "decoding": self._jobs.default.as_dict(),
            **self._likelihood.as_dict(),
            **self._engine.info.as_dict(),
            **facts_of_evaluation(self._all_ranks),
        }

    def _describe(self) -> str:
        info = self._engine.info
        settings = ", ".join(f"{name}={value}" for name, value in self._jobs.default.as_dict().items())
        return (
            f"{self.checkpoint.name} on the {self.ENGINE} engine ({info.device}, {info.dtype}, up to "
            f"{info.max_active} sequences at once); unless a task says otherwise: {settings}"
        )

    def _warn(self, settings: ModelSettings) -> None:
        """Warn of settings without effect, and of those that go beyond what the checkpoint was trained for."""
        if settings.mc_samples is not None and self._likelihood.method == "chain":
            logger.warning("mc_samples=%s has no effect: likelihood=chain samples nothing.", settings.mc_samples)
        if settings.limits_length:  # else each task says how long its answers are
            self._jobs.room_for_prompt(self._jobs.default.max_gen_toks)
        self._jobs.warn_of_block_length(self._jobs.default.decoding.block_length)
        if self.max_length > self.checkpoint.max_length:
            logger.warning(
                "max_length=%d, but checkpoint %r was trained for %d tokens; longer prompts get worse answers.",
                self.max_length,
                self.checkpoint.name,
                self.checkpoint.max_length,
            )

    # Text and tokens

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._jobs.max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a request does not say."""
        return self._jobs.default.max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text, or a token that ends answers where it names none."""
        return self._jobs.eot_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty prompt: the beginning of text where the tokenizer has one, else its end."""
        return self._jobs.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Key of the tokenizer and the template in lm_eval's cache of built requests."""
        return f"{self.checkpoint.name.replace('/', '__')}-{self._prompts.template_hash}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize; by default special tokens are added, unless the text is rendered or begins with the BOS."""
        return self._prompts.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template's text: of the name that the user gave, or the default one; None where there is none.

        Raises:
            UserError: no template of that name.
        """
        return self._prompts.template_text(chat_template) if chat_template else None

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return self.checkpoint.decode(tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt, its last message is left open to be continued.

        Raises:
            UserError: the checkpoint has no chat template, or the template refuses the conversation.
        """
        return self._prompts.render(chat_history, add_generation_prompt)

    # Ranks

    @property
    def device(self) -> str:
        """Where the engine runs."""
        return self._device

    def all_gather(self, tensor: Any) -> Any:
        """Concatenate each rank's tensor."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect each rank's object on rank `dst`: of tasks with a borrowed document, nothing."""
        if isinstance(obj, dict):
            borrowed = {task.name for task in self._evaluation.tasks.values() if task.borrowed}
            obj = {task: _emptied(found) if task in borrowed else found for task, found in obj.items()}
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all ranks. The harness does so after each kind of request; rank 0 learns what the others did."""
        evaluations = self._ranks.gather_object(self._evaluation)
        if evaluations is not None:
            self._all_ranks = evaluations
            told = Counts.of_ranks([evaluation.counts for evaluation in evaluations])
            logger.info("%d ranks: %s", self._world_size, told)
        self._ranks.barrier()

    def _device_of_rank(self, device: str) -> str:
        """A GPU for each rank of a machine, where the user named none."""
        if self._world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self._ranks.local_rank % torch.cuda.device_count()}"
        return device


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


def __getattr__(name: str) -> type[SDARLM]:
    """The lm_eval model of an engine that the registry names and nobody has written a class for."""
    for spec in ENGINES.values():
        if spec.lm == f"{__name__}:{name}":
            return type(name, (SDARLM,), {"ENGINE": spec.name, "__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _speak_for_itself(rank: int) -> None:
    """Have a rank above 0 say what only it knows, marked by its number."""
    logging.getLogger("sdar_lm_eval").setLevel(logging.WARNING)
    for name in SAME_ON_ALL_RANKS:
        logging.getLogger(name).setLevel(logging.ERROR)

    def mark(record: logging.LogRecord) -> bool:
        if record.name.startswith("sdar_lm_eval") and not hasattr(record, "rank"):
            record.rank = rank
            record.msg = f"rank {rank}: {record.msg}"
        return True

    for handler in (*logging.getLogger("lm_eval").handlers, *logging.getLogger().handlers):
        handler.addFilter(mark)


def _emptied(found: Any) -> Any:
    """A task's samples, or its metrics by name, without any values."""
    return {name: [] for name in found} if isinstance(found, dict) else []
