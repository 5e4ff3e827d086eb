"""Changing valid bytes into nearly valid ones: at places of their JSON or YAML tree, or of the bytes themselves.

Bytes of a valid file hardly ever stay a valid file when one of them is changed; what lies behind the parser is reached
by changing values, keys and branches. `mutate` asks its random numbers for every choice, so that hypothesis can shrink.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

_DEEP: Any = []
for _ in range(400):
    _DEEP = [_DEEP]
# Values that some reader somewhere did not think of.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    16,
    1.5,
    -0.0,
    1e308,
    1e-320,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63),
    10**30,
    10**4000,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "0",
    "1",
    "-1",
    "1e400",
    "nan",
    "null",
    "\0",
    "\n",
    "\r\n",
    "\x1b[2J",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ud800",
    "\u00b2",
    "\u0663",
    "e\u0301",
    "\U0001f600",
    "x" * 300,
    "x" * 6000,
    "a/b",
    "../../x",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "~nobody",
    "~",
    "C:\\x",
    "file:///x",
    "s3://b/k",
    "http://[::1",
    "hub:a/b:c",
    "re:(",
    "re:(a+)+$",
    "*",
    "[",
    "[a-",
    "**",
    "%s%n",
    "{0.__class__}",
    "{{7*7}}",
    "2001-99-99",
    "2001-01-01",
    "12:30:45",
    "0x1F",
    "0b1",
    "1_000",
    "=",
    "<<",
    "Linear",
    "model.layers.99999999999999999999.mlp.up_proj.weight",
    "model.layers.\u00b2.mlp.up_proj.weight",
    "full_attention",
    "mamba",
    "yarn",
    [],
    {},
    [[]],
    [{}],
    [None],
    [1, 2, 3],
    ["a"],
    {"a": 1},
    {"": None},
    {"a": {"a": {}}},
    [0] * 70,
    _DEEP,
)
# Pieces that mean something to a parser.
TOKENS = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x80",
    b"&a ",
    b"*a",
    b"&a [*a, *a]",
    b"<<: *a",
    b"!!python/object/apply:os.system",
    b"!!binary a",
    b"!!timestamp x",
    b"!!int x",
    b"!!float x",
    b"!!set {a}",
    b"!!omap [a]",
    b"!<tag:yaml.org,2002:null> ",
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b"? [a]\n: b\n",
    b"? ",
    b"|2\n",
    b">-\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b"{{",
    b"'",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 600,
    b"\t",
    b"\r",
    b"\n",
    b"\xe2\x80\xa8",
    b": ",
    b"- ",
    b"#",
    b",",
    b"1:1:1:1:1",
    b"2001-99-99",
    b".inf",
    b".nan",
    b"0o8",
    b"~",
)
_NAMES = (
    "a",
    "",
    "files",
    "with",
    "..",
    "\u00e9",
    "__class__",
    "min",
    "max",
    "retain",
    "step",
    "__metadata__",
    "re:(",
    "0",
)


def mutate(data: bytes, random: Random) -> bytes:
    """Return other bytes, made by one to four changes; mostly of values, sometimes of the bytes they are written as."""
    if random.randrange(5):
        changed = _of_tree(data, random)
        if changed is not None:
            return changed
    for _ in range(random.randrange(1, 5)):
        data = random.choice(_BYTES)(data, random)
    return data


def _of_tree(data: bytes, random: Random) -> bytes | None:
    """Change what the bytes stand for, as they came: JSON, lines of it, safetensors, YAML. None if they are neither."""
    length = int.from_bytes(data[:8], "little")
    if 2 <= length <= len(data) - 8 and data[8:9] == b"{":
        header = _of_tree(data[8 : 8 + length], random)
        if header is None:
            return None
        given = len(header) if random.randrange(8) else random.choice((0, 1, 2**63, length))
        return given.to_bytes(8, "little") + header + data[8 + length :]
    if data[:1] in b"{[" and b"\n" in data.strip():
        lines = data.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = _of_tree(lines[at], random) or lines[at]
        return b"\n".join(lines)
    try:
        tree = json.loads(data)
        write: Callable[[Any], bytes] = _json
    except (ValueError, RecursionError):
        try:
            tree = yaml.safe_load(data)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return None
        write = _yaml
    if not isinstance(tree, dict | list):
        return None
    for _ in range(random.randrange(1, 5)):
        tree = _changed(tree, random)
    try:
        return write(tree)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):
        return None


def _json(tree: Any) -> bytes:
    text = json.dumps(tree, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _yaml(tree: Any) -> bytes:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).encode("utf-8", "surrogatepass")


def _changed(tree: Any, random: Random) -> Any:
    """Change one place of a tree, chosen by walking down at random; the tree itself stays as it was."""
    stop = not isinstance(tree, dict | list) or not tree or not random.randrange(4)
    if stop:
        return _replaced(tree, random)
    if isinstance(tree, list):
        entries: list[Any] = list(tree)
        at = random.randrange(len(entries))
        kind = random.randrange(8)
        if kind == 0:
            del entries[at]
        elif kind == 1:
            entries.insert(at, entries[random.randrange(len(entries))])
        elif kind == 2:
            entries.append(random.choice(ODD))
        else:
            entries[at] = _changed(entries[at], random)
        return entries
    table = dict(tree)
    key = random.choice(sorted(table, key=str))
    kind = random.randrange(8)
    if kind == 0:
        del table[key]
    elif kind == 1:
        table[random.choice(_NAMES)] = table.pop(key)
    elif kind == 2:
        table[random.choice(_NAMES) if random.randrange(2) else str(random.choice(ODD))[:6000]] = random.choice(ODD)
    else:
        table[key] = _changed(table[key], random)
    return table


def _replaced(value: Any, random: Random) -> Any:
    kind = random.randrange(6)
    if kind == 0 and isinstance(value, int) and not isinstance(value, bool):
        return value + random.choice((-1, 1, 7, 2**20, 2**40))
    if kind == 1 and isinstance(value, str) and value:
        at = random.randrange(len(value))
        return value[:at] + str(random.choice(ODD))[:300] + value[at:]
    if kind == 2:
        return [value]
    if kind == 3 and isinstance(value, str) and len(value) % 4 == 0:  # a document in a text, as signatures have it
        try:
            inner = _of_tree(base64.b64decode(value, validate=True), random)
        except (binascii.Error, ValueError):
            inner = None
        return value if inner is None else base64.b64encode(inner).decode()
    return random.choice(ODD)


def _inserted(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(TOKENS) + data[at:]


def _cut(data: bytes, random: Random) -> bytes:
    first, last = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    return data[:first] + data[last:]


def _repeated(data: bytes, random: Random) -> bytes:
    first = random.randrange(len(data) + 1)
    last = min(len(data), first + random.randrange(1, 80))
    return data[:last] + data[first:last] * random.randrange(1, 9) + data[last:]


def _flipped(data: bytes, random: Random) -> bytes:
    if not data:
        return b"a"
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


_BYTES = (_inserted, _inserted, _cut, _repeated, _flipped)
