"""The plugin host: whatever a plugin does wrong is shown with its reason, and the others do not notice.

Plugins are real modules and real ``*.dist-info`` folders on the path, found by importlib.metadata as any installed
distribution is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.method import Stage
from orchestrator.plugins import API_VERSION, GROUP, Methods, PluginError, check_class, discover, package_digest
from tests import seeded_bugs

HEAD = """
from __future__ import annotations
from typing import ClassVar
from pydantic import Field
from orchestrator.api import Calibrator, Evaluator, LayerMethod, Method, Needs, Stage, hookimpl
"""
API = 'ORCHESTRATOR_API = ">=1.0,<2"\n'
GOOD = '''
class {cls}(LayerMethod):
    """Does nothing."""
    stage: ClassVar[Stage] = Stage.{stage}
    name: ClassVar[str] = "{name}"
    paper: ClassVar[str] = "None."
    needs: ClassVar[Needs] = Needs.WEIGHT

    def compress(self, weight_OI, statistic):
        raise NotImplementedError
'''
REGISTER = """
@hookimpl
def register_methods():
    return [{classes}]
"""


class Site:
    """A folder on sys.path into which distributions are put."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, module: str, source: str, *, distribution: str | None = None, version: str = "1.2.3") -> str:
        """Install a distribution with one plugin module; return the distribution's name."""
        distribution = distribution or f"dist-of-{module.replace('_', '-')}"
        (self.path / f"{module}.py").write_text(source, encoding="utf-8")
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{module} = {module}\n", encoding="utf-8")
        return distribution

    def add_good(self, module: str, name: str, *, stage: str = "PRUNE", cls: str = "Good") -> str:
        """Install a plugin that is right."""
        return self.add(module, good(name, stage=stage, cls=cls))

    def discover(self) -> Methods:
        """Discover what is installed here, and nothing else."""
        importlib.invalidate_caches()
        here = importlib.metadata.distributions(path=[str(self.path)])
        return discover([point for found in here for point in found.entry_points if point.group == GROUP])


def good(name: str, *, stage: str = "PRUNE", cls: str = "Good") -> str:
    return HEAD + API + GOOD.format(cls=cls, stage=stage, name=name) + REGISTER.format(classes=cls)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    package_digest.cache_clear()


CLASS_LACKS = HEAD + API + "{body}" + REGISTER.format(classes="Bad")
BROKEN = {
    "raises on import": ("raise RuntimeError('no GPU\\nhere')", "RuntimeError: no GPU here"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "missing dependency": ("import package_that_does_not_exist", "ModuleNotFoundError"),
    "exits on import": ("raise SystemExit(3)", "SystemExit: 3"),
    "no API version": (HEAD + REGISTER.format(classes=""), "it declares no ORCHESTRATOR_API"),
    "empty API version": ('ORCHESTRATOR_API = ""\n', "it declares no ORCHESTRATOR_API"),
    "invalid API version": ('ORCHESTRATOR_API = "one"\n', "'one' is not a version specifier"),
    "API version as a number": ("ORCHESTRATOR_API = 1.0\n", "1.0 is not a version specifier"),
    "newer API": ('ORCHESTRATOR_API = ">=2,<3"\n', f"it was written for API >=2,<3, this is API {API_VERSION}"),
    "no hook": (HEAD + API, "it implements no register_methods hook"),
    "hook without marker": (HEAD + API + "def register_methods():\n    return []\n", "implements no register_methods"),
    "wrong argument": (
        HEAD + API + "@hookimpl\ndef register_methods(host):\n    return []\n",
        "Argument(s) {'host'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "unknown hook": (HEAD + API + "@hookimpl\ndef register_method():\n    return []\n", "unknown hook"),
    "hook raises": (HEAD + API + "@hookimpl\ndef register_methods():\n    return [] + None\n", "TypeError"),
    "hook exits": (HEAD + API + "@hookimpl\ndef register_methods():\n    raise SystemExit\n", "SystemExit"),
    "returns nothing": (HEAD + API + "@hookimpl\ndef register_methods():\n    pass\n", "returned NoneType, not a list"),
    "returns an instance": (HEAD + API + REGISTER.format(classes="object()"), "which is not a method class"),
    "returns the base": (HEAD + API + REGISTER.format(classes="Method"), "Method is of no method kind"),
    "returns an abstract class": (HEAD + API + REGISTER.format(classes="LayerMethod"), "LayerMethod lacks compress"),
    "undescribed parameter": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="bad") + "    strength: float = 1.0\n"),
        "does not describe its parameter(s) strength",
    ),
    "no name": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="")),
        "has no ClassVar 'name'",
    ),
    "bad name": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="Top-K")),
        "name is 'Top-K'; use lower-case letters",
    ),
    "name with a line break": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="top\\n")),
        "use lower-case letters",
    ),
    "stage not of the kind": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="VALIDATE", name="bad")),
        "is a LayerMethod, which has no place in stage validate, only in prune, quantize",
    ),
    "needs as text": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="bad") + '    needs: ClassVar = "H"\n'),
        "has no ClassVar 'needs'",
    ),
    "keeps as text": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="bad") + '    keeps: ClassVar = "zeros"\n'),
        "keeps is 'zeros', not a frozenset of Invariant",
    ),
    "field without annotation": (
        CLASS_LACKS.format(body=GOOD.format(cls="Bad", stage="PRUNE", name="bad") + "    strength = 1.0\n"),
        "PydanticUserError",
    ),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_is_shown_with_its_reason_and_the_others_stay(site: Site, source: str, reason: str) -> None:
    site.add_good("aaa_plugin", "first")
    distribution = site.add("broken_plugin", source)
    site.add_good("zzz_plugin", "last")

    methods = site.discover()

    assert sorted(name for _, name in methods.installed) == ["first", "last"]
    (broken,) = methods.broken
    assert reason in broken.reason
    assert "\n" not in broken.reason
    origin = broken.origin
    assert (origin.plugin, origin.distribution, origin.version) == ("broken_plugin", distribution, "1.2.3")


def test_every_broken_plugin_beside_every_other_leaves_the_good_one(site: Site) -> None:
    for number, (source, _) in enumerate(BROKEN.values()):
        site.add(f"broken_{number:02}", source)
    site.add_good("good_plugin", "good")
    methods = site.discover()
    assert [name for _, name in methods.installed] == ["good"]
    assert len(methods.broken) == len(BROKEN)


def test_evaluator_without_metrics_and_engine_without_versions_are_incomplete() -> None:
    class NoMetrics(seeded_bugs.Bytes):
        metrics = {}  # noqa: RUF012

    class VersionsAsTuple(seeded_bugs.Engine):
        supported_versions = (1, 2)  # type: ignore[assignment]

    with pytest.raises(PluginError, match="has no ClassVar 'metrics'"):
        check_class(NoMetrics)
    with pytest.raises(PluginError, match="has no ClassVar 'supported_versions'"):
        check_class(VersionsAsTuple)


def test_plugin_with_one_bad_class_registers_none(site: Site) -> None:
    both = GOOD.format(cls="One", stage="PRUNE", name="one") + GOOD.format(cls="Two", stage="PRUNE", name="Two")
    site.add("half_plugin", HEAD + API + both + REGISTER.format(classes="One, Two"))
    methods = site.discover()
    assert methods.installed == {}
    assert "half_plugin.Two.name is 'Two'" in methods.broken[0].reason


def test_entry_point_may_name_an_object_inside_a_module(site: Site) -> None:
    source = HEAD + GOOD.format(cls="Good", stage="PRUNE", name="nested")
    source += "class Plugin:\n    ORCHESTRATOR_API = '>=1'\n    @hookimpl\n    def register_methods(self):\n"
    source += "        return [Good]\nplugin = Plugin()\n"
    site.add("object_plugin", source)
    (info,) = site.path.glob("*.dist-info")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nobject_plugin = object_plugin:plugin\n", encoding="utf-8")
    assert list(site.discover().installed) == [(Stage.PRUNE, "nested")]


def test_name_claimed_twice_belongs_to_nobody_and_both_owners_are_named(site: Site) -> None:
    one, two = site.add_good("one_plugin", "same"), site.add_good("two_plugin", "same")
    third = site.add_good("three_plugin", "other")
    methods = site.discover()
    assert [(m.key, m.origin.distribution) for m in methods.installed.values()] == [((Stage.PRUNE, "other"), third)]
    with pytest.raises(SpecError) as caught:
        methods.find(Stage.PRUNE, "same")
    assert f"{one} 1.2.3" in str(caught.value) and f"{two} 1.2.3" in str(caught.value)
    assert "uninstall one of them" in str(caught.value)


def test_third_claim_of_a_name_does_not_get_it(site: Site) -> None:
    for module in ("one_plugin", "two_plugin", "three_plugin"):
        site.add_good(module, "same")
    methods = site.discover()
    assert methods.installed == {}
    assert len(methods.clashes[Stage.PRUNE, "same"]) == 3


def test_same_name_in_two_stages_is_no_clash(site: Site) -> None:
    site.add_good("one_plugin", "same", stage="PRUNE")
    site.add_good("two_plugin", "same", stage="QUANTIZE")
    assert site.discover().find(Stage.QUANTIZE, "same").origin.plugin == "two_plugin"


@pytest.mark.parametrize(
    ("stage", "name", "remedy"),
    [
        (Stage.PRUNE, "wnada", 'did you mean "wanda"?'),
        (Stage.QUANTIZE, "wanda", '"wanda" belongs to stage prune'),
        (Stage.QUANTIZE, "unlike_anything", "installed for quantize: wanda_grid"),
        (Stage.DISTILL, "unlike_anything", "installed for distill: none"),
    ],
)
def test_unknown_name_gets_the_closest_remedy(site: Site, stage: Stage, name: str, remedy: str) -> None:
    site.add_good("one_plugin", "wanda")
    site.add_good("two_plugin", "wanda_grid", stage="QUANTIZE")
    with pytest.raises(SpecError) as caught:
        site.discover().find(stage, name)
    (problem,) = caught.value.problems
    assert problem.what == f'no installed {stage} method is called "{name}"'
    assert problem.remedy == remedy


def test_missing_method_mentions_broken_plugins_for_one_may_have_had_it(site: Site) -> None:
    site.add("broken_plugin", "raise RuntimeError('no GPU')")
    with pytest.raises(SpecError) as caught:
        site.discover().find(Stage.PRUNE, "theirs")
    told = "plugin 'broken_plugin' of dist-of-broken-plugin is broken: RuntimeError: no GPU"
    assert told in str(caught.value)


def test_method_that_is_there_is_found_although_another_plugin_is_broken(site: Site) -> None:
    site.add("broken_plugin", "raise RuntimeError")
    site.add_good("good_plugin", "mine")
    found = site.discover().find(Stage.PRUNE, "mine")
    assert (found.kind, found.cls.__name__, found.origin.version) == ("LayerMethod", "Good", "1.2.3")


def test_what_a_plugin_prints_goes_to_stderr(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    source = good("loud").replace("return [", "print('hook'); return [")
    site.add("loud_plugin", source + "\nprint('hello from import')\n")
    assert (Stage.PRUNE, "loud") in site.discover().installed
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["hello from import", "hook"]


def test_keyboard_interrupt_is_not_swallowed(site: Site) -> None:
    site.add("slow_plugin", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        site.discover()


@pytest.mark.parametrize("metadata", [None, "", "Metadata-Version: 2.1\n"])
def test_distribution_with_damaged_metadata_hides_nobody(site: Site, metadata: str | None) -> None:
    site.add_good("damaged_plugin", "damaged")
    (file,) = site.path.glob("*.dist-info/METADATA")
    if metadata is None:
        file.unlink()
    else:
        file.write_text(metadata, encoding="utf-8")
    site.add_good("good_plugin", "good")
    methods = site.discover()
    assert sorted(name for _, name in methods.installed) == ["damaged", "good"]
    assert methods.find(Stage.PRUNE, "damaged").origin.distribution == "unknown distribution"


def test_entry_point_without_distribution_is_loaded(site: Site) -> None:
    site.add_good("bare_plugin", "bare")
    methods = discover([importlib.metadata.EntryPoint("bare", "bare_plugin", GROUP)])
    assert methods.find(Stage.PRUNE, "bare").origin.distribution == "unknown distribution"


def test_discovery_twice_gives_the_same_and_leaves_no_state(site: Site) -> None:
    site.add("broken_plugin", BROKEN["unknown hook"][0])
    site.add_good("good_plugin", "good")
    first, second = site.discover(), site.discover()
    assert list(first.installed) == list(second.installed) == [(Stage.PRUNE, "good")]
    assert first.broken == second.broken
    assert first.clashes == second.clashes == {}


def test_source_digest_follows_the_sources_of_module_and_package(site: Site) -> None:
    site.add_good("module_plugin", "in_module")
    package = site.path / "package_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "inner.py").write_text("A = 1\n", encoding="utf-8")

    before = site.discover().find(Stage.PRUNE, "in_module").source_digest
    package_before = package_digest("package_plugin")
    assert site.discover().find(Stage.PRUNE, "in_module").source_digest == before

    (site.path / "module_plugin.py").write_text(good("in_module") + "# changed\n", encoding="utf-8")
    (package / "inner.py").write_text("A = 2\n", encoding="utf-8")
    package_digest.cache_clear()
    assert site.discover().find(Stage.PRUNE, "in_module").source_digest != before
    assert package_digest("package_plugin") != package_before

    # A file that moved is another package, though the bytes are the same.
    package_digest.cache_clear()
    moved_from = package_digest("package_plugin")
    (package / "inner.py").rename(package / "other.py")
    package_digest.cache_clear()
    assert package_digest("package_plugin") != moved_from


def test_first_party_methods_come_in_by_the_same_door() -> None:
    methods = discover()
    origins = {method.origin.distribution for method in methods.installed.values()}
    assert "compression-orchestrator" in origins
    assert {Stage.CALIBRATE, Stage.PRUNE, Stage.QUANTIZE, Stage.VALIDATE} <= {stage for stage, _ in methods.installed}
    assert all(method.cls.__module__.startswith("orchestrator_") for method in methods.installed.values())


def test_command_line_lists_broken_plugins_and_clashes_on_a_clean_stdout(site: Site) -> None:
    site.add("broken_plugin", "print('noise'); raise RuntimeError('no GPU')")
    owner = site.add_good("rival_plugin", "wanda")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site.path), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "orchestrator", "methods"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(broken["plugin"], broken["reason"]) for broken in document["broken"]] == [
        ("broken_plugin", "RuntimeError: no GPU")
    ]
    (clash,) = document["clashes"]
    assert (clash["stage"], clash["name"]) == ("prune", "wanda")
    assert any(owner in claim for claim in clash["claimed_by"])
    assert any("compression-orchestrator" in claim for claim in clash["claimed_by"])
    assert "wanda" not in [method["name"] for method in document["methods"]]
    assert "noise" in done.stderr
