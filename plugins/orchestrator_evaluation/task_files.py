"""Task files for lm-eval, read so that nothing is fetched and no code beside them is run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.api import SpecError

GRADES = ("acc", "acc_norm", "exact_match")  # what lm-eval calls the metrics that are right or wrong for each question
READERS = ("json", "csv", "parquet", "text")  # of `datasets`, for local files
OUTPUTS = ("multiple_choice", "loglikelihood", "generate_until")
KEYS = frozenset(
    {
        *("task", "output_type", "description", "metadata"),
        *("dataset_path", "dataset_kwargs", "test_split", "validation_split", "training_split", "fewshot_split"),
        *("doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "fewshot_delimiter", "num_fewshot"),
        *("generation_kwargs", "metric_list", "filter_list"),
    }
)


@dataclass(frozen=True)
class TaskFile:
    """One task: the configuration for lm-eval, paths made absolute, and which of its metrics says right or wrong."""

    config: Mapping[str, Any]
    grade: str


def read_tasks(tier: str, folder: Path) -> list[TaskFile]:
    """Return the tasks of a folder, in the order of their files' names. Raises `SpecError` for what is refused."""
    files = sorted({*folder.glob("*.yaml"), *folder.glob("*.yml")})
    if not files:
        raise SpecError(f"task_files.{tier}: {folder} holds no task file", remedy="put lm-eval's *.yaml files in it")
    tasks = [_read_task(path, folder) for path in files]
    names = [task.config["task"] for task in tasks]
    if len(set(names)) < len(names):
        raise SpecError(f"task_files.{tier}: two files of {folder} name the same task", remedy="rename one `task:`")
    return tasks


def _read_task(path: Path, folder: Path) -> TaskFile:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # `!function` too: there is no constructor for it. PyYAML's own let other errors through, on odd tags and dates.
        raise SpecError(
            f"{path} is no task file: {' '.join(str(error).split())}",
            remedy="write plain YAML with templates; code beside a task file is not run",
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise SpecError(f"{path} is no task file: it names no `task`", remedy="see lm-eval's guide to new tasks")
    refused = sorted(str(key) for key in config if key not in KEYS)
    if refused:
        raise SpecError(
            f"{path}: {', '.join(refused)} is not read here", remedy=f"keys that are: {', '.join(sorted(KEYS))}"
        )
    for key, allowed in (("dataset_path", READERS), ("output_type", OUTPUTS)):
        if config.get(key) not in allowed:
            raise SpecError(
                f"{path}: {key} is {config.get(key)!r}", remedy=f"one of {', '.join(allowed)}: nothing is fetched"
            )
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict) or set(kwargs) != {"data_files"} or not isinstance(kwargs["data_files"], dict):
        raise SpecError(
            f"{path}: dataset_kwargs does not hold data_files alone",
            remedy="write dataset_kwargs: {data_files: {test: data.jsonl}}",
        )
    data = {str(split): _inside(path, folder, name) for split, name in kwargs["data_files"].items()}
    metrics: Any = config.get("metric_list")
    grades = [entry.get("metric") for entry in metrics if isinstance(entry, dict)] if isinstance(metrics, list) else []
    if len(grades) != 1 or grades[0] not in GRADES:
        raise SpecError(f"{path}: metric_list does not hold one metric", remedy=f"one of {', '.join(GRADES)}")
    if set(metrics[0]) - {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation"}:
        raise SpecError(f"{path}: metric_list holds more than a metric", remedy="leave out what fetches or runs code")
    return TaskFile({**config, "dataset_kwargs": {"data_files": data}}, grades[0])


def _inside(path: Path, folder: Path, name: object) -> str:
    """The absolute path of a data file, which must be inside the folder, also behind links."""
    found = (folder / str(name)).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.is_file():
        raise SpecError(
            f"{path}: there is no data file {name} inside its folder", remedy="put the data beside the task file"
        )
    return str(found)
