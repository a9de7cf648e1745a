"""The command line: every command runs, every end has its exit code and one message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_run import recipe, undrawn, write_recipe

from slimfuse import cli, doctor
from slimfuse.cli.output import recipe_paths
from slimfuse.errors import EXIT_CODES
from slimfuse.finetune.schedule import batch_indices
from slimfuse.pipeline import Reproduction, Run
from slimfuse.pipeline.reproduce_figures import Compared
from slimfuse.recipe import load_recipe
from slimfuse.stock import Verified

Ran = tuple[int, str, str]


def test_a_new_process_answers_at_once_and_without_torch() -> None:
    script = (
        "import sys; sys.argv = ['slimfuse', '--help']\n"
        "from slimfuse.cli import main\n"
        "try: main()\n"
        "finally: print('TORCH' if 'torch' in sys.modules else 'LIGHT')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LIGHT" in done.stdout
    for command in ("compress", "sweep", "compare", "plan", "verify", "doctor", "recipe"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", ["compress", "sweep", "compare", "plan", "verify", "doctor", "recipe"]
)
def test_every_command_has_help(run: Callable[..., Ran], command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and "Usage: slimfuse" in out


def test_compress_shows_table_gates_and_places(
    run: Callable[..., Ran], finished: Run, tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    gated = recipe(gates=[{"metric": "params", "max_ratio": 0.9}])
    code, out, err = run("compress", write_recipe(tmp_path / "gated.yaml", gated), "--out", folder)
    assert code == 0, err
    for words in ("finetuned", "onnx-int8", "accuracy %", "gate params", "held",
                  f"model:  {folder / 'model'}", f"report: {folder / 'report.html'}"):  # fmt: skip
        assert words in out
    assert "finetuned: " in err and "%" in err


def test_a_failed_gate_ends_with_3_and_a_report(
    run: Callable[..., Ran], finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    strict = recipe(gates=[{"metric": "params", "max_ratio": 0.01}])
    code, out, _ = run("compress", write_recipe(tmp_path / "strict.yaml", strict), "--out", folder)
    assert code == 3
    assert "gate params" in out and "FAILED" in out
    assert json.loads((folder / "report.json").read_text())["gates"]
    assert (folder / "report.html").is_file() and (folder / "model").is_dir()


def test_an_interruption_ends_with_130(
    run: Callable[..., Ran], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimfuse.finetune.loop.batch_indices", interrupt)
    code, out, err = run("compress", tiny_recipe, "--out", tmp_path / "run")
    assert (code, out) == (130, "")
    assert "interrupted: run the same command again" in err and "Traceback" not in err


def test_an_interrupted_training_says_what_is_kept(
    run: Callable[..., Ran], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(3))

    def interrupt(*given: object) -> object:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return batch_indices(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("slimfuse.finetune.loop.batch_indices", interrupt)
    code, out, err = run("compress", tiny_recipe, "--out", tmp_path / "run")
    assert (code, out) == (130, "")
    assert "training parent a: saved after 3 of " in err
    assert "interrupted: run the same command again to go on from here" in err
    assert list((tmp_path / "run").glob("stages/parent-a-*.partial/checkpoint.safetensors"))


def test_an_internal_fault_is_one_message_and_with_debug_a_traceback(
    run: Callable[..., Ran], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError("a [bold]fault[/] of ours")

    monkeypatch.setattr("slimfuse.finetune.loop.batch_indices", fault)
    command = ("compress", tiny_recipe, "--out", tmp_path / "run")
    code, _, err = run(*command)
    assert code == 1 and "Traceback" not in err
    assert "internal fault: ZeroDivisionError: a [bold]fault[/] of ours" in err
    assert "--debug" in err
    code, _, err = run(*command, "--debug")
    assert code == 1 and "Traceback" in err and "fault" in err


def test_an_error_of_the_exporter_is_told_as_ours_are(
    run: Callable[..., Ran], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse_export import CheckFailed

    def fail(*_: object) -> None:
        raise CheckFailed("the file is off", got="this", allowed="that")

    monkeypatch.setattr("slimfuse.finetune.loop.batch_indices", fail)
    code, _, err = run("compress", tiny_recipe, "--out", tmp_path / "run")
    assert code == 3 and "internal fault" not in err
    assert "error: the file is off" in err and "allowed: that" in err


def test_debug_keeps_the_exit_code_of_a_user_error(run: Callable[..., Ran]) -> None:
    code, _, err = run("--debug", "compress", "gone.yaml")
    assert code == 2 and "Traceback" in err and "error: " in err


def test_a_wrong_command_line_ends_with_2(run: Callable[..., Ran]) -> None:
    code, _, err = run("compres")
    assert code == 2 and "compress" in err
    code, _, err = run("compress")
    assert code == 2 and "recipe" in err


def test_plan_tells_models_memory_and_disk(run: Callable[..., Ran], tiny_recipe: Path) -> None:
    code, out, _ = run("plan", tiny_recipe)
    assert code == 0
    for words in ("child", "8 wide, 2 deep", "1.6 k", "peak memory", "disk"):
        assert words in out
    assert "num_attention_heads: not given, so the parent's 2, with 4 units each" in out
    assert "Shapes for the child" not in out  # the ratio is met: nothing was searched


def test_plan_shows_what_a_budget_or_a_rounded_ratio_came_to(
    run: Callable[..., Ran], tiny_recipe: Path
) -> None:
    budget = "target={budget: {params: 0.4}}"
    code, out, _ = run("plan", tiny_recipe, "--set", budget)
    assert code == 0
    for words in ("Shapes for the child", "chosen", "possible", "refused", "over the budget",
                  "meets params up to 0.4 of the parent's"):  # fmt: skip
        assert words in " ".join(out.split())
    chosen = next(line for line in out.splitlines() if "chosen" in line)
    child = next(line for line in out.splitlines() if line.startswith("│ child"))
    shape = chosen.split("│")[2].strip()
    assert shape and shape in child

    code, out, _ = run("plan", tiny_recipe, "--set", "target.hidden_size=0.45")
    assert code == 0 and "Shapes for the child" in out
    assert "hidden_size: 0.45 of the parent's 16 is 7.2; the nearest legal value is 8." in out
    assert "must be a multiple" in " ".join(out.split())

    code, _, err = run("plan", tiny_recipe, "--set", "target={budget: {params: 10}}")
    assert code == 2 and "no legal shape meets the budget" in err and "target.budget.params" in err


def test_recipe_commands(run: Callable[..., Ran], tiny_recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("recipe", "check", tiny_recipe)
    assert code == 0 and "recipe 'tiny' is valid" in out and err == ""
    code, _, err = run("recipe", "check", tiny_recipe, "--set", "finetune.lr=-1")
    assert code == 2 and "finetune.lr" in err

    code, out, _ = run("recipe", "show", tiny_recipe, "--set", "finetune.lr=0.25")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(tiny_recipe, ("finetune.lr=0.25",))

    code, out, _ = run("recipe", "schema")
    assert code == 0 and "finetune" in json.loads(out)["$defs"]["Recipe"]["properties"]

    (tiny_recipe.parent / "broken.yaml").write_text("version: 2\n")
    code, out, _ = run("recipe", "list", tiny_recipe.parent)
    assert code == 0 and "tiny.yaml" in out and "broken.yaml" in out and "unknown value" in out
    code, _, err = run("recipe", "list", tmp_path / "gone")
    assert code == 2 and "no such folder" in err


def test_recipes_are_listed_by_family_on_one_line_each(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    code, out, _ = run("recipe", "list")
    *lines, last = out.splitlines()
    assert code == 0 and last == "slimfuse plan recipes/NAME says what one makes and needs"
    # a screen of 40 lines; the ablations' recipes, 21, have one line together
    assert len(lines) < 40
    assert any("21 recipes: slimfuse recipe list recipes/ablations" in line for line in lines)
    families = [line.split(" ")[0] for line in lines if not line.startswith(" ")]
    assert families == sorted(set(families)) and {"bert", "llama", "vit"} <= set(families)
    bert = next(i for i, line in enumerate(lines) if line.startswith("bert "))
    assert "bert/base-half.yaml  " in lines[bert]
    assert lines[bert].endswith("become one of half their width.")  # whole where no screen cuts it
    assert len([line for line in lines if "ablations" in line]) == 1
    code, out, _ = run("recipe", "list", "recipes/ablations")
    assert code == 0 and len(out.splitlines()) == 22 and "solver-partial.yaml" in out


def test_a_users_text_is_no_markup(run: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "[red]odd[/red]"
    write_recipe(folder / "fine.yaml")
    (folder / "fine.yaml").write_text("# does [/x] it\n" + (folder / "fine.yaml").read_text())
    broken = (folder / "fine.yaml").read_text() + "'[/bold]': 2\n"
    (folder / "broken.yaml").write_text(broken)
    code, out, _ = run("recipe", "list", folder)
    assert code == 0
    assert "does [/x] it" in out and "[/bold]" in out and "[red]odd[/red]" in "".join(out.split())
    code, out, _ = run("recipe", "check", folder / "fine.yaml")
    assert code == 0 and f"{folder}/fine.yaml: recipe" in out
    code, _, err = run("verify", folder)
    assert code == 2 and str(folder) in err


def test_the_hint_to_recipes_is_given_where_there_are_some(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "recipe list" not in run("recipe", "check", "gone.yaml")[2]
    (tmp_path / "recipes").mkdir()
    assert "recipe list" in run("recipe", "check", "gone.yaml")[2]


def test_doctor(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("doctor")
    assert code == 0 and err == ""
    for words in ("torch: ", "cores: ", "INT8: "):
        assert words in out
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    code, out, _ = run("doctor")
    assert code == 3 and "no-such-package: missing" in out


def test_verify_tells_what_it_found(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = run("verify", tmp_path)
    assert code == 2 and "not a finished model folder" in err and "next:" in err
    monkeypatch.setattr("slimfuse.stock.verify", lambda *_: Verified("ViT", "Pil", 1610, 2e-7))
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "1,610 parameters" in out


def leaves(group: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return every command by its words."""
    found: dict[str, Any] = {}
    for name, one in group.commands.items():
        words = (*path, name)
        found |= leaves(one, words) if hasattr(one, "commands") else {" ".join(words): one}
    return found


COMMANDS = leaves(typer.main.get_command(cli.app))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_verb_prints_json_where_asked(command: str) -> None:
    (flag,) = [one for one in COMMANDS[command].params if "--json" in one.opts]
    assert flag.is_flag and flag.default is False


@pytest.mark.parametrize(
    "words", [("recipe", "check"), ("recipe", "show"), ("recipe", "schema"), ("doctor",), ("plan",)]
)
def test_json_is_all_that_stands_on_stdout(
    run: Callable[..., Ran], tiny_recipe: Path, words: tuple[str, ...]
) -> None:
    given = [] if words[-1] in ("schema", "doctor") else [tiny_recipe]
    code, out, _ = run(*words, *given, "--json")
    assert code == 0 and json.loads(out)


def test_json_of_runs_folders_and_recipes(
    run: Callable[..., Ran], finished: Run, tiny_recipe: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("slimfuse.pipeline.compress", lambda *_, **__: finished)
    code, out, err = run("compress", tiny_recipe, "--json")
    told = json.loads(out)
    assert code == 0 and told["passed"] and "finetuned" in err
    assert told["report"] == json.loads((finished.folder / "report.json").read_text())

    (tiny_recipe.parent / "broken.yaml").write_text("version: 2\n")
    code, out, _ = run("recipe", "list", tiny_recipe.parent, "--json")
    listed = {Path(one["path"]).name: one for one in json.loads(out)}
    assert listed["tiny.yaml"]["error"] is None and "version" in listed["broken.yaml"]["error"]

    same = Reproduction(finished.folder, finished, (Compared("a", "1", "2", False),), ())
    monkeypatch.setattr("slimfuse.pipeline.reproduce", lambda *_, **__: same)
    code, out, err = run("reproduce", finished.folder, "--json")
    assert code == 3 and not json.loads(out)["reproduced"] and "does not reproduce" in err
    code, out, _ = run("reproduce", finished.folder)
    assert code == 3 and "NO" in out and "must be, too" in out


def test_an_error_under_json_is_one_on_stderr(run: Callable[..., Ran], tmp_path: Path) -> None:
    for words in (("compress", "gone.yaml"), ("reproduce", tmp_path), ("verify", tmp_path)):
        code, out, err = run(*words, "--json")
        assert (code, out) == (2, "") and err.count("error:") == 1


def test_help_states_the_exit_codes(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run("--help")
    text = " ".join(out.split())
    for code, told in EXIT_CODES.items():
        assert f"{code.value} {told}" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_verbs_and_recipes(shell: str) -> None:
    def completed(words: str, number: int) -> str:
        env = {
            **os.environ, "_SLIMFUSE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words,
            "COMP_CWORD": str(number), "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }  # fmt: skip
        command = [sys.executable, "-m", "slimfuse"]
        root = Path(__file__).parents[1]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, check=True, cwd=root
        )
        return done.stdout

    verbs = completed("slimfuse re", 1)
    assert "reproduce" in verbs and "recipe" in verbs and "compress" not in verbs
    assert "recipes/vit/digits.yaml" in completed("slimfuse compress recipes/vit/d", 2)


def test_recipe_paths_are_folders_and_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("recipes/a.yaml", "recipes/b.txt", "recipes/.c.yaml", "r.yml"):
        (tmp_path / name).touch()
    assert list(recipe_paths("r")) == ["r.yml", "recipes/"]
    assert list(recipe_paths("recipes/")) == ["recipes/a.yaml"]
    assert list(recipe_paths("./r")) == ["r.yml", "recipes/"]
    assert list(recipe_paths("gone/x")) == []
