"""Harness requests -> engine requests, each with its settings, seed and key; copies of a request become one."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lm_eval.api.instance import Instance

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import in_words
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.hashing import seed_from
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import Record, differences, fields_of, key_of
from sdar_lm_eval.lm.task_requests import TaskRequests, TemplatedBy, repeats_of
from sdar_lm_eval.settings import Generation, check_gen_kwargs, read_generation, warn_of_idle_knobs
from sdar_lm_eval.spellings import canonical
from sdar_lm_eval.thinking import Decode, Thinking, Thought, read, read_text

logger = logging.getLogger(__name__)

JobId = tuple[int, int]
"""The `id()` of an Instance, and the repeat."""

TaskOf = Callable[[Instance], TaskRequests]
"""Returns a request's task."""


@dataclass(frozen=True)
class Job:
    """One answer to be made.

    Attributes:
        instance: the harness's request.
        task: the task's name.
        document: the document's index in the data set.
        repeat: the answer's number among the document's, from 0. A deterministic answer is made once, whatever the
            task's repeats. A document with several requests has the repeats of its first request first.
        prompt: the text that is tokenized.
        templated_by: who put the prompt into the chat template; None where nobody did.
        request: the request to the engine.
        until: the answer is cut before the earliest of these texts.
        key: the answer's key in the store.
    """

    instance: Instance
    task: str
    document: int
    repeat: int
    prompt: str
    templated_by: TemplatedBy | None
    request: GenerationRequest
    until: tuple[str, ...]
    key: str

    @property
    def name(self) -> dict[str, str | int]:
        """Task, document and repeat, as stored answers and traces have them."""
        return {"task": self.task, "document": self.document, "repeat": self.repeat}

    def read(self, token_ids: Sequence[int], decode: Decode) -> tuple[Thought | None, str]:
        """An answer's thought, if it has one, and the text that is scored: behind the thought, before `until`."""
        thought, text = read(token_ids, self.request.thinking, decode)
        return thought, self._cut(text)

    def recall(self, record: Record) -> tuple[Thought | None, str] | None:
        """Return the thought and the text of a stored answer; None where the answer has to be made again.

        A version that knew no thoughts stored the whole answer as the text. A record of that version has no thought,
        and a thought in its text. A stop string may have ended that answer within the thought.
        """
        if "thought" in record:
            return Thought(record["thought"], record["thought_ended"]), record["text"]
        if self.request.thinking is None:
            return None, record["text"]
        thought, text = read_text(record["text"], self.request.thinking)
        if thought is not None and self.request.stop_strings:
            return None
        return thought, self._cut(text)

    def _cut(self, text: str) -> str:
        """The text before the earliest of `until`."""
        return text[: min((index for stop in self.until if (index := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Round:
    """What one call of the harness asks for.

    Attributes:
        order: for each request of the call, its job.
        jobs: id -> job; there are fewer jobs than requests where one answer serves several.
        truncated: number of prompts that lost their beginning.
        settings: task -> the settings that its answers are made with; several where documents have settings of their
            own.
    """

    order: list[JobId]
    jobs: dict[JobId, Job]
    truncated: int
    settings: dict[str, list[Generation]]

    def longest_first(self, ids: Iterable[JobId]) -> list[JobId]:
        """Return jobs in the order in which engines run them.

        Prompts of similar length are then prefilled together, and a long one does not run alone at the end.
        """
        return sorted(ids, key=lambda job_id: -len(self.jobs[job_id].request.prompt_ids))

    def warn_of_truncated(self) -> None:
        """Warn of prompts that lost their beginning."""
        if self.truncated:
            logger.warning(
                "%d of %d prompts are longer than max_length - max_gen_toks, and lost their beginning.",
                self.truncated,
                len(self.jobs),
            )


@dataclass(frozen=True)
class _TaskSettings:
    """Settings that all requests of a task with the same gen_kwargs share."""

    generation: Generation
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """An answer that the harness asks for: which repeat of which request.

    Attributes:
        twins: numbers of earlier requests with the same prompt that draw other tokens: of documents with the same
            content, and of the same document.
    """

    instance: Instance
    repeat: int
    task: TaskRequests
    settings: _TaskSettings
    twins: tuple[int, int]


class Jobs:
    """Makes jobs of the harness's requests.

    Args:
        checkpoint: has the tokens that end an answer, and the block length.
        prompts: makes the prompts' tokens.
        given: the decoding settings in model_args; they override a task's published decoding.
        max_length: most tokens of prompt and answer; None: what the checkpoint allows.
    """

    def __init__(
        self, checkpoint: Checkpoint, prompts: Prompts, given: Mapping[str, object], max_length: int | None
    ) -> None:
        self._thoughts = prompts.thoughts
        self._checkpoint, self._prompts = checkpoint, prompts
        self._told: set[tuple[str, object]] = set()  # what the log has: the kind of message, and what it is about
        self._given = dict(given)
        self.max_length = checkpoint.max_length if max_length is None else max_length
        self.stop_ids = checkpoint.stop_ids
        """Tokens that end every answer."""
        self.default = self.settings_of({})
        """The settings of a request whose task has none, and which has none itself."""

    def of(
        self,
        requests: Sequence[Instance],
        task_of: TaskOf,
        seed: int,
        record_steps: bool = False,
    ) -> Round:
        """Return the jobs of a call's requests.

        The harness gives K repeats as the same Instance, K times. It also pads a rank that has fewer documents than
        another with copies of its last Instance. Padding copies map to repeats, so each answer is computed once.

        Args:
            requests: one call's requests.
            task_of: returns a request's task.
            seed: the evaluation's seed.
            record_steps: whether the engine reports each token's step and confidence.

        Raises:
            UserError: a request's settings are unknown or out of range.
        """
        order: list[JobId] = []
        seen: collections.Counter[int] = collections.Counter()
        settings: dict[tuple[str, str], _TaskSettings] = {}
        asked: dict[JobId, _Asked] = {}
        alike: dict[tuple[str, int, str], list[int]] = {}  # the id() of each request of a document with equal prompts
        for instance in requests:
            task = task_of(instance)
            name = task.name, json.dumps(instance.args[1], default=str)
            if name not in settings:
                settings[name] = self._read_settings(instance.args[1], task)
            drawn = settings[name].generation.is_drawn
            repeat = seen[id(instance)] % repeats_of(instance) if drawn else 0
            seen[id(instance)] += 1
            order.append((id(instance), repeat))
            twins = 0, 0
            if drawn:
                document = task.document(instance)
                same = alike.setdefault((task.name, document, str(instance.args[0])), [])
                if id(instance) not in same:
                    same.append(id(instance))
                twins = task.copies().get(document, 0), same.index(id(instance))
            asked[order[-1]] = _Asked(instance, repeat, task, settings[name], twins)

        in_template = [self._in_template(each.instance, each.task) for each in asked.values()]
        prompts = [prompt for prompt, _ in in_template]
        ids_of = self._prompts.encode_prompts(prompts, [by is not None for _, by in in_template])
        jobs: dict[JobId, Job] = {}
        truncated = 0
        for (job_id, each), (prompt, by), ids in zip(asked.items(), in_template, ids_of, strict=True):
            generation = each.settings.generation
            room = self.room_for_prompt(generation.max_gen_toks)
            truncated += len(ids) > room
            request = self._request(each, prompt, ids[-room:], seed, record_steps)
            jobs[job_id] = Job(
                instance=each.instance,
                task=each.task.name,
                document=each.task.document(each.instance),
                repeat=each.instance.idx * repeats_of(each.instance) + each.repeat,
                prompt=prompt,
                templated_by=by,
                request=request,
                until=generation.until,
                key=_key_of(request, generation, self._thoughts.auto),
            )
        of_tasks: dict[str, list[Generation]] = {}
        for (task_name, _), its in settings.items():
            of_tasks.setdefault(task_name, []).append(its.generation)
        return Round(order, jobs, truncated, of_tasks)

    def _request(
        self, asked: _Asked, prompt: str, ids: Sequence[int], seed: int, record_steps: bool
    ) -> GenerationRequest:
        """What the engine gets; `ids` are the tokens of `prompt` that have room."""
        instance, settings = asked.instance, asked.settings
        drawn_by = [seed, instance.task_name, instance.args[0], asked.repeat]
        return GenerationRequest(
            prompt_ids=tuple(ids) or (self._prompts.prefix_token_id,),
            max_new_tokens=settings.generation.max_gen_toks,
            decoding=settings.generation.decoding,
            stop_ids=settings.stop_ids,
            stop_strings=settings.stop_strings,
            # From the request's content and not its position: the same with --limit and on any rank.
            seed=seed_from([*drawn_by, *asked.twins] if any(asked.twins) else drawn_by),
            record_steps=record_steps,
            thinking=self._thinking_behind(prompt),
            repetition=self._thoughts.repetition,
        )

    def settings_of(self, gen_kwargs: Mapping[str, object]) -> Generation:
        """The settings of a request whose task has none.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        return self._read_settings(gen_kwargs, TaskRequests(name="")).generation

    def check_limits(self, *, answers_limited: bool) -> None:
        """Warn of a block length and a max_length that the checkpoint was not trained for.

        Args:
            answers_limited: whether the user limits the length of answers; else each task does.

        Raises:
            UserError: the limit on answers leaves no room for a prompt.
        """
        if answers_limited:
            self.room_for_prompt(self.default.max_gen_toks)
        self._warn_of_block_length(self.default.decoding.block_length)
        if self.max_length > self._checkpoint.max_length:
            logger.warning(
                "max_length=%d, but checkpoint %r was trained for %d tokens; longer prompts get worse answers.",
                self.max_length,
                self._checkpoint.name,
                self._checkpoint.max_length,
            )

    def generation_of(self, gen_kwargs: Mapping[str, object], published: Mapping[str, object]) -> Generation:
        """Return the settings of a task's requests.

        Args:
            gen_kwargs: the task's, with the user's.
            published: the decoding of the task's published protocol.

        Raises:
            UserError: a name is unknown, or a value is out of range.
        """
        return read_generation(gen_kwargs, self._base(published))

    def _base(self, published: Mapping[str, object]) -> dict[str, object]:
        return {"block_length": self._checkpoint.block_length, **published, **self._given}

    def check(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """Check the settings of a task's generating requests before any task runs.

        Raises:
            UserError: a name is unknown, a value is out of range, no prompt has room, or answer_prefix has no place.
        """
        gen_kwargs = [request.args[1] for request in requests if request.request_type == "generate_until"]
        for distinct in {json.dumps(each, default=str): each for each in gen_kwargs}.values():
            self.room_for_prompt(check_gen_kwargs(distinct, self._base(task.decoding or {})))
        in_template = task.templated_by is not None or self._prompts.renders
        if gen_kwargs and self._thoughts.answer_prefix and task.begins_answers and not in_template:
            raise UserError(
                f"answer_prefix={self._thoughts.answer_prefix!r}: {task.name} begins its answers itself (gen_prefix). "
                "Outside of a chat template the prefix has no place. Leave answer_prefix out."
            )

    def room_for_prompt(self, max_gen_toks: int) -> int:
        """Most tokens of a prompt whose answer has at most `max_gen_toks`.

        Raises:
            UserError: no token of a prompt has room.
        """
        room = self.max_length - max_gen_toks
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_gen_toks} must be below max_length={self.max_length}, to leave room for a prompt. "
                f"Lower max_gen_toks or raise max_length (the checkpoint allows {self._checkpoint.max_length})."
            )
        return room

    def _warn_of_block_length(self, block_length: int) -> None:
        if block_length != self._checkpoint.block_length:
            logger.warning(
                "block_length=%d, but checkpoint %r was trained with %d; answers will be worse.",
                block_length,
                self._checkpoint.name,
                self._checkpoint.block_length,
            )

    def _read_settings(self, gen_kwargs: Mapping[str, object], task: TaskRequests) -> _TaskSettings:
        """Read a task's settings, and log what the user should know of them."""
        protocol = dict(task.decoding or {})
        generation = self.generation_of(gen_kwargs, protocol)
        decoding = generation.decoding
        if gen_kwargs and decoding.block_length != self.default.decoding.block_length:
            self._warn_of_block_length(decoding.block_length)
        is_published = decoding.remasking_strategy == protocol.get("remasking_strategy")
        why = f" is published for {task.name}" if is_published else " decodes"
        warn_of_idle_knobs({**self._given, **canonical(gen_kwargs)}, decoding, why)
        if protocol:
            self._tell_of_protocol(task.name, protocol, decoding.as_dict())
        self._warn_of_thoughts_limit(generation.max_gen_toks)
        # Decoding leaves special tokens out, so a special token ends an answer by its id alone.
        token_of = {text: self._checkpoint.special_token(text) for text in generation.until}
        stop_ids = {token for token in token_of.values() if token is not None}
        stop_strings = tuple(text for text, token in token_of.items() if token is None)
        self._warn_of_stop_strings(stop_strings)
        return _TaskSettings(generation, frozenset(self.stop_ids) | stop_ids, stop_strings)

    def _warn_of_stop_strings(self, stop_strings: Sequence[str]) -> None:
        for text in filter(self._checkpoint.has_special_tokens, stop_strings):
            if self._is_new("stop", text):
                logger.warning(
                    "until=%r ends no answer: the stop string contains a special token beside other text, and answers "
                    "are decoded without special tokens. Give the special token alone, or the other text alone.",
                    text,
                )

    def _is_new(self, kind: str, about: object) -> bool:
        """Whether the log has no message of this kind about this yet; from now on it has one."""
        count = len(self._told)
        self._told.add((kind, about))
        return len(self._told) > count

    def _warn_of_thoughts_limit(self, max_gen_toks: int) -> None:
        """Warn once of each max_gen_toks that leaves no room for an answer behind a thought of max_thinking_toks."""
        thinking = self._thoughts.thinking
        if thinking is None or thinking.max_tokens is None or not self._is_new("limit", max_gen_toks):
            return
        if thinking.max_tokens + len(thinking.end_ids) >= max_gen_toks:
            logger.warning(
                "max_thinking_toks=%d has no effect: max_gen_toks=%d leaves no room for an answer behind the thought.",
                thinking.max_tokens,
                max_gen_toks,
            )

    def _tell_of_protocol(self, task: str, published: Mapping[str, object], used: Mapping[str, object]) -> None:
        """Log once a task whether its answers are decoded as published."""
        if not self._is_new("protocol", task):
            return
        if changed := differences(published, {name: used[name] for name in published}):
            logger.warning("%s is not decoded as published: %s.", task, changed)
        else:
            told = "%s is decoded as published: %s. model_args and gen_kwargs override it."
            logger.info(told, task, in_words(published))

    def _thinking_behind(self, prompt: str) -> Thinking | None:
        """How the thought of an answer to this prompt is found."""
        return self._thoughts.opened if self._prompts.opens_thought(prompt) else self._thoughts.thinking

    def _in_template(self, instance: Instance, task: TaskRequests) -> tuple[str, TemplatedBy | None]:
        """A request's prompt, and who put it into the chat template."""
        context = str(instance.args[0])
        by = self._prompts.templated_by(task, context)
        if by is None and not self._prompts.renders:
            return context + self._thoughts.answer_prefix, by
        if by is not None:
            return context, by
        if self._is_new("user turns", None):
            logger.warning(
                "Each prompt that lm_eval did not put into the chat template becomes one user turn, system instruction "
                "included. Use lm_eval.simple_evaluate with a task of a YAML file, or apply_chat_template."
            )
        return self._prompts.as_user_turn(context), "sdar_lm_eval"


def _key_of(request: GenerationRequest, generation: Generation, auto: Thinking | None) -> str:
    """A hash of all that the answer's text depends on beside checkpoint and engine.

    Args:
        request: the request to the engine.
        generation: the request's settings.
        auto: the checkpoint's own rule for thoughts, which keys leave out.
    """
    content = fields_of(request) | {"until": generation.until, "stop_ids": sorted(request.stop_ids)}
    del content["record_steps"]
    if request.thinking == auto:
        del content["thinking"]
    if request.repetition is None:
        del content["repetition"]
    if not generation.is_drawn:
        del content["seed"]
    return key_of("generate_until", content)
