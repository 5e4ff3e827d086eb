"""The files in infra/, applied to a real S3-compatible server: what they grant is enough, and no more."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import open_store
from tests.s3_server import serve

S3 = Path(__file__).parents[1] / "infra" / "s3"
BUCKET = "compressed-models"


def load(name: str) -> Any:
    return json.loads((S3 / name).read_text(encoding="utf-8"))


@pytest.fixture
def publisher_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that enforces policies, the bucket with our lifecycle rule, and a user with our policy only."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "root")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "root")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serve(tmp_path / "server.log") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=load("lifecycle.json"))
        iam = boto3.client("iam", endpoint_url=endpoint)
        iam.create_user(UserName="publisher")
        # Amazon grants HeadBucket to who may ListBucket; this server asks for it by a name of its own.
        policy = (S3 / "policy.json").read_text("utf-8").replace('"s3:ListBucket"', '"s3:ListBucket", "s3:HeadBucket"')
        iam.put_user_policy(UserName="publisher", PolicyName="publisher", PolicyDocument=policy)
        key = iam.create_access_key(UserName="publisher")["AccessKey"]
        rules = s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
        request = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()  # from here on policies are enforced
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        yield rules


def test_the_policy_is_enough_to_publish_and_pull_and_grants_no_more(
    publisher_keys: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import boto3
    from botocore.exceptions import ClientError

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "small.json").write_text("{}", encoding="utf-8")
    (folder / "large.safetensors").write_bytes(b"\x01" * (9 << 20))  # goes up in parts
    store = open_store(f"s3://{BUCKET}/models")
    store.check()
    release = store.publish("a/1", folder, {"schema": 1})
    assert "cannot be listed" not in caplog.text  # uploads that a killed publisher left
    assert store.fetch("a/1", tmp_path / "pulled").digest == release.digest
    s3 = boto3.Session().client("s3")  # the default session keeps the keys it met first
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.delete_object(Bucket=BUCKET, Key="models/a/1/COMPLETE")
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.create_bucket(Bucket="another")


def test_the_lifecycle_rule_ends_abandoned_uploads(publisher_keys: Any) -> None:
    assert [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in publisher_keys] == [2]
    assert [rule["Status"] for rule in publisher_keys] == ["Enabled"]
