"""Copies over UDP in a simulated network that loses packets, in virtual time."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from protoframe import DeadlineExceeded, Unavailable, listen, timeout
from protoframe.files import FileClient
from protoframe.servers.files import FilesFactory
from protoframe.testing import Network
from tests.files.support import MIB, content, contents, leftovers, write


@pytest.mark.parametrize("way", ["put", "get"])
def test_copies_arrive_verified_at_a_loss_of_five_hundredths(tmp_path, way):
    network = Network(7, loss=0.05, delay=0.005)
    root, local = tmp_path / "root", tmp_path / "local"
    source, target = (local, root) if way == "put" else (root, local)
    root.mkdir()
    local.mkdir()
    every = {"t/file": content(MIB // 2), **{f"t/small/{number}": content(500, seed=number) for number in range(60)}}
    for name, data in every.items():
        write(source / name, data)
    server, client = network.host("server"), network.host("client")
    factory = FilesFactory(server, str(root), threads=0)

    async def copy():
        await listen(server, "udp:12200", factory)
        async with FileClient(client, "udp:server:12200", threads=0) as files:
            return await (files.put(str(local / "t"), "t") if way == "put" else files.get("t", str(local / "t")))

    summary = network.run(copy(), 600.0)
    assert contents(target) == every
    assert (summary.files, summary.failed, summary.moved_again) == (61, 0, 0)
    assert leftovers(target) == []
    factory.close()


def test_copy_goes_on_after_a_crash_of_the_server_and_a_partition(tmp_path):
    network = Network(11, loss=0.05, delay=0.005)
    root, local = tmp_path / "root", tmp_path / "local"
    root.mkdir()
    data = content(2 * MIB)
    source = write(local / "file", data)
    server, client, operator = network.host("server"), network.host("client"), network.host("operator")
    told = []

    async def copy():
        async with FileClient(
            client,
            "udp:server:12200",
            threads=0,
            tries=50,
            bandwidth=MIB / 4,
            observer=lambda progress: told.append(progress.octets),
        ) as files:
            return await files.put(str(source), "file")

    first = FilesFactory(server, str(root), threads=0)
    second = FilesFactory(server, str(root), threads=0)
    network.run(listen(server, "udp:12200", first))

    async def trouble():
        await deferLater(operator, 3.0)
        assert 0 < told[-1] < 2 * MIB
        server.crash()
        for connection in first.connections:
            connection.close()
        # For longer than a call waits for a server.
        await deferLater(operator, 30.0)
        await listen(server, "udp:12200", second)
        await deferLater(operator, 3.0)
        assert told[-1] < 2 * MIB
        network.partition("client", "server")
        await deferLater(operator, 20.0)
        network.heal()

    causing = Deferred.fromCoroutine(trouble())
    summary = network.run(copy(), 600.0)
    network.run(causing)
    assert (root / "file").read_bytes() == data
    assert summary.interruptions >= 1
    assert summary.moved_again < 0.05 * 2 * MIB + 2 * 16384
    first.close()
    second.close()


def test_copy_is_given_up_when_a_server_stays_away(tmp_path):
    network = Network(3, delay=0.005)
    root = tmp_path / "root"
    root.mkdir()
    source = write(tmp_path / "file", content(MIB))
    server, client, operator = network.host("server"), network.host("client"), network.host("operator")
    factory = FilesFactory(server, str(root), threads=0)
    network.run(listen(server, "udp:12200", factory))

    async def copy():
        async with FileClient(client, "udp:server:12200", threads=0, tries=3, bandwidth=MIB / 4) as files:
            await files.put(str(source), "file")

    async def trouble():
        await deferLater(operator, 2.0)
        server.crash()
        for connection in factory.connections:
            connection.close()

    causing = Deferred.fromCoroutine(trouble())
    with pytest.raises(Unavailable):
        network.run(copy(), 600.0)
    network.run(causing)
    factory.close()


@pytest.mark.parametrize("way", ["put", "get"])
def test_deadline_around_a_copy_ends_it(tmp_path, way):
    network = Network(3, delay=0.005)
    root, local = tmp_path / "root", tmp_path / "local"
    root.mkdir()
    source = write((local if way == "put" else root) / "source", content(MIB))
    given = (str(source), "target") if way == "put" else ("source", str(local))
    server, client = network.host("server"), network.host("client")
    factory = FilesFactory(server, str(root), threads=0)

    async def copy():
        await listen(server, "udp:12200", factory)
        async with FileClient(client, "udp:server:12200", threads=0, bandwidth=MIB / 4) as files:
            with timeout(2.0):
                await getattr(files, way)(*given)

    with pytest.raises(DeadlineExceeded):
        network.run(copy(), 4.0)
    factory.close()
