"""`slimfuse recipe`: commands that look at recipes and check them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slimfuse.cli.output import AsJson, give, recipe_paths, screen

recipes = typer.Typer(help="Look at recipes and check them.", no_args_is_help=True)

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="The recipe, a YAML file.", show_default=False, autocompletion=recipe_paths
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]


@recipes.command("check")
def recipe_check(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe's keys and values; no data or model is opened."""
    from slimfuse.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()))
    typer.echo(f"{recipe}: recipe {loaded.name!r} is valid", err=as_json)
    give({"recipe": recipe, "name": loaded.name, "valid": True}, as_json)


@recipes.command("list")
def recipe_list(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("recipes"),
    as_json: AsJson = False,
) -> None:
    """List the recipes below a folder by family, one line each; in JSON every one."""
    from rich.text import Text

    from slimfuse.errors import RecipeError
    from slimfuse.recipe.listing import entries, listed

    if not folder.is_dir():
        raise RecipeError("there is no such folder", where=str(folder), hint="name a folder")
    if as_json:
        give(entries(folder), as_json)
        return
    lines = listed(folder)
    wide = [max([0, *(len(line[i]) for line in lines)]) for i in (0, 1)]
    stdout, before = screen(as_json), None
    for family, name, about, style in lines:
        first = family if family != before else ""
        text = Text(f"{first:{wide[0]}}  {name:{wide[1]}}  ").append(about, style=style)
        if stdout.is_terminal:
            stdout.print(text, no_wrap=True, overflow="ellipsis")
        else:
            stdout.print(text, soft_wrap=True)
        before = family
    last = f"slimfuse plan {folder}/NAME says what one makes and needs"
    stdout.print(escape(last if lines else f"no recipe below {folder}"), soft_wrap=True)


@recipes.command("show")
def recipe_show(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a recipe with every default filled in."""
    from ruamel.yaml import YAML

    from slimfuse.recipe import load_recipe

    values = load_recipe(recipe, tuple(overrides or ())).to_lock()
    if as_json:
        give(values, as_json)
        return
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(values, sys.stdout)


@recipes.command("schema")
def recipe_schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of recipes, for editors; it is JSON with --json or without."""
    from slimfuse.recipe import recipe_schema as schema

    give(schema(), True)
