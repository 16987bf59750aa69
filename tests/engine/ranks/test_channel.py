"""Connections between ranks: messages arrive, silence and ends are noticed, strangers are sent
away."""

from __future__ import annotations

import socket
import threading
import time
from queue import SimpleQueue

import pytest

from longspan.engine.processes.wire import encode
from longspan.engine.ranks.channel import Channel, ClosedError
from longspan.engine.ranks.hub import Hub
from longspan.engine.ranks.messages import (
    Bye,
    Facts,
    Failed,
    Hello,
    Joined,
    Refused,
    ToFollower,
    ToLead,
    Welcome,
)
from longspan.errors import LongspanError, RankLostError

FACTS = Facts(host="h", device="cpu", total_bytes=8, free_bytes=6, versions={}, checkpoint="",
              options={}, backend="gloo")


def framed(message: Hello) -> bytes:
    frame = encode(message)
    return len(frame).to_bytes(8, "little") + frame


def test_messages_arrive_and_an_orderly_end_is_no_loss() -> None:
    one, other = socket.socketpair()
    lost = SimpleQueue[str]()
    here, there = Channel(one, ToFollower, lost.put), Channel(other, ToLead, lost.put)
    with pytest.raises(TimeoutError):
        here.get(0.01)
    welcome = Welcome(b"x" * 3_000_000, "file:x")  # more than the system's buffers
    there.put(welcome)
    assert here.get(20) == welcome
    here.put(Joined())
    assert isinstance(there.get(5), Joined)
    there.put(Bye())
    assert isinstance(here.get(5), Bye)
    with pytest.raises(ClosedError):
        here.get(5)
    assert lost.empty()
    here.close()
    there.close()


@pytest.mark.parametrize("kind", ["silent", "closed", "garbage", "failed"])
def test_a_lost_side_is_noticed_and_named(kind: str) -> None:
    one, other = socket.socketpair()
    lost = SimpleQueue[str]()
    channel = Channel(one, ToLead, lost.put, stall_s=1.0)
    begun_s = time.monotonic()
    if kind == "closed":
        other.close()
    elif kind == "garbage":
        other.sendall((5).to_bytes(8, "little") + b"12345")
    elif kind == "failed":
        frame = encode(Failed("out of luck"))
        other.sendall(len(frame).to_bytes(8, "little") + frame)
    words = {"silent": " has not been heard of for 1 s: it is stopped, or its machine is",
             "closed": " is gone", "garbage": " has sent something that is no message",
             "failed": ": out of luck"}[kind]
    assert lost.get(timeout=10) == words
    assert time.monotonic() - begun_s < 6
    if kind == "failed":
        assert isinstance(channel.get(1), Failed)
    with pytest.raises(ClosedError):
        channel.get(1)
    channel.close()
    other.close()


def call(hub: Hub, rank: int, token: str | None = None) -> Channel:
    sock = socket.create_connection((hub.address, hub.port))
    channel = Channel(sock, ToFollower, lambda why: None)
    channel.put(Hello(hub.token if token is None else token, rank, FACTS))
    return channel


def test_strangers_are_sent_away_and_ranks_are_compared() -> None:
    hub = Hub(2, meet_s=20)
    callers = list[Channel]()

    def arrive() -> None:
        callers.append(call(hub, 1, token="guess"))
        callers.append(call(hub, 1))

    threading.Thread(target=arrive).start()
    hub.meet(FACTS)
    assert (hub.total_bytes, hub.free_bytes) == (4, 3)
    assert isinstance(callers[0].get(5), Refused)
    hub.close()
    assert isinstance(callers[1].get(5), Bye)
    for channel in callers:
        channel.close()


def test_one_that_differs_and_one_that_does_not_come_end_all() -> None:
    hub = Hub(2, meet_s=20)
    caller = call(hub, 1)
    with pytest.raises(LongspanError, match="rank 1 has torch none, rank 0 has 3"):
        hub.meet(Facts(**{**{name: getattr(FACTS, name) for name in FACTS.__struct_fields__},
                          "versions": {"torch": "3"}}))
    assert "rank 1 has torch none" in caller.get(5).reason
    caller.close()
    late = Hub(3, meet_s=0.3)
    with pytest.raises(LongspanError, match=r"rank 1, 2 of 3 did not come within 0.3 s"):
        late.meet(FACTS)


def test_a_port_in_use_and_a_rank_that_fails_are_named() -> None:
    hub = Hub(2, meet_s=20)
    with pytest.raises(LongspanError, match=rf"cannot listen on 127.0.0.1 port {hub.port}: Addr"):
        Hub(2, port=hub.port)
    caller = call(hub, 1)
    hub.meet(FACTS)
    caller.put(Failed("no room"))
    with pytest.raises(RankLostError, match="rank 1: no room"):
        hub.wait_joined()
    hub.close()
    caller.close()
