"""promotion.yaml: which promotions a person has to approve, and who is told of them.

    models:
      smollm2-*:                        # the first pattern that fits a model counts
        require_approval: [production]
        approvers: [ada, grace]         # left out: anybody
        verify_keys: [signing.pub]      # one of these must have signed the release; beside this file, or absolute
        webhook: https://deploy.example.org/promotions
        command: [./deploy.sh]
        store: s3://models/releases     # which store has the history; else MLflow says, to whoever can write to it

It lies in the home folder, or where ORCHESTRATOR_PROMOTION_POLICY says, and binds those who use it; what nobody can
get around is the store's own permissions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import PreflightError, Problem, SpecError
from orchestrator.foreign import read_plain
from orchestrator.yaml_text import Location, dotted, parse

VARIABLE = "ORCHESTRATOR_PROMOTION_POLICY"
FILE = "promotion.yaml"
MOST_BYTES = 1 << 17

Alias = Literal["candidate", "staging", "production"]


class Policy(BaseModel):
    """What holds for one model. verify_keys: files, as full paths once this was read. webhook: an http(s) address that
    a signed POST goes to; command: run after it. store: the root of the store with the history, see place.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    require_approval: tuple[Alias, ...] = ()
    approvers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    verify_keys: tuple[str, ...] = ()
    webhook: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    store: Annotated[str, Field(pattern=r"^(s3|file)://[^\s@]+$")] | None = None


class PolicyFile(BaseModel):
    """The file: policies by a pattern of names, as the shell has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Policy]


def policy_for(model: str, home: Path, environment: Mapping[str, str] = os.environ) -> Policy:
    """Return what holds for `model`; where there is no file, nothing does.

    Raises `SpecError` for a file that is wrong, also where a key is given twice, of which YAML would keep the last;
    `PreflightError` for one that is named but cannot be read.
    """
    named = environment.get(VARIABLE)
    path = Path(os.path.expanduser(named)) if named else home / FILE  # noqa: PTH111 - Path's fails for no such user
    try:
        text = read_plain(path, MOST_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        if not named:
            return Policy()
        raise _unreadable(path, error) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise SpecError("this is no text in UTF-8", where=str(path), remedy="write it as YAML") from None
    except ValueError as error:
        raise SpecError(f"this cannot be a policy: {error}", where=str(path), remedy="write it as YAML") from None
    try:
        data, lines, faults = parse(text, path, "policy")
        if faults:
            raise SpecError(faults)
        policies = PolicyFile.model_validate(data)
    except ValidationError as error:
        raise SpecError([_problem(path, lines, item) for item in error.errors(include_url=False)]) from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)  # the rest may quote an address with a secret in it
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError("this is not YAML, or nested too deeply", where=where, remedy="mend it") from None
    found = next((policy for pattern, policy in policies.models.items() if fnmatchcase(model, pattern)), Policy())
    return found.model_copy(update={"verify_keys": tuple(str(path.parent / key) for key in found.verify_keys)})


def _problem(path: Path, lines: Mapping[Location, int], item: ErrorDetails) -> Problem:
    location = known = item["loc"]
    while known and known not in lines:
        known = known[:-1]
    place = f"{path}:{lines.get(known, 1)}"
    return Problem(f"{dotted(location) or 'the file'}: {item['msg']}", place, "see the README, Promotion")


def _unreadable(path: Path, error: OSError) -> PreflightError:
    return PreflightError(f"the policy {path} cannot be read: {error.strerror}", remedy=f"correct or unset {VARIABLE}")
