"""A dataclass as flags: a line a setting, from which come the parser, --help and the check of settings.json.

    @dataclass
    class Settings:
        steps: int = flag(1000, "optimizer steps", section="the steps")
        lr: float = flag(1e-4, "peak learning rate of AdamW")

A flag's type is its default's: bool, int, float, str, a list of str; None: a text that may be given empty.
"" and 0 stand for "not given". Fields without `flag` are saved with the settings and are no flags.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from support.files import InputError, read_json, write_atomic


def flag(
    default: Any,
    help: str,
    section: str = "",
    metavar: str = "",
    choices: Collection[str] = (),
    least: float | None = None,
    below: float | None = None,
    above: bool = False,
) -> Any:
    """A field of a settings dataclass. section: begins one of --help's, which holds until the next begins.

    least, below, above: a number's limits; `above` leaves `least` out. Without them: from 0, for a whole
    number from 1 and below a billion.
    """
    if below is None:
        below = 10**9 if isinstance(default, int) and least is None else math.inf
    least = (1 if isinstance(default, int) else 0) if least is None else least
    told: dict[str, Any] = {"help": help, "section": section, "metavar": metavar, "choices": choices}
    told |= {"least": least, "below": below, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=told)
    return dataclasses.field(default=default, metadata=told)


def flags_of(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a settings dataclass that are flags, by name."""
    return {f.name: f for f in dataclasses.fields(kind) if "help" in f.metadata}


def default_of(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return made() if made is not dataclasses.MISSING else field.default


def counting(settings: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The flags that count: without those named, and without what is empty, 0 or off, as it is by default."""
    values = {name: (getattr(settings, name), field) for name, field in flags_of(type(settings)).items()}
    return {
        name: value
        for name, (value, field) in values.items()
        if name not in without and (value or value not in ("", default_of(field)))
    }


def sections(kind: type) -> dict[str, list[str]]:
    """--help's sections: title -> names of flags."""
    found: dict[str, list[str]] = {}
    title = ""
    for name, field in flags_of(kind).items():
        title = field.metadata["section"] or title
        found.setdefault(title, []).append(name)
    return found


def limited(kind: type, least: float, below: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of a flag: a finite number from `least` on (`above`: beyond it), under `below`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value < below) or above and value == least:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {least:g}{limit}"
            )
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def add_flags(parser: argparse.ArgumentParser, kind: type, only: Collection[str] | None = None) -> None:
    """Give a parser the flags of a settings dataclass, or `only` some. What is not given parses to None."""
    flags = flags_of(kind)
    for title, names in sections(kind).items():
        names = [name for name in names if only is None or name in only]
        group = parser.add_argument_group(title) if names else None
        for name in names:
            told, default, text = flags[name].metadata, default_of(flags[name]), flags[name].metadata["help"]
            options: dict[str, Any] = {"default": None, "metavar": told["metavar"] or "NAME"}
            if isinstance(default, bool):
                options = {"default": None, "action": argparse.BooleanOptionalAction}
            elif told["choices"]:
                options = {"default": None, "choices": list(told["choices"])}
            elif isinstance(default, int | float):
                options["type"] = limited(type(default), told["least"], told["below"], told["above"])
                options["metavar"] = "N" if isinstance(default, int) else "X"
            elif isinstance(default, list):
                options["nargs"] = "+" if default else "*"
            if default and not isinstance(default, bool | list):
                text += f" (default: {default})"
            assert group is not None
            group.add_argument("--" + name.replace("_", "-"), help=text, **options)


def read_settings(path: Path, kind: type) -> dict[str, Any]:
    """What a settings.json holds of a settings dataclass; what means nothing any more is printed. Raises
    InputError for a value of another type than the flag gives."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    settings, unknown = {}, []
    for name, value in read_json(path).items():
        if name not in known:
            unknown += [f"{name}={value}"] if value and name != "command" else []
            continue
        if value is None:  # what an older version wrote where nothing was given
            continue
        default = default_of(known[name])
        kinds: Any = {float: (int, float), type(None): str}.get(type(default), type(default))
        choices = known[name].metadata.get("choices")
        fits = isinstance(value, kinds) and (isinstance(default, bool) or not isinstance(value, bool))
        fits = fits and not (isinstance(value, list) and any(not isinstance(item, str) for item in value))
        if not fits or choices and value not in choices:
            raise InputError(f"{path}: {name} is {value!r}, not what the flag gives")
        settings[name] = value
    if unknown:
        print(f"note: {path}: settings that mean nothing any more: {', '.join(unknown)}", flush=True)
    return settings


def write_settings(path: Path, settings: Any, **more: Any) -> None:
    """A run's settings.json, without what is said of a single call."""
    more |= {"resume": "", "change_settings": False, "overwrite": False}
    write_atomic(path, json.dumps(dataclasses.asdict(settings) | more, indent=1) + "\n")


def resumed(run: Path, kind: type, given: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """A run's own settings. Raises InputError where flags that are not `free` differ from them, unless
    --change-settings is given."""
    if not (path := run / "settings.json").exists():
        told = "nothing was saved there; begin again, without --resume, with the run's flags"
        raise InputError(f"{path}: no such file: {told} and --out {run}")
    settings = read_settings(path, kind)
    before = dataclasses.asdict(kind(**settings))
    changed = [
        f"--{name.replace('_', '-')} {value} (was {before[name]})"
        for name, value in given.items()
        if name not in free and value != before[name]
    ]
    if changed and not given.get("change_settings"):
        raise InputError(f"{run}: differs from its settings: {', '.join(changed)}; add --change-settings")
    return settings
