"""Text sources and token windows."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer

from orchestrator import text
from orchestrator.errors import PreflightError, SpecError, StepError
from orchestrator.sources import HubSource
from orchestrator.text import (
    check_source,
    read_documents,
    resolve_source,
    source_digest,
    token_windows,
    tokenize,
)
from tests.tiny import make_tokenizer

DOCUMENTS = ["the quick brown fox", "jumps over\nthe lazy dog", "import os\nprint(os.name)"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_long_text(path: Path, lines: int = 400) -> str:
    path.write_text("".join(f"the lazy dog {number} jumps over {number * 7}\n" for number in range(lines)))
    return str(path)


def ids_of(tokenizer: Any, source: str) -> list[int]:
    return [token for piece in tokenize(source, tokenizer) for token in piece]


def plain_ids(tokenizer: Any, document: str) -> list[int]:
    ids: list[int] = tokenizer(document, add_special_tokens=False)["input_ids"]
    return ids


def test_importing_imports_no_torch() -> None:
    code = "import orchestrator.text, sys; print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_relative_path_starts_at_the_base_and_an_absolute_one_stays(tmp_path: Path) -> None:
    assert resolve_source("data/../a.txt", tmp_path) == str(tmp_path / "a.txt")
    assert resolve_source("/a/b.txt", tmp_path) == "/a/b.txt"
    assert resolve_source("~/b.txt", tmp_path) == str(Path.home() / "b.txt")


def test_a_hub_source_is_kept_and_its_local_folder_resolved(tmp_path: Path) -> None:
    for source in ("hub:owner/name:train", "hub:owner/name/config:train@main", "hub:/folder:test"):
        assert resolve_source(source, tmp_path) == source
    assert resolve_source("hub:./folder:train", tmp_path) == f"hub:{tmp_path / 'folder'}:train"
    assert HubSource.parse("hub:owner/name/config:train@v1.0") == HubSource(
        None, "owner/name", "config", "train", "v1.0"
    )


@pytest.mark.parametrize(
    "source",
    [
        "",
        " ",
        "hub:",
        "hub:name:train",
        "hub:owner/name",
        "hub:owner/name:",
        "hub:a/b:c@",
        "hub:a/b/c/d:e",
        "hub:/f:s@1",
    ],
)
def test_a_malformed_source_is_a_spec_error_with_a_remedy(source: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_source(source, tmp_path)
    assert caught.value.problems[0].remedy


def test_unusable_files_are_found_before_any_compute(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "model.bin").write_bytes(b"\x80\x02\0\0")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    expected = {
        "missing.txt": "there is no text file",
        ".": "is a folder",
        "empty.txt": "is empty",
        "latin.txt": "is not UTF-8",
        "model.bin": "is not UTF-8",
        "rows.parquet": "is not a Parquet file",
    }
    for name, message in expected.items():
        with pytest.raises(PreflightError, match=message) as caught:
            check_source(str(tmp_path / name))
        assert caught.value.problems[0].remedy
        with pytest.raises(PreflightError, match=message):
            list(read_documents(str(tmp_path / name)))


def test_a_character_cut_by_the_end_of_the_probe_is_still_text(tmp_path: Path) -> None:
    path = tmp_path / "umlauts.txt"
    path.write_text("a" + "ü" * 50_000, encoding="utf-8")  # two bytes each: one lies across byte 65536
    check_source(str(path))
    assert list(read_documents(str(path))) == ["a" + "ü" * 50_000]


def test_bytes_that_are_no_text_late_in_a_file_are_a_step_error(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "late.txt"
    path.write_bytes(b"good text\n" * 20_000 + b"\xff\xfe")
    check_source(str(path))
    with pytest.raises(StepError, match="not UTF-8"):
        ids_of(tokenizer, str(path))


def test_every_kind_of_file_yields_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": document, "id": number} for number, document in enumerate(["", *DOCUMENTS])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert list(read_documents(str(tmp_path / "d.jsonl"))) == DOCUMENTS
    assert list(read_documents(str(tmp_path / "d.parquet"))) == DOCUMENTS
    (tmp_path / "d.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8-sig")
    assert list(read_documents(str(tmp_path / "d.txt"))) == ["\n".join(DOCUMENTS)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ('{"txt": "a"}', "no key 'text', but keys \\['txt'\\]"),
        ('["a"]', "no key 'text', but list"),
        ('{"text": 3}', "holds int, not text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(StepError, match=f"d.jsonl:2: .*{message}") as caught:
        list(read_documents(str(path)))
    assert caught.value.problems[0].remedy


def test_another_column_can_be_named_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"content": "a"}, {"content": "b"}]), path)
    assert list(read_documents(str(path), field="content")) == ["a", "b"]
    with pytest.raises(PreflightError, match=r"no column 'text', but \['content'\]"):
        list(read_documents(str(path)))


def test_the_digest_follows_the_bytes_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    first = source_digest(str(tmp_path / "a.txt"))
    assert source_digest(str(tmp_path / "b.txt")) == first
    (tmp_path / "a.txt").write_text("other")
    assert source_digest(str(tmp_path / "a.txt")) != first


def test_a_pinned_hub_source_has_a_digest_without_the_network() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    digests = {source_digest(f"hub:owner/{name}:{split}@{commit}") for name in "ab" for split in ("train", "test")}
    assert len(digests) == 4
    assert source_digest(f"hub:owner/a:train@{commit}") in digests


def test_an_unpinned_hub_source_without_the_network_is_a_preflight_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PreflightError, match="cannot be looked up") as caught:
        source_digest("hub:owner/name:train@main")
    assert "full commit" in str(caught.value.problems[0].remedy)


def test_a_data_set_folder_is_read_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    source = f"hub:{tmp_path}:train"
    assert list(read_documents(source)) == DOCUMENTS
    before = source_digest(source)
    (tmp_path / "train.jsonl").write_text('{"text": "other"}\n')
    assert source_digest(source) != before
    with pytest.raises(StepError, match="no column 'body'"):
        list(read_documents(source, field="body"))
    with pytest.raises(StepError, match="cannot be read"):
        list(read_documents(f"hub:{tmp_path}:no_such_split"))


def test_a_hub_source_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.sources.find_spec", lambda name: None)
    with pytest.raises(PreflightError) as caught:
        list(read_documents("hub:owner/name:train@" + "0" * 40))
    assert "compression-orchestrator[hub]" in str(caught.value.problems[0].remedy)


def test_documents_are_joined_with_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    expected: list[int] = []
    for document in DOCUMENTS:
        expected += ([tokenizer.eos_token_id] if expected else []) + plain_ids(tokenizer, document)
    assert ids_of(tokenizer, str(path)) == expected


def test_a_text_tokenized_in_pieces_gives_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_long_text(tmp_path / "long.txt")
    whole = plain_ids(tokenizer, Path(source).read_text())
    for size in (7, 50, 333, 1 << 18):
        monkeypatch.setattr(text, "PIECE_CHARACTERS", size)
        assert ids_of(tokenizer, source) == whole
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 8)
    (tmp_path / "unbroken.txt").write_text("a" * 100)
    assert tokenizer.decode(ids_of(tokenizer, str(tmp_path / "unbroken.txt"))) == "a" * 100


def test_a_text_longer_than_the_context_writes_nothing_to_stderr(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    source = write_long_text(tmp_path / "long.txt")
    code = (
        "import sys; from transformers import AutoTokenizer; from orchestrator.text import token_windows;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); t.model_max_length = 16;"
        "print(token_windows(sys.argv[2], t, num_sequences=4, length=32).tokens_NT.shape)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path), source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([4, 32])"
    assert done.stderr == ""


def test_contiguous_windows_are_the_text_from_its_start(tmp_path: Path, tokenizer: Any) -> None:
    source = write_long_text(tmp_path / "long.txt")
    ids = ids_of(tokenizer, source)
    every = token_windows(source, tokenizer, num_sequences=None, length=50, random=False)
    assert every.tokens_NT.dtype == torch.int64
    assert every.tokens_NT.flatten().tolist() == ids[: len(ids) // 50 * 50]
    first = token_windows(source, tokenizer, num_sequences=3, length=50, random=False)
    assert torch.equal(first.tokens_NT, every.tokens_NT[:3])


@pytest.mark.parametrize("num_sequences", [1, 10, 100])
def test_random_windows_are_distinct_pieces_of_the_text_without_overlap(
    tmp_path: Path, tokenizer: Any, num_sequences: int
) -> None:
    source = write_long_text(tmp_path / "long.txt")
    ids = ids_of(tokenizer, source)
    length = len(ids) // num_sequences if num_sequences == 100 else 40
    windows = token_windows(source, tokenizer, num_sequences=num_sequences, length=length, seed=5)
    assert windows.tokens_NT.shape == (num_sequences, length)
    starts = []
    for window in windows.tokens_NT.tolist():  # numbers make every window of the text unique
        found = [start for start in range(len(ids) - length + 1) if ids[start : start + length] == window]
        assert len(found) == 1
        starts += found
    ordered = sorted(starts)
    assert all(later - earlier >= length for earlier, later in pairwise(ordered))


def test_windows_depend_on_the_seed_alone_and_leave_random_state_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    source = write_long_text(tmp_path / "long.txt")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = token_windows(source, tokenizer, num_sequences=8, length=32, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = token_windows(source, tokenizer, num_sequences=8, length=32, seed=0)
    other = token_windows(source, tokenizer, num_sequences=8, length=32, seed=1)
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert not torch.equal(first.tokens_NT, other.tokens_NT)


def test_all_the_text_can_be_used_and_one_token_more_is_a_shortfall(tmp_path: Path, tokenizer: Any) -> None:
    source = write_long_text(tmp_path / "long.txt", lines=20)
    have = len(ids_of(tokenizer, source))
    assert token_windows(source, tokenizer, num_sequences=1, length=have).tokens_NT.shape == (1, have)
    for random in (True, False):
        with pytest.raises(StepError, match=f"long.txt holds {have} tokens, but 1 windows need {have + 1}") as caught:
            token_windows(source, tokenizer, num_sequences=1, length=have + 1, random=random)
        assert caught.value.problems[0].remedy


def test_a_start_token_is_put_first_only_when_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    source = write_long_text(tmp_path / "long.txt")
    without = token_windows(source, tokenizer, num_sequences=4, length=31)
    with_it = token_windows(source, tokenizer, num_sequences=4, length=32, start_token=True)
    assert not bool((without.tokens_NT == tokenizer.bos_token_id).any())
    assert with_it.tokens_NT[:, 0].tolist() == [tokenizer.bos_token_id] * 4
    assert torch.equal(with_it.tokens_NT[:, 1:], without.tokens_NT)


def test_reading_stops_once_the_pool_is_full(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "POOL_FLOOR_TOKENS", 100)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "the lazy dog"}\n' * 500 + "{broken\n")
    windows = token_windows(str(path), tokenizer, num_sequences=2, length=8)
    assert windows.provenance["tokens_read"] == text.POOL_FACTOR * 16


def test_provenance_says_where_windows_came_from_without_naming_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    source = write_long_text(tmp_path / "long.txt")
    windows = token_windows(source, tokenizer, num_sequences=4, length=32, seed=9)
    assert windows.provenance == {
        "source": "long.txt",
        "source_sha256": source_digest(source),
        "field": "text",
        "windows": "random",
        "seed": 9,
        "sequences": 4,
        "length_tokens": 32,
        "start_token": False,
        "tokens_read": len(ids_of(tokenizer, source)),
    }
    assert str(tmp_path) not in json.dumps(windows.provenance)


@pytest.mark.parametrize("source", ["~nosuchuser/text.txt", "hub:~nosuchuser/folder:train"])
def test_a_home_folder_of_nobody_is_refused(tmp_path: Path, source: str) -> None:
    if source.startswith("hub:"):
        with pytest.raises(SpecError, match="does not name a data set"):  # the form has ~/ only
            resolve_source(source, tmp_path)
        return
    with pytest.raises(SpecError, match="there is no home folder ~nosuchuser") as caught:
        resolve_source(source, tmp_path)
    assert caught.value.problems[0].remedy


@pytest.mark.parametrize("name", ["x" * 5000, "d/" * 2500 + "x", "a\0b"], ids=["long name", "long path", "NUL"])
@pytest.mark.parametrize("form", ["{}", "hub:{}:train"])
def test_a_path_that_no_file_can_have_is_refused_briefly(tmp_path: Path, name: str, form: str) -> None:
    source = resolve_source(form.format(tmp_path / name), tmp_path)
    with pytest.raises(PreflightError) as caught:
        check_source(source)
    assert "cannot be read" in str(caught.value)
    assert caught.value.problems[0].remedy and len(str(caught.value)) < 400


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(PreflightError, match="cannot be read"):
        check_source(str(tmp_path / "loop"))
