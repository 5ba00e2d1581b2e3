"""Fills the pages of the site that are made from other sources, each time the site is built.

mkdocs calls `on_page_markdown` for every page (mkdocs.yml lists this file as a hook).

- `reference/command-line.md` is generated from the typer app, so it cannot differ from `--help`.
- `reference/python.md` has a table of options for each command.
- `index.md`, `contributing.md` and `changelog.md` show the files of the repository's root.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
#: Page of the site -> the file in the root of the repository that it shows.
ROOT_FILES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page before it is rendered; mkdocs calls this."""
    path = page.file.src_uri
    if path in ROOT_FILES:
        return root_file(ROOT_FILES[path])
    for mark, generated in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, generated())
    return markdown


def root_file(name: str) -> str:
    """A Markdown file of the root with its links changed to work inside the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for page, source in ROOT_FILES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text)


def command_reference() -> str:
    """One section per command: its arguments and options with their help and defaults."""
    from typer.main import get_command

    from prunus.cli.program import app

    group = get_command(app)
    return "\n\n".join(command_section(name, command) for name, command in group.commands.items())


def command_section(name: str, command: Any) -> str:
    """The section of one command: a table of its arguments, and one per panel of options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([f"prunus {name} [OPTIONS]", *(spelled_argument(p) for p in arguments)])
    panels: dict[str, list[Any]] = {"Argument": arguments}
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            panels.setdefault(parameter.rich_help_panel or "Option", []).append(parameter)
    lines = [f"## prunus {name}", "", command.help or "", "", "```text", usage, "```", ""]
    for heading, parameters in panels.items():
        if parameters:
            lines += [f"| {heading} | Meaning | Default |", "| --- | --- | --- |"]
            lines += [parameter_row(parameter) for parameter in parameters]
            lines.append("")
    return "\n".join(lines)


def option_tables() -> str:
    """A table per model of options: what each one does, its default, and whether it is a flag."""
    from prunus.evaluation.eval_options import TaskOptions, TextOptions
    from prunus.pruning.recipe import Recipe
    from prunus.recovery.recovery_options import RecoveryOptions
    from prunus.rounding.compression_recipe import CompressionRecipe
    from prunus.structure.structure_record import StructureRecipe

    models = (Recipe, CompressionRecipe, StructureRecipe, RecoveryOptions, TextOptions, TaskOptions)
    return "\n\n".join(option_table(model) for model in models)


def option_table(model: Any) -> str:
    """The options of one model."""
    lines = [f"### {model.__name__}", ""]
    lines += ["| Option | Meaning | Default | Flag |", "| --- | --- | --- | --- |"]
    for name, option in model.declared().items():
        field = model.model_fields[name]
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = option.default or ("" if value in (None, (), {}) else f"`{json.dumps(value)}`")
        spelled = (option.switch or f"--{name.replace('_', '-')}").partition("/")[0]
        flag = f"`{spelled}`" if option.flag else ""
        cells = (f"`{name}`", option.help, default, flag)
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return "\n".join(lines)


def spelled_argument(parameter: Any) -> str:
    """An argument as the usage line shows it."""
    name = argument_name(parameter)
    name += "..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def argument_name(parameter: Any) -> str:
    """The metavar of an argument without the brackets that typer puts around optional ones."""
    return str(parameter.metavar or parameter.name.upper()).strip("[]").removesuffix("…")


def parameter_row(parameter: Any) -> str:
    """One row of a table: spelling, help and default."""
    if parameter.param_type_name == "argument":
        spelling = f"`{argument_name(parameter)}`"
    else:
        spelling = ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts])
        if not parameter.is_bool_flag:
            spelling += f" {value_name(parameter)}"
    meaning, _, stated = (parameter.help or "").partition(" Default: ")
    cells = (spelling, meaning, stated.removesuffix(".") or default_of(parameter))
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def value_name(parameter: Any) -> str:
    """What stands for the value of an option, such as FILE or N."""
    if parameter.metavar:
        return str(parameter.metavar).strip("<>")
    return str(parameter.name.split("_")[-1].upper())


def default_of(parameter: Any) -> str:
    """The default as `--help` shows it; empty where there is none."""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or default == () or callable(default) or isinstance(default, bool):
        return ""
    return f"`{default}`"


def escaped(text: str) -> str:
    """Text for a cell of a table: one line, and no characters that Markdown or HTML would take."""
    text = " ".join(str(text).split())
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*")
        for part in parts
    ).replace("|", r"\|")


#: A mark in a page -> what replaces it.
MARKS = {
    "<!-- the commands are listed here -->": command_reference,
    "<!-- the options are listed here -->": option_tables,
}
