"""Releases in an S3 bucket: conditional writes, uploads in parts that a later publisher can take up.

The only module that imports boto3, and it does so when the first request is made.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from orchestrator.errors import OrchestratorError, PreflightError, PublishError
from orchestrator.publishing import Store
from orchestrator.release import COMPLETE, PARTS_AT_ONCE, Item, StoredFile, hash_file, read_piece
from orchestrator.s3_direct import DirectPut, Piece
from orchestrator.s3_errors import REDIRECT, error_code, explain_answer, explain_failure, status_of
from orchestrator.s3_parts import base64_of, is_part, is_whole, joined, listed
from orchestrator.transfer import ATTEMPTS, CHUNK_BYTES, FILES_AT_ONCE, Meter, MissingError, StoppedError, TakenError

PART_BYTES = 8 << 20  # larger files go to S3 in parts of this size; S3 allows no part below 5 MiB but the last
MAX_PARTS = 10_000  # of one S3 upload; beyond 80 GB the parts grow instead
SILENCE_SECONDS = 20  # of a server that takes connections and has not said anything yet
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
        self._session: Any = None
        self._shared: Any = None
        self._address = ""  # of the server, once there was a client
        self._put: DirectPut | None = None
        self._uploads: list[tuple[str, str]] = []
        self._room = threading.Semaphore(PARTS_AT_ONCE)

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
                self._listen()
                self._shared = self._connect(attempts=ATTEMPTS, connect_seconds=5, read_seconds=60)
                self._put = _direct(self._shared)
            return self._shared

    def _listen(self) -> None:
        """Find out in seconds whether anything is ever said there; once it is, single answers may take their time."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
        from botocore.parsers import ResponseParserError

        try:
            self._connect(attempts=1, connect_seconds=5, read_seconds=SILENCE_SECONDS).head_bucket(Bucket=self._bucket)
        except (ConnectTimeoutError, ReadTimeoutError):
            raise
        except (BotoCoreError, ClientError, ResponseParserError, RecursionError):
            pass  # an answer, or a failure that comes at once: what is to be done here will meet it, and say so

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
            self._session = self._session or Session()  # it keeps what it has read of S3's description
            client = self._session.client("s3", config=config)
            self._address = client.meta.endpoint_url
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
            if not (self._create_bucket and error_code(error) in ("404", "NoSuchBucket")):
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
            return self._client.head_object(Bucket=self._bucket, Key=self._path(key), ChecksumMode="ENABLED")
        except ClientError as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return None
            raise

    def _size(self, key: str) -> int | None:
        head = self._head(key)
        return None if head is None else int(head["ContentLength"])

    def _holds(self, key: str, item: Item) -> bool | None:
        head = self._head(key)
        if head is None:
            return None
        if head["ContentLength"] != item.file.bytes:
            return False
        if digest := head["Metadata"].get("sha256"):
            return bool(digest == item.file.sha256)
        # Else somebody else put it there: read it.
        return is_whole(head, item, self._part_bytes(item.file.bytes)) or super()._holds(key, item)

    def _read(self, key: str, offset: int = 0) -> Iterator[bytes]:
        from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

        for attempt in range(1, ATTEMPTS + 1):
            begin = {"Range": f"bytes={offset}-"} if offset else {}
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._path(key), **begin)
            except ClientError as error:
                if error_code(error) == "NoSuchKey":
                    raise MissingError from None
                if error_code(error) == "InvalidRange":  # it ends where the caller wants it to go on
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
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
            yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))

    def _list_tree(self, name: str) -> Iterator[str]:
        prefix = f"{self._path(name)}/"
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))

    def _create(self, key: str, item: Item, meter: Meter) -> None:
        from botocore.exceptions import ClientError

        create = self._create_in_parts if item.file.bytes > PART_BYTES else self._create_whole
        try:
            create(key, item, meter)
        except ClientError as error:
            if self._overtaken(key, error):
                raise TakenError from None
            raise

    def _overtaken(self, key: str, error: Any) -> bool:
        """Whether somebody else was there. Some servers fail (5xx) where one ends an upload that others still send."""
        return error_code(error) in _TRY_AGAIN or (status_of(error) >= 500 and self._size(key) is not None)

    def _create_whole(self, key: str, item: Item, meter: Meter) -> None:
        body = b"".join(item.chunks(CHUNK_BYTES))
        digest = hashlib.sha256(body)
        item.check_unchanged(digest.hexdigest())
        path, checksum, sha256 = self._path(key), base64_of(digest.digest()), item.file.sha256
        headers = {"if-none-match": "*", "x-amz-checksum-sha256": checksum, "x-amz-meta-sha256": sha256}
        if not (self._put and self._put(path, "", headers, body, sha256)):
            named = {"Bucket": self._bucket, "Key": path, "Metadata": {"sha256": sha256}}
            self._client.put_object(**named, Body=body, IfNoneMatch="*", ChecksumSHA256=checksum)
        meter.advance(item.file, len(body))

    def _part_bytes(self, size: int) -> int:
        return 0 if size <= PART_BYTES else max(PART_BYTES, -(-size // MAX_PARTS))

    def _hash(self, name: str, key: str, path: Path, there: Set[str], meter: Meter, sent: ExitStack) -> Item:
        """Send the parts of a new file while it is hashed; the object comes to be once all of the release is known."""
        from botocore.exceptions import ClientError

        size, place = path.stat().st_size, {"Bucket": self._bucket, "Key": self._path(f"{name}/{key}")}
        cut, taken = self._part_bytes(size), {key, COMPLETE} & there or place["Key"] in dict(self._uploads)
        if not cut or taken:
            return hash_file(key, path, cut)
        place["UploadId"] = self._client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]
        etags: dict[int, str] = {}
        file = StoredFile(key, "", size)

        def abort(_: Any, error: BaseException | None, __: Any) -> None:
            if error and not _without_answer(error):
                self._abort(place)

        def send(number: int, digest: bytes) -> None:
            etags[number] = self._send_part(place, path, cut, digest, number)
            meter.advance(file, cut)

        sent.push(abort)
        try:
            item = hash_file(key, path, cut, send)
        except (ClientError, TakenError) as error:
            if isinstance(error, TakenError) or self._overtaken(f"{name}/{key}", error):  # published and cleared up
                return hash_file(key, path, cut)
            raise
        item.ahead.append((place, etags))
        return item

    def _create_in_parts(self, key: str, item: Item, meter: Meter) -> None:
        """Upload in parts; the object exists only once all are there and each has the sha256 that was promised.

        Each part goes with the sha256 that it had when the whole was hashed, and the server compares. Parts that a
        killed publisher sent are not sent again. What fails for want of an answer leaves the parts for the next
        publisher; any other failure frees them.
        """
        size = self._part_bytes(item.file.bytes)
        place, etags = item.ahead.pop() if item.ahead else self._unfinished_upload(key, item)

        def send(number: int, digest: bytes) -> None:
            with self._room:
                etags[number] = self._send_part(place, item.path, size, digest, number)
            meter.advance(item.file, size)

        try:
            missing = [(number, digest) for number, digest in enumerate(item.parts) if number not in etags]
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                try:
                    for part in as_completed([pool.submit(send, *entry) for entry in missing]):
                        part.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            item.check_untouched()
            parts = listed(item, etags)
            self._client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        except BaseException as error:
            if not _without_answer(error):
                self._abort(place)
            raise
        # Older servers ignore IfNoneMatch here: make sure that nobody else's content won.
        etag = joined([part["ETag"] for part in parts])
        if (self._head(key) or {}).get("ETag", "").strip('"') != etag and not self._holds(key, item):
            raise TakenError

    def _send_part(self, place: dict[str, str], path: Path, size: int, digest: bytes, number: int) -> str:
        """Send one part, which must have this sha256; return its ETag. number: from 0 on. size: of all but the last."""
        checksum, offset = base64_of(digest), number * size
        length = max(0, min(size, path.stat().st_size - offset))
        if self._put:
            query = f"partNumber={number + 1}&uploadId={quote(place['UploadId'], safe='')}"
            with closing(Piece(path, offset, length)) as piece:
                answer = self._put(place["Key"], query, {"x-amz-checksum-sha256": checksum}, piece, digest.hex())
            if answer and "ETag" in answer:
                return answer["ETag"]
        body = read_piece(path, offset, length)
        if hashlib.sha256(body).digest() != digest:
            raise PublishError(f"{path} changed while it was being published", remedy="publish again")
        sent = self._client.upload_part(**place, PartNumber=number + 1, Body=body, ChecksumSHA256=checksum)
        return str(sent["ETag"])

    def _unfinished_upload(self, key: str, item: Item) -> tuple[dict[str, str], dict[int, str]]:
        """Return an upload of this object, and the ETags of its parts: one that was left, or a new one.

        One that holds a part of another content is somebody else's and is left alone.
        """
        from botocore.exceptions import ClientError

        place, size = {"Bucket": self._bucket, "Key": self._path(key)}, self._part_bytes(item.file.bytes)
        for upload in (upload for path, upload in self._uploads if path == place["Key"]):
            try:
                pages = self._client.get_paginator("list_parts").paginate(**place, UploadId=upload)
                there = {part["PartNumber"] - 1: part for page in pages for part in page.get("Parts", ())}
            except ClientError as error:
                if error_code(error) == "NoSuchUpload":
                    continue
                raise
            if there and all(is_part(part, item, number, size) for number, part in there.items()):
                return place | {"UploadId": upload}, {number: part["ETag"] for number, part in there.items()}
        metadata = {"sha256": item.file.sha256}
        begun = self._client.create_multipart_upload(**place, Metadata=metadata, ChecksumAlgorithm="SHA256")
        return place | {"UploadId": begun["UploadId"]}, {}

    def _take_up(self, name: str, paths: Sequence[tuple[str, Path]]) -> None:
        self._uploads = self._list_uploads(name, paths)

    def _clear_up(self, name: str, paths: Sequence[tuple[str, Path]]) -> None:
        for key, upload in self._list_uploads(name, paths):
            self._abort({"Bucket": self._bucket, "Key": key, "UploadId": upload})

    def _list_uploads(self, name: str, paths: Sequence[tuple[str, Path]]) -> list[tuple[str, str]]:
        """Return (key, id) of every upload below the release that was not completed."""
        from botocore.exceptions import ClientError

        if all(path.stat().st_size <= PART_BYTES for _, path in paths):
            return []
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=f"{self._path(name)}/"
        )
        try:
            return [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", ())]
        except ClientError as error:
            if error_code(error) not in ("AccessDenied", "403", "NotImplemented"):
                raise
            _log.warning("unfinished uploads to %s cannot be listed; they are neither resumed nor removed", self.uri)
            return []

    def _abort(self, place: dict[str, str]) -> None:
        """Free the parts that were sent. The failure that led here is the one to report, so one of this is logged."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.abort_multipart_upload(**place)
        except (BotoCoreError, ClientError) as error:
            if not (isinstance(error, ClientError) and error_code(error) == "NoSuchUpload"):
                _log.warning("an unfinished upload of %s stays in the bucket until it is aborted", place["Key"])

    @contextmanager
    def _errors(self, failure: type[OrchestratorError], doing: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        with super()._errors(failure, doing):
            try:
                yield
            except ClientError as error:
                what, remedy = explain_answer(error_code(error), error.operation_name, self._bucket, self._endpoint())
                raise failure(f"{doing}: {what}", remedy=remedy) from None
            except RecursionError:  # botocore follows a redirect that names no region for ever
                what = f"{self._endpoint()} redirects to somewhere else"
                raise failure(f"{doing}: {what}", remedy=REDIRECT) from None
            except (BotoCoreError, ResponseParserError) as error:
                what, remedy = explain_failure(error, self._endpoint)
                raise failure(f"{doing}: {what}", remedy=remedy) from None

    def _endpoint(self) -> str:
        """The server's address, without credentials."""
        address = urlsplit(self._address)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"


def _direct(client: Any) -> DirectPut:
    """Return a quicker way to put objects into the bucket, once `client` was seen to list it."""
    from boto3.session import Session
    from botocore.httpsession import get_cert_path

    bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or get_cert_path(True)
    put = DirectPut(Session().get_credentials(), connections=FILES_AT_ONCE + PARTS_AT_ONCE, ca_bundle=bundle)
    client.meta.events.register("before-send.s3.ListObjectsV2", put.learn)
    return put


def _without_answer(error: BaseException) -> bool:
    """Whether the same upload may well succeed later: no answer, an overloaded server, an interrupt."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return status_of(error) >= 500
    return isinstance(error, BotoCoreError | ResponseParserError | StoppedError | KeyboardInterrupt)
