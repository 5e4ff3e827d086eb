"""Requests of a recorded trace, read line by line: ours, Mooncake's and Azure's formats.

    JSON lines, plain       {"arrival_s": 0.5, "prompt_tokens": 161, "answer_tokens": 338}
                            answer_tokens may be a list, one length for each parallel sample;
                            "prefix_ids": [7, 9], "chunk_tokens": 64 name the text that the prompt begins with
    JSON lines, Mooncake    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}
                            milliseconds; one id for each 512 tokens (arXiv:2407.00079, FAST25 traces)
    CSV, Azure              TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces 2023 and 2024)

A name that ends in .gz is unpacked on the way. A trace is read anew for each policy, so it is never held in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from orchestrator.errors import SpecError

NS = 10**9
MOST_TOKENS = 2**40
MOST_LINE = 2**20  # characters; a request of a million tokens in Mooncake's form has some 20,000
MOST_SAMPLES = 1024
# Python's hash of integers repeats beyond this, and block keys are chained with it.
MOST_ID = 2**60
MOST_SECONDS = 10**9
MOONCAKE_CHUNK = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Request(NamedTuple):
    """One request, of which only lengths and shared text matter.

    arrival_ns: nanoseconds since any fixed moment; never earlier than that of the request before.
    answer_tokens: what will be generated, one length for each parallel sample.
    prefix: names of the texts that the prompt begins with, `chunk_tokens` tokens each. Two prompts share their text as
        far as the names are the same from the first on; what follows is nobody else's.
    """

    arrival_ns: int
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    chunk_tokens: int = 0


@dataclass(frozen=True)
class Trace:
    """The requests of a file, in its order. Iterating raises `SpecError` at the first line that is no request."""

    path: Path

    def __iter__(self) -> Iterator[Request]:
        last = None
        for number, request in self._numbered():
            if last is not None and request.arrival_ns < last:
                raise SpecError(
                    f"the request arrives {(last - request.arrival_ns) / NS:g} s before the one above it",
                    where=f"{self.path}:{number}",
                    remedy="sort the trace by time of arrival",
                )
            last = request.arrival_ns
            yield request
        if last is None:
            raise SpecError("the trace has no requests", where=str(self.path), remedy="give one request a line")

    def _numbered(self) -> Iterator[tuple[int, Request]]:
        names = [part.lower() for part in self.path.suffixes]
        packed = bool(names) and names[-1] == ".gz"
        kind = names[-2 if packed else -1] if len(names) > packed else ""
        if kind not in (".jsonl", ".json", ".ndjson", ".csv"):
            raise SpecError(
                f"the format of the trace {self.path.name!r} is not known by its name",
                remedy="name it .jsonl or .csv, with .gz behind if it is packed",
            )
        number = 0
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") if packed else self.path.open(encoding="utf-8") as file:
                for number, request in (_csv if kind == ".csv" else _json)(_lines(file, self.path), self.path):
                    yield number, request
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise SpecError(
                f"the trace cannot be read: {error}",
                where=f"{self.path}:{number + 1}" if number else str(self.path),
                remedy="give a readable .jsonl or .csv file in UTF-8, packed by gzip if it ends in .gz",
            ) from None


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, none of them longer than a request can be: a trace is never in memory as a whole."""
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise _bad(path, number, f"a line of more than {MOST_LINE} characters")
        yield line


def _json(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Request]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
            raise _bad(path, number, f"not a JSON object: {reason}") from None
        if not isinstance(fields, dict):
            raise _bad(path, number, f"not a JSON object: {line.strip()[:40]}")
        read: Callable[[dict[str, Any]], Request] = _mooncake if "input_length" in fields else _plain
        try:
            yield number, read(fields)
        except ValueError as error:
            raise _bad(path, number, str(error)) from None


def _csv(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Request]]:
    rows = csv.reader(lines)
    header = [name.strip().lstrip("\ufeff") for name in next(rows, [])]
    if header and not set(AZURE_COLUMNS) <= set(header):
        missing = ", ".join(name for name in AZURE_COLUMNS if name not in header)
        raise SpecError(
            f"the table has no column {missing}", where=f"{path}:1", remedy=f"give {','.join(AZURE_COLUMNS)}"
        )
    places = [header.index(name) for name in AZURE_COLUMNS] if header else []
    for row in rows:
        if not row:
            continue
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} columns, the header has {len(header)}")
            when, prompt, answer = (row[place].strip() for place in places)
            request = Request(_moment(when), _tokens("ContextTokens", prompt), (_tokens("GeneratedTokens", answer),))
        except ValueError as error:
            raise _bad(path, rows.line_num, str(error)) from None
        yield rows.line_num, request


def _plain(fields: dict[str, Any]) -> Request:
    answers = _need(fields, "answer_tokens")
    lengths = answers if isinstance(answers, list) else [answers]
    if not 1 <= len(lengths) <= MOST_SAMPLES:
        raise ValueError(f"answer_tokens has {len(lengths)} samples, not 1 to {MOST_SAMPLES}")
    prefix = _ids("prefix_ids", fields.get("prefix_ids"))
    return Request(
        _ns("arrival_s", _need(fields, "arrival_s"), NS),
        _count("prompt_tokens", _need(fields, "prompt_tokens")),
        tuple(_count("answer_tokens", length) for length in lengths),
        prefix,
        _count("chunk_tokens", fields.get("chunk_tokens")) if prefix else 0,
    )


def _mooncake(fields: dict[str, Any]) -> Request:
    prefix = _ids("hash_ids", fields.get("hash_ids"))
    return Request(
        _ns("timestamp", _need(fields, "timestamp"), 10**6),
        _count("input_length", fields["input_length"]),
        (_count("output_length", _need(fields, "output_length")),),
        prefix,
        MOONCAKE_CHUNK if prefix else 0,
    )


def _need(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"no field {name!r}")
    return fields[name]


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} is {str(value)[:40]}, not a positive number of tokens")
    return value


def _tokens(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 15):
        raise ValueError(f"{name} is {text[:40]!r}, not a positive number of tokens")
    return _count(name, int(text))


def _ns(name: str, value: object, unit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {str(value)[:40]}, not a time")
    if not 0 <= value * unit <= MOST_SECONDS * NS:  # NaN fails it
        raise ValueError(f"{name} is {str(value)[:40]}, not a time from 0 to {MOST_SECONDS} s")
    return round(value * unit)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < MOST_ID for one in value):
        raise ValueError(f"{name} is not a list of integers from 0 to 2^60")
    return tuple(value)


def _moment(text: str) -> int:
    """Return nanoseconds since 1970 of e.g. `2023-11-16 18:17:03.9799600`, UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"TIMESTAMP is {text[:40]!r}, not like 2023-11-16 18:17:03.97996") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    whole = int(moment.replace(microsecond=0).timestamp()) * NS
    return whole + moment.microsecond * 1000


def _bad(path: Path, number: int, what: str) -> SpecError:
    return SpecError(what, where=f"{path}:{number}", remedy="correct the line or leave it out")
