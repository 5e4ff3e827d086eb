"""Telling others that an alias moved: a signed webhook, a command. What fails here is reported; the promotion stands.

A webhook is a POST of the entry, signed as the Standard Webhooks specification says (standardwebhooks.com): the header
``webhook-signature: v1,BASE64`` is the HMAC-SHA256 of ``ID.TIMESTAMP.BODY`` under ORCHESTRATOR_WEBHOOK_SECRET, and
``webhook-id`` is the entry's sha256, so that a receiver knows a delivery that it got before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.canonical import canonical_json
from orchestrator.errors import PreflightError
from orchestrator.promotion.history import Receiver, Stored
from orchestrator.promotion.policy import Policy

SECRET_VARIABLE = "ORCHESTRATOR_WEBHOOK_SECRET"
ATTEMPTS = 3
REQUEST_SECONDS = 5.0
DELIVERY_SECONDS = 30.0  # all attempts together, also where a receiver answers a byte at a time
PAUSE_SECONDS = 0.5  # before the second attempt; twice that before the third
COMMAND_SECONDS = 60.0
NOBODY = "promotion.yaml names none here"


@dataclass(frozen=True)
class Notice:
    """Whom was told. target: an address without path and query, or a command. problem: why that did not work, or None.
    told: also where it worked and only could not be recorded."""

    target: str
    problem: str | None
    told: bool

    @property
    def warning(self) -> str | None:
        """The problem as a sentence, or None."""
        if self.problem is None:
            return None
        return (
            f"{self.target} was told, but {self.problem}"
            if self.told
            else f"{self.target} was not told: {self.problem}"
        )


def receivers(policy: Policy) -> tuple[Receiver, ...]:
    """Whom a policy wants told."""
    return (*(("webhook",) if policy.webhook else ()), *(("command",) if policy.command else ()))


def check_policy(policy: Policy, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `PreflightError` if nobody could be told: better before the promotion than after it."""
    if policy.webhook:
        _secret(environment)


def tell(policy: Policy, receiver: Receiver, stored: Stored, environment: Mapping[str, str] = os.environ) -> Notice:
    """Tell one of those whom the policy names. Never raises for what happens at their end."""
    document = as_document(stored)
    if receiver == "webhook" and policy.webhook:
        problem = post(policy.webhook, document, stored.sha256, _secret(environment))
        return Notice(_shown(policy.webhook), problem, told=problem is None)
    if receiver == "command" and policy.command:
        problem = _run(policy.command, document, environment)
        return Notice(policy.command[0], problem, told=problem is None)
    return Notice(f"a {receiver}", NOBODY, told=False)


def as_document(stored: Stored) -> dict[str, Any]:
    """What a receiver gets."""
    return {"event": f"model.{stored.entry.kind}", **stored.entry.document(), "sha256": stored.sha256}


def post(url: str, document: Mapping[str, Any], delivery: str, secret: bytes) -> str | None:
    """POST the document; return why it did not arrive, or None. Repeats what may pass: no answer, 5xx, 429."""
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(_post(url, document, delivery, secret)), daemon=True)
    thread.start()
    thread.join(DELIVERY_SECONDS)
    return outcome[0] if outcome else f"no whole answer within {DELIVERY_SECONDS:g} s"


def _post(url: str, document: Mapping[str, Any], delivery: str, secret: bytes) -> str | None:
    body = canonical_json(document)
    opener = urllib.request.build_opener(_NoRedirect)
    problem = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * attempt)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "compression-orchestrator",
            **signature(delivery, int(time.time()), body, secret),
        }
        try:
            opener.open(urllib.request.Request(url, body, headers, method="POST"), timeout=REQUEST_SECONDS).close()
            return None
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP {error.code}"
            if error.code < 500 and error.code != 429:
                return problem
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = getattr(reason, "strerror", None) or type(reason).__name__
    return f"{problem}, {ATTEMPTS} times"


def signature(delivery: str, timestamp: int, body: bytes, secret: bytes) -> dict[str, str]:
    """The headers that prove to a receiver who sent `body`, and when (seconds since the epoch)."""
    signed = f"{delivery}.{timestamp}.".encode() + body
    code = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return {"webhook-id": delivery, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{code}"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: the entry goes to nobody but the address given."""

    def redirect_request(self, *ignored: Any, **also_ignored: Any) -> None:
        return None


def _secret(environment: Mapping[str, str]) -> bytes:
    """The key: plain, or ``whsec_`` and base64 as the specification has it."""
    text = environment.get(SECRET_VARIABLE, "")
    if not text:
        raise PreflightError(
            f"{SECRET_VARIABLE} is not set, and the webhook has to be signed",
            remedy="set it to a secret that the receiver knows too",
        )
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise PreflightError(f"{SECRET_VARIABLE} is no base64 after whsec_", remedy="copy it again") from None


def _run(command: tuple[str, ...], document: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Run the command with the document on its stdin; return why it failed, or None. The secret is not handed on."""
    given = {name: value for name, value in environment.items() if name != SECRET_VARIABLE}
    try:
        # A session of its own, so that what the command started can be ended with it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=given, start_new_session=True)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    try:
        process.communicate(canonical_json(document), COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it took more than {COMMAND_SECONDS:g} s and was ended"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {process.returncode}" if process.returncode else None


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
