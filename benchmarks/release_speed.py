"""How fast a release goes up, beside MLflow's own S3 repository: the same files, the same server, one run.

    python -m benchmarks.release_speed [--rounds 5] [--save]

Many small files and one large file, in turns, to a server on this machine and to the same one 20 ms away (round trip; a
proxy that only delays). Ours is a whole publish: every file hashed, each key created only, each part and file with its
SHA-256 for the server to compare, listed, sealed. MLflow's is `log_artifacts` as it comes, with boto3's threads and
CRC32s: it overwrites what is there, lists nothing, and what it was killed over is not resumed.

The server is Ceph if there is one (tests/ceph_install.sh, ORCHESTRATOR_CEPH), else moto's; or another that
AWS_ENDPOINT_URL_S3 names, with the usual credentials.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.results import circumstances, save
from benchmarks.targets import Target, show
from orchestrator.store import Store, open_store
from tests.ceph_server import find_ceph, serve_ceph
from tests.s3_server import ACCESS_KEY, SECRET_KEY, serve

MANY, MANY_BYTES = 200, 16 << 10
LARGE_BYTES = 128 << 20
ROUND_TRIP_MS = 20


@contextmanager
def far_away(endpoint: str, milliseconds: float) -> Iterator[str]:
    """Yield an address that leads to `endpoint`, with a longer round trip."""
    command = [sys.executable, "-m", "benchmarks.far_away", urlsplit(endpoint).netloc, str(milliseconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def ours(folder: Path, bucket: str) -> None:
    """Publish `folder` as a release. The connection is kept, as MLflow keeps its own."""
    _store(bucket, os.environ["AWS_ENDPOINT_URL_S3"]).publish(f"speed/{uuid.uuid4().hex}", folder, {"schema": 1})


@lru_cache
def _store(bucket: str, endpoint: str) -> Store:
    return open_store(f"s3://{bucket}/ours")


def mlflow(folder: Path, bucket: str) -> None:
    """Log `folder` with MLflow's repository for S3."""
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    S3ArtifactRepository(f"s3://{bucket}/mlflow/{uuid.uuid4().hex}").log_artifacts(str(folder))


def measure(folder: Path, bucket: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each upload, in turns; one of each beforehand, for imports and connections, does not count."""
    ways: dict[str, Callable[[Path, str], None]] = {"ours": ours, "mlflow": mlflow}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, upload in list(ways.items())[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            upload(folder, bucket)
            if turn:
                taken[name].append(time.perf_counter() - began)
        _empty(bucket)  # a server may hold all of it in memory
    return taken


def _empty(bucket: str) -> None:
    import boto3

    boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"]).Bucket(bucket).objects.delete()


def main() -> None:
    """Measure, print, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/release_speed.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given, ceph = os.environ.get("AWS_ENDPOINT_URL_S3"), find_ceph()
        server, endpoint = os.environ.get("S3_SERVER", "given by AWS_ENDPOINT_URL_S3"), given or ""
        if not given:
            os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
            server = "Ceph RGW, memstore" if ceph else "moto"
            start = serve_ceph(ceph, folder / "ceph") if ceph else serve(folder / "moto.log")
            endpoint = stack.enter_context(start)
        os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        bucket = f"speed-{uuid.uuid4().hex[:12]}"
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
        many, large = folder / "many", folder / "large"
        (many / "shards").mkdir(parents=True)
        large.mkdir()
        for number in range(MANY):
            (many / "shards" / f"{number:04}.bin").write_bytes(os.urandom(MANY_BYTES))
        with (large / "model.safetensors").open("wb") as file:
            for _ in range(LARGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        distant = stack.enter_context(far_away(endpoint, ROUND_TRIP_MS))
        for place, address in (("here", endpoint), (f"{ROUND_TRIP_MS} ms away", distant)):
            os.environ |= {"AWS_ENDPOINT_URL_S3": address, "MLFLOW_S3_ENDPOINT_URL": address}
            for what, content in (("many small files", many), ("one large file", large)):
                taken = measure(content, bucket, arguments.rounds)
                ratio = statistics.median(taken["mlflow"]) / statistics.median(taken["ours"])
                results[f"{what}, {place}"] = {"seconds": taken, "times_mlflow": ratio}
                print(f"{what}, {place}: {ratio:.2f} times MLflow's rate", taken)
    targets = [
        Target(f"time / MLflow's, {label}", 1 / 3 if "many" in label else 1.0, 1 / entry["times_mlflow"])
        for label, entry in results.items()
    ]
    show(targets)
    if arguments.save:
        save(
            "release_speed",
            {
                **circumstances(),
                "server": server,
                "mlflow": importlib.metadata.version("mlflow"),
                "files": {"many": [MANY, MANY_BYTES], "large": [1, LARGE_BYTES]},
                "uploads": results,
                "targets": [target.record() for target in targets],
            },
        )


if __name__ == "__main__":
    main()
