"""The Python API: a loaded checkpoint that answers prompts and scores texts.

    from sdar_lm_eval import load

    with load("demo") as model:
        answer = model.generate("What is 2 + 3?")
        answer.text, answer.denoising.steps, answer.denoising.confidences
        answers = model.generate(["…", "…"], strategy="sequential", max_gen_toks=64)
        model.loglikelihood([("2 + 3 =", " 5")])

Settings, prompts and log-likelihoods are those of an evaluation: `settings.py` reads the settings, `lm/prompts.py` and
`lm/jobs.py` make the engine's requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, overload

from lm_eval.api.instance import Instance

from sdar_lm_eval.arguments import DecodingArguments, JetEngineArguments, LMDeployArguments, NativeArguments
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT, DEFAULT_SEED
from sdar_lm_eval.engines.registry import engine_named, make_engine
from sdar_lm_eval.engines.types import (
    BlockStep,
    Engine,
    EngineInfo,
    GenerationRequest,
    GenerationResult,
    Scorer,
    Watch,
    Watchable,
)
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.lm.evaluation import TaskRequests
from sdar_lm_eval.lm.jobs import Job, Jobs
from sdar_lm_eval.lm.likelihoods import Likelihoods
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.settings import Generation, ModelSettings, to_whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

Message = Mapping[str, str]
"""A turn of a conversation: `{"role": "user", "content": "…"}`."""
Conversation = Sequence[Message]
Prompt = str | Conversation
"""A text, which becomes a user's turn where the chat template is in use, or a conversation."""

TASK = TaskRequests(name="sdar_lm_eval.load")
OF_EVALUATIONS = ("trace", "answers", "verbose")
"""model_args that only an evaluation has a use for."""


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt.

    Attributes:
        text: the answer's text, cut before the earliest `until`.
        prompt: the text that was tokenized: in the chat template, where that is in use.
        request: what the engine got.
        result: what the engine returned, with steps and confidences where the engine records them.
        denoising: how the answer was written.
    """

    text: str
    prompt: str
    request: GenerationRequest
    result: GenerationResult
    denoising: Denoising

    @property
    def finish_reason(self) -> str:
        """Why the answer ends: "stop" (a stop token or string) or "length"."""
        return self.result.finish_reason

    @property
    def forwards(self) -> int:
        """How many forwards denoised the answer's blocks or committed them."""
        return self.result.denoising_forwards + self.result.commit_forwards

    def __repr__(self) -> str:
        tokens = len(self.result.token_ids)
        return f"Answer({self.text!r}, {self.finish_reason!r}, {tokens} tokens, {self.forwards} forwards)"


class LoadedModel:
    """A checkpoint in an engine's memory; `load` makes it.

    Args:
        checkpoint: the opened checkpoint.
        engine: runs it.
        name: the engine's name in the registry.
        settings: what the user gave.
        prompts, jobs, likelihoods: make the engine's requests.

    Attributes:
        checkpoint: see above.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: Engine,
        name: str,
        *,
        settings: ModelSettings,
        prompts: Prompts,
        jobs: Jobs,
        likelihoods: Likelihoods,
    ) -> None:
        self.checkpoint = checkpoint
        self._engine, self._name, self._settings = engine, name, settings
        self._prompts, self._jobs, self._likelihoods = prompts, jobs, likelihoods

    @classmethod
    def open(cls, pretrained: str, engine: str, model_args: Mapping[str, object]) -> LoadedModel:
        """Do as `load`, with settings in a mapping."""
        engine_named(engine)
        settings = ModelSettings.read(pretrained, model_args, engine)
        for name in OF_EVALUATIONS:
            if getattr(settings, name):
                raise UserError(f"{name}={model_args[name]} is for evaluations. Leave {name} out, or run lm_eval.")
        checkpoint = Checkpoint.open(settings.pretrained, settings.revision)
        prompts = Prompts(checkpoint, settings.chat_template)
        jobs = Jobs(checkpoint, prompts, settings.decoding, settings.max_length, alone=True)
        jobs.check_limits(answers_limited=settings.limits_length)
        likelihood = settings.likelihood_config(jobs.default.decoding.block_length)
        opened = make_engine(
            engine,
            checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            max_active=settings.max_active,
            **settings.engine,
        )
        likelihoods = Likelihoods(checkpoint, prompts, jobs.max_length, likelihood)
        return cls(checkpoint, opened, engine, settings=settings, prompts=prompts, jobs=jobs, likelihoods=likelihoods)

    @property
    def info(self) -> EngineInfo:
        """Facts on the engine: its name, device, dtype, versions."""
        return self._engine.info

    @property
    def shows_steps(self) -> bool:
        """Whether the engine calls `watch`."""
        return isinstance(self._engine, Watchable)

    @property
    def seed(self) -> int:
        """The seed of sampled answers where a call gives none."""
        return DEFAULT_SEED if self._settings.seed is None else self._settings.seed

    def __repr__(self) -> str:
        info = self.info
        return f"LoadedModel({self.checkpoint.name!r}, {info.engine} on {info.device}, {info.dtype})"

    @overload
    def generate(
        self,
        prompts: str | list[dict[str, str]],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[DecodingArguments],
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[dict[str, str]]] | list[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[DecodingArguments],
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[DecodingArguments],
    ) -> Answer | list[Answer]:
        """Answer prompts.

        A text becomes a user's turn in the chat template, as an evaluation's prompts do; with chat_template=off it is
        sent as it is. A conversation whose last turn is the assistant's is continued.

        Args:
            prompts: a text, a conversation (a list of {"role": …, "content": …}), or a list of either.
            seed: seed of sampled answers; default: the model's. Each answer draws by (seed, prompt, and how often the
                list had the prompt before), so equal prompts get different sampled answers.
            watch: called with each block after each denoising step, where the engine shows them (`shows_steps`);
                `BlockStep.index` is the position in `prompts`.
            settings: as `--gen_kwargs`, in long or short form: strategy="sequential", temperature=1.0, …

        Returns:
            The answer to a lone prompt; the answers to a list of prompts, in order.

        Raises:
            UserError: a prompt or a setting cannot be used; raised before anything runs.
            EngineError: the engine stopped, or is closed. `stream` keeps what finished before.
        """
        several = _several(prompts)
        asked = [cast("Prompt", prompts)] if several is None else several
        answers = dict(self.stream(asked, seed=seed, watch=watch, **settings))
        return answers[0] if several is None else [answers[i] for i in range(len(several))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[DecodingArguments],
    ) -> Iterator[tuple[int, Answer]]:
        """Answer prompts; yield (position in `prompts`, answer) as each answer is finished.

        Arguments and errors are as for `generate`; answers that came before an EngineError stay valid.
        """
        texts = [self._text_of(prompt) for prompt in prompts]
        # The same prompt is an Instance with repeats, as in an evaluation: repeats have seeds of their own.
        repeats = Counter(texts)
        instances = {
            text: Instance("generate_until", {}, (text, dict(settings)), 0, metadata=(TASK.name, 0, count))
            for text, count in repeats.items()
        }
        asked = self._jobs.of(
            [instances[text] for text in texts],
            lambda _: TASK,
            self.seed if seed is None else to_whole("seed", seed),
            record_steps=self._settings.record_steps,
        )
        asked.warn_of_truncated()
        positions: dict[tuple[int, int], list[int]] = {}
        for position, job_id in enumerate(asked.order):
            positions.setdefault(job_id, []).append(position)
        # Longest first, as in an evaluation.
        ids = sorted(asked.jobs, key=lambda job_id: -len(asked.jobs[job_id].request.prompt_ids))
        requests = [asked.jobs[job_id].request for job_id in ids]
        self._engine.prepare(requests)
        if watch is not None and isinstance(self._engine, Watchable):
            first, told = [positions[job_id][0] for job_id in ids], watch

            def tell(step: BlockStep) -> None:
                told(dataclasses.replace(step, index=first[step.index]))

            results = self._engine.generate_watched(requests, tell)
        else:
            results = self._engine.generate(requests)
        with contextlib.closing(results):
            for index, result in results:
                answer = self._answer(asked.jobs[ids[index]], result)
                for position in positions[ids[index]]:
                    yield position, answer

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score continuations, as `SDARLM.loglikelihood` does; texts are taken as they are, in no chat template.

        Args:
            pairs: (context, continuation).

        Returns:
            For each pair the continuation's log-likelihood in nats, and whether greedy decoding gives the continuation.

        Raises:
            UserError: the engine computes no log-likelihoods, or a continuation is too long.
            EngineError: the engine stopped, or is closed.
        """
        if not isinstance(self._engine, Scorer):
            raise UserError(f"the {self._name} engine computes no log-likelihoods; load with engine='native'.")
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise UserError(f"{shown(pair)} is no pair of texts; give (context, continuation).")
        instances = [Instance("loglikelihood", {}, tuple(pair), 0, metadata=(TASK.name, 0, 1)) for pair in pairs]
        asked = self._likelihoods.of("loglikelihood", instances, lambda _: TASK, self.seed)
        pieces = [(job, part) for job in asked.jobs for part in range(len(job.pieces))]
        for index, result in self._engine.score([job.pieces[part] for job, part in pieces], asked.config):
            job, part = pieces[index]
            job.results[part] = result
        totals = [job.total() for job in asked.order]
        return [(total.log_likelihood, total.is_greedy) for total in totals]

    def settings_of(self, **settings: Unpack[DecodingArguments]) -> Generation:
        """The settings that `generate` would use: these, the model's, and defaults.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        return self._jobs.settings_of(settings)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token. Of several tokens that encode one character, the last one has the character."""
        return self._prompts.pieces(token_ids)

    def close(self) -> None:
        """Give the engine's memory back. Later calls are an EngineError; a second `close` does nothing."""
        self._engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text_of(self, prompt: Prompt) -> str:
        """The text to tokenize: in the chat template where it is in use.

        Raises:
            UserError: the prompt cannot be used.
        """
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"the prompt {shown(prompt)} is no Unicode text: {error.reason}.") from error
            return self._prompts.as_user_turn(prompt) if self._prompts.renders else prompt
        _check_conversation(prompt)
        if not self._prompts.renders:
            why = "chat_template=off" if self._prompts.has_template else "the checkpoint has none"
            raise UserError(f"a conversation needs the chat template, but {why}. Give the prompt as one text.")
        return self._prompts.render(prompt, add_generation_prompt=prompt[-1]["role"] != "assistant")

    def _answer(self, job: Job, result: GenerationResult) -> Answer:
        request = job.request
        denoising = Denoising(
            document=0,
            repeat=job.repeat,
            block_length=request.decoding.block_length,
            prompt_tokens=len(request.prompt_ids),
            token_ids=result.token_ids,
            texts=tuple(self.pieces(result.token_ids)),
            steps=result.unmasked_at,
            confidences=result.confidences,
            finish_reason=result.finish_reason,
            forwards={
                "prefill": result.prefill_forwards,
                "denoising": result.denoising_forwards,
                "commit": result.commit_forwards,
            },
            seconds=result.seconds,
        )
        text = job.cut(self.checkpoint.decode(result.token_ids))
        return Answer(text, job.prompt, request, result, denoising)


def _several(prompts: Prompt | Iterable[Prompt]) -> list[Prompt] | None:
    """The prompts of a list; None for a lone prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        return None
    listed = list(prompts)
    return None if listed and isinstance(listed[0], Mapping) else cast("list[Prompt]", listed)


def _check_conversation(prompt: Conversation) -> None:
    """Refuse what is no conversation.

    Raises:
        UserError: it has no turn, or a turn without a role and a content.
    """
    for message in prompt if isinstance(prompt, Sequence) and len(prompt) > 0 else [None]:
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in keys):
            raise UserError(
                f'{shown(prompt)} is no prompt: give a text, or a list of {{"role": "user", "content": "…"}}.'
            )


@overload
def load(
    pretrained: str = DEFAULT_CHECKPOINT,
    engine: Literal["native"] = "native",
    **model_args: Unpack[NativeArguments],
) -> LoadedModel: ...
@overload
def load(pretrained: str, engine: Literal["jetengine"], **model_args: Unpack[JetEngineArguments]) -> LoadedModel: ...
@overload
def load(pretrained: str, engine: Literal["lmdeploy"], **model_args: Unpack[LMDeployArguments]) -> LoadedModel: ...
@overload
def load(pretrained: str, engine: str, **model_args: object) -> LoadedModel: ...
def load(pretrained: str = DEFAULT_CHECKPOINT, engine: str = "native", **model_args: object) -> LoadedModel:
    """Open a checkpoint, and load it into an engine.

    Args:
        pretrained: hub id, folder, or `demo` (the bundled small checkpoint).
        engine: native, jetengine or lmdeploy.
        model_args: as `--model_args`, in long or short form (`sdar_lm_eval/arguments.py` lists them): device, dtype,
            seed, chat_template, …; decoding settings among them hold where a call gives no others.

    Raises:
        UserError: an unknown name, a value out of range, or a checkpoint that cannot be run.
        EngineError: a package or a GPU that the engine needs is missing.
    """
    return LoadedModel.open(pretrained, engine, model_args)
