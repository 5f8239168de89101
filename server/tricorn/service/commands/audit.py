"""`tricorn audit`: prove the rules of the error path on source."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from json import dumps
from pathlib import Path

from tricorn.errors.audit import Finding, audit, defines, locate, python_files, shadows
from tricorn.service.loader import agent_name, look_here_for
from tricorn.settings import SettingError


def command(arguments: Namespace) -> int:
    """Print the findings. Modules are looked for in the current directory too."""
    sys.path.append(os.getcwd())
    findings = audit_targets(arguments.targets)
    for finding in findings:
        print(dumps(finding._asdict(), ensure_ascii=False, separators=(",", ":")) if arguments.json else finding)
    return 1 if findings else 0


def audit_targets(targets: Sequence[str]) -> list[Finding]:
    """Audit agents (module:function), files and directories. Raises `SettingError` for what cannot be audited."""
    try:
        found = audit([file for target in targets for file in _sources(target)])
        if sys.path[:1] == [os.getcwd()]:  # since an agent is there
            found += shadows(os.getcwd(), sys.path)
    except SettingError:
        raise
    except (SyntaxError, ValueError, OSError, RecursionError) as error:
        raise SettingError(f"cannot audit: {' '.join(str(error).split())}") from None
    return found


def _sources(target: str) -> list[Path]:
    path = Path(target)
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := python_files(path):
            return files
        raise SettingError(f"audit {target}: there is no Python file in this directory")
    if ":" not in target:
        raise SettingError(f"audit {target}: there is no such file or directory")
    name = agent_name(target)
    look_here_for(name.module)
    file = locate(name.module)
    if file is None:
        raise name.error(f"there is no source of {name.module} in this directory or installed")
    if not defines(file, name.path.partition(".")[0]):
        raise name.error(f"there is no {name.path} in {name.module}")
    return [file]
