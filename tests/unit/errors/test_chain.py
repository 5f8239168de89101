"""Rule E8: which error of a chain is the first that was not handled, and what a record says of the others."""

from __future__ import annotations

import json
import linecache
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from os import environ
from types import TracebackType
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tricorn import Disconnected, Refuse
from tricorn.errors.chain import Interruption, first_of, hides_an_error, in_order
from tricorn.errors.report import LINE_MAX, TRACE_MAX, report_error
from tricorn.errors.text import ERRORS_SHOWN, title

Record = dict[str, Any]

SLACK = 1000  # characters that say how many were left out


@contextmanager
def written() -> Iterator[list[Record]]:
    """The records that go to stderr, whose lines have a limit."""
    records: list[Record] = []

    def send(line: bytes) -> bool:
        assert len(line) <= LINE_MAX
        records.append(json.loads(line))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(report_error.__globals__, "_send", send)
        yield records


@pytest.fixture
def records() -> Iterator[list[Record]]:
    with written() as records:
        yield records


class First(Exception):
    """What happened."""


class Later(Exception):
    """What came of it, or of nothing."""


def fail(error: type[BaseException] = First) -> None:
    raise error("text")


def clean_up() -> None:
    time.time()  # type: ignore[name-defined]  # noqa: F821 - the incident's fault


def forgetful() -> None:
    """Handles what it caught itself, and knows nothing of what its callers handle."""
    try:
        fail(KeyError)
    except KeyError:
        raise Later("text") from None


class FailingExit:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        clean_up()


class Unsuppressed:
    """As a tool is left whose log fails."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            fail(OSError)
        except OSError:
            raise Interruption("the log is away") from None


@contextmanager
def generator() -> Iterator[None]:
    try:
        yield
    finally:
        clean_up()


# Each raises; the headline is a First unless the table says another.


def alone() -> None:
    fail()


def a_bug_in_an_except_body() -> None:
    try:
        fail()
    except Exception:
        clean_up()
        raise


def a_bug_in_an_except_body_that_names_the_error() -> None:
    try:
        fail()
    except First:
        clean_up()


def a_bug_in_a_finally() -> None:
    try:
        fail()
    finally:
        clean_up()


def a_bug_in_an_exit() -> None:
    with FailingExit():
        fail()


def a_bug_in_a_context_manager_that_is_a_generator() -> None:
    with generator():
        fail()


def a_bug_in_an_exit_stack() -> None:
    with ExitStack() as stack:
        stack.callback(clean_up)
        fail()


def bugs_in_three_handlers() -> None:
    with FailingExit(), generator():
        a_bug_in_an_except_body()


def a_bug_in_handling_a_bug() -> None:
    try:
        a_bug_in_an_except_body()
    except NameError:
        clean_up()


def a_fallback_that_fails() -> None:
    """Its own failure shows that the error was not handled."""
    try:
        fail()
    except First:
        raise Later("text")  # noqa: B904


def a_translation() -> None:
    try:
        fail()
    except First as error:
        raise Later("text") from error


def two_translations() -> None:
    try:
        a_translation()
    except Later as error:
        raise RuntimeError from error


def a_cause_that_was_never_raised() -> None:
    raise Later("text") from First("text")


def a_cause_while_another_is_handled() -> None:
    try:
        fail(Later)
    except Later:
        raise RuntimeError from First("text")


def a_translation_of_a_callee_while_handling() -> None:
    try:
        fail()
    except First:
        a_translation_of_its_own()


def a_translation_of_its_own() -> None:
    try:
        fail(KeyError)
    except KeyError as error:
        raise Later("text") from error


def from_none_where_it_was_caught() -> None:
    """The author says that the error does not matter."""
    try:
        fail(KeyError)
    except KeyError:
        fail_from_none()


def fail_from_none() -> None:
    raise First("text") from None


def from_none() -> None:
    try:
        fail(Later)
    except Later:
        raise First("text") from None


def from_none_after_two() -> None:
    try:
        try:
            fail(Later)
        except Later:
            fail(KeyError)
    except KeyError:
        raise First("text") from None


def from_none_in_a_callee() -> None:
    try:
        fail()
    except First:
        forgetful()


def an_environment_variable_that_is_missing() -> None:
    """The incident, as `os.environ` hides it: it raises `KeyError(name) from None`."""
    try:
        fail()
    except Exception:
        environ["TRICORN_NO_SUCH_VARIABLE"]


def an_interruption_over_an_error() -> None:
    try:
        fail()
    except First:
        raise Disconnected(1006, "gone")  # noqa: B904


def an_interruption_from_none_in_an_exit() -> None:
    with Unsuppressed():
        fail()


def a_generator_exit_over_an_error() -> None:
    try:
        fail()
    except First:
        raise GeneratorExit  # noqa: B904


def an_interrupt_over_an_error() -> None:
    try:
        fail()
    except First:
        raise KeyboardInterrupt  # noqa: B904


def an_exit_over_an_error() -> None:
    try:
        fail()
    except First:
        raise SystemExit(1)  # noqa: B904


def an_error_over_an_interruption() -> None:
    try:
        fail(Interruption)
    except Interruption:
        fail()


def an_error_in_answering_a_refused_request() -> None:
    try:
        raise Refuse(400)
    except Refuse:
        fail()


def an_interruption_alone() -> None:
    fail(Interruption)


def a_group() -> None:
    raise ExceptionGroup("group", [First("text"), Later("text")])


def a_group_that_an_error_led_to() -> None:
    try:
        fail()
    except First:
        raise ExceptionGroup("group", [Later("text")])  # noqa: B904


def a_group_as_a_cause() -> None:
    inner = ExceptionGroup("inner", [First("text"), KeyError()])
    raise Later("text") from BaseExceptionGroup("outer", [GeneratorExit(), inner])


def a_member_with_a_chain() -> None:
    chained = Later("text")
    chained.__context__ = First("text")
    raise ExceptionGroup("group", [chained, KeyError()])


def a_group_of_endings_and_an_error() -> None:
    raise BaseExceptionGroup("group", [Interruption(), GeneratorExit(), First("text")])


def an_except_star_that_fails() -> None:
    try:
        raise ExceptionGroup("group", [First("text")])
    except* First:
        clean_up()


def a_circle() -> None:
    one, two = Later("text"), First("text")
    one.__context__, two.__context__ = two, one
    raise one


def a_group_in_its_own_context() -> None:
    first, later = First("text"), Later("text")
    group = ExceptionGroup("group", [later])
    later.__context__, first.__context__ = first, group
    raise group


def a_long_chain() -> None:
    error: Exception = First("text")
    for number in range(100_000):
        after = Later(number)
        after.__context__ = error
        error = after
    raise error


def handled_before() -> None:
    """An `except` that was left without another error has handled its own."""
    with suppress(KeyError):
        fail(KeyError)
    with suppress(Later):
        a_translation()
    fail()


async def interrupted(handle: Callable[[], Awaitable[object]]) -> BaseException:
    kept: list[BaseException] = []
    with trio.move_on_after(0):
        try:
            await handle()
        except BaseException as ending:
            kept.append(ending)
            raise
    return kept[0]


async def rest() -> None:
    await trio.sleep(1)


async def cancelled_while_handling() -> None:
    async def handle() -> None:
        try:
            fail()
        except Exception:
            await rest()
            raise

    raise await interrupted(handle)


async def cancelled_in_a_clause_that_names_the_error() -> None:
    """Nothing has failed: the error was being handled when it was interrupted. What fails after it is the first."""

    async def handle() -> None:
        try:
            fail(KeyError)
        except KeyError:
            await rest()

    ending = await interrupted(handle)
    try:
        raise ending
    finally:
        fail()


async def a_bug_after_a_cancellation() -> None:
    async def handle() -> None:
        try:
            await rest()
        finally:
            fail()

    raise await interrupted(handle)


async def a_nursery_with_two_failures() -> None:
    async def later() -> None:
        try:
            await trio.sleep_forever()
        finally:
            fail(Later)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        await trio.testing.wait_all_tasks_blocked()
        fail()


async def a_nursery_in_a_handler() -> None:
    try:
        fail()
    except Exception:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            clean_up()


@asynccontextmanager
async def _resource() -> Any:
    try:
        yield
    finally:
        clean_up()


async def a_bug_in_an_async_exit() -> None:
    async with _resource():
        fail()


SHAPES: list[Callable[[], Any]] = [
    alone,
    a_bug_in_an_except_body,
    a_bug_in_an_except_body_that_names_the_error,
    a_bug_in_a_finally,
    a_bug_in_an_exit,
    a_bug_in_a_context_manager_that_is_a_generator,
    a_bug_in_an_exit_stack,
    bugs_in_three_handlers,
    a_bug_in_handling_a_bug,
    a_fallback_that_fails,
    a_translation,
    two_translations,
    a_cause_that_was_never_raised,
    a_cause_while_another_is_handled,
    a_translation_of_a_callee_while_handling,
    from_none,
    from_none_after_two,
    from_none_in_a_callee,
    an_environment_variable_that_is_missing,
    an_interruption_over_an_error,
    an_interruption_from_none_in_an_exit,
    a_generator_exit_over_an_error,
    an_interrupt_over_an_error,
    an_exit_over_an_error,
    an_error_over_an_interruption,
    an_error_in_answering_a_refused_request,
    a_group,
    a_group_that_an_error_led_to,
    a_group_as_a_cause,
    a_member_with_a_chain,
    a_group_of_endings_and_an_error,
    an_except_star_that_fails,
    a_circle,
    a_group_in_its_own_context,
    a_long_chain,
    handled_before,
    cancelled_while_handling,
    cancelled_in_a_clause_that_names_the_error,
    a_bug_after_a_cancellation,
    a_nursery_with_two_failures,
    a_nursery_in_a_handler,
    a_bug_in_an_async_exit,
]
OTHERS = {  # whose headline is no First
    from_none_where_it_was_caught: "KeyError: 'text'",  # the function with the `from None` has caught nothing
    an_interruption_alone: "Interruption: text",
}


async def raised_by(shape: Callable[[], Any]) -> BaseException:
    try:
        running = shape()
        if isinstance(running, Awaitable):
            await running
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS], ids=lambda shape: shape.__name__)
async def test_the_headline_is_the_first_error(shape: Callable[[], Any], records: list[Record]) -> None:
    error = await raised_by(shape)
    report_error(error)
    [record] = records
    assert record["message"] == OTHERS.get(shape, "First: text")
    shown = in_order(error)
    if len(shown) <= ERRORS_SHOWN:
        for each in shown:
            assert type(each) is trio.Cancelled or f"{type(each).__name__}" in record["stack_trace"]
    else:
        assert f"{len(shown) - ERRORS_SHOWN} exceptions left out" in record["stack_trace"]


# What ends a task and hides an error


async def a_broad_clause() -> None:
    try:
        fail()
    except Exception:
        await rest()


async def a_bare_except() -> None:
    try:
        fail()
    except:  # noqa: E722
        await rest()


async def a_finally() -> None:
    try:
        fail()
    finally:
        await rest()


async def a_clause_that_raises_again() -> None:
    try:
        fail()
    except First:
        await rest()
        raise


async def a_clause_that_raises_what_it_caught() -> None:
    try:
        fail()
    except (First, KeyError) as error:
        await rest()
        raise error


async def a_clause_that_translates() -> None:
    try:
        fail()
    except First as error:
        await rest()
        raise Later from error


class Closing:
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        await rest()


async def an_exit_that_waits() -> None:
    async with Closing():
        fail()


async def a_clause_within_a_broad_one() -> None:
    try:
        fail()
    except Exception:
        try:
            fail(KeyError)
        except KeyError:
            await rest()
        raise


async def a_clause_that_names_it() -> None:
    try:
        fail()
    except First:
        await rest()


async def the_second_of_three_clauses() -> None:
    try:
        fail()
    except OSError:
        raise
    except (KeyError, First) as error:
        if error.args:
            await rest()
    except Exception:
        raise


async def a_loop_in_a_clause() -> None:
    try:
        fail()
    except First:
        for _ in range(3):
            async with trio.open_nursery():
                try:
                    await rest()
                finally:
                    pass


async def a_clause_around_a_finally() -> None:
    try:
        try:
            fail()
        finally:
            pass
    except First:
        return await rest()


async def a_clause_that_may_fail_with_another() -> None:
    try:
        fail()
    except First:
        await rest()
        if rest:  # type: ignore[truthy-function]
            raise Later("not found")  # noqa: B904


async def a_clause_that_ends_from_none() -> None:
    """As AnyIO's channels wait for an item."""
    try:
        fail()
    except First:
        await rest()
        raise Later("the end") from None


async def a_clause_in_what_was_called() -> None:
    await a_clause_that_names_it()


HIDING = [
    a_broad_clause,
    a_bare_except,
    a_finally,
    a_clause_that_raises_again,
    a_clause_that_raises_what_it_caught,
    a_clause_that_translates,
    an_exit_that_waits,
    a_clause_within_a_broad_one,
]
HANDLING = [
    a_clause_that_names_it,
    the_second_of_three_clauses,
    a_loop_in_a_clause,
    a_clause_around_a_finally,
    a_clause_that_may_fail_with_another,
    a_clause_that_ends_from_none,
    a_clause_in_what_was_called,
    rest,
]


@pytest.mark.parametrize("handle", [*HIDING, *HANDLING], ids=lambda handle: handle.__name__)
async def test_a_cancellation_hides_what_was_not_being_handled_on_purpose(
    handle: Callable[[], Awaitable[object]],
) -> None:
    ending = await interrupted(handle)
    assert hides_an_error(ending) is (handle in HIDING)
    assert hides_an_error(BaseExceptionGroup("a nursery's", [ending])) is (handle in HIDING)


async def test_a_cancellation_does_not_hide_what_the_task_that_cancels_is_handling() -> None:
    endings: list[BaseException] = []

    async def wait(scope: trio.CancelScope) -> None:
        with scope:
            try:
                await trio.sleep_forever()
            except trio.Cancelled as ending:
                endings.append(ending)
                raise

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(wait, scope)
        await trio.testing.wait_all_tasks_blocked()
        try:
            fail()
        except Exception as error:
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            handled = error
    assert endings[0].__context__ is handled
    assert not hides_an_error(endings[0])


async def test_an_ending_with_nothing_below_it_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ten thousand clients disconnect, nothing more is done than to see that there is no context."""
    monkeypatch.setitem(hides_an_error.__globals__, "in_order", None)
    assert not hides_an_error(await interrupted(rest))
    assert not hides_an_error(BaseExceptionGroup("", [Disconnected(1001, ""), Disconnected(1006, "")]))


# What a record says of the others


def test_consequences_follow_in_order_with_what_python_says_of_them(records: list[Record]) -> None:
    try:
        bugs_in_three_handlers()
    except NameError as error:
        report_error(error)
    [record] = records
    trace = record["stack_trace"]
    assert trace.count("During handling of the above exception, another exception occurred:") == 3
    assert trace.index("test_chain.First: text") < trace.index("NameError: name 'time' is not defined")
    assert trace.count("Traceback (most recent call last):\n") == 4


def _at_length(name: str) -> Exception:
    """An error whose traceback takes more than 30 kB."""
    lines = "\n".join(f"def {name}_{n}():  # {'x' * 200}\n    {name}_{n + 1}()  # {'y' * 200}" for n in range(80))
    space: dict[str, Any] = {"First": First}
    source = f"{lines}\ndef {name}_80():\n    raise First('the end of {name}')\n"
    linecache.cache[f"{name}.py"] = (len(source), None, source.splitlines(True), f"{name}.py")
    exec(compile(source, f"{name}.py", "exec"), space)
    try:
        space[f"{name}_0"]()
    except First as error:
        return error
    raise AssertionError


def test_of_two_long_tracebacks_both_ends_of_both_are_shown(records: list[Record]) -> None:
    one, two = _at_length("one"), _at_length("two")
    two.__context__ = one
    report_error(two)
    [record] = records
    assert record["message"] == "First: the end of one"
    for name in ("one", "two"):
        for text in (f"in {name}_0\n", f"in {name}_80\n", f"the end of {name}\n"):
            assert text in record["stack_trace"], text
    assert len(record["stack_trace"]) <= TRACE_MAX + SLACK


@pytest.mark.parametrize("text", ["x", "\U0001f600", "\0", "\n"], ids=ascii)
def test_no_error_is_cut_because_of_another(records: list[Record], text: str) -> None:
    error: Exception = First("first")
    for number in range(20):
        after = Later(f"begin{number}" + text * 50_000 + f"end{number}")
        after.__context__ = error
        error = after
    report_error(error)
    [record] = records
    assert record["message"] == "First: first"
    for number in range(20):
        assert f"Later: begin{number}" in record["stack_trace"]
        assert f"end{number}\n" in record["stack_trace"]
    assert len(record["stack_trace"]) <= TRACE_MAX + SLACK


def test_what_an_author_declares_as_handled_is_shown_all_the_same(records: list[Record]) -> None:
    try:
        from_none()
    except First as error:
        report_error(error)
    assert "Later: text" in records[0]["stack_trace"]


@pytest.mark.parametrize("kind", [trio.TooSlowError, Later, Interruption, trio.WouldBlock])
def test_an_error_without_a_text_has_its_type_as_headline(records: list[Record], kind: type[Exception]) -> None:
    report_error(kind())
    assert records[0]["message"] == kind.__name__


# Whatever the exceptions are


def _raise(*_: object) -> Any:
    raise SystemExit("hostile")


class Lying(Exception):
    __cause__ = __context__ = property(lambda self: Later("no such error"))
    __suppress_context__ = True
    __traceback__ = property(_raise)
    __class__ = property(_raise)
    __eq__ = __hash__ = __bool__ = __len__ = _raise


class Mute(Exception):
    __str__ = __repr__ = __getattribute__ = _raise


class Underivable(ExceptionGroup[Exception]):
    exceptions = property(_raise)
    derive = split = subgroup = __str__ = _raise


class NoName(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__", "__module__", "__mro__", "__bases__"):
            raise RuntimeError(name)
        return super().__getattribute__(name)

    __eq__ = __hash__ = __instancecheck__ = __subclasscheck__ = _raise


class Nameless(Exception, metaclass=NoName):
    __module__ = 5  # type: ignore[assignment]


class Base(BaseException):
    pass


KINDS = [First, Later, Lying, Mute, Nameless, Base, KeyError, Interruption, GeneratorExit, SystemExit]
set_cause = BaseException.__dict__["__cause__"].__set__
set_context = BaseException.__dict__["__context__"].__set__
set_suppress = BaseException.__dict__["__suppress_context__"].__set__


@dataclass(repr=False)
class Graph:
    errors: list[BaseException]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Exceptions that are each other's causes, contexts and members, in any way; the last is the one to report."""
    errors: list[BaseException] = []
    for number in range(draw(st.integers(1, 30))):
        if errors and draw(st.integers(0, 3)) == 0:
            within = draw(st.lists(st.sampled_from(range(len(errors))), min_size=1, max_size=6))
            ours = [errors[each] for each in within]
            exceptions = [each for each in ours if issubclass(type(each), Exception)]
            if draw(st.booleans()) and exceptions:
                errors.append(Underivable(f"group {number}", exceptions))  # type: ignore[arg-type]
            else:
                errors.append(BaseExceptionGroup(f"group {number}", ours))
        else:
            kind = draw(st.sampled_from(range(len(KINDS))))
            errors.append(KINDS[kind](f"{number}" + draw(st.sampled_from(["", "\ud800\0\n", "\U0001f600" * 9000]))))
    for error in errors:
        if draw(st.booleans()):
            with suppress(BaseException):
                raise error
        for link in (set_cause, set_context):
            if draw(st.booleans()):
                link(error, errors[draw(st.integers(0, len(errors) - 1))])
        set_suppress(error, draw(st.booleans()))
    return Graph(errors)


@given(graphs())
def test_any_graph_of_errors_is_reported(graph: Graph) -> None:
    error = graph.errors[-1]
    with written() as records:
        report_error(error)
    [record] = records
    order = in_order(error)
    first = first_of(order)
    assert record["message"] == title(first)
    assert any(first is each for each in order)
    names = [type.__dict__["__name__"].__get__(type(each)) for each in order]
    if len(order) <= ERRORS_SHOWN:
        for name in set(names):
            assert record["stack_trace"].count(name) >= names.count(name), name
    hides_an_error(error)
