"""KServe: an ``LLMInferenceService`` of serving.kserve.io/v1alpha2, which runs vLLM from KServe's own template.

Field names are those of pkg/apis/serving/v1alpha2/llm_inference_service_types.go. KServe fetches ``spec.model.uri`` to
/mnt/models and ends the command of its template in ``${VLLM_ADDITIONAL_ARGS}``, unquoted and inside ``eval``: only
values that a shell leaves as they are can go there.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from orchestrator.api import KVPlan, ModelShape, SpecError, Stage
from orchestrator_serving.manifests import KubernetesManifest, arguments

API_VERSION = "serving.kserve.io/v1alpha2"
FILE_NAME = "llm-inference-service.yaml"
_CONTAINER = "main"  # that of KServe's template; the two are merged by this name
_PLAIN = re.compile(r"[A-Za-z0-9._/:=,@%+-]+")


class KServe(KubernetesManifest):
    """Renders ``llm-inference-service.yaml``. The API is v1alpha2; vLLM comes with the image, which is pinned."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "kserve"
    paper: ClassVar = "No paper: KServe's LLMInferenceService, API serving.kserve.io/v1alpha2."
    manifest: ClassVar = f"a KServe LLMInferenceService ({API_VERSION})"
    schemes: ClassVar = ("s3", "pvc", "hf")

    def values(self, shape: ModelShape, plan: KVPlan) -> tuple[str, dict[str, Any]]:
        """The resource. Raises `SpecError` for a flag whose value a shell would change."""
        flags = arguments(self.settings(shape, plan))
        for flag in flags:
            if not _PLAIN.fullmatch(flag):
                raise SpecError(
                    f"KServe hands the flags to a shell, which would change {flag!r}",
                    remedy="write JSON as one flag for each of its keys, e.g. kv-transfer-config.kv_role: kv_both",
                )
        container = {
            "name": _CONTAINER,
            "image": self.image_reference(),
            "env": [*self.environment(), {"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(flags)}],
            "resources": self.resources(plan),
        }
        template: dict[str, Any] = {"containers": [container]}
        if self.service_account is not None:
            template["serviceAccountName"] = self.service_account
        return FILE_NAME, {
            "apiVersion": API_VERSION,
            "kind": "LLMInferenceService",
            "metadata": {"name": self.service_name, "namespace": self.namespace},
            "spec": {
                "model": {"uri": self.address().uri, "name": self.service_name},
                "replicas": self.replicas,
                "parallelism": {"tensor": plan.tensor_parallel_size},
                "template": template,
            },
        }

    def environment(self) -> list[dict[str, str]]:
        """Even an hf:// model is on disk when vLLM starts: KServe has fetched it."""
        return [{"name": "HF_HUB_OFFLINE", "value": "1"}]

    def command(self) -> str:
        """``kubectl apply`` with the file."""
        return f"kubectl apply -f serving/{self.name}/{FILE_NAME}"
