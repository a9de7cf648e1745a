"""The search of a sweep: what is asked for, going on, and which samples decide."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import TRAIN, events, recipe, undrawn, unproved, write_recipe

from slimfuse.data import load_digits
from slimfuse.errors import CheckFailed, DataError, StorageError, UserError
from slimfuse.pipeline import search, sweep
from slimfuse.pipeline.candidates import Candidate
from slimfuse.pipeline.labelling import limited
from slimfuse.pipeline.search import JOURNAL, Axis, Searching, axes_of, check_space, goals_of
from slimfuse.recipe import Data, load_recipe

ACCURACY = {"accuracy": "higher"}
ONE = Candidate("hidden_size=0.5", ("target.hidden_size=0.5",))
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra slimfuse[search] is missing"
)


@pytest.fixture
def found_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is asked for be read where Optuna isn't installed."""
    monkeypatch.setattr(search, "_installed", lambda: True)


# -- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole", "log"),
    [
        ("1e-4..1e-2", False, True),
        ("1e-4..9e-4", False, False),
        ("0.0..1.0", False, False),
        ("-1..1", True, False),
        ("16..64", True, False),
        ("1..10", True, True),
        ("1..10.0", False, True),
    ],
)
def test_a_range_is_of_whole_numbers_and_logarithmic_where_its_bounds_say_so(
    found_optuna: None, text: str, whole: bool, log: bool
) -> None:
    (axis,) = axes_of([f"finetune.lr={text}"], 3)
    assert (axis.whole, axis.log) == (whole, log)
    low, high = (float(end) for end in text.split(".."))
    assert (axis.low, axis.high) == (low, high) and not axis.choices


@needs_optuna
def test_optuna_draws_what_was_asked_for() -> None:
    axes = axes_of(["finetune.lr=1e-4..1e-2", "finetune.batch_size=8..16", "fuse.heads=a,b"], 1)
    lr, size, heads = (axis.distribution() for axis in axes)
    assert (lr.low, lr.high, lr.log) == (1e-4, 1e-2, True)
    assert (size.low, size.high, size.log, size.step) == (8, 16, False, 1)
    assert heads.choices == ("a", "b")


@pytest.mark.parametrize(
    ("options", "trials", "what"),
    [
        (["finetune.lr=1e-2..1e-4"], 3, "not a range"),
        (["finetune.lr=1e-2..1e-2"], 3, "not a range"),
        (["finetune.lr=a..b"], 3, "not a range"),
        (["finetune.lr=1..nan"], 3, "not a range"),
        (["finetune.lr=1e-2"], 3, "nothing to choose"),
        (["finetune.lr=1e-2,1e-2"], 3, "nothing to choose"),
        (["finetune.lr"], 3, "not a key and its values"),
        (["runtime.seed=1..5"], 3, "can't be searched"),
        (["fusefuse.x=1,2"], 3, "can't be searched"),
        (["finetune.lr=1..2", "finetune.lr=3..4"], 3, "searched twice"),
        (["finetune.lr=1..2"], 0, "keys and a number of trials"),
        ([], 3, "keys and a number of trials"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    found_optuna: None, options: list[str], trials: int, what: str
) -> None:
    with pytest.raises(UserError, match=what) as error:
        axes_of(options, trials)
    assert error.value.where in ("--search", "--trials") and error.value.allowed != ""


def test_without_the_extra_one_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(search, "_installed", lambda: False)
    path = write_recipe(tmp_path / "tiny.yaml")
    with pytest.raises(UserError, match="not installed") as error:
        sweep(path, search=("finetune.lr=1e-4..1e-2",), trials=2, out=tmp_path / "out")
    assert error.value.hint == "pip install 'slimfuse[search]'"
    assert not (tmp_path / "out").exists()


def test_a_value_is_refused_only_where_it_fits_nothing(found_optuna: None, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml")

    def check(*options: str) -> None:
        check_space(axes_of(options, 1), lambda settings: load_recipe(path, settings))

    check("fuse.units=cholesky,saliency", "fuse.saliency=null,ziplm")  # each fits one of the others
    with pytest.raises(UserError, match=r"fuse\.saliency"):
        check("fuse.units=cholesky,ziplm", "fuse.saliency=ziplm,taylor")
    with pytest.raises(UserError, match=r"finetune\.lr=-1"):
        check("finetune.lr=-1..1")
    with pytest.raises(UserError, match="unknown key"):
        check("finetune.lx=1..2")


def test_parameters_are_a_goal_where_shapes_are_searched(found_optuna: None) -> None:
    axes = axes_of(["finetune.lr=1e-4..1e-2"], 1)
    assert goals_of(axes, "accuracy", "higher") == ACCURACY
    axes = axes_of(["target.hidden_size=8,12"], 1)
    assert goals_of(axes, "perplexity", "lower") == {"perplexity": "lower", "params": "lower"}


# -- trials -------------------------------------------------------------------------------------

LR = Axis("finetune.lr", "finetune.lr=1e-4..1e-2", (), 1e-4, 1e-2)
UNITS = Axis("fuse.units", "fuse.units=cholesky,ziplm", ("cholesky", "ziplm"))


def value(settings: Sequence[str], key: str) -> str:
    return next(s.partition("=")[2] for s in settings if s.startswith(key))


def peak(settings: Sequence[str]) -> dict[str, float]:
    """Best at a rate of 1e-3, a little better with ziplm."""
    off = abs(math.log10(float(value(settings, "finetune.lr"))) + 3)
    return {"accuracy": 0.9 - 0.2 * off + 0.05 * (value(settings, "fuse.units") == "ziplm")}


def searching(
    folder: Path, measure: Callable[[Sequence[str]], dict[str, float]] = peak, **more: Any
) -> Searching:
    folder.mkdir(exist_ok=True)
    given = {"axes": (LR, UNITS), "goals": ACCURACY, "seed": 5, "on": "these samples"} | more
    return Searching(folder, ONE, measure=measure, **given)


@needs_optuna
def test_the_best_trial_becomes_the_candidate(tmp_path: Path) -> None:
    sought = searching(tmp_path)
    sought.run(12)
    (best,), record = sought.found(30)
    figures = [t.figures["accuracy"] for t in record.trials if t.figures]
    assert len(figures) == 12 and record.samples == 30 and best.name == ONE.name
    taken = record.trials[record.taken[0] - 1]
    assert taken.number == record.taken[0] and taken.figures == {"accuracy": max(figures)}
    assert best.overrides[:1] == ONE.overrides
    assert peak(best.overrides)["accuracy"] == max(figures)  # the very settings, to the last digit
    assert max(figures) > figures[0]


@needs_optuna
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_search_goes_on_with_the_trials_it_would_have_made(
    tmp_path: Path, at: int
) -> None:
    whole = searching(tmp_path / "whole")
    whole.run(6)
    calls = []

    def dies(settings: Sequence[str]) -> dict[str, float]:
        calls.append(settings)
        if len(calls) == at:
            raise KeyboardInterrupt
        return peak(settings)

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        searching(broken, dies).run(6)
    with (broken / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":6,"half a li')  # as a power cut leaves it
    (broken / f"{JOURNAL}.lock").symlink_to(broken / JOURNAL)
    again = searching(broken)
    again.run(6)
    assert again.found(1) == whole.found(1)


@needs_optuna
def test_another_search_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    searching(tmp_path).run(2)
    other = searching(tmp_path, on="other samples")
    with pytest.raises(UserError, match="no trial"):
        other.found(1)
    more = searching(tmp_path)
    more.run(3)
    assert len(more.found(1)[1].trials) == 3


@needs_optuna
def test_refused_settings_are_trials_without_figures(tmp_path: Path) -> None:
    def picky(settings: Sequence[str]) -> dict[str, float]:
        if value(settings, "fuse.units") == "ziplm":
            raise CheckFailed("it can't be made")
        return peak(settings)

    sought = searching(tmp_path, picky)
    sought.run(8)
    (best,), record = sought.found(1)
    refused = [t for t in record.trials if t.figures is None]
    assert len(record.trials) == 8 and 0 < len(refused) < 8
    assert {t.note for t in refused} == {"it can't be made"}
    assert value(best.overrides, "fuse.units") == "cholesky"


@needs_optuna
def test_where_nothing_can_be_made_the_reasons_are_told(tmp_path: Path) -> None:
    def never(_settings: Sequence[str]) -> dict[str, float]:
        raise UserError("no such model")

    sought = searching(tmp_path, never)
    sought.run(2)
    with pytest.raises(UserError, match="no trial of the search") as error:
        sought.found(1)
    assert error.value.got == "no such model"


@needs_optuna
def test_a_full_disk_is_no_refusal(tmp_path: Path) -> None:
    def full(_settings: Sequence[str]) -> dict[str, float]:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        searching(tmp_path, full).run(1)


@needs_optuna
def test_with_shapes_every_trial_of_the_front_becomes_a_candidate(tmp_path: Path) -> None:
    width = Axis("target.hidden_size", "…", ("8", "12", "16"))

    def measure(settings: Sequence[str]) -> dict[str, float]:
        size = int(value(settings, "target.hidden_size"))
        return {"accuracy": {8: 0.7, 12: 0.6, 16: 0.9}[size], "params": float(size)}

    goals = {"accuracy": "higher", "params": "lower"}
    sought = searching(tmp_path, measure, axes=(width,), goals=goals)
    sought.run(9)
    kept, record = sought.found(1)
    sizes = [value(one.overrides[1:], "target.hidden_size") for one in kept]
    assert sorted(sizes) == ["16", "8"]  # each once; 12 is worse than 8 and larger
    assert [one.name for one in kept] == [f"hidden_size=0.5, trial {n}" for n in record.taken]


@needs_optuna
def test_a_journal_that_is_none_is_one_error(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("not json\nnor this\n")
    with pytest.raises(StorageError, match="journal") as error:
        searching(tmp_path).run(1)
    assert "remove it" in str(error.value)


# -- the samples that decide --------------------------------------------------------------------


def held(**spec: Any) -> Any:
    return limited(load_digits(), Data.model_validate({"source": "digits", **spec}))


def test_a_validation_part_is_taken_from_the_training_samples_alone() -> None:
    plain = held(limit={"train": 150, "test": 60})
    data = held(limit={"train": 150}, validation={"share": 0.2})
    assert (len(data.train), len(data.test)) == (120, 30)
    own = {np.asarray(plain.train.items[i]).tobytes() for i in range(150)}
    left, part = (
        {np.asarray(s.items[i]).tobytes() for i in range(len(s))} for s in (data.train, data.test)
    )
    assert left | part <= own and len(left) + len(part) == len(left | part)
    assert data.fingerprint != plain.fingerprint
    other = held(limit={"train": 150}, validation={"share": 0.2, "seed": 1})
    assert other.fingerprint != data.fingerprint
    assert other.test.labels.tolist() != data.test.labels.tolist()
    assert len(held(limit={"train": 150, "test": 7}, validation={}).test) == 7


def test_a_validation_part_leaves_something_on_both_sides() -> None:
    with pytest.raises(DataError, match="no samples are left"):
        held(limit={"train": 3}, validation={"share": 0.1})


@needs_optuna
def test_a_search_decides_on_held_out_samples_and_the_run_is_measured_on_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unproved(monkeypatch)
    undrawn(monkeypatch)
    spec = recipe(
        parents=[{"name": "a", "train": TRAIN}], baselines=[],
        data={"limit": {"train": 100, "test": 40}}, export={"quantize": {"mode": "none"}},
    )  # fmt: skip
    path = write_recipe(tmp_path / "tiny.yaml", spec)
    asked = {"search": ("finetune.lr=1e-4..1e-2",), "trials": 2, "out": tmp_path / "out"}
    found = sweep(path, **asked)
    (record,) = found.report.searches
    assert record.samples == 20 and record.goals == ACCURACY and len(record.trials) == 2
    for trial in record.trials:
        assert trial.figures is not None
        assert round(20 * trial.figures["accuracy"], 9) % 1 == 0
    (one,) = found.report.candidates
    lr = record.trials[record.taken[0] - 1].values["finetune.lr"]
    assert one.overrides == (f"finetune.lr={lr}",)
    assert one.row.metrics["accuracy"].n == 40
    settings = found.runs[one.name].report.settings["recipe"]
    assert settings["data"]["validation"] is None and settings["finetune"]["lr"] == lr
    trained = [s for log in tmp_path.rglob("log.jsonl") for s in events(log.parent, "start")]
    assert trained.count("parent-a") == 2  # once without the samples that are held out
    assert "2 trials, measured on 20 training samples" in (tmp_path / "out/sweep.html").read_text()
    again = sweep(path, **asked)
    assert again.report == found.report
