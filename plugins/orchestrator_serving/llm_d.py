"""llm-d: values for the chart llm-d-modelservice 0.4, one set of pods that decode and prefill.

Keys are those of its values.schema.json and of templates/_helpers.tpl, which adds to ``vllm serve`` the model, the
port, ``--served-model-name`` and, from ``decode.parallelism.tensor``, ``--tensor-parallel-size``. The chart reads hf://
and pvc:// only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from orchestrator.api import KVPlan, ModelShape, Stage
from orchestrator_serving.manifests import PORT, ChartValues, arguments

_CONTAINER = "vllm"


class LLMD(ChartValues):
    """Renders ``values.yaml`` for llm-d-modelservice >=0.4,<0.5; vLLM comes with the image, which is pinned."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "llm_d"
    paper: ClassVar = "No paper: the Helm chart llm-d-modelservice, 0.4."
    manifest: ClassVar = "the Helm chart llm-d-modelservice"
    chart: ClassVar = "llm-d-modelservice"
    repository: ClassVar = "https://llm-d-incubation.github.io/llm-d-modelservice/"
    chart_versions: ClassVar = ">=0.4,<0.5"
    newest_chart: ClassVar = "0.4.15"

    def values(self, shape: ModelShape, plan: KVPlan) -> tuple[str, dict[str, Any]]:
        """The values. Raises `SpecError` as `render` does."""
        flags = arguments(self.settings(shape, plan), leave_out=["tensor-parallel-size"])
        container = {
            "name": _CONTAINER,
            "image": self.image_reference(),
            "modelCommand": "vllmServe",
            "args": flags,
            "env": self.environment(),
            "ports": [{"containerPort": PORT, "name": "metrics", "protocol": "TCP"}],
            "resources": self.resources(plan),
            "mountModelVolume": True,
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            "extraConfig": {"startupProbe": _probe(failures=180), "readinessProbe": _probe(failures=3)},
        }
        artifacts: dict[str, Any] = {
            "name": self.service_name,
            "uri": self.address().uri,
            "labels": {"llm-d.ai/inferenceServing": "true", "llm-d.ai/model": self.service_name},
        }
        if self.address().scheme == "hf":
            # The chart's default for what it fetches to is 5 MiB. Twice the weights: tokenizer, and rounding.
            weights = plan.weight_bytes * plan.tensor_parallel_size
            artifacts["size"] = f"{2 * -(-weights // 2**30)}Gi"
        if self.token_secret is not None:
            artifacts["authSecretName"] = self.token_secret
        values: dict[str, Any] = {
            "fullnameOverride": self.service_name,
            "modelArtifacts": artifacts,
            "accelerator": {"type": "nvidia", "resources": {"nvidia": self.gpu_resource}},
            # Nothing is prefilled elsewhere, so requests need no proxy in front of vLLM.
            "routing": {"servicePort": PORT, "proxy": {"enabled": False}},
            "decode": {
                "create": True,
                "replicas": self.replicas,
                "parallelism": {"tensor": plan.tensor_parallel_size, "data": 1},
                "containers": [container],
                "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{self.shm_gib}Gi"}}],
            },
            "prefill": {"create": False},
        }
        if self.service_account is not None:
            values["serviceAccountOverride"] = self.service_account
        return "values.yaml", values


def _probe(failures: int) -> dict[str, Any]:
    """Asks vLLM every 10 seconds whether it is well; failures: how often it may not be."""
    return {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 10, "failureThreshold": failures}
