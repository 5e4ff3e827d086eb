"""Who was told of which entry: recorded beside the history once it worked, so that what failed is told later.

``MODEL/.promotion/deliveries/00000005-webhook.json`` is created after the webhook took entry 5, and never changed. Who
is killed in between tells it twice; a webhook knows it by its ``webhook-id``.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from orchestrator.errors import OrchestratorError, PublishError
from orchestrator.promotion.history import (
    FOLDER,
    Digest,
    Receiver,
    Record,
    Sequence,
    Stored,
    actor,
    parse_record,
    written,
)
from orchestrator.promotion.notify import Notice, tell
from orchestrator.promotion.policy import Policy
from orchestrator.publishing import Store
from orchestrator.release import check_name


class Delivery(Record):
    """One that worked. entry_sha256: of the entry. target: an address without path and query, or a command."""

    layout: Literal[1] = 1
    model: str
    sequence: Sequence
    entry_sha256: Digest
    receiver: Receiver
    target: str
    actor: str
    time: str


class Deliveries:
    """What was told of one model. Raises `PublishError` where the store fails or holds something else."""

    def __init__(self, store: Store, model: str) -> None:
        check_name(model)
        self.store, self.model = store, model

    def tell(self, policy: Policy, stored: Stored) -> tuple[Notice, ...]:
        """Tell whoever was to be told of an entry and was not. Never raises: the promotion stands."""
        notices = []
        for receiver in stored.entry.tells:
            try:
                if self.has(stored, receiver):
                    continue
                notice = tell(policy, receiver, stored)
            except OrchestratorError as error:
                notices.append(Notice(f"a {receiver}", str(error), told=False))
                continue
            if notice.told:
                try:
                    self.add(stored, receiver, notice.target)
                except OrchestratorError as error:
                    notice = Notice(notice.target, f"that could not be recorded: {error}", told=True)
            notices.append(notice)
        return tuple(notices)

    def has(self, stored: Stored, receiver: Receiver) -> bool:
        """Whether it is recorded that `receiver` was told of an entry."""
        data = self.store.read_record(key := self._key(stored, receiver))
        if data is None:
            return False
        found = parse_record(Delivery, data)
        if found is None or (found.model, found.entry_sha256, found.receiver) != (self.model, stored.sha256, receiver):
            raise PublishError(
                f"{self.store.uri}/{key} does not say who was told of entry {stored.entry.sequence}",
                remedy="see who wrote it, and why",
            )
        return True

    def add(self, stored: Stored, receiver: Receiver, target: str) -> None:
        """Record that `receiver` was told; where somebody else told it at the same time, theirs stays."""
        delivery = Delivery(
            model=self.model,
            sequence=stored.entry.sequence,
            entry_sha256=stored.sha256,
            receiver=receiver,
            target=target,
            actor=actor(),
            time=written(datetime.now(UTC)),
        )
        self.store.create_record(self._key(stored, receiver), delivery.to_bytes())

    def _key(self, stored: Stored, receiver: Receiver) -> str:
        return f"{self.model}/{FOLDER}/deliveries/{stored.entry.sequence:08}-{receiver}.json"
