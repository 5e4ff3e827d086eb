"""Versions and aliases in MLflow's model registry: names for releases, never the bytes of a model.

A version's `source` is the release's address and its tag ``orchestrator.digest`` the release's digest, so that a name
can be followed back to bytes that prove themselves. A tracking server refuses a version whose source is a folder of
some client (``file://…``); such a version gets ``orchestrator-file://HOST/…``, which says whose folder it is, and
`resolve` gives the plain address back on that machine.

What a run that computes nothing must know is remembered (registry_memory.py), so that it need not import MLflow.
"""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orchestrator.errors import OrchestratorError, PublishError, SpecError
from orchestrator.registry_memory import RegistryMemory
from orchestrator.tracking import connect, is_server, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

DIGEST_TAG = "orchestrator.digest"
PROMOTIONS_TAG = "orchestrator.promotions"  # of a model that has a history of promotions: where that lies
PROMOTION_TAG = "orchestrator.promotion."  # of a version, and an alias: the entry of the history that put it there
HOSTED_FILE = "orchestrator-file://"
ABSENT_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second: an alias that is not set
READY_SECONDS = 30
_REF = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]{1,18}))")
_NAME = re.compile(r"[^/:@'\"`\s][^/:@'\"`\n]*")
T = TypeVar("T")


class OverwrittenError(PublishError):
    """Somebody else wrote to the registry between our writing and our reading."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model. source: the address of its release."""

    name: str
    version: str
    source: str
    tags: Mapping[str, str]
    run_id: str | None
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class KnownModel:
    """A registered model. aliases: the version of each."""

    name: str
    aliases: Mapping[str, str]
    tags: Mapping[str, str]

    def address(self, tag: str) -> str | None:
        """Return the address in a tag. Raises `SpecError` if it is a folder of another machine."""
        return _read(self.tags[tag]) if tag in self.tags else None


class ModelRegistry:
    """The model registry at `uri`. Raises `PreflightError` if nothing answers there.

    home: where answers are remembered for as long as a local database has not changed; None: nowhere.
    """

    def __init__(self, uri: str, home: Path | None = None) -> None:
        self.uri = uri
        self._memory = RegistryMemory(uri, home)
        self._looked_up: set[tuple[str, str, str]] = set()

    def register(
        self,
        name: str,
        *,
        source: str,
        run_id: str | None,
        tags: Mapping[str, str],
        alias: str | None,
        description: str,
    ) -> str:
        """Make a version of `name` for the release at `source`, point `alias` at it, and return its number.

        A version with the same source and the same tag ``orchestrator.digest`` is used again, also one that another
        process made at the same time. What was written is read back. Raises `PublishError` if the registry refuses or
        shows something else, `SpecError` for a bad name.
        """
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"{name!r} cannot name a registered model", remedy="leave out quotes, '/', ':', '@' and line breaks"
            )
        if DIGEST_TAG not in tags:
            raise ValueError(f"a version needs the tag {DIGEST_TAG}")
        address = self._written(source)
        with translated(self.uri, PublishError, f"could not register {name!r}"):
            client = connect(self.uri)
            self._make_model(name)
            version = self._find(name, address, tags[DIGEST_TAG])
            if version is None:
                made = client.create_model_version(
                    name, address, run_id, dict(tags), description=description, await_creation_for=READY_SECONDS
                )
                version = self._first_of(name, address, tags[DIGEST_TAG], str(made.version))
            if alias is not None:
                client.set_registered_model_alias(name, alias, version)
            self._verify(name, version, address, tags[DIGEST_TAG], alias)
            self._looked_up |= {(name, "/", version)} | ({(name, "@", alias)} if alias else set())
            return version

    def version_exists(self, name: str, version: str) -> bool:
        """Whether `name` has that version."""
        return self._look_up(name, "/", version) is not None

    def alias_version(self, name: str, alias: str) -> str | None:
        """Return the version that `alias` of `name` points at, or None if there is no such alias or model."""
        return self._look_up(name, "@", alias)

    def remember(self) -> None:
        """Remember for the next run what this one looked up or wrote, as it is now. Never fails."""
        if self._memory.keeps:
            for name, mark, what in sorted(self._looked_up):
                with suppress(OrchestratorError):
                    self._look_up(name, mark, what)

    def _look_up(self, name: str, mark: str, what: str) -> str | None:
        """Return the number of the version ``name/version`` or ``name@alias``, from memory or from MLflow."""
        self._looked_up.add((name, mark, what))
        question = f"{name}{mark}{what}"
        known = self._memory.recall(question)
        if known is not None:
            return known
        with translated(self.uri, PublishError, f"could not look up {name!r}"):
            client = connect(self.uri)  # before the memory looks at the database: opening it may write there
            call = client.get_model_version_by_alias if mark == "@" else client.get_model_version

            def ask() -> str | None:
                found = _unless_absent(lambda: call(name, what))
                return None if found is None else str(found.version)

            return self._memory.learn(question, ask)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point `alias` of `name` at `version`, and read it back. `PublishError` if the registry refuses."""
        with translated(self.uri, PublishError, f"could not set the alias {alias!r} of {name!r}"):
            connect(self.uri).set_registered_model_alias(name, alias, version)
            self._verify_alias(name, alias, version)

    def resolve(self, ref: str) -> RegisteredVersion:
        """Return what ``models:/NAME@ALIAS`` or ``models:/NAME/3`` names. Raises `SpecError` if it names nothing."""
        match = _REF.fullmatch(ref)
        if match is None:
            raise SpecError(
                f"{ref!r} names no model version", remedy="write models:/NAME@ALIAS or models:/NAME/VERSION"
            )
        name, alias, version = match["name"], match["alias"], match["version"]
        with translated(self.uri, PublishError, f"could not look up {ref!r}"):
            client = connect(self.uri)
            model = _unless_absent(lambda: client.get_registered_model(name))
            if model is None:
                raise self._unknown(name)
            if alias is not None:
                found = _unless_absent(lambda: client.get_model_version_by_alias(name, alias))
                choices, kind = sorted(model.aliases), "aliases"
            else:
                found = _unless_absent(lambda: client.get_model_version(name, version))
                choices = sorted((str(known.version) for known in self._versions(name)), key=int)
                kind = "versions"
            if found is None:
                wanted = f"alias {alias!r}" if alias is not None else f"version {version}"
                lost = alias is not None and PROMOTIONS_TAG in model.tags and self._was_promoted(name, alias)
                remedy = f"a promotion put it there: `orchestrator reconcile {name}` puts it back" if lost else None
                raise SpecError(
                    f"model {name!r} has no {wanted}", remedy=remedy or _suggestion(alias or "", choices, kind)
                )
            return self._as_registered(found, model)

    def model(self, name: str) -> KnownModel | None:
        """Return the aliases and tags of a registered model, or None if there is no such model."""
        with translated(self.uri, PublishError, f"could not look up {name!r}"):
            client = connect(self.uri)
            found = _unless_absent(lambda: client.get_registered_model(name))
            if found is None:
                return None
            aliases = {str(alias): str(version) for alias, version in found.aliases.items()}
            return KnownModel(name, aliases, dict(found.tags))

    def need_model(self, name: str) -> KnownModel:
        """Return the aliases and tags of a registered model; `SpecError` with the nearest name if there is none."""
        found = self.model(name)
        if found is None:
            with translated(self.uri, PublishError, f"could not look up {name!r}"):
                raise self._unknown(name)
        return found

    def _unknown(self, name: str) -> SpecError:
        names = [str(known.name) for known in connect(self.uri).search_registered_models()]
        remedy = _suggestion(name, names, "names") if names else "`orchestrator run` registers one"
        return SpecError(f"there is no registered model {name!r}", remedy=remedy)

    def sources(self, name: str) -> list[str]:
        """Return the addresses of all releases of `name`, each once, without those in folders of other machines.

        Raises `SpecError` if no others are left.
        """
        with translated(self.uri, PublishError, f"could not look up {name!r}"):
            written = dict.fromkeys(str(known.source) for known in self._versions(name))
        ours = f"{HOSTED_FILE}{socket.gethostname()}/"
        here = [source for source in written if not source.startswith(HOSTED_FILE) or source.startswith(ours)]
        return [_read(source) for source in here or written]

    def show_promotion(
        self, name: str, alias: str, version: str, *, version_tags: Mapping[str, str], model_tags: Mapping[str, str]
    ) -> None:
        """Point `alias` at `version`, tag that version and the model, and read all of it back.

        Raises `PublishError`, `OverwrittenError` if somebody else wrote at the same time. Model tags that are addresses
        of folders are written as sources are.
        """
        with translated(self.uri, PublishError, f"could not show version {version} of {name!r} as {alias}"):
            client = connect(self.uri)
            client.set_registered_model_alias(name, alias, version)
            for key, value in version_tags.items():
                client.set_model_version_tag(name, version, key, value)
            for key, value in model_tags.items():
                client.set_registered_model_tag(name, key, self._written(value))
            seen = client.get_model_version_by_alias(name, alias)
            tags = {key: seen.tags.get(key) for key in version_tags}
            if (str(seen.version), tags) != (version, dict(version_tags)):
                raise OverwrittenError(
                    f"alias {alias!r} of {name!r} is at version {seen.version} with the tags {tags}, which is not what "
                    "was written",
                    remedy=f"another promotion may have followed; `orchestrator reconcile {name}` sees to it",
                )

    def _as_registered(self, found: ModelVersion, model: RegisteredModel) -> RegisteredVersion:
        version = str(found.version)
        return RegisteredVersion(
            name=str(found.name),
            version=version,
            source=_read(str(found.source)),
            tags=dict(found.tags),
            run_id=found.run_id or None,
            # A version fetched by its alias lists no other; the model knows them all.
            aliases=tuple(sorted(alias for alias, target in model.aliases.items() if str(target) == version)),
        )

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        client = connect(self.uri)
        if _unless_absent(lambda: client.get_registered_model(name)) is None:
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                    raise

    def _versions(self, name: str) -> list[ModelVersion]:
        client = connect(self.uri)
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                return found

    def _was_promoted(self, name: str, alias: str) -> bool:
        """Whether a version remembers a promotion into `alias`."""
        return any(PROMOTION_TAG + alias in known.tags for known in self._versions(name))

    def _find(self, name: str, address: str, digest: str) -> str | None:
        """Return the oldest version with that address and digest."""
        same = [
            int(known.version)
            for known in self._versions(name)
            if known.source == address and known.tags.get(DIGEST_TAG) == digest
        ]
        return str(min(same)) if same else None

    def _first_of(self, name: str, address: str, digest: str, made: str) -> str:
        """Return the one version that all who register the same release at once agree on, and take back `made`.

        MLflow has no "create unless there is one". It numbers versions in the order in which they become visible, so
        that whoever made a later one sees the first.
        """
        first = self._find(name, address, digest) or made
        if first != made:
            connect(self.uri).delete_model_version(name, made)
        return first

    def _verify(self, name: str, version: str, address: str, digest: str, alias: str | None) -> None:
        client = connect(self.uri)
        seen = client.get_model_version(name, version)
        if (seen.source, seen.tags.get(DIGEST_TAG), seen.status) != (address, digest, "READY"):
            raise PublishError(
                f"the registry shows version {version} of {name!r} as {seen.status}, source {seen.source}, digest "
                f"{seen.tags.get(DIGEST_TAG)}, which is not what was written",
                remedy="check who else writes to this model, and run again",
            )
        if alias is not None:
            self._verify_alias(name, alias, version)

    def _verify_alias(self, name: str, alias: str, version: str) -> None:
        now = str(connect(self.uri).get_model_version_by_alias(name, alias).version)
        if now != version:
            raise PublishError(
                f"alias {alias!r} of {name!r} points at version {now} instead of {version}",
                remedy="another run moved it at the same time; run again to move it back",
            )

    def _written(self, source: str) -> str:
        """Return the source to write for the release at `source`."""
        if is_server(self.uri) and source.startswith("file:///"):
            return HOSTED_FILE + socket.gethostname() + source.removeprefix("file://")
        return source


def _read(source: str) -> str:
    """Undo `_written`. Raises `SpecError` if the folder is another machine's."""
    if not source.startswith(HOSTED_FILE):
        return source
    host, _, path = source.removeprefix(HOSTED_FILE).partition("/")
    if host != socket.gethostname():
        raise SpecError(
            f"the release lies in the folder /{path} of the machine {host!r}, not of this one",
            remedy="publish it to s3:// for use on other machines",
        )
    return f"file:///{path}"


def _unless_absent(call: Callable[[], T]) -> T | None:
    """Return what `call` returns, or None if mlflow says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code in ABSENT_CODES:
            return None
        raise


def _suggestion(wanted: str, known: list[str], kind: str) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known {kind}: {', '.join(known[:10])}" if known else f"there are no {kind} yet"
