"""What manifests share: vLLM's flags as arguments of a container, its image, and the address of the model.

A manifest starts vLLM, so its arithmetic, its checks and its flags are those of `VLLM`. What it adds is the shape that
a deployment tool reads. Two versions are pinned: the engine's (`engine_version`, and the tag of the image) and that of
the manifest's chart or API. Credentials are never written: a service account or a Secret is named.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field

from orchestrator.api import KVPlan, ModelShape, SpecError
from orchestrator_serving.vllm import VLLM, flag_name

PORT = 8000
IMAGE = "vllm/vllm-openai"
SHARED_MEMORY = "Memory of /dev/shm, through which accelerators of one pod talk, GiB."
TOKEN_SECRET = "Name of the Secret whose key HF_TOKEN opens a private hf:// model."
TOKEN_KEY = "HF_TOKEN"
# 63 characters are a DNS label; the tools derive longer names, such as NAME-kserve-workload-svc.
_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_IMAGE = re.compile(
    r"[a-z0-9]([-a-z0-9._/]|:[0-9]+/)*(:(?P<tag>[A-Za-z0-9_][-A-Za-z0-9_.]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?"
)
_PATH = r"[A-Za-z0-9_=+~-][A-Za-z0-9._=+~-]*"  # of a path, one part: never "..", nothing that a shell or template reads
_ADDRESSES: Mapping[str, tuple[re.Pattern[str], str]] = {
    "s3": (re.compile(rf"[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/{_PATH})*/?"), "s3://BUCKET/PREFIX"),
    "pvc": (re.compile(rf"[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/{_PATH})+/?"), "pvc://CLAIM/PATH"),
    "hf": (re.compile(rf"{_PATH}/{_PATH}"), "hf://OWNER/NAME"),
}
# The manifest sets these itself, or they would take accelerators that it does not ask for.
_TAKEN = ("config", "host", "port", "served-model-name")
# Flags of vLLM 0.33 without a --no- form. Its reader of --config leaves them out when they are false; so is it here.
_ONLY_ON = frozenset(
    {"aggregate-engine-logging", "data-parallel-multi-port-external-lb", "disable-log-stats", "grpc", "headless"}
)


@dataclass(frozen=True)
class ModelAddress:
    """Where the files of a release lie. rest: what follows ``scheme://``, without a slash at its end."""

    scheme: str
    rest: str

    @property
    def uri(self) -> str:
        """The whole address."""
        return f"{self.scheme}://{self.rest}"


def model_address(uri: str, schemes: Sequence[str], reader: str) -> ModelAddress:
    """Read an address. schemes: those that `reader` loads models from. Raises `SpecError`, which never repeats what
    could be a credential."""
    forms = " or ".join(_ADDRESSES[scheme][1] for scheme in schemes)
    scheme, _, rest = uri.partition("://")
    if "@" in uri or "?" in uri or "#" in uri:
        raise SpecError(
            "model_uri holds '@', '?' or '#', as addresses with credentials do; manifests are published",
            remedy=f"write {forms}, and name a service account or a Secret that has the credentials",
        )
    if scheme not in schemes:
        remedy = f"write {forms}"
        if scheme == "s3":
            remedy += "; `orchestrator pull` brings a release onto a volume"
        raise SpecError(f"{reader} does not load models from {scheme[:20]!r}", remedy=remedy)
    if not _ADDRESSES[scheme][0].fullmatch(rest):
        raise SpecError(f"model_uri {uri!r} is no address of the form {_ADDRESSES[scheme][1]}", remedy=f"write {forms}")
    return ModelAddress(scheme, rest.rstrip("/"))


def arguments(settings: Mapping[str, Any], leave_out: Sequence[str] = ()) -> list[str]:
    """The flags of `vllm serve` as arguments, one each, so that no value can be taken for a flag; without `model`."""
    flags = []
    for flag, value in settings.items():
        if flag == "model" or flag in leave_out:
            continue
        if not isinstance(value, bool):
            flags.append(f"--{flag}={value}")
        elif value:
            flags.append(f"--{flag}")
        elif flag not in _ONLY_ON:
            flags.append(f"--no-{flag}")
    return flags


class Manifest(VLLM):
    """Starts vLLM in a container. manifest: what reads the file, with the version of its format."""

    manifest: ClassVar[str]

    service_name: str = Field(
        "compressed-model",
        pattern=_LABEL,
        max_length=40,
        description="Name of the service, and of the model in requests: small letters, digits and dashes.",
    )
    image: str | None = Field(
        None,
        max_length=400,
        description=f"Image that holds vLLM, with its tag or digest. Default: {IMAGE}:v<engine_version>.",
    )

    @abstractmethod
    def values(self, shape: ModelShape, plan: KVPlan) -> tuple[str, dict[str, Any]]:
        """Return the name of the manifest's file and what is in it. Raises `SpecError` as `render` does."""

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return the manifest. Raises `SpecError` for what vLLM or the tool that reads it would refuse."""
        name, values = self.values(shape, plan)
        header = [
            f"{self.written_for()}.",
            f"From the root of the release:  {self.command()}",
            "How the KV cache was calculated, and what was assumed: README.md and kv-plan.json beside this file.",
        ]
        text = yaml.safe_dump(values, sort_keys=False, width=1000, allow_unicode=True)
        return {name: "".join(f"# {line}\n" for line in header) + text}

    def written_for(self) -> str:
        """What the file is for, with the versions of both."""
        return f"vLLM {self.supported_versions}, started by {self.manifest}"

    def settings(self, shape: ModelShape, plan: KVPlan) -> dict[str, Any]:
        """vLLM's, less what belongs to the manifest."""
        settings = super().settings(shape, plan)
        for name in self.extra_flags:
            flag = flag_name(name)
            if flag in _TAKEN:
                raise SpecError(
                    f"extra_flags sets {flag}, which the manifest of {self.name} sets itself",
                    remedy="remove it from extra_flags; service_name is the name of the model in requests",
                )
        return settings

    def preflight(self) -> None:
        """Check the image too. Raises `SpecError`."""
        super().preflight()
        self.image_reference()

    def image_reference(self) -> str:
        """The image, pinned. Raises `SpecError` for one that can change under the same name."""
        if self.image is None:
            return f"{IMAGE}:v{self.version()}"
        match = _IMAGE.fullmatch(self.image)
        if match is None or (match["digest"] is None and match["tag"] in (None, "latest")):
            raise SpecError(
                f"image {self.image!r} names no version: what it holds can change",
                remedy=f"write it with a tag, e.g. {IMAGE}:v{self.version()}, or with @sha256:<digest>",
            )
        return self.image

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """vLLM's notes, and what is not in the file."""
        return [
            f"The image is {self.image_reference()} and has to hold vLLM {self.version()}: the numbers are its own.",
            *super().notes(shape, plan),
        ]


class KubernetesManifest(Manifest):
    """Starts vLLM in pods, which fetch the model from `model_uri`. schemes: what the tool can fetch from."""

    schemes: ClassVar[tuple[str, ...]] = ("pvc", "hf")

    model_uri: str = Field(
        max_length=1000,
        description="Address at which pods will find the files of the release: s3://BUCKET/PREFIX (kserve), "
        "pvc://CLAIM/PATH or hf://OWNER/NAME. Without credentials.",
    )
    namespace: str = Field("default", pattern=_LABEL, max_length=63, description="Namespace that it is deployed to.")
    service_account: str | None = Field(
        None, pattern=_SUBDOMAIN, max_length=253, description="Name of the service account that pods run as."
    )
    replicas: int = Field(1, ge=0, le=10_000, description="Pods, each with the whole model.")
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=300,
        description="Kubernetes' name of the accelerator; a pod asks for tensor_parallel_size of them.",
    )
    host_cpus: int = Field(4, ge=1, le=1024, description="Processor cores that a pod asks for.")
    host_memory_gib: int = Field(16, ge=1, le=100_000, description="Memory of the host that a pod asks for, GiB.")

    def address(self) -> ModelAddress:
        """Where the model is. Raises `SpecError` for what the tool cannot fetch, or what holds credentials."""
        return model_address(self.model_uri, self.schemes, self.name)

    def preflight(self) -> None:
        """Check the address of the model too. Raises `SpecError`."""
        super().preflight()
        self.address()

    def resources(self, plan: KVPlan) -> dict[str, dict[str, str]]:
        """What a container asks for; quantities are strings, as in Kubernetes."""
        gpus = {self.gpu_resource: str(plan.tensor_parallel_size)}
        host = {"cpu": str(self.host_cpus), "memory": f"{self.host_memory_gib}Gi"}
        return {"limits": gpus, "requests": {**host, **gpus}}

    def environment(self) -> list[dict[str, str]]:
        """Nothing is looked for at the hub, unless the model is there."""
        return [] if self.address().scheme == "hf" else [{"name": "HF_HUB_OFFLINE", "value": "1"}]

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What has to be at the address, and in the cluster."""
        return [
            f"All files of the release, from its root, lie at {self.address().uri}; nothing here puts them there.",
            f"A pod takes {plan.tensor_parallel_size} x {self.gpu_resource} of one node. Pods: {self.replicas}.",
            *super().notes(shape, plan),
        ]


class ChartValues(KubernetesManifest):
    """Values for a Helm chart. chart: its name; chart_versions: those with the keys that are written."""

    chart: ClassVar[str]
    repository: ClassVar[str]
    chart_versions: ClassVar[str]
    newest_chart: ClassVar[str]

    chart_version: str | None = Field(
        None, max_length=40, description="Version of the chart. Default: the newest known."
    )
    shm_gib: int = Field(8, ge=1, le=1024, description=SHARED_MEMORY)
    token_secret: str | None = Field(None, pattern=_SUBDOMAIN, max_length=253, description=TOKEN_SECRET)

    def written_for(self) -> str:
        """With the versions of the chart."""
        return f"{super().written_for()} {self.chart_versions}"

    def preflight(self) -> None:
        """Check the version of the chart too. Raises `SpecError`."""
        super().preflight()
        self.pinned_chart()
        if self.token_secret is not None and self.address().scheme != "hf":
            raise SpecError(
                "token_secret opens a private hf:// model, and model_uri is none", remedy="remove token_secret"
            )

    def pinned_chart(self) -> str:
        """The version of the chart. Raises `SpecError` for one whose keys are not known."""
        if self.chart_version is None:
            return self.newest_chart
        try:
            known = Version(self.chart_version) in SpecifierSet(self.chart_versions)
        except InvalidVersion:
            known = False
        if not known:
            raise SpecError(
                f"chart_version {self.chart_version!r} of {self.chart} is outside {self.chart_versions}, for which the "
                "values are written",
                remedy=f"install a version inside, such as {self.newest_chart}",
            )
        return self.chart_version.removeprefix("v")

    def command(self) -> str:
        """``helm upgrade --install`` with the chart pinned."""
        return (
            f"helm upgrade --install {self.service_name} {self.chart} --repo {self.repository} "
            f"--version {self.pinned_chart()} --namespace {self.namespace} --values serving/{self.name}/values.yaml"
        )
