"""The walk over decoder blocks, against plain runs of the whole model with hooks."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator.calibration import CalibrationSet
from orchestrator.capture import BATCH_TOKENS
from orchestrator.checkpoint import Checkpoint
from orchestrator.compression import WalkReport
from orchestrator.errors import StepError
from orchestrator.export import ModelWriter
from orchestrator.job import WalkSettings
from orchestrator.layer_method import LayerMethod, LayerResult
from orchestrator.parallel import Workers, in_parallel, one_thread
from orchestrator.records import RecordStore
from orchestrator.statistics import InputMoment
from orchestrator.walk import walk
from orchestrator_quantization.gptq import GPTQ
from tests.layer_methods import Identity, KeepLarge, Round, ScaleByInput
from tests.tiny import ARCHITECTURES, make_model, make_tokens


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(
    checkpoint: Checkpoint,
    method: LayerMethod,
    folder: Path,
    tokens_NT: torch.Tensor | None = None,
    skip: Sequence[str] = (),
) -> tuple[WalkReport, Checkpoint]:
    writer = ModelWriter(checkpoint, folder, scheme=method.scheme(), skip=skip)
    calibration = None if tokens_NT is None else CalibrationSet(tokens_NT, {})
    report = walk(checkpoint, method, calibration, writer, skip=skip)
    writer.finish()
    return report, Checkpoint(folder)


def _inputs_of_whole_model(checkpoint: Checkpoint, tokens_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs [N * T, I] in float64 of every linear layer in a block, by running the loaded model in float64."""
    model = checkpoint.load(torch.float64)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(lambda m, x, n=name: inputs.update({n: x[0].flatten(0, -2)}))
    with torch.no_grad():
        model(tokens_NT)
    return inputs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture))
    tokens_NT = make_tokens(5, 24)
    Identity.seen.clear()
    report, _ = _run(checkpoint, Identity(), tmp_path / "out", tokens_NT)
    expected = _inputs_of_whole_model(checkpoint, tokens_NT)
    assert list(report.layers) and set(report.layers) == set(expected)
    for name, statistic in zip(report.layers, Identity.seen, strict=True):
        x_TI = expected[name]
        assert statistic is not None and statistic.num_tokens == 5 * 24
        hessian_II = x_TI.T @ x_TI
        scale = hessian_II.abs().max()
        assert ((statistic.require_hessian() - hessian_II).abs().max() / scale) < 1e-5, name
        assert torch.allclose(statistic.sum_squares_I.double(), x_TI.square().sum(0), rtol=1e-4)
        assert torch.allclose(statistic.sum_abs_I.double(), x_TI.abs().sum(0), rtol=1e-4)
        assert torch.allclose(statistic.max_abs_I.double(), x_TI.abs().amax(0), rtol=1e-4)
        assert torch.allclose(statistic.sum_I.double(), x_TI.sum(0), atol=1e-3 * float(x_TI.abs().sum(0).max()))


def test_layers_with_one_input_share_one_record(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    Identity.seen.clear()
    report, _ = _run(checkpoint, Identity(), tmp_path / "out", make_tokens(2))
    record = {name.removeprefix("model.layers.1."): s for name, s in zip(report.layers, Identity.seen, strict=True)}
    assert record["self_attn.q_proj"] is record["self_attn.k_proj"] is record["self_attn.v_proj"]
    assert record["mlp.gate_proj"] is record["mlp.up_proj"]
    distinct = [record[f"{n}_proj"] for n in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")]
    assert len({id(r) for r in distinct}) == 4


def test_statistics_do_not_depend_on_how_sequences_are_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", "mistral"))
    tokens_NT = make_tokens(7, 16)
    found = []
    for batch_tokens in (16, 48, 4096):
        monkeypatch.setitem(BATCH_TOKENS, "cpu", batch_tokens)
        Identity.seen.clear()
        _run(checkpoint, Identity(), tmp_path / str(batch_tokens), tokens_NT)
        found.append(list(Identity.seen))
    for one, two, three in zip(*found, strict=True):
        assert one and two and three and one.num_tokens == two.num_tokens == three.num_tokens == 7 * 16
        for other in (two, three):
            difference = (one.require_hessian() - other.require_hessian()).abs().max()
            assert difference < 1e-4 * one.require_hessian().abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_a_method_that_changes_nothing_leaves_every_stored_tensor_as_it_was(tmp_path: Path, tied: bool) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", "qwen2", tied=tied))
    _, result = _run(checkpoint, Identity(), tmp_path / "out", make_tokens(2))
    before, after = (load_file(c.path / "model.safetensors") for c in (checkpoint, result))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = make_tokens(2)
    with torch.no_grad():
        assert torch.equal(checkpoint.load()(tokens).logits, result.load()(tokens).logits)


_STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _compressed_by_hand(checkpoint: Checkpoint, tokens_NT: torch.Tensor, *, dense: bool) -> dict[str, torch.Tensor]:
    """What `ScaleByInput` makes of every layer, by running all of a loaded model before each stage of each block."""
    model = checkpoint.load(torch.float32)
    found = {}
    untouched = _inputs_of_whole_model(checkpoint, tokens_NT)
    for index in range(len(model.model.layers)):
        for stage in _STAGES:
            inputs: dict[str, torch.Tensor] = {}
            block = model.get_submodule(f"model.layers.{index}")
            linears = {n: m for n, m in block.named_modules() if n.rpartition(".")[2] in stage}
            hooks = [
                module.register_forward_pre_hook(lambda m, x, n=name, to=inputs: to.update({n: x[0].flatten(0, -2)}))
                for name, module in linears.items()
            ]
            with torch.no_grad():
                model(tokens_NT)
            for hook in hooks:
                hook.remove()
            for name, module in linears.items():
                full = f"model.layers.{index}.{name}"
                x_TI = untouched[full].float() if dense else inputs[name]
                module.weight.data = (module.weight.data / (1 + x_TI.abs().mean(0))).bfloat16().float()
                found[full] = module.weight.data
    return found


@pytest.mark.parametrize("inputs", ["propagated", "dense"])
def test_layers_are_calibrated_on_what_the_compressed_ones_before_put_out_or_on_dense_inputs(
    tmp_path: Path, inputs: Literal["propagated", "dense"]
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=3))
    tokens_NT = make_tokens(4)
    writer = ModelWriter(checkpoint, tmp_path / "out")
    walk(checkpoint, ScaleByInput(), CalibrationSet(tokens_NT, {}), writer, settings=WalkSettings(inputs=inputs))
    writer.finish()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = _compressed_by_hand(checkpoint, tokens_NT, dense=inputs == "dense")
    other = _compressed_by_hand(checkpoint, tokens_NT, dense=inputs != "dense")
    assert len(expected) == 21
    for name, weight_OI in expected.items():
        # One rounding step of bfloat16 is 2^-8: sums taken in another order may fall to the other side.
        assert torch.allclose(stored[f"{name}.weight"].float(), weight_OI, rtol=2**-7, atol=0), name
    assert not torch.allclose(expected["model.layers.1.mlp.down_proj"], other["model.layers.1.mlp.down_proj"], rtol=0.1)


def test_skipped_layers_stay_and_the_rest_changes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=2))
    skip = ["layers.0.*", "down_proj"]
    report, result = _run(checkpoint, ScaleByInput(), tmp_path / "out", make_tokens(2), skip)
    before, after = (load_file(c.path / "model.safetensors") for c in (checkpoint, result))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in report.layers}
    assert changed == {
        f"model.layers.1.{n}_proj.weight"
        for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    }


def test_a_weight_only_method_needs_no_calibration_and_a_data_method_does(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    report, _ = _run(checkpoint, KeepLarge(), tmp_path / "a")
    assert report.metrics["zero_fraction"] == 0.5
    with pytest.raises(StepError, match=r"identity needs calibration data.*calibrate step"):
        _run(checkpoint, Identity(), tmp_path / "b")


def test_metrics_are_summed_averaged_or_maximised_by_their_meaning(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=2))
    report, _ = _run(checkpoint, Identity(), tmp_path / "out", make_tokens(2, 50))
    assert report.metrics["layers"] == report.metrics["calls"] == 14
    assert report.metrics["damping_used"] == 0.01
    assert report.metrics["relative_error"] == pytest.approx(0.5)
    assert report.metrics["weights"] == sum(s.in_features * s.out_features for s in checkpoint.block_layers())


def test_layers_with_fewer_tokens_than_inputs_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", layers=2))  # inputs: 64, and 128 of down_proj
    for tokens, expected in ((make_tokens(2, 50), 2), (make_tokens(2, 64), 0), (make_tokens(2, 20), 14)):
        report, _ = _run(checkpoint, Identity(), tmp_path / str(expected), tokens)
        assert report.metrics["rank_deficient_layers"] == expected


def test_not_finite_weights_are_refused_by_layer_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, checkpoint.path / "model.safetensors", {"format": "pt"})
    for method, tokens in ((KeepLarge(), None), (Identity(), make_tokens(2))):
        with pytest.raises(StepError, match=r"the weight of model\.layers\.1\.mlp\.up_proj is not finite"):
            _run(Checkpoint(checkpoint.path), method, tmp_path / method.name, tokens)


def test_activations_that_overflow_are_refused_by_block_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32))
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["model.layers.2.mlp.gate_proj.weight"] *= 1e25
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e25
    save_file(tensors, checkpoint.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StepError, match=r"model\.layers\.2.* not finite"):
        _run(Checkpoint(checkpoint.path), Identity(), tmp_path / "out", make_tokens(2))


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    with pytest.raises(StepError, match=r"token 999, the model has 256.*own tokenizer"):
        _run(checkpoint, Identity(), tmp_path / "out", torch.full((2, 8), 999))


def test_a_quantized_model_is_not_walked_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    _, quantized = _run(checkpoint, Round(), tmp_path / "q")
    with pytest.raises(StepError, match="quantized already"):
        _run(quantized, KeepLarge(), tmp_path / "again")


def test_a_failing_method_names_the_layer(tmp_path: Path) -> None:
    class Failing(KeepLarge):
        name = "failing"

        def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
            raise ZeroDivisionError("division by zero")

    class WrongShape(KeepLarge):
        name = "wrong_shape"

        def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
            return LayerResult(weight_OI.T.contiguous()[:3])

    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    with pytest.raises(ZeroDivisionError) as caught:
        _run(checkpoint, Failing(), tmp_path / "a")
    assert caught.value.__notes__ == ["while failing compressed model.layers.0.self_attn.q_proj"]
    with pytest.raises(StepError, match=r"wrong_shape returned shape \(3, 64\) instead of \(64, 64\) for .*q_proj"):
        _run(checkpoint, WrongShape(), tmp_path / "b")


def test_methods_run_on_one_thread_and_the_setting_comes_back(tmp_path: Path) -> None:
    class Threads(KeepLarge):
        name = "threads"

        def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
            return LayerResult(weight_OI, metrics={"max_threads": torch.get_num_threads()})

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report, _ = _run(Checkpoint(make_model(tmp_path / "model")), Threads(), tmp_path / "out")
        assert report.metrics["max_threads"] == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), one_thread():
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", [ScaleByInput(), Round(symmetric=False)])
def test_second_run_writes_the_same_bytes(tmp_path: Path, method: LayerMethod) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    tokens_NT = make_tokens(3)
    one, two = (_run(checkpoint, method, tmp_path / name, tokens_NT)[1].path for name in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


def test_progress_reaches_one_and_never_falls(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    shown: list[float] = []
    writer = ModelWriter(checkpoint, tmp_path / "out")
    walk(checkpoint, KeepLarge(), None, writer, progress=lambda fraction, message: shown.append(fraction))
    assert shown == sorted(shown) and shown[-1] == 1.0 and len(shown) == 3


_MEASURE_MEMORY = """
import sys
from pathlib import Path
import torch
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.export import ModelWriter
from orchestrator.layer_method import (LayerResult)
from orchestrator.walk import walk
from tests.layer_methods import Identity
from tests.tiny import make_tokens

def private_bytes():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024

peak = 0

class Watch(Identity):
    name = "watch"
    def compress(self, weight_OI, statistic):
        global peak
        peak = max(peak, private_bytes())
        return LayerResult(weight_OI)

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    peak = 0
    writer = ModelWriter(Checkpoint(Path(folder)), Path(folder + "-out"), max_shard_bytes=3_000_000)
    walk(writer.checkpoint, Watch(), CalibrationSet(make_tokens(2, 16), {}), writer)
    writer.finish()
    print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_depth_of_the_model(tmp_path: Path) -> None:
    """In a fresh process, so that memory which other tests left behind hides nothing.

    Every larger tensor gets pages of its own, so that what is measured is what the walk holds. With glibc's default
    the heap of this small model fragments: the process grew by 38 MB over 24 blocks while 3 MB of tensors were alive.
    """
    folders = [
        make_model(tmp_path / str(layers), layers=layers, hidden_size=320, intermediate_size=1280, tokenizer=False)
        for layers in (6, 24)
    ]
    command = [sys.executable, "-c", _MEASURE_MEMORY, *map(str, folders)]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    shallow, deep = map(int, run.stdout.split())
    block_bytes = 4 * sum(s.in_features * s.out_features for s in Checkpoint(folders[0]).block_layers()) // 6
    # Holding the model would take 18 blocks more; holding it as stored, in two bytes, 9.
    assert deep - shallow < 3 * block_bytes, (shallow, deep, block_bytes)
    assert len(list((tmp_path / "24-out").glob("model-*.safetensors"))) > 5


_FURTHER_CANDIDATE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.export import ModelWriter
from orchestrator.records import RecordStore
from orchestrator.job import WalkSettings
from orchestrator.walk import walk
from orchestrator_quantization.gptq import GPTQ

model, tokens, records, out = map(Path, sys.argv[1:])
method = GPTQ(num_bits=3, group_size=32).for_dtype("bfloat16")
writer = ModelWriter(Checkpoint(model), out, scheme=method.scheme())
settings = WalkSettings(inputs="dense", records=RecordStore(records, 2**30))
walk(writer.checkpoint, method, CalibrationSet(load_file(tokens)["tokens"], {}), writer, settings=settings)
writer.finish()
print(sorted({"transformers", "compressed_tensors"} & set(sys.modules)))
"""


def test_a_further_candidate_needs_no_transformers_and_has_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    tokens_NT = make_tokens(4, 32)
    save_file({"tokens": tokens_NT}, tmp_path / "tokens")
    records = RecordStore(tmp_path / "records", 2**30)

    def run(num_bits: int, name: str, store: RecordStore | None) -> Path:
        method = GPTQ(num_bits=num_bits, group_size=32).for_dtype("bfloat16")
        writer = ModelWriter(checkpoint, tmp_path / name, scheme=method.scheme())
        settings = WalkSettings(inputs="dense", records=store)
        walk(checkpoint, method, CalibrationSet(tokens_NT, {}), writer, settings=settings)
        writer.finish()
        return tmp_path / name

    run(4, "first", records)
    paths = [str(tmp_path / name) for name in ("model", "tokens", "records", "further")]
    done = subprocess.run(
        [sys.executable, "-c", _FURTHER_CANDIDATE, *paths], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
    alone = run(3, "alone", None)
    names = sorted(path.name for path in alone.iterdir())
    assert filecmp.cmpfiles(alone, tmp_path / "further", names, shallow=False) == (names, [], [])


def test_a_damaged_record_is_measured_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    settings = WalkSettings(inputs="dense", records=RecordStore(tmp_path / "records", 2**30))
    results = []
    for name in ("first", "again"):
        writer = ModelWriter(checkpoint, tmp_path / name)
        walk(checkpoint, ScaleByInput(), CalibrationSet(make_tokens(4), {}), writer, settings=settings)
        writer.finish()
        results.append((tmp_path / name / "model.safetensors").read_bytes())
        for record in (tmp_path / "records").glob("*.safetensors"):
            content = bytearray(record.read_bytes())
            content[-1] ^= 1
            record.write_bytes(content)
    assert results[0] == results[1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_of_a_task_give_their_results_in_order_and_an_error_ends_them(count: int) -> None:
    """With fewer workers than parts too: who calls does what nobody has begun, and waits for no worker."""
    workers = Workers(count)

    def fail() -> int:
        raise ValueError("part")

    try:
        whole = [partial(in_parallel, [partial(pow, base, 2) for base in (n, n + 1, n + 2)]) for n in range(5)]
        assert workers.run(whole) == [[n**2, (n + 1) ** 2, (n + 2) ** 2] for n in range(5)]
        for place in range(3):
            parts: list[Callable[[], int]] = [partial(pow, 2, 2)] * 3
            parts[place] = fail
            with pytest.raises(ValueError, match="part"):
                workers.run([partial(in_parallel, parts)])
    finally:
        workers.close()
    assert in_parallel([partial(pow, 3, 2), partial(pow, 4, 2)]) == [9, 16]
