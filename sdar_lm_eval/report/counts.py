"""Counts of an evaluation's work, for each task and for all tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from sdar_lm_eval.engines.types import GenerationResult, ScoreResult

_LARGEST = ("load_seconds", "generation_seconds", "peak_memory_bytes", "scoring_seconds", "largest_standard_error")


@dataclass(frozen=True)
class EarlierWork:
    """The answers of an earlier process, some of which an evaluation takes from a store.

    Attributes:
        started, ended: when the process began to answer and finished its last answer, in seconds since 1970.
        tokens: the tokens of the process's answers.
        used: the tokens of the answers that the evaluation takes.
    """

    started: float
    ended: float
    tokens: int
    used: int


def seconds_of(earlier: Collection[EarlierWork]) -> float:
    """Return for how many seconds at least one of the processes was busy, in proportion to the tokens that are used."""
    total, reached = 0.0, 0.0
    for each in sorted(earlier, key=lambda each: each.started):
        total += max(0.0, each.ended - max(reached, each.started))
        reached = max(reached, each.ended)
    tokens = sum(each.tokens for each in earlier)
    return total * (sum(each.used for each in earlier) / tokens if tokens else 1.0)


@dataclass
class Counts:
    """What an evaluation computed, on one process or on all.

    Attributes:
        requests: answers computed.
        new_tokens: tokens of these answers, as far as they are returned.
        prompt_tokens: tokens of these answers' prompts.
        prefill_forwards, denoising_forwards, commit_forwards: these answers' forwards by kind.
        load_seconds: time of loading the model and of preparing the engine.
        generation_seconds: time of generation, prefill included.
        peak_memory_bytes: most memory in use: of the device on CUDA, else of the process.
        scored_requests: log-likelihoods computed.
        scored_tokens: tokens of these log-likelihoods.
        clean_tokens: tokens of unmasked text that scoring ran through the model.
        noised_tokens: tokens of masked blocks that scoring ran through the model.
        scoring_seconds: time of scoring.
        standard_errors: sum of the log-likelihoods' standard errors, in nats, those found in a store included.
        largest_standard_error: the largest of these standard errors, in nats.
        stored_requests: answers found in a store.
        stored_scores: log-likelihoods found in a store.
        stored_tokens: tokens of the stored answers, as far as they are returned.
        stored_forwards: their denoising and commit forwards.
        stored_unmeasured: number of stored answers that have no tokens and forwards in the store.
        stored_untimed: number of stored answers that have no time in the store.
        thoughts: answers with a thought, those found in a store included.
        unfinished_thoughts: answers that ended in their thought, those found in a store included.
        forced_tokens: new tokens that were not drawn: inserted think ends.
        stored_forced_tokens: forced tokens of answers found in a store.
        repetitions: answers that ended in a loop, those found in a store included.
        saved_tokens: tokens between the ends of these answers and their limits.
        earlier: name of an earlier process's file -> the work of the process, for stored answers whose times are known.
        tasks: task -> its counts, without times and memory, which are known of all tasks together only.
    """

    requests: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    prefill_forwards: int = 0
    denoising_forwards: int = 0
    commit_forwards: int = 0
    load_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    scored_requests: int = 0
    scored_tokens: int = 0
    clean_tokens: int = 0
    noised_tokens: int = 0
    scoring_seconds: float = 0.0
    standard_errors: float = 0.0
    largest_standard_error: float = 0.0
    stored_requests: int = 0
    stored_scores: int = 0
    stored_tokens: int = 0
    stored_forwards: int = 0
    stored_unmeasured: int = 0
    stored_untimed: int = 0
    thoughts: int = 0
    unfinished_thoughts: int = 0
    forced_tokens: int = 0
    stored_forced_tokens: int = 0
    repetitions: int = 0
    saved_tokens: int = 0
    earlier: dict[str, EarlierWork] = field(default_factory=dict)
    tasks: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def of_ranks(cls, ranks: Sequence[Counts]) -> Counts:
        """Unite the counts of processes that ran side by side: sums of work, maxima of times and memory."""
        names = [each.name for each in fields(cls) if each.name not in ("earlier", "tasks")]
        united = cls(
            **{name: (max if name in _LARGEST else sum)(getattr(counts, name) for counts in ranks) for name in names}
        )
        for task in dict.fromkeys(task for counts in ranks for task in counts.tasks):
            united.tasks[task] = cls.of_ranks([counts.tasks[task] for counts in ranks if task in counts.tasks])
        for counts in ranks:
            united.add_earlier(counts.earlier)
        return united

    def add(self, task: str, result: GenerationResult, prompt_tokens: int) -> None:
        """Count a computed answer."""
        self.count(
            task,
            requests=1,
            new_tokens=len(result.token_ids),
            prompt_tokens=prompt_tokens,
            prefill_forwards=result.prefill_forwards,
            denoising_forwards=result.denoising_forwards,
            commit_forwards=result.commit_forwards,
            forced_tokens=result.forced_tokens,
        )

    def add_stored(self, task: str, tokens: int | None, forwards: int | None) -> None:
        """Count an answer found in a store.

        Args:
            task: the task's name.
            tokens: the answer's tokens; None where the store does not say.
            forwards: its denoising and commit forwards; None where the store does not say.
        """
        if tokens is None or forwards is None:
            self.count(task, stored_requests=1, stored_unmeasured=1)
        else:
            self.count(task, stored_requests=1, stored_tokens=tokens, stored_forwards=forwards)

    def add_earlier(self, earlier: Mapping[str, EarlierWork]) -> None:
        """Note the work of earlier processes, of which other calls or ranks may use other answers."""
        for name, work in earlier.items():
            known = self.earlier.get(name)
            self.earlier[name] = work if known is None else replace(work, used=known.used + work.used)

    @property
    def stored_seconds(self) -> float:
        """The time in which earlier processes computed the stored answers."""
        return seconds_of(self.earlier.values())

    def add_score(self, task: str, result: ScoreResult, tokens: int) -> None:
        """Count a computed log-likelihood of `tokens` tokens."""
        self.count(
            task,
            scored_requests=1,
            scored_tokens=tokens,
            clean_tokens=result.clean_tokens,
            noised_tokens=result.noised_tokens,
            standard_errors=result.standard_error,
        )
        self._note_error(task, result)

    def add_stored_score(self, task: str, result: ScoreResult) -> None:
        """Count a log-likelihood found in a store."""
        self.count(task, stored_scores=1, standard_errors=result.standard_error)
        self._note_error(task, result)

    def _note_error(self, task: str, result: ScoreResult) -> None:
        for counts in (self, self.tasks[task]):
            counts.largest_standard_error = max(counts.largest_standard_error, result.standard_error)

    def count(self, task: str, **amounts: float) -> None:
        """Add amounts to a task's counts and to those of all tasks."""
        for counts in (self, self.tasks.setdefault(task, Counts())):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)

    @property
    def tokens_per_second(self) -> float | None:
        """Returned tokens over the time of generation; None where nothing was computed."""
        return self.new_tokens / self.generation_seconds if self.requests and self.generation_seconds else None

    @property
    def tokens_per_forward(self) -> float | None:
        """Drawn tokens over denoising and commit forwards, which count for each sequence; None without forwards."""
        made = self.denoising_forwards + self.commit_forwards
        return (self.new_tokens - self.forced_tokens) / made if made else None

    def as_dict(self) -> dict[str, object]:
        """The summary for the results file; null where nothing was computed."""
        return {
            **self._work(),
            **self._stored(seconds=None if self.stored_untimed else round(self.stored_seconds, 4)),
            "tokens_per_second": _rounded(self.tokens_per_second, 1),
            "load_seconds": round(self.load_seconds, 2),
            "generation_seconds": round(self.generation_seconds, 4) if self.requests else None,
            **({"likelihoods": self._likelihoods()} if self.scored_requests or self.stored_scores else {}),
            "peak_memory_bytes": self.peak_memory_bytes,
            "tasks": {task: counts._of_task() for task, counts in self.tasks.items()},
        }

    def _work(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "stored_requests": self.stored_requests,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_forward": _rounded(self.tokens_per_forward, 3),
            "forwards": {
                "prefill": self.prefill_forwards,
                "denoising": self.denoising_forwards,
                "commit": self.commit_forwards,
            },
            **self._ends(),
        }

    def _ends(self) -> dict[str, object]:
        """What is known of thoughts and loops; nothing where there are none."""
        thoughts = {"answers": self.thoughts, "unfinished": self.unfinished_thoughts}
        forced = self.forced_tokens + self.stored_forced_tokens
        thoughts |= {"forced_tokens": forced} if forced else {}
        repetition = {"answers": self.repetitions, "saved_tokens": self.saved_tokens}
        return {
            **({"thoughts": thoughts} if self.thoughts else {}),
            **({"repetition": repetition} if self.repetitions else {}),
        }

    def _stored(self, **further: object) -> dict[str, object]:
        """What is known of the answers found in a store; null where it is unknown of any of them."""
        if not self.stored_requests:
            return {}
        unknown = bool(self.stored_unmeasured)
        tokens, forwards = (None if unknown else number for number in (self.stored_tokens, self.stored_forwards))
        return {"stored": {"new_tokens": tokens, "forwards": forwards, **further}}

    def _of_task(self) -> dict[str, object]:
        scored = bool(self.scored_requests or self.stored_scores)
        generated = {**self._work(), **self._stored()} if self.requests or self.stored_requests else {}
        return generated | ({"likelihoods": self._scores()} if scored else {})

    def _scores(self) -> dict[str, object]:
        number = self.scored_requests + self.stored_scores
        mean = self.standard_errors / number if number else None
        largest = self.largest_standard_error if number else None
        return {
            "requests": self.scored_requests,
            "stored_requests": self.stored_scores,
            "tokens": self.scored_tokens,
            "tokens_run": {"clean": self.clean_tokens, "noised": self.noised_tokens},
            "standard_error": {"mean": _rounded(mean, 6), "largest": _rounded(largest, 6)},
        }

    def _likelihoods(self) -> dict[str, object]:
        return self._scores() | {"seconds": round(self.scoring_seconds, 2) if self.scored_requests else None}

    def __str__(self) -> str:
        parts = []
        if self.stored_requests or self.stored_scores:
            what = [(self.stored_requests, "answers"), (self.stored_scores, "log-likelihoods")]
            parts.append(" and ".join(f"{count:,} {name}" for count, name in what if count) + " were there already")
        if self.requests or not (self.scored_requests or parts):
            parts.append(self._generation_in_words())
        if self.scored_requests:
            parts.append(self._scoring_in_words())
        answers = self.requests + self.stored_requests
        if self.thoughts:
            parts.append(f"{self.unfinished_thoughts:,} of {answers:,} answers ended while thinking")
        if self.repetitions:
            saved = f"{self.saved_tokens:,} tokens before their limits"
            parts.append(f"{self.repetitions:,} of {answers:,} answers ended in a loop, {saved}")
        return (
            "; ".join(parts)
            + f"; loaded in {self.load_seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )

    def _generation_in_words(self) -> str:
        told = f"{self.requests:,} requests, {self.new_tokens:,} new tokens in {self.generation_seconds:.1f} s"
        if self.tokens_per_second is not None:
            told += f": {self.tokens_per_second:,.0f} tok/s"
        if self.tokens_per_forward is not None:
            told += (
                f", {self.tokens_per_forward:.2f} tokens per forward (prefill {self.prefill_forwards:,}, denoising "
                f"{self.denoising_forwards:,}, commit {self.commit_forwards:,})"
            )
        return told

    def _scoring_in_words(self) -> str:
        told = (
            f"{self.scored_requests:,} log-likelihoods of {self.scored_tokens:,} tokens in {self.scoring_seconds:.1f} "
            f"s (forwards of {self.clean_tokens:,} clean and {self.noised_tokens:,} noised tokens)"
        )
        if self.largest_standard_error:
            told += f", standard errors up to {self.largest_standard_error:.2g} nats"
        return told


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
