"""PUT without what boto3 spends on each call: a millisecond of processor, all that a server needs for a small file.

One attempt, sent by urllib3. boto3 remains the way for all else: whatever is not plainly a success is left to it, to
ask again and to explain; the address and the region are those that it was seen to use.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from orchestrator.transfer import TakenError

if TYPE_CHECKING:
    from urllib3 import PoolManager

BLOCK_BYTES = 256 << 10  # read and sent at a time; stays in the processor's cache
GIVE_UP = 8  # failures in a row, after which this server is boto3's alone
_TAKEN = (409, 412)
_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass
class Piece:
    """A piece of a file that is read while it is sent. OSError if the file has become shorter."""

    path: Path
    offset: int
    size: int

    def __post_init__(self) -> None:
        self._file = self.path.open("rb", buffering=0)
        self._at, self._end = self.offset, self.offset + self.size

    def __len__(self) -> int:
        return self.size

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        wanted = min(size, self._end - self._at)
        data = os.pread(self._file.fileno(), wanted, self._at)
        if len(data) < wanted:
            raise OSError(f"{self.path} became shorter")
        self._at += wanted
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DirectPut:
    """Puts objects into one bucket. Safe to use from several threads.

    credentials: boto3's, or None; asked at each request, as they may expire.
    """

    def __init__(self, credentials: Any, *, connections: int, ca_bundle: str | None) -> None:
        self._credentials, self._connections, self._ca_bundle = credentials, connections, ca_bundle
        self._bucket_url, self._region = "", ""
        self._failures = 0
        self._lock = threading.Lock()
        self._pool: PoolManager | None = None

    def learn(self, request: Any, **ignored: Any) -> None:
        """Look at a request of boto3's that lists the bucket. One by a proxy or with another signature says nothing."""
        authorization = request.headers.get("Authorization", b"")
        text = authorization.decode() if isinstance(authorization, bytes) else authorization
        scheme, _, scope = text.partition(" ")
        host = urlsplit(request.url).hostname or ""
        if scheme == _ALGORITHM and (not getproxies() or proxy_bypass(host)):
            self._region = scope.split("/")[2]
            self._bucket_url = request.url.partition("?")[0].rstrip("/")

    def __call__(
        self, key: str, query: str, headers: dict[str, str], body: bytes | Piece, sha256: str
    ) -> Mapping[str, str] | None:
        """Put `body`; return the headers of the answer, or None if anything was not as it should be.

        sha256: of the body, hex. The server compares, as the signature covers it.
        TakenError if the server says that the condition does not hold.
        """
        if not self._bucket_url or self._failures >= GIVE_UP:
            return None
        from urllib3.exceptions import HTTPError

        url = f"{self._bucket_url}/{quote(key, safe='/~')}"
        try:
            answer = self._connect().request(
                "PUT",
                f"{url}?{query}" if query else url,
                body=body if isinstance(body, bytes) else cast(IO[bytes], body),  # it is only read
                headers={**self._sign(url, query, headers, sha256), "Content-Length": str(len(body))},
                redirect=False,
            )
        except (HTTPError, OSError):
            self._failures += 1
            return None
        if answer.status == 200:
            self._failures = 0
            return answer.headers
        if answer.status in _TAKEN:
            raise TakenError
        self._failures += 1
        return None

    def _sign(self, url: str, query: str, headers: dict[str, str], sha256: str) -> dict[str, str]:
        """Return the headers with what signs them: AWS Signature Version 4, as "Create a signed AWS API request" says.

        headers: names in lower case. query: in the order of its names.
        """
        credentials, now = self._credentials.get_frozen_credentials(), datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        address = urlsplit(url)
        signed = {
            **headers,
            "host": address.netloc.rpartition("@")[2],
            "x-amz-content-sha256": sha256,
            "x-amz-date": now,
            **({"x-amz-security-token": credentials.token} if credentials.token else {}),
        }
        names = sorted(signed)
        lines = ["PUT", address.path, query, *(f"{name}:{signed[name]}" for name in names), "", ";".join(names), sha256]
        scope = f"{now[:8]}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        text = f"{_ALGORITHM}\n{now}\n{scope}\n{digest}"
        key = f"AWS4{credentials.secret_key}".encode()
        for word in (*scope.split("/"), text):
            key = hmac.digest(key, word.encode(), "sha256")
        who = f"{_ALGORITHM} Credential={credentials.access_key}/{scope}"
        return {**signed, "authorization": f"{who}, SignedHeaders={';'.join(names)}, Signature={key.hex()}"}

    def _connect(self) -> PoolManager:
        import urllib3

        with self._lock:
            if self._pool is None:
                self._pool = urllib3.PoolManager(
                    maxsize=self._connections,
                    retries=False,
                    timeout=urllib3.Timeout(connect=5, read=60),
                    blocksize=BLOCK_BYTES,
                    ca_certs=self._ca_bundle,
                )
            return self._pool
