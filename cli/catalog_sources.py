"""Where declarations of notification types are found: Python modules, YAML files, and directories of both.

A directory is searched for YAML files with `notification_types:` at their top, and for Python files that mention
notification_type; only those are imported.

    notification_types:
      - id: procurement/purchase-order-created
        name: Purchase order created
        retention: 30d
        payload_schema: {type: object, required: [order]}
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cli.notification_types import Declaration, declaration_of, is_declared

_YAML: Final = (".yaml", ".yml")
_KEY: Final = "notification_types"
_PASSED_BY: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv"})
_MOST_FILES: Final = 20_000
_MOST_BYTES: Final = 4 << 20


class SourceError(Exception):
    """A source cannot be used; the message says which and why."""


def declarations_in(target: str) -> list[Declaration]:
    """Every notification type that a module, file or directory declares, by id; raises SourceError."""
    path = Path(target)
    if path.is_dir():
        found = [one for file in _files(path) for one in _in_file(file, is_named=False)]
    elif path.is_file():
        found = list(_in_file(path, is_named=True))
    elif all(part.isidentifier() for part in target.split(".")):
        found = list(_in_package(target))
    else:
        raise SourceError(f"{target} is neither a file, nor a directory, nor the name of a Python module.")
    by_id: dict[str, Declaration] = {}
    for one in found:
        if by_id.setdefault(one.id, one) != one:
            raise SourceError(f"{one.id} is declared twice, and not the same.")
    if not by_id:
        raise SourceError(f"{target} declares no notification types.")
    return [by_id[one_id] for one_id in sorted(by_id)]


def _files(directory: Path) -> Iterator[Path]:
    """Its files in order of their paths; hidden directories and installed packages left out."""
    seen = 0
    for folder, inner, names in os.walk(directory):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in _PASSED_BY)
        for name in sorted(names):
            seen += 1
            if seen > _MOST_FILES:
                raise SourceError(f"{directory} holds more than {_MOST_FILES:,} files; name a smaller one.")
            yield Path(folder) / name


def _in_file(path: Path, *, is_named: bool) -> Iterator[Declaration]:
    if path.suffix in _YAML:
        yield from _in_yaml(path, is_named=is_named)
    elif path.suffix == ".py" and (is_named or "notification_type" in _text(path)):
        yield from _in_module(_imported_file(path))
    elif is_named:
        raise SourceError(f"{path} is neither Python nor YAML.")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    notification_types: list[Declaration]


def _in_yaml(path: Path, *, is_named: bool) -> list[Declaration]:
    text = _text(path)
    if not is_named and f"{_KEY}:" not in text:
        return []
    try:
        return _Document.model_validate(yaml.safe_load(text)).notification_types
    except yaml.YAMLError as error:
        raise SourceError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors())
        raise SourceError(f"{path}: {problems}") from error


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


# Modules


def _in_package(name: str) -> Iterator[Declaration]:
    module = _imported(name, Path.cwd())
    yield from _in_module(module)
    for one in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        if one.name.rpartition(".")[2] != "__main__":
            yield from _in_module(_imported(one.name, Path.cwd()))


def _in_module(module: ModuleType) -> Iterator[Declaration]:
    for value in {id(one): one for one in vars(module).values() if is_declared(one)}.values():
        try:
            yield declaration_of(value)
        except TypeError as error:
            raise SourceError(f"{module.__name__}: {error}") from error


def _imported_file(path: Path) -> ModuleType:
    """By the name under which its own package knows it, so that its imports work."""
    file = path.resolve()
    root, parts = file.parent, [] if file.stem == "__init__" else [file.stem]
    while (root / "__init__.py").exists() and root != root.parent:
        parts.insert(0, root.name)
        root = root.parent
    return _imported(".".join(parts), root)


def _imported(name: str, root: Path) -> ModuleType:
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise SourceError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
