"""The Python API: a loaded checkpoint that answers prompts and scores texts.

    from sdar_lm_eval import load

    with load("demo") as model:
        answer = model.generate("What is 2 + 3?")
        answer.text, answer.denoising.steps, answer.denoising.confidences
        answers = model.generate(["…", "…"], strategy="sequential", max_gen_toks=64)
        model.loglikelihood([("2 + 3 =", " 5")])

Settings, prompts and log-likelihoods are those of an evaluation: `settings.py` reads the settings, and `lm/prompts.py`
and `lm/jobs.py` make the engine's requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal, cast, overload

from lm_eval.api.instance import Instance

from sdar_lm_eval.chat_template import Message
from sdar_lm_eval.checks import checks_types, fits
from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT
from sdar_lm_eval.engines.registry import engine_named
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
from sdar_lm_eval.files import plain_text, shown
from sdar_lm_eval.lm.frontend import Frontend
from sdar_lm_eval.lm.jobs import Job, Round
from sdar_lm_eval.lm.task_requests import TaskRequests
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.settings import Generation, ModelSettings, to_whole
from sdar_lm_eval.thinking import Thinking, Thought

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sdar_lm_eval import arguments

    class Settings(arguments.DecodingArguments, arguments.OtherSpellings, total=False):
        """Decoding settings in long or short form."""

    class NativeSettings(arguments.NativeArguments, arguments.OtherSpellings, total=False):
        """The native engine's model_args in long or short form."""

    class JetEngineSettings(arguments.JetEngineArguments, arguments.OtherSpellings, total=False):
        """JetEngine's model_args in long or short form."""

    class LMDeploySettings(arguments.LMDeployArguments, arguments.OtherSpellings, total=False):
        """LMDeploy's model_args in long or short form."""


Conversation = Sequence[Message]
Prompt = str | Conversation
"""A conversation, or a text, of which the chat template makes a user's turn where it is in use."""

TASK = TaskRequests(name="sdar_lm_eval.load")
OF_EVALUATIONS = ("trace", "answers", "verbose")
"""model_args that only evaluations use."""


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt.

    Attributes:
        text: the answer's text behind its thought, cut before the earliest stop string (`until`).
        thought: the answer's thought; None: the answer has none.
        prompt: the text that was tokenized, rendered by the chat template where the template is in use.
        request: the engine's request.
        result: the engine's result, with steps and confidences where the engine records them.
        denoising: the answer's denoising record.
    """

    text: str
    thought: Thought | None
    prompt: str
    request: GenerationRequest
    result: GenerationResult
    denoising: Denoising

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop" (a stop token or string), "length" (the limit of new tokens), "repetition"."""
        return self.result.finish_reason

    @property
    def forwards(self) -> int:
        """Number of forwards that denoised or committed blocks of the answer."""
        return self.result.denoising_forwards + self.result.commit_forwards

    def __repr__(self) -> str:
        tokens = len(self.result.token_ids)
        return f"Answer({self.text!r}, {self.finish_reason!r}, {tokens} tokens, {self.forwards} forwards)"


class LoadedModel:
    """A checkpoint in an engine's memory. `load` makes one; `close`, or the end of a `with` block, frees the memory.

    Args:
        frontend: the checkpoint, the user's settings, and what makes the engine's requests.
        engine: the engine that runs the checkpoint.
        name: the engine's name in the registry.

    Attributes:
        checkpoint: the opened checkpoint.
    """

    def __init__(self, frontend: Frontend, engine: Engine, name: str) -> None:
        self.checkpoint, self._engine, self._name = frontend.checkpoint, engine, name
        self._settings, self._prompts, self._jobs = frontend.settings, frontend.prompts, frontend.jobs
        self._likelihoods = frontend.likelihoods

    @classmethod
    def open(cls, pretrained: str, engine: str, model_args: Mapping[str, object]) -> LoadedModel:
        """Return what `load` returns, with model_args in a mapping; errors are those of `load`."""
        engine_named(engine)
        settings = ModelSettings.read(pretrained, model_args, engine)
        for name in OF_EVALUATIONS:
            if getattr(settings, name):
                raise UserError(f"{name}={model_args[name]} is for evaluations. Leave {name} out, or run lm_eval.")
        frontend = Frontend.open(settings)
        return cls(frontend, frontend.start(engine, settings.device), engine)

    @property
    def info(self) -> EngineInfo:
        """Facts on the engine: its name, device, dtype, versions."""
        return self._engine.info

    @property
    def shows_steps(self) -> bool:
        """Whether the engine shows denoising steps, so that `watch` is called."""
        return isinstance(self._engine, Watchable)

    @property
    def seed(self) -> int:
        """The seed of sampled answers in calls that give no seed."""
        return self._settings.seed_or(None)

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
        **settings: Unpack[Settings],
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[dict[str, str]]] | list[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> Answer | list[Answer]:
        """Answer prompts.

        As in an evaluation, the chat template makes a user's turn of a text. With chat_template=off, or a checkpoint
        without a template, a text is sent unchanged. The answer continues a last turn that is the assistant's.

        Args:
            prompts: a text, a conversation (a list of {"role": …, "content": …}), or a list of either.
            seed: seed of sampled answers; None: the model's seed (`seed`). An answer depends on the seed, the prompt,
                and the number of equal prompts before it, so equal prompts get different sampled answers.
            watch: called with each block after each denoising step, where the engine shows steps (`shows_steps`);
                `BlockStep.index` is the position in `prompts`. None: nothing is called.
            settings: as `--gen_kwargs`, in long or short form: strategy="sequential", temperature=1.0, …

        Returns:
            The answer to a single prompt; the answers to a list of prompts, in the order of the list.

        Raises:
            UserError: a prompt or a setting cannot be used. Nothing was run.
            EngineError: the engine stopped, or is closed. Finished answers are lost; `stream` yields them before.
        """
        several = _several(prompts)
        asked = [cast("Prompt", prompts)] if several is None else several
        answers = dict(self.stream(asked, seed=seed, watch=watch, **settings))
        return answers[0] if several is None else [answers[i] for i in range(len(several))]

    @checks_types
    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[tuple[int, Answer]]:
        """Answer prompts; yield (position in `prompts`, answer) as each answer is finished.

        Arguments and errors are those of `generate`. Answers that were yielded before an EngineError are valid.
        """
        asked = self._asked(prompts, seed, settings)
        asked.warn_of_truncated()
        positions: dict[tuple[int, int], list[int]] = {}
        for position, job_id in enumerate(asked.order):
            positions.setdefault(job_id, []).append(position)
        ids = asked.longest_first(asked.jobs)
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

    @checks_types
    def prepare(self, prompts: Sequence[Prompt], **settings: Unpack[Settings]) -> None:
        """Allocate memory and compile kernels for these prompts, so that `generate` spends its time on answers only.

        Raises:
            UserError, EngineError: as `generate`.
        """
        jobs = self._asked(prompts, None, settings).jobs.values()
        self._engine.prepare([job.request for job in jobs])

    @checks_types
    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, as `SDARLM.loglikelihood` does, without the chat template.

        Args:
            pairs: (context, continuation).

        Returns:
            For each pair (log-likelihood of the continuation in nats, whether greedy decoding gives the continuation).

        Raises:
            UserError: the engine computes no log-likelihoods, or a continuation is too long.
            EngineError: the engine stopped, or is closed.
        """
        if not isinstance(self._engine, Scorer):
            raise UserError(f"the {self._name} engine computes no log-likelihoods; load with engine='native'.")
        pairs = list(pairs)  # an iterator can be read only once
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

    def settings_of(self, **settings: Unpack[Settings]) -> Generation:
        """Return the settings that `generate` would use: these, then the model's, then defaults.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        return self._jobs.settings_of(settings)

    def thinking_behind(self, prompt: Prompt, **settings: Unpack[Settings]) -> Thinking | None:
        """Return how the thought of an answer to this prompt is found; None: no answer has a thought.

        Raises:
            UserError: the prompt or a setting cannot be used.
        """
        (job,) = self._asked([prompt], None, settings).jobs.values()
        return job.request.thinking

    @checks_types
    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token. Of several tokens that encode one character, the last has the character.

        Raises:
            UserError: a token is no token id.
        """
        ids = list(map(operator.index, token_ids))
        with self.checkpoint.refusing_large_ids(ids):
            return self._prompts.pieces(ids)

    def close(self) -> None:
        """Free the engine's memory. Later calls raise EngineError; a second `close` does nothing."""
        self._engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, prompts: Sequence[Prompt], seed: int | None, settings: Mapping[str, object]) -> Round:
        """The jobs of prompts.

        Raises:
            UserError: a prompt or a setting cannot be used.
        """
        if isinstance(prompts, str):  # its characters would be the prompts
            raise UserError(f"{shown(prompts)} is one text, and a list of prompts is needed: give [text].")
        texts = [self._text_of(prompt) for prompt in prompts]
        # Equal prompts are one Instance with repeats, as in an evaluation, so that each repeat gets its own seed.
        repeats = Counter(texts)
        instances = {
            text: Instance("generate_until", {}, (text, dict(settings)), 0, metadata=(TASK.name, 0, count))
            for text, count in repeats.items()
        }
        return self._jobs.of(
            [instances[text] for text in texts],
            lambda _: TASK,
            self.seed if seed is None else to_whole("seed", seed),
            record_steps=self._settings.record_steps,
        )

    def _text_of(self, prompt: Prompt) -> str:
        """The text to tokenize, rendered by the chat template where the template is in use.

        Raises:
            UserError: the prompt cannot be used.
        """
        if isinstance(prompt, str):
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
            forwards=result.forwards,
            seconds=result.seconds,
            forced_tokens=result.forced_tokens,
        )
        thought, text = job.read(result.token_ids, self.checkpoint.decode)
        return Answer(text, thought, job.prompt, request, result, denoising)


def _several(prompts: Prompt | Iterable[Prompt]) -> list[Prompt] | None:
    """The prompts of a list; None for a single prompt."""
    if isinstance(prompts, str) or not fits(prompts, Sequence):
        return None
    listed = list(prompts)
    return None if listed and isinstance(listed[0], Mapping) else cast("list[Prompt]", listed)


def _check_conversation(prompt: Conversation) -> None:
    """Check a conversation.

    Raises:
        UserError: the conversation has no turn, or a turn without role and content.
    """
    for message in prompt if isinstance(prompt, Sequence) and len(prompt) > 0 else [None]:
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in keys):
            raise UserError(
                f'{shown(prompt)} is no prompt: give a text, or a list of {{"role": "user", "content": "…"}}.'
            )


@overload
def load(
    pretrained: str | PathLike[str] = DEFAULT_CHECKPOINT,
    engine: Literal["native"] = "native",
    **model_args: Unpack[NativeSettings],
) -> LoadedModel: ...
@overload
def load(
    pretrained: str | PathLike[str], engine: Literal["jetengine"], **model_args: Unpack[JetEngineSettings]
) -> LoadedModel: ...
@overload
def load(
    pretrained: str | PathLike[str], engine: Literal["lmdeploy"], **model_args: Unpack[LMDeploySettings]
) -> LoadedModel: ...
@overload
def load(pretrained: str | PathLike[str], engine: str, **model_args: object) -> LoadedModel: ...
@checks_types
def load(
    pretrained: str | PathLike[str] = DEFAULT_CHECKPOINT, engine: str = "native", **model_args: object
) -> LoadedModel:
    """Open a checkpoint, and load it into an engine.

    Args:
        pretrained: hub id, folder, or `demo` (the bundled small checkpoint).
        engine: native, jetengine or lmdeploy.
        model_args: as `--model_args`, in long or short form (`sdar_lm_eval/arguments.py` lists them): device, dtype,
            seed, chat_template, …. Decoding settings among them are the defaults of calls.

    Returns:
        The loaded model. Close it, or use it in a `with` block.

    Raises:
        UserError: an unknown name, a value out of range, or a checkpoint that cannot be run.
        EngineError: a package or a GPU that the engine needs is missing.
    """
    return LoadedModel.open(plain_text(pretrained), engine, model_args)
