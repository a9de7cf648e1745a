"""`slimfuse recipe`: commands that look at recipes and check them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

recipes = typer.Typer(help="Look at recipes and check them.", no_args_is_help=True)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]


@recipes.command("check")
def recipe_check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe's keys and values; no data or model is opened."""
    from slimfuse.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()))
    typer.echo(f"{recipe}: recipe {loaded.name!r} is valid")


@recipes.command("list")
def recipe_list(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("recipes"),
) -> None:
    """List the recipes below a folder by family, one line each."""
    from rich.console import Console
    from rich.text import Text

    from slimfuse.errors import RecipeError
    from slimfuse.recipe.listing import listed

    if not folder.is_dir():
        raise RecipeError("there is no such folder", where=str(folder), hint="name a folder")
    lines = listed(folder)
    wide = [max([0, *(len(line[i]) for line in lines)]) for i in (0, 1)]
    stdout, before = Console(highlight=False), None
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
def recipe_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in."""
    from ruamel.yaml import YAML

    from slimfuse.recipe import load_recipe

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(load_recipe(recipe, tuple(overrides or ())).to_lock(), sys.stdout)


@recipes.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from slimfuse.recipe import recipe_schema as schema

    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
