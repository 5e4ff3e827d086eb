"""The quickstart's text and the model that is shipped for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import orchestrator.quickstart
from orchestrator.errors import PreflightError
from orchestrator.quickstart.corpus import (
    DOCUMENT_END,
    TRAIN_LIMIT_BYTES,
    VALID_LIMIT_BYTES,
    CorpusFiles,
    is_held_out,
    write_corpus,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = Path(orchestrator.quickstart.__file__).with_name("model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusFiles:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def documents(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split(DOCUMENT_END)[:-1]


def library(root: Path, modules: dict[str, bytes]) -> Path:
    for relative, source in modules.items():
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    return root


def test_no_document_is_in_both_parts_and_counts_are_those_of_the_files(corpus: CorpusFiles) -> None:
    train, valid = documents(corpus.train), documents(corpus.valid)
    assert (len(train), len(valid)) == (corpus.train_modules, corpus.valid_modules)
    assert not set(train) & set(valid)
    assert len(train) > 300 and len(valid) > 10


def test_sizes_are_within_their_limits_and_enough_to_train_and_to_measure_on(corpus: CorpusFiles) -> None:
    assert 5_000_000 < corpus.train.stat().st_size <= TRAIN_LIMIT_BYTES
    assert 300_000 < corpus.valid.stat().st_size <= VALID_LIMIT_BYTES


def test_a_second_writing_gives_the_same_bytes_and_leaves_nothing_else(corpus: CorpusFiles, tmp_path: Path) -> None:
    for _ in range(2):
        again = write_corpus(tmp_path)
    assert again.train.read_bytes() == corpus.train.read_bytes()
    assert again.valid.read_bytes() == corpus.valid.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt", "valid.txt"]


def test_the_side_of_a_module_is_fixed_and_follows_it_through_renames() -> None:
    for held_out in ("inspect.py", "fractions.py", "tomllib/_parser.py", "statistics.py"):
        assert is_held_out(held_out)
    for trained_on in ("argparse.py", "json/decoder.py", "asyncio/base_events.py", "typing.py", "_pydecimal.py"):
        assert not is_held_out(trained_on)
    for old, new in [
        ("pathlib.py", "pathlib/_local.py"),
        ("datetime.py", "_pydatetime.py"),
        ("tomllib.py", "tomllib/__init__.py"),
        ("io.py", "_pyio.py"),
    ]:
        assert is_held_out(old) == is_held_out(new)


def test_only_the_librarys_own_decodable_sources_are_taken(tmp_path: Path) -> None:
    filler = {f"module_{n}.py": b"x = 1\n" * 2_000 for n in range(200)}
    outside = [
        "site-packages/a.py",
        "dist-packages/a.py",
        "test/a.py",
        "unittest/test/a.py",
        "ctypes/tests/a.py",
        "idlelib/idle_test/a.py",
        "ensurepip/_bundled/a.py",
        "json/__pycache__/a.py",
        "encodings/a.py",
        "sitecustomize.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/a.py",
        "notes.txt",
    ]
    modules = dict.fromkeys(outside, b"FOREIGN = 1\n") | {"latin.py": b"FOREIGN = '\xe9'\n", "json/x.py": b"OWN = 1\n"}
    files = write_corpus(tmp_path / "out", library(tmp_path / "library", filler | modules))
    text = files.train.read_text(encoding="utf-8") + files.valid.read_text(encoding="utf-8")
    assert "FOREIGN" not in text
    assert text.count("OWN") == 1


@pytest.mark.parametrize("modules", [{}, {"os.py": b"import sys\n"}, {"os.pyc": b"\0" * 2_000_000}])
def test_a_python_without_its_sources_is_refused_and_nothing_is_written(
    tmp_path: Path, modules: dict[str, bytes]
) -> None:
    root = library(tmp_path / "library", modules)
    with pytest.raises(PreflightError, match="without the sources") as caught:
        write_corpus(tmp_path / "out", root)
    assert caught.value.problems[0].where == str(root)
    assert caught.value.problems[0].remedy
    assert not (tmp_path / "out").exists()


def test_writing_the_corpus_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; import orchestrator.quickstart.corpus, orchestrator.quickstart.train\n"
        "orchestrator.quickstart.corpus.write_corpus(pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# The shipped model.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def load() -> LlamaForCausalLM:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    assert isinstance(model, LlamaForCausalLM)
    assert not any(report.values()), report
    return model


@pytest.fixture(scope="module")
def held_out(corpus: CorpusFiles, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The ids of the held-out text."""
    import torch

    text = corpus.valid.read_text(encoding="utf-8")
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Of 24 windows from all over the text."""
    from orchestrator.quickstart.train import perplexity as measured

    return measured(model, ids, 256, 24)


def test_the_model_folder_is_small_and_holds_what_hugging_face_folders_hold() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 4_000_000


def test_weights_are_bfloat16_tied_and_carry_reproducible_metadata() -> None:
    blob = (MODEL / "model.safetensors").read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16" and config["tie_word_embeddings"]


def test_the_readme_names_the_weights_that_are_shipped() -> None:
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert digest in MODEL.with_name("README.md").read_text(encoding="utf-8")


def test_python_source_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, corpus: CorpusFiles) -> None:
    sources = [*documents(corpus.valid)[:5], "def f(x):\n\tréponse = '🐍 \u2028'  # tab\r\n    return x\n\n\n", " ", ""]
    for source in sources:
        assert tokenizer.decode(tokenizer(source).input_ids) == source
    assert tokenizer("x" + DOCUMENT_END).input_ids[-1] == tokenizer.eos_token_id == 0
    assert len(tokenizer) == 2048


def test_the_dense_model_predicts_held_out_modules(held_out: torch.Tensor) -> None:
    """18.2 on these windows of Python 3.11; untrained it is 2048, and on the text it was trained on 9.5."""
    assert 12 < perplexity(load(), held_out) < 22


def test_damage_is_visible_and_grows_as_the_grid_coarsens(held_out: torch.Tensor) -> None:
    """Round-to-nearest of every linear layer, symmetric, groups of 128: the model has no slack to hide damage in."""
    import torch

    measured = [perplexity(load(), held_out)]
    for bits in (4, 3, 2):
        model = load()
        top = 2 ** (bits - 1) - 1
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                groups = layer.weight.data.view(-1, 128)
                scale = groups.abs().amax(1, keepdim=True) / top
                groups.copy_((groups / scale).round().clamp(-top - 1, top) * scale)
        measured.append(perplexity(model, held_out))
    dense, four, three, two = measured
    assert dense * 1.01 < four < three < two
    assert three > dense * 1.1
    assert two > dense * 3


def test_the_recipe_repeats_itself_to_the_byte(corpus: CorpusFiles, tmp_path: Path) -> None:
    """Three steps of a smaller model on a few modules; the second time in a process with another hash seed."""
    import torch

    from orchestrator.quickstart.train import Recipe, train

    settings = {"vocabulary": 512, "hidden": 64, "intermediate": 64, "layers": 1, "batch": 2, "steps": 3}
    text = DOCUMENT_END.join(documents(corpus.train)[:5]) + DOCUMENT_END
    (tmp_path / "text").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        train(tmp_path / "one", Recipe(**settings), text, text)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    code = (
        "import sys, json, pathlib; from orchestrator.quickstart.train import Recipe, train\n"
        "text = pathlib.Path(sys.argv[1]).read_text(encoding='utf-8')\n"
        "train(pathlib.Path(sys.argv[2]), Recipe(**json.loads(sys.argv[3])), text, text)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(tmp_path / "text"), str(tmp_path / "two"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in MODEL.iterdir()}
