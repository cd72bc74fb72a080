"""`QueueClient`: publishes to queues, consumes from them, and looks after them, through the loss of connections.

Knows which calls may be made again; the calls themselves are the `Queue` Protocol's, and connections those of
`protoframe.Client`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack
from weakref import WeakValueDictionary

import msgspec
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.interfaces import IStreamClientEndpoint

from protoframe import (
    Backoff,
    Client,
    ClientState,
    ConnectionLost,
    Error,
    Limits,
    Token,
    TooManyCalls,
    Unauthenticated,
    VersionMismatch,
    current_metadata,
    remaining,
)
from protoframe.queue._calls import Settling, insist, is_passing, never_ran, run_in
from protoframe.queue._consumer import Consumer, Consuming
from protoframe.queue._contract import (
    DeliveryPolicy,
    InvalidSettings,
    Message,
    Order,
    Overflow,
    Queue,
    Receipt,
    Settings,
    Statistics,
    Storage,
    Waiting,
)
from protoframe.queue._publisher import ONE_PIECE, Publisher, checked

__all__ = ["QueueClient", "SettingsFields"]

T = TypeVar("T")

#: Seconds after which somebody who waits for a connection looks whether there never will be one.
_LOOK = 5.0
#: Messages that go in one call at most, of those that are published in one turn of the reactor.
_TOGETHER = 1000
#: Messages of a queue that wait for that.
_MOST_WAITING = 65_536


class SettingsFields(TypedDict, total=False):
    """The fields of `Settings`, as keywords."""

    order: Order | str
    delivery: DeliveryPolicy | str
    storage: Storage | str
    lease: float
    max_deliveries: int | None
    dead_letter: str | None
    message_ttl: float | None
    queue_ttl: float | None
    delay: float
    max_messages: int | None
    max_bytes: int | None
    overflow: Overflow | str
    dedup_window: float
    groups: Sequence[str]
    batch_count: int
    batch_bytes: int
    batch_time: float


_Receipts = list[Receipt]
_Statistics = list[Statistics]


class QueueClient(Service):
    """A client of a queue server, that connects again when the connection is lost.

    Used as ``async with QueueClient(reactor, "tcp:127.0.0.1:12100") as queue:``, it is connected in the block, and
    fails at once where no server can be reached.  It is an `IService` too: then it connects for as long as it runs, and
    calls wait for a server.

    All that it does takes ``timeout`` seconds at most, or what ``with protoframe.timeout(...)`` says that surrounds it,
    but for the iterators: those take as long as they take.  What an error means, and what was done where it is raised,
    its class and `Error.may_have_run` say.

    When it is stopped, what was published and acknowledged goes to the server before.

    :param where: the server, as `protoframe.connect` takes it.
    :param token: shows the server who calls.
    :param limits: what this end takes of the server.
    :param reconnect: how long to wait before the server is tried again.
    :param timeout: seconds that a call may take, its repetitions included.
    :raises ValueError: ``where`` is wrong, or ``timeout`` is not above 0.
    """

    def __init__(
        self,
        reactor: Any,
        where: str | IStreamClientEndpoint,
        *,
        token: Token | None = None,
        limits: Limits | None = None,
        reconnect: Backoff | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.reactor = reactor
        self._timeout = timeout
        limits = dataclasses.replace(limits if limits is not None else Limits(), default_timeout=timeout)
        self._client = Client(reactor, where, Queue, token=token, limits=limits, reconnect=reconnect)
        self._consumers: dict[Consuming, None] = {}
        self._publishers: dict[str, Publisher] = {}
        self._settlings: WeakValueDictionary[tuple[str, str], Settling] = WeakValueDictionary()
        # What is done for consumers that are left.
        self._held: dict[Deferred[Any], None] = {}
        self._was_stopped = False
        self._context = copy_context()

    def __repr__(self) -> str:
        return f"<QueueClient of {self._client.where}: {self._client.state.value}>"

    # IService, and what else starts and stops it.

    def startService(self) -> None:
        """Connects, and goes on doing so."""
        super().startService()  # type: ignore[no-untyped-call]
        self._was_stopped = False
        self._client.startService()

    def stopService(self) -> Deferred[None]:
        """Ends consumers, has what was acknowledged arrive, and closes the connection; fires when that is done."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._was_stopped = True
        ending = [consuming.stop() for consuming in list(self._consumers)]
        settling = [one.flush() for one in list(self._settlings.values())]
        publishing = [one.flush() for one in list(self._publishers.values())]
        if not self.is_up:
            # There is nobody to tell.
            return self._client.stopService()
        waits = DeferredList([*ending, *settling, *publishing, *self._held])
        return waits.addCallback(lambda _: self._client.stopService())

    async def __aenter__(self) -> QueueClient:  # noqa: PYI034 - there is no other
        self.startService()
        try:
            await self._client.whenConnected()
        except BaseException:
            await self.stopService()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stopService()

    @property
    def state(self) -> ClientState:
        """How it stands to the server."""
        return self._client.state

    # Queues.

    def declare(
        self,
        name: str,
        settings: Settings | None = None,
        *,
        replace: bool = False,
        **fields: Unpack[SettingsFields],
    ) -> Deferred[bool]:
        """Has a queue be there; fires with whether it was not yet.

        :param settings: how it treats its messages.
        :param replace: whether other settings of one that is there are replaced.
        :param fields: those of `Settings`, in the place of what ``settings`` says of them; enumerations as texts too.
        :raises InvalidSettings: one of them cannot be; what does not go together the server says.
        """
        if fields:
            given = {} if settings is None else msgspec.structs.asdict(settings)
            try:
                settings = msgspec.convert({**given, **fields}, Settings)
            except msgspec.ValidationError as error:
                raise InvalidSettings(str(error)) from None
        return self._call(lambda: self.calls.declare(name, settings or Settings(), replace))

    def purge(self, name: str, group: str | None = None) -> Deferred[int]:
        """Removes the messages that no consumer has, of one group or of all; fires with how many."""
        return self._call(lambda: self.calls.purge(name, group))

    def statistics(self, name: str) -> Deferred[Statistics]:
        """Fires with how a queue stands."""
        return self._call(lambda: self.calls.statistics(name))

    def list(self, prefix: str = "") -> Deferred[_Statistics]:
        """Fires with how the queues stand whose names begin so, in the order of their names."""
        return self._call(lambda: self._list(prefix))

    async def _list(self, prefix: str) -> _Statistics:
        return [one async for one in self.calls.list(prefix)]

    def delete(self, name: str, only_unused: bool = False) -> Deferred[int]:
        """Deletes a queue; fires with how many messages it had.

        :param only_unused: whether it fails with `NotEmpty` where the queue has messages or consumers.
        """
        return self._call(lambda: self.calls.delete(name, only_unused))

    def peek(
        self,
        name: str,
        *,
        group: str = "",
        count: int = 10,
        subject: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Waiting]:
        """Messages that are in a queue, in its order, as they are; nothing is changed.

        :param count: how many at most.
        """
        return self.calls.peek(name, group, count, subject, dict(headers or {}))

    # Messages.

    def publish(
        self,
        name: str,
        body: bytes,
        *,
        subject: str = "",
        headers: Mapping[str, str] | None = None,
        key: str = "",
        priority: int = 0,
        ttl: float | None = None,
        delay: float | None = None,
        dedup: str = "",
    ) -> Deferred[Receipt]:
        """Publishes a message; fires with its receipt when it is durable.  The parameters are those of `Message`.

        What is published in one turn of the reactor, to one queue, goes in few calls, but where a deadline
        or metadata surround it.

        After the loss of the connection, or a failure of the server, it is published again where it certainly was not
        stored, or where it has a key in ``dedup``, until the time is over.  A queue without a ``dedup_window`` may
        store it twice then.
        """
        if subject or headers or key or priority or dedup or ttl is not None or delay is not None:
            message = Message(
                body=body,
                subject=subject,
                headers=dict(headers or {}),
                key=key,
                priority=priority,
                ttl=ttl,
                delay=delay,
                dedup=dedup,
            )
        else:
            message = Message(body=body)
        checked(name, message)
        if remaining() is None and not current_metadata():
            together = self._together(name)
            if together.waiting >= _MOST_WAITING:
                return fail(TooManyCalls(f"{together.waiting} messages wait to be published"))
            return together.add(message)
        self._send_gathered(name)
        return self._call(
            lambda: self.calls.publish(
                name,
                message.body,
                message.subject,
                message.headers,
                message.key,
                message.priority,
                message.ttl,
                message.delay,
                message.dedup,
            ),
            is_passing if dedup else never_ran,
        )

    def publish_batch(self, name: str, messages: Sequence[Message]) -> Deferred[_Receipts]:
        """Publishes messages, all or none of them; fires with receipts, in their order, when all are durable.

        They are published again as `publish` does, where each has a key in ``dedup``.
        """
        for message in messages:
            checked(name, message)
        self._send_gathered(name)
        return self._publish(name, messages)

    def _publish(self, name: str, messages: Sequence[Message]) -> Deferred[_Receipts]:
        """The same, of messages that were looked at."""
        has_keys = all(message.dedup for message in messages)
        return self._call(lambda: self.calls.publish_batch(name, messages), is_passing if has_keys else never_ran)

    def publisher(
        self,
        name: str,
        *,
        count: int = 100,
        octets: int = 256 * 1024,
        seconds: float = 0.005,
        most_waiting: int = 10_000,
    ) -> Publisher:
        """What gathers messages, and publishes them in batches: for many.

        :param count: messages of a batch at most.
        :param octets: of a batch at most, about, and 1 MiB at most; a longer message is a batch by itself.
        :param seconds: for how long a message waits for others.
        :param most_waiting: messages that wait at most, before `Publisher.ready` has whoever publishes wait.
        :raises ValueError: one of them is out of its bounds.
        """
        return Publisher(
            self.reactor,
            name,
            lambda messages: self._publish(name, messages),
            count=count,
            octets=octets,
            seconds=seconds,
            most_waiting=most_waiting,
        )

    def consume(
        self,
        name: str,
        *,
        group: str = "",
        prefetch: int = 100,
        subject: str = "",
        headers: Mapping[str, str] | None = None,
        exclusive: bool = False,
        limit: int | None = None,
    ) -> Consumer:
        """Messages of a queue, as they come, through the loss of connections and servers.

        ::

            async for message in queue.consume("orders", prefetch=100):
                await store(message.body)
                await message.ack()

        :param group: of consumers, of which each message is for one.
        :param prefetch: messages that may be here and not settled.
        :param subject: only messages whose subject has these words: ``*`` stands for one, ``#`` for any number.
        :param headers: and that have these headers.
        :param exclusive: as the group's only consumer.
        :param limit: messages after which it ends; no more are taken from the queue.
        """
        return Consumer(
            Consuming(
                self, self._settling(name, group), prefetch, subject, headers or {}, exclusive=exclusive, limit=limit
            )
        )

    # For consumers.

    @property
    def calls(self) -> Queue:
        """Makes the calls, each once."""
        return self._client.proxy

    @property
    def is_up(self) -> bool:
        """Whether the server takes calls now."""
        return self._client.state is ClientState.READY

    def now(self) -> float:
        """Seconds since whenever."""
        now: float = self.reactor.seconds()
        return now

    async def when_up(self) -> None:
        """Waits until the server takes calls, for however long.

        :raises Unauthenticated, VersionMismatch: it never will.
        :raises ConnectionLost: the client was stopped.
        """
        while not self._was_stopped:
            try:
                await self._client.whenConnected()
            except (Unauthenticated, VersionMismatch):
                raise
            except Error:
                await self._changed()
            else:
                return
        raise ConnectionLost("the client was stopped")

    async def _changed(self) -> None:
        """Waits until something has changed, or may have."""
        changed: Deferred[None] = Deferred()

        def fire(_: Any = None) -> None:
            if not changed.called:
                changed.callback(None)

        stop = self._client.watch(fire)
        timer = self.reactor.callLater(_LOOK, fire)
        try:
            await changed
        finally:
            stop()
            if timer.active():
                timer.cancel()

    def remember(self, consuming: Consuming) -> None:
        """It consumes, and ends when the client does."""
        self._consumers[consuming] = None

    def forget(self, consuming: Consuming) -> None:
        """It does not any more."""
        self._consumers.pop(consuming, None)

    def hold(self, doing: Deferred[Any]) -> None:
        """Something is done, which the client does not end before."""
        self._held[doing] = None

        def done(result: Any) -> Any:
            self._held.pop(doing, None)
            return result

        doing.addBoth(done)

    def _send_gathered(self, name: str) -> None:
        """What was published before in this turn of the reactor goes before what is called now."""
        publisher = self._publishers.get(name)
        if publisher is not None:
            publisher.flush()

    def _together(self, name: str) -> Publisher:
        """What gathers the messages to a queue that are published in one turn of the reactor."""
        publisher = self._publishers.get(name)
        if publisher is None:
            publisher = self._publishers[name] = Publisher(
                self.reactor,
                name,
                lambda messages: self._publish(name, messages),
                count=_TOGETHER,
                octets=ONE_PIECE,
                seconds=0,
                most_waiting=_MOST_WAITING,
                context=self._context,
                idle=lambda: self._publishers.pop(name, None),
            )
        return publisher

    def _settling(self, name: str, group: str) -> Settling:
        settling = self._settlings.get((name, group))
        if settling is None:
            settling = self._settlings[name, group] = Settling(
                self.reactor, self.calls, name, group, lambda call: self._insist(call, is_passing), self._context
            )
        return settling

    def _call(self, call: Callable[[], Awaitable[T]], may_repeat: Callable[[Error], bool] = never_ran) -> Deferred[T]:
        return run_in(copy_context(), self._insist(call, may_repeat))

    async def _insist(self, call: Callable[[], Awaitable[T]], may_repeat: Callable[[Error], bool]) -> T:
        left = remaining()
        seconds = self._timeout if left is None else max(left, 0.0)
        return await insist(self.reactor, seconds, call, lambda error: not self._was_stopped and may_repeat(error))
