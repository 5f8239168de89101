"""Drawing a conversation in a terminal."""

from __future__ import annotations

import sys
from itertools import cycle
from typing import Any

import msgspec
import trio
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from tricorn.chat.protocol import (
    AgentAsked,
    AgentAsking,
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    AnyEvent,
    ToolCompleted,
    ToolExecuting,
    UserMessage,
)

_encode = msgspec.json.Encoder().encode

UNANSWERED = {"timeout": "no answer in time", "cancelled": "no longer asked", "interrupted": "no longer asked"}


class Child:
    """A run that another one has begun: what it draws has a margin, and the last line of what it says is not whole."""

    def __init__(self, margin: str) -> None:
        self.margin = margin
        self.text = ""


class Screen:
    """Draws the events of a conversation on stdout. Other people's text stays text, whatever it contains."""

    def __init__(self) -> None:
        self._console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._line_is_open = False
        self._tools: dict[str, str] = {}
        self._children: dict[str, Child] = {}  # runs that others have begun, and that are in progress
        self._spinning = trio.Event()

    def write(self, text: str) -> None:
        """Write a line unchanged."""
        try:
            sys.stdout.buffer.write(text.encode() + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            self._console.on_broken_pipe()

    def prompt(self) -> None:
        self.end_line()
        self._console.print(Text("› ", "bold"), end="")
        self._line_is_open = True

    def line_was_entered(self) -> None:
        self._line_is_open = False

    def end_line(self) -> None:
        self._stop_spinning()
        if self._line_is_open:
            self._console.print()
            self._line_is_open = False

    def note(self, text: str) -> None:
        self._line(one_line(text), "dim")

    def draw(self, event: AnyEvent) -> None:
        self._stop_spinning()
        child = None if isinstance(event, UserMessage) else self._children.get(event.run)
        if child is not None:
            self._draw_child(child, event)
            return
        if isinstance(event, AgentStarted) and event.parent is not None:
            above = self._children.get(event.parent)
            self._children[event.run] = child = Child(above.margin + "│ " if above else "│ ")
            self._line(f"{above.margin if above else ''}▾ {event.agent}", "magenta")
            return
        self._draw(event, "")

    def _draw_child(self, child: Child, event: AnyEvent) -> None:
        """Draw what belongs to a child, in whole lines: others may speak at the same time."""
        if isinstance(event, AgentMessage):
            *lines, child.text = (child.text + event.text).split("\n")
        else:
            lines, child.text = [child.text] if child.text else [], ""
        for line in lines:
            self._line(child.margin + line, "")
        if not isinstance(event, AgentMessage):
            self._draw(event, child.margin)
        if isinstance(event, AgentCompleted):
            del self._children[event.run]

    def _draw(self, event: AnyEvent, margin: str) -> None:
        match event:
            case UserMessage():
                self._line(f"› {event.text}", "bold")
            case AgentThinking():
                self._line(f"{margin}{event.text}", "dim italic")
            case ToolExecuting():
                self._tools[event.call] = event.tool
                arguments = (f"{name}={_json(value)}" for name, value in event.arguments.items())
                self._line(f"{margin}▸ {event.tool} {' '.join(arguments)}", "cyan")
            case ToolCompleted():
                self._tools.pop(event.call, None)
                if event.error is None:
                    result = event.result if isinstance(event.result, str) else _json(event.result)
                    self._line(f"{margin}  {event.tool} → {result} ({event.seconds:.1f} s)", "cyan")
                else:
                    self._line(f"{margin}  {event.tool}: {event.error}", "red")
            case AgentAsking():
                choices = f" ({' / '.join(event.choices)})" if event.choices else ""
                self._line(f"{margin}? {event.text}{choices}", "bold yellow")
            case AgentAsked():
                self._line(f"{margin}  {event.answer or UNANSWERED.get(event.outcome, event.outcome)}", "yellow")
            case AgentMessage():
                self._console.print(Text(_clean(event.text)), end="")
                self._line_is_open = not event.text.endswith("\n")
            case AgentCompleted():
                if not margin:
                    self._tools.clear()
                    self._children.clear()
                self.end_line()
                if event.outcome != "success":
                    error_id = f" (error {event.error_id})" if event.error_id else ""
                    reason = f": {event.error}" if event.error else ""
                    self._line(f"{margin}{event.outcome}{reason}{error_id}", "red")
        if self._tools and not self._line_is_open and self._console.is_terminal:
            self._spinning.set()

    async def animate(self) -> None:
        """Turn the spinner while a tool executes, until cancelled."""
        for frame in cycle("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"):
            while not self._spinning.is_set():  # it may have stopped again before this task's turn came
                await self._spinning.wait()
            text = Text(f"{frame} {one_line(', '.join(self._tools.values()))}", "cyan")
            self._console.print(text, end="\r", no_wrap=True, overflow="ellipsis", soft_wrap=False)
            await trio.sleep(0.1)

    def _stop_spinning(self) -> None:
        if self._spinning.is_set():
            self._spinning = trio.Event()
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))

    def _line(self, text: str, style: str) -> None:
        self.end_line()
        self._console.print(Text(_clean(text), style))


# C0 and C1 without tab and newline: an escape sequence from an agent or a tool must not reach the terminal.
_CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")})


def one_line(text: str) -> str:
    """Return `text` without control characters and line breaks."""
    return " ".join(_clean(text).split())


def _clean(text: str) -> str:
    return text.translate(_CONTROL)


def _json(value: Any) -> str:
    return _encode(value).decode()
