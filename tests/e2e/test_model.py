"""`tricorn serve --model` as a process, with imports denied: what it tells the model and people, and that it stops."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import trio
import trustme

from fixtures.fake_model import (
    CUT,
    HEAD,
    STALL,
    Script,
    chunked,
    delta,
    endpoint,
    event,
    refused,
    said,
)
from fixtures.model_chat import run_of, serving

STALLED: Script = [HEAD + chunked(delta(content="Hel"), delta(content="lo")), STALL]


@pytest.mark.parametrize("is_tls", [False, True])
async def test_whatever_goes_wrong_needs_no_import_and_people_are_told(is_tls: bool, tmp_path: Path) -> None:
    lost = "the connection to the model was lost"
    tried: list[tuple[list[Script], str | None]] = [
        ([refused(500), said("Hello")], None),
        ([[HEAD, CUT], said("Hello")], None),
        ([[HEAD + chunked(event(b"{")), CUT], said("Hello")], None),
        ([[CUT], said("Hello")], None),
        ([[HEAD + chunked(delta(content="Hello")), CUT]], lost),
        ([said("Hello", finish="length")], "the answer is not complete: the model has reached its limit of tokens"),
        ([refused(401, "no")], "the model's server does not accept the API key"),
        ([refused(307, Location="/")], "the model's server refuses the request (307)"),
        (
            [[b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1\r\n\r\nx"]],
            "the model's server sent something other than a stream",
        ),
    ]
    scripts = [script for scripts, _ in tried for script in scripts]
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind.\n")
    certificate = authority.issue_cert("127.0.0.1", "localhost") if is_tls else None
    async with (
        endpoint(*scripts, certificate=certificate) as served,
        serving(
            tmp_path, "--model", "m-1", "--base-url", served.url, "--system-prompt", "prompt.txt",
            SSL_CERT_FILE=str(tmp_path / "ca.pem"), OPENAI_API_KEY="sk-the-secret",
        ) as instance,
    ):  # fmt: skip
        for number, (_, error) in enumerate(tried):
            events = await instance.ask("hi", f"c-{number}")
            assert events[0]["agent"] == "m-1"
            assert "".join(each["text"] for each in events if each["type"] == "agent_message") in ("Hello", "")
            assert events[-1].get("error") == error, events
            assert ("error_id" in events[-1]) == (error is not None)
        await instance.end(signal.SIGTERM)
        stderr = instance.stderr.read_text()
    assert len(served.requests) == len(scripts)
    assert served.requests[0]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
    ]
    assert (b"authorization", b"Bearer sk-the-secret") in list(served.heads[0].headers)
    assert "imported" not in stderr
    assert "sk-the-secret" not in stderr


async def test_the_connection_to_the_model_closes_however_the_run_ends(tmp_path: Path) -> None:
    """Whoever cancels, and if the instance is killed, is told to end, or finds that the run took too long."""
    for ending in ("cancel", "SIGKILL", "SIGTERM", "timeout"):
        environ = {"TRICORN_RUN_TIMEOUT": "1"} if ending == "timeout" else {}
        async with (
            endpoint(STALLED) as served,
            serving(tmp_path, "--model", "m-1", "--base-url", served.url, **environ) as instance,
            instance.connect() as client,
        ):
            await client.post("hi", "c")
            message = (await client.until("agent_message")).last
            assert not served.gone.is_set()
            if ending == "cancel":
                await client.send("cancel", conversation="c", run=message["run"])
            elif ending != "timeout":
                instance.process.send_signal(signal.Signals[ending])
            await served.gone.wait()
            if ending in ("cancel", "timeout"):
                completed = (await client.until("agent_completed")).last
                assert completed["outcome"] == {"cancel": "cancelled", "timeout": "timeout"}[ending]


async def test_the_terminal_shows_why_the_run_failed(tmp_path: Path) -> None:
    async with (
        endpoint(refused(401)) as served,
        serving(tmp_path, "--model", "m-1", "--base-url", served.url) as instance,
    ):
        chat = [sys.executable, "-m", "tricorn", "chat", f"ws://127.0.0.1:{instance.port}/ws", "--message", "hi"]
        done = await trio.run_process(chat, capture_stdout=True, check=False)
    assert done.returncode == 1
    assert "failed: the model's server does not accept the API key (error " in " ".join(done.stdout.decode().split())


async def test_after_a_restart_the_model_is_told_what_was_said(tmp_path: Path) -> None:
    log = {"TRICORN_LOG": f"sqlite:///{tmp_path}/log.db"}
    async with endpoint(said("Ann, hello."), STALLED, said("Ann.")) as served:
        options = ("--model", "m-1", "--base-url", served.url)
        async with serving(tmp_path, *options, **log) as instance, instance.connect() as client:
            await run_of(client, "I am Ann.")
            await client.post("Who am I?", "c")
            await client.until("agent_message")
            await instance.end(signal.SIGKILL)
        async with serving(tmp_path, *options, **log) as instance:
            events = await instance.ask("Who am I now?")
    assert events[-1]["text"] == "Ann."
    told = [(each["role"], each["content"]) for each in served.requests[-1]["messages"]]
    assert told == [
        ("user", "I am Ann."),
        ("assistant", "Ann, hello."),
        ("user", "Who am I?"),
        ("assistant", told[3][1]),
        ("user", "Who am I now?"),
    ], json.dumps(served.requests[-1])
    assert told[3][1] in ("Hel [interrupted]", "Hello [interrupted]")  # as much as the first read brought
