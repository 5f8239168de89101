"""What is counted: plain numbers whose labels nobody outside can choose."""

from __future__ import annotations

from math import inf
from typing import get_type_hints

from tricorn.metrics import (
    CODES_MAX,
    LIMITS,
    NOTHING,
    Counter,
    Gauge,
    Histogram,
    Metrics,
    Numbers,
    ProcessMetrics,
    ServerMetrics,
    Totals,
    total,
)
from tricorn.protocol import close
from tricorn.protocol.phase import Phase
from tricorn.settings import Settings


class Connection:
    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.messages = 0

    def totals(self) -> Totals:
        return Totals(self.messages, 0, 10 * self.messages, 0)


def test_what_is_not_known_counts_as_other() -> None:
    counter = Counter("closed", "", "code", ("1000", "other"))
    counter.add("1000")
    counter.add("3999")
    counter.add("4999", 2)
    assert counter.values == {"1000": 1, "other": 3}


def test_a_bucket_of_a_histogram_includes_its_bound() -> None:
    histogram = Histogram("seconds", "", (1.0, 2.0, inf), "outcome", ("success",))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(seconds, "success")
    assert histogram.buckets == {"success": [2, 1, 1]}
    assert histogram.sums == {"success": 12.0}
    assert histogram.family() == {"success": [2, 1, 1, 12.0]}


def test_connections_are_counted_in_the_phase_that_they_are_in() -> None:
    one, other, over = Connection(), Connection(), Connection()
    metrics = ServerMetrics({one: 1, other: 2, over: 3})
    other.phase = Phase.CLOSING
    over.phase = Phase.CLOSED
    metrics.connecting = 2
    phases = metrics.numbers().current["connections"]
    assert phases == {"connecting": [2], "accepted": [0], "open": [1], "closing": [1]}
    metrics.connecting = 0
    assert metrics.numbers().current["connections"]["connecting"] == [0]


def test_traffic_never_shrinks_when_a_connection_ends() -> None:
    first, second = Connection(), Connection()
    connections = [first, second]
    metrics = ServerMetrics(connections)
    first.messages, second.messages = 3, 4
    grown = metrics.numbers().grown
    assert (grown["messages"], grown["bytes"]) == ({"received": [7], "sent": [0]}, {"received": [70], "sent": [0]})
    first.phase = Phase.CLOSED
    metrics.count_end(first, 1000, 0.2)
    second.messages = 5
    for _ in range(2):  # before and after it is forgotten
        grown = metrics.numbers().grown
        assert (grown["messages"], grown["bytes"]) == ({"received": [8], "sent": [0]}, {"received": [80], "sent": [0]})
        connections[:] = [second]
    assert metrics.closed.values["1000"] == 1
    assert metrics.teardown_seconds.buckets == {"": [0, 0, 0, 1, 0, 0, 0, 0, 0]}


def test_close_codes_of_the_program_count_by_themselves_up_to_a_bound() -> None:
    metrics = ServerMetrics()
    metrics.count_end(Connection(), 4321, 0)
    assert metrics.closed.values["other"] == 1
    for code in range(4100, 4100 + CODES_MAX):
        metrics.know_code(code)
        metrics.know_code(1000)
    assert len(metrics.closed.values) == CODES_MAX
    metrics.count_end(Connection(), 4100, 0)
    assert (metrics.closed.values["4100"], metrics.closed.values["other"]) == (1, 1)
    metrics.count_end(Connection(), 4100 + CODES_MAX - 1, 0)
    assert metrics.closed.values["other"] == 2


def test_a_set_has_its_counters_in_the_order_in_which_they_were_made() -> None:
    class Some(Metrics):
        def __init__(self) -> None:
            self.second = Counter("b", "")
            self.first = Gauge("a", "")
            self.number = 3
            self.third = Histogram("c", "", (inf,))

    some = Some()
    assert some.metrics() == (some.second, some.first, some.third)
    some.first.add(amount=-2)
    some.third.observe(4)
    assert some.numbers() == Numbers({"b": {"": [0]}, "c": {"": [1, 4]}}, {"a": {"": [-2]}})


async def test_what_all_servers_of_a_process_share() -> None:
    numbers = ProcessMetrics().numbers()
    assert numbers.current["tasks"][""][0] >= 1
    assert set(numbers.grown) == {"errors_reported", "records_dropped", "late_imports"}


def test_of_several_processes_everything_is_summed_and_of_those_that_ended_what_only_grows() -> None:
    one = Numbers({"closed": {"1000": [1], "other": [2]}, "seconds": {"success": [1, 2, 2.5]}}, {"runs": {"": [3]}})
    other = Numbers({"closed": {"1000": [10], "other": [0]}, "seconds": {"success": [0, 1, 9.5]}}, {"runs": {"": [4]}})
    ended = Numbers(one.grown, {})
    assert total([NOTHING, one, other, ended]) == Numbers(
        {"closed": {"1000": [12], "other": [4]}, "seconds": {"success": [2, 5, 14.5]}}, {"runs": {"": [7]}}
    )


def test_sets_of_the_same_metric_with_other_labels_add_up() -> None:
    server = Numbers({"limit_hits": {"max_connections": [1]}}, {})
    chat = Numbers({"limit_hits": {"user_runs": [2]}}, {})
    assert total([server, chat, server]).grown == {"limit_hits": {"max_connections": [2], "user_runs": [2]}}
    assert server.grown == {"limit_hits": {"max_connections": [1]}}


def test_limits_are_settings_and_codes_are_known() -> None:
    assert set(LIMITS) <= set(get_type_hints(Settings))
    assert {1000, 1006, 4000, 4001, 4003} <= close.KNOWN
