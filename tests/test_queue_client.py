"""`QueueClient`: what is published arrives, what is acknowledged is gone, whatever becomes of connections."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from typing import Any

import pytest
import pytest_twisted
from msgspec.structs import fields
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults

from protoframe import (
    Backoff,
    ClientState,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    metadata,
    timeout,
)
from protoframe.queue import (
    LARGEST_BODY,
    Exclusive,
    InvalidMessage,
    InvalidSettings,
    LeaseLost,
    Message,
    NoSuchQueue,
    NotEmpty,
    QueueClient,
    QueueFull,
    Settings,
    State,
    StoreFailed,
)
from protoframe.queue._client import SettingsFields
from tests.ends import until
from tests.processes import ROOT, environment, free_port
from tests.support_queue import Gate, client_of, served

QUICK = Backoff(first=0.02, longest=0.1)


async def publish_numbers(queue: QueueClient, name: str, count: int) -> None:
    await queue.publish_batch(name, [Message(body=b"%d" % number) for number in range(count)])


def depth(statistics: Any) -> tuple[int, int]:
    """Messages that are ready, and that consumers have."""
    (group,) = statistics.groups
    return group.ready, group.leased


@pytest_twisted.ensureDeferred
async def test_what_is_published_is_delivered_in_order_and_gone_when_it_is_acknowledged() -> None:
    async with served() as server, client_of(server) as queue:
        assert await queue.declare("orders", order="fifo", groups=["a"])
        assert not await queue.declare("orders", Settings(groups=("a",)))
        first = await queue.publish("orders", b"one", subject="x.y", headers={"k": "v"}, priority=3)
        second = await queue.publish("orders", b"two")
        assert second.sequence > first.sequence
        seen = []
        async for message in queue.consume("orders", group="a", prefetch=10):
            seen.append((message.body, message.subject, message.headers, message.priority, message.attempt))
            await message.ack()
            if len(seen) == 2:
                break
        assert seen == [(b"one", "x.y", {"k": "v"}, 3, 1), (b"two", "", {}, 0, 1)]
        assert (await queue.statistics("orders")).depth == 0


@pytest_twisted.ensureDeferred
async def test_queues_are_looked_after() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("a.one")
        await queue.declare("a.two", lease=5)
        await queue.declare("b")
        assert [one.name for one in await queue.list("a.")] == ["a.one", "a.two"]
        await publish_numbers(queue, "b", 3)
        shown = [waiting async for waiting in queue.peek("b", count=2)]
        assert [(one.message.body, one.state) for one in shown] == [(b"0", State.READY), (b"1", State.READY)]
        with pytest.raises(NotEmpty):
            await queue.delete("b", only_unused=True)
        assert await queue.purge("b") == 3
        assert await queue.delete("b") == 0
        with pytest.raises(NoSuchQueue):
            await queue.statistics("b")
        assert await queue.declare("a.two", Settings(lease=5.0), replace=True, max_messages=7) is False
        assert (await queue.statistics("a.two")).settings == Settings(lease=5.0, max_messages=7)


@pytest_twisted.ensureDeferred
async def test_settings_that_cannot_be_are_refused_here() -> None:
    async with served() as server, client_of(server) as queue:
        for wrong in ({"lease": 0.0}, {"order": "alphabetical"}, {"max_mesages": 3}):
            with pytest.raises(InvalidSettings):
                await queue.declare("orders", **wrong)  # type: ignore[arg-type]
        assert server.watch.calls["declare"] == 0


@pytest_twisted.ensureDeferred
async def test_acknowledgements_of_one_turn_go_in_one_call_and_two_calls_at_most_are_on_their_way() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 100)
        consumer = queue.consume("orders")
        messages: list[Any] = []
        while len(messages) < 100:
            messages += await consumer.take()
        await gatherResults([message.ack() for message in messages[:50]])
        assert server.watch.calls["acknowledge"] == 1
        gate = Gate()
        server.watch.before["acknowledge"] = gate
        acks = []
        for message in messages[50:]:
            before = len(server.watch.arguments["acknowledge"])
            acks.append(message.ack())
            if len(acks) <= 2:
                await until(lambda before=before: len(server.watch.arguments["acknowledge"]) > before)
        await queue.statistics("orders")
        assert server.watch.calls["acknowledge"] == 3
        gate.open()
        await gatherResults(acks)
        assert server.watch.calls["acknowledge"] == 4
        await consumer.aclose()
        assert (await queue.statistics("orders")).depth == 0


@pytest_twisted.ensureDeferred
async def test_a_delivery_that_is_settled_elsewhere_is_lost_and_fails_no_other() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 2)
        consumer = queue.consume("orders")
        messages: list[Any] = []
        while len(messages) < 2:
            messages += await consumer.take()
        await queue.calls.reject("orders", [messages[0].tag])
        lost, kept = messages[0].ack(), messages[1].ack()
        await kept
        with pytest.raises(LeaseLost) as raised:
            await lost
        assert (raised.value.queue, raised.value.sequence) == ("orders", messages[0].sequence)
        with pytest.raises(LeaseLost, match="settled already"):
            await messages[1].reject()
        await consumer.aclose()


@pytest_twisted.ensureDeferred
async def test_what_was_not_handed_out_is_given_back_uncounted_when_the_loop_is_left() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 20)
        async for _ in queue.consume("orders", prefetch=10):
            # What could come has come when this is answered.
            await queue.statistics("orders")
            break
        async with queue.consume("orders", prefetch=20) as consumer:
            again: list[Any] = []
            while len(again) < 20:
                again += await consumer.take()
            again.sort(key=lambda message: message.sequence)
            assert [message.body for message in again] == [b"%d" % number for number in range(20)]
            assert [message.attempt for message in again] == [2] + [1] * 19


@pytest_twisted.ensureDeferred
async def test_a_consumer_that_is_cancelled_or_dropped_or_closed_leaves_nothing_behind() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")

        async def read() -> None:
            async for _ in queue.consume("orders"):
                pass

        async def consumers() -> int:
            return (await queue.statistics("orders")).groups[0].consumers

        async def becomes(count: int) -> None:
            while await consumers() != count:
                pass

        reading = Deferred.fromCoroutine(read())
        await becomes(1)
        reading.cancel()
        with pytest.raises(CancelledError):
            await reading
        await becomes(0)
        consumer = queue.consume("orders")
        taking = Deferred.fromCoroutine(consumer.take())
        await becomes(1)
        with pytest.raises(LocalProtocolError):
            await consumer.take()
        taking.cancel()
        taking.addErrback(lambda _: None)
        assert await consumers() == 1
        del consumer, taking
        gc.collect()
        await becomes(0)
        consumer = queue.consume("orders")
        taking = Deferred.fromCoroutine(consumer.take())
        await becomes(1)
        await consumer.aclose()
        assert await taking == []
        await becomes(0)


@pytest_twisted.ensureDeferred
async def test_consuming_outlives_connections_and_servers_and_tags_do_too() -> None:
    async with served() as server, client_of(server, reconnect=QUICK) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 30)
        seen: list[bytes] = []
        kept: list[Any] = []
        async for message in queue.consume("orders", prefetch=5):
            if message.attempt == 1 and len(seen) in (5, 15) and not kept:
                kept.append(message)
                server.drop_connections()
                if len(seen) == 15:
                    await server.stop_listening()
                    await server.listen()
                continue
            seen.append(message.body)
            await message.ack()
            if len(seen) == 10:
                kept.clear()
            if len(set(seen)) == 30:
                break
        assert len(seen) == 30
        assert server.watch.calls["consume"] >= 3


@pytest_twisted.ensureDeferred
async def test_a_delivery_of_a_lost_connection_can_be_settled_over_the_next() -> None:
    async with served() as server, client_of(server, reconnect=QUICK) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 1)
        consumer = queue.consume("orders")
        (message,) = await consumer.take()
        server.watch.before["consume"] = Gate()
        server.drop_connections()
        await until(lambda: not queue.is_up)
        await message.ack()
        assert (await queue.statistics("orders")).depth == 0
        await consumer.aclose()


@pytest_twisted.ensureDeferred
async def test_what_was_not_handed_out_when_the_connection_was_lost_comes_again_uncounted() -> None:
    async with served() as server, client_of(server, reconnect=QUICK) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 10)
        async with queue.consume("orders") as consumer:
            (first,) = await consumer.take(1)
            # What could come has come when this is answered.
            await queue.statistics("orders")
            server.drop_connections()
            await until(lambda: server.watch.calls["consume"] == 2)
            messages: list[Any] = []
            while len(messages) < 10:
                messages += await consumer.take()
            messages.sort(key=lambda message: message.sequence)
            assert messages[0].sequence == first.sequence
            assert [message.attempt for message in messages] == [2] + [1] * 9
            await gatherResults([message.ack() for message in messages])
        assert (await queue.statistics("orders")).depth == 0


@pytest_twisted.ensureDeferred
async def test_a_queue_s_own_error_ends_a_consumer() -> None:
    async with served() as server, client_of(server) as queue:
        with pytest.raises(NoSuchQueue):
            async for _ in queue.consume("nosuch"):
                pass
        await queue.declare("orders")
        consumer = queue.consume("orders")
        taking = Deferred.fromCoroutine(consumer.take())
        await until(lambda: server.watch.calls["consume"] == 2)
        with pytest.raises(Exclusive):
            await queue.consume("orders", exclusive=True).take()
        await queue.delete("orders")
        with pytest.raises(NoSuchQueue):
            await taking


@pytest_twisted.ensureDeferred
async def test_an_exclusive_consumer_is_so_again_though_its_old_connection_is_not_gone_yet() -> None:
    async with served() as server, client_of(server, reconnect=QUICK) as queue:
        await queue.declare("orders")
        consumer = queue.consume("orders", exclusive=True)
        taking = Deferred.fromCoroutine(consumer.take())
        await until(lambda: server.watch.calls["consume"])
        refusals = iter([True, True])

        async def refuse() -> None:
            if next(refusals, False):
                raise Exclusive(queue="orders", group="")

        server.watch.before["consume"] = refuse
        server.drop_connections()
        await until(lambda: server.watch.calls["consume"] == 4)
        await publish_numbers(queue, "orders", 1)
        assert [message.body for message in await taking] == [b"0"]
        await consumer.aclose()


@pytest_twisted.ensureDeferred
async def test_a_stopped_client_ends_its_consumers_and_tells_what_was_acknowledged() -> None:
    async with served() as server:
        async with client_of(server) as queue:
            await queue.declare("orders")
            await publish_numbers(queue, "orders", 1)
            consumer = queue.consume("orders")
            (message,) = await consumer.take()
            message.ack()
            taking = Deferred.fromCoroutine(consumer.take())
        with pytest.raises(ConnectionLost, match="stopped"):
            await taking
        async with client_of(server) as queue:
            assert (await queue.statistics("orders")).depth == 0


@pytest_twisted.ensureDeferred
async def test_a_message_with_a_key_is_published_again_after_a_failure_and_one_without_is_not() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders", dedup_window=60)
        failures = iter([True, True])

        async def fail() -> None:
            if next(failures, False):
                raise StoreFailed("the disk is gone")

        server.watch.after["publish_batch"] = fail
        receipt = await queue.publish("orders", b"once", dedup="key")
        assert receipt.is_duplicate
        assert server.watch.calls["publish_batch"] == 3
        assert (await queue.statistics("orders")).depth == 1
        failures = iter([True])
        with pytest.raises(StoreFailed) as raised:
            await queue.publish("orders", b"perhaps")
        assert raised.value.may_have_run
        assert server.watch.calls["publish_batch"] == 4


@pytest_twisted.ensureDeferred
async def test_repetition_ends_at_the_deadline_and_says_why_and_that_it_may_have_run() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")

        async def fail() -> None:
            raise StoreFailed("the disk is gone")

        server.watch.after["publish"] = fail
        with timeout(0.3), pytest.raises(DeadlineExceeded, match="the disk is gone") as raised:
            await queue.publish("orders", b"again and again", dedup="key")
        assert raised.value.may_have_run
        assert server.watch.calls["publish"] > 1


@pytest_twisted.ensureDeferred
async def test_each_call_has_its_own_time_whatever_it_follows() -> None:
    async with served() as server, client_of(server, timeout=0.5) as queue:
        await queue.declare("orders")
        loop_ends = time.monotonic() + 0.8
        done: Deferred[None] = Deferred()

        def again(_: Any) -> None:
            if time.monotonic() < loop_ends:
                queue.statistics("orders").addCallbacks(again, done.errback)
            else:
                done.callback(None)

        again(None)
        publisher = queue.publisher("orders", count=1)
        consumer = queue.consume("orders", prefetch=1)
        receipts, acks = [], []
        while time.monotonic() < loop_ends:
            await publisher.ready()
            # Always more than can be on their way.
            receipts += [publisher.publish(b"x") for _ in range(20 - publisher.waiting)]
            (message,) = await consumer.take(1)
            acks.append(message.ack())
        await done
        await publisher.flush()
        await gatherResults(receipts)
        await gatherResults(acks)
        await consumer.aclose()


@pytest_twisted.ensureDeferred
async def test_a_publisher_gathers_by_count_octets_and_time() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")

        def sizes() -> list[int]:
            return [len(one.messages) for one in server.watch.arguments.get("publish_batch", [])]

        async with queue.publisher("orders", count=10, octets=1000, seconds=3600) as publisher:
            receipts = await gatherResults([publisher.publish(b"x") for _ in range(20)])
            assert sizes() == [10, 10]
            assert [receipt.sequence for receipt in receipts] == sorted(receipt.sequence for receipt in receipts)
            await gatherResults([publisher.publish(bytes(400)) for _ in range(3)][:2])
            assert sizes() == [10, 10, 2]
            last = publisher.publish(b"y")
        assert sizes() == [10, 10, 2, 2]
        assert (await last).sequence == 24
        with pytest.raises(LocalProtocolError):
            publisher.publish(b"too late")
        publisher = queue.publisher("orders", count=10, seconds=0.001)
        await gatherResults([publisher.publish(b"z"), publisher.publish(b"z")])
        assert sizes()[-1] == 2


@pytest_twisted.ensureDeferred
async def test_a_publisher_keeps_the_order_though_large_batches_travel_in_pieces() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        async with queue.publisher("orders", count=100) as publisher:
            receipts = [publisher.publish(bytes(5000 if number < 300 else 5)) for number in range(1000)]
        assert [receipt.sequence for receipt in await gatherResults(receipts)] == list(range(1, 1001))


@pytest_twisted.ensureDeferred
async def test_a_publisher_has_whoever_publishes_wait() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        gate = Gate()
        server.watch.before["publish_batch"] = gate
        async with queue.publisher("orders", count=1, most_waiting=3) as publisher:
            receipts = [publisher.publish(b"x") for _ in range(6)]
            assert publisher.waiting == 2
            assert publisher.ready().called
            receipts.append(publisher.publish(b"x"))
            ready = publisher.ready()
            assert not ready.called
            gate.open()
            await ready
        assert [receipt.sequence for receipt in await gatherResults(receipts)] == list(range(1, 8))


@pytest_twisted.ensureDeferred
async def test_a_message_that_cannot_be_or_has_no_room_fails_alone() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("last", order="last-value")
        async with queue.publisher("last", count=4) as publisher:
            results = [publisher.publish(b"a", key="a"), publisher.publish(b"no key"), publisher.publish(b"b", key="b")]
            results.append(publisher.publish(bytes(LARGEST_BODY + 1), key="large"))
            results.append(publisher.publish(b"c", key="c", priority=10))
        for wrong in (1, 3, 4):
            with pytest.raises(InvalidMessage):
                await results[wrong]
        await results[0]
        await results[2]
        assert (await queue.statistics("last")).depth == 2
        await queue.declare("small", max_messages=2)
        async with queue.publisher("small") as publisher:
            results = [publisher.publish(b"x") for _ in range(4)]
        assert [(await result).sequence for result in results[:2]] == [1, 2]
        errors = []
        for result in results[2:]:
            with pytest.raises(QueueFull) as raised:
                await result
            errors.append(raised.value)
        assert len({id(error) for error in errors}) == 2


@pytest_twisted.ensureDeferred
async def test_what_is_published_in_one_turn_goes_in_one_call_and_keeps_its_order() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders", dedup_window=60, max_messages=7)
        publishing = [queue.publish("orders", b"%d" % number) for number in range(3)]
        publishing += [queue.publish("orders", b"3", dedup="a"), queue.publish("orders", b"4", dedup="b")]
        publishing += [queue.publish("orders", b"5"), queue.publish("orders", b"6")]
        assert [receipt.sequence for receipt in await gatherResults(publishing)] == [1, 2, 3, 4, 5, 6, 7]
        # With keys and without go apart: where nobody knows whether they are stored, only those with may go again.
        assert [len(call.messages) for call in server.watch.arguments["publish_batch"]] == [3, 2, 2]
        shown = [waiting.message.body async for waiting in queue.peek("orders")]
        assert shown == [b"%d" % number for number in range(7)]
        publishing = [queue.publish("orders", b"8"), queue.publish("orders", b"9", dedup="a")]
        with pytest.raises(QueueFull):
            await publishing[0]
        assert (await publishing[1]).is_duplicate


@pytest_twisted.ensureDeferred
async def test_what_a_deadline_or_metadata_surround_goes_by_itself() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        with timeout(5.0):
            both = [queue.publish("orders", b"a"), queue.publish("orders", b"b")]
        with metadata(tenant="x"):
            both.append(queue.publish("orders", b"c"))
        await gatherResults(both)
        assert server.watch.calls["publish"] == 3
        assert server.watch.calls["publish_batch"] == 0


@pytest_twisted.ensureDeferred
async def test_what_is_not_gathered_does_not_overtake_what_was_before() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        publishing: list[Deferred[Any]] = [queue.publish("orders", b"0")]
        publishing.append(queue.publish_batch("orders", [Message(body=b"1"), Message(body=b"2")]))
        publishing.append(queue.publish("orders", b"3"))
        with timeout(5.0):
            publishing.append(queue.publish("orders", b"4"))
        await gatherResults(publishing)
        shown = [waiting.message.body async for waiting in queue.peek("orders")]
        assert shown == [b"%d" % number for number in range(5)]


@pytest_twisted.ensureDeferred
async def test_a_client_that_is_stopped_publishes_what_it_was_given() -> None:
    async with served() as server:
        async with client_of(server) as queue:
            await queue.declare("orders")
            publishing = queue.publish("orders", b"last")
        assert (await publishing).sequence == 1


@pytest_twisted.ensureDeferred
async def test_a_consumer_with_a_limit_ends_by_itself_and_has_no_more_delivered() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("orders")
        await publish_numbers(queue, "orders", 10)
        seen = []
        async for message in queue.consume("orders", prefetch=2, limit=3):
            seen.append(message.body)
            await message.ack()
        assert seen == [b"0", b"1", b"2"]
        statistics = await queue.statistics("orders")
        assert depth(statistics) == (7, 0)
        assert statistics.groups[0].delivered == 3


@pytest_twisted.ensureDeferred
async def test_what_came_and_is_not_taken_is_bounded() -> None:
    async with served() as server, client_of(server) as queue:
        await queue.declare("large")
        for _ in range(10):
            await queue.publish("large", bytes(2**20))
        consumer = queue.consume("large", prefetch=100)
        (first,) = await consumer.take(1)
        # What could come has come when this is answered.
        for _ in range(20):
            await queue.statistics("large")
        assert consumer._consuming._octets <= 5 * 2**20
        messages = [first]
        while len(messages) < 10:
            messages += await consumer.take(1)
        await gatherResults([message.ack() for message in messages])
        await consumer.aclose()
        assert (await queue.statistics("large")).depth == 0


@pytest_twisted.ensureDeferred
async def test_it_fails_at_once_where_there_is_no_server_and_as_a_service_waits_for_one() -> None:
    port = free_port()
    with pytest.raises(ConnectFailed):
        async with QueueClient(reactor, f"tcp:127.0.0.1:{port}"):
            pass
    async with served() as server:
        async with client_of(server) as queue:
            await queue.declare("orders")
        await server.stop_listening()
        client = QueueClient(reactor, f"tcp:127.0.0.1:{port}", reconnect=QUICK)
        consumer = client.consume("orders")
        taking = Deferred.fromCoroutine(consumer.take())
        client.startService()
        publishing = client.publish("orders", b"hello")
        await until(lambda: client.state is ClientState.UNAVAILABLE)
        server.number = port
        await server.listen()
        await publishing
        assert [message.body for message in await taking] == [b"hello"]
        await client.stopService()


def test_the_fields_of_settings_are_those_of_the_client_s_keywords() -> None:
    assert list(SettingsFields.__annotations__) == [field.name for field in fields(Settings)]


def test_the_declarations_alone_bring_in_no_reactor() -> None:
    code = "import sys, protoframe.queue as q; q.Queue, q.Settings; sys.exit('twisted.internet.reactor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=30, check=False)
    assert done.returncode == 0
