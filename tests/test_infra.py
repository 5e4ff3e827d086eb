"""The documents in infra/s3, in force on a real S3-compatible server: what each grants is enough, needed, no more."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.promotion.approval import Approvals
from orchestrator.promotion.history import Change, History, ReleaseRef
from orchestrator.store import open_store
from orchestrator.store_s3 import PART_BYTES
from tests.s3_server import FaultyProxy, Request, s3_client, serve, use_endpoint

S3 = Path(__file__).parents[1] / "infra" / "s3"
ROLES = {
    "publisher": ["policy.json"],
    "reader": ["reader.json"],
    "promoter": ["promoter.json"],
    "night": ["policy.json", "no-promotion.json"],
    "mlflow": ["mlflow.json"],
}
RELEASES, ARTIFACTS = "compressed-models", "mlflow-artifacts"


def load(name: str) -> Any:
    return json.loads((S3 / name).read_text(encoding="utf-8"))


def actions(document: Any) -> set[str]:
    """Every action that a document allows."""
    found: set[str] = set()
    for statement in document["Statement"]:
        if statement["Effect"] == "Allow":
            action = statement["Action"]
            found |= {action} if isinstance(action, str) else set(action)
    return found


def for_this_server(document: Any) -> Any:
    """Amazon grants HeadBucket to who may ListBucket; this server asks for it by a name of its own."""
    statements = []
    for statement in document["Statement"]:
        listed = [statement["Action"]] if isinstance(statement["Action"], str) else list(statement["Action"])
        extra = ["s3:HeadBucket"] if "s3:ListBucket" in listed else []
        statements.append({**statement, "Action": listed + extra})
    return {**document, "Statement": statements}


def without(document: Any, action: str) -> Any:
    """The document with one action less."""
    statements = []
    for statement in document["Statement"]:
        listed = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        if left := [one for one in listed if one != action]:
            statements.append({**statement, "Action": left})
    return {**document, "Statement": statements}


NEEDED = [
    (role, action) for role in ("publisher", "reader", "promoter") for action in sorted(actions(load(ROLES[role][0])))
]


@dataclass
class Account:
    """A server that enforces policies, with a user for each role, and one for each role and each action it lacks."""

    endpoint: str
    keys: dict[str, tuple[str, str]]
    clients: dict[str, Any] = field(default_factory=dict)

    def act(self, monkeypatch: pytest.MonkeyPatch, user: str) -> Any:
        """Be `user` from here on; return a plain client of theirs."""
        import boto3

        use_endpoint(monkeypatch, self.endpoint)
        key, secret = self.keys[user]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        if user not in self.clients:
            self.clients[user] = boto3.Session().client("s3")  # the default session keeps the keys it met first
        return self.clients[user]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    import boto3

    with serve(tmp_path_factory.mktemp("account") / "server.log") as endpoint:
        root = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
        s3 = boto3.client("s3", endpoint_url=endpoint, **root)
        for bucket in (RELEASES, ARTIFACTS):
            s3.create_bucket(Bucket=bucket)
            s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
            s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=load("lifecycle.json"))
        s3.create_bucket(Bucket="somebody-else")
        rules = s3.get_bucket_lifecycle_configuration(Bucket=RELEASES)["Rules"]
        assert [(rule["Status"], rule["AbortIncompleteMultipartUpload"]) for rule in rules] == [
            ("Enabled", {"DaysAfterInitiation": 2})
        ]
        iam = boto3.client("iam", endpoint_url=endpoint, **root)
        users = {role: [load(name) for name in names] for role, names in ROLES.items()}
        users |= {f"{role} without {action}": [without(load(ROLES[role][0]), action)] for role, action in NEEDED}
        keys = {}
        for user, documents in users.items():
            name = user.replace(" ", "-").replace(":", "-")
            iam.create_user(UserName=name)
            for number, document in enumerate(documents):
                text = json.dumps(for_this_server(document))
                iam.put_user_policy(UserName=name, PolicyName=f"policy-{number}", PolicyDocument=text)
            key = iam.create_access_key(UserName=name)["AccessKey"]
            keys[user] = (key["AccessKeyId"], key["SecretAccessKey"])
        request = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()  # from here on policies are enforced
        yield Account(endpoint, keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small file and one that goes up in two parts."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(PART_BYTES) + b"\x01" * 1000)
    return folder


@pytest.fixture(scope="module")
def released(account: Account, model: Path) -> str:
    """Where there is a release ``a/1`` already."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        account.act(monkeypatch, "publisher")
        open_store(f"s3://{RELEASES}/released").publish("a/1", model, {"schema": 1})
    return "released"


def begin(client: Any, key: str, body: bytes) -> None:
    """Do what a publisher does before it is killed: send one part."""
    upload = client.create_multipart_upload(Bucket=RELEASES, Key=key, ChecksumAlgorithm="SHA256")["UploadId"]
    client.upload_part(Bucket=RELEASES, Key=key, UploadId=upload, PartNumber=1, Body=body)


def uploads(client: Any, prefix: str) -> list[str]:
    found = client.list_multipart_uploads(Bucket=RELEASES, Prefix=prefix).get("Uploads", [])
    return [upload["Key"] for upload in found]


def publish(account: Account, monkeypatch: pytest.MonkeyPatch, user: str, model: Path, root: str) -> None:
    """Everything a publisher does: check, take up an upload that was left, end another, publish, verify."""
    client = account.act(monkeypatch, "publisher")
    begin(client, f"{root}/a/1/model.safetensors", bytes(PART_BYTES))
    begin(client, f"{root}/a/1/stray", b"\x02" * 10)
    account.act(monkeypatch, user)
    store = open_store(f"s3://{RELEASES}/{root}")
    store.check()
    release = store.publish("a/1", model, {"schema": 1})
    assert store.verify("a/1").digest == release.digest
    assert History(store, "a").head() is None


def pull(account: Account, monkeypatch: pytest.MonkeyPatch, user: str, target: Path, root: str) -> None:
    account.act(monkeypatch, user)
    store = open_store(f"s3://{RELEASES}/{root}")
    store.fetch("a/1", target)
    History(store, "a").entries()


def promote(account: Account, monkeypatch: pytest.MonkeyPatch, user: str, root: str) -> None:
    """What a promotion asks of the bucket: verify the release, record a decision, append to the history, read it."""
    account.act(monkeypatch, user)
    store = open_store(f"s3://{RELEASES}/{root}")
    release = store.verify("a/1")
    approvals = Approvals(store, "a")
    approvals.decide("1", release.digest, "production", by="ada", lasts=timedelta(days=1))
    approvals.require(release.digest, "production")
    history = History(store, "a")
    reference = ReleaseRef(name="a/1", uri=release.uri, digest=release.digest)
    history.append(history.head(), Change("promote", "candidate", "1", reference))
    assert [stored.entry.version for stored in history.entries()] == ["1"] * len(history.entries())


def test_a_publisher_resumes_ends_publishes_pulls_and_promotes(
    account: Account, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(account, monkeypatch, "publisher", model, "whole")
    pull(account, monkeypatch, "publisher", tmp_path / "pulled", "whole")
    promote(account, monkeypatch, "publisher", "whole")
    assert uploads(account.act(monkeypatch, "publisher"), "whole/") == []
    assert not [record for record in caplog.records if record.name.startswith("orchestrator")]


def test_the_night_publishes_somebody_promotes_somebody_else_pulls(
    account: Account, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three keys, of which none can do another's work."""
    account.act(monkeypatch, "night")
    open_store(f"s3://{RELEASES}/roles").publish("a/1", model, {"schema": 1})
    with pytest.raises(OrchestratorError, match="denied PutObject"):
        promote(account, monkeypatch, "night", "roles")
    promote(account, monkeypatch, "promoter", "roles")
    with pytest.raises(OrchestratorError, match="denied CreateMultipartUpload"):
        open_store(f"s3://{RELEASES}/roles").publish("a/2", model, {"schema": 1})
    pull(account, monkeypatch, "reader", tmp_path / "pulled", "roles")
    with pytest.raises(OrchestratorError, match="denied PutObject"):
        promote(account, monkeypatch, "reader", "roles")


@pytest.mark.parametrize(("role", "action"), NEEDED)
def test_no_action_can_be_left_out(
    role: str,
    action: str,
    account: Account,
    model: Path,
    released: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    user, root = f"{role} without {action}", f"publisher-{action[3:]}" if role == "publisher" else released
    work: dict[str, Callable[[], None]] = {
        "publisher": lambda: publish(account, monkeypatch, user, model, root),
        "reader": lambda: pull(account, monkeypatch, user, tmp_path / "pulled", root),
        "promoter": lambda: promote(account, monkeypatch, user, root),
    }
    if action == "s3:ListBucketMultipartUploads":  # the one that only helps: what a killed publisher sent stays there
        work[role]()
        assert "cannot be listed" in caplog.text
        assert uploads(account.act(monkeypatch, "publisher"), f"{root}/a/1/stray")
        return
    with pytest.raises(OrchestratorError, match="denied"):
        work[role]()


def attempts(client: Any, bucket: str, key: str) -> dict[str, Callable[[], Any]]:
    """What anybody may want to do with a bucket, by the action that it takes."""
    place = {"Bucket": bucket, "Key": key}
    public = {"BlockPublicAcls": False, "IgnorePublicAcls": False, "BlockPublicPolicy": False}

    def abort() -> None:
        client.abort_multipart_upload(**place, UploadId="none")

    return {
        "s3:ListBucket": lambda: client.list_objects_v2(Bucket=bucket),
        "s3:ListBucketMultipartUploads": lambda: client.list_multipart_uploads(Bucket=bucket),
        "s3:GetObject": lambda: client.get_object(**place),
        "s3:PutObject": lambda: client.put_object(**place, Body=b""),
        "s3:DeleteObject": lambda: client.delete_object(**place),
        "s3:DeleteObjectVersion": lambda: client.delete_object(**place, VersionId="1"),
        "s3:AbortMultipartUpload": abort,
        "s3:ListMultipartUploadParts": lambda: client.list_parts(**place, UploadId="none"),
        "s3:PutObjectAcl": lambda: client.put_object_acl(**place, ACL="public-read"),
        "s3:PutObjectTagging": lambda: client.put_object_tagging(**place, Tagging={"TagSet": []}),
        "s3:DeleteBucket": lambda: client.delete_bucket(Bucket=bucket),
        "s3:PutBucketPolicy": lambda: client.put_bucket_policy(Bucket=bucket, Policy="{}"),
        "s3:PutBucketVersioning": lambda: client.put_bucket_versioning(
            Bucket=bucket, VersioningConfiguration={"Status": "Suspended"}
        ),
        "s3:PutLifecycleConfiguration": lambda: client.delete_bucket_lifecycle(Bucket=bucket),
        "s3:PutPublicAccessBlock": lambda: client.put_public_access_block(
            Bucket=bucket, PublicAccessBlockConfiguration={**public, "RestrictPublicBuckets": False}
        ),
        "s3:CreateBucket": lambda: client.create_bucket(Bucket="a-new-bucket"),
    }


def denied(attempt: Callable[[], Any]) -> bool:
    """Whether the policy refused it; any other answer means that it did not."""
    from botocore.exceptions import ClientError

    try:
        attempt()
    except ClientError as error:
        return str(error.response["Error"]["Code"]) in ("AccessDenied", "403")
    return False


@pytest.mark.parametrize(
    ("role", "bucket", "key", "granted"),
    [
        ("publisher", RELEASES, "no/such/key", actions(load("policy.json"))),
        ("night", RELEASES, "a/.promotion/history/00000009.json", actions(load("policy.json")) - {"s3:PutObject"}),
        ("reader", RELEASES, "no/such/key", {"s3:ListBucket", "s3:GetObject"}),
        ("promoter", RELEASES, "a/1/COMPLETE", {"s3:ListBucket", "s3:GetObject"}),
        ("promoter", RELEASES, "a/.promotion/none.json", {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}),
        ("mlflow", ARTIFACTS, "no/such/key", actions(load("mlflow.json"))),
        *[(role, "somebody-else", "a/.promotion/x", set()) for role in ROLES],
        *[(role, ARTIFACTS, "a/.promotion/x", set()) for role in ROLES if role != "mlflow"],
        ("mlflow", RELEASES, "a/1/COMPLETE", set()),
    ],
)
def test_nothing_else_is_granted(
    role: str, bucket: str, key: str, granted: set[str], account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = account.act(monkeypatch, role)
    allowed = {action for action, attempt in attempts(client, bucket, key).items() if not denied(attempt)}
    assert allowed == granted


def is_refused(request: Request, statement: Any) -> bool:
    """What Amazon documents of the statement's two keys, at a request as it came. (moto denies whatever has them.)

    s3:ObjectCreationOperation is true of PutObject, CopyObject and CompleteMultipartUpload, not of an upload's parts.
    """
    address = urlsplit(request.path)
    query = parse_qs(address.query, keep_blank_values=True)
    whole = request.method == "PUT" and address.path.count("/") > 1 and not query
    known = {
        "s3:if-none-match": request.headers.get("if-none-match"),
        "s3:ObjectCreationOperation": str(whole or (request.method == "POST" and "uploadId" in query)).lower(),
    }
    condition = statement["Condition"]
    return all((known[key] is None) == (value == "true") for key, value in condition["Null"].items()) and all(
        known[key] == value for key, value in condition["Bool"].items()
    )


@pytest.mark.parametrize("direct", [True, False], ids=["urllib3", "boto3"])
def test_nothing_that_publishing_and_promotion_send_could_overwrite(
    direct: bool, model: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So never-overwrite.json forbids overwriting and nothing that we do."""
    (statement,) = load("never-overwrite.json")["Statement"]
    if not direct:
        monkeypatch.setattr("orchestrator.s3_direct.GIVE_UP", 0)
    with FaultyProxy(s3_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store = open_store(f"s3://{s3_bucket}")
        store.check()
        store.publish("a/1", model, {"schema": 1})
        client = s3_client(s3_endpoint)
        lost = [f"a/1/{name}" for name in ("config.json", "model.safetensors", "COMPLETE")]
        for key in lost:
            client.delete_object(Bucket=s3_bucket, Key=key)
        release = store.publish("a/1", model, {"schema": 1})
        assert store.verify("a/1").digest == release.digest
        Approvals(store, "a").decide("1", release.digest, "production", by="ada", lasts=timedelta(days=1))
        change = Change("promote", "candidate", "1", ReleaseRef(name="a/1", uri=release.uri, digest=release.digest))
        history = History(store, "a")
        history.append(history.head(), change)
        sent = [request for request in proxy.requests if request.method in ("PUT", "POST")]
        assert [request for request in sent if is_refused(request, statement)] == []
        guarded = [(one.method, one.headers["if-none-match"]) for one in sent if "if-none-match" in one.headers]
        assert set(guarded) == {("PUT", "*"), ("POST", "*")}
        assert guarded.count(("POST", "*")) == 2  # the file in parts, and once more when it was lost
        direct_puts = [one for one in sent if one.method == "PUT" and "Boto3" not in one.headers.get("user-agent", "")]
        assert bool(direct_puts) == direct

        proxy.requests.clear()
        other = s3_client(proxy.endpoint)
        place = {"Bucket": s3_bucket, "Key": "a/1/COMPLETE"}
        other.put_object(**place, Body=b"forged")
        other.copy_object(**place, CopySource=f"{s3_bucket}/a/1/config.json")
        upload = other.create_multipart_upload(**place)["UploadId"]
        part = {"PartNumber": 1, "ETag": other.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x")["ETag"]}
        other.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": [part]})
        assert [is_refused(request, statement) for request in proxy.requests] == [True, True, False, False, True]


def test_mlflow_keeps_and_finds_artifacts_with_its_key(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own repository, a file that it sends in parts included."""
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    account.act(monkeypatch, "mlflow")
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "page.html").write_text("<p>", encoding="utf-8")
    (folder / "large.bin").write_bytes(bytes(PART_BYTES + 1))
    repository = S3ArtifactRepository(f"s3://{ARTIFACTS}/1/run/artifacts")
    repository.log_artifacts(str(folder))
    assert {file.path: file.file_size for file in repository.list_artifacts()} == {
        "page.html": 3,
        "large.bin": PART_BYTES + 1,
    }
    (tmp_path / "back").mkdir()
    repository.download_artifacts("", str(tmp_path / "back"))
    assert (tmp_path / "back" / "large.bin").stat().st_size == PART_BYTES + 1
    # `mlflow gc` deletes many at once. This server would ask for that on the bucket, where Amazon asks for each object.
