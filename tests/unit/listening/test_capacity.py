"""Capacity, and whose they are."""

from __future__ import annotations

import gc

import pytest

from tricorn.listening.capacity import RETRY_AFTER, AtCapacity, Capacity, PeerCapacity
from tricorn.metrics import ServerMetrics
from tricorn.protocol.forwarded import TrustedProxies


def test_a_place_is_free_again_behind_the_block() -> None:
    metrics = ServerMetrics()
    places = Capacity(1, "max_handshakes", metrics)
    with places:
        assert places.taken == 1
        with pytest.raises(AtCapacity) as caught, places:
            raise AssertionError
        assert places.taken == 1
    with places:
        pass
    assert places.taken == 0
    assert caught.value.status == 503
    assert int(caught.value.headers["Retry-After"]) in RETRY_AFTER
    assert metrics.limit_hits.values["max_handshakes"] == 1


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    assert {int(AtCapacity().headers["Retry-After"]) for _ in range(1000)} == set(RETRY_AFTER)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_whose_places_they_are(one: str, other: str, same: bool) -> None:
    peers = PeerCapacity(1, ServerMetrics())
    with peers.of((one, 1)):
        assert (peers.of((other, 2)).taken == 1) is same


def test_peers_on_a_unix_socket_share_their_places() -> None:
    peers = PeerCapacity(1, ServerMetrics())
    with peers.of(None):
        assert peers.of(None).taken == 1
        assert peers.of(("192.0.2.1", 1)).taken == 0


def test_trusted_proxies_have_no_limit() -> None:
    peers = PeerCapacity(1, ServerMetrics(), TrustedProxies(("192.0.2.1", "unix")))
    for proxy in (("192.0.2.1", 1), None):
        with peers.of(proxy), peers.of(proxy), peers.of(("192.0.2.2", 1)):
            assert peers.of(("192.0.2.2", 2)).taken == 1
            with pytest.raises(AtCapacity), peers.of(("192.0.2.2", 2)):
                raise AssertionError


def test_places_of_nobody_are_forgotten() -> None:
    peers = PeerCapacity(1, ServerMetrics())
    for number in range(100):
        with peers.of((f"192.0.2.{number}", 1)):
            pass
    gc.collect()
    assert len(peers._by_network) == 0
