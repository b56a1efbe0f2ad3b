"""The lm_eval model: a request's way from the harness to an engine and back.

One class, `SDARLM`, serves every engine. `SDARLM` keeps the harness's contract (order, stored answers, truncation, chat
template, ranks), and the engine computes tokens. The methods are in the order in which lm_eval calls the methods.
"""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lm_eval.evaluator
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM

from sdar_lm_eval.arguments import JetEngineArguments, LMDeployArguments, NativeArguments, arguments_of, takes
from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.lm.account import Account, put_thoughts_into
from sdar_lm_eval.lm.answers import AnswerFolder
from sdar_lm_eval.lm.denoising import DenoisingRecords, LinesOf
from sdar_lm_eval.lm.evaluation import Evaluation
from sdar_lm_eval.lm.facts import described, facts_of_model, fingerprint_of, settings_of_answers
from sdar_lm_eval.lm.frontend import Frontend
from sdar_lm_eval.lm.hooks import watch
from sdar_lm_eval.lm.likelihoods import Kind
from sdar_lm_eval.lm.ranks import Ranks
from sdar_lm_eval.lm.rounds import Rounds
from sdar_lm_eval.lm.store import CacheFile, Store, bypass, check_cache_file
from sdar_lm_eval.lm.task_requests import TaskRequests
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.trace import Trace
from sdar_lm_eval.settings import ModelSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack


logger = logging.getLogger(__name__)
# This package's messages go where lm_eval's go, at lm_eval's verbosity.
logging.getLogger("sdar_lm_eval").parent = logging.getLogger("lm_eval")


@takes(NativeArguments, DEFAULT_CHECKPOINT)
class SDARLM(TemplateLM):
    """`lm_eval --model sdar`: an SDAR checkpoint on the native engine.

    Args:
        pretrained: hub id, folder, or `demo` (the bundled small checkpoint).
        arguments: see below, and `NativeArguments`.

    Raises:
        UserError: an unknown argument, a value out of range, or a checkpoint that cannot be run.
    """

    ENGINE = "native"
    watched: ClassVar[bool] = True  # see `watched.Watched`

    def __init__(self, pretrained: str = DEFAULT_CHECKPOINT, **arguments: Unpack[NativeArguments]) -> None:
        super().__init__()
        started = time.perf_counter()
        settings = ModelSettings.read(pretrained, arguments, self.ENGINE)
        watch(lm_eval.evaluator)

        self.ranks = Ranks()
        self._rank, self._world_size = self.ranks.rank, self.ranks.world_size
        # lm_eval up to 0.4.12 calls these in the place of `all_gather` and `barrier`.
        self.accelerator = types.SimpleNamespace(gather=self.all_gather, wait_for_everyone=self.barrier)
        self.ranks.log_errors_only()

        self._frontend = frontend = Frontend.open(settings)
        self.checkpoint, self.tokenizer = frontend.checkpoint, frontend.checkpoint.tokenizer
        self._prompts, self.jobs = frontend.prompts, frontend.jobs
        self.renders = self._prompts.renders
        self.max_length, self.max_gen_toks = self.jobs.max_length, self.jobs.default.max_gen_toks

        self.evaluation = Evaluation(Account(settings.seed_or(None)))
        self._accounts = [self.evaluation.account]
        trace = None
        if settings.trace is not None:  # before the engine is loaded: a file that cannot be written is refused at once
            trace = Trace(self.ranks.path_of_rank(settings.trace), self._facts)
        self.engine = frontend.start(self.ENGINE, self.ranks.device_of_rank(settings.device))
        self._counted_before = self.engine.info.counts
        self._device = self.engine.info.device
        if self._device == "cpu":
            self.ranks.share_cpu()
        self.rounds = Rounds(
            self.engine,
            self.ENGINE,
            jobs=self.jobs,
            likelihoods=frontend.likelihoods,
            prompts=self._prompts,
            decode=self.tok_decode,
            trace=trace,
            record_steps=settings.record_steps,
            verbose=settings.verbose,
            alone=self._world_size == 1,
        )
        self._cache: CacheFile | None = None
        self._answers: AnswerFolder | None = None
        self.keep_answers(settings.answers)
        self.evaluation.account.counts.load_seconds = time.perf_counter() - started
        logger.info("%s", described(self.ENGINE, self.engine.info, self.checkpoint, self.jobs.default))
        self.ranks.log_own_warnings()
        self._require_same_on_all_ranks()

    # How the harness makes a model

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, object], additional_config: Mapping[str, object] | None = None
    ) -> SDARLM:
        """Make the model from `--model_args` and the harness's own arguments, which the user's model_args override."""
        # ModelSettings.read checks names and values.
        arguments: dict[str, Any] = {n: value for n, value in (additional_config or {}).items() if value is not None}
        if arguments.get("device") == "cuda:0":  # lm_eval's default, given or not
            del arguments["device"]
        return cls(**(arguments | dict(arg_dict)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, object] | None = None) -> SDARLM:
        """Make a model from "name=value,name=value"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # Stored answers

    check_cache = staticmethod(check_cache_file)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness's cache file, in which this package reads and writes records under keys of its own.

        Raises:
            UserError: the file cannot be used.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            self._cache = CacheFile(bypass(cache_hook.dbdict), self._fingerprint())
            self._open_store()

    def keep_answers(self, folder: Path | None) -> None:
        """Keep the answers of evaluations from now on in a folder (`answers.py`); None: in no folder.

        Raises:
            UserError: the folder cannot be made, read or written.
        """
        self.rounds.store.close()
        self._answers = None if folder is None else AnswerFolder(folder, self._fingerprint(), self._facts)
        self._open_store()

    def _open_store(self) -> None:
        self.rounds.store = Store([place for place in (self._cache, self._answers) if place is not None])

    def _fingerprint(self) -> dict[str, str | int | None]:
        return fingerprint_of(self.ENGINE, self.engine.info, self.checkpoint)

    # Evaluations and tasks (evaluation.py)

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """Count from zero, sample by lm_eval's seed unless model_args have one, and trace into another file."""
        self._begin(seed)
        self._prompts.choose(template)
        if not cached:  # the file is an earlier evaluation's
            self._cache = None
        self._open_store()  # a new store retries files that could not be written

    def _begin(self, seed: int | None = None) -> None:
        self.evaluation = self.evaluation.next(self._frontend.settings.seed_or(seed))
        self._counted_before = self.engine.info.counts
        self._accounts = [self.evaluation.account]
        self.rounds.begin_run()

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """Note what lm_eval knows of a task's requests.

        Raises:
            UserError: the model refuses the task's settings or log-likelihoods; no other task has run before.
        """
        self.jobs.check(task, requests)
        for request in requests:
            if request.request_type != "generate_until":
                self.rounds.scorer_of(request)
                break
        self._frontend.likelihoods.check(requests)
        self.evaluation.add(task, requests)
        self.evaluation.account.template_hash = self._prompts.template_hash
        if self._rank == 0:
            generates = any(request.request_type == "generate_until" for request in requests)
            self._prompts.warn_of_template(task, generates=generates)

    def evaluation_ends(self) -> None:
        """Forget the evaluation's requests and its chat template; later requests belong to no evaluation."""
        self.evaluation.end()
        self._prompts.choose(None)

    def denoising_lines(self) -> LinesOf:
        """Return a function: task -> the lines of its denoising file, of the last evaluation on all ranks."""
        records = DenoisingRecords.of_ranks([account.denoising for account in self._accounts])
        return lambda task: records.lines(task, self._prompts.pieces)

    def add_thoughts(self, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Put the thoughts of the last evaluation's answers, on all ranks, into lm_eval's samples."""
        put_thoughts_into(samples, self._accounts)

    # Text and tokens

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token; where it has none, the first token that ends answers."""
        return self._prompts.eot_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty prompt: the tokenizer's BOS; where it has none, its end of text."""
        return self._prompts.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Key of the tokenizer and the template in lm_eval's cache of built requests."""
        return f"{self.checkpoint.name.replace('/', '__')}-{self._prompts.template_hash}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenize; by default special tokens are added, unless the text is rendered or begins with the BOS."""
        return self._prompts.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return self.checkpoint.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template's text: of the name that the user gave, or the default one; None where there is none.

        Raises:
            UserError: no template of that name.
        """
        return self._prompts.template_text(chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, *, prefixed: bool = True
    ) -> str:
        """Render a conversation; without a generation prompt, its last message is left open to be continued.

        The setting answer_prefix follows the assistant's opening; not if `prefixed` is false, for log-likelihoods.

        Raises:
            UserError: the checkpoint has no chat template, or the template refuses the conversation.
        """
        return self._prompts.render(chat_history, add_generation_prompt, prefixed=prefixed)

    # Requests

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests; returns texts in their order, cut before the earliest `until`.

        Stores each finished answer immediately, where a store is given. See `lm_eval.api.model.LM.generate_until`.

        Raises:
            UserError: a request's settings are unknown or out of range; raised before anything runs.
            EngineError: the engine stopped; the store, if any, has what finished.
            Interrupted: the user ended the run; the store, if any, has what finished.
        """
        evaluation, show = self._current(), self._rank == 0 and not disable_tqdm
        return evaluation.answer_own(requests, lambda own: self.rounds.generate(own, evaluation, show), "")

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihoods in nats, and whether greedy decoding gives the continuation.

        Contexts are taken as they come, in no chat template unless the harness applied it. Each finished score is
        stored immediately. See `lm_eval.api.model.LM.loglikelihood`, and `sdar_lm_eval/likelihood.py`.

        Raises:
            UserError: the engine computes no log-likelihoods, a continuation is too long, or enable_thinking is true;
                raised before anything runs.
            EngineError, Interrupted: as `generate_until`.
        """
        return self._score("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in nats, by the harness's rolling windows; errors as for `loglikelihood`.

        A window's context and scored tokens together are at most `max_length`.
        """
        return [log_likelihood for log_likelihood, _ in self._score("loglikelihood_rolling", requests, disable_tqdm)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Score ((context, continuation), context ids, continuation ids), without store, trace or summary."""
        pairs = [(context_ids, continuation_ids) for _, context_ids, continuation_ids in requests]
        return self.rounds.score_tokens(pairs, self.evaluation.account.seed)

    def _score(self, kind: Kind, requests: Sequence[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
        evaluation, show = self._current(), self._rank == 0 and not disable_tqdm
        return evaluation.answer_own(requests, lambda own: self.rounds.score(kind, own, evaluation, show), (0.0, False))

    def _current(self) -> Evaluation:
        """The evaluation that requests belong to; requests after an evaluation's end have counts of their own."""
        if self.evaluation.over:
            self._begin()
        return self.evaluation

    # Ranks

    @property
    def device(self) -> str:
        """The engine's device."""
        return self._device

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate each rank's tensor."""
        return self.ranks.all_gather(tensor)

    def gather_object(self, obj: object, dst: int = 0) -> list[object] | None:
        """Collect the ranks' samples or metrics on rank `dst`, by document, without those of borrowed documents."""
        parts = self.ranks.gather_object(self.evaluation.without_borrowed(obj), dst)
        return None if parts is None else self.evaluation.in_document_order(parts)

    def barrier(self) -> None:
        """Wait for all ranks, and collect their counts on rank 0. lm_eval calls this after each kind of request."""
        accounts = self.ranks.gather_object(self._account())
        if accounts is not None:
            self._accounts = accounts
            counts = Counts.of_ranks([account.counts for account in accounts])
            logger.info("%d ranks: %s", self._world_size, counts)
        self.ranks.barrier()

    def _require_same_on_all_ranks(self) -> None:
        """Refuse ranks that would give other answers than rank 0.

        Raises:
            UserError: a rank has another setting, version, precision or checkpoint.
        """
        seed, thoughts = self.evaluation.account.seed, self._prompts.thoughts
        likelihood = self._frontend.likelihoods.config(seed)
        settings = settings_of_answers(self.jobs, likelihood, self._frontend.settings.chat_template, thoughts)
        default = {"thinking": dict(thoughts.given), "decoding": None, **self.jobs.default.as_dict()}
        # The ranks of a machine read the same files. So of several machines, one rank of each hashes the weights.
        hashes = not self.ranks.one_machine and self.ranks.local_rank == 0
        fingerprint = fingerprint_of(self.ENGINE, self.engine.info, self.checkpoint if hashes else None)
        self.ranks.require_same({**settings, **default, "seed": seed, **fingerprint})

    # Facts for the results file

    def _account(self) -> Account:
        """This process's account, with the work of the engine up to now."""
        account = self.evaluation.account
        account.of_engine = self.engine.info.counts
        account.of_engine.subtract(self._counted_before)
        return account

    @property
    def counts(self) -> Counts:
        """What this process computed in the current evaluation."""
        return self.evaluation.account.counts

    def get_model_info(self) -> dict[str, object]:
        """Facts for `results["config"]`: on the model, and on what the last evaluation did."""
        return {
            "model_revision": self.checkpoint.revision,
            "model_dtype": self.engine.info.dtype,
            "sdar_lm_eval": self._facts(),
        }

    def _facts(self) -> dict[str, object]:
        return facts_of_model(
            self.checkpoint,
            self.jobs,
            self._frontend.likelihoods.config(self.evaluation.account.seed),
            self.engine.info,
            chat_template=self._frontend.settings.chat_template,
            thoughts=self._prompts.thoughts,
            world_size=self._world_size,
            accounts=[self._account(), *self._accounts[1:]],
        )

    # Closing

    def close(self) -> None:
        """Close the store, the trace file and the engine, which gives its memory back; a second call does nothing."""
        self.rounds.close()
        self.engine.close()

    def __enter__(self) -> SDARLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@takes(JetEngineArguments, DEFAULT_CHECKPOINT)
class SDARJetEngineLM(SDARLM):
    """`lm_eval --model sdar-jetengine`: an SDAR checkpoint on JetEngine.

    Args:
        pretrained: as for `SDARLM`.
        arguments: see below, and `JetEngineArguments`.

    Raises:
        UserError: as `SDARLM`, and for what JetEngine cannot do.
        EngineError: JetEngine, something that it needs, or a GPU is missing.
    """

    ENGINE = "jetengine"


@takes(LMDeployArguments, DEFAULT_CHECKPOINT)
class SDARLMDeployLM(SDARLM):
    """`lm_eval --model sdar-lmdeploy`: an SDAR checkpoint on LMDeploy's PyTorch engine.

    Args:
        pretrained: as for `SDARLM`.
        arguments: see below, and `LMDeployArguments`.

    Raises:
        UserError: as `SDARLM`, and for what LMDeploy cannot do.
        EngineError: LMDeploy, something that it needs, or a GPU is missing.
    """

    ENGINE = "lmdeploy"


def __getattr__(name: str) -> type[SDARLM]:
    """The lm_eval model of an engine that the registry names, and that has no class in this module."""
    for spec in ENGINES.values():
        if spec.lm == f"{__name__}:{name}":
            about = f"`lm_eval --model {spec.model}`: an SDAR checkpoint on the engine {spec.name}."
            model = type(name, (SDARLM,), {"ENGINE": spec.name, "__module__": __name__, "__doc__": about})
            return takes(arguments_of(spec.name), DEFAULT_CHECKPOINT)(model)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
