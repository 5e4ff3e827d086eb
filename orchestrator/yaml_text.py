"""YAML that people write: every value with its line, and no key that is given twice. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import Problem, SpecError

Location = tuple[str | int, ...]
MAX_NODES = 10_000  # values in a document, aliases written out; a few lines of aliases can stand for billions
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, path: Path, noun: str) -> tuple[Any, dict[Location, int], list[Problem]]:
    """Return the data with text as keys only, the line of every value, and what is wrong with its keys.

    noun: what the document is, for messages. Raises `SpecError` for what is too large, and whatever PyYAML does:
    `yaml.YAMLError`, `RecursionError`, `ValueError`, `LookupError`, `TypeError` or `AttributeError`.
    """
    node = yaml.compose(text, Loader=_Loader)
    index = _Index(path, noun)
    if node is not None:
        index.add(node, ())
    return _text_keys(yaml.load(text, Loader=_Loader)), index.lines, index.faults  # noqa: S506 - a SafeLoader


def dotted(location: Location) -> str:
    """A place as people write it: ``steps[1].with.num_bits``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


class _Index:
    """The line of every value, and every key that is given twice or is no text."""

    def __init__(self, path: Path, noun: str) -> None:
        self.path, self.noun = path, noun
        self.lines: dict[Location, int] = {}
        self.faults: list[Problem] = []
        self._nodes = 0

    def add(self, node: yaml.Node, location: Location) -> None:
        """Record a node and those below it. Raises `SpecError` for a document that grows too large."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise SpecError(
                f"the {self.noun} holds more than {MAX_NODES} values, aliases written out",
                where=f"{self.path}:{node.start_mark.line + 1}",
                remedy="write it without nested aliases",
            )
        self.lines[location] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            self._add_mapping(node, location)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.add(value, (*location, index))

    def _add_mapping(self, node: yaml.MappingNode, location: Location) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError("a list or mapping cannot be a key", where=f"{self.path}:{line}", remedy="use text")
            here = (*location, key.value)
            where = f"{self.path}:{line}: {dotted(here)}"
            if key.tag not in _KEY_TAGS:
                kind = key.tag.rpartition(":")[2]
                self.faults.append(Problem(f"this key is no text, but of kind {kind}", where, "put it in quotes"))
            if key.value in seen:
                self.faults.append(Problem("this key is given twice", where, "keep one"))
            seen.add(key.value)
            self.add(value, here)
            self.lines[here] = line


def _text_keys(data: Any) -> Any:
    """Return the data without the entries whose key is no text: `_Index` has named them."""
    if isinstance(data, dict):
        return {key: _text_keys(value) for key, value in data.items() if isinstance(key, str)}
    return [_text_keys(value) for value in data] if isinstance(data, list) else data
