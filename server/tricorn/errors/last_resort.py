"""The end of a process whose tasks or threads do not end."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from faulthandler import cancel_dump_traceback_later, dump_traceback, dump_traceback_later
from os import _exit as end_process
from os import close, pipe, read, set_blocking, write
from signal import SIGINT, SIGTERM, getsignal, signal
from threading import Thread
from time import sleep as wait
from typing import TYPE_CHECKING, Any

from trio import Event, open_nursery, sleep
from trio.lowlevel import current_root_task, current_trio_token

from tricorn.errors.report import report
from tricorn.errors.stuck import stuck

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

STDERR = 2
GRACE = 1.0  # seconds beyond the time that a program has to end
NOTICE = 0.4  # seconds before the process is ended, when it is reported what is in the way
BLOCKED = 0.5  # seconds after that, if something holds the interpreter's lock


class LastResort:
    """Ends the process if it has not ended by itself `seconds` + `GRACE` after the first signal.

    Then the stacks of all threads are on stderr, and the exit status is 1. A thread does this, which holds the
    interpreter's lock: a thread that runs meanwhile cannot be looked at safely. It is there from the start, since later
    there may be no memory for one. If it does not get the lock, faulthandler does it without, `BLOCKED` seconds later.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._armed = Event()
        self._is_armed = False
        self._token = current_trio_token()
        self._is_over = False
        waiting, self._signals = pipe()
        set_blocking(self._signals, False)
        Thread(target=self._end_in_time, args=(waiting,), name="tricorn's last resort", daemon=True).start()

    def watch_signals(self) -> None:
        """Begin with the next SIGTERM or SIGINT, also if the loop is blocked then. Keeps what handles them now."""
        for each in (SIGTERM, SIGINT):
            before = getsignal(each)
            if callable(before):
                signal(each, self._handler(before))

    def _handler(self, before: Any) -> Any:
        def handle(number: int, frame: Any) -> None:
            if not self._is_armed and not self._is_over:
                self._is_armed = True
                write(self._signals, b"!")
                with suppress(RuntimeError):  # no memory for its thread
                    dump_traceback_later(self._seconds + GRACE + BLOCKED, exit=True, file=STDERR)
                self._token.run_sync_soon(self._armed.set)
            before(number, frame)

        return handle

    def _end_in_time(self, waiting: int) -> None:
        if read(waiting, 1):  # else it is over
            wait(self._seconds + GRACE)
            if not self._is_over:
                dump_traceback(STDERR)
                end_process(1)
        close(waiting)

    def close(self) -> None:
        """Let the process end by itself. The thread ends too, at the latest with the process."""
        self._is_over = True
        cancel_dump_traceback_later()
        close(self._signals)

    async def report_stuck(self) -> None:
        """Report which tasks are in the way shortly before the process is ended."""
        await self._armed.wait()
        await sleep(self._seconds + GRACE - NOTICE)
        root = current_root_task()
        tasks = () if root is None else tuple(stuck(root))
        report("CRITICAL", "the process does not end in time; it is ended now", tasks=tasks)


@asynccontextmanager
async def exit_in_time(seconds: float) -> AsyncGenerator[LastResort]:
    """Have the process end in time after a signal, whatever the tasks and threads in the block do.

    An Exception that the block raises passes as it is, not in a group.
    """
    resort = LastResort(seconds)
    failure: Exception | None = None
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(resort.report_stuck)
            try:
                yield resort
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        resort.close()
    if failure is not None:
        raise failure
