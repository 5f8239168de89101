"""An agent that answers with a language model, at any endpoint that speaks OpenAI's chat completions.

`tricorn serve --model NAME --base-url URL` serves it as it is. To change what it does, copy this file: it uses what
every agent can use. docs/model.md says what it does when something goes wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import random
from ssl import create_default_context
from typing import Any

from msgspec.json import Encoder
from trio import open_nursery, sleep

from tricorn.chat import Run, Tool, Turn
from tricorn.chat.agents.completion import DETAIL, Call, Completion, ModelError, json, tool_call
from tricorn.chat.agents.sse import TIMEOUTS, Client, Lost, Silent, Timeouts, Unreachable, endpoint
from tricorn.chat.backoff import Backoff
from tricorn.chat.model_tools import by_name
from tricorn.chat.tools import TOOL_ENDED

OPENAI = "https://api.openai.com/v1"
HISTORY = 40_000  # characters of the conversation so far, about 10,000 tokens
ATTEMPTS = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between two attempts
RETRY_AFTER_MAX = 30.0  # seconds that a server may ask us to wait
JOIN = 0.04  # seconds for which pieces of an answer are joined: each costs a read, an event in the log, and frames
ERROR_BODY = 16 * 1024  # bytes that are read of an error

TOO_LONG = ("context_length_exceeded", "exceed_context_size", "maximum context length", "context window")
REFUSALS = {
    401: "the model's server does not accept the API key",
    403: "the model's server does not accept the API key",
    404: "the model's server knows no such model or address",
    429: "the model's server has too many requests",
}
LOST = {
    Lost: "the connection to the model was lost",
    Silent: "the model has stopped answering",
    Unreachable: "the model cannot be reached",
}

_encode = Encoder().encode


class Model:
    """Answers each post with a model that is told the conversation so far, and lets it call tools.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, without `/chat/completions`. Raises ValueError if it is none.
        api_key: sent as a bearer token. Raises ValueError if it cannot be one.
        system: the system prompt.
        tools: what the model may call. Raises ValueError if two have the same name.
        history_characters: of the conversation so far that the model is told, at most.
        max_rounds: how often the model may be asked for one post: once, and once after each round of tools.
        options: more of the request, such as `{"temperature": 0.2}`.
        timeouts: for the endpoint.
        join: seconds for which pieces of an answer are joined. The first is said at once.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI,
        api_key: str = "",
        system: str = "",
        tools: Sequence[Tool] = (),
        history_characters: int = HISTORY,
        max_rounds: int = 16,
        options: Mapping[str, Any] | None = None,
        timeouts: Timeouts = TIMEOUTS,
        join: float = JOIN,
    ) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key must be printable ASCII")
        self.__name__ = model
        self._endpoint = endpoint(base_url, "/chat/completions")
        self._tls = create_default_context() if self._endpoint.is_tls else None
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "User-Agent": "tricorn"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._api_key = api_key
        self._request = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **(options or {})}
        if tools:
            self._request["tools"] = [{"type": "function", "function": _describe(tool)} for tool in tools]
        self._tools = by_name(tools)
        self._system = system
        self._characters = history_characters
        self._max_rounds = max_rounds
        self._timeouts = timeouts
        self._join = join

    async def __call__(self, run: Run) -> None:
        """Answer a post. If this is cancelled, the connection is closed at once, and the model stops."""
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for number, turn in enumerate(await run.history(characters=self._characters)):
            messages += _remember(turn, number, with_tools=bool(self._tools))
        messages.append({"role": "user", "content": run.message})
        with Client(self._endpoint, self._headers, self._tls, self._timeouts) as client:
            for _ in range(self._max_rounds):
                answer = await self._ask(run, client, messages)
                if not answer.calls:
                    return
                messages.append(answer.message())
                messages += await self._use_tools(run, list(answer.calls.values()))
        raise ModelError(f"the model was asked {self._max_rounds} times, and used tools each time instead of answering")

    async def _ask(self, run: Run, client: Client, messages: list[dict[str, Any]]) -> Completion:
        """Ask the model, and again if that fails before it has said anything and may work later."""
        body = _encode({**self._request, "messages": messages})
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        attempts = ATTEMPTS
        while True:
            answer = Completion(run)
            error = await self._try(client, body, answer)
            if answer.usage is not None:
                run.used(input=answer.usage.input, output=answer.usage.output, cached=answer.usage.cached)
            if error is None:
                return answer
            client.close()
            attempts -= 1
            if not error.again or answer.said or not attempts or error.pause > RETRY_AFTER_MAX:
                raise error
            pause = max(error.pause, backoff.next() * (1 + random()) / 2)  # noqa: S311 (it keeps no secret)
            await run.think(f"{error}; asking again in {pause:.1f} s")
            await sleep(pause)

    async def _try(self, client: Client, body: bytes, answer: Completion) -> ModelError | None:
        """Ask once. Return what went wrong; what the model had said until then is said."""
        failure: ModelError | None = None
        try:
            head = await client.post(body)
            if head.status != 200:
                return self._refusal(head.status, head.headers, await client.text(ERROR_BODY))
            kind = head.headers.get("content-type", "text/event-stream")
            if not kind.startswith("text/event-stream"):
                detail = f"the answer is {kind}: {await client.text(DETAIL)}"
                return ModelError("the model's server sent something other than a stream", detail)
            while not answer.done and (events := await client.events()) is not None:
                for data in events:
                    await answer.take(data)
                if await answer.flush() and not answer.done:
                    await sleep(self._join)  # what comes meanwhile is read, and said, at once
        except Lost as error:
            if not answer.finish:  # else only the count of tokens is missing
                failure = ModelError(LOST[type(error)], str(error), again=True)
                failure.__cause__ = error
        except ModelError as error:
            failure = error
        await answer.flush()
        return failure or answer.problem()

    def _refusal(self, status: int, headers: Mapping[str, str], body: str) -> ModelError:
        """Return what a status other than 200 means."""
        detail = f"HTTP {status}: {' '.join(body.split())[:DETAIL]}"
        if self._api_key:
            detail = detail.replace(self._api_key, "…")
        if status in (400, 413, 422) and any(text in body.lower() for text in TOO_LONG):
            return ModelError("this is too long for the model: shorten it, or begin a new conversation", detail)
        if status == 400 and "content_filter" in body:
            return ModelError("the model's content filter does not allow this", detail)
        if status in (408, 409, 429) or status >= 500:
            wait = headers.get("retry-after", "")
            pause = float(wait) if wait.isascii() and wait.isdigit() else 0.0
            text = REFUSALS.get(status, f"the model's server fails ({status})")
            if pause > RETRY_AFTER_MAX:
                text += f"; try again in {pause:.0f} s"
            return ModelError(text, detail, again=True, pause=pause)
        if status < 400:
            detail = f"{detail} Location: {headers.get('location')}"
        return ModelError(REFUSALS.get(status, f"the model's server refuses the request ({status})"), detail)

    async def _use_tools(self, run: Run, calls: Sequence[Call]) -> list[dict[str, Any]]:
        """Call several tools at once, and return what the model is told of each, in order."""
        told = [""] * len(calls)

        async def use(index: int, call: Call) -> None:
            tool = self._tools.get(call.name)
            if tool is None:
                told[index] = f"Error: there is no tool {call.name!r}; there are {', '.join(self._tools) or 'none'}"
            else:
                told[index] = await tool.call(run, call.arguments)

        async with open_nursery() as nursery:
            for index, call in enumerate(calls):
                nursery.start_soon(use, index, call)
        return [
            {"role": "tool", "tool_call_id": call.id, "content": text} for call, text in zip(calls, told, strict=True)
        ]


def _describe(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _remember(turn: Turn, number: int, *, with_tools: bool) -> list[dict[str, Any]]:
    """Return an earlier turn as the model is told it."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": turn.text}]
    if turn.tools and with_tools:
        ids = [f"call_{number}_{index}" for index in range(len(turn.tools))]
        calls = [tool_call(id, use.tool, json(use.arguments)) for id, use in zip(ids, turn.tools, strict=True)]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        for id, use in zip(ids, turn.tools, strict=True):
            text = use.result if isinstance(use.result, str) else json(use.result)
            text = text if use.error is None else f"Error: {use.error}"
            messages.append({"role": "tool", "tool_call_id": id, "content": text})
    for asked in turn.asks:
        messages.append({"role": "assistant", "content": asked.text})
        messages.append({"role": "user", "content": "(no answer)" if asked.answer is None else asked.answer})
    answer = turn.answer
    if turn.outcome != "success":
        answer = f"{answer} [{TOOL_ENDED.get(turn.outcome, turn.outcome)}]".strip()
    return [*messages, {"role": "assistant", "content": answer}]
