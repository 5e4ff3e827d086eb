"""Docker Compose: vLLM in a container, with the release that this file is part of mounted read-only.

Keys are those of the Compose Specification. Nothing is fetched: the model is two folders up, and ``vllm.yaml`` beside
this file is the one of the vllm engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.api import KVPlan, ModelShape, Stage
from orchestrator_serving.manifests import PORT, SHARED_MEMORY, Manifest
from orchestrator_serving.vllm import FILE_NAME as VLLM_FILE
from orchestrator_serving.vllm import VLLM

COMPOSE_FILE = "compose.yaml"
ROOT = "/model"
# The image has Python for certain, and curl not in every version.
_HEALTH = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PORT}/health', timeout=5)"


class Compose(Manifest):
    """Renders ``compose.yaml`` and ``vllm.yaml``. The format has no version; vLLM comes with the image, pinned."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "compose"
    paper: ClassVar = "No paper: the Compose Specification."
    manifest: ClassVar = "Docker Compose"

    published_port: int = Field(8000, ge=1, le=65535, description="Port of this machine at which vLLM answers.")
    bind_address: str = Field(
        "127.0.0.1",
        pattern=r"^(\d{1,3}\.){3}\d{1,3}$",
        description="Address of this machine at which it answers; 0.0.0.0 lets everyone in who can reach it.",
    )
    shm_gib: int = Field(8, ge=1, le=1024, description=SHARED_MEMORY)

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return the manifest and vLLM's own file. Raises `SpecError` as that does."""
        return {**super().render(shape, plan), **VLLM.render(self, shape, plan)}

    def values(self, shape: ModelShape, plan: KVPlan) -> tuple[str, dict[str, Any]]:
        """The project, with one service."""
        gpus = {"driver": "nvidia", "count": plan.tensor_parallel_size, "capabilities": ["gpu"]}
        service = {
            "image": self.image_reference(),
            "entrypoint": ["vllm", "serve"],
            "command": [
                "--config",
                f"serving/{self.name}/{VLLM_FILE}",
                "--host=0.0.0.0",
                f"--port={PORT}",
                f"--served-model-name={self.service_name}",
            ],
            "working_dir": ROOT,
            "environment": {"HF_HUB_OFFLINE": "1"},
            "volumes": [
                {
                    "type": "bind",
                    "source": "../..",
                    "target": ROOT,
                    "read_only": True,
                    "bind": {"create_host_path": False},
                }
            ],
            "ports": [{"target": PORT, "published": str(self.published_port), "host_ip": self.bind_address}],
            "shm_size": f"{self.shm_gib}gb",
            "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
            "healthcheck": {
                "test": ["CMD", "python3", "-c", _HEALTH],
                "interval": "15s",
                "timeout": "10s",
                "retries": 3,
                "start_period": "30m",
            },
            "restart": "unless-stopped",
        }
        return COMPOSE_FILE, {"name": self.service_name, "services": {"vllm": service}}

    def command(self) -> str:
        """``docker compose up`` with the file."""
        return f"docker compose -f serving/{self.name}/{COMPOSE_FILE} up --detach --wait"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """Where it answers."""
        return [
            f"It answers at http://{self.bind_address}:{self.published_port}/v1 on this machine, without a password. "
            "Docker needs the NVIDIA container toolkit.",
            *super().notes(shape, plan),
        ]
