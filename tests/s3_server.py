"""A real S3-compatible server process (moto) on a loopback port, and a fresh bucket in it for each test.

`s3_bucket` points the usual AWS variables at the server, so that code under test finds it as it would find any other.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

START_SECONDS = 60
# Set these three to run the tests against another S3 server, e.g. Ceph; the account must be allowed to make buckets.
ENDPOINT = os.environ.get("ORCHESTRATOR_TEST_S3_ENDPOINT")
ACCESS_KEY = os.environ.get("ORCHESTRATOR_TEST_S3_ACCESS_KEY", "test-access-key")
SECRET_KEY = os.environ.get("ORCHESTRATOR_TEST_S3_SECRET_KEY", "test-secret-key")


def free_port() -> int:
    """Return a loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(log: Path) -> Iterator[str]:
    """Run moto's server; yield its endpoint once it answers. RuntimeError with its output if it does not come up."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_until_ready(endpoint, process, log)
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(f"{endpoint}/moto-api/data.json", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"moto's server did not come up on {endpoint}:\n{log.read_text(errors='replace')}")


@lru_cache
def s3_client(endpoint: str) -> Any:
    """Return a plain boto3 client, for a test to look at or damage what is in a bucket behind the store's back."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Point the AWS variables at `endpoint`, and away from whatever this machine is set up for."""
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running S3-compatible server, one for the whole session."""
    if ENDPOINT:
        yield ENDPOINT
        return
    with serve(tmp_path_factory.mktemp("s3") / "moto.log") as endpoint:
        yield endpoint


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket of this test's own; the AWS variables lead to it."""
    use_endpoint(monkeypatch, s3_endpoint)
    bucket = f"test-{uuid.uuid4().hex}"
    s3_client(s3_endpoint).create_bucket(Bucket=bucket)
    return bucket


@dataclass(frozen=True)
class Request:
    """What reached the proxy; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class _Fault:
    method: str
    path: str  # a part of the path and query
    times: int
    status: int = 0
    code: str = ""
    after: bool = False
    cut_bytes: int = 0


class FaultyProxy:
    """An HTTP server that passes requests on to an S3 server, and misbehaves where it is told to, as real ones do."""

    def __init__(self, target: str) -> None:
        self.requests: list[Request] = []
        self.dropped_headers: set[str] = set()
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._target = urlsplit(target)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    proxy._handle(self)
                else:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, status: int, code: str, *, times: int, after: bool = False) -> None:
        """Answer so many matching requests with an error; after: pass the request on first and hide the outcome."""
        self._faults.append(_Fault(method, path, times, status, code, after))

    def cut(self, path: str, *, after_bytes: int, times: int) -> None:
        """Break off the answers to so many matching GET requests."""
        self._faults.append(_Fault("GET", path, times, cut_bytes=after_bytes))

    def alter(self, method: str, path: str, body: bytes) -> bytes:
        """Return the content that is passed on. As it came; others may differ."""
        return body

    def heal(self) -> None:
        """Behave from here on."""
        with self._lock:
            self._faults.clear()

    def answers_left(self) -> int:
        """Return how many faults have not happened."""
        return sum(fault.times for fault in self._faults)

    def _next_fault(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        method, path = handler.command, handler.path
        headers = {name.lower(): value for name, value in handler.headers.items()}
        if headers.get("expect") == "100-continue":
            handler.send_response_only(100)
            handler.end_headers()
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        self.requests.append(Request(method, path, headers))
        fault = self._next_fault(method, path)
        if fault is None or fault.after or fault.cut_bytes:
            connection = HTTPConnection(self._target.netloc, timeout=60)
            passed = {name: value for name, value in headers.items() if name not in {"expect", *self.dropped_headers}}
            connection.request(method, path, self.alter(method, path, body), passed)
            with connection.getresponse() as response:
                status, data, length = response.status, response.read(), response.headers.get("Content-Length", "0")
                answer = dict(response.headers.items())
            connection.close()
        if fault is not None and not fault.cut_bytes:
            status, answer = fault.status, {"Content-Type": "application/xml"}
            data = f"<Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>".encode()
            length = str(len(data))
        handler.send_response_only(status)
        for name, value in answer.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", length if method == "HEAD" else str(len(data)))
        handler.end_headers()
        if method == "HEAD":
            return
        if fault is not None and fault.cut_bytes:
            handler.wfile.write(data[: fault.cut_bytes])
            handler.close_connection = True
        else:
            handler.wfile.write(data)
