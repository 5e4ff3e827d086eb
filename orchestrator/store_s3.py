"""Releases in an S3 bucket: conditional writes, uploads in parts that a later publisher can take up.

The only module that imports boto3, and it does so when the first request is made.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import OrchestratorError, PreflightError
from orchestrator.publishing import Store
from orchestrator.release import Item
from orchestrator.s3_errors import REDIRECT, explain_answer, explain_failure
from orchestrator.transfer import ATTEMPTS, CHUNK_BYTES, FILES_AT_ONCE, Meter, MissingError, StoppedError, TakenError

PART_BYTES = 8 << 20  # larger files go to S3 in parts of this size; S3 allows no part below 5 MiB but the last
MAX_PARTS = 10_000  # of one S3 upload; beyond 80 GB the parts grow instead
PARTS_AT_ONCE = 12  # of all files together; so many are in memory, no more
_TRY_AGAIN = (  # what is there decides
    *("PreconditionFailed", "412", "ConditionalRequestConflict", "409"),
    "NoSuchUpload",  # completed by an attempt whose answer got lost, or by somebody who took it up
    *("InvalidPart", "InvalidPartOrder"),  # an answer gave a part another ETag than the server remembers
    *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),  # changed on its way
)
_log = logging.getLogger(__name__)


class S3Store(Store):
    """A bucket, or a part of one. The endpoint and the credentials are boto3's business: the usual AWS variables."""

    def __init__(self, bucket: str, prefix: str, *, create_bucket: bool) -> None:
        self._bucket, self._prefix, self._create_bucket = bucket, prefix, create_bucket
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._lock = threading.Lock()
        self._shared: Any = None
        self._uploads: list[tuple[str, str]] = []
        self._room = threading.BoundedSemaphore(PARTS_AT_ONCE)

    def check(self) -> None:
        """Also tries the permission to write, by starting an upload and aborting it: no object comes of it."""
        with self._errors(PreflightError, f"cannot use {self.uri}"):
            # Few attempts: a dead endpoint is to be known in seconds.
            client = self._connect(attempts=2, connect_seconds=3, read_seconds=5)
            self._find_bucket(client)
            place = {"Bucket": self._bucket, "Key": self._path(".orchestrator-check")}
            upload = client.create_multipart_upload(**place)["UploadId"]
            client.abort_multipart_upload(**place, UploadId=upload)

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._shared is None:
                self._shared = self._connect(attempts=ATTEMPTS, connect_seconds=5, read_seconds=60)
            return self._shared

    def _connect(self, *, attempts: int, connect_seconds: int, read_seconds: int) -> Any:
        from boto3.session import Session
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            max_pool_connections=FILES_AT_ONCE + PARTS_AT_ONCE,
            # Each upload carries its SHA-256, and every byte read is compared with the manifest. boto3's own default
            # (CRC32 in a trailer) adds nothing to that, and older servers do not understand it.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # The signature covers the content: servers that know no x-amz-checksum-sha256 still verify this one.
            s3={"payload_signing_enabled": True},
        )
        try:
            client = Session().client("s3", config=config)
            choose: Any = _signing_by_checksum  # handlers that choose return something, whatever the stubs say
            client.meta.events.register_first("choose-signer.s3", choose)
            return client
        except ValueError:  # the address is not repeated: it may hold a secret
            raise PreflightError(
                "AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL, or endpoint_url in the AWS configuration) is not an address",
                remedy="set it to something like https://s3.example.org:9000",
            ) from None

    def _find_bucket(self, client: Any) -> None:
        from botocore.exceptions import ClientError

        try:
            client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if not (self._create_bucket and _code(error) in ("404", "NoSuchBucket")):
                raise
            region = client.meta.region_name
            place = {"LocationConstraint": region} if region not in (None, "us-east-1", "aws-global") else None
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=self._bucket, **({"CreateBucketConfiguration": place} if place else {}))

    def _prepare(self) -> None:
        if self._create_bucket:
            self._find_bucket(self._client)

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _head(self, key: str) -> Any:
        """Return what the server says about the object at `key`, or None if there is none."""
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._path(key))
        except ClientError as error:
            if _code(error) in ("404", "NoSuchKey"):
                return None
            raise

    def _size(self, key: str) -> int | None:
        head = self._head(key)
        return None if head is None else int(head["ContentLength"])

    def _identify(self, key: str) -> tuple[str, int] | None:
        head = self._head(key)
        if head is None:
            return None
        if digest := head["Metadata"].get("sha256"):
            return digest, head["ContentLength"]
        return super()._identify(key)  # somebody else put it there: read it

    def _read(self, key: str, offset: int = 0) -> Iterator[bytes]:
        from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

        for attempt in range(1, ATTEMPTS + 1):
            begin = {"Range": f"bytes={offset}-"} if offset else {}
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._path(key), **begin)
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    raise MissingError from None
                if _code(error) == "InvalidRange":  # it ends where the caller wants it to go on
                    return
                raise
            try:
                with closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        yield chunk
                        offset += len(chunk)
                return
            except (HTTPClientError, IncompleteReadError):  # boto3 repeats requests, but not answers cut short
                if attempt == ATTEMPTS:
                    raise

    def _list(self, folder: str) -> Iterator[str]:
        prefix = f"{self._path(folder)}/"
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix, Delimiter="/"
        )
        for page in pages:
            yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))

    def _list_tree(self, name: str) -> Iterator[str]:
        prefix = f"{self._path(name)}/"
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))

    def _create(self, key: str, item: Item, meter: Meter) -> None:
        from botocore.exceptions import ClientError

        try:
            if item.file.bytes > PART_BYTES:
                return self._create_in_parts(key, item, meter)
            body = b"".join(item.chunks(CHUNK_BYTES))
            item.check_unchanged(hashlib.sha256(body).hexdigest())
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._path(key),
                Body=body,
                IfNoneMatch="*",
                ChecksumSHA256=_checksum(body),
                Metadata={"sha256": item.file.sha256},
            )
            meter.advance(item.file, len(body))
        except ClientError as error:
            if _code(error) in _TRY_AGAIN:
                raise TakenError from None
            raise

    def _create_in_parts(self, key: str, item: Item, meter: Meter) -> None:
        """Upload in parts; the object exists only once all are there and the whole has the sha256 that was promised.

        Parts that a killed publisher sent are not sent again. What fails for want of an answer leaves the parts for the
        next publisher; any other failure frees them.
        """
        place = {"Bucket": self._bucket, "Key": self._path(key)}
        size = max(PART_BYTES, -(-item.file.bytes // MAX_PARTS))
        upload, there = self._unfinished_upload(place, item, size)
        if not upload:
            metadata = {"sha256": item.file.sha256}
            begun = self._client.create_multipart_upload(**place, Metadata=metadata, ChecksumAlgorithm="SHA256")
            upload = begun["UploadId"]
        place["UploadId"] = upload

        def send(number: int, data: bytes) -> dict[str, Any]:
            checksum = _checksum(data)
            sent = there.get(number) or self._client.upload_part(
                **place, PartNumber=number, Body=data, ChecksumSHA256=checksum
            )
            meter.advance(item.file, len(data))
            return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum}

        digest, pool = hashlib.sha256(), ThreadPoolExecutor(PARTS_AT_ONCE)
        sending: list[Future[dict[str, Any]]] = []
        try:
            for number, data in enumerate(self._roomy(item.chunks(size), sending), start=1):
                sending.append(pool.submit(send, number, data))
                sending[-1].add_done_callback(lambda _: self._room.release())
                digest.update(data)
            parts = [future.result() for future in sending]
            item.check_unchanged(digest.hexdigest())
            self._client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if not _without_answer(error):
                self._abort(place)
            raise
        finally:
            pool.shutdown()
        # Older servers ignore IfNoneMatch here: make sure that nobody else's content won.
        if self._identify(key) != (item.file.sha256, item.file.bytes):
            raise TakenError

    def _roomy(self, chunks: Iterator[bytes], sending: Sequence[Future[Any]]) -> Iterator[bytes]:
        """Yield the chunks, each read only when there is room; raise what made one of `sending` fail."""
        while True:
            self._room.acquire()
            try:
                for future in sending:
                    if future.done():
                        future.result()
                chunk = next(chunks, b"")
            except BaseException:
                self._room.release()
                raise
            if not chunk:
                self._room.release()
                return
            yield chunk

    def _unfinished_upload(self, place: dict[str, str], item: Item, size: int) -> tuple[str, dict[int, Any]]:
        """Return an upload that was left for this object, and its parts by number; ("", {}) if there is none.

        One that holds a part of another content is somebody else's and is left alone.
        """
        from botocore.exceptions import ClientError

        for key, upload in self._uploads:
            if key != place["Key"]:
                continue
            try:
                pages = self._client.get_paginator("list_parts").paginate(**place | {"UploadId": upload})
                there = {part["PartNumber"]: part for page in pages for part in page.get("Parts", ())}
            except ClientError as error:
                if _code(error) == "NoSuchUpload":
                    continue
                raise
            pieces = ((part, item.piece((number - 1) * size, size)) for number, part in there.items())
            if there and all(_is_part(part, data) for part, data in pieces):
                return upload, there
        return "", {}

    def _take_up(self, name: str, items: Sequence[Item]) -> None:
        self._uploads = self._list_uploads(name, items)

    def _clear_up(self, name: str, items: Sequence[Item]) -> None:
        for key, upload in self._list_uploads(name, items):
            self._abort({"Bucket": self._bucket, "Key": key, "UploadId": upload})

    def _list_uploads(self, name: str, items: Sequence[Item]) -> list[tuple[str, str]]:
        """Return (key, id) of every upload below the release that was not completed."""
        from botocore.exceptions import ClientError

        if all(item.file.bytes <= PART_BYTES for item in items):
            return []
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=f"{self._path(name)}/"
        )
        try:
            return [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", ())]
        except ClientError as error:
            if _code(error) not in ("AccessDenied", "403", "NotImplemented"):
                raise
            _log.warning("unfinished uploads to %s cannot be listed; they are neither resumed nor removed", self.uri)
            return []

    def _abort(self, place: dict[str, str]) -> None:
        """Free the parts that were sent. The failure that led here is the one to report, so one of this is logged."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.abort_multipart_upload(**place)
        except (BotoCoreError, ClientError) as error:
            if not (isinstance(error, ClientError) and _code(error) == "NoSuchUpload"):
                _log.warning("an unfinished upload of %s stays in the bucket until it is aborted", place["Key"])

    @contextmanager
    def _errors(self, failure: type[OrchestratorError], doing: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        with super()._errors(failure, doing):
            try:
                yield
            except ClientError as error:
                what, remedy = explain_answer(_code(error), error.operation_name, self._bucket, self._endpoint())
                raise failure(f"{doing}: {what}", remedy=remedy) from None
            except RecursionError:  # botocore follows a redirect that names no region for ever
                what = f"{self._endpoint()} redirects to somewhere else"
                raise failure(f"{doing}: {what}", remedy=REDIRECT) from None
            except (BotoCoreError, ResponseParserError) as error:
                what, remedy = explain_failure(error, self._endpoint)
                raise failure(f"{doing}: {what}", remedy=remedy) from None

    def _endpoint(self) -> str:
        """The server's address, without credentials."""
        address = urlsplit(self._client.meta.endpoint_url)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"


def _signing_by_checksum(**_: Any) -> str:
    return _register_signing_by_checksum()


@cache
def _register_signing_by_checksum() -> str:
    """Register, once, a signature that takes the SHA-256 of the content from the checksum that goes along with it.

    botocore would calculate the same number for a second time.
    """
    from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth

    class ByChecksum(S3SigV4Auth):
        def payload(self, request: Any) -> Any:
            checksum = request.headers.get("x-amz-checksum-sha256")
            return base64.b64decode(checksum).hex() if checksum else super().payload(request)

    AUTH_TYPE_MAPS["orchestrator-s3v4"] = ByChecksum
    return "orchestrator-s3v4"


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "no code"))


def _without_answer(error: BaseException) -> bool:
    """Whether the same upload may well succeed later: no answer, an overloaded server, an interrupt."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, BotoCoreError | ResponseParserError | StoppedError | KeyboardInterrupt)


def _is_part(part: Any, data: bytes) -> bool:
    """Whether an uploaded part holds `data`. Servers that keep no checksum of parts have an MD5 for an ETag."""
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == _checksum(data))
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return bool(part["Size"] == len(data) and part["ETag"].strip('"') == md5)


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
