"""The reference pages of the site, made from the code: API, command line, configuration.

A hook of mkdocs (mkdocs.yml). The pages exist while the site is built and are in no file, so they
cannot fall behind the code.
"""

import argparse
import importlib
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fedss
from fedss.cli.parser import make_parser
from fedss.config import OPTIONS, Option

# What `fedss` exports, in the order of use. A name that is missing here goes to the last section.
PUBLIC = {
    "Train": ("Config", "train", "compare", "Run", "METHODS"),
    "Data": ("load_data", "load_dataset", "Dataset", "Images", "RetrievalTask"),
    "Use a model": ("load", "Embedder", "embed_files", "Embeddings", "nearest", "export"),
    "Evaluate": ("evaluate", "evaluate_retrieval", "RetrievalMetrics", "write_report"),
    "Errors": ("FedssError", "ConfigError", "DataError", "RunFolderError", "DivergedError"),
}

# Modules that users import or that the explanations point to.
MODULES = (
    "fedss.core.algorithm",
    "fedss.core.client",
    "fedss.core.class_rows",
    "fedss.core.optimizers",
    "fedss.losses.methods",
    "fedss.losses.softmax",
    "fedss.losses.moments",
    "fedss.sampling.samplers",
    "fedss.wire.messages",
    "fedss.wire.codec",
    "fedss.data.assembly",
    "fedss.evaluation.retrieval",
    "fedss.evaluation.verification",
    "fedss.search",
    "fedss.errors",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the modules to the navigation, so that they are listed here alone."""
    pages = [{name: f"reference/{name}.md"} for name in MODULES]
    (reference,) = (section["Reference"] for section in config.nav or () if "Reference" in section)
    reference.append({"Modules": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, lines in (
        ("api", api()),
        ("cli", command_line()),
        ("configuration", configuration()),
        *((name, module(name)) for name in MODULES),
    ):
        text = "\n".join(lines) + "\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the roles of docstrings, as in :mod:`fedss.wire`, off the names that they mark."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    return re.sub(r":(?:mod|class|func|meth|data|attr|exc):(?=<code>)", "", html)


def api() -> Iterator[str]:
    """What `import fedss` offers."""
    yield "# Python\n"
    yield f"What `import fedss` offers, version {fedss.__version__}.\n"
    placed = {name for names in PUBLIC.values() for name in names}
    if unknown := placed - set(fedss.__all__):
        raise ValueError(f"{__file__}: PUBLIC names {sorted(unknown)}, which fedss does not export")
    more = tuple(name for name in fedss.__all__ if name not in placed)
    for section, names in (*PUBLIC.items(), *((("More", more),) if more else ())):
        yield f"## {section}\n"
        for name in names:
            yield f"::: fedss.{name}"
            yield "    options:"
            yield "      heading_level: 3"
            if name == "Config":
                yield "      members: false"
                yield "      show_signature: false"
                yield "\nIts fields are listed under [Configuration](configuration.md)."
            yield ""


def module(name: str) -> Iterator[str]:
    """The names of a module that are public and have a docstring."""
    importlib.import_module(name)  # a module that has moved ends the build here, and is named
    yield f"# {name}\n"
    yield f"::: {name}"
    yield "    options:"
    yield "      show_root_heading: false"
    yield "      show_root_toc_entry: false"


def command_line() -> Iterator[str]:
    """Every command with its arguments and options."""
    top = make_parser()
    (commands,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    yield "# Command line\n"
    yield f"{top.description}\n"
    yield "| command | what it does |\n|---|---|"
    for choice in commands._choices_actions:
        yield f"| [`fedss {choice.dest}`](#fedss-{choice.dest}) | {_cell(choice.help)} |"
    yield ""
    for name, command in commands.choices.items():
        yield f"## fedss {name}\n"
        yield f"{command.description}\n"
        yield f"```\n{' '.join(command.format_usage().split()).removeprefix('usage: ')}\n```\n"
        for group in command._action_groups:
            actions = [a for a in group._group_actions if a.dest != "help"]
            if not actions:
                continue
            title = (group.title or "").removeprefix("positional ")
            yield f"**{title.capitalize()}**\n"
            yield f"| {'argument' if title == 'arguments' else 'option'} | what it does |"
            yield "|---|---|"
            yield from (f"| {_flags(a)} | {_cell(_expand(a, command))} |" for a in actions)
            yield ""
        if command.epilog:
            yield f"```\n{command.epilog}\n```\n"


def _flags(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if isinstance(value, str) and action.nargs in ("+", "*"):
        value += " ..."
    if not action.option_strings:
        return f"`{value.strip()}`"
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return f"{flags[:-1]}{value}`" if value else flags


def _expand(action: argparse.Action, command: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": command.prog}
    return text + (" (required)" if action.required and action.option_strings else "")


def configuration() -> Iterator[str]:
    """Every field of the configuration, by group."""
    hints = get_type_hints(fedss.Config)
    yield "# Configuration\n"
    yield (
        "The fields of [`fedss.Config`](api.md#fedss.Config). On the command line each is an "
        "option: the field `class_row_lr` is `--class-row-lr`. A run writes all of them to its "
        "`config.json`.\n"
    )
    groups: dict[str, list[Option]] = {}
    for item in OPTIONS:
        groups.setdefault(item.group, []).append(item)
    for group, items in groups.items():
        yield f"## {group.capitalize()}\n"
        yield "| field | type | default | what it does |\n|---|---|---|---|"
        for item in items:
            kind = _type(hints[item.name])
            help = _cell(item.help)
            yield f"| `{item.name}` | {kind} | `{item.default!r}` | {help} |"
        yield ""


def _type(hint: Any) -> str:
    parts = [part for part in get_args(hint) if part is not type(None)]
    if not parts:
        return f"`{hint.__name__}`"
    if all(isinstance(part, str) for part in parts):
        return ", ".join(f"`{part}`" for part in parts)
    optional = " or `None`" if type(None) in get_args(hint) else ""
    return " or ".join(map(_type, parts)) + optional


# What a parser's help may hold that is a command's or an option's name.
_CODE = re.compile(r"(?<![\w`-])(--[a-z][a-z-]+|[\w.]+/[\w./]+\.(?:json|md)|\$[A-Z_]+)")


def _cell(text: str | None) -> str:
    """Help as the cell of a table: Markdown has no meaning in it, and a bar is a bar."""
    escaped = re.sub(r"([\\|*_<\[\]`])", r"\\\1", text or "")
    return _CODE.sub(lambda match: f"`{match[0]}`".replace("\\", ""), escaped)
