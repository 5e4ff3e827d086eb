"""A sample of the faults of benchmarks/release_faults.py; pulls into folders that are in use, full or hostile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import store_s3
from orchestrator.errors import PreflightError, PublishError, SpecError
from orchestrator.store import open_store
from tests.release_faults import FAULTS, NAME, PUBLISH, PULL, Injector, Scene, cases, make_content
from tests.s3_server import use_endpoint
from tests.test_signing import make_keys

SAMPLE = [
    ("publish", "look for it", "garbled"),
    ("publish", "begin parts", "garbled"),
    ("publish", "small file", "500 after the work was done"),
    ("publish", "part 2", "wrong etag"),
    ("publish", "part 2", "killed"),
    ("publish", "end parts", "killed"),
    ("publish", "listing", "twice"),
    ("publish", "seal", "500 all the time"),
    ("pull", "seal", "short"),
    ("pull", "listing", "garbled"),
    ("pull", "large file", "garbled"),
    ("pull", "large file", "reset all the time"),
    ("pull", "large file", "killed"),
]


@pytest.fixture
def proxy(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Injector]:
    monkeypatch.setattr(store_s3, "ATTEMPTS", 2)  # of one request: waiting between five takes most of the time
    with Injector(s3_endpoint) as between:
        use_endpoint(monkeypatch, between.endpoint)
        yield between


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_content(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture
def scene(proxy: Injector, s3_endpoint: str, s3_bucket: str, content: Path, tmp_path: Path) -> Scene:
    return Scene(proxy, s3_endpoint, s3_bucket, content, make_keys(tmp_path, "key"))


def test_the_benchmark_has_a_hundred_faults_and_this_is_a_sample_of_them() -> None:
    assert len(cases()) >= 100 and set(SAMPLE) <= set(cases())
    assert {request for what, request, _ in cases() if what == "publish"} == set(PUBLISH)
    assert {request for what, request, _ in cases() if what == "pull"} == set(PULL)
    assert {fault for _, _, fault in cases()} == set(FAULTS)


@pytest.mark.parametrize(("what", "request_", "fault"), SAMPLE, ids=lambda value: value.replace(" ", "-"))
def test_after_a_fault_nothing_partial_is_seen_and_doing_it_again_completes_it(
    scene: Scene, tmp_path: Path, what: str, request_: str, fault: str
) -> None:
    outcome = scene.inject(what, request_, fault, tmp_path / "scratch")
    assert outcome.happened


def test_parts_that_a_killed_publisher_sent_are_not_sent_again(scene: Scene, proxy: Injector, tmp_path: Path) -> None:
    uri = f"s3://{scene.bucket}/resumed"
    proxy.disturb("POST", "uploadId", "killed")  # both parts are there
    assert scene._attempt(uri, "publish", tmp_path, "killed") == "killed"
    (upload,) = scene.client.list_multipart_uploads(Bucket=scene.bucket)["Uploads"]
    proxy.heal()
    proxy.requests.clear()
    open_store(uri).publish(NAME, scene.folder, {"schema": 1})
    sent = [request for request in proxy.requests if "partNumber" in request.path and request.method == "PUT"]
    ended = [request for request in proxy.requests if "uploadId" in request.path and request.method == "POST"]
    assert sent == [] and [upload["UploadId"] in request.path for request in ended] == [True]
    assert scene.client.list_multipart_uploads(Bucket=scene.bucket).get("Uploads", []) == []


def test_an_upload_of_another_content_is_not_taken_up_and_ended_once_the_key_is_taken(
    scene: Scene, proxy: Injector
) -> None:
    place = {"Bucket": scene.bucket, "Key": f"other/{NAME}/model.safetensors"}
    foreign = scene.client.create_multipart_upload(**place)["UploadId"]
    scene.client.upload_part(**place, UploadId=foreign, PartNumber=1, Body=bytes(8 << 20))
    open_store(f"s3://{scene.bucket}/other").publish(NAME, scene.folder, {"schema": 1})
    sent = [request for request in proxy.requests if "partNumber" in request.path and request.method == "PUT"]
    assert len(sent) == 2 and not any(foreign in request.path for request in sent)
    assert scene.client.list_multipart_uploads(Bucket=scene.bucket).get("Uploads", []) == []


@pytest.fixture
def released(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100_000)
    open_store(str(tmp_path / "releases")).publish(NAME, folder, {"schema": 1})
    return str(tmp_path / "releases")


KILLED_PULL = """
import os, signal, sys
from pathlib import Path
from orchestrator import transfer
from orchestrator.store import open_store
advance = transfer.Meter.advance
def die(self, file, amount):
    advance(self, file, amount)
    if file.key == "model.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
transfer.Meter.advance = die
open_store(sys.argv[1]).fetch(sys.argv[2], Path(sys.argv[3]))
"""


def test_a_killed_pull_is_taken_up_and_what_others_left_is_swept(released: str, tmp_path: Path) -> None:
    target = tmp_path / "out" / "pulled"
    run = subprocess.run([sys.executable, "-c", KILLED_PULL, released, NAME, str(target)], check=False)
    assert run.returncode == -signal.SIGKILL and not target.exists()
    (hidden,) = target.parent.iterdir()
    (hidden / "intruder").symlink_to("/etc/passwd")
    (hidden / "config.json").unlink(missing_ok=True)
    (hidden / "config.json").symlink_to(tmp_path / "victim")
    (hidden / "model.safetensors").write_bytes(b"garbage")  # as a torn write would leave it
    stale = target.parent / f".pulled.{'0' * 16}.part"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"of another release")
    open_store(released).fetch(NAME, target)
    assert {path.name for path in target.parent.iterdir()} == {"pulled"}
    assert sorted(path.name for path in target.iterdir()) == [
        *("COMPLETE", "config.json", "model.safetensors", "release.json")
    ]
    assert (target / "model.safetensors").read_bytes() == b"weights" * 100_000
    assert not (tmp_path / "victim").exists() and not (target / "config.json").is_symlink()


def test_two_pulls_into_one_folder_do_not_meet(released: str, tmp_path: Path) -> None:
    import fcntl

    release = open_store(released).read_release(NAME)
    assert release
    hidden = tmp_path / f".pulled.{release.digest[:16]}.part"
    hidden.mkdir()
    handle = os.open(hidden, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(SpecError, match="another pull into"):
        open_store(released).fetch(NAME, tmp_path / "pulled")
    os.close(handle)
    open_store(released).fetch(NAME, tmp_path / "pulled")


def test_a_disk_that_is_too_small_is_known_before_anything_is_downloaded(
    released: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(PreflightError, match=r"needs 0.02 GB on the disk of .*, where 0.00 GB are free; free space"):
        open_store(released).fetch(NAME, tmp_path / "out" / "pulled")
    assert not (tmp_path / "out").exists()


def test_a_store_that_answers_without_end_is_refused(released: str, tmp_path: Path) -> None:
    seal = Path(released) / NAME / "COMPLETE"
    seal.unlink()
    seal.symlink_to("/dev/zero")
    with pytest.raises(PublishError, match="too large to be ours"):
        open_store(released).fetch(NAME, tmp_path / "pulled")
