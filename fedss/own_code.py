"""Code of a user's own, by the name ``package.module:object``: found, imported, known again.

The module is looked for as ``python -m`` does: in the current directory first, then on Python's
import path. To find it imports nothing. A run keeps the name and the SHA-256 of the module's file;
what that file imports from others is not in it.
"""

import difflib
import hashlib
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from fedss.errors import ConfigError
from fedss.text import one_line

CODE_FIELDS = ("backbone", "sampler", "objective", "augment")
"""Fields of the configuration that may name code."""
FORM = "package.module:function"
"""How people are told to write a name."""

_WORD = r"[^\W\d]\w*"
_NAME = re.compile(rf"(?!timm:){_WORD}(\.{_WORD})*:{_WORD}(\.{_WORD})*")


@dataclass(frozen=True)
class OwnCode:
    """Code that a run is made with.

    Attributes:
        name: ``package.module:object``.
        sha256: of the module's file, in hex.
    """

    name: str
    sha256: str


def is_code(name: object) -> bool:
    """Whether a setting's value is the name of code."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def code_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of a configuration's settings that name code."""
    return {field: settings[field] for field in CODE_FIELDS if is_code(settings.get(field))}


def find_code(name: str) -> OwnCode:
    """What a name leads to now. Imports nothing.

    Raises:
        ConfigError: there is no such module, or it has no file that can be read.
    """
    file = code_file(name)
    try:
        return OwnCode(name, hashlib.sha256(file.read_bytes()).hexdigest())
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {file}: {error.strerror}") from error


def code_file(name: str) -> Path:
    """The file of a name's module. Imports nothing, packages included.

    Raises:
        ConfigError: there is no such module, or it has no file.
    """
    module = name.partition(":")[0]
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(loaded)
    with _current_directory_first():
        spec = _find_module(module)
    if spec is None:
        raise ConfigError(
            f"{name}: no module {module} in {os.getcwd()} or among the installed packages; install "
            "its package, or start where it lies"
        )
    if spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"{name}: expected a module with a file, and {module} has none")
    return Path(spec.origin).absolute()


def import_code(name: str) -> Any:
    """What a name stands for. **Runs the code of its module.**

    Raises:
        ConfigError: there is no such module, it cannot be imported, or has no such object.
    """
    file, (module, _, path) = code_file(name), name.partition(":")
    if module not in sys.modules and not _on_path(os.getcwd()):
        # For good: its functions may import others from there later.
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"{name}: importing {file} fails: {one_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{name}: {file} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def check_code(kept: OwnCode, trusted: bool, where: object) -> None:
    """Whether code that a run or a model was made with may be imported, and is what it was.

    Args:
        kept: what it was.
        trusted: it may be imported.
        where: the file or folder that names it.

    Raises:
        ConfigError: it is not trusted; it is not there, or its file is another one.
    """
    if not trusted:
        raise untrusted(kept.name, where)
    now = find_code(kept.name)
    if now != kept:
        raise ConfigError(
            f"{where} was made with {other_file(kept, now)}; put the file back as it was, or name "
            "code of the same structure under another name (--backbone; backbone= in Python)"
        )


def other_file(kept: OwnCode, now: OwnCode) -> str:
    """In what two of one name differ, for people."""
    return (
        f"another {kept.name}: its file had SHA-256 {kept.sha256:.12}, {code_file(kept.name)} has "
        f"{now.sha256:.12}"
    )


def untrusted(name: str, where: object) -> ConfigError:
    """The error that says what would be imported, and from where."""
    try:
        place = str(code_file(name))
    except ConfigError:
        place = "nowhere: there is no such module here"
    return ConfigError(
        f"{where}: would import {name} from {place}; allow it, if you trust that code, with "
        "--trust-code (trust_code=True in Python)"
    )


def _find_module(module: str) -> ModuleSpec | None:
    """As ``importlib.util.find_spec``, which imports the packages that a module is in."""
    importlib.invalidate_caches()  # A file may have been written a moment ago.
    first, *others = module.split(".")
    finders = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
    spec = next((found for find in finders if (found := find(first, None))), None)
    for end in range(1, len(others) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        full = ".".join([first, *others[:end]])
        spec = _find_in(full, list(spec.submodule_search_locations))
    return spec


def _find_in(module: str, folders: Sequence[str]) -> ModuleSpec | None:
    """A module of a package that lies in these folders."""
    without_init = ModuleSpec(module, None, is_package=True)
    for folder in folders:
        spec = getattr(pkgutil.get_importer(folder), "find_spec", lambda name: None)(module)
        if spec is not None and spec.loader is not None:
            found: ModuleSpec = spec
            return found
        if spec is not None:
            assert without_init.submodule_search_locations is not None
            without_init.submodule_search_locations += spec.submodule_search_locations
    return without_init if without_init.submodule_search_locations else None


def _on_path(folder: str) -> bool:
    return folder in [place or os.getcwd() for place in sys.path]


@contextmanager
def _current_directory_first() -> Iterator[None]:
    before = [*sys.path]
    if not _on_path(os.getcwd()):
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before
