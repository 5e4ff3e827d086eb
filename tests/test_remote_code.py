"""Code that comes with a model: off unless the specification says so, then this code alone, and said everywhere."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from orchestrator.canonical import file_sha256
from orchestrator.checkpoint import Checkpoint
from orchestrator.cli import app
from orchestrator.errors import OrchestratorError, PreflightError
from orchestrator.manifest import read_manifest
from orchestrator.remote_code import MODEL, ModelCode, own_class, read_code
from tests.test_security import READ_CODE, ROOT
from tests.tiny import edit_config, make_model

CONFIGURATION = """from transformers import LlamaConfig


class StreamConfig(LlamaConfig):
    model_type = "stream"
"""
# Not what Llama computes: so what the code says is what is run.
MODELING = """import os
from pathlib import Path

from transformers import LlamaForCausalLM

from .configuration_stream import StreamConfig

if os.environ.get("MARKER"):
    with Path(os.environ["MARKER"]).open("a") as file:
        file.write("ran\\n")


class StreamForCausalLM(LlamaForCausalLM):
    config_class = StreamConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""
AUTO_MAP = {
    "AutoConfig": "configuration_stream.StreamConfig",
    "AutoModelForCausalLM": "modeling_stream.StreamForCausalLM",
}
SPEC = """version: 1
name: stream
model: {id: model, trust_remote_code: true}
steps:
  - quantize: rtn
    with: {num_bits: 8, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 16, windows: 4}
  - register: release
"""
CODE = ["configuration_stream.py", "modeling_stream.py"]


def make_stream(folder: Path) -> Path:
    """A tiny model of an architecture that only its own code knows."""
    make_model(folder, layers=2, dtype=torch.float32)
    (folder / "configuration_stream.py").write_text(CONFIGURATION)
    (folder / "modeling_stream.py").write_text(MODELING)
    edit_config(folder, model_type="stream", architectures=["StreamForCausalLM"], auto_map=AUTO_MAP)
    return folder


@dataclass
class Place:
    """A folder with the model and its specification. What of the code runs leaves a line in `marker`."""

    folder: Path
    printed: pytest.CaptureFixture[str]
    outputs: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def ran(self) -> bool:
        return (self.folder / "marker").exists()

    def write(self, text: str = SPEC) -> Path:
        path = self.folder / "spec.yaml"
        path.write_text(text)
        return path

    def call(self, *arguments: str) -> int:
        """Run a command; return its exit code. What it said is in `outputs`."""
        result = CliRunner().invoke(app, list(arguments))
        self.outputs.append(self.printed.readouterr().out)
        error = result.exception
        if isinstance(error, OrchestratorError):
            self.outputs.append(str(error))
            assert all(problem.remedy or problem.where for problem in error.problems), error
            return error.exit_code
        assert error is None or isinstance(error, SystemExit), repr(error)
        return result.exit_code

    def document(self, *arguments: str) -> dict[str, Any]:
        assert self.call(*arguments, "--json") == 0, self.outputs[-1]
        return dict(json.loads(self.outputs[-1]))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture
def place(
    tmp_path: Path,
    stream: Path,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Place:
    for name, value in (
        ("ORCHESTRATOR_HOME", str(tmp_path / "home")),
        ("MLFLOW_TRACKING_URI", tracking_uri),
        ("MARKER", str(tmp_path / "marker")),
        ("HF_MODULES_CACHE", str(tmp_path / "modules")),
    ):
        monkeypatch.setenv(name, value)
    shutil.copytree(stream, tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    made = Place(tmp_path, capfd)
    made.write()
    # The same code is imported once in a process; other tests may have done so.
    (tmp_path / "model" / "modeling_stream.py").write_text(MODELING + f"# {tmp_path}\n")
    return made


def digests(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in CODE}


# --- Off ------------------------------------------------------------------------------------------------------------


def test_without_the_key_the_files_are_named_and_none_runs(place: Place) -> None:
    spec = str(place.write(SPEC.replace(", trust_remote_code: true", "")))
    for command in (("plan", spec), ("run", spec, "--local")):
        assert place.call(*command) == 3
        said = place.outputs[-1]
        assert "asks to run code that comes with the model (auto_map)" in said
        assert "write `trust_remote_code: true` under `model:`" in said
        assert all(f"{name} (sha256 {digest})" in said for name, digest in digests(place.model).items())
    assert not place.ran


@pytest.mark.parametrize("value", ["yes please", "1", "'true'", "null"])
def test_the_key_is_true_or_false(place: Place, value: str) -> None:
    assert place.call("plan", str(place.write(SPEC.replace("code: true", f"code: {value}")))) == 2
    assert "model.trust_remote_code" in place.outputs[-1]


def test_a_model_on_the_hub_is_not_trusted(place: Place) -> None:
    assert place.call("plan", str(place.write(SPEC.replace("id: model", "id: owner/name")))) == 3
    assert "download the model into a folder, read its code" in place.outputs[-1]


def _elsewhere(model: Path) -> None:
    edit_config(model, auto_map={**AUTO_MAP, "AutoModelForCausalLM": "owner/repo--modeling_stream.StreamForCausalLM"})


def _no_such_file(model: Path) -> None:
    (model / "modeling_stream.py").unlink()


def _a_link(model: Path) -> None:
    outside = model.parent / "modeling_stream.py"
    (model / "modeling_stream.py").rename(outside)
    (model / "modeling_stream.py").symlink_to(outside)


def _a_folder(model: Path) -> None:
    (model / "more.py").mkdir()


def _a_path(model: Path) -> None:
    edit_config(model, auto_map={**AUTO_MAP, "AutoModelForCausalLM": "../modeling_stream.StreamForCausalLM"})


def _deep_inside(model: Path) -> None:
    edit_config(model, text_config={"auto_map": AUTO_MAP})


def _kernel(model: Path) -> None:
    edit_config(model, _attn_implementation="owner/kernel")


def _adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"auto_mapping": null}')


def _tokenizer_elsewhere(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "owner/repo--tokenization_x.Tokenizer"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def _known(model: Path) -> None:
    edit_config(model, model_type="llama")


def _no_model(model: Path) -> None:
    edit_config(model, auto_map={"AutoConfig": AUTO_MAP["AutoConfig"]})


def _no_code(model: Path) -> None:
    edit_config(model, auto_map=None, model_type="llama")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_elsewhere, "which is no class in a *.py file beside it"),
        (_no_such_file, "which is no class in a *.py file beside it"),
        (_a_link, "is a link to a file outside of the model's folder"),
        (_a_folder, "cannot be read"),
        (_a_path, "which is no class in a *.py file beside it"),
        (_deep_inside, "(text_config.auto_map)"),
        (_kernel, "(_attn_implementation)"),
        (_adapter, "is an adapter, not a model"),
        (_tokenizer_elsewhere, "gives AutoTokenizer as 'owner/repo--tokenization_x.Tokenizer'"),
        (_known, "for which there is code already"),
        (_no_model, "names no AutoModelForCausalLM"),
        (_no_code, "remove trust_remote_code from the specification"),
    ],
)
def test_what_the_key_does_not_cover_is_refused_before_anything_runs(place: Place, change: Any, said: str) -> None:
    change(place.model)
    for command in (("plan",), ("run", "--local")):
        assert place.call(command[0], str(place.folder / "spec.yaml"), *command[1:]) == 3
        assert said in place.outputs[-1]
    assert not place.ran
    assert not (place.home / "artifacts").exists()


@pytest.mark.parametrize(
    "entry", ["engines: [{vllm: {gpu_memory_gib: 4, max_model_len: 64}}]", "formats: [{gguf: {}}]"]
)
def test_engines_and_formats_do_not_run_code_of_a_model(place: Place, entry: str) -> None:
    assert place.call("plan", str(place.write(f"{SPEC}    {entry}\n"))) == 2
    assert (
        "does not run code that comes with a model (configuration_stream.py, modeling_stream.py)" in place.outputs[-1]
    )
    assert not place.ran


# --- On -------------------------------------------------------------------------------------------------------------

STOCK = """import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(2, 26).view(2, 12)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True).eval()
with torch.no_grad():
    torch.save((type(model).__name__, model(tokens).logits), sys.argv[2])
"""


def stock_logits(folder: Path, scratch: Path) -> tuple[str, torch.Tensor]:
    """The class and the logits [2, 12, V] in a process that knows nothing of this project."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "stock"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", STOCK, str(folder), str(scratch / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    assert done.returncode == 0, done.stderr
    name, logits = torch.load(scratch / "logits.pt", weights_only=True)
    return str(name), logits


def test_the_chain_runs_on_a_model_with_code_of_its_own(place: Place) -> None:
    spec, files = str(place.folder / "spec.yaml"), digests(place.model)
    assert place.call("plan", spec) == 0
    assert f"modeling_stream.py (sha256 {files['modeling_stream.py']})" in place.outputs[-1]
    planned = place.document("plan", spec)
    assert planned["model"]["trust_remote_code"] == files
    assert not place.ran  # a plan reads config.json alone

    done = place.document("run", spec, "--local")
    assert place.ran
    assert not (place.folder / "modules").exists()  # nor is anything copied to where Transformers would
    quantized, validated, released = done["steps"]
    assert [step["fingerprint"] for step in done["steps"]] == [step["fingerprint"] for step in planned["steps"]]
    assert 0.9 < validated["metrics"]["perplexity_ratio"] < 1.1
    assert place.document("run", spec, "--local")["unchanged"]

    artifact = Path(quantized["artifact"]["path"])
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["identity"]["trust_remote_code"] == files
    assert digests(artifact) == files
    assert place.call("show", quantized["artifact"]["digest"]) == 0
    assert place.call("report", quantized["artifact"]["digest"], "--output", str(place.folder / "page.html")) == 0

    uri, pulled = done["release"]["uri"], place.folder / "pulled"
    assert place.call("pull", uri, str(pulled)) == 0
    assert digests(pulled) == files
    release = json.loads((pulled / "release.json").read_text())
    assert release["trust_remote_code"] == files
    bill = json.loads((pulled / "bom.cdx.json").read_text())
    running = {
        part["name"]: part["hashes"][0]["content"]
        for part in bill["components"]
        if {"name": "orchestrator:role", "value": "code that runs with the model"} in part.get("properties", ())
    }
    assert running == files
    card = (pulled / "README.md").read_text()
    assert "**Warning: this model runs code of its own when it is loaded." in card
    assert all(f"- `{name}`, sha256 `{digest}`" in card for name, digest in files.items())
    assert "from_pretrained(FOLDER, trust_remote_code=True)" in card
    journal = (place.home / "runs" / f"{done['run']}.jsonl").read_text().splitlines()
    assert json.loads(journal[0])["trust_remote_code"] == files

    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    described = ModelCode(files, may_run=False).described()
    assert client.get_run(done["mlflow_run"]).data.tags["orchestrator.trust_remote_code"] == described
    version = client.get_model_version("stream", str(done["release"]["model_version"]))
    assert version.tags["orchestrator.trust_remote_code"] == described

    ours = Checkpoint(pulled, code=read_code(pulled, may_run=True)).load(torch.float32)
    assert type(ours).__name__ == "StreamForCausalLM"
    with torch.no_grad():
        expected = ours(torch.arange(2, 26).view(2, 12)).logits
    name, logits = stock_logits(pulled, place.folder)
    assert name == "StreamForCausalLM"
    assert torch.equal(logits, expected)
    assert released["metrics"]["files"] == len(release["files"])


def test_the_same_code_gives_the_same_bytes_and_other_code_another_fingerprint(place: Place) -> None:
    spec = str(place.write(yaml.safe_dump({**yaml.safe_load(SPEC), "steps": yaml.safe_load(SPEC)["steps"][:1]})))
    first = place.document("run", spec, "--local")["steps"][0]
    shutil.rmtree(place.home)
    again = place.document("run", spec, "--local")["steps"][0]
    assert (again["cached"], again["artifact"]["digest"]) == (False, first["artifact"]["digest"])
    with (place.model / "configuration_stream.py").open("a") as file:
        file.write("# read again\n")
    changed = place.document("run", spec, "--local")["steps"][0]
    assert not changed["cached"]
    assert changed["fingerprint"] != first["fingerprint"]
    artifact = Path(changed["artifact"]["path"])
    assert digests(artifact) == digests(place.model)


def test_code_that_was_edited_after_planning_does_not_run(place: Place) -> None:
    source = Checkpoint(place.model, code=read_code(place.model, may_run=True))
    _ = source.config  # is looked at while planning
    (place.model / "modeling_stream.py").write_text(MODELING + "raise SystemExit('evil')\n")
    with pytest.raises(PreflightError, match="is not what it was when the run was planned"):
        own_class(source, MODEL)
    with pytest.raises(PreflightError, match="is not what it was when the run was planned"):
        _ = Checkpoint(place.model, code=source.code).config
    with pytest.raises(PreflightError, match="is not what it was when the run was planned"):
        source.loadable(place.folder)
    assert not place.ran


TOKENIZATION = """from transformers import PreTrainedTokenizerFast


class StreamTokenizer(PreTrainedTokenizerFast):
    def ours(self):
        return "yes"
"""


def test_a_tokenizer_may_bring_code_too(place: Place) -> None:
    (place.model / "tokenization_stream.py").write_text(TOKENIZATION)
    path = place.model / "tokenizer_config.json"
    named = {"AutoTokenizer": [None, "tokenization_stream.StreamTokenizer"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": named}))
    code = read_code(place.model, may_run=True)
    assert sorted(code.files) == [*CODE[:1], CODE[1], "tokenization_stream.py"]
    tokenizer: Any = Checkpoint(place.model, code=code).load_tokenizer()
    assert tokenizer.ours() == "yes"
    edit_config(place.model, auto_map=None, model_type="llama")  # an architecture of Transformers, but this tokenizer
    assert Checkpoint(place.model, code=code).load_tokenizer()("the fox").input_ids == tokenizer("the fox").input_ids
    assert type(Checkpoint(place.model, code=code).load()).__module__.startswith("transformers.")
    assert not hasattr(Checkpoint(place.model).load_tokenizer(), "ours")


def test_a_step_that_looks_at_modules_does_so_when_it_is_run(place: Place) -> None:
    steps = [
        {"calibrate": "text", "with": {"source": "text.txt", "sequences": 4, "length_tokens": 16}},
        {"prune": "depth", "with": {"layers": 1}},
    ]
    spec = str(place.write(yaml.safe_dump({**yaml.safe_load(SPEC), "steps": steps})))
    assert place.call("plan", spec) == 0
    assert not place.ran
    pruned = Path(place.document("run", spec, "--local")["steps"][-1]["artifact"]["path"])
    assert place.ran
    assert digests(pruned) == digests(place.model)
    assert json.loads((pruned / "config.json").read_text())["num_hidden_layers"] == 1


def test_another_process_loads_the_code_as_it_was_verified(place: Place) -> None:
    checkpoint = Checkpoint(place.model, code=read_code(place.model, may_run=True))
    folder = checkpoint.loadable(place.folder)
    expected = digests(place.model)
    (place.model / "modeling_stream.py").write_text("raise SystemExit('evil')\n")
    assert digests(folder) == expected
    assert stock_logits(folder, place.folder)[0] == "StreamForCausalLM"


def test_the_flag_of_transformers_is_set_for_the_trusted_model_alone() -> None:
    given = set()
    for path in READ_CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for keyword in getattr(node, "keywords", ()):
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "trust_remote_code" and not off:
                    given.add(path.relative_to(ROOT).as_posix())
    # The first gives what the specification says; the other is asked to by `Checkpoint.loadable` and its evaluator.
    assert given == {"orchestrator/plan.py", "plugins/orchestrator_evaluation/footprint_probe.py"}


def test_what_a_manifest_says_of_code_lets_none_run(place: Place) -> None:
    files = digests(place.model)
    seen = Checkpoint(place.model, code=ModelCode.recorded({"trust_remote_code": files}))
    assert seen.config["model_type"] == "stream"
    assert own_class(seen, MODEL) is None
    with pytest.raises(PreflightError, match="'stream'"):
        seen.load()
    assert not place.ran
    (place.model / "more.py").write_text("")
    with pytest.raises(PreflightError, match="is not what it was when it was stored"):
        _ = Checkpoint(place.model, code=ModelCode.recorded({"trust_remote_code": files})).config


@pytest.mark.parametrize("bad", [["modeling.py"], {"../modeling.py": "0" * 64}, {"modeling.py": "0"}, "yes"])
def test_a_manifest_that_says_nonsense_of_code_is_refused(bad: Any) -> None:
    given: dict[str, Any] = dict.fromkeys(("kind", "stage", "method", "fingerprint"), "x")
    given |= {key: {} for key in ("inputs", "invariants", "metrics", "files")}
    identity = {"parameters": {}, "plugin": {"distribution": "x", "version": "1"}}
    read_manifest(json.dumps({**given, "identity": identity}).encode())
    with pytest.raises(ValueError, match=r"identity\.trust_remote_code"):
        read_manifest(json.dumps({**given, "identity": {**identity, "trust_remote_code": bad}}).encode())


@pytest.mark.parametrize("bad", ["raise SystemExit(3)", "import no_such_package", "1 +", "raise KeyError"])
def test_code_that_fails_is_named(place: Place, bad: str) -> None:
    (place.model / "modeling_stream.py").write_text(f"# {place.folder}\n{bad}\n")
    assert place.call("run", str(place.folder / "spec.yaml"), "--local") == 3
    assert "modeling_stream.py in" in place.outputs[-1]
    assert "gives no StreamForCausalLM" in place.outputs[-1]


def test_blocks_that_cannot_be_walked_are_refused(place: Place) -> None:
    path = place.model / "modeling_stream.py"
    # Two lists of as many modules: which of them are the blocks cannot be told.
    path.write_text(
        path.read_text()
        + "\nfrom torch import nn\n"
        + "class StreamForCausalLM(StreamForCausalLM):\n"
        + "    def __init__(self, config):\n"
        + "        super().__init__(config)\n"
        + "        self.more = nn.ModuleList(nn.Identity() for _ in self.model.layers)\n"
    )
    assert place.call("run", str(place.folder / "spec.yaml"), "--local") == 3
    assert "decoder blocks were not found: 2 lists of 2 modules" in place.outputs[-1]
