"""How ranks meet: at the node's own address, under the run's own keys, with few looks at the shared file system."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import mean

import pytest

from piper_hpc.runtime.group import LEAST_LOOK_S, LOOKS_PER_S, RendezvousError, _listener, _look_again_s, _store
from piper_hpc.runtime.rank import RankEnvironment

SECONDS = timedelta(seconds=20)


def place(rank: int, host: str = "127.0.0.2", job: str = "42") -> RankEnvironment:
    return RankEnvironment(rank, 2, rank, "n1", (), job, "0", 0, host, task=rank)


def test_a_rank_reads_what_rank_0_wrote_at_the_address_that_it_left(tmp_path):
    with ThreadPoolExecutor() as pool:
        told = pool.submit(lambda: _store(place(1), tmp_path, SECONDS).get("word"))  # it has to wait for the address
        store = _store(place(0), tmp_path, SECONDS)  # lives until it is read
        store.set("word", "here")
        assert told.result() == b"here"


def test_the_store_listens_on_the_named_address_alone(tmp_path):
    store = _store(place(0), tmp_path, SECONDS)
    port = json.loads((tmp_path / "42.0.0.json").read_text())["port"]
    assert store.port == port
    socket.create_connection(("127.0.0.2", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(
    ("host", "bound"), [("node7", "0.0.0.0"), ("localhost", "127.0.1.1"), ("127.0.1.1", "127.0.1.1")]
)
def test_a_name_that_is_loopback_on_its_own_node_still_hears_the_others(monkeypatch, host, bound):
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found])
    with _listener(host) as listener:
        assert listener.getsockname()[0] == bound


def test_an_address_of_another_node_is_said_and_not_waited_for(tmp_path):
    with pytest.raises(RendezvousError, match=r"192\.0\.2\.7.*MASTER_ADDR must be the node of task 0"):
        _store(place(0, host="192.0.2.7"), tmp_path, SECONDS)


def test_no_address_in_time_is_an_error(tmp_path):
    with pytest.raises(RendezvousError, match="left no address"):
        _store(place(1), tmp_path, timedelta(seconds=0.1))


@pytest.mark.parametrize("ranks", [2, 64, 4096, 100_000])
def test_all_ranks_together_look_about_as_often_at_any_size(ranks):
    random.seed(1)
    wait_s = mean(_look_again_s(ranks) for _ in range(2000))
    assert wait_s >= LEAST_LOOK_S
    assert ranks / wait_s <= max(1.1 * LOOKS_PER_S, 2 / LEAST_LOOK_S)
