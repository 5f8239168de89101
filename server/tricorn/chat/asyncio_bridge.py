"""Code of asyncio in an agent: `await to_asyncio(f, x)`, and from there back, `await from_asyncio(run.say, text)`.

The asyncio code has a loop of its own, in a thread of its own. Cancellation goes both ways at once: a run that is
cancelled cancels the asyncio task, and an asyncio task that is cancelled in `from_asyncio` cancels what it waits for.
"""

from __future__ import annotations

import selectors
from asyncio import (
    AbstractEventLoop,
    CancelledError,
    Future,
    Runner,
    events,
    get_running_loop,
    wait,
)
from asyncio import Task as AsyncioTask
from asyncio import current_task as current_asyncio_task
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from sys import _current_frames
from threading import get_ident
from typing import Any, Generic, TypeVar, TypeVarTuple

from outcome import Error, Outcome, capture
from trio import CancelScope, Nursery, current_time, open_nursery, sleep_forever
from trio.lowlevel import Abort, Task, current_task, current_trio_token, reschedule, wait_task_rescheduled
from trio.to_thread import run_sync

from tricorn.chat.threads import ThreadLimit
from tricorn.errors.chain import is_any
from tricorn.errors.failures import PASSING, leaves
from tricorn.errors.report import report, report_error
from tricorn.errors.stuck import place

LOOPS = 100  # at a time, also those that are abandoned and have not ended; others wait
CLEAN_UP = 1.0  # seconds that a task has to end once it is cancelled; less than `close_timeout`, which an agent has

RUNNING_LOOP = events.__file__  # whose frame calls what a loop calls
WAITING_LOOP = selectors.__file__
FRAMES = 10

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_limit = ThreadLimit("loops of asyncio", LOOPS)


async def to_asyncio(function: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
    """Run an async function that needs asyncio, and return or raise what it does. It sees your context variables.

    The function has an asyncio loop of its own in a thread of its own. When it ends, so do the tasks that it started.
    From there, call functions of Trio with `from_asyncio`.

    If this is cancelled, the asyncio task is cancelled at once, and this waits for its end. If it returns or raises
    something nevertheless, so does this. If it has not ended after `CLEAN_UP` seconds, it is abandoned: a record says
    where it is, the thread goes on until the function ends, and what it raises then is reported.

    At most `LOOPS` of these run at a time; others wait.
    """
    async with open_nursery() as nursery:
        bridge = _Bridge(nursery, partial(function, *args))
        await bridge.perform()
        nursery.cancel_scope.cancel()  # what the asyncio code has left behind
    ended = bridge.ended
    if ended is None or (bridge.is_cancelled and isinstance(ended, Error) and _is_cancelled(ended.error)):
        await sleep_forever()  # raises Cancelled
    assert ended is not None, "only what is cancelled has no end"  # noqa: S101
    return ended.unwrap()


async def from_asyncio(function: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
    """Call an async function of Trio in code that `to_asyncio` runs, and return or raise what it does.

    The function sees your context variables. It is cancelled with the run, and then this raises asyncio's
    CancelledError. If this is cancelled, so is the function, and this waits for its end.

    Raises:
        RuntimeError: `to_asyncio` does not run this code, or has abandoned it.
    """
    bridge = _bridge.get(None)
    if bridge is None:
        raise RuntimeError("from_asyncio is for code that to_asyncio runs")
    call = _Call(partial(function, *args), get_running_loop())
    bridge.send(partial(copy_context().run, bridge.start, call))
    try:
        await wait([call.ended])  # which does not cancel it
    except CancelledError:
        bridge.send(call.scope.cancel)
        await wait([call.ended])
        if not call.ended.cancelled():
            call.ended.result()  # raises what the function has raised
        raise
    return call.ended.result()


class _Call(Generic[R]):
    """A call from asyncio to Trio, and in asyncio its end."""

    def __init__(self, function: partial[Awaitable[R]], loop: AbstractEventLoop) -> None:
        self.name = _name(function.func)
        self.scope = CancelScope()
        self.ended: Future[R] = loop.create_future()
        self._function = function
        self._loop = loop

    async def perform(self) -> None:
        """Perform it in a task of its own. All that it raises is for asyncio, but for a KeyboardInterrupt."""
        end: Callable[[], object] = self.ended.cancel
        try:
            with self.scope:
                end = partial(self.ended.set_result, await self._function())
        except BaseException as error:  # noqa: ASYNC103 - the task ends here, and its cancellation with it
            failures = [leaf for leaf in leaves(error) if not is_any(leaf, PASSING)]
            if failures:
                end = partial(self.ended.set_exception, error)
            if any(is_any(leaf, (KeyboardInterrupt,)) for leaf in leaves(error)):
                raise
        finally:
            self.tell(end)

    def refuse(self) -> None:
        """Say that nobody performs it any more."""
        self.tell(partial(self.ended.set_exception, RuntimeError("to_asyncio has abandoned this code")))

    def tell(self, end: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # of a loop that is closed: nobody waits
            self._loop.call_soon_threadsafe(end)


class _Bridge(Generic[R]):
    """One loop of asyncio in its thread, as Trio sees it.

    Attributes:
        ended: how the function ended; None if it was abandoned, or never began.
        is_cancelled: it is to end.
    """

    def __init__(self, nursery: Nursery, function: partial[Awaitable[R]]) -> None:
        self.ended: Outcome[R] | None = None
        self.is_cancelled = False
        self._nursery = nursery
        self._function = function
        self._trio = current_trio_token()
        self._hosting = CancelScope(shield=True)
        self._loop: AbstractEventLoop | None = None
        self._task: AsyncioTask[Any] | None = None
        self._thread = 0
        self._is_told = False  # to end, in its loop
        self._is_over = False  # for Trio

    # In Trio

    async def perform(self) -> None:
        """Perform the function until it ends, or is abandoned. Raises nothing, also not Cancelled."""
        self._nursery.start_soon(self._host, current_task())
        await wait_task_rescheduled(self._cancel)

    def start(self, call: _Call[Any]) -> None:
        """Start what asyncio calls."""
        if self._is_over:
            call.refuse()
        else:
            self._nursery.start_soon(call.perform, name=call.name)

    def _cancel(self, raise_cancel: object) -> Abort:
        """Cancel the asyncio task now; if it does not end in time, or has not begun, leave it there."""
        self.is_cancelled = True  # what the thread looks at after it has set the task
        if self._loop is None or self._task is None:
            self._hosting.cancel()
        else:
            self._is_told = True
            self._hosting.deadline = current_time() + CLEAN_UP
            with suppress(RuntimeError):  # it is closed already
                self._loop.call_soon_threadsafe(self._task.cancel)
        return Abort.FAILED

    async def _host(self, waiting: Task) -> None:
        try:
            with self._hosting:
                thread = partial(capture, self._run_loop)
                self.ended = await run_sync(thread, abandon_on_cancel=True, limiter=_limit.limiter())
        finally:
            self._is_over = True
            if self.ended is None and self._is_told:
                self._report_abandoned()
            reschedule(waiting)

    def _report_abandoned(self) -> None:
        message = "asyncio code does not end when it is cancelled; its thread goes on without it"
        report("ERROR", message, function=_name(self._function.func), tasks=self._where())

    def _where(self) -> tuple[str, ...]:
        """Return where the task waits; or, if something holds up the loop, where that is, the innermost frame first."""
        found: list[str] = []
        frame = _current_frames().get(self._thread)
        while frame is not None and frame.f_code.co_filename != RUNNING_LOOP:
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        if (found and not found[0].startswith(WAITING_LOOP)) or self._task is None:
            return tuple(found[:FRAMES])
        return (place(self._task.get_coro()),)

    # In its thread

    def send(self, function: Callable[[], object]) -> None:
        """Call a function in Trio soon. Raises RuntimeError if Trio has ended."""
        self._trio.run_sync_soon(function)

    def _run_loop(self) -> R:
        try:
            with Runner() as runner:
                return runner.run(self._main())
        except BaseException as error:
            if self._is_over and not _is_cancelled(error):
                report_error(error, function=_name(self._function.func))
            raise

    async def _main(self) -> R:
        self._thread = get_ident()
        self._loop = get_running_loop()
        self._loop.set_exception_handler(_report_loop)
        self._task = current_asyncio_task()
        if self.is_cancelled:
            raise CancelledError
        _bridge.set(self)
        return await self._function()


def _report_loop(loop: AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what asyncio would log: for example a task's exception that nobody has asked for."""
    error = context.get("exception")
    if error is None:
        report("ERROR", f"asyncio: {context['message']}")
    else:
        report_error(error, context={"asyncio": context["message"]})


def _is_cancelled(error: BaseException) -> bool:
    return is_any(error, (CancelledError,))


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


_bridge: ContextVar[_Bridge[Any]] = ContextVar("bridge")
