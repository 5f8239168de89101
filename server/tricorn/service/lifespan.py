"""The life of an agent: its factory is entered before the first run, and left after the last one."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from trio import Cancelled, CancelScope, current_time
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from tricorn.errors.chain import is_any
from tricorn.errors.failures import PASSING, leaves
from tricorn.errors.report import report, report_error
from tricorn.service.loader import AgentFactory, check_made, describe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from tricorn.chat import Agent


class AgentFailed(Exception):
    """An agent's factory raised. The text says in one line what, and where."""


@dataclass
class Life:
    """An agent that lives, and when its end must be over, in Trio's time."""

    agent: Agent
    leave_by: float = inf


@asynccontextmanager
async def living(agent: Agent | AgentFactory, close_timeout: float) -> AsyncGenerator[Life]:
    """Have an agent for the time of the block. If there is a factory, that makes it.

    Leaving the factory takes at most `close_timeout` seconds, and ends by `leave_by`; then it is cancelled, and that is
    reported. What it raises is reported too. It neither hides nor swallows an error of the block.

    Raises:
        AgentFailed: the factory raised when it was entered, or a task of its own failed, which has cancelled the block.
        SettingError: it makes no agent.
    """
    if not isinstance(agent, AgentFactory):
        await checkpoint()
        yield Life(agent)
        return
    with CancelScope() as scope:  # around all of it, since the factory may leave scopes of its own open in between
        context, made = await _enter(agent)
        life, failure = None, None
        try:
            life = Life(check_made(agent, made))
            yield life
        except BaseException as error:  # noqa: ASYNC103 - the checkpoint raises a cancellation again
            failure = await _leave(context, error, scope, life, close_timeout)
            if not all(is_any(leaf, (Cancelled,)) for leaf in leaves(error)):
                raise
        else:
            await _leave(context, None, scope, life, close_timeout)
            return
        await checkpoint_if_cancelled()  # else the cancellation was that of a scope that the factory had open
        if failure is not None:
            raise AgentFailed(f"{agent.name.label}: raised {describe(failure)}")


async def _enter(factory: AgentFactory) -> tuple[AbstractAsyncContextManager[object], object]:
    context: Any = None
    made: object = None
    manages = False
    failure: BaseException | None = None
    try:
        context = factory.open()
        if manages := hasattr(context, "__aenter__") and hasattr(context, "__aexit__"):
            made = await context.__aenter__()
    except BaseException as error:  # noqa: ASYNC103 - AgentFailed follows, or this is raised again
        failure = next((leaf for leaf in leaves(error) if not is_any(leaf, PASSING)), None)
        if failure is None:
            raise
    if failure is not None:
        raise AgentFailed(f"{factory.name.label}: starting it raised {describe(failure)}")
    if not manages:
        found = f"an object of type {type(context).__name__}"
        raise factory.name.error(f"returns {found}; must return an async context manager")
    return context, made


async def _leave(
    context: AbstractAsyncContextManager[object],
    in_flight: BaseException | None,
    scope: CancelScope,
    life: Life | None,
    close_timeout: float,
) -> BaseException | None:
    """Leave a factory, report what it raises, and return the first such error.

    Raises nothing but a KeyboardInterrupt, and nothing at all over what is in flight.
    """
    known = [] if in_flight is None else list(leaves(in_flight))
    scope.deadline = current_time() + close_timeout
    if life is not None:
        scope.deadline = min(scope.deadline, life.leave_by)
    scope.shield = True
    failure = None
    try:
        await context.__aexit__(None if in_flight is None else type(in_flight), in_flight, None)
    except BaseException as raised:  # noqa: ASYNC103 - a Cancelled here is that of `scope`
        new = [leaf for leaf in leaves(raised) if not any(leaf is each for each in known)]
        if any(is_any(leaf, (Cancelled,)) for leaf in new):
            report("ERROR", "what the agent had opened was not closed in time")
        failure = next((leaf for leaf in new if not is_any(leaf, PASSING)), None)
        if failure is not None:
            report_error(raised, action="closing what the agent had opened")
        interrupt = next((leaf for leaf in new if is_any(leaf, (KeyboardInterrupt,))), None)
        if in_flight is None and interrupt is not None:
            raise interrupt from None  # noqa: ASYNC104
    scope.shield = False
    return failure
