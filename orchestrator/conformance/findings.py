"""What every check asks, and what a method failed: collected first, told all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from orchestrator.errors import OrchestratorError

CHECKS: Mapping[str, str] = {
    "C1 complete": "the class has what the plugin host asks of it: identity, kind, stage, descriptions",
    "C2 bounded": "every number among the parameters has a bound",
    "C3 round trip": "parameters written as JSON and read back as a specification is give an equal method",
    "C4 frozen": "a parameter cannot be changed after the method was made, and there are no private attributes",
    "C5 closed": "an unknown parameter is refused",
    "C6 planning": "importing, making and preflighting the method works in a fresh process and imports no torch",
    "C7 surroundings": "random generators, grad mode, default dtype, threads and working folder are left alone",
    "C8 deterministic": "the same input gives the same result, whatever the state of the global random generators",
    "C9 inputs untouched": "models, text and calibration data are not changed on disk",
    "L1 runs": "`compress` works on the layers that real models have: wide, tall, zero, constant, dead inputs, ...",
    "L2 needs": "`compress` gets by with the statistic that `needs` declares",
    "L3 pure": "`compress` changes neither the weight nor the statistic",
    "L4 form": "the result is a LayerResult with a float32 contiguous weight of the same shape",
    "L5 finite": "weight and metrics are finite numbers",
    "L6 keeps zeros": "zeros stay zero if `keeps` says so",
    "L7 prunes": "a pruning method makes zeros if `provides` says so",
    "L8 pattern": "the zeros keep to what `sparsity_pattern()` claims, which is what the parameter `pattern` names",
    "L9 encoding": "a quantizing method returns an encoding of its own `scheme()`, a pruning method neither",
    "L10 grid": "integers, scales and zero points have the dtype, shape and range of the scheme",
    "L11 weight is encoding": "the weight is bit for bit what its encoding stands for",
    "L12 packs": "the encoding survives packing and unpacking",
    "L13 useful": "a quantized layer puts out less error than a layer of zeros",
    "L14 check_layer": "`check_layer` accepts some usual shape and names a parameter when it refuses one",
    "L15 for_dtype": "`for_dtype` returns the method or raises SpecError, and scales are stored in the model's dtype",
    "L16 input_scale": "`input_scale` returns a finite, positive float32 [I] and is pure",
    "L17 mixed": "`options` are methods with schemes; `choose` is pure and keeps to the capacity",
    "M1 runs": "`apply` works and returns a ModelResult with finite metrics",
    "M2 saves": "the result can be saved, loads with stock Transformers, and gives the same finite logits",
    "M3 keeps what it claims": "the invariants in `keeps` hold in the saved model",
    "M4 progress": "progress is a fraction from 0 to 1 with a message",
    "M5 foreseen": "the saved model has the blocks and shapes that `blocks_removed` and `config_after` say",
    "S1 runs": "`sample` works and returns a CalibrationSet",
    "S2 tokens": "tokens are int64 [N, T], N and T at least 1, all of them in the vocabulary",
    "S3 seed": "another seed draws other tokens",
    "S4 storable": "the provenance is JSON, and the set survives saving and loading, with the same bytes each time",
    "E1 runs": "`measure` works",
    "E2 declared": "every declared metric is measured, and nothing else",
    "E3 finite": "every metric is a finite number",
    "E4 fair": "a model measured against itself gets the same value as its `dense_` twin (timings and memory aside)",
    "E5 curves": "curves beside the metrics have rising whole places and finite values",
    "E6 samples": "samples give the metrics that they are said to, and all that are declared to have some",
    "K1 runs": "`attached` gives a cache through which streams of any length are read, for a Llama",
    "K2 finite": "every logit is a finite number",
    "K3 bytes": "after any stream `held_bytes` is what `planned_bytes` said",
    "K4 in pieces": "tokens that come several at once see what they would have seen one by one",
    "K5 undone": "what the cache changed about the model and its library is undone when the context closes",
    "K6 weights": "the model's weights are not touched",
    "P1 publishes": "`publish` works, and what was published is the bundle, byte for byte",
    "P2 finds": "`find` returns the release that `publish` returned, and None for a name that was never published",
    "P3 idempotent": "publishing the same again returns the same release",
    "P4 immutable": "other files under the same name are refused, and the first release stays",
    "V1 renders": "`render` works with a model shape and a KV plan, and is deterministic",
    "V2 files": "file names are plain, no file is empty, and .json, .yaml, .toml, .py and .sh files parse",
    "V3 refuses": "a budget that nothing can honour is refused with an OrchestratorError",
    "V4 versions": "`supported_versions` is a version specifier",
    "F1 accepts": "`check` accepts a dense Llama, or refuses it with an OrchestratorError",
    "F2 writes": "`write` works, leaves plain files and nothing else, and returns finite numbers",
    "F3 deterministic": "the same model gives the same bytes and numbers, whatever the global random generators",
    "F4 refuses": "a model type that does not exist is refused while planning with an OrchestratorError",
    "F5 libraries": "every distribution in `libraries` is installed",
}


class Findings:
    """Collects what one method fails. Each sentence says what is wrong and what to do."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._failed: dict[str, list[str]] = {}

    def fail(self, check: str, sentence: str) -> None:
        """Note a failure of a check named in `CHECKS`."""
        assert check in CHECKS, check
        found = self._failed.setdefault(check, [])
        if sentence not in found:
            found.append(sentence)

    def expect(self, check: str, holds: bool, sentence: str) -> bool:
        """Note a failure unless `holds`; return `holds`."""
        if not holds:
            self.fail(check, sentence)
        return holds

    def failed(self, check: str) -> bool:
        """Whether a check has failed already."""
        return check in self._failed

    def adopt(self, other: Findings) -> None:
        """Take over what another collection found."""
        for check, sentences in other._failed.items():
            for sentence in sentences:
                self.fail(check, sentence)

    @contextmanager
    def attempt(self, check: str, doing: str) -> Iterator[None]:
        """Run what the method does; an exception is a failure of `check`, and the block ends there."""
        try:
            yield
        except (Exception, SystemExit) as error:  # plugin code may raise anything, and the other checks go on
            remedy = "" if isinstance(error, OrchestratorError) else "; mend it, or raise an OrchestratorError"
            self.fail(check, f"{doing} raised {type(error).__name__}: {' '.join(str(error).split())}{remedy}")

    def raise_if_any(self) -> None:
        """Raise AssertionError with all failures, in the order of `CHECKS`."""
        if not self._failed:
            return
        lines = [f"{self.subject} does not conform ({len(self._failed)} failed):"]
        for check in CHECKS:
            if check in self._failed:
                first, *others = self._failed[check]
                lines.append(f"  {check}: {first}{f' (and {len(others)} more like it)' if others else ''}")
        raise AssertionError("\n".join(lines))
