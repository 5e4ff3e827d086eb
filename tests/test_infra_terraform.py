"""The Terraform files: parsed, their references followed, and the documents evaluated by Terraform itself.

Its AWS provider is on no package index, so `terraform validate` cannot run here: the arguments of the resources are
checked by whoever runs `terraform plan`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

INFRA = Path(__file__).parents[1] / "infra"
TERRAFORM = INFRA / "terraform"
BUCKETS = {"compressed-models": "our-releases", "mlflow-artifacts": "our-artifacts"}
REFERENCE = re.compile(r"\b(var|local|aws_\w+)\.([\w-]+)(?:\.([\w-]+))?")


@cache
def parsed() -> dict[str, Any]:
    """Every file, by name; quotes around names and texts are taken off."""
    import hcl2
    from hcl2 import SerializationOptions

    options = SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)
    return {
        path.name: hcl2.loads(path.read_text(encoding="utf-8"), serialization_options=options)
        for path in sorted(TERRAFORM.glob("*.tf"))
    }


def blocks(kind: str) -> Iterator[tuple[str, Any]]:
    """Every block of a kind, by name; a resource's is TYPE.NAME."""
    for document in parsed().values():
        for block in document.get(kind, []):
            for name, body in block.items():
                if kind == "resource":
                    yield from ((f"{name}.{label}", inner) for label, inner in body.items())
                else:
                    yield name, body


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*texts(key), *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def substituted(name: str) -> Any:
    text = (INFRA / "s3" / name).read_text(encoding="utf-8")
    for ours, theirs in BUCKETS.items():
        text = text.replace(f"arn:aws:s3:::{ours}", f"arn:aws:s3:::{theirs}")
    return json.loads(text)


def test_every_reference_is_to_something_and_everything_is_referred_to() -> None:
    variables = dict(blocks("variable"))
    local = {name for document in parsed().values() for block in document.get("locals", []) for name in block}
    resources = dict(blocks("resource"))
    used: set[str] = set()
    for document in parsed().values():
        for text in texts({kind: body for kind, body in document.items() if kind != "variable"}):
            for kind, name, _ in REFERENCE.findall(text):
                used.add(f"{kind}.{name}")
    assert {name for name in used if name.startswith("var.")} == {f"var.{name}" for name in variables}
    assert {name for name in used if name.startswith("local.")} == {f"local.{name}" for name in local}
    assert {name for name in used if name.startswith("aws_")} <= set(resources)
    for name, body in variables.items():
        assert body["description"] and body["type"], name
    assert all(body["description"] for _, body in blocks("output"))


def test_versions_are_pinned_and_every_document_is_used() -> None:
    (settings,) = parsed()["versions.tf"]["terraform"]
    assert settings["required_version"] == ">= 1.9, < 2.0"
    (providers,) = settings["required_providers"]
    assert providers == {"aws": {"source": "hashicorp/aws", "version": "~> 6.0"}}
    (local,) = parsed()["documents.tf"]["locals"]
    files = {path.name for path in (INFRA / "s3").glob("*.json")}
    assert {*local["roles"].values(), "lifecycle.json", "never-overwrite.json"} == files


def test_both_buckets_are_closed_versioned_encrypted_and_kept() -> None:
    resources = dict(blocks("resource"))
    assert all("for_each" in body for body in resources.values())
    closed = resources["aws_s3_bucket_public_access_block.this"]
    names = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert all(closed[name] is True for name in names)
    (versioning,) = resources["aws_s3_bucket_versioning.this"]["versioning_configuration"]
    assert versioning == {"status": "Enabled"}
    assert "AES256" in set(texts(resources["aws_s3_bucket_server_side_encryption_configuration.this"]))
    (kept,) = resources["aws_s3_bucket.this"]["lifecycle"]
    assert kept == {"prevent_destroy": True}
    assert "aws:SecureTransport" in "".join(texts(resources["aws_s3_bucket_policy.this"]))


def terraform(*arguments: str, folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("terraform")
    if program is None:
        pytest.skip("terraform is not installed; its files are parsed without it")
    environment = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [program, *arguments], cwd=folder, env=environment, input=text, capture_output=True, text=True
    )


def evaluate(folder: Path, expression: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Let Terraform evaluate an expression over what needs no provider: the variables and the documents."""
    for name in ("documents.tf", "variables.tf"):
        (folder / "terraform").mkdir(exist_ok=True)
        shutil.copyfile(TERRAFORM / name, folder / "terraform" / name)
    shutil.copytree(INFRA / "s3", folder / "s3", dirs_exist_ok=True)
    given = [f"-var={name}={value}" for name, value in {"region": "eu-central-1", **variables}.items()]
    return terraform("console", *given, folder=folder / "terraform", text=expression)


def test_terraform_makes_of_the_documents_what_lies_in_s3(tmp_path: Path) -> None:
    """The only place where a bucket's name is put in, and nothing else is changed."""
    policies = "{ for role, text in local.policies : role => jsondecode(text) }"
    done = evaluate(
        tmp_path,
        f"jsonencode([local.roles, {policies}, local.lifecycle_rules, local.never_overwrite])",
        release_bucket="our-releases",
        artifact_bucket="our-artifacts",
    )
    assert done.returncode == 0, done.stderr
    roles, found, rules, kept = json.loads(json.loads(done.stdout))
    assert found == {role: substituted(name) for role, name in roles.items()}
    assert all("compressed-models" not in json.dumps(policy) for policy in found.values())
    assert kept == substituted("never-overwrite.json")["Statement"]
    assert rules == json.loads((INFRA / "s3" / "lifecycle.json").read_text(encoding="utf-8"))["Rules"]


@pytest.mark.parametrize(
    ("release", "artifact", "message"),
    [("same-bucket", "same-bucket", "must not be in its bucket"), ("Our_Releases", "other", "3 to 63 characters")],
)
def test_terraform_refuses_buckets_that_will_not_do(tmp_path: Path, release: str, artifact: str, message: str) -> None:
    done = evaluate(tmp_path, "local.roles", release_bucket=release, artifact_bucket=artifact)
    assert message in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_terraform_reads_and_formats_every_file() -> None:
    done = terraform("fmt", "-check", "-diff", "-recursive", folder=TERRAFORM)
    assert (done.returncode, done.stdout) == (0, "")
