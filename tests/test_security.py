"""What comes from others runs no code, is written nowhere else, and learns no secret of ours."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.artifact import ArtifactStore
from orchestrator.checkpoint import Checkpoint
from orchestrator.cli import app
from orchestrator.errors import OrchestratorError, PreflightError, PublishError
from orchestrator.store import open_store
from tests.tiny import edit_config, make_model

ROOT = Path(__file__).parents[1]
READ_CODE = [
    path
    for source in ("orchestrator", "plugins", "flows")
    for path in sorted((ROOT / source).rglob("*.py"))
    if "__pycache__" not in path.parts
]

# --- No code out of data: the sources -------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "jsonpickle"}
PARSERS_OF_ENTITIES = ("xml.etree", "xml.sax", "xml.dom", "lxml")
# Calls that run text, a shell, or whatever a file brings along.
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "__import__": "imports what a value names",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "tempfile.mktemp": "a name that somebody else can take first",
    "torch.load": "a pickle",
    "torch.hub.load": "code of others",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "shutil.unpack_archive": "writes where the archive says",
}


def dangers(source: str) -> list[str]:
    """What in a Python source could run code that somebody else wrote, or write where they say."""
    return sorted(f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _dangers_of(node))


def _dangers_of(node: Any) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        for name in names:
            if name.partition(".")[0] in UNPICKLERS or name.startswith(PARSERS_OF_ENTITIES):
                yield f"imports {name}"
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "yaml", "torch", "tempfile", "shutil"):
            for name in node.names:
                if f"{node.module}.{name.name}" in FORBIDDEN_CALLS or (node.module, name.name) == ("yaml", "load"):
                    yield f"imports {node.module}.{name.name}"
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def says(name: str, *values: object) -> bool:
        return name in given and isinstance(given[name], ast.Constant) and given[name].value in values  # type: ignore[attr-defined]

    if called in FORBIDDEN_CALLS:
        yield f"{called}: {FORBIDDEN_CALLS[called]}"
    if called == "yaml.load":
        loader = given.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        if loader is None or ast.unparse(loader) not in ("yaml.SafeLoader", "_Loader"):
            yield "yaml.load without a safe loader"
    if says("shell", True):
        yield f"{called}: runs a shell"
    if says("trust_remote_code", True):
        yield f"{called}: runs the code of a model"
    if says("allow_pickle", True):
        yield f"{called}: a pickle"
    if says("weights_only", False):
        yield f"{called}: a pickle"
    if called.endswith("extractall") and "filter" not in given:
        yield f"{called}: writes where the archive says"
    if called.endswith("from_pretrained") and "trust_remote_code" not in given:
        yield f"{called}: does not say that no code of a model is run"
    if "result_serializer" in given and not says("result_serializer", "json"):
        yield f"{called}: results as a pickle"


@pytest.mark.parametrize("path", READ_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_the_loader_of_specifications_makes_no_objects() -> None:
    import yaml

    from orchestrator.yaml_text import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "import joblib.numpy_pickle as x",
        "from dill import loads",
        "import xml.etree.ElementTree as et",
        "from os import system",
        "from yaml import load",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(compile(text, 'a', 'exec'))",
        "__import__(name)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder)",
        "tempfile.mktemp()",
        "tarfile.open(path).extractall(folder)",
        "flow(result_serializer='pickle')",
    ],
)
def test_the_check_of_sources_can_fail(bad: str) -> None:
    assert dangers(f"def f():\n    {bad}\n")


# --- No code out of data: poisoned models ---------------------------------------------------------------------------

SPEC = """version: 1
name: poisoned
model: {id: model}
steps:
  - quantize: rtn
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 16, windows: 2}
  - register: release
    engines: [{vllm: {gpu_memory_gib: 4, max_model_len: 64}}]
"""
# Neither of these may happen.
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}{{ cycler.__init__ }}"


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "boom"))


@dataclass
class Scene:
    """A model in a folder with a specification; what ran would leave `marker`."""

    folder: Path
    marker: Path
    home: Path
    outputs: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def poison(self, *names: str) -> None:
        for name in names:
            (self.model / name).write_bytes(pickle.dumps(Bomb(self.marker)))

    def code(self, name: str) -> None:
        """A Python file that leaves the marker when it is imported."""
        (self.model / name).write_text(
            f"open({str(self.marker)!r}, 'w').write('boom')\n"
            "from transformers import LlamaForCausalLM as EvilModel, LlamaConfig as EvilConfig\n"
            "from transformers import PreTrainedTokenizerFast as EvilTokenizer\n"
        )

    def call(self, *arguments: str) -> int:
        """Run a command; return its exit code. What it printed is in `outputs`."""
        result = CliRunner().invoke(app, list(arguments))
        self.outputs.append(result.output)
        error = result.exception
        if isinstance(error, OrchestratorError):
            self.outputs.append(str(error))
            assert all(problem.remedy or problem.where for problem in error.problems), error
            return error.exit_code
        assert error is None or isinstance(error, SystemExit), repr(error)
        return result.exit_code

    def everything(self) -> list[int]:
        """Exit codes of every command that reads a model: plan, run, serve-config, report, pull."""
        spec = str(self.folder / "spec.yaml")
        codes = [self.call("plan", spec), self.call("run", spec, "--local", "--json")]
        codes.append(
            self.call("serve-config", str(self.model), "--engine=vllm", "--gpu-memory-gib=4", "--max-model-len=64")
        )
        made = sorted((self.home / "artifacts").glob("*")) if (self.home / "artifacts").is_dir() else []
        if made:
            codes.append(self.call("report", str(made[0]), "--output", str(self.folder / "page.html")))
        released = [path.parent for path in (self.home / "releases").rglob("COMPLETE")]
        if released:
            codes.append(self.call("pull", released[0].as_uri(), str(self.folder / "pulled")))
        assert not self.marker.exists()
        return codes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", layers=1)


@pytest.fixture
def scene(tmp_path: Path, tiny: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    home = tmp_path / "home"
    for name, value in (("ORCHESTRATOR_HOME", str(home)), ("MLFLOW_TRACKING_URI", tracking_uri)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    return Scene(tmp_path, tmp_path / "marker", home)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))  # noqa: S301 - that is the question
    assert (tmp_path / "marker").exists()


def test_pickles_beside_safetensors_are_neither_read_nor_released(scene: Scene) -> None:
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "tokenizer.pkl", "vocab.pickle")
    scene.poison(*names)
    (scene.model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    (scene.model / "chat_template.jinja").write_text(JINJA)
    tokenizer = json.loads((scene.model / "tokenizer_config.json").read_text())
    (scene.model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": JINJA}))
    assert scene.everything() == [0, 0, 0, 0, 0]
    released = {path.name for path in (scene.folder / "pulled").rglob("*")}
    assert "model.safetensors" in released
    assert not released & {*names, "pytorch_model.bin.index.json"}


def _only_pickles(scene: Scene) -> None:
    (scene.model / "model.safetensors").unlink()
    scene.poison("pytorch_model.bin")


def _pickle_by_another_name(scene: Scene) -> None:
    scene.poison("model.safetensors")


def _index_of_pickles(scene: Scene) -> None:
    scene.poison("pytorch_model.bin")
    (scene.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')


def _code_for_the_model(scene: Scene) -> None:
    scene.code("modeling_evil.py")
    edit_config(scene.model, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilModel"})


def _code_deep_inside(scene: Scene) -> None:
    scene.code("modeling_evil.py")
    edit_config(scene.model, text_config={"auto_map": {"AutoConfig": "modeling_evil.EvilConfig"}})


def _kernel_of_the_hub(scene: Scene) -> None:
    edit_config(scene.model, _attn_implementation="evil/kernel")


def _adapter(scene: Scene) -> None:
    scene.poison("adapter_model.bin")
    entries = {"base_model_name_or_path": str(scene.folder / "elsewhere"), "peft_type": "LORA", "auto_mapping": None}
    (scene.model / "adapter_config.json").write_text(json.dumps(entries))


def _code_for_the_tokenizer(scene: Scene) -> None:
    scene.code("tokenization_evil.py")
    entries = {"auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}}
    (scene.model / "tokenizer_config.json").write_text(json.dumps({**entries, "tokenizer_class": "EvilTokenizer"}))


def _garbage_for_a_tokenizer(scene: Scene) -> None:
    for path in scene.model.glob("tokenizer*"):
        path.unlink()
    (scene.model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f" + bytes(range(256)))


@pytest.mark.parametrize(
    ("poison", "codes", "said"),
    [
        (_only_pickles, [3, 3, 3], "as a pickle"),
        (_pickle_by_another_name, [3, 3, 0], "cannot be read"),
        (_index_of_pickles, [3, 3, 0], "cannot be read"),
        (_code_for_the_model, [3, 3, 3], "(auto_map)"),
        (_code_deep_inside, [3, 3, 3], "(text_config.auto_map)"),
        (_kernel_of_the_hub, [3, 3, 3], "(_attn_implementation)"),
        (_adapter, [3, 3, 3], "is an adapter, not a model"),
        (_garbage_for_a_tokenizer, [0, 3, 0, 0], "no tokenizer that Transformers can read"),
    ],
)
def test_a_model_that_would_run_code_is_refused(
    scene: Scene, poison: Callable[[Scene], None], codes: list[int], said: str
) -> None:
    poison(scene)
    assert scene.everything() == codes
    assert said in "".join(scene.outputs)
    assert not (scene.folder / "modules").exists()  # where Transformers would copy the code of a model


def test_a_tokenizer_that_brings_code_runs_none(scene: Scene) -> None:
    _code_for_the_tokenizer(scene)
    codes = scene.everything()
    assert codes[0] == 0
    assert codes[1] in (0, 3)  # whether Transformers has a class for it without the code
    assert not (scene.folder / "modules").exists()


# --- No file elsewhere, and none of ours ----------------------------------------------------------------------------


def test_a_link_out_of_a_model_is_not_followed(scene: Scene) -> None:
    secret = scene.folder / "credentials"
    secret.write_text("aws_secret_access_key = abc")
    (scene.model / "LICENSE.txt").symlink_to(secret)
    (scene.model / "README.md").symlink_to(secret)
    assert scene.call("plan", str(scene.folder / "spec.yaml")) == 3
    assert "is a link to a file outside of the model's folder" in scene.outputs[-1]
    (scene.model / "LICENSE.txt").unlink()
    assert scene.call("run", str(scene.folder / "spec.yaml"), "--local") == 0
    assert not [
        path
        for path in scene.home.rglob("*")
        if path.is_file() and b"aws_secret_access_key" in path.read_bytes()
    ]  # fmt: skip


def test_the_cache_of_the_hub_links_beside_itself(tmp_path: Path, tiny: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert Checkpoint(snapshot).digest() == Checkpoint(tiny).digest()


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", ""])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, tiny: Path, name: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "a" / "b" / "model")
    shutil.copy(tiny / "model.safetensors", tmp_path / "a" / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PreflightError, match="not in the folder"):
        _ = Checkpoint(folder).weight_files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, tiny: Path, name: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    checkpoint = Checkpoint(folder)
    with suppress(PreflightError):  # what is no plain file is missing, or cannot be read
        _ = checkpoint.config, checkpoint.tensors, checkpoint.digest()
    assert name not in (checkpoint.companion_files())


def test_a_specification_is_a_plain_file(tmp_path: Path, scene: Scene) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path):
        assert scene.call("plan", str(path)) == 2
        assert "give a YAML file" in scene.outputs[-1]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_an_artifact_holds_plain_files_alone(tmp_path: Path, kind: str) -> None:
    store = ArtifactStore(tmp_path / "home")
    folder = store.stage("f" * 64)
    (folder / "a").write_text("text")
    facts: dict[str, Any] = dict.fromkeys(("kind", "stage", "method"), "none")
    made = store.commit(
        "f" * 64, folder, {**facts, "identity": {}, "inputs": {}, "invariants": {}, "metrics": {}}, seconds=0,
        peak_memory_bytes=0,
    )  # fmt: skip
    assert made.damage() is None
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_text("text")
    if kind == "link":  # to the very same bytes: they could be others by the time they are read
        (made.path / "a").unlink()
        (made.path / "a").symlink_to(tmp_path / "outside" / "a")
    elif kind == "folder":
        (made.path / "more").symlink_to(tmp_path / "outside")
    else:
        os.mkfifo(made.path / "pipe")
    assert "is no plain file" in str(made.damage())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("link", ["model", "model/1", ".incoming"])
def test_a_store_is_not_left_through_a_link(tmp_path: Path, bundle: Path, link: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    place = tmp_path / "store" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    with pytest.raises(PublishError, match="a link leads out of the store"):
        open_store(str(tmp_path / "store")).publish("model/1", bundle, {})
    assert [path.name for path in victim.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["COMPLETE", "release.json", "config.json"])
def test_a_pipe_in_a_release_is_not_waited_for(tmp_path: Path, bundle: Path, name: str) -> None:
    store = open_store(str(tmp_path / "store"))
    store.publish("model/1", bundle, {})
    path = tmp_path / "store" / "model" / "1" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PublishError):
        store.fetch("model/1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[2J", "x" * 300, "a\u202eb", "sub/" + "y" * 300])
def test_a_release_has_no_names_that_cannot_be_shown_or_stored(tmp_path: Path, bundle: Path, key: str) -> None:
    store = open_store(str(tmp_path / "store"))
    store.publish("model/1", bundle, {})
    folder = tmp_path / "store" / "model" / "1"
    listing = json.loads((folder / "release.json").read_text())
    listing["files"][0]["key"] = key
    _write_listing(folder, listing)
    with pytest.raises(PublishError) as error:
        store.fetch("model/1", tmp_path / "pulled")
    assert error.value.problems[0].remedy
    assert "\x1b" not in str(error.value)
    assert not (tmp_path / "pulled").exists()


def test_two_names_that_some_file_systems_take_for_one_stay_two(tmp_path: Path, bundle: Path) -> None:
    (bundle / "CONFIG.json").write_text("other")
    store = open_store(str(tmp_path / "store"))
    store.publish("model/1", bundle, {})
    store.fetch("model/1", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "CONFIG.json").read_text() == "other"
    assert (tmp_path / "pulled" / "config.json").read_text() == "{}"


def _write_listing(folder: Path, listing: dict[str, Any]) -> None:
    import hashlib

    data = json.dumps(listing).encode()
    for name, content in (("release.json", data), ("COMPLETE", hashlib.sha256(data).hexdigest().encode())):
        (folder / name).chmod(0o644)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("value", ["../x", "/abs", "a/../../x", "..", ".hidden", "a\nb", "x" * 300])
def test_no_name_in_a_specification_leads_elsewhere(scene: Scene, value: str) -> None:
    path = scene.folder / "spec.yaml"
    path.write_text(SPEC.replace("name: poisoned", f"name: {json.dumps(value)}"))
    assert scene.call("plan", str(path)) == 2


def test_an_artifact_cannot_name_its_page(scene: Scene) -> None:
    folder = scene.folder / "made"
    folder.mkdir()
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                **dict.fromkeys(("kind", "stage", "method", "fingerprint"), "../../../evil"),
                "identity": {"name": "../evil", "parameters": {}, "plugin": {"distribution": "a", "version": "1"}},
                "inputs": {"model": "../../evil"},
                "invariants": {},
                "metrics": {},
                "files": {"../../x": {"sha256": "0" * 64, "bytes": 1}},
            }
        )
    )
    assert scene.call("report", str(folder)) == 0
    assert not list(scene.folder.rglob("*evil*"))
    assert len(list((scene.home / "runs").glob("*.html"))) == 1


# --- Secrets stay where they are ------------------------------------------------------------------------------------

SECRETS = {
    "AWS_SESSION_TOKEN": "session-4f9a1c2e7b",
    "MLFLOW_TRACKING_PASSWORD": "tracking-4f9a1c2e7b",
    "PREFECT_API_KEY": "pnu_4f9a1c2e7b",
    "HF_TOKEN": "hf_4f9a1c2e7b",
    "ORCHESTRATOR_SIGNING_KEY_PASSWORD": "signing-4f9a1c2e7b",
    "ORCHESTRATOR_WEBHOOK_SECRET": "webhook-4f9a1c2e7b",
}
MARK = b"4f9a1c2e7b"  # of every secret here


def test_no_secret_is_written_anywhere(
    scene: Scene, s3_bucket: str, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline to production in a bucket, signed, with a webhook that nobody answers; and what goes wrong."""
    from tests.test_signing import make_keys

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    keys = scene.folder.parent / f"{scene.folder.name}-keys"
    keys.mkdir()
    private, _ = make_keys(keys, "signing")
    monkeypatch.setenv("ORCHESTRATOR_SIGNING_KEY", str(private))
    with monkeypatch.context() as patch:  # where the policy is that names the webhook: it is a file of the user's
        patch.setenv("ORCHESTRATOR_PROMOTION_POLICY", str(keys / "promotion.yaml"))
        (keys / "promotion.yaml").write_text(
            f"models:\n  '*':\n    webhook: http://127.0.0.1:9/hooks/{MARK.decode()}?token={MARK.decode()}\n"
        )
        spec = scene.folder / "spec.yaml"
        in_bucket = SPEC.replace("register: release", f"register: release\n    with: {{uri: s3://{s3_bucket}}}")
        spec.write_text(in_bucket.replace("name: poisoned", "name: secretive"))
        for command in ("plan SPEC", "run SPEC --local", "promote secretive 1 --to candidate", "history secretive"):
            arguments = [str(spec) if word == "SPEC" else word for word in command.split()]
            assert scene.call(*arguments) == 0, scene.outputs
        for command in ("report models:/secretive/1", "show models:/secretive/1", "pull models:/secretive/1 DIR"):
            arguments = [str(scene.folder / "pulled") if word == "DIR" else word for word in command.split()]
            assert scene.call(*arguments) == 0, scene.outputs
        assert "127.0.0.1:9" in "".join(scene.outputs)  # the webhook was tried, and its failure told
    assert json.loads((scene.folder / "pulled" / "model.sig").read_text())
    mark = MARK.decode()
    for faulty in (
        SPEC.replace("{id: model}", f"{{id: 'https://u:{mark}@a.b/m?X-Amz-Signature={mark}'}}"),
        SPEC.replace("text.txt", f"https://a.b/text.txt?X-Amz-Signature={mark}"),
        SPEC.replace("register: release", f"register: release\n    with: {{uri: 's3://u:{mark}@bucket'}}"),
        SPEC.replace(
            "register: release", f"register: release\n    with: {{uri: 'https://a.b/c?X-Amz-Signature={mark}'}}"
        ),
    ):
        (keys / "faulty.yaml").write_text(faulty.replace("{id: model}", f"{{id: {scene.model}}}"))
        assert scene.call("plan", str(keys / "faulty.yaml")) in (2, 3)
    for uri in (
        f"postgresql://u:{mark}@127.0.0.1:9/x?sslpassword={mark}",
        f"http://u:{mark}@127.0.0.1:9",
        f"http://127.0.0.1:9/?api_key={mark}&PASSWORD={mark}",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert scene.call("run", str(scene.folder / "spec.yaml"), "--local") == 3
    assert mark not in "".join(scene.outputs)
    key = b"".join(private.read_bytes().split(b"\n")[1:-2])[:40]
    searched = 0
    for root in (scene.folder, Path(tracking_uri.removeprefix("sqlite:///")).parent):
        for path in root.rglob("*"):
            if path.is_file():
                searched += 1
                data = path.read_bytes()
                assert MARK not in data, path
                assert key not in data, path
                assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data, path
    assert searched > 50


# --- Changed bytes --------------------------------------------------------------------------------------------------

KINDS = ("model.safetensors", "README.md", "bom.cdx.json", "serving/vllm/vllm.yaml", "release.json", "COMPLETE")


@pytest.mark.parametrize("name", [*KINDS, "model.sig"])
def test_a_release_with_one_changed_bit_is_neither_promoted_nor_pulled(tmp_path: Path, name: str) -> None:
    from orchestrator.bill import BILL
    from tests.test_signing import make_keys

    private, public = make_keys(tmp_path, "mine")
    bundle = tmp_path / "bundle"
    for key in KINDS[:4]:
        (bundle / key).parent.mkdir(parents=True, exist_ok=True)
        (bundle / key).write_text(f"{key} as it was")
    (bundle / BILL).write_text(json.dumps({"components": _listed(bundle)}))
    store = open_store(str(tmp_path / "store"))
    store.publish("model/1", bundle, {}, signing_key=private)
    store.verify("model/1")
    path = tmp_path / "store" / "model" / "1" / name
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(PublishError) as error:  # exit code 6
        store.fetch("model/1", tmp_path / "pulled", verify_key=public)
    assert error.value.problems[0].remedy
    assert not (tmp_path / "pulled").exists()
    if name != "model.sig":  # whose key `promote` asks for where the policy demands one: tests/test_promotion.py
        with pytest.raises(PublishError):
            store.verify("model/1")


def _listed(bundle: Path) -> list[dict[str, Any]]:
    from orchestrator.canonical import file_sha256

    return [
        {
            "type": "file",
            "name": path.relative_to(bundle).as_posix(),
            "hashes": [{"alg": "SHA-256", "content": file_sha256(path)}],
        }
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "bom.cdx.json"
    ]
