"""Whether an `except` clause was handling an error on purpose when it was interrupted.

When the peer goes or a task is cancelled inside `except KeyError: value = await load()`, nothing has failed: the clause
names what it handles and goes on. In `except Exception: await ws.send("sorry"); raise`, the error is lost if nobody
reports it. Python has the same objects in both cases, so this looks at the bytecode of the function.
"""

from __future__ import annotations

from bisect import bisect_right
from dis import Bytecode, Instruction, hasjabs, hasjrel
from typing import TYPE_CHECKING, NamedTuple

from tricorn.errors.bound import binder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

ANY = ("BaseException", "Exception")  # what a clause names that cannot know what it handles
LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_DEREF")
LOCALS = ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF")
ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD")
JUMPS = frozenset((*hasjrel, *hasjabs))
HARMLESS = ("PUSH_EXC_INFO", "POP_EXCEPT", "COPY")  # they cannot raise
RAISE_FROM = 2  # how many values `raise … from …` takes
NESTED = 20  # handlers within a handler that are looked into
KEPT = 1000  # answers that are remembered


class _Code(NamedTuple):
    instructions: list[Instruction]
    at: dict[int, int]  # the number of the instruction at an offset
    starts: list[int]  # of the entries of the exception table, in order
    entries: list[tuple[int, int, int]]  # start, end, target


class _Clause(NamedTuple):
    kinds: set[str]  # the names in it; empty if it catches everything
    body: int  # offset


_answers: dict[tuple[CodeType, int, int], bool] = {}

_bound = binder(_names := dict(globals()))


@_bound
def _read(code: CodeType) -> _Code:
    bytecode = Bytecode(code)
    instructions = list(bytecode)
    entries = sorted((entry.start, entry.end, entry.target) for entry in bytecode.exception_entries)  # type: ignore[attr-defined]
    at = {instruction.offset: number for number, instruction in enumerate(instructions)}
    return _Code(instructions, at, [entry[0] for entry in entries], entries)


@_bound
def _target(read: _Code, offset: int) -> int | None:
    """Return where the interpreter goes on when the instruction at `offset` raises."""
    number = bisect_right(read.starts, offset) - 1
    if number < 0 or offset >= read.entries[number][1]:
        return None
    return read.entries[number][2]


@_bound
def _handlers(read: _Code, offset: int) -> Iterator[int]:
    """Yield where each `except`, `finally` and `with` around an instruction begins to handle, the innermost first."""
    target = _target(read, offset)
    while target is not None:
        if read.instructions[read.at[target]].opname == "PUSH_EXC_INFO":  # else how an await or a handler ends
            yield target
        target = _target(read, target)


@_bound
def _clauses(read: _Code, handler: int) -> Iterator[_Clause]:
    """Yield the `except` clauses of a handler; none if it is that of a `finally` or a `with`."""
    position: int | None = read.at[handler] + 1
    while position is not None:
        kinds: set[str] = set()
        first = position
        while read.instructions[position].opname in (
            *LOADS,
            "BUILD_TUPLE",
            "PUSH_NULL",
            "CACHE",
            "NOP",
            "EXTENDED_ARG",
        ):
            if read.instructions[position].opname in LOADS:
                kinds.add(read.instructions[position].argval)
            position += 1
        if read.instructions[position].opname != "CHECK_EXC_MATCH":
            if first == position and read.instructions[position].opname == "POP_TOP":
                yield _Clause(set(), read.instructions[position].offset)
            return
        if read.instructions[position + 1].opcode not in JUMPS:  # to the next clause
            return
        yield _Clause(kinds, read.instructions[position + 2].offset)
        position = read.at[read.instructions[position + 1].argval]


@_bound
def _reached(read: _Code, body: int) -> set[int]:
    """Return the offsets of all instructions that run while the clause with this body is handling an error."""
    seen: set[tuple[int, int]] = set()
    pending = [(body, 1)]  # with how many handlers are at work
    while pending:
        offset, depth = pending.pop()
        if not 0 < depth < NESTED or (offset, depth) in seen:
            continue
        seen.add((offset, depth))
        instruction = read.instructions[read.at[offset]]
        target = _target(read, offset)
        if target is not None and instruction.opname not in HARMLESS:
            pending.append((target, depth))
        depth += (instruction.opname == "PUSH_EXC_INFO") - (instruction.opname == "POP_EXCEPT")
        if instruction.opcode in JUMPS:
            pending.append((instruction.argval, depth))
        if not instruction.opname.startswith(ENDS) and read.at[offset] + 1 < len(read.instructions):
            pending.append((read.instructions[read.at[offset] + 1].offset, depth))
    return {offset for offset, _ in seen}


@_bound
def _raises_again(read: _Code, reached: set[int]) -> bool:
    """Return whether there is a `raise`, a `raise error` of a local variable or a `raise … from …`."""
    for offset in reached:
        number = read.at[offset]
        instruction = read.instructions[number]
        before = read.instructions[number - 1]
        again = instruction.arg != 1 or before.opname.endswith(LOCALS)
        if instruction.arg == RAISE_FROM and before.argval is None:
            again = False  # `raise … from None` says on purpose that nothing has failed before
        if instruction.opname == "RAISE_VARARGS" and again:
            return True
    return False


@_bound
def _takes_over(code: CodeType, raised: int, interrupted: int) -> bool:
    read = _read(code)
    offsets = list(read.at)
    interrupted = offsets[bisect_right(offsets, interrupted) - 1]  # it may be in the cache behind the instruction
    for handler in _handlers(read, raised):
        for clause in _clauses(read, handler):
            reached = _reached(read, clause.body)
            if interrupted in reached:
                return bool(clause.kinds) and clause.kinds.isdisjoint(ANY) and not _raises_again(read, reached)
    return False


@_bound
def takes_over(code: CodeType, raised: int, interrupted: int) -> bool:
    """Return whether `interrupted` is in an `except` that names what it catches and that raises nothing again.

    code: the function with the `try`; each answer about it is kept.
    raised, interrupted: the offsets of two of its instructions: in the `try`, and where the handling was interrupted.
    """
    answer = _answers.get((code, raised, interrupted))
    if answer is None:
        try:
            answer = _takes_over(code, raised, interrupted)
        except Exception:  # an interpreter whose bytecode is different: then no error counts as handled
            answer = False
        if len(_answers) >= KEPT:
            _answers.clear()
        _answers[code, raised, interrupted] = answer
    return answer
