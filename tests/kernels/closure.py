"""Which kernels an inner test file exercises, read from the source that it imports.

Files are followed from import to import. Of the two packages that only hand names on, just the
homes of the names in use are: `ops.bias_gelu` leads to `ops.activation`, `sf.Model` to
`model.pretrained`. A twin is found by name when an op runs, so a room of `ops` leads to the room of
`kernels` that has its name.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from kernels.in_process import HERE, ROOT

PACKAGE = "spanbert_fast"
OPS, KERNELS = f"{PACKAGE}.ops", f"{PACKAGE}.kernels"


def kernel_files(path: Path) -> list[Path]:
    """The files of `spanbert_fast/kernels` that code of a file of tests reaches, sorted."""
    reached: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += filter(None, map(source_of, modules_of(file)))
    room = ROOT.joinpath(*KERNELS.split("."))
    return sorted(file for file in reached if room in file.parents)


def source_of(module: str) -> Path | None:
    """The file of a module of the package or of the tests; None if it is of neither."""
    base = ROOT if module.split(".")[0] == PACKAGE else HERE.parent
    path = base.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def modules_of(path: Path) -> tuple[str, ...]:
    """The modules whose code a file needs when it is imported or when its functions run."""
    found = list(_modules_used(ast.parse(path.read_text())))
    found += [module.replace(OPS, KERNELS) for module in found if module.startswith(f"{OPS}.")]
    # Python runs the packages around a module first.
    for module in found.copy():
        parts = module.split(".")
        parents = [".".join(parts[:count]) for count in range(1, len(parts))]
        found += [parent for parent in parents if parent.startswith(KERNELS)]
    return tuple(found)


def _modules_used(tree: ast.Module) -> Iterator[str]:
    handing_on: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                handing_on[alias.asname or alias.name] = alias.name
                yield from _unless_handing_on(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from _unless_handing_on(node.module)
            for alias in node.names:
                module = _home(node.module, alias.name)
                handing_on[alias.asname or alias.name] = module
                yield from _unless_handing_on(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            package = handing_on.get(node.value.id)
            if package in (PACKAGE, OPS):
                yield from _unless_handing_on(_home(package, node.attr))


def _unless_handing_on(module: str) -> tuple[str, ...]:
    return () if module in (PACKAGE, OPS) else (module,)


def _home(module: str, name: str) -> str:
    """The module that defines what `from module import name` gives."""
    if module in (PACKAGE, OPS):
        path = source_of(module)
        assert path is not None
        if (home := _handed_on(path).get(name, module)) != module:
            return home
    part = f"{module}.{name}"
    return module if source_of(part) is None else part


@functools.cache
def _handed_on(path: Path) -> dict[str, str]:
    """Names that the `__init__` of a package hands on, each with the module it is taken from."""
    return {
        alias.name: node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
