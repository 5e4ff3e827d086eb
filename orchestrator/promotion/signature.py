"""Whose signature a release has to carry before an alias may name it, and whether it does.

Keys are demanded by ``--verify-key``, else by ORCHESTRATOR_VERIFY_KEY, and by `verify_keys` of promotion.yaml, which
nobody gets around: what is named elsewhere has to be one of those.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import PreflightError, Problem, PublishError
from orchestrator.promotion.history import SignatureRef
from orchestrator.promotion.policy import Policy
from orchestrator.release import Release
from orchestrator.signing import VERIFY_KEY_VARIABLE, VerifyKey, check_signature

SIGNED_BY_TAG = "orchestrator.signed_by"  # of a version: the fingerprint of the key that it was published with


def demanded_keys(
    policy: Policy, named: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[VerifyKey, ...]:
    """Return the public keys of which one must have signed; () if no signature is demanded. `PreflightError`."""
    allowed = tuple(VerifyKey.read(Path(path)) for path in policy.verify_keys)
    path = named if named is not None else environment.get(VERIFY_KEY_VARIABLE)
    if not path:
        return allowed
    key = VerifyKey.read(Path(path).expanduser())
    if allowed and key.fingerprint not in {one.fingerprint for one in allowed}:
        raise PreflightError(
            f"the key {key.fingerprint[:16]} ({path}) is none of those that promotion.yaml demands",
            remedy=f"leave --verify-key and {VERIFY_KEY_VARIABLE} out, or add the key to verify_keys there",
        )
    return (key,)


def check_signed(
    release: Release, signature: bytes | None, keys: Sequence[VerifyKey], registered: str | None
) -> SignatureRef | None:
    """Return what the history says of a release's signature; None: it has none, and none is demanded.

    registered: the fingerprint of the key that the release was registered with. Without `keys` its word is all there
    is, so that a signature which was removed or replaced since is refused, but one that was forged is not found out.

    Raises `PublishError` for a release that none of `keys` has signed, or that was changed afterwards.
    """
    refusals: list[Problem] = []
    for key in keys:
        try:
            check_signature(release, signature, key)
            return SignatureRef(signed_by=key.fingerprint, verified=True)
        except PublishError as error:
            refusals += error.problems
    if refusals:
        raise PublishError(list(dict.fromkeys(refusals)))
    signer = check_signature(release, signature, None)
    if registered is not None and signer != registered:
        now = f"by the key {signer[:16]}" if signer else "not at all"
        raise PublishError(
            f"{release.uri} was registered as signed by the key {registered[:16]}, and is signed {now}",
            remedy="see who changed its model.sig; publish it again with its key, or name a key that you trust with "
            "--verify-key",
        )
    return SignatureRef(signed_by=signer, verified=False) if signer else None
