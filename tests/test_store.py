"""Releases in both kinds of storage: the same tests for a folder and for a real S3 server process over the wire."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from orchestrator.errors import OrchestratorError, PreflightError, PublishError, SpecError
from orchestrator.store import Release, Store, StoredFile, open_store
from tests.s3_server import ENDPOINT, SECRET_KEY, FaultyProxy, s3_client, use_endpoint

NAME = "quickstart/3f2a"
MANIFEST = {"model": "tiny-llama", "bits": 4, "metrics": {"perplexity": 12.5}, "name": "großes Modell"}
BIG_BYTES = (8 << 20) * 2 + 12345  # three parts of an S3 upload


class Backdoor(Protocol):
    """The storage behind a store's back. Keys are relative to the store's root."""

    uri: str

    def put(self, key: str, data: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def delete(self, key: str) -> None: ...
    def list_keys(self) -> set[str]: ...
    def unfinished(self) -> list[Any]: ...


class FolderBackdoor:
    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, root.as_uri()

    def put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def delete(self, key: str) -> None:
        (self.root / key).unlink()

    def list_keys(self) -> set[str]:
        found = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}
        return {key for key in found if not key.startswith(".incoming/")}

    def unfinished(self) -> list[Any]:
        return list((self.root / ".incoming").glob("*"))


class BucketBackdoor:
    def __init__(self, endpoint: str, bucket: str) -> None:
        self.client, self.bucket = s3_client(endpoint), bucket
        self.uri = f"s3://{bucket}/some/prefix"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"some/prefix/{key}", Body=data)

    def get(self, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=f"some/prefix/{key}")["Body"].read()
        return body

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"some/prefix/{key}")

    def list_keys(self) -> set[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return {entry["Key"].removeprefix("some/prefix/") for entry in listed}

    def unfinished(self) -> list[Any]:
        return list(self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Backdoor:
    if request.param == "file":
        return FolderBackdoor(tmp_path / "releases with space")
    bucket = request.getfixturevalue("s3_bucket")
    return BucketBackdoor(request.getfixturevalue("s3_endpoint"), bucket)


@pytest.fixture
def bucket_storage(s3_endpoint: str, s3_bucket: str) -> BucketBackdoor:
    return BucketBackdoor(s3_endpoint, s3_bucket)


@pytest.fixture
def store(storage: Backdoor) -> Store:
    return open_store(storage.uri)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release-like folder: small files, an empty one, a nested one, and one that S3 takes only in parts."""
    root = tmp_path_factory.mktemp("content") / "model"
    (root / "serving").mkdir(parents=True)
    (root / "config.json").write_text('{"hidden_size": 64}')
    (root / "empty").write_bytes(b"")
    (root / "serving/vllm größe.yaml").write_text("kv_cache_dtype: fp8\n")
    piece = hashlib.sha256(b"weights").digest()
    (root / "model.safetensors").write_bytes((piece * (BIG_BYTES // len(piece) + 1))[:BIG_BYTES])
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three small files: a, b, c."""
    root = tmp_path / "small"
    root.mkdir()
    for word in ("a", "b", "c"):
        (root / word).write_text(f"content of {word}")
    return root


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def message_of(error: pytest.ExceptionInfo[OrchestratorError]) -> str:
    assert error.value.problems[0].remedy
    return str(error.value)


def test_a_release_comes_back_byte_for_byte(storage: Backdoor, store: Store, folder: Path, tmp_path: Path) -> None:
    store.check()
    before = content(folder)
    seen: Counter[str] = Counter()
    release = store.publish(NAME, folder, MANIFEST, lambda key, amount: seen.update({key: amount}))

    assert release.uri == f"{storage.uri}/{NAME}"
    assert release.files == tuple(
        StoredFile(key, hashlib.sha256(data).hexdigest(), len(data)) for key, data in sorted(before.items())
    )
    assert {key: amount for key, amount in seen.items() if amount} == {k: len(d) for k, d in before.items() if d}
    assert storage.list_keys() == {f"{NAME}/{key}" for key in [*before, "release.json", "COMPLETE"]}
    assert storage.unfinished() == []
    listing = storage.get(f"{NAME}/release.json")
    assert release.digest == hashlib.sha256(listing).hexdigest() == storage.get(f"{NAME}/COMPLETE").decode().strip()
    assert json.loads(listing)["model"] == "tiny-llama" and json.loads(listing)["files"][0]["key"] == "config.json"
    assert release.manifest == MANIFEST
    assert open_store(storage.uri).read_release(NAME) == release

    fetched = tmp_path / "deep" / "down"
    assert store.fetch(NAME, fetched) == release
    after = content(fetched)
    assert after.pop("release.json") == listing and after.pop("COMPLETE").decode().strip() == release.digest
    assert after == before
    assert [path.name for path in fetched.parent.iterdir()] == ["down"]


def test_publishing_the_same_files_again_is_the_same_release(storage: Backdoor, store: Store, small: Path) -> None:
    first = store.publish(NAME, small, {"seconds": 1})
    assert store.publish(NAME, small, {"seconds": 2}) == first
    assert json.loads(storage.get(f"{NAME}/release.json"))["seconds"] == 1


def test_a_complete_release_is_never_changed(storage: Backdoor, store: Store, small: Path) -> None:
    first = store.publish(NAME, small, {})
    (small / "b").write_text("another b")
    (small / "d").write_text("new")
    with pytest.raises(PublishError) as error:
        store.publish(NAME, small, {})
    assert "already published with other files" in message_of(error)
    assert storage.list_keys() == {f"{NAME}/{key}" for key in ("a", "b", "c", "release.json", "COMPLETE")}
    assert storage.get(f"{NAME}/b") == b"content of b"
    assert store.read_release(NAME) == first


def test_an_object_with_other_content_is_named_and_kept(storage: Backdoor, store: Store, small: Path) -> None:
    storage.put(f"{NAME}/b", b"somebody else's")
    with pytest.raises(PublishError) as error:
        store.publish(NAME, small, {})
    assert f"{storage.uri}/{NAME}/b exists with other content" in message_of(error)
    assert storage.get(f"{NAME}/b") == b"somebody else's"
    assert store.read_release(NAME) is None


def test_identical_objects_of_unknown_origin_are_accepted(storage: Backdoor, store: Store, small: Path) -> None:
    storage.put(f"{NAME}/b", b"content of b")  # on S3: without our sha256 in its metadata
    assert store.publish(NAME, small, {}) == store.read_release(NAME)


def test_an_unfinished_release_is_invisible_and_can_be_finished(
    storage: Backdoor, store: Store, folder: Path, tmp_path: Path
) -> None:
    first = store.publish(NAME, folder, {"seconds": 1})
    storage.delete(f"{NAME}/COMPLETE")
    assert store.read_release(NAME) is None
    with pytest.raises(PublishError, match="no complete release"):
        store.fetch(NAME, tmp_path / "target")
    storage.delete(f"{NAME}/config.json")
    assert store.publish(NAME, folder, {"seconds": 2}) == first  # its release.json is adopted
    assert storage.get(f"{NAME}/config.json") == (folder / "config.json").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.store import open_store
sent = 0
def progress(key, amount):
    global sent
    sent += amount
    if sent > 9 << 20:  # inside the big file
        os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).publish(sys.argv[2], Path(sys.argv[3]), {}, progress)
"""


def test_a_killed_publish_leaves_no_release_and_can_be_repeated(storage: Backdoor, store: Store, folder: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, storage.uri, NAME, str(folder)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert store.read_release(NAME) is None
    assert f"{NAME}/COMPLETE" not in storage.list_keys() and f"{NAME}/model.safetensors" not in storage.list_keys()
    assert storage.unfinished() != []
    assert store.publish(NAME, folder, {}) == store.read_release(NAME)
    assert storage.unfinished() == []


def test_a_failing_callback_ends_the_publish_without_a_trace(storage: Backdoor, store: Store, folder: Path) -> None:
    def fail_in_the_big_file(key: str, amount: int) -> None:
        if key == "model.safetensors":
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        store.publish(NAME, folder, MANIFEST, fail_in_the_big_file)
    assert store.read_release(NAME) is None
    assert not {f"{NAME}/{key}" for key in ("COMPLETE", "release.json", "model.safetensors")} & storage.list_keys()
    assert storage.unfinished() == []  # on S3: the upload in parts was aborted


def test_a_file_that_changes_meanwhile_is_not_published(
    storage: Backdoor, store: Store, tmp_path: Path, small: Path
) -> None:
    big = small / "z"
    big.write_bytes(bytes(BIG_BYTES))

    def change_the_end(key: str, amount: int) -> None:
        if key in ("a", "z"):
            with big.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")

    with pytest.raises(PublishError, match=r"'z' changed while it was being published"):
        store.publish(NAME, small, {}, change_the_end)
    assert store.read_release(NAME) is None
    assert f"{NAME}/z" not in storage.list_keys() and storage.unfinished() == []


def test_an_unreadable_file_ends_the_publish(storage: Backdoor, store: Store, small: Path) -> None:
    (small / "b").unlink()
    (small / "b").symlink_to(small / "nowhere")
    with pytest.raises(PublishError, match=r"small/b is not a regular file"):
        store.publish(NAME, small, {})
    assert store.read_release(NAME) is None and storage.list_keys() == set()


@pytest.mark.parametrize(
    "damage", [b"content of X", b"content", b"content of b and more", None], ids=["changed", "short", "long", "missing"]
)
def test_fetch_finds_every_damage_and_leaves_nothing(
    storage: Backdoor, store: Store, small: Path, tmp_path: Path, damage: bytes | None
) -> None:
    store.publish(NAME, small, {})
    if damage is None:
        storage.delete(f"{NAME}/b")
    else:
        storage.put(f"{NAME}/b", damage)
    target = tmp_path / "out" / "target"
    with pytest.raises(PublishError) as error:
        store.fetch(NAME, target)
    assert f"{NAME}/b" in message_of(error)
    assert not target.exists() and list(target.parent.iterdir()) == []


def test_a_release_that_lost_a_file_is_incomplete_and_publishing_mends_it(
    storage: Backdoor, store: Store, small: Path, tmp_path: Path
) -> None:
    first = store.publish(NAME, small, {"seconds": 1})
    storage.delete(f"{NAME}/b")
    assert store.read_release(NAME) is None
    with pytest.raises(PublishError, match="missing; run again what published it"):
        store.fetch(NAME, tmp_path / "early")
    assert store.publish(NAME, small, {"seconds": 2}) == first == store.read_release(NAME)
    assert store.fetch(NAME, tmp_path / "target") == first
    assert content(tmp_path / "target")["b"] == b"content of b"


@pytest.mark.parametrize("damage", [b"content", b"content of b and more", b""], ids=["short", "long", "empty"])
def test_a_file_of_another_size_is_found_without_reading_it_and_the_remedy_works(
    storage: Backdoor, store: Store, small: Path, tmp_path: Path, damage: bytes
) -> None:
    first = store.publish(NAME, small, {})
    storage.put(f"{NAME}/b", damage)
    storage.delete(f"{NAME}/a")  # a missing file does not hide the damaged one
    place = f"{storage.uri}/{NAME}/b"
    remedy = f"delete COMPLETE of this release and {place}, then run again what published it"
    with pytest.raises(PublishError) as found:
        store.read_release(NAME)
    assert message_of(found) == f"{place} has {len(damage)} bytes, not the 12 published; {remedy}"
    with pytest.raises(PublishError) as refused:
        store.publish(NAME, small, {})
    assert message_of(refused).endswith(remedy)
    storage.delete(f"{NAME}/COMPLETE")
    storage.delete(f"{NAME}/b")
    assert store.read_release(NAME) is None
    assert store.publish(NAME, small, {}) == first == store.read_release(NAME)
    assert store.fetch(NAME, tmp_path / "target") == first


def test_changed_bytes_of_the_same_size_are_mended_by_the_remedy_of_fetch(
    storage: Backdoor, store: Store, small: Path, tmp_path: Path
) -> None:
    first = store.publish(NAME, small, {})
    storage.put(f"{NAME}/b", b"content of X")
    with pytest.raises(PublishError) as error:
        store.fetch(NAME, tmp_path / "early")
    assert f"delete COMPLETE of this release and {storage.uri}/{NAME}/b, then run again" in message_of(error)
    storage.delete(f"{NAME}/COMPLETE")
    storage.delete(f"{NAME}/b")
    assert store.publish(NAME, small, {}) == store.fetch(NAME, tmp_path / "target") == first


def test_a_listing_that_does_not_fit_its_seal_is_refused(storage: Backdoor, store: Store, small: Path) -> None:
    store.publish(NAME, small, {})
    storage.put(f"{NAME}/release.json", storage.get(f"{NAME}/release.json").replace(b"b", b"B"))
    with pytest.raises(PublishError) as error:
        store.read_release(NAME)
    assert "is damaged" in message_of(error)
    with pytest.raises(PublishError, match="is damaged"):
        store.publish(NAME, small, {})
    storage.delete(f"{NAME}/release.json")
    with pytest.raises(PublishError, match="is damaged"):
        store.read_release(NAME)


HOSTILE_KEYS = ("../x", "/etc/x", "a/../../x", "a//b", "", "a\\..\\x", "x\n", "COMPLETE", "release.json", 1)
MALFORMED: list[Any] = [
    *([{"key": key, "sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}] for key in HOSTILE_KEYS),
    [{"key": "a", "sha256": "0" * 64, "bytes": 1}] * 2,
    [{"key": "a", "sha256": "0" * 64, "bytes": -1}],
    [{"key": "a", "sha256": "../x", "bytes": 1}],
    [{"key": "a"}],
    "a",
    None,
]


@pytest.mark.parametrize("files", MALFORMED, ids=lambda files: repr(files)[:30])
def test_a_hostile_listing_writes_nowhere(tmp_path: Path, files: Any) -> None:
    check_listing_is_refused(FolderBackdoor(tmp_path / "releases"), tmp_path / "out" / "target", files)


def test_a_hostile_listing_in_a_bucket_writes_nowhere(bucket_storage: BucketBackdoor, tmp_path: Path) -> None:
    check_listing_is_refused(bucket_storage, tmp_path / "out" / "target", MALFORMED[0])


def check_listing_is_refused(storage: Backdoor, target: Path, files: Any) -> None:
    body = json.dumps({"files": files}).encode()
    storage.put(f"{NAME}/release.json", body)
    storage.put(f"{NAME}/COMPLETE", hashlib.sha256(body).hexdigest().encode())
    storage.put("quickstart/x", b"evil")
    target.parent.mkdir()
    with pytest.raises(PublishError) as error:
        open_store(storage.uri).fetch(NAME, target)
    message_of(error)
    assert list(target.parent.iterdir()) == [] and not Path("/etc/x").exists()


def test_fetch_refuses_a_target_in_use_and_takes_an_empty_folder(store: Store, small: Path, tmp_path: Path) -> None:
    release = store.publish(NAME, small, {})
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(SpecError) as error:
        store.fetch(NAME, target)
    assert str(target) in message_of(error)
    assert content(target) == {"mine": b"mine"}
    (target / "mine").unlink()
    assert store.fetch(NAME, target) == release
    assert content(target)["a"] == b"content of a"


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/a", "a/", ".incoming", "a b", "a\n"])
def test_a_name_that_leads_elsewhere_is_refused(small: Path, tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path / "releases"))
    with pytest.raises(SpecError):
        store.publish(name, small, {})
    with pytest.raises(SpecError):
        store.read_release(name)
    with pytest.raises(SpecError):
        store.fetch(name, tmp_path / "target")


@pytest.mark.parametrize("key", ["release.json", "COMPLETE", "a\\b", "a\nb"])
def test_files_that_a_release_cannot_hold_are_refused(small: Path, tmp_path: Path, key: str) -> None:
    (small / key).write_text("x")
    with pytest.raises(PublishError) as error:
        open_store(str(tmp_path / "releases")).publish(NAME, small, {})
    assert "rename the file" in message_of(error)
    assert not (tmp_path / "releases").exists()


def test_an_empty_or_missing_folder_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(PublishError, match=name):
            store.publish(NAME, tmp_path / name, {})


def test_of_racing_publishers_with_other_content_one_wins(storage: Backdoor, tmp_path: Path) -> None:
    outcomes: list[Release | PublishError] = []
    start = threading.Barrier(4)

    def publish(number: int) -> None:
        root = tmp_path / str(number)
        root.mkdir()
        (root / "same").write_text("same")
        (root / "weights").write_bytes(bytes([number]) * 100)
        start.wait()
        try:
            outcomes.append(open_store(storage.uri).publish(NAME, root, {}))
        except PublishError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, Release)]
    assert len(outcomes) == 4 and len(winners) == 1
    assert open_store(storage.uri).fetch(NAME, tmp_path / "target") == winners[0]


def test_racing_publishers_of_the_same_content_all_succeed(storage: Backdoor, folder: Path) -> None:
    releases: list[Release] = []
    start = threading.Barrier(3)

    def publish(number: int) -> None:
        store = open_store(storage.uri)
        start.wait()
        releases.append(store.publish(NAME, folder, {"seconds": number}))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(releases) == 3 and len(set(map(repr, releases))) == 1
    assert storage.unfinished() == []


def test_check_leaves_nothing_behind(storage: Backdoor, store: Store) -> None:
    store.check()
    assert storage.list_keys() == set() and storage.unfinished() == []
    if isinstance(storage, FolderBackdoor):
        assert not storage.root.exists() and list(storage.root.parent.glob(".orchestrator*")) == []


def test_check_of_a_folder_leaves_nothing_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for below in ("root", "root/a/b/c", "new/a/b"):
        open_store(str(tmp_path / below)).check()
        assert sorted(tmp_path.rglob("*")) == before


def test_check_names_a_root_that_cannot_be_written() -> None:
    with pytest.raises(PreflightError) as error:  # a file system that refuses everyone, root too
        open_store("/proc/releases").check()
    assert "cannot use file:///proc/releases" in message_of(error)


# Addresses


def test_paths_and_file_addresses_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = (tmp_path / "a b").as_uri()
    for uri in ("a b", "./a b", str(tmp_path / "a b"), expected, expected.replace("file://", "file://localhost")):
        assert open_store(uri).uri == expected
    assert open_store("s3://bucket").uri == open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"


@pytest.mark.parametrize(
    "uri",
    [
        *("", "gs://bucket/x", "https://host/x", "file://host/x", "file://relative", "s3://", "s3:///x", "s3://b!/x"),
        *("s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/a?X-Amz-Signature=hush"),
    ],
)
def test_an_address_that_is_none_is_refused_with_what_to_write(uri: str) -> None:
    with pytest.raises(SpecError) as error:
        open_store(uri)
    assert "s3://bucket/prefix" in message_of(error) and "hush" not in str(error.value)


def test_a_home_folder_of_nobody_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        open_store("~nosuchuser/releases")
    assert "there is no home folder ~nosuchuser" in message_of(error)


@pytest.mark.parametrize("uri", ["s3://AKIA:hush@bucket/x", "https://me:hush@host/x", "file://me:hush@host/x"])
def test_an_address_with_credentials_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(SpecError) as error:
        open_store(uri)
    assert "credentials" in message_of(error)
    assert "hush" not in str(error.value) and "AKIA" not in str(error.value)


def test_importing_and_opening_a_store_imports_no_boto3() -> None:
    code = "import sys; from orchestrator.store import open_store; open_store('s3://bucket/x'); "
    code += "sys.exit(any(name.partition('.')[0] in ('boto3', 'botocore') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What folders get wrong


def test_check_names_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for uri in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PreflightError) as error:
            open_store(str(uri)).check()
        assert "file" in message_of(error)


def test_published_files_cannot_be_written_by_accident(tmp_path: Path, small: Path) -> None:
    open_store(str(tmp_path / "root")).publish("x", small, {})
    assert not (tmp_path / "root/x/a").stat().st_mode & 0o222


# What servers and accounts get wrong


def test_a_missing_bucket_is_named_or_made(s3_endpoint: str, s3_bucket: str, small: Path) -> None:
    missing = f"s3://{s3_bucket}-missing"
    store = open_store(missing)
    with pytest.raises(PreflightError) as early:
        store.check()
    with pytest.raises(PublishError) as late:
        store.publish(NAME, small, {})
    for message in (message_of(early), message_of(late)):
        assert f"there is no bucket '{s3_bucket}-missing' at {s3_endpoint}" in message
    assert open_store(missing, create_bucket=True).publish(NAME, small, {}) == store.read_release(NAME)
    open_store(f"{missing}-2", create_bucket=True).check()
    open_store(f"{missing}-2").check()


def assert_quick_and_clear(uri: str, says: str) -> str:
    begin = time.monotonic()
    with pytest.raises(PreflightError) as error:
        open_store(uri).check()
    assert time.monotonic() - begin < 15
    assert says in message_of(error)
    assert SECRET_KEY not in str(error.value) and "hush" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    return str(error.value)


def test_a_dead_endpoint_is_known_in_seconds(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # bound, not listening: refused
        endpoint = f"http://me:hush@127.0.0.1:{port.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        message = assert_quick_and_clear("s3://bucket/x", "no answer, or half of one, from http://127.0.0.1:")
        assert "AWS_ENDPOINT_URL_S3" in message
        with pytest.raises(PublishError) as error:
            open_store("s3://bucket/x").publish(NAME, small, {})
        assert "no answer, or half of one, from http://127.0.0.1:" in message_of(error)


def test_an_endpoint_that_never_answers_is_known_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        port.listen()  # accepts, says nothing
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port.getsockname()[1]}")
        assert_quick_and_clear("s3://bucket/x", "no answer, or half of one, from")


def test_missing_credentials_are_said_so(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_quick_and_clear(f"s3://{s3_bucket}", "no AWS credentials were found")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert_quick_and_clear(f"s3://{s3_bucket}", "no AWS credentials were found")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert_quick_and_clear(f"s3://{s3_bucket}", "the AWS credentials cannot be read (ProfileNotFound)")


def test_an_endpoint_that_is_no_address_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "hush-not-an-address")
    assert_quick_and_clear("s3://bucket", "AWS_ENDPOINT_URL_S3")


@pytest.fixture
def proxy(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A server between the store and the S3 server that can misbehave as other servers do."""
    with FaultyProxy(s3_endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.endpoint)
        yield between


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "AccessDenied", "denied HeadBucket"),
        (301, "PermanentRedirect", "redirects to somewhere else"),
        (308, "PermanentRedirect", "redirects to somewhere else"),
        (418, "Teapot", "answered HeadBucket with 418"),
    ],
)
def test_what_a_server_refuses_is_said_plainly(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, status: int, code: str, says: str
) -> None:
    proxy.answer("HEAD", "", status, code, times=100)
    assert_quick_and_clear(bucket_storage.uri, says)


def test_a_bucket_that_may_be_read_but_not_written_fails_the_check(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, small: Path
) -> None:
    proxy.answer("POST", "", 403, "AccessDenied", times=100)
    assert_quick_and_clear(bucket_storage.uri, "denied CreateMultipartUpload")
    proxy.answer("PUT", "", 403, "InvalidAccessKeyId", times=100)
    with pytest.raises(PublishError) as error:
        open_store(bucket_storage.uri).publish(NAME, small, {})
    assert "does not accept the AWS credentials" in message_of(error)


def test_conflicts_are_tried_again(proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path) -> None:
    proxy.answer("PUT", "config.json", 409, "ConditionalRequestConflict", times=2)
    proxy.answer("POST", "model.safetensors?uploadId", 409, "ConditionalRequestConflict", times=1)
    store = open_store(bucket_storage.uri)
    assert store.publish(NAME, folder, {}) == store.read_release(NAME)
    assert proxy.answers_left() == 0
    assert bucket_storage.unfinished() == []


def test_endless_conflicts_end(proxy: FaultyProxy, bucket_storage: BucketBackdoor, small: Path) -> None:
    proxy.answer("PUT", "/b", 409, "ConditionalRequestConflict", times=1000)
    with pytest.raises(PublishError) as error:
        open_store(bucket_storage.uri).publish(NAME, small, {})
    assert "is being written by others" in message_of(error)


def test_an_answer_that_got_lost_is_settled_by_looking(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path
) -> None:
    """The server did the work but said 500; boto3 asks again and is told that the key exists, or the upload is gone."""
    proxy.answer("PUT", "config.json", 500, "InternalError", times=1, after=True)
    proxy.answer("POST", "model.safetensors?uploadId", 500, "InternalError", times=1, after=True)
    store = open_store(bucket_storage.uri)
    assert store.publish(NAME, folder, {}) == store.read_release(NAME)
    assert proxy.answers_left() == 0


@pytest.mark.skipif(ENDPOINT is not None, reason="needs a server that verifies no signatures: a header is dropped")
def test_a_server_that_ignores_conditions_still_gets_nothing_overwritten(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path, small: Path
) -> None:
    proxy.dropped_headers = {"if-none-match"}
    store = open_store(bucket_storage.uri)
    first = store.publish(NAME, folder, MANIFEST)
    assert store.publish(NAME, folder, MANIFEST) == first == store.read_release(NAME)
    with pytest.raises(PublishError, match="already published"):
        store.publish(NAME, small, {})


def test_every_write_is_conditional_and_carries_its_checksum(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path
) -> None:
    open_store(bucket_storage.uri).publish(NAME, folder, MANIFEST)
    writes = [request for request in proxy.requests if request.method == "PUT" and "partNumber" not in request.path]
    ends = [request for request in proxy.requests if request.method == "POST" and "uploadId" in request.path]
    assert len(writes) == 5 and len(ends) == 1
    assert all(request.headers["if-none-match"] == "*" for request in writes + ends)
    bodies = [request for request in proxy.requests if request.method == "PUT"]
    assert len(bodies) == 8  # three of them parts
    assert all(
        request.headers["x-amz-checksum-sha256"] and len(request.headers["x-amz-content-sha256"]) == 64
        for request in bodies
    )
    assert proxy.requests[-1].path.endswith(f"{NAME}/COMPLETE") and proxy.requests[-1].method == "PUT"


def test_looking_for_a_release_reads_no_file_of_it(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path
) -> None:
    open_store(bucket_storage.uri).publish(NAME, folder, MANIFEST)
    proxy.requests.clear()
    assert open_store(bucket_storage.uri).read_release(NAME) is not None
    read = [request.path.rpartition("/")[2] for request in proxy.requests if request.method == "GET"]
    assert sorted(read) == ["COMPLETE", "release.json"]
    asked = [request.path for request in proxy.requests if request.method == "HEAD" and NAME in request.path]
    assert len(asked) == 4
    proxy.answer("HEAD", "config.json", 403, "AccessDenied", times=100)
    with pytest.raises(PublishError) as error:
        open_store(bucket_storage.uri).read_release(NAME)
    assert "denied HeadObject" in message_of(error)


def test_a_download_cut_short_goes_on_where_it_stopped(
    proxy: FaultyProxy, bucket_storage: BucketBackdoor, folder: Path, tmp_path: Path
) -> None:
    store = open_store(bucket_storage.uri)
    release = store.publish(NAME, folder, MANIFEST)
    proxy.cut("model.safetensors", after_bytes=5 << 20, times=2)
    assert store.fetch(NAME, tmp_path / "target") == release
    ranges = [request.headers.get("range") for request in proxy.requests if request.method == "GET"]
    assert len([entry for entry in ranges if entry]) == 2
    proxy.cut("model.safetensors", after_bytes=1000, times=1000)
    with pytest.raises(PublishError, match="no answer, or half of one, from"):
        store.fetch(NAME, tmp_path / "other")
    hidden, *others = sorted(path.name for path in tmp_path.iterdir())
    assert hidden == f".other.{release.digest[:16]}.part" and others == ["target"]
    proxy.heal()
    proxy.requests.clear()
    assert store.fetch(NAME, tmp_path / "other") == release  # goes on from what had arrived
    assert content(tmp_path / "other") == content(tmp_path / "target")
    assert next(request.headers.get("range") for request in proxy.requests if "model.safetensors" in request.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]
