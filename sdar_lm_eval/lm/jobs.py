"""Harness requests -> engine requests: each with its settings, seed and key; copies once."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import GenerationRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.evaluation import TaskRequests, TemplatedBy, differences
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import key_of
from sdar_lm_eval.settings import Generation, canonical, read_generation, warn_of_idle_knobs

logger = logging.getLogger(__name__)

JobId = tuple[int, int]
"""An Instance's identity, and the repeat."""


TaskOf = Callable[[Instance], TaskRequests]
"""What is known of a request's task."""


@dataclass(frozen=True)
class Job:
    """One answer to be made.

    Attributes:
        instance: the harness's.
        task: the task's name.
        document: its place in the data set.
        repeat: from 0; always 0 for an answer without chance.
        prompt: the text that is tokenized.
        templated_by: who put it into the chat template; None where nobody did.
        request: what the engine gets.
        until: the answer is cut before the earliest of these texts.
        key: what the answer is stored under.
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
    def name(self) -> dict[str, Any]:
        """Which request it is, as stored answers and traces name it."""
        return {"task": self.task, "document": self.document, "repeat": self.repeat}

    def cut(self, text: str) -> str:
        """The text before the earliest of `until`."""
        return text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Round:
    """What one call of the harness asks for.

    Attributes:
        order: for each request of the call, its job.
        jobs: by id; fewer than requests where one answer serves several.
        truncated: how many prompts lost their beginning.
        settings: task -> how its answers are made.
    """

    order: list[JobId]
    jobs: dict[JobId, Job]
    truncated: int
    settings: dict[str, Generation]


@dataclass(frozen=True)
class _Settings:
    """What all requests of a task with the same gen_kwargs share."""

    generation: Generation
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]


class Jobs:
    """Makes jobs of the harness's requests.

    Args:
        checkpoint: says which tokens end an answer, and its block length.
        prompts: the checkpoint's tokenizer and template.
        given: decoding settings that the user gave by model_args; they win over a task's published decoding.
        max_length: most tokens of prompt and answer; None: what the checkpoint allows.
        alone: whether the process has all cores to itself.
    """

    def __init__(
        self, checkpoint: Checkpoint, prompts: Prompts, given: Mapping[str, Any], max_length: int | None, alone: bool
    ) -> None:
        self._checkpoint, self._prompts, self._alone = checkpoint, prompts, alone
        self._said: set[str] = set()
        self._said_unknown = False
        self._given = dict(given)
        self.max_length = checkpoint.max_length if max_length is None else max_length
        self.stop_ids = checkpoint.stop_ids
        """Tokens that end every answer."""
        self.default = self._read({}, TaskRequests(name="")).generation
        """The settings of a request whose task says nothing."""

    def of(
        self,
        requests: Sequence[Instance],
        task_of: TaskOf,
        seed: int,
        record_steps: bool = False,
    ) -> Round:
        """Return the jobs of a call's requests.

        The harness gives K repeats as the same Instance, K times, and pads a rank that has fewer documents than another
        with copies of its last one. A copy counts as one of its repeats, so each answer is computed once.

        Args:
            requests: the call's.
            task_of: what is known of a request's task.
            seed: of the run.
            record_steps: have the engine report each token's step and confidence.

        Raises:
            UserError: a request's settings are unknown or out of range.
        """
        order: list[JobId] = []
        seen: collections.Counter[int] = collections.Counter()
        settings: dict[tuple[str, str], _Settings] = {}
        asked: dict[JobId, tuple[Instance, _Settings]] = {}
        for instance in requests:
            task = task_of(instance)
            name = task.name, json.dumps(instance.args[1], default=str)
            if name not in settings:
                settings[name] = self._read(instance.args[1], task)
            drawn = settings[name].generation.is_drawn
            repeat = seen[id(instance)] % max(instance.repeats or 1, 1) if drawn else 0
            seen[id(instance)] += 1
            order.append((id(instance), repeat))
            asked[order[-1]] = instance, settings[name]

        in_template = [self._in_template(instance, task_of(instance)) for instance, _ in asked.values()]
        prompts = [prompt for prompt, _ in in_template]
        ids_of = self._prompts.encode_prompts(prompts, [by is not None for _, by in in_template], self._alone)
        jobs: dict[JobId, Job] = {}
        truncated = 0
        for (job_id, (instance, own)), (prompt, by), ids in zip(asked.items(), in_template, ids_of, strict=True):
            generation, repeat = own.generation, job_id[1]
            room = self.room_for_prompt(generation.max_gen_toks)
            truncated += len(ids) > room
            request = GenerationRequest(
                prompt_ids=tuple(ids[-room:]) or (self.prefix_token_id,),
                max_new_tokens=generation.max_gen_toks,
                decoding=generation.decoding,
                stop_ids=own.stop_ids,
                stop_strings=own.stop_strings,
                seed=_seed_of(seed, instance.task_name, instance.args[0], repeat),
                record_steps=record_steps,
            )
            task = task_of(instance)
            jobs[job_id] = Job(
                instance=instance,
                task=task.name,
                document=task.document(instance),
                repeat=repeat,
                prompt=prompt,
                templated_by=by,
                request=request,
                until=generation.until,
                key=_key_of(request, generation),
            )
        return Round(order, jobs, truncated, {task: own.generation for (task, _), own in settings.items()})

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty prompt: the beginning of text where the tokenizer has one, else its end."""
        bos = self._prompts.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text, or a token that ends answers where it names none."""
        eos = self._prompts.tokenizer.eos_token_id
        return int(self._checkpoint.stop_ids[0] if eos is None else eos)

    def room_for_prompt(self, max_gen_toks: int) -> int:
        """Most tokens of a prompt whose answer may be this long.

        Raises:
            UserError: there is no room.
        """
        room = self.max_length - max_gen_toks
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_gen_toks} must be below max_length={self.max_length}, to leave room for a prompt. "
                f"Lower max_gen_toks or raise max_length (the checkpoint allows {self._checkpoint.max_length})."
            )
        return room

    def warn_of_block_length(self, block_length: int) -> None:
        """Warn of a block length that the checkpoint was not trained with."""
        if block_length != self._checkpoint.block_length:
            logger.warning(
                "block_length=%d, but checkpoint %r was trained with %d; answers will be worse.",
                block_length,
                self._checkpoint.name,
                self._checkpoint.block_length,
            )

    def _read(self, gen_kwargs: Mapping[str, Any], task: TaskRequests) -> _Settings:
        protocol = dict(task.decoding or {})
        base = {"block_length": self._checkpoint.block_length} | protocol | self._given
        generation = read_generation(gen_kwargs, base)
        if gen_kwargs and generation.decoding.block_length != self.default.decoding.block_length:
            self.warn_of_block_length(generation.decoding.block_length)
        is_published = generation.decoding.remasking_strategy == protocol.get("remasking_strategy")
        published = f" is published for {task.name}" if is_published else ""
        warn_of_idle_knobs({**self._given, **canonical(gen_kwargs)}, generation.decoding, published or " decodes")
        if protocol:
            self._say_protocol(task.name, protocol, generation.decoding.as_dict())
        stop_ids, stop_strings = set(self.stop_ids), []
        for text in generation.until:
            ids = self._prompts.tokenizer.encode(text, add_special_tokens=False)
            # A special token has no text in the answer, so only its id can stop there.
            if len(ids) == 1 and ids[0] in self._prompts.tokenizer.all_special_ids:
                stop_ids.add(ids[0])
            else:
                stop_strings.append(text)
        return _Settings(generation, frozenset(stop_ids), tuple(stop_strings))

    def _say_protocol(self, task: str, published: Mapping[str, Any], used: Mapping[str, Any]) -> None:
        if task in self._said:
            return
        self._said.add(task)
        if changed := differences(published, {name: used[name] for name in published}):
            logger.warning("%s is not decoded as published: %s.", task, changed)
        else:
            told = ", ".join(f"{name}={value}" for name, value in published.items())
            logger.info("%s is decoded as published: %s. model_args and gen_kwargs override it.", task, told)

    def _in_template(self, instance: Instance, task: TaskRequests) -> tuple[str, TemplatedBy | None]:
        """A request's prompt, and who put it into the chat template."""
        context = str(instance.args[0])
        if task.templated_by is not None:
            return context, task.templated_by
        if self._prompts.is_rendered(context):
            return context, "lm_eval"
        if not self._prompts.renders:
            return context, None
        if not self._said_unknown:
            self._said_unknown = True
            logger.warning(
                "Prompts that come from no evaluation of lm_eval become one user turn each, system instruction "
                "included. Use lm_eval.simple_evaluate, or apply_chat_template."
            )
        return self._prompts.as_user_turn(context), "sdar_lm_eval"


def _key_of(request: GenerationRequest, generation: Generation) -> str:
    """All that the answer's text depends on beside checkpoint and engine."""
    content = dataclasses.asdict(request) | {"until": generation.until, "stop_ids": sorted(request.stop_ids)}
    del content["record_steps"]
    if not generation.is_drawn:
        del content["seed"]
    return key_of("generate_until", content)


def _seed_of(seed: int, task: str | None, context: str, repeat: int) -> int:
    """A request's seed, from what it is and not from where it stands: the same with --limit and on any rank."""
    digest = hashlib.sha256(json.dumps([seed, task, context, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "little")
