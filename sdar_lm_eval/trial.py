"""Compares the engines' greedy answers to the demo's problems with those of a reference.

The reference is the native engine in float32 on the CPU. transformers' forward checks the reference's answers
(`engines/agreement.py`). An engine passes if each of its answers equals the reference's token for token, or if rounding
explains the difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdar_lm_eval.arguments import DecodingArguments, arguments_of
from sdar_lm_eval.demo import PROMPT, problems
from sdar_lm_eval.engines.agreement import JUDGED, Divergence, Float32Judge, allowed
from sdar_lm_eval.errors import SDARError, UserError, did_you_mean, listed
from sdar_lm_eval.files import one_line
from sdar_lm_eval.loaded import Answer, LoadedModel
from sdar_lm_eval.settings import GENERATION_SETTINGS
from sdar_lm_eval.spellings import ALIASES
from sdar_lm_eval.tokens import first_difference

TRIED = (*JUDGED, "low_confidence_dynamic")
"""Strategies that all engines have."""
MAX_GEN_TOKS = 128
WARM_UP = 32
"""New tokens of the run on a GPU that comes before the run that is timed."""
MOST_LISTED = 5  # unexplained answers that a verdict lists
OF_CHECKPOINT = ("revision", "chat_template", "max_length")
"""model_args that change the requests, so that the reference gets them too."""


@dataclass(frozen=True)
class StrategyTrial:
    """An engine's answers by one strategy.

    Attributes:
        strategy: full name of the strategy.
        answers: number of problems that were asked.
        divergences: the answers that differ from the reference's; their roundings are NaN where they are not judged.
        tokens: number of new tokens.
        seconds: time of computing the tokens, without loading and compiling.
    """

    strategy: str
    answers: int
    divergences: tuple[Divergence, ...]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second; infinite where no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else math.inf

    @property
    def is_judged(self) -> bool:
        """Whether `engines/agreement.py` can judge answers by the strategy."""
        return self.strategy in JUDGED


@dataclass(frozen=True)
class Trial:
    """An engine's answers.

    Attributes:
        engine: the engine's name.
        device, dtype: the engine's device and dtype; "" where the engine could not be loaded.
        strategies: the answers by each strategy; those before an error only.
        error: why the engine stopped; None where it answered.
        is_reference: whether these are the reference's answers.
    """

    engine: str
    device: str
    dtype: str
    strategies: tuple[StrategyTrial, ...]
    error: str | None = None
    is_reference: bool = False

    @property
    def judged(self) -> list[tuple[str, Divergence]]:
        """(strategy, answer that differs from the reference's) for the strategies that are judged."""
        return [(each.strategy, d) for each in self.strategies if each.is_judged for d in each.divergences]

    @property
    def unexplained(self) -> list[tuple[str, Divergence]]:
        """The entries of `judged` that rounding does not explain."""
        return [(strategy, d) for strategy, d in self.judged if not d.worst <= allowed(self.dtype)]

    @property
    def passed(self) -> bool:
        """Whether the engine answered, and rounding explains all of its answers."""
        return self.error is None and not self.unexplained

    def verdict(self) -> str:
        """Return the verdict in one line."""
        where = f"{self.engine} on {self.device}, {self.dtype}" if self.device else self.engine
        if self.error is not None:
            return f"{where}: stopped: {self.error}"
        count = sum(each.answers for each in self.strategies if each.is_judged)
        differ, unexplained = self.judged, self.unexplained
        of_whom = "transformers'" if self.is_reference else "float32's"
        same = f"{where}: {count - len(differ)} of {count} answers are {of_whom}"
        if not differ:
            return same
        if not unexplained:
            worst = max(d.worst for _, d in differ)
            return f"{same}; {len(differ)} differ, all at choices within {worst:.3f} nats: rounding"
        told = [
            f"problem {d.index} from token {d.token} on ({strategy}, "
            + (f"{d.worst:.3f} nats)" if math.isfinite(d.worst) else f"more than {allowed('bfloat16'):g} nats)")
            for strategy, d in unexplained
        ]
        return (
            f"{same}; {len(differ)} differ; NOT explained: {len(unexplained)} of them, by more than "
            f"{allowed(self.dtype):g} nats: {listed(told, MOST_LISTED)}"
        )

    def as_dict(self) -> dict[str, object]:
        """Return the trial as values that JSON has; a rounding that is infinite or NaN is None."""

        def divergence(d: Divergence) -> dict[str, object]:
            return {name: value if math.isfinite(value) else None for name, value in vars(d).items()}

        return {
            "engine": self.engine,
            "device": self.device,
            "dtype": self.dtype,
            "is_reference": self.is_reference,
            "passed": self.passed,
            "verdict": self.verdict(),
            "error": self.error,
            "strategies": [
                {
                    "strategy": each.strategy,
                    "judged": each.is_judged,
                    "answers": each.answers,
                    "equal": each.answers - len(each.divergences),
                    "tokens_per_second": round(each.tokens_per_second, 1),
                    "divergences": [divergence(d) for d in each.divergences],
                }
                for each in self.strategies
            ],
        }


class Trials:
    """Asks engines the demo's problems, and compares their answers with the reference's.

    Args:
        pretrained: the checkpoint.
        model_args: model_args of the engines; each engine gets the arguments that it takes.
        engines: names of the engines that will be asked.
        limit: number of problems that are asked, the first ones.

    Raises:
        UserError: a decoding setting is among model_args, or none of the engines takes an argument.
    """

    def __init__(self, pretrained: str, model_args: Mapping[str, object], engines: Sequence[str], limit: int) -> None:
        self._pretrained, self._model_args = pretrained, dict(model_args)
        taken = sorted(set().union(*(_taken_by(engine) for engine in engines)) - set(GENERATION_SETTINGS))
        for name in model_args:
            if name in ALIASES or name in GENERATION_SETTINGS:
                raise UserError(f"{name} is a decoding setting, which doctor chooses itself. Leave {name} out.")
            if name not in taken:
                hint = did_you_mean(name, taken)
                raise UserError(
                    f"{name} is not a model_arg of {' or '.join(engines)}.{hint} Known: {', '.join(taken)}."
                )
        self._prompts = [PROMPT.format(question=problem["question"]) for problem in problems()[:limit]]
        self._expected: dict[str, list[Answer]] = {}
        self._float32: Float32Judge | None = None

    def reference(self) -> Trial:
        """Ask the native engine in float32 on the CPU, and check its answers by transformers' forward.

        Raises:
            UserError: the checkpoint or a setting cannot be used.
            EngineError: the engine stopped.
        """
        given = {name: value for name, value in self._model_args.items() if name in OF_CHECKPOINT}
        seconds: dict[str, float] = {}
        with LoadedModel.open(self._pretrained, "native", {**given, "device": "cpu", "dtype": "float32"}) as model:
            for strategy in TRIED:
                self._expected[strategy], seconds[strategy] = self._ask(model, strategy)
        # Loaded after the engine is closed, so that the weights are in memory only once.
        self._float32 = judge = Float32Judge(model.checkpoint)
        found = []
        for strategy, answers in self._expected.items():
            asked = enumerate(answers if strategy in JUDGED else ())
            deviations = [judge.deviation(index, each.request, each.result) for index, each in asked]
            found.append(_strategy_trial(strategy, answers, deviations, seconds[strategy]))
        return Trial(model.info.engine, model.info.device, model.info.dtype, tuple(found), is_reference=True)

    def trial(self, engine: str) -> Trial:
        """Ask an engine, and judge its answers. Call `reference` first. An engine's exception becomes `Trial.error`."""
        device = dtype = ""
        found: list[StrategyTrial] = []
        try:
            with LoadedModel.open(self._pretrained, engine, self._arguments_of(engine)) as model:
                device, dtype = model.info.device, model.info.dtype
                for strategy in TRIED:
                    answers, seconds = self._ask(model, strategy)
                    found.append(_strategy_trial(strategy, answers, self._judge(strategy, answers), seconds))
        except Exception as error:  # engines' packages raise any type; the other engines are asked all the same
            told = str(error) if isinstance(error, SDARError) else f"{type(error).__name__}: {one_line(error)}"
            return Trial(engine, device, dtype, tuple(found), error=told)
        return Trial(engine, device, dtype, tuple(found))

    def _arguments_of(self, engine: str) -> dict[str, object]:
        """The model_args that an engine takes."""
        return {name: value for name, value in self._model_args.items() if name in _taken_by(engine)}

    def _ask(self, model: LoadedModel, strategy: str) -> tuple[list[Answer], float]:
        """The answers by a strategy, and their seconds without loading and compiling."""
        settings: DecodingArguments = {
            "remasking_strategy": strategy,
            "do_sample": False,
            "max_gen_toks": MAX_GEN_TOKS,
        }
        model.prepare(self._prompts, **settings)
        if model.info.device != "cpu":  # a GPU's first run of a batch compiles, and captures CUDA graphs
            model.generate(self._prompts, **settings | {"max_gen_toks": WARM_UP})
        begun = time.perf_counter()
        answers = model.generate(self._prompts, **settings)
        return answers, time.perf_counter() - begun

    def _judge(self, strategy: str, answers: Sequence[Answer]) -> list[Divergence | None]:
        assert self._float32 is not None, "the reference was not asked"
        found: list[Divergence | None] = []
        for index, (answer, expected) in enumerate(zip(answers, self._expected[strategy], strict=True)):
            if strategy in JUDGED:
                found.append(self._float32.divergence(index, expected.request, answer.result, expected.result))
            elif answer.result.token_ids != expected.result.token_ids:
                token = first_difference(answer.result.token_ids, expected.result.token_ids)
                found.append(Divergence(index, token, math.nan, math.nan))
        return found


def _taken_by(engine: str) -> set[str]:
    """The model_args that an engine takes."""
    return set(arguments_of(engine).__annotations__)


def _strategy_trial(
    strategy: str, answers: Sequence[Answer], found: Sequence[Divergence | None], seconds: float
) -> StrategyTrial:
    tokens = sum(len(answer.result.token_ids) for answer in answers)
    return StrategyTrial(strategy, len(answers), tuple(d for d in found if d is not None), tokens, seconds)
