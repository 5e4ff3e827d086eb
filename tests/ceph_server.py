"""A real Ceph for the tests: one monitor, one store in memory and the S3 gateway, as plain processes on loopback ports.

    python -m tests.ceph_server          # starts it, prints what to export, runs until interrupted

Needs nothing installed: `tests/ceph_install.sh FOLDER` unpacks Debian's packages, ORCHESTRATOR_CEPH names the folder.
Unlike moto's server it verifies signatures and the SHA-256 of what arrives, and its conditions hold under racing; on
the end of an upload in parts it ignores conditions, as older servers do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.s3_server import ACCESS_KEY, SECRET_KEY, free_port, s3_client, use_endpoint

HOME = "ORCHESTRATOR_CEPH"
START_SECONDS = 120
_CONFIGURATION = """
[global]
fsid = {cluster}
mon initial members = a
mon host = [v2:127.0.0.1:{port_2},v1:127.0.0.1:{port_1}]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 8
osd pool default pgp num = 8
mon max pg per osd = 1000
osd crush chooseleaf type = 0
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
compression dir = {libraries}/ceph/compressor
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.$pid.asok
log file = {folder}/log/$name.log
crash dir = {folder}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
setuser match path = {folder}
keyring = {folder}/keyring
mon warn on insecure global id reclaim allowed = false
osd objectstore = memstore
memstore device bytes = 8589934592
memstore page set = false
mon data avail warn = 1
mon data avail crit = 1
mon cluster log file = {folder}/log/cluster.log
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
rgw thread pool size = 32
"""
# Says to the monitor what the command `ceph` would, which is Python of one version.
_TELL = """
import ctypes, sys
rados, cluster = ctypes.CDLL("librados.so.2"), ctypes.c_void_p()
assert not rados.rados_create2(ctypes.byref(cluster), b"ceph", b"client.admin", ctypes.c_uint64(0))
assert not rados.rados_conf_read_file(cluster, sys.argv[1].encode())
assert not rados.rados_conf_set(cluster, b"client_mount_timeout", b"5")
assert not rados.rados_connect(cluster)
said, size, note, length = ctypes.c_char_p(), ctypes.c_size_t(), ctypes.c_char_p(), ctypes.c_size_t()
command = (ctypes.c_char_p * 1)(sys.argv[2].encode())
answer = (ctypes.byref(said), ctypes.byref(size), ctypes.byref(note), ctypes.byref(length))
code = rados.rados_mon_command(cluster, command, ctypes.c_size_t(1), b"", ctypes.c_size_t(0), *answer)
rados.rados_shutdown(cluster)
sys.exit(f"{code} {note.value}" if code else 0)
"""


def find_ceph() -> Path | None:
    """Return the folder below which Ceph's usr/bin lies, or None."""
    root = Path(os.environ.get(HOME) or "/")
    return root if (root / "usr" / "bin" / "radosgw").is_file() and (root / "usr/bin/ceph-osd").is_file() else None


def _environment(root: Path) -> dict[str, str]:
    if root == Path("/"):
        return dict(os.environ)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    places = (libraries, libraries / "ceph", root / "usr/lib/ceph", root / "lib/x86_64-linux-gnu")
    path = f"{root / 'usr/bin'}:{root / 'usr/sbin'}:{os.environ['PATH']}"
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, places)), "PATH": path}


@contextmanager
def serve_ceph(root: Path, folder: Path) -> Iterator[str]:
    """Run Ceph; yield the gateway's endpoint once it answers. RuntimeError if it does not come up.

    root: where its programs are. folder: must not exist; the cluster's own. The account is that of tests.s3_server.
    """
    ports = {"port": free_port(), "port_1": free_port(), "port_2": free_port()}
    for place in ("mon", "osd", "rgw", "run", "log"):
        (folder / place).mkdir(parents=True)
    cluster, configuration = str(uuid.uuid4()), folder / "ceph.conf"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    configuration.write_text(_CONFIGURATION.format(cluster=cluster, folder=folder, libraries=libraries, **ports))
    environment = {**_environment(root), "CEPH_CONF": str(configuration)}

    def call(*command: str) -> None:
        try:
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=START_SECONDS)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{command[0]} failed: {error.stdout}{error.stderr}") from None

    def run(*command: str) -> None:
        with (folder / "log" / f"{command[0]}.out").open("wb") as output:
            process = subprocess.Popen([*command, "-f"], env=environment, stdout=output, stderr=output)
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGKILL)  # nothing of it is kept

    keyring, monitors = str(folder / "keyring"), str(folder / "monitors")
    may = {"mon.": {"mon": "allow *"}, "client.admin": dict.fromkeys(("mon", "osd", "mgr"), "allow *")}
    may["osd.0"] = {"mon": "allow profile osd", "osd": "allow *"}
    with ExitStack() as stack:
        for name, allowed in may.items():
            caps = [word for part, cap in allowed.items() for word in ("--cap", part, cap)]
            new = [] if Path(keyring).exists() else ["--create-keyring"]
            call("ceph-authtool", *new, keyring, "--gen-key", "-n", name, *caps)
        address = f"[v2:127.0.0.1:{ports['port_2']},v1:127.0.0.1:{ports['port_1']}]"
        call("monmaptool", "--create", "--fsid", cluster, "--addv", "a", address, monitors)
        call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitors, "--keyring", keyring)
        run("ceph-mon", "-i", "a")
        store = str(uuid.uuid4())
        _tell(configuration, environment, {"prefix": "osd new", "uuid": store})
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        run("ceph-osd", "-i", "0")
        run("radosgw", "-n", "client.admin")
        endpoint = f"http://127.0.0.1:{ports['port']}"
        _wait_until_ready(endpoint, folder)
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        call("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        yield endpoint


def _tell(configuration: Path, environment: Mapping[str, str], command: Mapping[str, str]) -> None:
    """Tell the monitor, which may not be up yet."""
    arguments = [sys.executable, "-c", _TELL, str(configuration), json.dumps(command)]
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"Ceph's monitor refused {command}: {done.stderr}")
        time.sleep(0.3)


def _wait_until_ready(endpoint: str, folder: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with direct.open(endpoint, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    said = "\n".join(path.read_text(errors="replace") for path in sorted((folder / "log").glob("*.out")))
    raise RuntimeError(f"Ceph's gateway did not come up on {endpoint}:\n{said}")


@pytest.fixture(scope="module")
def ceph_endpoint() -> Iterator[str]:
    """The address of a running Ceph gateway; skips where there is no Ceph."""
    root = find_ceph()
    if root is None:
        pytest.skip(f"no Ceph here: run tests/ceph_install.sh FOLDER and set {HOME}=FOLDER")
    # Not pytest's folder: a socket's path has 108 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))
    try:
        with serve_ceph(root, folder) as endpoint:
            yield endpoint
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ceph_bucket(ceph_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket; the AWS variables lead to it."""
    use_endpoint(monkeypatch, ceph_endpoint)
    bucket = f"test-{uuid.uuid4().hex}"
    s3_client(ceph_endpoint).create_bucket(Bucket=bucket)
    return bucket


def main() -> None:
    """Run until interrupted."""
    root = find_ceph()
    if root is None:
        sys.exit(f"no Ceph here: run tests/ceph_install.sh FOLDER and set {HOME}=FOLDER")
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, serve_ceph(root, Path(folder)) as endpoint:
        keys = f"AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}"
        sys.stdout.write(f"export AWS_ENDPOINT_URL_S3={endpoint} {keys}\n")
        sys.stdout.flush()
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
