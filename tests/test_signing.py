"""Signatures of releases, against the stock tool of OpenSSF; the bill of materials, against CycloneDX's own schema."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from orchestrator.bill import BILL, check_bill, write_bill
from orchestrator.bundle import bundle_digest
from orchestrator.canonical import file_sha256
from orchestrator.card import SOURCE_CARD, write_card
from orchestrator.errors import OrchestratorError, PreflightError, PublishError
from orchestrator.gates import GateResult
from orchestrator.provenance import Evidence, Provenance, front_matter
from orchestrator.release import StoredFile
from orchestrator.signing import SigningKey, VerifyKey
from orchestrator.store import open_store

NAME = "tiny/3f2a"


def make_keys(folder: Path, name: str, *arguments: str) -> tuple[Path, Path]:
    """Write a private and a public key; `arguments`: "P-384", "encrypted"."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = ec.generate_private_key(ec.SECP384R1() if "P-384" in arguments else ec.SECP256R1())
    password = BestAvailableEncryption(b"hush") if "encrypted" in arguments else NoEncryption()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path, "mine")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "serving" / "vllm").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "serving.json").write_text("{}")  # sorts between a folder and what is in it
    (folder / "serving" / "vllm" / "vllm.yaml").write_text("port: 8000\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # model-signing leaves it out
    return folder


def stock(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run model_signing's own command line."""
    program = Path(sys.executable).with_name("model_signing")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def message(error: pytest.ExceptionInfo[OrchestratorError]) -> str:
    assert error.value.problems[0].remedy
    return str(error.value)


@pytest.mark.parametrize("curve", ["P-256", "P-384"])
def test_the_stock_tool_verifies_what_was_pulled_and_sees_every_change(tmp_path: Path, model: Path, curve: str) -> None:
    pytest.importorskip("model_signing")
    private, public = make_keys(tmp_path, "mine", curve)
    store = open_store(str(tmp_path / "releases"))
    store.publish(NAME, model, {"schema": 1}, signing_key=private)
    pulled = tmp_path / "pulled"
    store.fetch(NAME, pulled, verify_key=public)
    verify = ("verify", "key", "--signature", pulled / "model.sig", "--public_key", public, pulled)
    done = stock(*verify)
    assert done.returncode == 0, done.stdout + done.stderr
    (pulled / "release.json").write_bytes((pulled / "release.json").read_bytes() + b" ")
    done = stock(*verify)
    assert done.returncode != 0 and "release.json" in done.stdout + done.stderr


def test_a_signature_of_the_stock_tool_is_accepted(tmp_path: Path, model: Path, keys: tuple[Path, Path]) -> None:
    """Somebody pulls an unsigned release, signs it with the stock tool, and puts the signature beside it."""
    pytest.importorskip("model_signing")
    store = open_store(str(tmp_path / "releases"))
    release = store.publish(NAME, model, {"schema": 1})
    pulled = tmp_path / "pulled"
    store.fetch(NAME, pulled)
    place = tmp_path / "releases" / NAME / "model.sig"
    done = stock("sign", "key", "--private_key", keys[0], "--signature", place, pulled)
    assert done.returncode == 0, done.stdout + done.stderr
    assert store.fetch(NAME, tmp_path / "again", verify_key=keys[1]) == release


def test_signing_again_is_the_same_release_and_the_same_bytes(
    tmp_path: Path, model: Path, keys: tuple[Path, Path]
) -> None:
    store, place = open_store(str(tmp_path / "releases")), tmp_path / "releases" / NAME
    first = store.publish(NAME, model, {"schema": 1}, signing_key=keys[0])
    signature = (place / "model.sig").read_bytes()
    assert store.publish(NAME, model, {"schema": 1}, signing_key=keys[0]) == first == store.read_release(NAME)
    (place / "model.sig").unlink()
    store.publish(NAME, model, {"schema": 1}, signing_key=keys[0])  # lost, and put back
    assert (place / "model.sig").read_bytes() == signature
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())


def test_what_is_not_signed_by_the_key_demanded_is_refused(
    tmp_path: Path, model: Path, keys: tuple[Path, Path]
) -> None:
    store, place = open_store(str(tmp_path / "releases")), tmp_path / "releases" / NAME
    target, other = tmp_path / "pulled", make_keys(tmp_path, "other")
    store.publish(NAME, model, {"schema": 1})
    with pytest.raises(PublishError, match="is not signed, and a signature is demanded"):
        store.fetch(NAME, target, verify_key=keys[1])
    store.publish(NAME, model, {"schema": 1}, signing_key=other[0])
    with pytest.raises(PublishError) as error:
        store.fetch(NAME, target, verify_key=keys[1])
    named = [VerifyKey.read(key).fingerprint[:16] for key in (other[1], keys[1])]
    assert all(fingerprint in message(error) for fingerprint in named)
    with pytest.raises(PublishError, match="not by the one demanded"):
        store.publish(NAME, model, {"schema": 1}, signing_key=keys[0])  # the first signature stays
    store.fetch(NAME, tmp_path / "unasked")  # about these files, whoever made it
    signature = json.loads((place / "model.sig").read_bytes())
    signature["verificationMaterial"]["publicKey"]["hint"] = VerifyKey.read(keys[1]).fingerprint
    (place / "model.sig").unlink()
    (place / "model.sig").write_text(json.dumps(signature))
    with pytest.raises(PublishError, match="forged or damaged"):
        store.fetch(NAME, target, verify_key=keys[1])
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b'{"dsseEnvelope": 1}', b"\xff", b"[" * 100_000])
def test_a_signature_that_is_none_is_refused_also_where_none_was_demanded(
    tmp_path: Path, model: Path, content: bytes
) -> None:
    store = open_store(str(tmp_path / "releases"))
    store.publish(NAME, model, {"schema": 1})
    (tmp_path / "releases" / NAME / "model.sig").write_bytes(content)
    with pytest.raises(PublishError, match="is no signature"):
        store.fetch(NAME, tmp_path / "pulled")


def test_a_signature_of_another_release_is_refused(tmp_path: Path, model: Path, keys: tuple[Path, Path]) -> None:
    store, root = open_store(str(tmp_path / "releases")), tmp_path / "releases"
    store.publish(NAME, model, {"schema": 1}, signing_key=keys[0])
    store.publish("tiny/other", model, {"schema": 2})  # the same files, another story
    (root / "tiny/other/model.sig").write_bytes((root / NAME / "model.sig").read_bytes())
    with pytest.raises(PublishError, match="about other files"):
        store.fetch("tiny/other", tmp_path / "pulled")


def test_what_somebody_else_says_of_the_same_files_is_not_signed(
    tmp_path: Path, model: Path, keys: tuple[Path, Path]
) -> None:
    store = open_store(str(tmp_path / "releases"))
    store.publish(NAME, model, {"lineage": "a story"})
    with pytest.raises(PublishError) as error:
        store.publish(NAME, model, {"lineage": "ours"}, signing_key=keys[0])
    assert "unsigned, with another release.json" in message(error)


def test_keys_that_are_none_are_refused_without_repeating_them(
    tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = make_keys(tmp_path, "closed", "encrypted")
    with pytest.raises(PreflightError, match="is encrypted; set ORCHESTRATOR_SIGNING_KEY_PASSWORD"):
        SigningKey.read(private)
    monkeypatch.setenv("ORCHESTRATOR_SIGNING_KEY_PASSWORD", "wrong-hush")
    with pytest.raises(PreflightError) as error:
        SigningKey.read(private)
    assert "wrong-hush" not in message(error)
    monkeypatch.setenv("ORCHESTRATOR_SIGNING_KEY_PASSWORD", "hush")
    SigningKey.read(private)
    broken = tmp_path / "broken.key"
    broken.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    for path, read in ((broken, SigningKey.read), (keys[0], VerifyKey.read), (tmp_path / "no", VerifyKey.read)):
        with pytest.raises(PreflightError) as error:
            read(path)
        assert "c2VjcmV0" not in message(error) and str(path) in message(error)


LINEAGE: list[dict[str, Any]] = [
    {
        "stage": stage,
        "method": method,
        "parameters": parameters,
        "plugin": {"distribution": "compression-orchestrator", "version": "0.1.0", "source": "0" * 64},
        "fingerprint": "f" * 64,
        "artifact": "a" * 64,
    }
    for stage, method, parameters in (
        ("calibrate", "text", {"source": {"sha256": "1" * 64}, "sequences": 8}),
        ("quantize", "gptq", {"num_bits": 4, "group_size": None}),
    )
]
GATES = [
    GateResult("perplexity_ratio", "max", 1.05, 1.0123456, None, None, True, "as it should be"),
    GateResult("accuracy.a|b", "must_not_fall", 0.0, -0.01, (-0.02, 0.01), 0.95, True, "it did not fall"),
    GateResult("load_seconds", "max", 1.0, 0.1, None, None, True, "of this machine"),
]
MEASURED = {"perplexity_ratio": 1.0123456, "tokens_per_second": 99.0, "peak_memory_bytes": 1e9, "load_seconds": 0.1}


def provenance(**changes: Any) -> Provenance:
    return Provenance(
        **{
            "name": "tiny",
            "architecture": "LlamaForCausalLM",
            "hub_id": "org/tiny",
            "licence": "apache-2.0",
            "source_digest": "5" * 64,
            "lineage": LINEAGE,
            "evidence": [Evidence.of("perplexity", MEASURED, [gate.as_dict() for gate in GATES])],
            "libraries": {"torch": "2.13.0+cpu", "transformers": "5.20.0"},
            "engines": ["vllm"],
            "formats": [],
            **changes,
        }
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changes", [{}, {"hub_id": None, "licence": None, "evidence": [], "lineage": []}])
def test_the_bill_of_materials_keeps_to_the_schema_and_lists_every_file(model: Path, changes: dict[str, Any]) -> None:
    listed = hashes(model)
    write_bill(model, listed, provenance(**changes))
    text = (model / BILL).read_bytes()
    bill = json.loads(text)
    folder = files(pytest.importorskip("cyclonedx")) / "schema" / "_res"
    schemas = {name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in ("spdx", "jsf-0.82")}
    registry: Any = Registry().with_resources(
        [
            (f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", Resource.from_contents(schema))
            for name, schema in schemas.items()
        ]
    )
    schema = json.loads((folder / "bom-1.6.SNAPSHOT.schema.json").read_text())
    jsonschema.Draft7Validator(schema, registry=registry).validate(bill)
    assert {
        part["name"]: part["hashes"][0]["content"] for part in bill["components"] if part["type"] == "file"
    } == listed
    published = [StoredFile(key, sha256, 1) for key, sha256 in hashes(model).items()]
    check_bill("uri", text, published)
    with pytest.raises(PublishError, match=r"does not fit 'config.json'"):
        check_bill("uri", text, [entry for entry in published if entry.key != "config.json"])
    (model / BILL).unlink()
    write_bill(model, listed, provenance(**changes))
    assert (model / BILL).read_bytes() == text
    if not changes:
        assert {part["version"] for part in bill["components"] if part["name"] == "torch"} == {"2.13.0+cpu"}
        assert any(part["type"] == "data" and part["name"] == f"text {'1' * 16}" for part in bill["components"])


def test_a_release_whose_bill_does_not_fit_is_not_pulled(tmp_path: Path, model: Path) -> None:
    write_bill(model, hashes(model), provenance())
    (model / "config.json").write_text('{"changed": "after the bill was made"}')
    store = open_store(str(tmp_path / "releases"))
    store.publish(NAME, model, {"schema": 1})
    with pytest.raises(PublishError, match=r"bom.cdx.json of .* does not fit 'config.json'"):
        store.fetch(NAME, tmp_path / "out" / "pulled")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_card_is_the_hubs_form_tells_no_time_and_keeps_the_sources_card(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The source\n")
    config = {"quantization_config": {"quant_method": "compressed-tensors"}, "max_position_embeddings": 2048}
    before = bundle_digest(model)
    write_card(model, source, config, provenance(signed_by="c" * 64))
    head, text = front_matter(model / "README.md"), (model / "README.md").read_text()
    assert head["license"] == "apache-2.0" and head["base_model"] == "org/tiny"
    assert head["library_name"] == "transformers" and "quantize" in head["tags"]
    assert "| `perplexity` | perplexity_ratio |  | 1.012 |" in text and "| at most 1.05 | 1.012 |  | yes |" in text
    fallen = "not worse than dense beyond chance (difference), 95 % confidence | -0.01 | -0.02 to 0.01 | yes |"
    assert f"| accuracy.a/b | {fallen}" in text
    assert "per_second" not in text and "memory_bytes" not in text and "load_seconds" not in text
    assert "model_signing verify key" in text and "c" * 64 in text and "`serving/vllm/`" in text
    assert (model / SOURCE_CARD).read_text().endswith("# The source\n")
    again = bundle_digest(model)
    write_card(model, source, config, provenance(signed_by="c" * 64))
    assert bundle_digest(model) == again != before
    unknown = provenance(licence=None, hub_id=None, evidence=[], lineage=[])
    write_card(model, tmp_path / "nowhere", {}, unknown)
    assert "without a statement of its licence" in (model / "README.md").read_text()
    assert "license" not in front_matter(model / "README.md")
