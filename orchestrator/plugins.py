"""The plugin host: finds methods through entry points, one plugin isolated from another.

A distribution offers a plugin with an entry point in the group ``orchestrator.plugins`` that names a module (or
object) with

* ``ORCHESTRATOR_API = ">=1.0,<2"``: the API versions it was written for (a PEP 440 specifier). A missing, invalid or
  unmet specifier excludes the plugin.
* ``@hookimpl def register_methods(): return [MyMethod, ...]``.

First-party methods come in by the same door. A plugin that cannot be used is kept in the list with the reason, and
is fatal only to plans that need one of its methods. Two plugins that claim one name both lose it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from orchestrator.errors import SpecError

if TYPE_CHECKING:
    from orchestrator.method import Method, Stage

PROJECT = "orchestrator"
GROUP = "orchestrator.plugins"
API_VERSION = "1.0"
COMPUTING_LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "safetensors")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class MethodHooks:
    """What a plugin can implement."""

    @hookspec
    def register_methods(self) -> list[type[Method]]:  # type: ignore[empty-body]
        """Return the method classes of this plugin. Added in API 1.0."""


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (plugin {self.plugin!r})"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that cannot be used, and why."""

    origin: Origin
    reason: str


@dataclass(frozen=True)
class InstalledMethod:
    """A method class and where it comes from."""

    cls: type[Method]
    origin: Origin

    @property
    def key(self) -> tuple[Stage, str]:
        """(stage, name): what a specification refers to."""
        return self.cls.stage, self.cls.name

    @property
    def kind(self) -> str:
        """Name of the method kind, e.g. "LayerMethod"."""
        return _kind_of(self.cls)

    @cached_property
    def source_digest(self) -> str:
        """sha256 over the sources of the import package (or module) that defines the class."""
        return package_digest(self.cls.__module__.partition(".")[0])

    @property
    def identity(self) -> dict[str, str]:
        """What of the plugin decides a result, as it enters fingerprints."""
        return {
            "distribution": self.origin.distribution,
            "version": self.origin.version,
            "source": self.source_digest,
        }


class PluginError(Exception):
    """Why a plugin is excluded (internal to the host)."""


@dataclass
class Methods:
    """The installed methods, by (stage, name)."""

    installed: dict[tuple[Stage, str], InstalledMethod] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)
    clashes: dict[tuple[Stage, str], list[InstalledMethod]] = field(default_factory=dict)

    def add(self, methods: Iterable[InstalledMethod]) -> None:
        """Add methods; a name that is claimed twice belongs to nobody."""
        for method in methods:
            key = method.key
            if key in self.clashes:
                self.clashes[key].append(method)
            elif key in self.installed:
                self.clashes[key] = [self.installed.pop(key), method]
            else:
                self.installed[key] = method

    def find(self, stage: Stage, name: str) -> InstalledMethod:
        """Return the method, or raise `SpecError` with what is closest to it and which plugins are broken."""
        key = (stage, name)
        if key in self.installed:
            return self.installed[key]
        if key in self.clashes:
            owners = " and ".join(str(method.origin) for method in self.clashes[key])
            raise SpecError(f'"{name}" is claimed by {owners}', remedy="uninstall one of them")
        names = sorted(other for other_stage, other in self.installed if other_stage == stage)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        elsewhere = sorted(other.value for other, other_name in self.installed if other_name == name)
        if elsewhere:
            remedy = f'"{name}" belongs to stage {" or ".join(elsewhere)}'
        elif near:
            remedy = f'did you mean "{near[0]}"?'
        else:
            remedy = f"installed for {stage}: {', '.join(names) or 'none'}"
        for broken in self.broken:
            remedy += f" (plugin {broken.origin.plugin!r} of {broken.origin.distribution} is broken: {broken.reason})"
        raise SpecError(f'no installed {stage} method is called "{name}"', remedy=remedy)


def discover(entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> Methods:
    """Load every plugin of the group, or the given entry points."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(MethodHooks)
    methods = Methods()
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=GROUP)
    for entry_point in sorted(entry_points, key=lambda point: (point.name, point.value)):
        origin = _origin(entry_point)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout carries results only
                methods.add(_load(manager, entry_point, origin))
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the others must not notice
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            methods.broken.append(BrokenPlugin(origin, " ".join(reason.split())))
    return methods


def _origin(entry_point: importlib.metadata.EntryPoint) -> Origin:
    """Name the distribution, also one whose metadata is damaged: that must not hide the others."""
    name = version = None
    with contextlib.suppress(Exception):  # a missing METADATA file raises differently from version to version
        if entry_point.dist:
            name, version = entry_point.dist.name, entry_point.dist.version
    return Origin(entry_point.name, name or "unknown distribution", version or "0")


def _load(
    manager: pluggy.PluginManager, entry_point: importlib.metadata.EntryPoint, origin: Origin
) -> list[InstalledMethod]:
    plugin = entry_point.load()
    _check_api(getattr(plugin, "ORCHESTRATOR_API", None))
    registered_as = f"{origin.distribution}:{origin.plugin}"
    try:
        manager.register(plugin, name=registered_as)
        manager.check_pending()
        calls = [impl for impl in manager.hook.register_methods.get_hookimpls() if impl.plugin is plugin]
        if not calls:
            raise PluginError("it implements no register_methods hook")
        classes = calls[0].function()
        if not isinstance(classes, list):
            raise PluginError(f"register_methods returned {type(classes).__name__}, not a list of classes")
        return [InstalledMethod(check_class(cls), origin) for cls in classes]
    finally:
        if manager.has_plugin(registered_as):
            manager.unregister(name=registered_as)


def _check_api(declared: object) -> None:
    if declared is None or not str(declared).strip():  # an empty specifier would accept every version to come
        raise PluginError('it declares no ORCHESTRATOR_API, e.g. ORCHESTRATOR_API = ">=1.0,<2"')
    try:
        accepted = SpecifierSet(str(declared))
    except InvalidSpecifier:
        raise PluginError(f"its ORCHESTRATOR_API {declared!r} is not a version specifier") from None
    if API_VERSION not in accepted:
        raise PluginError(f"it was written for API {declared}, this is API {API_VERSION}")


def _kinds() -> Mapping[type[Method], tuple[str, ...]]:
    """The method kinds and the stages where each makes sense."""
    from orchestrator import cache_policy, export_format, layer_method, method, serving_engine

    return {
        method.Calibrator: ("calibrate",),
        layer_method.LayerMethod: ("prune", "quantize"),
        method.ModelMethod: ("prune", "distill", "quantize"),
        method.Evaluator: ("validate",),
        method.Publisher: ("register",),
        cache_policy.CachePolicy: ("validate",),
        serving_engine.ServingEngine: ("register",),
        export_format.ExportFormat: ("register",),
    }


def _kind_of(cls: type) -> str:
    for kind in _kinds():
        if issubclass(cls, kind):
            return kind.__name__
    raise PluginError(f"{cls.__name__} is of no method kind: derive it from LayerMethod, Evaluator, ...")


def check_class(cls: object) -> type[Method]:
    """Return `cls` if it is a complete method class; raise `PluginError` with the first thing it lacks otherwise."""
    from orchestrator.method import Invariant, Method, Stage

    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PluginError(f"register_methods returned {cls!r}, which is not a method class")
    kind = _kind_of(cls)
    label = f"{cls.__module__}.{cls.__qualname__}"
    if inspect.isabstract(cls):
        raise PluginError(f"{label} lacks {', '.join(sorted(cls.__abstractmethods__))}")
    for attribute in ("stage", "name", "paper"):
        if not getattr(cls, attribute, None):
            raise PluginError(f"{label} has no ClassVar {attribute!r}")
    if not isinstance(cls.stage, Stage):
        raise PluginError(f"{label}.stage is {cls.stage!r}, not a Stage")
    stages = next(stages for base, stages in _kinds().items() if base.__name__ == kind)
    if cls.stage not in stages:
        raise PluginError(f"{label} is a {kind}, which has no place in stage {cls.stage}, only in {', '.join(stages)}")
    if not (isinstance(cls.name, str) and _NAME.fullmatch(cls.name)):
        raise PluginError(f"{label}.name is {cls.name!r}; use lower-case letters, digits and _")
    for attribute in ("keeps", "provides"):
        claimed = getattr(cls, attribute)
        if not (isinstance(claimed, frozenset) and all(isinstance(item, Invariant) for item in claimed)):
            raise PluginError(f"{label}.{attribute} is {claimed!r}, not a frozenset of Invariant")
    _check_kind(cls, label)
    undescribed = sorted(name for name, info in cls.model_fields.items() if not info.description)
    if undescribed:
        raise PluginError(f"{label} does not describe its parameter(s) {', '.join(undescribed)}")
    return cls


def _check_kind(cls: type[Method], label: str) -> None:
    """Check the ClassVars that only some kinds have."""
    from orchestrator.layer_method import LayerMethod, Needs
    from orchestrator.method import Evaluator
    from orchestrator.serving_engine import ServingEngine

    if issubclass(cls, LayerMethod) and not isinstance(getattr(cls, "needs", None), Needs):
        raise PluginError(f"{label} has no ClassVar 'needs' (Needs.WEIGHT, Needs.INPUT_NORM or Needs.INPUT_MOMENT)")
    if issubclass(cls, Evaluator):
        metrics = getattr(cls, "metrics", None)
        if not (isinstance(metrics, Mapping) and metrics and all(metrics.values())):
            raise PluginError(f"{label} has no ClassVar 'metrics' that says what each metric means")
    if issubclass(cls, ServingEngine) and not isinstance(getattr(cls, "supported_versions", None), str):
        raise PluginError(f"{label} has no ClassVar 'supported_versions', e.g. '>=0.30,<0.34'")


@cache
def library_versions() -> dict[str, str]:
    """The versions of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in COMPUTING_LIBRARIES}


@lru_cache
def package_digest(package: str, without: tuple[str, ...] = ()) -> str:
    """Return a sha256 over the Python sources of an importable package or module, by relative path.

    without: files and folders at the top of the package that decide no step's result.
    """
    module: Any = sys.modules.get(package) or importlib.import_module(package)
    roots = [Path(path) for path in getattr(module, "__path__", [])]
    digest = hashlib.sha256()
    if roots:
        files = sorted((path.relative_to(root).as_posix(), path) for root in roots for path in root.rglob("*.py"))
    elif module.__file__:
        files = [(Path(module.__file__).name, Path(module.__file__))]
    else:
        files = []
    for name, path in files:
        if name.partition("/")[0] in without:
            continue
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
