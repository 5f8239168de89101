"""A small, faithful replica of the broken service: what is wrong with it is its purpose. Do not mend it.

It is one process per instance, on asyncio, and speaks what the tests need of Tricorn's wire protocol, so that one test
can be run against both. `python -m incident MODULE:FUNCTION` serves an agent; `faults.py` is an agent that fails,
and `backends.py` the same one with a session and a database.
"""
