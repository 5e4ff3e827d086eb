"""Every fault on every request of publishing and pulling a release, one at a time, against a real S3 server.

    python -m benchmarks.release_faults [--every 1] [--save]

After each: no partial release was visible, doing it again completed it, every byte is the same, no upload is left. See
tests/release_faults.py, which does the same to some of them. Ends with the first fault that leaves anything wrong.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.results import circumstances, save
from orchestrator import store_s3
from tests.release_faults import Injector, Outcome, Scene, cases, make_content
from tests.s3_server import s3_client, serve, use_endpoint
from tests.test_signing import make_keys


def main() -> None:
    """Inject, print what came of each, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only each n-th")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/release_faults.json")
    arguments = parser.parse_args()
    store_s3.ATTEMPTS = 3  # of one request: waiting between five of them takes most of the time
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, serve(Path(name) / "moto.log") as endpoint, Injector(endpoint) as proxy:
        folder, bucket = Path(name), f"faults-{uuid.uuid4().hex[:12]}"
        with pytest.MonkeyPatch.context() as patch:
            use_endpoint(patch, proxy.endpoint)
            s3_client(endpoint).create_bucket(Bucket=bucket)
            scene = Scene(proxy, endpoint, bucket, make_content(folder / "model"), make_keys(folder, "key"))
            for what, request, fault in cases()[:: arguments.every]:
                outcomes.append(scene.inject(what, request, fault, folder / "scratch"))
                print(f"{what:<8} {request:<13} {fault:<28} {outcomes[-1].first[:100]}", flush=True)
    seconds = time.perf_counter() - began
    happened = [outcome for outcome in outcomes if outcome.happened]
    survived = Counter("done" if outcome.first == "done" else "failed, then done" for outcome in happened)
    print(f"{len(happened)} faults in {seconds:.0f} s, none left a trace; the first attempt: {dict(survived)}")
    if arguments.save:
        result = {
            "server": "moto",
            "faults": len(happened),
            "partial_releases_seen": 0,
            "not_completed_afterwards": 0,
            "first_attempt": dict(survived),
            "seconds": round(seconds, 1),
            "cases": [[outcome.what, outcome.request, outcome.fault, outcome.first] for outcome in happened],
        }
        save("release_faults", {**circumstances(), **result})


if __name__ == "__main__":
    main()
