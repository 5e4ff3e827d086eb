"""Signatures of releases, in the format of OpenSSF model-signing 1.x: a Sigstore bundle around a DSSE envelope around
an in-toto statement that lists every file with its sha256.

`model_signing verify key` of the stock tool verifies what is signed here, and the other way round. The signature is
made of the listing of a release, so that it is checked before a byte of the model is downloaded. It covers release.json
and COMPLETE too, and with release.json the lineage. Format: github.com/sigstore/model-transparency, README.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import canonical_json
from orchestrator.errors import PreflightError, PublishError
from orchestrator.release import COMPLETE, RELEASE, SIGNATURE, Release

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

SIGNING_KEY_VARIABLE = "ORCHESTRATOR_SIGNING_KEY"
PASSWORD_VARIABLE = "ORCHESTRATOR_SIGNING_KEY_PASSWORD"
VERIFY_KEY_VARIABLE = "ORCHESTRATOR_VERIFY_KEY"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # what model-signing leaves out; release.json lists them
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_ONE = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out signing.key"
_MAKE_PUBLIC = "make one with: openssl ec -in signing.key -pubout -out signing.pub"


class VerifyKey:
    """A public key. `fingerprint`: sha256 (hex) of its PEM, which is also the hint that model-signing writes."""

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._key = key
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.fingerprint = hashlib.sha256(pem).hexdigest()

    @classmethod
    def read(cls, path: Path) -> VerifyKey:
        """Read a PEM file. Raises `PreflightError` if it is not a public key of a curve that model-signing takes."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            return cls(_on_curve(load_pem_public_key(_read(path, "public key"))))
        except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
            wrong = f"{path} is not a public key on the curve P-256, P-384 or P-521"
            raise PreflightError(wrong, remedy=_MAKE_PUBLIC) from None

    def verify(self, signature: Mapping[str, Any], payload: bytes) -> bool:
        """Say whether the envelope's signature over `payload` is this key's."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            raw = base64.b64decode(signature["sig"], validate=True)
            self._key.verify(raw, _encoded(payload), ec.ECDSA(_hash_of(self._key)))
        except (InvalidSignature, ValueError, TypeError, KeyError):
            return False
        return True


class SigningKey:
    """A private key. It stays in this process; what is recorded is the `fingerprint` of its public half."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = VerifyKey(key.public_key())
        self.fingerprint = self.public.fingerprint

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Read a PEM file, encrypted or not: ORCHESTRATOR_SIGNING_KEY_PASSWORD is the password. `PreflightError`."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        data, password = _read(path, "signing key"), os.environ.get(PASSWORD_VARIABLE)
        try:
            key = load_pem_private_key(data, password.encode() if password and b"ENCRYPTED" in data else None)
        except TypeError:
            raise PreflightError(f"{path} is encrypted", remedy=f"set {PASSWORD_VARIABLE}") from None
        except (ValueError, UnsupportedAlgorithm):  # what it says may quote the key
            wrong = f"{path} is no private key in PEM form, or {PASSWORD_VARIABLE} is wrong"
            raise PreflightError(wrong, remedy=_MAKE_ONE) from None
        try:
            return cls(_on_curve(key))
        except (ValueError, AttributeError):
            raise PreflightError(f"{path} is not on the curve P-256, P-384 or P-521", remedy=_MAKE_ONE) from None

    def sign(self, release: Release, name: str) -> bytes:
        """Return the content of model.sig. The same release and key give the same bytes (RFC 6979)."""
        from cryptography.hazmat.primitives.asymmetric import ec

        payload = _statement(release, name)
        raw = self._key.sign(_encoded(payload), ec.ECDSA(_hash_of(self._key), deterministic_signing=True))
        return canonical_json(
            {
                "mediaType": _BUNDLE,
                "verificationMaterial": {"publicKey": {"hint": self.fingerprint}, "tlogEntries": []},
                "dsseEnvelope": {
                    "payload": base64.b64encode(payload).decode(),
                    "payloadType": _PAYLOAD,
                    "signatures": [{"sig": base64.b64encode(raw).decode(), "keyid": ""}],
                },
            }
        )


def check_signature(release: Release, signature: bytes | None, key: VerifyKey | None) -> str | None:
    """Return the fingerprint of the key that signed `release`, as model.sig names it; None without a signature.

    Without `key` it is only checked that the signature is about these files. With it, raises `PublishError` for an
    unsigned release, one that another key has signed, and one that was changed after it was signed.
    """
    if signature is None:
        if key is None:
            return None
        raise PublishError(
            f"{release.uri} is not signed, and a signature is demanded",
            remedy="have it published again with a signing key (signing_key of its register step), or do not use it",
        )
    try:
        bundle = json.loads(signature)
        envelope = bundle["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        statement = json.loads(payload)
        signer = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        listed = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
        kinds = envelope["payloadType"], statement["_type"], statement["predicateType"]
        hashes = {entry["algorithm"] for entry in statement["predicate"]["resources"]}
        (first,) = envelope["signatures"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PublishError(f"the {SIGNATURE} of {release.uri} is no signature", remedy=_again(release)) from None
    if not _FINGERPRINT.fullmatch(signer):  # shown to people, and recorded
        raise PublishError(f"the {SIGNATURE} of {release.uri} names no key", remedy=_again(release))
    if kinds != (_PAYLOAD, _STATEMENT, _PREDICATE) or hashes != {"sha256"} or listed != _resources(release):
        raise PublishError(
            f"the {SIGNATURE} of {release.uri} is about other files than those published", remedy=_again(release)
        )
    if key is not None and not key.verify(first, payload):
        if signer != key.fingerprint:
            raise PublishError(
                f"{release.uri} is signed by the key {signer[:16]}, not by the one demanded ({key.fingerprint[:16]})",
                remedy="see whose key that is: verify with it if you trust it, else do not use the release",
            )
        raise PublishError(f"the signature of {release.uri} is forged or damaged", remedy=_again(release))
    return signer


def key_fingerprint(path: str) -> str:
    """Return the fingerprint of the public half of a private key: sha256 (hex) of its PEM. Raises `PreflightError`."""
    return SigningKey.read(Path(path)).fingerprint


def signer_of(folder: Path, release: Release) -> str | None:
    """Return the fingerprint of the key that `folder`, a pulled release, names as its signer; None if unsigned."""
    path = folder / SIGNATURE
    return check_signature(release, path.read_bytes() if path.is_file() else None, None)


def _again(release: Release) -> str:
    return f"do not use it; delete {release.uri}/{SIGNATURE} and publish again with the signing key"


def _resources(release: Release) -> dict[str, str]:
    """What is signed: name -> sha256 (hex) of every file that a pulled release holds, but for the signature."""
    seal = hashlib.sha256(f"{release.digest}\n".encode()).hexdigest()
    files = {file.key: file.sha256 for file in release.files if file.key.split("/")[0] not in _GIT}
    return {**files, RELEASE: release.digest, COMPLETE: seal}


def _statement(release: Release, name: str) -> bytes:
    """The in-toto statement of model-signing 1.0, method 'files'."""
    resources = [
        {"name": key, "algorithm": "sha256", "digest": digest}
        # The order of pathlib's paths, by parts: that of the stock tool, whose root digest depends on it.
        for key, digest in sorted(_resources(release).items(), key=lambda entry: Path(entry[0]))
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(entry["digest"]) for entry in resources)).hexdigest()
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [*_GIT, SIGNATURE],
    }
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": _PREDICATE,
            "predicate": {"serialization": serialization, "resources": resources},
        }
    )


def _encoded(payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE 1.0."""
    return f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(payload)} ".encode() + payload


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PreflightError(f"the {what} {path} cannot be read: {error.strerror}", remedy="correct the path") from None


def _on_curve(key: Any) -> Any:
    if key.curve.name not in _CURVES:
        raise ValueError
    return key


def _hash_of(key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
