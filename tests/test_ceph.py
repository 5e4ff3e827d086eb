"""Releases in Ceph: a server that verifies signatures, and whose conditions hold when many write at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import store_s3
from orchestrator.errors import PreflightError, PublishError
from orchestrator.store import Release, open_store
from tests.ceph_server import ceph_bucket, ceph_endpoint
from tests.promotion_scene import Scene
from tests.s3_server import FaultyProxy, s3_client
from tests.test_signing import make_keys

__all__ = ["ceph_bucket", "ceph_endpoint"]
NAME = "model/3f2a"
PARTS = 3
RACERS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, one of them with a name that has to be quoted, and one that goes up in parts."""
    root = tmp_path_factory.mktemp("ceph") / "content"
    (root / "serving").mkdir(parents=True)
    (root / "config.json").write_text('{"hidden_size": 64}')
    (root / "empty").write_bytes(b"")
    (root / "serving" / "vllm größe ~+.yaml").write_text("port: 8000\n")
    (root / "model.safetensors").write_bytes(os.urandom((PARTS - 1) * store_s3.PART_BYTES + 12345))
    return root


@pytest.fixture
def watched(ceph_endpoint: str, ceph_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Shows what reaches the server, which it passes on as it came: signatures hold."""
    with FaultyProxy(ceph_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


class FlippingProxy(FaultyProxy):
    """Changes the last bit of the first file that comes by."""

    flipped = 0

    def alter(self, method: str, path: str, body: bytes) -> bytes:
        if method != "PUT" or "weights" not in path or self.flipped:
            return body
        self.flipped += 1
        return body[:-1] + bytes([body[-1] ^ 1])


def content(root: Path) -> dict[str, bytes]:
    own = ("release.json", "COMPLETE", "model.sig")
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {key: data for key, data in found.items() if key not in own}


def test_a_signed_release_goes_up_in_one_request_a_file_and_comes_back(
    watched: FaultyProxy, ceph_endpoint: str, ceph_bucket: str, folder: Path, tmp_path: Path
) -> None:
    private, public = make_keys(tmp_path, "key")
    store = open_store(f"s3://{ceph_bucket}/some/prefix")
    store.check()
    release = store.publish(NAME, folder, {"schema": 1}, signing_key=private)
    # The server took the signature of each the first time: none had to be asked again.
    puts = [request for request in watched.requests if request.method == "PUT"]
    assert len(puts) == 3 + PARTS + len(("release.json", "model.sig", "COMPLETE"))
    assert all(len(request.headers["x-amz-content-sha256"]) == 64 for request in puts)
    assert store.publish(NAME, folder, {"schema": 1}, signing_key=private) == release
    assert store.fetch(NAME, tmp_path / "pulled", verify_key=public) == release == store.verify(NAME)
    assert content(tmp_path / "pulled") == content(folder)
    assert s3_client(ceph_endpoint).list_multipart_uploads(Bucket=ceph_bucket).get("Uploads", []) == []


def test_a_wrong_secret_is_refused_before_and_while_publishing(
    ceph_bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-not-the-secret")
    store = open_store(f"s3://{ceph_bucket}/x")
    for failure, attempt in (
        (PreflightError, store.check),
        (PublishError, lambda: store.publish(NAME, folder, {"schema": 1})),
    ):
        with pytest.raises(failure) as error:
            attempt()
        assert error.value.problems[0].remedy and "hush" not in str(error.value)
        assert "credentials" in str(error.value)


@pytest.mark.parametrize("size", [1000, 2 * store_s3.PART_BYTES], ids=["whole", "in parts"])
def test_bytes_that_change_on_their_way_are_refused_by_the_server(
    ceph_endpoint: str, ceph_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The signature covers the content: what differs by a bit is not stored, and is sent again."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(size))

    with FlippingProxy(ceph_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = open_store(f"s3://{ceph_bucket}/flipped")
        store.publish(NAME, tmp_path / "model", {"schema": 1})
        assert proxy.flipped == 1
        puts = [request for request in proxy.requests if request.method == "PUT" and "weights" in request.path]
        assert len(puts) == 1 + max(1, size // store_s3.PART_BYTES)
        store.verify(NAME)


def test_of_many_that_create_one_key_at_once_one_wins(ceph_bucket: str) -> None:
    store, start = open_store(f"s3://{ceph_bucket}/records"), threading.Barrier(RACERS)

    def create(number: int) -> bool:
        store.read_record(f"warm/{number}")  # its connection is there
        start.wait()
        return store.create_record("head/1", str(number).encode())

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(create, range(RACERS)))
    assert won.count(True) == 1
    assert store.read_record("head/1") == str(won.index(True)).encode()


def test_of_racing_publishers_with_other_content_one_wins(ceph_bucket: str, tmp_path: Path) -> None:
    uri, start = f"s3://{ceph_bucket}/race", threading.Barrier(4)

    def publish(number: int) -> Release | PublishError:
        root = tmp_path / str(number)
        root.mkdir()
        (root / "same").write_text("same")
        (root / "weights").write_bytes(bytes([number]) * 1000)
        start.wait()
        try:
            return open_store(uri).publish(NAME, root, {"schema": 1})
        except PublishError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(publish, range(4)))
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Release)]
    assert open_store(uri).fetch(NAME, tmp_path / "target") == winner


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.store import open_store
sent = 0
def progress(key, amount):
    global sent
    sent += amount
    if sent > 9 << 20:  # inside the large file
        os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).publish(sys.argv[2], Path(sys.argv[3]), {"schema": 1}, progress)
"""


def test_a_killed_publish_is_invisible_and_taken_up(
    watched: FaultyProxy, ceph_endpoint: str, ceph_bucket: str, folder: Path, tmp_path: Path
) -> None:
    uri = f"s3://{ceph_bucket}/killed"
    run = subprocess.run([sys.executable, "-c", KILLED, uri, NAME, str(folder)], check=False)
    assert run.returncode == -signal.SIGKILL
    store, client = open_store(uri), s3_client(ceph_endpoint)
    assert store.read_release(NAME) is None
    with pytest.raises(PublishError, match="no complete release"):
        store.fetch(NAME, tmp_path / "early")
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=ceph_bucket).get("Contents", [])]
    assert not [key for key in keys if key.rpartition("/")[2] in ("COMPLETE", "release.json", "model.safetensors")]
    (upload,) = client.list_multipart_uploads(Bucket=ceph_bucket)["Uploads"]
    place = {"Bucket": ceph_bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    there = {part["PartNumber"] for part in client.list_parts(**place).get("Parts", [])}
    assert there
    watched.requests.clear()
    release = store.publish(NAME, folder, {"schema": 1})
    sent = [request.path for request in watched.requests if request.method == "PUT" and "partNumber" in request.path]
    assert len(sent) == PARTS - len(there)
    assert store.fetch(NAME, tmp_path / "pulled") == release
    assert content(tmp_path / "pulled") == content(folder)
    assert client.list_multipart_uploads(Bucket=ceph_bucket).get("Uploads", []) == []


def test_a_release_is_promoted_and_rolled_back(ceph_bucket: str, tmp_path: Path, tracking_uri: str) -> None:
    (tmp_path / "home").mkdir()
    scene = Scene(f"s3://{ceph_bucket}/models", tmp_path, tracking_uri)
    first, second = scene.register("one"), scene.register("two")
    for version in (first, second):
        scene.climb(version)
    assert scene.alias() == second
    scene.promoter.rollback("production")
    assert scene.alias() == first
    assert scene.anew().promote(first, "production").done is None
