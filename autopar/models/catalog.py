"""The presets: models that can be planned by name, without a file, weights or a network. Imports no torch."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from autopar.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One model by name: `config` is a Hugging Face configuration, or the arguments of an own class.

    `default_seq` is the length it was trained with; None where there is none, or where the own class knows.
    """

    name: str
    family: str
    description: str
    parameters: int
    default_seq: int | None
    source: str
    own_class: str | None
    config_text: str

    @property
    def config(self) -> dict[str, Any]:
        """A fresh copy, so that changing it changes no other reader's."""
        return json.loads(self.config_text)

    @property
    def is_tiny(self) -> bool:
        return self.name.endswith("-tiny")


@cache
def presets() -> tuple[Preset, ...]:
    """All presets, by family and then size."""
    return tuple(sorted(_read_presets(), key=lambda p: (p.family, p.parameters, p.name)))


def names() -> tuple[str, ...]:
    """The names `autopar plan MODEL` accepts, in the order of `presets`."""
    return tuple(preset.name for preset in presets())


def preset(name: str) -> Preset:
    """The preset called `name`; raises `UsageError` with the nearest names when there is none."""
    for candidate in presets():
        if candidate.name == name:
            return candidate
    raise UsageError(f"model {name!r} is unknown; {hint(name)}")


def hint(name: str) -> str:
    """What to type instead of a name that does not exist."""
    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
    asked = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{asked}give a preset (`autopar models` lists them), a folder with config.json, or package.module:function"


def describe() -> str:
    """One line per preset: name, parameters, description."""
    width = max(len(name) for name in names())
    return "\n".join(f"{p.name:<{width}}  {_short(p.parameters):>7}  {p.description}" for p in presets())


def _read_presets() -> Iterator[Preset]:
    folder = resources.files("autopar.models") / "presets"
    for file in folder.iterdir():
        if not file.name.endswith(".json"):
            continue
        fields = json.loads(file.read_text(encoding="utf-8"))
        yield Preset(
            name=file.name.removesuffix(".json"),
            family=fields["family"],
            description=fields["description"],
            parameters=fields["parameters"],
            default_seq=fields.get("default_seq"),
            source=fields["source"],
            own_class=fields.get("own_class"),
            config_text=json.dumps(fields["config"]),
        )


def _short(count: int) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)
