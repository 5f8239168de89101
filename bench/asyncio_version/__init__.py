"""The chat written again for asyncio, as an asyncio programmer would: what Tricorn is measured against.

The same wire protocol, settings, tokens, pages and reports. Connections are those of `websockets`, or of an ASGI
server. A session that keeps up is written to as soon as something has happened, by `websockets.broadcast`; one that
does not gets a task that reads the log from the session's own cursor until it has caught up.

Taken from Tricorn is what does no I/O: structs, settings, the check of tokens, reports, pages, the demo agent's skills.
`tricorn` imports Trio, so this process has it loaded; nothing of it runs. Logs other than the one in memory, several
workers, retention, metrics, TLS and the import guard are not here.
"""
