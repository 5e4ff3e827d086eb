"""In which store a model's history lies: in one, for ever.

`store:` of promotion.yaml says it, and then nobody else does: that is the protection, as the file is not in MLflow.

Without it, the registered model's tag ``orchestrator.promotions`` is believed only if it is a root that releases of
registered versions lie below; and a folder is not believed where releases lie in a bucket. So a tag alone leads
nowhere. Who may write to MLflow may also register a version of a release in a store of their own, though, and name
that store in the tag: against them only `store:` helps, or ``--store``.
"""

from __future__ import annotations

from contextlib import suppress

from orchestrator.errors import SpecError
from orchestrator.promotion.history import History, one_line
from orchestrator.promotion.rules import split
from orchestrator.registry import PROMOTIONS_TAG, KnownModel, ModelRegistry
from orchestrator.store import Store, open_store

STORE_TAG = PROMOTIONS_TAG  # of a model: the root of the store that holds its history


def find_store(registry: ModelRegistry, known: KnownModel, given: str | None, pinned: str | None = None) -> Store:
    """Return the store with the history: that of the policy, the one given, the registry's, or that of the releases.

    pinned: what promotion.yaml says; given: ``--store``, which may not contradict it.

    Raises `SpecError` if there is more than one to choose from, the history has begun elsewhere than is given, what
    is given has nothing to do with the model, or the registry names a place that it is not believed about.
    """
    if pinned is not None:
        return _pinned_store(known, given, pinned)
    if given is not None:
        return _given_store(registry, known, given)
    roots = _roots(registry, known)
    if known.address(STORE_TAG) is not None:
        tagged = tagged_root(known)
        if tagged not in roots:
            raise _disbelieved(known, "where no release of it is registered")
        return _no_folder_beside_buckets(known, open_store(tagged), roots)
    stores = [open_store(root) for root in roots]
    candidates = [found for found in stores if History(found, known.name).head()] or stores
    if len(candidates) != 1:
        listed = f": {', '.join(found.uri for found in candidates)}" if candidates else ""
        raise SpecError(
            f"{known.name!r} has releases in {len(candidates)} stores{listed}",
            remedy="say with --store which of them keeps its history",
        )
    return _no_folder_beside_buckets(known, candidates[0], roots)


def tagged_root(known: KnownModel) -> str | None:
    """Return the root that the registry names, as stores write theirs; None if it names none that can be used here."""
    with suppress(SpecError):  # another machine's folder, or no address
        address = known.address(STORE_TAG)
        return open_store(address).uri if address is not None else None
    return None


def _pinned_store(known: KnownModel, given: str | None, pinned: str) -> Store:
    store = open_store(pinned)
    if given is not None and open_store(given).uri != store.uri:
        raise SpecError(
            f"promotion.yaml says that the history of {known.name!r} lies in {store.uri}, and not in {given}",
            remedy="leave --store out, or change store: there",
        )
    if History(store, known.name).head() is None and not store.holds(known.name):
        raise SpecError(
            f"{store.uri} holds neither a history nor a release of {known.name!r}",
            remedy="correct store: in promotion.yaml",
        )
    return store


def _given_store(registry: ModelRegistry, known: KnownModel, given: str) -> Store:
    store = open_store(given)
    if History(store, known.name).head():
        return store
    roots = _roots(registry, known)
    tagged = tagged_root(known)
    for root in [tagged] if tagged in roots else roots:
        if root != store.uri and History(found := open_store(root), known.name).head():
            raise SpecError(
                f"the history of {known.name!r} lies in {found.uri}, and {store.uri} has none",
                remedy="leave --store out; a model has one history",
            )
    if store.uri not in roots:
        raise SpecError(
            f"{store.uri} holds neither a history nor a release of {known.name!r}",
            remedy=f"its releases lie in {' and '.join(roots) or 'no store'}",
        )
    return store


def _roots(registry: ModelRegistry, known: KnownModel) -> list[str]:
    """The roots of the stores that releases of registered versions lie in, as stores write theirs."""
    roots = []
    for source in registry.sources(known.name):
        with suppress(SpecError):  # what another program registered
            roots.append(open_store(split(source)[0]).uri)
    return list(dict.fromkeys(roots))


def _no_folder_beside_buckets(known: KnownModel, store: Store, roots: list[str]) -> Store:
    """Return a store that was found. What is in a bucket is not decided in a folder, which anybody may have made."""
    if store.uri.startswith("file:") and not all(root.startswith("file:") for root in roots):
        raise _disbelieved(known, "while releases of it lie in a bucket", store.uri)
    return store


def _disbelieved(known: KnownModel, why: str, uri: str | None = None) -> SpecError:
    place = uri or known.tags[STORE_TAG]
    return SpecError(
        f"according to the registry the history of {known.name!r} lies in {one_line(place)}, {why}",
        remedy=f"see who wrote the tag {STORE_TAG} and registered its versions; say with --store, or store: in "
        "promotion.yaml, where the history lies",
    )
