"""The chat written again for asyncio, as an asyncio expert would: what Tricorn is measured against.

It uses the same wire protocol, settings, tokens, pages and reports. Connections are those of `websockets`, or of an
ASGI server. It has the optimisations that Tricorn has: an event is encoded and framed once for all readers, a client
gets in one write what one turn of the loop has for it, and the garbage collector is tuned the same. A client that keeps
up is written to at the end of the turn, without a task; for one that does not, a task reads the log from the session's
cursors until it has caught up.

Taken from Tricorn is what does no I/O: structs, frames, settings, the check of tokens, reports, pages, the demo agent's
skills. `tricorn` imports Trio, so this process has it loaded; nothing of it runs. docs/performance.md says what this
version does not do.
"""
