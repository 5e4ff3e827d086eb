"""What a register step adds to a model: card, bill of materials and signature, and what becomes of the key."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from orchestrator.card import write_card
from orchestrator.errors import SpecError
from orchestrator.home import Settings
from orchestrator.plan import make_plan
from orchestrator.plugins import discover
from orchestrator.provenance import Provenance, front_matter
from orchestrator.registry import ModelRegistry
from orchestrator.report import shown
from orchestrator.run import run_locally
from orchestrator.signing import VerifyKey
from orchestrator.store import open_store
from tests.test_run import Watcher
from tests.test_signing import make_keys
from tests.tiny import make_model

SPEC = """\
version: 1
name: papers
model: {id: model}
steps:
  - quantize: rtn
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 32, windows: 12}
    require: {perplexity: {max: 1000000, retain: 0.01, confidence: 0.99}}
  - register: release
    with: {signing_key: keys/my.key}
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}]
    require: {max_concurrency.vllm: {min: 2}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    folder = tmp_path / "material"
    make_model(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    (folder / "text.txt").write_text("a line of words that a model reads\n" * 400, encoding="utf-8")
    (folder / "keys").mkdir()
    make_keys(folder / "keys", "my")
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return folder / "spec.yaml"


def test_a_release_has_its_papers_and_the_key_is_nowhere(spec: Path, tmp_path: Path, tracking_uri: str) -> None:
    settings = Settings(home=tmp_path / "home", tracking_uri=tracking_uri)
    document = run_locally(spec, discover(), settings, Watcher()).document()
    public = spec.parent / "keys" / "my.pub"
    fingerprint = VerifyKey.read(public).fingerprint
    root, name = document["release"]["uri"].rsplit("/", 2)[0], document["release"]["name"]
    open_store(root).fetch(name, tmp_path / "pulled", verify_key=public)
    pulled = tmp_path / "pulled"
    assert front_matter(pulled / "README.md")["license"] == "mit"
    card = (pulled / "README.md").read_text(encoding="utf-8")
    gates = {(gate["metric"], gate["bound"]): gate for step in document["steps"] for gate in step.get("gates", ())}
    rows = {tuple(cells[:3]): cells[3:] for line in card.splitlines() if len(cells := line[2:-2].split(" | ")) == 6}
    assert len(gates) == 3 and fingerprint in card
    for (metric, bound), method, demanded in (
        (("perplexity", "max"), "perplexity", "at most 1,000,000, 99 % confidence"),
        (("perplexity", "retain"), "perplexity", "at least 0.01 of the dense model's retained, 99 % confidence"),
        (("max_concurrency.vllm", "min"), "release", "at least 2"),
    ):
        gate = gates[metric, bound]
        ends = gate["interval"]
        found = [shown("", gate["value"]), f"{shown('', ends[0])} to {shown('', ends[1])}" if ends else ""]
        assert rows[f"`{method}`", metric, demanded] == [*found, "yes"]
    dense, compressed = (next(step["metrics"][name] for step in document["steps"] if step["stage"] == "validate")
                         for name in ("dense_perplexity", "perplexity"))  # fmt: skip
    assert rows["`perplexity`", "perplexity", shown("", dense)][0] == shown("", compressed)
    assert (pulled / "README.source.md").read_text(encoding="utf-8").endswith("# Tiny\n")
    bill = json.loads((pulled / "bom.cdx.json").read_text(encoding="utf-8"))
    assert {"config.json", "README.md"} <= {part["name"] for part in bill["components"]}
    assert document["release"]["signed_by"] == fingerprint
    version = ModelRegistry(tracking_uri).resolve(f"models:/papers/{document['release']['model_version']}")
    assert version.tags["orchestrator.signed_by"] == fingerprint
    secret = "".join((spec.parent / "keys" / "my.key").read_text().splitlines()[1:-1])[:60].encode()
    kept = [path for root in (settings.home, pulled) for path in root.rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if secret in path.read_bytes().replace(b"\n", b"")]
    assert not [path for path in kept if b"my.key" in path.read_bytes()]

    shutil.rmtree(settings.home)  # everything is computed again, and finds its own release
    again = run_locally(spec, discover(), settings, Watcher()).document()
    assert again["release"]["name"] == name


def test_the_key_and_not_its_place_is_part_of_what_a_release_is(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint() -> str:
        return make_plan(spec, discover(), tmp_path / "home").steps[-1].fingerprint

    keys = spec.parent / "keys"
    first = fingerprint()
    (keys / "my.key").rename(keys / "moved.key")
    spec.write_text(SPEC.replace("my.key", "moved.key"), encoding="utf-8")
    assert fingerprint() == first
    make_keys(keys, "moved")
    assert fingerprint() != first
    second = fingerprint()
    spec.write_text(SPEC.replace("    with: {signing_key: keys/my.key}\n", ""), encoding="utf-8")
    unsigned = fingerprint()
    monkeypatch.setenv("ORCHESTRATOR_SIGNING_KEY", str(keys / "moved.key"))
    assert fingerprint() == second != unsigned


def test_a_key_that_is_none_is_a_mistake_in_the_specification(spec: Path, tmp_path: Path) -> None:
    (spec.parent / "keys" / "my.key").write_text("hush-hush", encoding="utf-8")
    with pytest.raises(SpecError) as error:
        make_plan(spec, discover(), tmp_path / "home")
    text = str(error.value)
    assert "spec.yaml:11: steps[2].with.signing_key" in text and "no private key" in text and "hush" not in text


def test_what_the_source_model_says_of_itself_forges_no_part_of_the_card(tmp_path: Path) -> None:
    forged = (
        "mit\n\n## Gates\n\n| forged | yes |\n---\n<img src=x onerror=alert(1)>\x1b[31m \u202e[a](javascript:b) `c`"
    )
    (tmp_path / "source").mkdir()
    head = json.dumps({"license": forged})  # a YAML document as well
    (tmp_path / "source" / "README.md").write_text(f"---\n{head}\n---\n# Source\n", encoding="utf-8")
    assert front_matter(tmp_path / "source" / "README.md")["license"] == forged
    papers = {
        name: Provenance(
            name="papers",
            architecture=text,
            hub_id=text,
            licence=text,
            source_digest="5" * 64,
            lineage=[],
            evidence=[],
            libraries={},
            engines=[],
            formats=[],
            code={text: "c" * 64},
        )
        for name, text in (("forged", forged), ("plain", "org/Tiny_Model-1.5"))
    }
    cards = {}
    for name, provenance in papers.items():
        (folder := tmp_path / name).mkdir()
        write_card(folder, tmp_path / "source", {"max_position_embeddings": "many"}, provenance)
        cards[name] = (folder / "README.md").read_text(encoding="utf-8")
        assert front_matter(folder / "README.md")["library_name"] == "transformers"
    card = cards["forged"]
    assert not {"\x1b", "\u202e"} & set(card)
    lines = card.splitlines()
    assert lines.count("## Gates") == 1 and lines.count("---") == 2
    assert not [line for line in lines if line.startswith("|") and "forged" in line]
    assert "<img" not in re.sub("`[^`]*`", "", card).replace("\\`", "")
    assert front_matter(tmp_path / "forged" / "README.md")["license"] == "other"
    assert "base_model" not in front_matter(tmp_path / "forged" / "README.md")
    assert "Licence of the source model: a licence of its own, see its card; it holds" in card
    plain = front_matter(tmp_path / "plain" / "README.md")
    assert plain["base_model"] == "org/Tiny_Model-1.5" and plain["license"] == "other"
    assert "org/Tiny_Model-1.5 (org/Tiny_Model-1.5), compressed" in cards["plain"]
    assert "- `org/Tiny_Model-1.5`, sha256" in cards["plain"]


@pytest.mark.parametrize("licence", ["mit", "apache-2.0", "llama3.1", "GPL-2.0-only WITH Classpath-exception-2.0"])
def test_a_licence_that_is_one_is_named(tmp_path: Path, licence: str) -> None:
    write_card(tmp_path, tmp_path, {}, Provenance("m", "A", None, licence, "5" * 64, [], [], {}, [], []))
    assert front_matter(tmp_path / "README.md")["license"] == licence
    assert f"source model: {licence}; it holds" in (tmp_path / "README.md").read_text(encoding="utf-8")
