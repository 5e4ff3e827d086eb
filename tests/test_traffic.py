"""Traffic: distributions against their moments, traces in three formats, and every line that is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import SpecError
from orchestrator.simulation.trace import NS
from orchestrator.simulation.traffic import Distribution, Lengths, Request, Trace, parse_lengths, traffic_from_options

SHORT = Lengths("uniform", 8, low=4, high=12)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def test_the_same_seed_gives_the_same_requests() -> None:
    def drawn(**changes: Any) -> list[Request]:
        return list(
            Distribution(**{"requests": 20_000, "rate": 5.0, "prompt": SHORT, "answer": SHORT, "seed": 3, **changes})
        )

    first = drawn()
    assert first == drawn() and first != drawn(seed=4)
    assert len(first) == 20_000 and first[0].prefix == ()
    assert all(
        isinstance(value, int) for value in (first[0].arrival_ns, first[0].prompt_tokens, *first[0].answer_tokens)
    )
    # A quantity has a stream of its own: the others stay as they are.
    prefixed = drawn(prefixes=5, prefix_tokens=100, samples=3)
    assert [one.arrival_ns for one in prefixed] == [one.arrival_ns for one in first]
    assert [one.prompt_tokens - 100 for one in prefixed] == [one.prompt_tokens for one in first]
    assert {len(one.answer_tokens) for one in prefixed} == {3} and {one.chunk_tokens for one in prefixed} == {100}


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_burstiness_asked_for(burstiness: float) -> None:
    traffic = Distribution(50_000, 20.0, SHORT, SHORT, burstiness=burstiness)
    arrivals = np.array([request.arrival_ns for request in traffic], dtype=np.int64)
    gaps = np.diff(arrivals) / NS
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.05, abs=1e-6)


def test_lengths_have_the_mean_asked_for() -> None:
    random = np.random.default_rng(0)
    drawn = Lengths("lognormal", 161.0, cv=1.2).draw(random, 200_000)
    assert drawn.mean() == pytest.approx(161, rel=0.02) and drawn.std() / drawn.mean() == pytest.approx(1.2, rel=0.05)
    clipped = Lengths("lognormal", 100.0, low=50, high=150).draw(random, 10_000)
    assert (clipped.min(), clipped.max()) == (50, 150)
    assert set(Lengths("uniform", 3, low=2, high=4).draw(random, 1000).tolist()) == {2, 3, 4}
    assert set(Lengths("fixed", 7).draw(random, 10).tolist()) == {7}
    assert set(Lengths("lognormal", 9.0, cv=0).draw(random, 10).tolist()) == {9}


def test_prefixes_are_as_popular_as_zipf_says() -> None:
    traffic = Distribution(60_000, 20.0, SHORT, SHORT, prefixes=4, prefix_tokens=10, zipf=1.0)
    counts = Counter(request.prefix for request in traffic)
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for rank in range(4):
        assert counts[(rank,)] / 60_000 == pytest.approx(1 / (rank + 1) / total, rel=0.05)


def test_a_long_distribution_is_drawn_in_little_memory() -> None:
    traffic = Distribution(10**9, 20.0, SHORT, SHORT, prefixes=4, prefix_tokens=10)
    tracemalloc.start()
    for _ in itertools.islice(traffic, 50_000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


PLAIN = {"arrival_s": 0.5, "prompt_tokens": 161, "answer_tokens": 338}
MOONCAKE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}


def test_the_formats_of_traces(tmp_path: Path) -> None:
    lines = [
        PLAIN,
        {"arrival_s": 1, "prompt_tokens": 9, "answer_tokens": [3, 4], "prefix_ids": [7, 9], "chunk_tokens": 4},
    ]
    text = json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n"
    expected = [Request(NS // 2, 161, (338,)), Request(NS, 9, (3, 4), (7, 9), 4)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.b.json"):
        assert list(Trace(written(tmp_path, name, text))) == expected
    mooncake = Trace(written(tmp_path, "mooncake.jsonl", json.dumps(MOONCAKE)))
    assert list(mooncake) == list(mooncake) == [Request(27_482_000_000, 6955, (52,), (46, 47, 48), 512)]
    rows = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\r\n"
        "2023-11-16 18:17:05+00:00,110,27\n"
    )
    azure = list(Trace(written(tmp_path, "azure.csv", rows)))
    assert [one.arrival_ns - azure[0].arrival_ns for one in azure] == [0, 52_000_000, 1_020_040_000]
    assert [one[1:3] for one in azure] == [(4808, (10,)), (3180, (8,)), (110, (27,))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps({**PLAIN, "prompt_tokens": 0}), "prompt_tokens is 0, not a positive number of tokens"),
        (json.dumps({**PLAIN, "prompt_tokens": 1.5}), "prompt_tokens is 1.5"),
        (json.dumps({**PLAIN, "prompt_tokens": True}), "prompt_tokens is True"),
        (json.dumps({**PLAIN, "prompt_tokens": 10**30}), "prompt_tokens is 1000"),
        (json.dumps({**PLAIN, "answer_tokens": []}), "answer_tokens has 0 samples"),
        (json.dumps({**PLAIN, "answer_tokens": [3, "4"]}), "answer_tokens is 4"),
        (json.dumps({**PLAIN, "arrival_s": None}), "arrival_s is None, not a time"),
        (json.dumps({**PLAIN, "arrival_s": float("nan")}), "arrival_s is nan, not a time"),
        (json.dumps({**PLAIN, "arrival_s": float("inf")}), "arrival_s is inf, not a time"),
        (json.dumps({**PLAIN, "arrival_s": -1}), "arrival_s is -1, not a time"),
        (json.dumps({**PLAIN, "arrival_s": 10**400}), "arrival_s is 1000"),
        (json.dumps({**PLAIN, "arrival_s": 0.25}), "arrives 0.25 s before the one above it; sort the trace"),
        (json.dumps({"prompt_tokens": 3, "answer_tokens": 3}), "no field 'arrival_s'"),
        (json.dumps({**PLAIN, "prefix_ids": [1]}), "chunk_tokens is None"),
        (json.dumps({**PLAIN, "prefix_ids": [-1], "chunk_tokens": 1}), "prefix_ids is not a list of integers"),
        (json.dumps({**MOONCAKE, "hash_ids": "46"}), "hash_ids is not a list of integers"),
        (json.dumps({**MOONCAKE, "output_length": 0}), "output_length is 0"),
        (json.dumps({"input_length": 3, "timestamp": 0}), "no field 'output_length'"),
    ],
)
def test_a_bad_line_is_refused_at_its_place(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, "trace.jsonl", f"{json.dumps(PLAIN)}\n\n{line}\n")
    with pytest.raises(SpecError) as caught:
        list(Trace(path))
    assert str(caught.value).startswith(f"{path}:3: ") and words in str(caught.value)
    assert caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2023-11-16 18:17:04.0,12", "2 columns, the header has 3"),
        ("yesterday,12,3", "TIMESTAMP is 'yesterday'"),
        ("2023-11-16 18:17:04.0,12,0", "GeneratedTokens is 0"),
        ("2023-11-16 18:17:04.0,-12,3", "ContextTokens is '-12'"),
        ("2023-11-16 18:17:04.0,1_2,3", "ContextTokens is '1_2'"),
        ("2023-11-16 18:17:02.0,12,3", "arrives 1 s before"),
    ],
)
def test_a_bad_row_is_refused_at_its_place(tmp_path: Path, row: str, words: str) -> None:
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,4808,10\n{row}\n"
    path = written(tmp_path, "trace.csv", text)
    with pytest.raises(SpecError) as caught:
        list(Trace(path))
    assert str(caught.value).startswith(f"{path}:3: ") and words in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(PLAIN).encode() * 1000)[:60])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b"\xff\xfe")
    for path, words in (
        (tmp_path / "missing.jsonl", "cannot be read"),
        (broken, "cannot be read"),
        (latin, "cannot be read"),
        (written(tmp_path, "empty.jsonl", "\n"), "no requests"),
        (written(tmp_path, "head.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"), "no requests"),
        (written(tmp_path, "empty.csv", ""), "no requests"),
        (written(tmp_path, "other.csv", "TIMESTAMP,tokens\n1,2\n"), "no column ContextTokens, GeneratedTokens"),
        (written(tmp_path, "trace.txt", "1"), "not known by its name"),
        (written(tmp_path, "noname", "1"), "not known by its name"),
    ):
        with pytest.raises(SpecError, match=words):
            list(Trace(path))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": -3.0}, "rate is -3"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"burstiness": -1.0}, "burstiness is -1"),
        ({"prefixes": 3}, "3 shared prefixes of 0 tokens"),
        ({"prefix_tokens": 3}, "0 shared prefixes of 3 tokens"),
        ({"zipf": -0.5}, "zipf is -0.5"),
        ({"samples": 0}, "samples is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Distribution(**{"requests": 1, "rate": 1.0, "prompt": SHORT, "answer": SHORT, **values})


def test_lengths_as_options() -> None:
    assert parse_lengths("fixed:12") == Lengths("fixed", 12)
    assert parse_lengths("uniform:4-12") == SHORT
    assert parse_lengths("lognormal:160") == Lengths("lognormal", 160.0)
    assert parse_lengths("lognormal:160,cv=1.2,low=4,high=2048") == Lengths("lognormal", 160.0, 1.2, 4, 2048)
    for text in (
        "",
        "12",
        "fixed:",
        "fixed:a",
        "uniform:4",
        "uniform:4-5-6",
        "normal:3",
        "lognormal:9,cw=1",
        "lognormal:",
    ):
        with pytest.raises(SpecError, match="is no distribution of lengths; write fixed:N"):
            parse_lengths(text)
    for text in ("fixed:0", "uniform:9-4", "uniform:0-4", "lognormal:nan", "lognormal:0", "lognormal:9,cv=-1"):
        with pytest.raises(SpecError, match="makes no sense"):
            parse_lengths(text)


def test_traffic_from_options(tmp_path: Path) -> None:
    traffic = traffic_from_options(
        rate=3.0, requests=7, prompt="fixed:9", answer="fixed:4", prefixes=2, prefix_tokens=8
    )
    assert [one[1:3] for one in traffic] == [(17, (4,))] * 7
    path = written(tmp_path, "trace.jsonl", json.dumps(PLAIN))
    assert len(list(traffic_from_options(trace=path))) == 1
    with pytest.raises(SpecError, match="there is no traffic; give either"):
        traffic_from_options()
    with pytest.raises(SpecError, match="given twice"):
        traffic_from_options(trace=path, rate=1.0)
    with pytest.raises(SpecError, match=r"bad\.jsonl:1: not a JSON object"):
        traffic_from_options(trace=written(tmp_path, "bad.jsonl", "{"))


def test_a_line_that_never_ends_is_not_read_to_its_end(tmp_path: Path) -> None:
    for name in ("long.jsonl.gz", "long.csv"):
        path = written(tmp_path, name, "x" * 20_000_000)
        tracemalloc.start()
        with pytest.raises(SpecError, match="a line of more than 1048576 characters"):
            list(Trace(path))
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
        tracemalloc.stop()
