"""Code that comes with a model: none of it runs, unless the specification says so, and then this code and no other.

``model: {trust_remote_code: true}`` is for the model of the specification alone, in a folder of this machine. Its code
are the *.py files of that folder. Their sha256 are part of the model's identity; the files go into every artifact and
release. A module is made in memory, from bytes that were compared with the sha256 right before: nothing is downloaded,
no cache of copied code can be stale, and what was edited since planning does not run. `trust_remote_code` of
Transformers stays off; its classes are asked by those that `own_class` returns. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.attention import FAMILIES
from orchestrator.canonical import digest_of
from orchestrator.errors import PreflightError
from orchestrator.foreign import leads_outside, read_plain

if TYPE_CHECKING:
    from orchestrator.checkpoint import Checkpoint

KEY = "trust_remote_code"
MODEL = "AutoModelForCausalLM"
CONFIG = "AutoConfig"
TOKENIZER = "AutoTokenizer"
_MAP = "auto_map"
_MOST_BYTES = 4 << 20  # of one file of code
_PACKAGE = "model_code_"


@dataclass(frozen=True)
class ModelCode:
    """The code that comes with a model. files: name -> sha256 (hex).

    may_run: whether the specification trusts it. The code of a model that is only looked at, in the store, may not.
    """

    files: Mapping[str, str]
    may_run: bool

    @classmethod
    def recorded(cls, identity: Mapping[str, Any]) -> ModelCode | None:
        """What the identity of a step says of the model's code; it does not run."""
        files = identity.get(KEY)
        return cls(dict(files), may_run=False) if isinstance(files, Mapping) else None

    def described(self) -> str:
        """The files with their sha256, in a line."""
        return ", ".join(f"{name} (sha256 {digest})" for name, digest in sorted(self.files.items()))


def recorded_code(code: ModelCode | None) -> dict[str, dict[str, str]]:
    """Return the code as identities, manifests and journals say it: the key with the files; {} where there is none."""
    return {KEY: dict(code.files)} if code else {}


def read_code(folder: Path, *, may_run: bool) -> ModelCode:
    """Return the code in a model's folder: the *.py files that can be imported, in the folder itself.

    Raises `PreflightError` for a file that is no plain one, too large, or a link out of the folder.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem.isidentifier():
            if leads_outside(path, folder):
                raise PreflightError(
                    f"{path} is a link to a file outside of the model's folder",
                    remedy="copy the file into the folder if it belongs to the model, else remove the link",
                )
            try:
                found[path.name] = hashlib.sha256(read_plain(path, _MOST_BYTES)).hexdigest()
            except (OSError, ValueError) as error:
                raise PreflightError(f"{path} cannot be read: {error}", remedy="copy the model again") from None
    return ModelCode(found, may_run)


def check_code(folder: Path, config: Mapping[str, Any], code: ModelCode | None) -> None:
    """Raise `PreflightError` if a config.json makes Transformers run code that is not trusted, or not the same.

    `auto_map` names classes in files beside it; OWNER/NAME as an implementation is a kernel of the hub, which is never
    run.
    """
    path = folder / "config.json"
    asked = _asked(config)
    if asked and asked != _MAP:
        raise PreflightError(
            f"{path} asks to run code that comes with the model or from the hub ({asked})",
            remedy="only code that auto_map names can be trusted; remove the entry, or use an architecture that"
            " Transformers ships",
        )
    if code is None:
        if asked:
            raise PreflightError(
                f"{path} asks to run code that comes with the model ({_MAP}), so-called remote code",
                remedy=_how_to_trust(folder),
            )
        return
    if read_code(folder, may_run=False).files != code.files:
        since = "the run was planned" if code.may_run else "it was stored"
        raise PreflightError(
            f"the code in {folder} is not what it was when {since}", remedy="read what changed, and run again"
        )
    references = list(_references(folder, config))
    if not references:
        raise PreflightError(f"{folder} names no code ({_MAP})", remedy=f"remove {KEY} from the specification")
    for name, reference in references:
        module, _, leaf = reference.partition(".")
        if "--" in reference or f"{module}.py" not in code.files or not leaf.isidentifier():
            raise PreflightError(
                f"{_MAP} of {folder} gives {name} as {reference[:200]!r}, which is no class in a *.py file beside it",
                remedy="copy the code into the folder and name it there as MODULE.CLASS: none is taken from elsewhere",
            )
    if _MAP in config and MODEL not in dict(references):
        raise PreflightError(f"{_MAP} in {path} names no {MODEL}", remedy="use a causal language model")
    if _MAP in config and config["model_type"] in FAMILIES:
        raise _ambiguous(folder, config)


def own_class(checkpoint: Checkpoint, name: str) -> Any:
    """Return the class that the code of a model has for `name`, e.g. "AutoConfig"; None if Transformers' own is used.

    This runs code of the model, if it was not run before in this process. Raises `PreflightError` if it is not the
    trusted code, or fails.
    """
    code, config = checkpoint.code, checkpoint.config
    reference = dict(_references(checkpoint.path, config)).get(name) if code and code.may_run else None
    if code is None or reference is None:
        return None
    if name != TOKENIZER:
        from transformers import CONFIG_MAPPING

        if config["model_type"] in CONFIG_MAPPING:
            raise _ambiguous(checkpoint.path, config)
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    module, _, leaf = reference.partition(".")
    try:
        found = getattr(_module(checkpoint.path, code, module), leaf)
        return add_generation_mixin_to_remote_model(found) if name == MODEL else found  # as the automatic class does
    except PreflightError:
        raise
    except (Exception, SystemExit) as error:  # code of others fails in any way
        said = " ".join(str(error).split())
        raise PreflightError(
            f"{module}.py in {checkpoint.path}, code of the model, gives no {leaf}: {type(error).__name__}: {said}",
            remedy="correct the code, or install what it imports",
        ) from error


def with_verified_code(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Return a folder below `scratch` that leads to the files of a model, with its code as it was verified.

    For other processes, which would read the code at a time of their own. Raises `PreflightError` if it changed.
    """
    assert checkpoint.code is not None
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=scratch))
    for name in checkpoint.model_files():
        if name in checkpoint.code.files:
            (folder / name).write_bytes(_verified(checkpoint.path / name, checkpoint.code))
        else:
            (folder / name).symlink_to((checkpoint.path / name).absolute())
    return folder


def _verified(path: Path, code: ModelCode) -> bytes:
    """Return the content of a file of code. Raises `PreflightError` if it is not the one that is known."""
    data = read_plain(path, _MOST_BYTES)
    if hashlib.sha256(data).hexdigest() != code.files.get(path.name):
        raise PreflightError(f"{path} is not what it was when the run was planned", remedy="read it, and run again")
    return data


def _asked(config: Mapping[str, Any]) -> str | None:
    """Which entry of a config.json, at any depth, makes Transformers run code that it does not ship; None for none.

    Of several, one that cannot be trusted; an `auto_map` inside of another entry is named with it.
    """
    found = None
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value):
            return key
        if key == _MAP:
            found = _MAP
        elif isinstance(value, dict) and (inner := _asked(value)):
            return inner if inner != _MAP else f"{key}.{_MAP}"
    return found


def _references(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (automatic class, MODULE.CLASS) of everything that config.json and tokenizer_config.json name."""
    entries: dict[str, Any] = {}
    for found in (config.get(_MAP), _tokenizer_config(folder).get(_MAP)):
        if isinstance(found, Mapping):
            entries |= found
        elif found is not None:  # as old tokenizers have it
            entries[TOKENIZER] = found
    for name, value in entries.items():
        if isinstance(value, Sequence) and not isinstance(value, str):  # of tokenizers: slow and fast, or one of them
            named = [one for one in value if one is not None]
            value = named[-1] if named else ""
        yield str(name), str(value)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(folder / "tokenizer_config.json"))
    except (OSError, ValueError, RecursionError):  # whoever loads the tokenizer says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _how_to_trust(folder: Path) -> str:
    code = read_code(folder, may_run=False)
    own = "where Transformers has this architecture itself, remove auto_map from config.json"
    if not code.files:
        return f"none of its code is in the folder; {own}; else download it with its code into a folder, and read that"
    return (
        f"{own}; else read {code.described()}, and if that may run here, write `{KEY}: true` under `model:` of the"
        " specification"
    )


def _ambiguous(folder: Path, config: Mapping[str, Any]) -> PreflightError:
    return PreflightError(
        f"{folder} brings code for the model_type {config['model_type']!r}, for which there is code already: which of"
        " the two would run depends on who loads it",
        remedy=f"remove {_MAP} from config.json and {KEY} from the specification, or give it a model_type of its own",
    )


class _Sources(SourceLoader):
    """Makes modules from the files of code in a folder; none is made of other bytes than are known."""

    def __init__(self, folder: Path, code: ModelCode) -> None:
        self.folder = folder
        self.code = code

    def get_filename(self, fullname: str) -> str:
        """Where the module's source is."""
        return str(self.folder / f"{fullname.rpartition('.')[2]}.py")

    def get_data(self, path: str) -> bytes:
        """Return the source. Raises `PreflightError` if it is not the trusted one."""
        return _verified(Path(path), self.code)


class _Package(MetaPathFinder):
    """Finds the modules of one model's code: a package of their own, which holds them and nothing else."""

    def __init__(self, name: str, sources: _Sources) -> None:
        self.name = name
        self.sources = sources

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a module of the package comes from; None for other modules."""
        package, _, module = fullname.partition(".")
        if package != self.name:
            return None
        if not module:
            return ModuleSpec(fullname, None, is_package=True)
        return spec_from_loader(fullname, self.sources) if f"{module}.py" in self.sources.code.files else None


_turn = threading.Lock()


def _module(folder: Path, code: ModelCode, name: str) -> ModuleType:
    """Import a module of the code; the same code, in whatever folder, is imported once."""
    package = f"{_PACKAGE}{digest_of(dict(code.files))[:32]}"
    with _turn:
        known = (one for one in sys.meta_path if isinstance(one, _Package) and one.name == package)
        found = next(known, None)
        if found is None:
            sys.meta_path.append(_Package(package, _Sources(folder, code)))
        else:
            found.sources.folder = folder  # the one before may be gone
    return import_module(f"{package}.{name}")
