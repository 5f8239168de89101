"""A streamed chat completion: what its chunks come to, said in a run as they come.

The format is OpenAI's, which many servers speak with slight differences; what is missing or null counts as empty.
"""

from __future__ import annotations

from typing import Any

from msgspec import DecodeError, Struct
from msgspec.json import Decoder, Encoder

from tricorn.chat import AgentError, Run
from tricorn.chat.protocol import Usage

PIECE = 1000  # characters of an event
ARGUMENTS_MAX = 1 << 20  # characters of all tool calls of an answer
DETAIL = 500  # characters of what a server sent that are reported


class ModelError(AgentError):
    """The model gave no answer, or only a part. The text is for people, `detail` for operators, as a note."""

    def __init__(self, text: str, detail: str = "", *, again: bool = False, pause: float = 0.0) -> None:
        super().__init__(text)
        self.again = again  # it may work if it is asked again after so many seconds
        self.pause = pause
        if detail:
            self.add_note(detail)


class Call:
    """A tool call, as its pieces come."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.name = ""
        self.arguments = ""


class Completion:
    """What the model answers to one request, from the chunks of its stream. Says in the run what came together.

    Attributes:
        done: the stream is at its end.
        said: something of the answer has come.
    """

    def __init__(self, run: Run) -> None:
        self.done = False
        self.said = False
        self.calls: dict[int, Call] = {}
        self.usage: Usage | None = None
        self.finish = ""
        self._run = run
        self._waiting: list[str] = []
        self._thinks = False  # what waits is thought, not said
        self._text: list[str] = []
        self._size = 0  # of the tool calls

    async def take(self, data: bytes) -> None:
        """Take in an event of the stream. Raises ModelError if there is something wrong with it."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(data)
        except (DecodeError, RecursionError) as error:
            shown = data[:DETAIL].decode(errors="replace")
            raise ModelError("the model's server sent something unreadable", shown, again=True) from error
        if chunk.error is not None:
            raise ModelError("the model's server failed in mid-answer", json(chunk.error)[:DETAIL], again=True)
        if chunk.usage is not None:
            self.usage = chunk.usage.counted()
        for choice in (chunk.choices or ())[:1]:
            delta = choice.delta or _NOTHING
            if thought := delta.reasoning_content or delta.reasoning:
                await self._add(thought, thinks=True)
            if text := delta.content or delta.refusal:
                self.said = True
                self._text.append(text)
                await self._add(text, thinks=False)
            for piece in delta.tool_calls or ():
                self._add_call(piece)
            self.finish = choice.finish_reason or self.finish

    async def flush(self) -> bool:
        """Say what waits, and return whether something did. A checkpoint only then."""
        text = "".join(self._waiting)
        self._waiting.clear()
        tell = self._run.think if self._thinks else self._run.say
        for start in range(0, len(text), PIECE):
            await tell(text[start : start + PIECE])
        return bool(text)

    def problem(self) -> ModelError | None:
        """Return what is wrong with the answer as a whole."""
        match self.finish:
            case "":
                return ModelError("the connection to the model was lost", "the stream ended too early", again=True)
            case "length":
                return ModelError("the answer is not complete: the model has reached its limit of tokens")
            case "content_filter":
                return ModelError("the model's content filter has stopped the answer")
        if not self.calls and not self.said:
            return ModelError("the model gave no answer", f"finish_reason: {self.finish}", again=True)
        return None

    def message(self) -> dict[str, Any]:
        """Return the answer as the model is told it again."""
        calls = [tool_call(call.id, call.name, _object(call.arguments)) for call in self.calls.values()]
        return {"role": "assistant", "content": "".join(self._text) or None, "tool_calls": calls}

    async def _add(self, text: str, *, thinks: bool) -> None:
        if thinks is not self._thinks:
            await self.flush()
            self._thinks = thinks
        self._waiting.append(text)

    def _add_call(self, piece: _CallPiece) -> None:
        call = self.calls.setdefault(piece.index, Call(piece.id or f"call_{piece.index}"))
        function = piece.function or _Function()
        name, arguments = function.name or "", function.arguments or ""
        call.name += name
        call.arguments += arguments
        self._size += len(name) + len(arguments) + 1
        if self._size > ARGUMENTS_MAX:
            raise ModelError("the model called tools with far too much text")


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _object(arguments: str) -> str:
    """Return arguments as some servers insist on them: the tool has told the model what was wrong with others."""
    try:
        return arguments if isinstance(_decode_any(arguments), dict) else "{}"
    except (DecodeError, RecursionError):
        return "{}"


def json(value: Any) -> str:
    return _encode(value).decode()


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _CallPiece(Struct):
    function: _Function | None = None
    index: int = 0
    id: str | None = None


class _Delta(Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_CallPiece] | None = None


class _Choice(Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    def counted(self) -> Usage:
        cached = None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens
        return Usage(self.prompt_tokens, self.completion_tokens, cached or 0)


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_NOTHING = _Delta()
_decode = Decoder(_Chunk).decode
_decode_any = Decoder().decode
_encode = Encoder().encode
