"""The search of a candidate's settings with Optuna, on training samples that are held out.

Every trial is the recipe with other settings, made by the same stages as a run; what decides is
measured on a validation part of the training set, never on the test set.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfuse.errors import CheckFailed, StorageError, UserError, first_line
from slimfuse.pipeline.candidates import ALONE, Candidate
from slimfuse.pipeline.contenders import split_option
from slimfuse.progress import console
from slimfuse.report import Search, Trial
from slimfuse.store import digest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SECONDS = "seconds"
JOURNAL = "search.journal"
EXAMPLE = "finetune.lr=1e-4..1e-2 or fuse.units=cholesky,ziplm"
WAYS = {"higher": "maximize", "lower": "minimize"}
VALIDATION = "data.validation={share: 0.2}"
SEARCHED = ("fuse", "finetune", "sparsify", "target", "data.calibration")
MOST_CHECKED = 256  # combinations of ends that are looked at before any work
DECADE = 10.0  # bounds so far apart or farther are searched by their logarithm
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Axis:
    """One key of a search: values to choose from, or all between two bounds.

    asked: the option as it was typed.
    """

    key: str
    asked: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether both bounds are whole numbers, as their text has it."""
        return type(self.low) is int and type(self.high) is int

    @property
    def log(self) -> bool:
        """Whether values are drawn by their logarithm."""
        return self.low > 0 and self.high >= DECADE * self.low

    @property
    def ends(self) -> tuple[str, ...]:
        """The values between which all others lie, to be checked before any work."""
        return self.choices or (str(self.low), str(self.high))

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna knows it."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


def axes_of(options: Sequence[str], trials: int) -> list[Axis]:
    """Return the axes of options `KEY=LOW..HIGH` and `KEY=V1,V2,…`; raises UserError.

    trials: how many were asked for; without a search 0. Demands the optional extra where there is a
    search.
    """
    if bool(options) != bool(trials):
        raise UserError(
            "a search needs keys and a number of trials",
            where="--search" if trials else "--trials",
            got="none",
            allowed=f"--trials 20 --search {EXAMPLE.partition(' ')[0]}",
        )
    found = [_axis(option) for option in options]
    keys = [axis.key for axis in found]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError("a key is searched twice", where="--search", got=key)
    if found and not _installed():
        raise UserError(
            "a search needs Optuna, which is not installed",
            where="--search",
            hint="pip install 'slimfuse[search]'",
        )
    return found


def _installed() -> bool:
    return importlib.util.find_spec("optuna") is not None


def check_space(axes: Sequence[Axis], load: Callable[[Sequence[str]], object]) -> None:
    """Raise the recipe's own error for a value that fits no values of the other keys.

    load: opens the recipe with overrides, or raises UserError.
    """
    ends = [[f"{axis.key}={end}" for end in axis.ends] for axis in axes]
    left = {value for one in ends for value in one}
    wrong: dict[str, UserError] = {}
    for settings in islice(product(*ends), MOST_CHECKED):
        if not left & {*settings}:
            continue
        try:
            load(settings)
            left -= {*settings}
        except UserError as error:
            wrong |= {value: error for value in settings if value in left}
    for value in (value for one in ends for value in one):
        if value in left and value in wrong:
            raise wrong[value]


def _axis(option: str) -> Axis:
    key, values = split_option(option, "--search", EXAMPLE)
    if not any(f"{key}.".startswith(f"{top}.") for top in SEARCHED):
        raise UserError(
            "this key can't be searched",
            where="--search",
            got=key,
            allowed=f"a key of {', '.join(SEARCHED)}",
            hint="give its values with --set: each makes a candidate",
        )
    low, dots, high = values[0].partition("..")
    if len(values) == 1 and dots:
        if _NUMBER.fullmatch(low) and _NUMBER.fullmatch(high):
            ends = [_number(text) for text in (low, high)]
            if ends[0] < ends[1] and all(map(math.isfinite, ends)):
                return Axis(key, option, (), *ends)
        allowed = "KEY=LOW..HIGH with two numbers, the smaller one first"
        raise UserError("not a range", where="--search", got=option, allowed=allowed)
    choices = tuple(dict.fromkeys(values))
    if len(choices) < 2:
        allowed = f"two values or a range, as in {EXAMPLE}"
        raise UserError("there is nothing to choose", where="--search", got=option, allowed=allowed)
    return Axis(key, option, choices)


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def goals_of(axes: Sequence[Axis], metric: str, better: str) -> dict[str, Any]:
    """Return what is sought: the metric, and where shapes are searched few parameters, too."""
    goals = {metric: better}
    if any(axis.key.partition(".")[0] == "target" for axis in axes):
        goals["params"] = "lower"
    return goals


class Searching:
    """The search of one candidate, kept in a journal: a killed one goes on where it stood.

    measure: overrides → the goals' figures and, as SECONDS, the time it took; raises UserError
    for settings that can't be made, and CheckFailed for a model that fails its checks.
    """

    def __init__(
        self,
        folder: Path,
        candidate: Candidate,
        axes: Sequence[Axis],
        goals: dict[str, Any],
        seed: int,
        measure: Callable[[Sequence[str]], dict[str, float]],
        on: Any,
    ) -> None:
        self.candidate, self.axes, self.goals, self.seed = candidate, axes, goals, seed
        self.measure, self.folder = measure, folder
        # `on`: whatever else the trials' figures depend on; another search has another name
        mark = digest([on, candidate.overrides, [a.asked for a in axes], goals, seed])[:12]
        self.name = f"{candidate.name}-{mark}"

    def run(self, trials: int) -> None:
        """Make trials until so many have an outcome."""
        study, space = self._study(), {a.key: a.distribution() for a in self.axes}
        while (done := len(self._done(study))) < trials:
            # by what is known, so that a search that was killed draws what it would have drawn
            study.sampler = _sampler(self.seed + done, trials)
            trial = study.ask(space)
            console.print(f"  trial {done + 1} of {trials}: {_told(trial.params)}", markup=False)
            try:
                figures = self.measure(self._overrides(trial.params))
            except (UserError, CheckFailed) as error:
                if isinstance(error, StorageError):
                    raise
                trial.set_user_attr("refused", first_line(error).partition(": ")[2])
                study.tell(trial, state=_states().FAIL)
                continue
            told = ", ".join(f"{goal} {figures[goal]:.4g}" for goal in self.goals)
            console.print(f"  {told}", markup=False)
            trial.set_user_attr("seconds", figures.get(SECONDS, 0.0))
            study.tell(trial, [figures[goal] for goal in self.goals])

    def found(self, samples: int) -> tuple[list[Candidate], Search]:
        """Return the candidates with the best settings, and the record of the search.

        samples: those that were measured. Raises UserError where no trial could be made.
        """
        study = self._study()
        done = self._done(study)
        whole = [t for t in done if t.state == _states().COMPLETE]
        if not whole:
            raise UserError(
                "no trial of the search could be made",
                where="--search",
                got="; ".join(dict.fromkeys(str(t.user_attrs.get("refused")) for t in done)),
                allowed="settings that fit the recipe",
            )
        best = study.best_trials if len(self.goals) > 1 else [study.best_trial]
        best = _distinct(sorted(best, key=lambda t: t.number))
        places = {t.number: i for i, t in enumerate(done, 1)}
        name = "" if self.candidate.name == ALONE else f"{self.candidate.name}, "
        kept = [
            Candidate(
                self.candidate.name if len(self.goals) < 2 else f"{name}trial {places[t.number]}",
                (*self.candidate.overrides, *self._overrides(t.params)),
            )
            for t in best
        ]
        record = Search(
            candidate=self.candidate.name,
            space=tuple(axis.asked for axis in self.axes),
            goals=self.goals,
            samples=samples,
            trials=tuple(self._trial(places[t.number], t) for t in done),
            taken=tuple(places[t.number] for t in best),
        )
        return kept, record

    def _trial(self, place: int, trial: FrozenTrial) -> Trial:
        figures = None
        if trial.state == _states().COMPLETE:
            figures = dict(zip(self.goals, trial.values, strict=True))
        more = trial.user_attrs
        return Trial(
            place, dict(trial.params), figures, str(more.get("refused", "")),
            float(more.get("seconds", 0.0)),
        )  # fmt: skip

    def _overrides(self, params: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f"{key}={value}" for key, value in params.items())

    def _done(self, study: Study) -> list[FrozenTrial]:
        """Return the trials with an outcome; one that a killed process left has none."""
        return [
            t
            for t in study.get_trials(deepcopy=False)
            if t.state == _states().COMPLETE or "refused" in t.user_attrs
        ]

    def _study(self) -> Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = self.folder / JOURNAL
        _mend(file)
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file))),
                study_name=self.name,
                directions=[WAYS[better] for better in self.goals.values()],
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise StorageError(
                "the journal of the search can't be read",
                where=str(file),
                got=first_line(error),
                hint="remove it and run the same command again: its trials are made anew",
            ) from error
        for trial in study.get_trials(deepcopy=False, states=(_states().RUNNING,)):
            study.tell(trial.number, state=_states().FAIL)  # a killed process left it
        return study


def _mend(file: Path) -> None:
    """Remove what a killed process left half-written; the sweep's folder is locked by us."""
    file.with_name(file.name + ".lock").unlink(missing_ok=True)
    if file.is_file():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.write_bytes(content[:whole])


def _sampler(seed: int, trials: int) -> Any:
    from optuna.samplers import TPESampler

    # a third at random before the model of good settings is asked
    return TPESampler(seed=seed, n_startup_trials=max(1, min(10, trials // 3)))


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def _distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials without those whose settings are an earlier one's."""
    seen: dict[str, FrozenTrial] = {}
    for trial in trials:
        seen.setdefault(repr(sorted(trial.params.items())), trial)
    return list(seen.values())


def _told(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )
