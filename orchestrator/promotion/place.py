"""In which store a model's history lies: in one, for ever."""

from __future__ import annotations

from orchestrator.errors import SpecError
from orchestrator.promotion.history import History
from orchestrator.promotion.rules import split
from orchestrator.registry import PROMOTIONS_TAG, KnownModel, ModelRegistry
from orchestrator.store import Store, open_store

STORE_TAG = PROMOTIONS_TAG  # of a model: the root of the store that holds its history


def find_store(registry: ModelRegistry, known: KnownModel, given: str | None) -> Store:
    """Return the store with the history: the one given, the one that the registry names, or that of the releases.

    Raises `SpecError` if there is more than one to choose from, the history has begun elsewhere than is given, or what
    is given has nothing to do with the model.
    """
    uri = known.address(STORE_TAG)
    if given is None and uri is not None:
        return open_store(uri)
    if given is not None:
        store = open_store(given)
        if store.uri == uri or History(store, known.name).head():
            return store
    roots = dict.fromkeys(split(source)[0] for source in registry.sources(known.name))
    stores = [open_store(root) for root in ([uri] if uri else roots)]
    with_history = [found for found in stores if History(found, known.name).head()]
    if given is not None:
        for found in with_history:
            raise SpecError(
                f"the history of {known.name!r} lies in {found.uri}, and {store.uri} has none",
                remedy="leave --store out; a model has one history",
            )
        if store.uri not in {found.uri for found in stores}:
            raise SpecError(
                f"{store.uri} holds neither a history nor a release of {known.name!r}",
                remedy=f"its releases lie in {' and '.join(found.uri for found in stores) or 'no store'}",
            )
        return store
    candidates = with_history or stores
    if len(candidates) != 1:
        listed = f": {', '.join(found.uri for found in candidates)}" if candidates else ""
        raise SpecError(
            f"{known.name!r} has releases in {len(candidates)} stores{listed}",
            remedy="say with --store which of them keeps its history",
        )
    return candidates[0]
