"""An evaluation of a sweep, and whether the sweep may work in a folder that has results of earlier sweeps."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdar_lm_eval.decoding import in_words
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.store import differences
from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.results import Results, results_in
from sdar_lm_eval.runs.grid import Combination
from sdar_lm_eval.settings import GENERATION_SETTINGS
from sdar_lm_eval.spellings import canonical

BESIDE_ANSWERS = (
    "device", "max_active", "batch_size", "max_batch_size", "kv_pages", "gpu_memory_utilization",
    "cache_max_entry_count", "trace", "verbose", "trust_remote_code",
)  # fmt: skip
"""model_args without effect on answers: a sweep that ran out of memory goes on with another `max_active`."""

DEFAULTS = {
    "answer_prefix": "", "enforce_eager": False, "likelihood": "chain", "record_steps": True, "reproducible": False,
    "share_prefixes": True,
}  # fmt: skip
"""model_args beside decoding settings -> the value that they have if the user gives none."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """One evaluation of a sweep.

    Attributes:
        settings: the combination, without settings that have no effect.
        seed: seed of sampled answers; None where nothing is drawn.
        folder: the combination's folder.
        name: name of the results' folder within `folder`.
        asked: all that the results depend on, as JSON values.
        effect: task -> the settings that decode its requests, and its number of few-shot examples (`num_fewshot`).
    """

    settings: Combination
    seed: int | None
    folder: Path
    name: str
    asked: Mapping[str, object]
    effect: Mapping[str, Mapping[str, object]]

    @property
    def label(self) -> str:
        """The combination in words."""
        return in_words(self.settings) or "unchanged"

    @property
    def title(self) -> str:
        """The combination in words, and the seed of sampled answers."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"

    @property
    def gen_kwargs(self) -> Mapping[str, object]:
        """The combination's settings, and the settings that all combinations share."""
        gen_kwargs = self.asked["gen_kwargs"]
        assert isinstance(gen_kwargs, dict)
        return gen_kwargs

    def results(self) -> Results | None:
        """Return the newest results in the folder if they depend on `asked`; None where they do not, or are damaged.

        Results whose samples files lost lines are damaged too: `compare`, `report` and `show` read the samples.
        """
        folder = self.folder / self.name
        if not any(folder.rglob("results_*.json")):
            return None
        with contextlib.suppress(UserError):  # damaged files count as missing
            newest = results_in(folder)[-1]
            tasks = self.asked["tasks"]
            assert isinstance(tasks, dict)
            if newest.ours.content.get("asked") == self.asked and all(map(newest.has_all_samples, tasks)):
                return newest
        return None


def read_earlier(output: Path) -> tuple[Results, ...]:
    """Return the results of sweeps in a folder. Results that `lm_eval run` wrote into the folder are no sweep's."""
    if not any(output.rglob("results_*.json")):
        return ()
    with contextlib.suppress(UserError):  # no file can be read
        return tuple(filter(_is_of_sweep, results_in(output)))
    return ()


def _is_of_sweep(results: Results) -> bool:
    """Whether a sweep wrote results. One damaged file must not hide the others, so it counts as missing."""
    with contextlib.suppress(UserError):
        asked = results.ours.part("asked")
        known = asked.text("model"), asked.part("model_args"), asked.text("checkpoint"), results.ours.text("dtype")
        return None not in known
    return False


def check_earlier(
    output: Path, earlier: Sequence[Results], evaluations: Sequence[PlannedEvaluation], jobs: Jobs
) -> None:
    """Refuse results of another model, and those that an evaluation of other settings would replace.

    Args:
        output: the sweep's folder.
        earlier: the results in the folder.
        evaluations: the sweep's evaluations.
        jobs: has the settings of the sweep's model.

    Raises:
        UserError: as `refuse_differences`.
    """
    of_folders: dict[tuple[str, ...], PlannedEvaluation] = {(each.folder.name, each.name): each for each in evaluations}
    for results in earlier:
        theirs = results.ours.part("asked")
        replacing = of_folders.get(results.file.relative_to(output).parts[:2])
        mine = Fields((replacing or evaluations[0]).asked, results.file)
        ignored = {*BESIDE_ANSWERS}
        if theirs.text("checkpoint") == mine.text("checkpoint"):  # however its path is spelled
            ignored |= {"pretrained", "revision"}
        names = ["model"]
        if _have_one_effect(results, replacing, jobs):  # however the settings are spelled
            ignored |= {*GENERATION_SETTINGS, "max_length"}
        elif replacing:
            names += ["num_fewshot", "gen_kwargs"]
        was, now = (
            {name: each.content.get(name) for name in names}
            | _arguments_by_meaning(each, ignored)
            | {"checkpoint": each.text("checkpoint")}
            for each in (theirs, mine)
        )
        was["dtype"] = results.ours.text("dtype")  # the precision that `auto` chose
        now.setdefault("dtype", was["dtype"])
        refuse_differences(output, was, now)


def _have_one_effect(results: Results, replacing: PlannedEvaluation | None, jobs: Jobs) -> bool:
    """Whether an evaluation would decode as earlier results did: those that it replaces, else those of other settings.

    A default that the user names has no effect.
    """
    if results.ours.whole("max_length") != jobs.max_length:
        return False
    if replacing is None:
        return results.ours.part_or_empty("decoding").content == jobs.default.as_dict()
    shots = results.content.part_or_empty("n-shot").content
    return all(
        {**results.decoding_of(task).content, "num_fewshot": shots.get(task)} == effect
        for task, effect in replacing.effect.items()
    )


def _arguments_by_meaning(asked: Fields, ignored: Collection[str]) -> dict[str, object]:
    """The model_args of an evaluation's `asked` by full name, without those that leave the choice to the model."""
    given = canonical(asked.part_or_empty("model_args").content)
    return {
        name: value
        for name, value in given.items()
        if name not in ignored and value not in (None, "auto", DEFAULTS.get(name))
    }


def refuse_differences(output: Path, theirs: Mapping[str, object], mine: Mapping[str, object]) -> None:
    """Refuse a sweep into a folder whose results have other settings.

    Args:
        output: the sweep's folder.
        theirs: setting -> its value in the results.
        mine: setting -> its value in the sweep.

    Raises:
        UserError: a value differs.
    """
    if told := differences(theirs, mine):
        raise UserError(
            f"--output_path {output} has results of another model or of other settings: {told}. Give another "
            "--output_path, or the earlier settings."
        )
