"""How a cache policy gets from a specification to an evaluator, and what evaluators give beside numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from orchestrator.api import Checkpoint, Context, Evaluator, Measured, SpecError, Stage, StepError
from orchestrator.artifact import ArtifactStore
from orchestrator.catalogue import list_methods, show_method
from orchestrator.home import Settings
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import InstalledMethod, Methods, Origin, check_class, discover
from orchestrator.run import run_locally
from orchestrator.tracking import connect
from tests.seeded_policies import Contiguous
from tests.test_run import Watcher
from tests.tiny import make_model

HEAD = "version: 1\nname: policies\nmodel: {id: model}\nsteps:\n"
STEP = HEAD + "  - validate: curious\n    policy: {picky: {tokens: 7}}\n"


class Picky(Contiguous):
    """Takes Llamas only."""

    name: ClassVar[str] = "picky"
    tokens: int = Field(3, ge=1, le=9, description="A number.")

    def check_model(self, config: Mapping[str, Any]) -> None:
        if FAILING:
            raise RuntimeError("out of luck")
        if config["model_type"] != "llama":
            raise SpecError(f"picky takes no {config['model_type']}", remedy="take a llama")


class Curious(Evaluator):
    """Says which policy it was given, along a curve."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "curious"
    paper: ClassVar[str] = "None."
    metrics: ClassVar[Mapping[str, str]] = {"tokens": "the policy's, or 0"}
    takes_policy: ClassVar[bool] = True
    last: float = Field(0.5, description="The last value of the curve.", ge=0, le=1e308)

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        tokens = context.policy.tokens if isinstance(context.policy, Picky) else 0
        return Measured({"tokens": tokens}, {"along": [(0, 1.0), (512, self.last * 10)]})


class Plain(Curious):
    """Gives numbers alone, and takes no policy."""

    name: ClassVar[str] = "plain"
    takes_policy: ClassVar[bool] = False

    def measure(  # type: ignore[override]
        self, candidate: Checkpoint, baseline: Checkpoint, context: Context
    ) -> Mapping[str, float]:
        assert context.policy is None
        return {"tokens": 1}


FAILING: list[str] = []


@pytest.fixture(scope="module")
def methods() -> Methods:
    found = discover()
    origin = Origin("policies", "policies-plugin", "0.1")
    found.add(InstalledMethod(check_class(cls), origin) for cls in (Picky, Curious, Plain))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def planner(tmp_path: Path, model: Path, methods: Methods) -> Callable[[str], Plan]:
    """A function that plans a specification beside the model."""
    (tmp_path / "model").symlink_to(model)

    def plan(text: str) -> Plan:
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        return make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")

    return plan


def refused(planner: Callable[[str], Plan], text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        planner(text)
    return [str(problem).partition("spec.yaml:")[2] for problem in caught.value.problems]


def test_a_policy_is_part_of_its_step_and_of_no_other(planner: Callable[[str], Plan]) -> None:
    plan = planner(STEP + "  - validate: curious\n")
    with_policy, without = plan.steps
    assert with_policy.policy == Picky(tokens=7)
    assert without.policy is None
    found = with_policy.identity["policy"]
    assert (found["name"], found["parameters"], found["plugin"]["distribution"]) == (
        "picky",
        {"tokens": 7},
        "policies-plugin",
    )
    assert "policy" not in without.identity
    default = planner(HEAD + "  - validate: curious\n    policy: {picky: }\n").steps[0]
    assert default.policy == Picky(tokens=3)
    explicit = planner(HEAD + "  - validate: curious\n    policy: {picky: {tokens: 3}}\n").steps[0]
    other = planner(HEAD + "  - validate: curious\n    policy: {picky: {tokens: 4}}\n").steps[0]
    assert default.fingerprint == explicit.fingerprint
    assert len({default.fingerprint, other.fingerprint, without.fingerprint, with_policy.fingerprint}) == 4


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("validate: perplexity\n    with: {source: spec.yaml}", "`policy` means nothing to validate perplexity"),
        ("validate: plain", "`policy` means nothing to validate plain; remove it"),
        ("prune: magnitude", "`policy` means nothing to prune magnitude"),
    ],
)
def test_a_policy_beside_a_method_that_takes_none_is_refused(
    planner: Callable[[str], Plan], step: str, said: str
) -> None:
    (problem,) = refused(planner, HEAD + f"  - {step}\n    policy: {{picky: {{}}}}\n")
    assert problem.partition(" ")[2].startswith("steps[0].policy: ")
    assert said in problem


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("{picky: {}, contiguous: {}}", "5: steps[0]: policy is one cache policy's name with its parameters"),
        ("{}", "5: steps[0]: policy is one cache policy's name with its parameters"),
        (
            "{pickle: {}}",
            '6: steps[0].policy.pickle: no installed validate method is called "pickle"; did you mean "picky"?',
        ),
        ("{curious: {}}", '6: steps[0].policy.curious: "curious" is no cache policy'),
        (
            "{picky: {token: 1}}",
            '6: steps[0].policy.picky.token: there is no such key; did you mean "tokens"?',
        ),
        ("{picky: {tokens: 99}}", "6: steps[0].policy.picky.tokens: input should be less than or equal to 9, not 99"),
        ("picky", '6: steps[0].policy: input should be an object, not "picky"'),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_at_its_place(
    planner: Callable[[str], Plan], policy: str, problem: str
) -> None:
    assert refused(planner, HEAD + f"  - validate: curious\n    policy: {policy}\n") == [problem]


def test_a_policy_is_no_step(planner: Callable[[str], Plan]) -> None:
    (problem,) = refused(planner, HEAD + "  - validate: picky\n")
    assert problem == '5: steps[0].validate: "picky" is a cache policy; list it under `policy:` of a validate step'


def test_a_model_that_the_policy_cannot_serve_is_refused_while_planning(
    tmp_path: Path, methods: Methods, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", "gpt2")
    (tmp_path / "spec.yaml").write_text(STEP, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")
    assert str(caught.value).endswith("6: steps[0].policy.picky: picky takes no gpt2; take a llama")
    monkeypatch.setattr("tests.test_policy_plumbing.FAILING", ["check_model"])
    with pytest.raises(SpecError, match=r"Picky.check_model of policies-plugin 0.1 .* failed: RuntimeError: out of"):
        make_plan(tmp_path / "spec.yaml", methods, tmp_path / "home")


def test_the_policy_reaches_the_evaluator_and_its_curve_reaches_mlflow(
    tmp_path: Path, model: Path, methods: Methods, tracking_uri: str
) -> None:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "spec.yaml").write_text(STEP + "  - validate: plain\n", encoding="utf-8")
    settings = Settings(tmp_path / "home", tracking_uri)
    execution = run_locally(tmp_path / "spec.yaml", methods, settings, Watcher())
    document = execution.document()
    assert [step["metrics"] for step in document["steps"]] == [{"tokens": 7}, {"tokens": 1}]
    store = ArtifactStore(settings.home)
    measured, plain = (store.find(execution.outcomes[index].digest) for index in (0, 1))
    curve = [[0, 1.0], [512, 5.0]]
    assert json.loads((measured.path / "curves.json").read_text(encoding="utf-8")) == {"along": curve}
    assert "curves.json" not in plain.manifest["files"]
    client = connect(tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'orchestrator'")
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{document['mlflow_run']}'", order_by=["start_time"]
    )
    (child,) = (run for run in children if run.info.run_name == "validate curious")
    assert child.data.params["policy"] == "picky"
    assert child.data.params["policy.tokens"] == "7"
    history = sorted((point.step, point.value) for point in client.get_metric_history(child.info.run_id, "along"))
    assert history == [(0, 1.0), (512, 5.0)]


def test_a_curve_that_is_not_finite_is_a_fault_of_the_step(
    tmp_path: Path, model: Path, methods: Methods, tracking_uri: str
) -> None:
    (tmp_path / "model").symlink_to(model)
    text = HEAD + "  - validate: curious\n    with: {last: 1.0e+308}\n"
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StepError, match=r"curious measured along at 512 = inf"):
        run_locally(tmp_path / "spec.yaml", methods, Settings(tmp_path / "home", tracking_uri), Watcher())


def test_the_catalogue_says_where_a_policy_belongs(methods: Methods) -> None:
    lines = list_methods(methods).splitlines()
    names = [line.split()[1] for line in lines if line.startswith("validate")]
    assert names.index("plain") < names.index("picky")  # steps first, then what they list
    assert "no step of its own: it is listed under `policy:` of a validate step" in show_method(methods, "picky")
    assert "no step of its own" not in show_method(methods, "curious")


def test_a_stream_beyond_learned_positions_is_refused_while_planning(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "gpt2")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        HEAD + "  - validate: streaming\n    with: {source: text.txt, stream_tokens: 512}\n", encoding="utf-8"
    )
    with pytest.raises(SpecError, match=r"spec\.yaml:6: steps\[0\]\.with: .*positions") as caught:
        make_plan(spec, discover(), tmp_path / "home")
    assert "set stream_tokens to at most 128" in str(caught.value)
