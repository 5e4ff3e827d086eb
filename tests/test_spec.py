"""The specification: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.method import Stage
from orchestrator.spec import load_spec, read_spec

GOOD = """\
version: 1
name: a-model
model: {id: model}
steps:
  - prune: magnitude
    with: {sparsity: 0.5}
  - validate: perplexity
    with: {source: text.txt}
    require: {perplexity_ratio: {max: 1.05}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(write(folder, text))
    return [str(problem) for problem in caught.value.problems]


def test_a_good_specification_is_read(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD)).spec
    assert [(step.stage, step.method) for step in spec.steps] == [
        (Stage.PRUNE, "magnitude"),
        (Stage.VALIDATE, "perplexity"),
    ]
    assert spec.steps[0].with_ == {"sparsity": 0.5}
    assert spec.steps[1].require["perplexity_ratio"].max == 1.05
    assert spec.seed == 0


def test_what_another_file_holds_is_not_told(tmp_path: Path) -> None:
    lines = "".join(f"root:secret{number}:19000:::\n" for number in range(100)) + "a passphrase of four words: x\n"
    problems = problems_of(tmp_path, GOOD + lines)
    assert not [problem for problem in problems if "secret" in problem or "words" in problem]
    path = tmp_path / "spec.yaml"
    assert [problem.partition(";")[0] for problem in problems] == [
        *(f"{path}:{line}: …: there is no such key" for line in range(10, 15)),
        f"{path}:15: there are 96 more unknown keys",
    ]


def test_all_errors_come_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("seed", "x").replace("model: {id: model}", "modle: {id: model}\nseed: -1")
    text = text.replace("max: 1.05", "maximum: 1.05")
    problems = problems_of(tmp_path, text)
    path = tmp_path / "spec.yaml"
    assert f'{path}:3: modle: there is no such key; did you mean "model"?' in problems
    assert any(p.startswith(f"{path}:4: seed: input should be greater than or equal to 0, not -1") for p in problems)
    assert any(p.startswith(f"{path}:10: steps[1].require.perplexity_ratio.maximum: there is no") for p in problems)
    assert any("the key 'model' is missing" in p for p in problems)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("version: 1", "version: 2", 1, "version"),
        ("prune: magnitude", "prun: magnitude", 5, 'did you mean "prune"?'),
        ("  - prune: magnitude", "  - prune: magnitude\n    distill: logits", 5, "names exactly one stage"),
        ("name: a-model", "name: ../evil", 2, "should match pattern"),
        ("name: a-model", "name: 3", 2, "should be a valid string"),
        ("model: {id: model}", "model: {id: model, dtype: int3}", 3, "model.dtype"),
        ("{max: 1.05}", "{}", 9, "give min, max or retain"),
        ("{max: 1.05}", "{max: '1.05'}", 9, "valid number"),
        ("{max: 1.05}", "{max: true}", 9, "valid number"),
        ("{max: 1.05}", "{max: .nan}", 9, "finite"),
        ("{max: 1.05}", "{min: 2, max: 1}", 9, "larger than max"),
        ("{sparsity: 0.5}", "[0.5]", 6, "steps[0].with"),
        ("name: a-model", "name: a-model\nname: b", 3, "given twice"),
    ],
)
def test_a_mistake_is_answered_with_place_and_reason(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    assert old in GOOD
    problems = problems_of(tmp_path, GOOD.replace(old, new, 1))
    assert any(problem.startswith(f"{tmp_path / 'spec.yaml'}:{line}") and said in problem for problem in problems)


@pytest.mark.parametrize("text", ["", "- 1\n", "just text\n", "a: [1\n", "a: \x01\n", "version: 1\n", "{: }\n- x"])
def test_what_is_no_specification_is_refused(tmp_path: Path, text: str) -> None:
    assert problems_of(tmp_path, text)


def test_deep_nesting_and_tags_are_refused(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "[" * 5000)
    assert problems_of(tmp_path, "version: !!python/object/apply:os.system ['true']\n")
    assert problems_of(tmp_path, "a: &a [*a]\n")


def test_aliases_that_grow_without_bound_are_refused_at_once(tmp_path: Path) -> None:
    for form in ("[{}]", "{{<<: [{}]}}"):
        bomb = "a0: &a0 {x: 1}\n"
        for level in range(1, 10):
            bomb += f"a{level}: &a{level} " + form.format(", ".join([f"*a{level - 1}"] * 10)) + "\n"
        started = time.monotonic()
        (problem,) = problems_of(tmp_path, bomb)
        assert "more than 10000 values" in problem
        assert time.monotonic() - started < 5
    nested_key = "a: &a [x, x]\nb: &b [*a, *a]\n? *b\n: 1\n"
    assert any("cannot be a key" in problem for problem in problems_of(tmp_path, nested_key))


def test_a_plain_alias_is_read(tmp_path: Path) -> None:
    text = GOOD.replace("with: {sparsity", "with: &shared {sparsity") + "  - prune: wanda\n    with: *shared\n"
    assert load_spec(write(tmp_path, text)).spec.steps[2].with_ == {"sparsity": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "line", "kind"),
    [
        ("name: a-model", "name: a-model\n2024-01-01: x", 3, "2024-01-01: this key is no text, but of kind timestamp"),
        ("{sparsity: 0.5}", "{sparsity: 0.5, 2024-01-01: 1}", 6, "steps[0].with.2024-01-01: this key is no text"),
        ("{sparsity: 0.5}", "{sparsity: 0.5, on: 1}", 6, "of kind bool; put it in quotes"),
        ("{sparsity: 0.5}", "{sparsity: 0.5, [1]: 1}", 6, "cannot be a key"),
    ],
)
def test_a_key_that_is_no_text_is_refused(tmp_path: Path, old: str, new: str, line: int, kind: str) -> None:
    (problem,) = problems_of(tmp_path, GOOD.replace(old, new, 1))
    assert problem.startswith(f"{tmp_path / 'spec.yaml'}:{line}:") and kind in problem


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp x", "!!int x", "2024-13-45", f"0x{'f' * 9000}"])
def test_values_that_yaml_or_json_cannot_hold_are_refused(tmp_path: Path, value: str) -> None:
    assert "not valid YAML" in problems_of(tmp_path, GOOD.replace("0.5", value))[0]


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, GOOD.replace("id: model", 'id: "a\\uD800b"'))
    assert "half a character" in problem and "perplexity" not in problem


def test_steps_that_are_wrong_are_not_called_missing(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "version: 1\nname: a\nmodel: {id: m}\nsteps:\n  - prun: wanda\n")
    assert len(problems) == 1 and 'did you mean "prune"?' in problems[0]
    assert any(
        "at least 1 item" in p for p in problems_of(tmp_path, GOOD[: GOOD.index("  - prune")].rstrip() + " []\n")
    )


def test_what_is_valid_is_given_beside_all_faults_in_the_order_of_lines(tmp_path: Path) -> None:
    text = GOOD.replace("max: 1.05", "maximum: 1").replace("version: 1", "version: 7") + "seed: -1\nname: b\n"
    parts = read_spec(write(tmp_path, text))
    assert parts.spec is None and parts.model is not None and parts.model.id == "model"
    # The second step's bound is wrong; its method is known all the same, and will be checked.
    assert {index: step.method for index, step in parts.steps.items()} == {0: "magnitude", 1: "perplexity"}
    assert not parts.steps[1].require
    lines = [int(problem.split(":")[1]) for problem in problems_of(tmp_path, text)]
    assert lines == [1, 9, 10, 11]


def test_missing_file_and_binary_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=f"there is no specification none.yaml, that is {tmp_path / 'none.yaml'}; give"):
        load_spec(Path("none.yaml"))
    with pytest.raises(SpecError, match="there is no specification"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "binary.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD.replace("0.5", "1e-4"))).spec
    assert spec.steps[0].with_["sparsity"] == pytest.approx(1e-4)
