"""Whether Python files change, for `tricorn serve --reload`: all of them are looked at again and again.

That needs no dependency and works on every file system, also on those that do not tell of changes, such as mounts of
containers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trio import sleep, to_thread

from tricorn.errors.audit import locate, python_files
from tricorn.service.loader import agent_name, look_here_for

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE = 0.25  # seconds between two looks


class SourceWatch:
    """Watches the working directory and the agent's module or package, from now on.

    Raises `SettingError` if the name of the agent cannot be one.
    """

    def __init__(self, agent: str) -> None:
        module = agent_name(agent).module
        look_here_for(module)
        self._roots = [Path.cwd()]
        if (source := locate(module.partition(".")[0])) is not None:
            self._roots.append(source.parent if source.name == "__init__.py" else source)
        self._seen = self._look()

    async def changed(self) -> list[str]:
        """Return which files have changed, as soon as two looks find the same: an editor may write several."""
        before = self._seen
        while True:
            await sleep(PAUSE)
            now = await to_thread.run_sync(self._look)
            if now == before != self._seen:
                differs = sorted({path for path, _ in now.items() ^ self._seen.items()})
                self._seen = now
                return differs
            before = now

    def _look(self) -> dict[str, tuple[int, int]]:
        """Return when each file was written, and its size."""
        found = {}
        for path in self._files():
            try:
                status = path.stat()
            except OSError:  # it is gone
                continue
            found[str(path)] = (status.st_mtime_ns, status.st_size)
        return found

    def _files(self) -> Iterator[Path]:
        for root in self._roots:
            try:
                yield from python_files(root) if root.is_dir() else [root]
            except OSError:  # a directory is gone; the next look finds the others
                continue
