"""What S3 says of a part, and of an object made of parts, beside what is on this machine."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from orchestrator.release import Item


def is_part(part: Any, item: Item, number: int, size: int) -> bool:
    """Whether an uploaded part holds what it should. Servers that keep no checksum of parts have an MD5 for an ETag.

    number: from 0 on. size: of a part, in bytes.
    """
    if number >= len(item.parts):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == base64_of(item.parts[number]))
    data = item.piece(number * size, size)
    return bool(part["Size"] == len(data) and part["ETag"].strip('"') == _md5(data).hex())


def is_whole(head: Any, item: Item, size: int) -> bool:
    """Whether an object that was uploaded in parts of `size` bytes is `item`, by its checksum or ETag. False: unknown.

    head: what the server says of it. Where it encrypts, say, an ETag says nothing.
    """
    count = len(item.parts)
    if not count or not head["ETag"].strip('"').endswith(f"-{count}"):
        return False
    if head.get("ChecksumSHA256") == f"{base64_of(hashlib.sha256(b''.join(item.parts)).digest())}-{count}":
        return True
    etags = [_md5(item.piece(number * size, size)).hex() for number in range(count)]
    return bool(head["ETag"].strip('"') == joined(etags))


def joined(etags: list[str]) -> str:
    """Return the ETag of the object that parts with these make up; "" where they are no MD5s."""
    try:
        digests = [bytes.fromhex(etag.strip('"')) for etag in etags]
    except ValueError:
        return ""
    return f"{_md5(b''.join(digests)).hex()}-{len(digests)}"


def listed(item: Item, etags: dict[int, str]) -> list[Any]:
    """Return the parts as the end of an upload names them. etags: by number from 0 on."""
    return [
        {"PartNumber": number + 1, "ETag": etags[number], "ChecksumSHA256": base64_of(digest)}
        for number, digest in enumerate(item.parts)
    ]


def base64_of(digest: bytes) -> str:
    """Return a digest as S3 writes it."""
    return base64.b64encode(digest).decode()


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
