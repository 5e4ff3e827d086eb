"""One fault at a time against publishing and pulling, on a real S3 server behind a proxy; what must hold after each.

`FAULTS` says what can go wrong on the way, `inject` does it to one request of a publish or a pull and checks: no
partial release is ever visible, doing it again completes it, every byte is the same, nothing is left over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.store import open_store
from tests.s3_server import FaultyProxy, s3_client

NAME = "model/1"
FAULTS = (
    *("500", "503 slow down", "500 after the work was done", "reset before", "reset after", "slow", "twice", "killed"),
    *("cut", "short", "garbled", "wrong etag", "500 all the time", "reset all the time"),
)
# What of a publish and of a pull: the requests whose method and path these are parts of.
PUBLISH = {
    "look for uploads": ("GET", "?uploads"),
    "look for it": ("GET", "list-type=2"),
    "small file": ("PUT", "config.json"),
    "begin parts": ("POST", "?uploads"),
    "part 1": ("PUT", "partNumber=1"),
    "part 2": ("PUT", "partNumber=2"),
    "end parts": ("POST", "uploadId"),
    "listing": ("PUT", "release.json"),
    "signature": ("PUT", "model.sig"),
    "seal": ("PUT", "/COMPLETE"),
}
PULL = {
    "seal": ("GET", "/COMPLETE"),
    "listing": ("GET", "release.json"),
    "signature": ("GET", "model.sig"),
    "small file": ("GET", "config.json"),
    "large file": ("GET", "model.safetensors"),
}


@dataclass(frozen=True)
class Outcome:
    """What a fault did. first: whether the disturbed attempt succeeded all the same, or what it said."""

    what: str
    request: str
    fault: str
    happened: bool
    first: str


class Injector(FaultyProxy):
    """The proxy with one fault at a time. victim: the process that "killed" kills, as its request arrives."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.victim: int | None = None
        self._planned: tuple[str, str, str] | None = None
        self.happened = threading.Event()

    def disturb(self, method: str, path: str, fault: str) -> None:
        """From now on: `fault` at the first request that matches, or at all of them."""
        self.happened = threading.Event()
        with self._lock:
            self._planned = (method, path, fault)

    def heal(self) -> None:
        """Behave from here on."""
        super().heal()
        with self._lock:
            self._planned = None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            planned, fault = self._planned, ""
            if planned and planned[0] == handler.command and planned[1] in handler.path:
                fault = planned[2]
                self.happened.set()
                if "all the time" not in fault:
                    self._planned = None
        if not fault:
            return super()._handle(handler)
        code = "SlowDown" if "slow down" in fault else "InternalError"
        if fault[:3] in ("500", "503"):
            self.answer(handler.command, planned[1], int(fault[:3]), code, times=1, after="after" in fault)
            return super()._handle(handler)
        if fault == "killed" and self.victim:
            os.kill(self.victim, signal.SIGKILL)
            return _reset(handler)
        if fault in ("reset before", "reset all the time"):
            handler.rfile.read(int(handler.headers.get("content-length", 0)))
            return _reset(handler)
        real, handler.wfile = handler.wfile, BytesIO()
        super()._handle(handler)
        head, separator, body = handler.wfile.getvalue().rpartition(b"\r\n\r\n")
        if head.count(b"HTTP/1.1 ") > 1:  # the one before says that the content may come
            head = b"HTTP/1.1 " + head.split(b"HTTP/1.1 ")[-1]
        handler.wfile = real
        length = b"Content-Length: %d"
        if fault == "reset after":
            return _reset(handler)
        if fault == "slow":
            time.sleep(1)
        if fault == "wrong etag":
            head = re.sub(rb'(?i)(etag: )"?[0-9a-f]+"?', rb'\1"00000000000000000000000000000000"', head)
        if fault == "garbled":
            middle = len(body) // 2
            flipped = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            body = body.replace(b"<?xml", b"<<xml") if b"<?xml" in body else flipped
        whole = head + separator + body
        if fault == "cut":
            whole = head + separator + body[: len(body) // 2]
        if fault == "short":
            shorter = body[: len(body) // 2]
            whole = head.replace(length % len(body), length % len(shorter)) + separator + shorter
        handler.wfile.write(whole * 2 if fault == "twice" else whole)
        handler.wfile.flush()
        handler.close_connection = fault in ("cut", "twice")


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection the hard way."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


_WORKER = """
import sys
from pathlib import Path
from orchestrator.errors import OrchestratorError
from orchestrator.store import open_store
uri, what, name, folder, key = sys.argv[1:]
try:
    if what == "publish":
        open_store(uri).publish(name, Path(folder), {"schema": 1}, signing_key=Path(key))
    else:
        open_store(uri).fetch(name, Path(folder), verify_key=Path(key))
except OrchestratorError as error:
    sys.exit(str(error))
"""


class Scene:
    """A bucket behind a proxy, a folder to publish, and its bytes."""

    def __init__(self, proxy: Injector, endpoint: str, bucket: str, folder: Path, keys: tuple[Path, Path]) -> None:
        self.proxy, self.bucket, self.folder, self.keys = proxy, bucket, folder, keys
        self.client = s3_client(endpoint)
        self.content = _content(folder)
        self.count = 0

    def inject(self, what: str, request: str, fault: str, scratch: Path) -> Outcome:
        """Disturb one request of a publish or a pull; AssertionError if anything is not as it must be afterwards."""
        self.count += 1
        uri, target = f"s3://{self.bucket}/{self.count}", scratch / "target"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if what == "pull":
            open_store(uri).publish(NAME, self.folder, {"schema": 1}, signing_key=self.keys[0])
        method, path = (PUBLISH if what == "publish" else PULL)[request]
        self.proxy.heal()
        self.proxy.disturb(method, path, fault)
        first = self._attempt(uri, what, target, fault)
        happened = self.proxy.happened.is_set()
        self.proxy.heal()
        where = f"{what}, {request}, {fault}: {first}"
        if what == "publish":
            self._check_invisible_or_whole(uri, scratch / "seen", where)
        elif first != "done":
            assert not target.exists(), where
        if first != "done":
            assert self._attempt(uri, what, target, "") == "done", where
        open_store(uri).fetch(NAME, scratch / "end", verify_key=self.keys[1])
        assert _content(scratch / "end") == self.content, where
        if what == "pull":
            assert _content(target) == self.content, where
            assert [path.name for path in scratch.iterdir() if path.name.startswith(".")] == [], where
        left = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        assert not left, f"{where}: {len(left)} uploads are left"
        return Outcome(what, request, fault, happened, first)

    def _attempt(self, uri: str, what: str, target: Path, fault: str) -> str:
        folder, key = (self.folder, self.keys[0]) if what == "publish" else (target, self.keys[1])
        if fault != "killed":
            try:
                if what == "publish":
                    open_store(uri).publish(NAME, folder, {"schema": 1}, signing_key=key)
                else:
                    open_store(uri).fetch(NAME, folder, verify_key=key)
            except OrchestratorError as error:
                assert error.problems[0].remedy, error
                return str(error)
            return "done"
        command = [sys.executable, "-c", _WORKER, uri, what, NAME, str(folder), str(key)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.proxy.victim = process.pid
        _, said = process.communicate(timeout=120)
        self.proxy.victim = None
        assert process.returncode in (0, -signal.SIGKILL), said
        return "done" if process.returncode == 0 else "killed"

    def _check_invisible_or_whole(self, uri: str, seen: Path, where: str) -> None:
        """A reader at this moment finds the release whole, or none."""
        try:
            open_store(uri).fetch(NAME, seen, verify_key=self.keys[1])
        except OrchestratorError as error:
            assert "there is no complete release" in str(error), where
            assert not seen.exists(), where
        else:
            assert _content(seen) == self.content, where


def cases() -> list[tuple[str, str, str]]:
    """Every fault on every kind of request where it can happen."""
    found = [("publish", request, fault) for request in PUBLISH for fault in FAULTS]
    found += [("pull", request, fault) for request in PULL for fault in FAULTS]
    return [case for case in found if _can_happen(*case)]


def _can_happen(what: str, request: str, fault: str) -> bool:
    method = (PUBLISH if what == "publish" else PULL)[request][0]
    if fault in ("cut", "short", "garbled"):
        return method in ("GET", "POST")  # the answers to others are empty
    return fault != "wrong etag" or "partNumber" in PUBLISH.get(request, ("", ""))[1]


def make_content(folder: Path) -> Path:
    """Small files and one that goes up in two parts."""
    (folder / "serving").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (folder / "serving" / "vllm.yaml").write_text("port: 8000\n")
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 20) * 9)
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    own = ("release.json", "COMPLETE", "model.sig")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {key: data for key, data in found.items() if key not in own}
