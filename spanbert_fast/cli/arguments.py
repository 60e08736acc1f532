"""Options dataclasses as command lines: flags, positional words and switches, by tyro."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Command:
    """One word after `spanbert-fast`."""

    summary: str
    options: str
    """"module:name" of the dataclass, imported when needed."""
    run: Callable[[Any, bool], int]
    """Takes the options and whether JSON was asked for; gives the exit status."""
    positional: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_json: bool = False

    def options_class(self) -> type:
        """The dataclass of the options."""
        module, _, name = self.options.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found


def parse(command: Command, name: str, arguments: Sequence[str]) -> tuple[Any, bool]:
    """The options in `arguments`, and whether JSON was asked for.

    An unknown or malformed option ends the program with status 2, `--help` with status 0.

    Raises:
        ValueError: the options refuse a value.
    """
    import tyro

    base = command.options_class()
    hints = typing.get_type_hints(base)
    fields: list[tuple[str, Any, Any]] = []
    switches: list[str] = []
    for field in dataclasses.fields(base):
        hint: Any = hints[field.name]
        settings: dict[str, Any] = {}
        if field.name in command.renamed:
            settings["name"] = command.renamed[field.name]
        if field.name in command.positional:
            settings["metavar"] = field.name.upper()
        elif typing.get_origin(hint) is dict:
            settings |= {"metavar": "[KEY VALUE ...]", "help_behavior_hint": ""}
        elif type(None) in typing.get_args(hint):
            settings |= {"metavar": _metavar(hint), "help_behavior_hint": ""}
            switches += [field.name] if bool in typing.get_args(hint) else []
        marks = [tyro.conf.arg(**settings)]
        marks += [tyro.conf.Positional] if field.name in command.positional else []
        fields.append((field.name, Annotated[hint, *marks], _default_of(field)))
    if command.has_json:
        flag = Annotated[bool, tyro.conf.arg(help="Print JSON instead of a table.")]
        fields.append(("json", flag, dataclasses.field(default=False)))
    # Values are checked below, by the class itself: its message is one line, tyro's is a box.
    shown = dataclasses.make_dataclass(
        base.__name__,
        fields,
        bases=(base,),
        namespace={"__post_init__": lambda self: None},
        frozen=True,
        kw_only=True,
    )
    shown.__doc__ = base.__doc__
    given: Any = tyro.cli(
        shown,
        args=_spell_out(arguments, switches),
        prog=f"spanbert-fast {name}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(base)}
    return base(**values), bool(getattr(given, "json", False))


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, for a field that replaces it."""
    return dataclasses.field(default=field.default, default_factory=field.default_factory)


def _metavar(hint: Any) -> str:
    """How the value of an option that may be left out is written: its type without None."""
    shown = []
    for part in typing.get_args(hint):
        if typing.get_origin(part) is Literal:
            shown.append("{" + ",".join(map(str, typing.get_args(part))) + "}")
        elif typing.get_origin(part) is tuple:
            items = typing.get_args(part)
            names = [item.__name__.upper() for item in items if item is not Ellipsis]
            shown.append(f"{names[0]} [{names[0]} ...]" if Ellipsis in items else " ".join(names))
        elif part is not type(None):
            shown.append("[True|False]" if part is bool else part.__name__.upper())
    return "|".join(shown)


def _spell_out(arguments: Sequence[str], switches: Sequence[str]) -> list[str]:
    """`--switch` and `--no-switch` with their value, for switches whose default is open."""
    flags = {f"--{name.replace('_', '-')}": name for name in switches}
    words: list[str] = []
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag = word.replace("_", "-")
        if flag in flags and following not in ("True", "False"):
            words += [flag, "True"]
        elif flag.replace("--no-", "--", 1) in flags and flag.startswith("--no-"):
            words += [flag.replace("--no-", "--", 1), "False"]
        else:
            words.append(word)
    return words
