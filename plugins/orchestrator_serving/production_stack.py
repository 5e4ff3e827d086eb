"""vLLM production-stack: values for its chart ``vllm-stack`` 0.1, one model.

Keys are those of helm/values.schema.json and of helm/templates/deployment-vllm-multi.yaml, which hands ``modelURL`` to
``vllm serve`` as it is. A claim is therefore mounted as an extra volume, and the model is a path in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from orchestrator.api import KVPlan, ModelShape, Stage
from orchestrator_serving.manifests import TOKEN_KEY, ChartValues, arguments

MOUNT = "/model"
_VOLUME = "model"
# What vllmConfig has a key for; all else goes to extraArgs.
_KEYS = {
    "dtype": "dtype",
    "max-model-len": "maxModelLen",
    "gpu-memory-utilization": "gpuMemoryUtilization",
    "max-num-seqs": "maxNumSeqs",
    "enable-prefix-caching": "enablePrefixCaching",  # the chart turns it off where the key is missing
}


class ProductionStack(ChartValues):
    """Renders ``values.yaml`` for vllm-stack >=0.1.9,<0.2; vLLM comes with the image, which is pinned."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "production_stack"
    paper: ClassVar = "No paper: the Helm chart vllm-stack of vLLM production-stack, 0.1."
    manifest: ClassVar = "the Helm chart vllm-stack"
    chart: ClassVar = "vllm-stack"
    repository: ClassVar = "https://vllm-project.github.io/production-stack"
    chart_versions: ClassVar = ">=0.1.9,<0.2"
    newest_chart: ClassVar = "0.1.13"

    def values(self, shape: ModelShape, plan: KVPlan) -> tuple[str, dict[str, Any]]:
        """The values. Raises `SpecError` as `render` does."""
        settings = self.settings(shape, plan)
        repository, _, tag = self.image_reference().rpartition(":")
        address = self.address()
        claim, _, path = address.rest.partition("/")
        in_claim = address.scheme == "pvc"
        model: dict[str, Any] = {
            "name": self.service_name,
            "repository": repository,
            "tag": tag,
            "modelURL": f"{MOUNT}/{path}" if in_claim else address.rest,
            "replicaCount": self.replicas,
            "requestCPU": self.host_cpus,
            "requestMemory": f"{self.host_memory_gib}Gi",
            "requestGPU": plan.tensor_parallel_size,
            "requestGPUType": self.gpu_resource,
            "shmSize": f"{self.shm_gib}Gi",
            "vllmConfig": {
                **{key: settings[flag] for flag, key in _KEYS.items()},
                "tensorParallelSize": plan.tensor_parallel_size,
                "extraArgs": [
                    *arguments(settings, leave_out=[*_KEYS, "tensor-parallel-size"]),
                    f"--served-model-name={self.service_name}",
                ],
            },
            "env": self.environment(),
        }
        if in_claim:
            model["extraVolumes"] = [
                {"name": _VOLUME, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}},
            ]
            model["extraVolumeMounts"] = [{"name": _VOLUME, "mountPath": MOUNT, "readOnly": True}]
        if self.token_secret is not None:
            model["hf_token"] = {"secretName": self.token_secret, "secretKey": TOKEN_KEY}
        if self.service_account is not None:
            model["serviceAccountName"] = self.service_account
        return "values.yaml", {"servingEngineSpec": {"enableEngine": True, "modelSpec": [model]}}

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What the chart assumes of the cluster."""
        return [
            *super().notes(shape, plan),
            "The chart runs pods with the RuntimeClass nvidia; where the cluster has none, add "
            "--set servingEngineSpec.runtimeClassName=''.",
        ]
