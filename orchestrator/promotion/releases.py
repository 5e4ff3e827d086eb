"""The releases that versions stand for: where they lie, whether every byte is there, who signed them."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import PublishError
from orchestrator.promotion.history import ReleaseRef, SignatureRef, one_line
from orchestrator.promotion.rules import check_same, split
from orchestrator.promotion.signature import SIGNED_BY_TAG, check_signed
from orchestrator.registry import RegisteredVersion
from orchestrator.signing import VerifyKey
from orchestrator.store import Progress, Store, open_store


class Releases:
    """The releases of one model. store: that of its history, and seldom not theirs. Raises `PublishError`."""

    def __init__(self, store: Store, model: str) -> None:
        self.store, self.model = store, model

    def verify(self, release: ReleaseRef, progress: Progress | None) -> None:
        """Read every byte. Raises `PublishError` if one is not what was registered."""
        store, name = self._locate(release)
        check_same(release, store.verify(name, progress), self.model)

    def signature(
        self, version: RegisteredVersion, release: ReleaseRef, keys: Sequence[VerifyKey]
    ) -> SignatureRef | None:
        """Check the signature of a release, of which no file is read. Raises `PublishError`."""
        store, name = self._locate(release)
        found, signature = store.read_signed(name)
        check_same(release, found, self.model)
        return check_signed(found, signature, keys, version.tags.get(SIGNED_BY_TAG))

    def look_at(self, release: ReleaseRef) -> None:
        """Raise `PublishError` if a release is not complete. Looks at the size of each file, and reads none."""
        store, name = self._locate(release)
        found = store.read_release(name)
        if found is None:
            raise PublishError(
                f"{one_line(release.uri)} is not complete",
                remedy="run again what published it, or name another version",
            )
        check_same(release, found, self.model)

    def _locate(self, release: ReleaseRef) -> tuple[Store, str]:
        root, name = split(release.uri)
        return (self.store if root == self.store.uri else open_store(root)), name
