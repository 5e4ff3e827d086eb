"""Manifests: they fit the schemas that were noted down, and start vLLM with exactly the planned flags."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from orchestrator.api import ModelShape, SpecError
from orchestrator.deployment import check_engine, serving_files
from orchestrator.serving import GIB
from orchestrator.testing import check_method
from orchestrator_serving import manifests
from orchestrator_serving.compose import Compose
from orchestrator_serving.kserve import KServe
from orchestrator_serving.llm_d import LLMD
from orchestrator_serving.manifests import ChartValues, KubernetesManifest, Manifest, arguments, model_address
from orchestrator_serving.production_stack import ProductionStack
from orchestrator_serving.vllm import VLLM
from tests.test_serving import LLAMA_8B

SCHEMAS = Path(manifests.__file__).parent / "schemas"
SCHEMA_OF = {
    KServe: "kserve_v1alpha2",
    LLMD: "llm_d_modelservice_0_4",
    ProductionStack: "production_stack_0_1",
    Compose: "compose",
}
FILE_OF = {
    KServe: "llm-inference-service.yaml",
    LLMD: "values.yaml",
    ProductionStack: "values.yaml",
    Compose: "compose.yaml",
}
PVC = {"model_uri": "pvc://models/releases/llama"}
SHAPE = ModelShape.from_config(LLAMA_8B)
BUDGET = {"memory_utilization": 0.5, "max_model_len": 8192}
ENGINES: list[tuple[type[Manifest], dict[str, Any]]] = [
    (KServe, {"model_uri": "s3://models/releases/llama/"}),
    (KServe, {**PVC, "service_account": "s3-reader", "namespace": "llms", "replicas": 3}),
    (KServe, {"model_uri": "hf://owner/llama", "tensor_parallel_size": 4, "gpu_resource": "amd.com/gpu"}),
    (LLMD, {**PVC, "tensor_parallel_size": 2, "service_account": "reader"}),
    (LLMD, {"model_uri": "hf://owner/llama", "token_secret": "hub", "gpu_resource": "amd.com/gpu"}),
    (ProductionStack, {**PVC, "tensor_parallel_size": 2, "service_account": "reader"}),
    (ProductionStack, {"model_uri": "hf://owner/llama", "token_secret": "hub", "prefix_caching": False}),
    (Compose, {}),
    (Compose, {"tensor_parallel_size": 8, "published_port": 80, "bind_address": "0.0.0.0"}),
]
EXTRA: list[dict[str, Any]] = [
    {},
    {"kv_cache_dtype": "fp8", "prefix_caching": False},
    {"extra_flags": {"seed": -1, "enforce_eager": True, "enable-chunked-prefill": False}},
    {
        "engine_version": "0.33.1",
        "extra_flags": {"kv-transfer-config.kv_connector": "NixlConnector", "kv-transfer-config.kv_role": "kv_both"},
    },
]
ONE_OF_EACH = [(KServe, PVC), (LLMD, PVC), (ProductionStack, PVC), (Compose, {})]
named = pytest.mark.parametrize(("cls", "parameters"), ENGINES, ids=lambda value: getattr(value, "name", ""))
one_of_each = pytest.mark.parametrize(("cls", "parameters"), ONE_OF_EACH, ids=lambda value: getattr(value, "name", ""))


def render(engine: Manifest) -> dict[str, str]:
    return dict(engine.render(SHAPE, engine.plan(SHAPE, 5 * GIB)))


def values_of(engine: Manifest) -> dict[str, Any]:
    parsed = yaml.safe_load(render(engine)[FILE_OF[type(engine)]])
    assert isinstance(parsed, dict)
    return parsed


def planned(engine: Manifest) -> dict[str, str]:
    """What vLLM's own engine would be started with, as flags and values; what is off and has no --no- form is left."""
    common = {name: value for name, value in engine.model_dump().items() if name in VLLM.model_fields}
    vllm = VLLM(**common)
    settings = vllm.settings(SHAPE, vllm.plan(SHAPE, 5 * GIB))
    settings.setdefault("tensor-parallel-size", 1)
    return {flag: str(value) for flag, value in settings.items() if flag != "model"}


def started_with(engine: Manifest) -> tuple[str, dict[str, str]]:
    """The model and the flags with which the tool that reads the manifest starts ``vllm serve``."""
    if isinstance(engine, Compose):
        files = render(engine)
        service = yaml.safe_load(files["compose.yaml"])["services"]["vllm"]
        command = service["entrypoint"] + service["command"]
        assert command[:3] == ["vllm", "serve", "--config"]
        assert command[3] == "serving/compose/vllm.yaml"  # from working_dir, the root of the release
        settings = yaml.safe_load(files["vllm.yaml"])
        model = service["working_dir"] + "/" + settings.pop("model")
        return model, {flag: str(value) for flag, value in settings.items()} | flags_in(command[4:])
    values = values_of(engine)
    if isinstance(engine, KServe):
        return started_by_kserve(values)
    if isinstance(engine, LLMD):
        return started_by_llm_d(values)
    return started_by_production_stack(values)


def flags_in(arguments: Iterable[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    waiting = ""
    for argument in arguments:
        flag, equals, value = argument.removeprefix("--").partition("=")
        if waiting:
            flags[waiting], waiting = argument, ""
        elif equals:
            flags[dashed(flag)] = value
        elif flag.startswith("no-"):
            flags[flag.removeprefix("no-")] = "False"
        elif flag in ("enforce-eager", "enable-prefix-caching"):
            flags[flag] = "True"
        else:
            waiting = dashed(flag)
    assert not waiting
    return flags


def dashed(flag: str) -> str:
    """As vLLM reads a flag: what follows a dot is a key of its value, and stays."""
    name, dot, key = flag.partition(".")
    return name.replace("_", "-") + dot + key


def started_by_kserve(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """KServe's template ends in an eval with the variable in it: a real shell does that here, and shows what came."""
    spec = values["spec"]
    (container,) = spec["template"]["containers"]
    assert container["name"] == "main"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["HF_HUB_OFFLINE"] == "1"
    dump = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    tensor = spec["parallelism"]["tensor"]
    script = f'eval "{dump} /mnt/models --served-model-name {spec["model"]["name"]} --port 8000 '
    script += f'--tensor-parallel-size {tensor} ${{VLLM_ADDITIONAL_ARGS}} $@"'
    bash = shutil.which("bash")
    assert bash is not None
    result = subprocess.run(
        [bash, "-c", script, "--"], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    model, *rest = json.loads(result.stdout)
    return model, flags_in(rest)


def started_by_llm_d(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """As the chart's template vllmServeModelCommand puts it together."""
    decode, artifacts = values["decode"], values["modelArtifacts"]
    (container,) = decode["containers"]
    assert (container["modelCommand"], container["mountModelVolume"]) == ("vllmServe", True)
    scheme, rest = artifacts["uri"].split("://")
    model = "/model-cache/" + rest.split("/", 1)[1] if scheme == "pvc" else rest
    assert values["routing"]["proxy"]["enabled"] is False
    port = values["routing"]["servicePort"]
    assert port == container["ports"][0]["containerPort"]
    head = [f"--port={port}", f"--tensor-parallel-size={decode['parallelism']['tensor']}"]
    return model, flags_in([*head, f"--served-model-name={artifacts['name']}", *container["args"]])


def started_by_production_stack(values: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """As the chart's template deployment-vllm-multi puts it together."""
    (model,) = values["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    head = ["--host", "0.0.0.0", "--port", "8000"]
    head += ["--enable-prefix-caching" if config.get("enablePrefixCaching") else "--no-enable-prefix-caching"]
    keys = {"maxModelLen": "max-model-len", "dtype": "dtype", "tensorParallelSize": "tensor-parallel-size"}
    keys |= {"maxNumSeqs": "max-num-seqs", "gpuMemoryUtilization": "gpu_memory_utilization"}
    for key, flag in keys.items():
        if key in config:
            head += [f"--{flag}", str(config[key])]
    return model["modelURL"], flags_in([*head, *config["extraArgs"]])


@named
@pytest.mark.parametrize("extra", EXTRA, ids=["plain", "fp8", "flags", "version"])
def test_it_fits_the_schema_and_starts_vllm_with_the_planned_flags(
    cls: type[Manifest], parameters: dict[str, Any], extra: dict[str, Any]
) -> None:
    engine = cls(**{**BUDGET, **parameters, **extra})
    engine.preflight()
    schema = json.loads((SCHEMAS / f"{SCHEMA_OF[cls]}.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    validator(schema).validate(values_of(engine))
    model, flags = started_with(engine)
    own = {name: flags.pop(name) for name in ("served-model-name", "port")}
    assert own == {"served-model-name": "compressed-model", "port": "8000"}
    assert flags.pop("host", "0.0.0.0") == "0.0.0.0"
    flags.setdefault("tensor-parallel-size", "1")
    assert flags == planned(engine)
    expected = {
        KServe: "/mnt/models",
        LLMD: "/model-cache/releases/llama",
        ProductionStack: "/model/releases/llama",
        Compose: "/model/.",
    }
    hub = isinstance(engine, ChartValues) and engine.model_uri.startswith("hf")
    assert model == ("owner/llama" if hub else expected[cls])


@pytest.mark.parametrize("cls", SCHEMA_OF, ids=lambda cls: cls.name)
def test_the_schema_would_find_a_misspelt_key_or_a_wrong_type(cls: type[Manifest]) -> None:
    schema = json.loads((SCHEMAS / f"{SCHEMA_OF[cls]}.json").read_text(encoding="utf-8"))
    assert re.search(r"at [0-9a-f]{40}", schema["$comment"])
    values = values_of(cls(**(PVC if issubclass(cls, KubernetesManifest) else {})))
    places: dict[type[Manifest], tuple[tuple[Any, ...], Any]] = {
        KServe: (("spec", "parallelism", "tensor"), "1"),
        LLMD: (("decode", "parallelism", "tensor"), "1"),
        ProductionStack: (("servingEngineSpec", "modelSpec", 0, "vllmConfig", "maxModelLen"), "8192"),
        Compose: (("services", "vllm", "healthcheck", "interval"), 15),
    }
    (*path, key), wrong = places[cls]
    inner = values
    for part in path:
        inner = inner[part]
    validator = jsonschema.validators.validator_for(schema)(schema)
    for change in ({key: wrong}, {f"{key}s": inner[key]}):
        kept = dict(inner)
        inner.update(change)
        assert not validator.is_valid(values), change
        inner.clear()
        inner.update(kept)
    assert validator.is_valid(values)


@one_of_each
def test_it_conforms_and_is_the_same_every_time(cls: type[Manifest], parameters: dict[str, Any]) -> None:
    assert render(cls(**parameters)) == render(cls(**parameters))
    check_method(cls(**parameters))


@one_of_each
def test_the_folder_says_which_versions_it_is_for(cls: type[Manifest], parameters: dict[str, Any]) -> None:
    engine = cls(**BUDGET, **parameters)
    check_engine(engine, [VLLM, *SCHEMA_OF])
    files = serving_files(engine, SHAPE, 5 * GIB)
    assert set(files) >= {FILE_OF[cls], "kv-plan.json", "README.md"}
    assert json.loads(files["kv-plan.json"])["engine_version"] == "0.33.0"
    text = files[FILE_OF[cls]]
    assert text.startswith(f"# vLLM >=0.33,<0.34, started by {cls.manifest}")
    assert engine.command() in text and engine.command() in files["README.md"]
    assert "latest" not in text
    assert "&id" not in text  # every value is written out, for people who edit the file
    assert "vllm/vllm-openai:v0.33.0" in files["README.md"]
    if isinstance(engine, ChartValues):
        assert f"{cls.manifest} {engine.chart_versions}.\n" in text
        assert f" --version {engine.newest_chart} " in engine.command()


@pytest.mark.parametrize(("devices", "resource"), [(1, "nvidia.com/gpu"), (4, "amd.com/gpu")])
def test_a_pod_asks_for_as_many_accelerators_as_share_the_model(devices: int, resource: str) -> None:
    more = {**PVC, "tensor_parallel_size": devices, "gpu_resource": resource, "host_cpus": 6, "host_memory_gib": 48}
    for cls in (KServe, LLMD):
        values = values_of(cls(**more))
        pod = values["decode"] if cls is LLMD else values["spec"]["template"]
        assert pod["containers"][0]["resources"] == {
            "limits": {resource: str(devices)},
            "requests": {"cpu": "6", "memory": "48Gi", resource: str(devices)},
        }
    (model,) = values_of(ProductionStack(**more))["servingEngineSpec"]["modelSpec"]
    assert (model["requestGPU"], model["requestGPUType"]) == (devices, resource)
    assert (model["requestCPU"], model["requestMemory"]) == (6, "48Gi")
    reserved = values_of(Compose(tensor_parallel_size=devices))["services"]["vllm"]["deploy"]["resources"]
    assert reserved["reservations"]["devices"] == [{"driver": "nvidia", "count": devices, "capabilities": ["gpu"]}]


def test_a_claim_is_mounted_where_the_model_is_looked_for() -> None:
    (model,) = values_of(ProductionStack(**PVC))["servingEngineSpec"]["modelSpec"]
    (volume,), (mount,) = model["extraVolumes"], model["extraVolumeMounts"]
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert (volume["name"], mount["readOnly"]) == (mount["name"], True)
    assert model["modelURL"].startswith(f"{mount['mountPath']}/")


def test_what_is_fetched_from_the_hub_has_room() -> None:
    engine = LLMD(model_uri="hf://owner/llama", tensor_parallel_size=2)
    artifacts = values_of(engine)["modelArtifacts"]
    assert artifacts["size"] == "10Gi"  # of weights of 5 GiB, whatever each device holds
    assert "size" not in values_of(LLMD(**PVC))["modelArtifacts"]


def test_compose_mounts_the_release_that_it_lies_in_and_nothing_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "release" / "serving" / "compose"
    folder.mkdir(parents=True)
    files = render(Compose(**BUDGET))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    service = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]["vllm"]
    (volume,) = service["volumes"]
    assert (folder / volume["source"]).resolve() == (tmp_path / "release").resolve()
    assert volume["read_only"] is True and volume["bind"]["create_host_path"] is False
    config = Path(service["command"][1])
    assert (tmp_path / "release" / config).read_text(encoding="utf-8") == files["vllm.yaml"]
    assert yaml.safe_load(files["vllm.yaml"]) == yaml.safe_load(
        VLLM(**BUDGET).render(SHAPE, VLLM(**BUDGET).plan(SHAPE, 5 * GIB))["vllm.yaml"]
    )
    assert service["ports"] == [{"target": 8000, "published": "8000", "host_ip": "127.0.0.1"}]
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
    assert "$" not in files["compose.yaml"]  # Compose would put variables in


@pytest.mark.parametrize("name", ["null", "true", "on", "y", "e1", "llama-3-8b"])
@one_of_each
def test_names_that_yaml_reads_as_something_else_stay_names(
    cls: type[Manifest], parameters: dict[str, Any], name: str
) -> None:
    engine = cls(**parameters, service_name=name)
    assert started_with(engine)[1]["served-model-name"] == name


@pytest.mark.parametrize(
    "wrong",
    [
        *({"service_name": name} for name in ("Llama", "a b", "a_b", "-a", "1a", "a" * 41, "a\n", "a;b", "{{a}}", "")),
        {"bind_address": "localhost; rm"},
        {"published_port": 0},
        {"shm_gib": 0},
    ],
    ids=str,
)
def test_names_and_sizes_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Compose(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"namespace": name} for name in ("Default", "a/b", "$(id)")),
        *({"service_account": name} for name in ("A", "key: value", "")),
        *({"gpu_resource": name} for name in ("gpu", "nvidia.com/gpu: 8", "nvidia.com/")),
        *({"replicas": number} for number in (-1, 10**6)),
        {"host_cpus": 0},
        {"host_memory_gib": 0},
        {"token_secret": "hf_ABC"},
    ],
    ids=str,
)
def test_names_that_kubernetes_does_not_take_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProductionStack(**PVC, **wrong)


@pytest.mark.parametrize("cls", [KServe, LLMD, ProductionStack], ids=lambda cls: cls.name)
def test_an_address_is_needed_and_has_to_be_one(cls: type[KubernetesManifest]) -> None:
    with pytest.raises(ValidationError) as missing:
        cls()
    assert [(item["type"], item["loc"]) for item in missing.value.errors()] == [("missing", ("model_uri",))]
    for uri in ("", "/data/model", "http://host/model", "file:///data", "models", "S3://bucket/x", "gs://b/x"):
        for attempt in (cls(model_uri=uri).preflight, lambda uri=uri: render(cls(model_uri=uri))):
            with pytest.raises(SpecError, match="does not load models from") as caught:
                attempt()
            assert "write " in str(caught.value.problems[0].remedy)
    for uri in ("pvc://claim", "pvc://claim/../x", "pvc://Claim/x", "pvc://claim/a b", "pvc://claim/$(id)", "pvc:///x"):
        with pytest.raises(SpecError, match="no address of the form pvc://CLAIM/PATH"):
            cls(model_uri=uri).preflight()
    for uri in ("hf://name", "hf://owner/name/x", "hf://owner/{{name}}", "hf://owner/na me"):
        with pytest.raises(SpecError, match="no address of the form hf://OWNER/NAME"):
            cls(model_uri=uri).preflight()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:SECRET@bucket/model",
        "s3://bucket/model?X-Amz-Signature=SECRET",
        "hf://user:SECRET@owner/name",
        "https://user:SECRET@host/model",
        "pvc://claim/model#SECRET",
    ],
)
def test_credentials_are_refused_and_not_repeated(uri: str) -> None:
    engine = KServe(model_uri=uri)
    for attempt in (engine.preflight, lambda: render(engine)):
        with pytest.raises(SpecError, match="as addresses with credentials do") as caught:
            attempt()
        assert "SECRET" not in str(caught.value) + str(caught.value.problems[0].remedy)


def test_a_bucket_is_for_tools_that_fetch_from_it() -> None:
    assert values_of(KServe(model_uri="s3://models/a/b"))["spec"]["model"]["uri"] == "s3://models/a/b"
    assert model_address("s3://models", ("s3",), "kserve").uri == "s3://models"
    for cls in (LLMD, ProductionStack):
        with pytest.raises(SpecError, match="does not load models from 's3'") as caught:
            cls(model_uri="s3://models/a").preflight()
        assert "orchestrator pull" in str(caught.value.problems[0].remedy)


def test_secrets_are_named_only_and_only_for_the_hub() -> None:
    values = values_of(LLMD(model_uri="hf://owner/name", token_secret="hub"))
    assert values["modelArtifacts"]["authSecretName"] == "hub"
    (model,) = values_of(ProductionStack(model_uri="hf://owner/name", token_secret="hub"))["servingEngineSpec"][
        "modelSpec"
    ]
    assert model["hf_token"] == {"secretName": "hub", "secretKey": "HF_TOKEN"}
    assert model["env"] == []
    with pytest.raises(SpecError, match="token_secret opens a private hf:// model"):
        LLMD(**PVC, token_secret="hub").preflight()


@pytest.mark.parametrize("image", ["vllm/vllm-openai", "vllm/vllm-openai:latest", "host:5000/vllm", "a b:1", "x:$TAG"])
def test_an_image_that_can_change_is_refused(image: str) -> None:
    with pytest.raises(SpecError, match="names no version") as caught:
        Compose(image=image).preflight()
    assert "vllm/vllm-openai:v0.33.0" in str(caught.value.problems[0].remedy)


def test_an_image_is_pinned_by_the_engine_version_a_tag_or_a_digest() -> None:
    digest = f"vllm/vllm-openai@sha256:{'0123456789abcdef' * 4}"
    assert Compose(engine_version="0.33.1").image_reference() == "vllm/vllm-openai:v0.33.1"
    for image in ("host:5000/a/vllm:v0.33.0-cu130", digest, f"vllm/vllm-openai:latest@{digest.partition('@')[2]}"):
        assert values_of(Compose(image=image))["services"]["vllm"]["image"] == image
        (model,) = values_of(ProductionStack(**PVC, image=image))["servingEngineSpec"]["modelSpec"]
        assert f"{model['repository']}:{model['tag']}" == image  # as the chart puts them together


@pytest.mark.parametrize(("cls", "inside", "outside"), [(LLMD, "v0.4.7", "0.5.0"), (ProductionStack, "0.1.9", "0.2")])
def test_charts_are_pinned(cls: type[ChartValues], inside: str, outside: str) -> None:
    engine = cls(**PVC, chart_version=inside)
    engine.preflight()
    assert f" --version {inside.removeprefix('v')} " in engine.command()
    for version in (outside, "newest"):
        with pytest.raises(SpecError, match=f"chart_version {version!r} of {cls.chart} is outside"):
            cls(**PVC, chart_version=version).preflight()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("port", "the manifest of .* sets itself"),
        ("--served_model_name", "the manifest of .* sets itself"),
        ("data-parallel-size", "plan would be of other devices"),
        ("tensor_parallel_size", "plan would be of other devices"),
    ],
)
@one_of_each
def test_flags_that_the_manifest_sets_are_refused(
    cls: type[Manifest], parameters: dict[str, Any], flag: str, said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        render(cls(**parameters, extra_flags={flag: "x" if "name" in flag else 9}))


@pytest.mark.parametrize("value", ['{"a": 1}', "two words", "$(id)", "a;b", "it's", "`id`", "*"])
def test_kserve_refuses_what_a_shell_would_change_and_the_others_keep_it(value: str) -> None:
    flags = {"chat-template": value}
    with pytest.raises(SpecError, match="hands the flags to a shell") as caught:
        render(KServe(**PVC, extra_flags=flags))
    assert "one flag for each of its keys" in str(caught.value.problems[0].remedy)
    for cls, parameters in ONE_OF_EACH[1:]:
        assert started_with(cls(**parameters, extra_flags=flags))[1]["chat-template"] == value


def test_every_flag_is_one_argument() -> None:
    settings = {"model": ".", "seed": -1, "on": True, "off": False, "headless": False, "rate": 1e-05, "text": "--x y"}
    assert arguments(settings) == ["--seed=-1", "--on", "--no-off", "--rate=1e-05", "--text=--x y"]
    assert arguments(settings, leave_out=["on", "text", "rate"]) == ["--seed=-1", "--no-off"]
