"""What the modules of a directory hide, if it stands first on `sys.path`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from os.path import realpath, relpath
from pkgutil import iter_modules

from tricorn.errors.audit.rules import Finding


def shadows(directory: str, path: Sequence[str]) -> list[Finding]:
    """Find the modules in a directory that hide others: of the standard library, or in other directories of `path`."""
    elsewhere = [each for each in path if realpath(each) != realpath(directory)]
    return sorted(_shadows(directory, elsewhere))


def _shadows(directory: str, elsewhere: Sequence[str]) -> Iterator[Finding]:
    for module in iter_modules([directory]):
        if module.name in sys.stdlib_module_names:
            hidden = "of the standard library"
        elif (spec := PathFinder.find_spec(module.name, elsewhere)) and spec.loader:
            hidden = f"in {spec.origin}"
        else:
            continue
        own = PathFinder.find_spec(module.name, [directory])
        file = relpath(own.origin, directory) if own and own.origin else module.name
        yield Finding(file, 1, "shadow", f"hides the module {module.name} {hidden}; give it another name")
