"""`Consumer`: the messages of a queue, through the loss of connections; and `ReceivedMessage`, which one settles.

Knows streams of deliveries, and what becomes of those that nobody takes; not how deliveries are settled
(`protoframe.queue._calls`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from protoframe import ConnectionLost, DeadlineExceeded, Error, LocalProtocolError, TryLater
from protoframe.queue._calls import Settling, is_passing
from protoframe.queue._contract import MOST_AT_ONCE, DeadLetter, Delivery, Exclusive, LeaseLost, StoreFull, Tag

if TYPE_CHECKING:
    from protoframe.queue._client import QueueClient

__all__ = ["Consumer", "Consuming", "ReceivedMessage"]

#: Octets of messages that came and that nobody has taken, above which further ones wait on the way.
_MOST_OCTETS = 4 * 1024 * 1024
#: Seconds before a queue is consumed again, and at most so.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
#: Seconds in which a server notices at last that a connection is gone: until then its consumer is in the way of the
#: next, where it is exclusive.
_NOTICED = 45.0


class ReceivedMessage:
    """A message that was delivered: the attributes of a `Delivery`, and the three ways to go on with it.

    Each fires when it is durable.  It fails with `LeaseLost` where the message was delivered again meanwhile, or with
    another `Error` where that could not be done in time; then it may be tried again.  Of a queue that delivers at most
    once, there is nothing to settle, and all of them succeed.

    :ivar delivery: what came.
    """

    __slots__ = ("_is_settled", "_settling", "delivery")

    def __init__(self, delivery: Delivery, settling: Settling) -> None:
        self.delivery = delivery
        self._settling = settling
        self._is_settled = False

    def __repr__(self) -> str:
        return f"<message {self.sequence} of {self._settling.queue}, attempt {self.attempt}>"

    def ack(self) -> Deferred[None]:
        """The message is done, and leaves the queue.

        What is acknowledged in one turn of the reactor goes in one call.
        """
        if self._is_settled:
            return self._settled_already()
        self._is_settled = True
        if not self.delivery.lease:
            return succeed(None)
        return self._settling.acknowledge(self.delivery.tag).addErrback(self._failed)

    def reject(self, requeue: bool = False, delay: float = 0.0, note: str = "") -> Deferred[None]:
        """The message becomes a dead letter, or is delivered again.

        :param requeue: whether it is delivered again, from the place that it had.
        :param delay: seconds before that.
        :param note: why, in 255 characters at most; it goes with a dead letter.
        """
        if self._is_settled:
            return self._settled_already()
        self._is_settled = True
        if not self.delivery.lease:
            return succeed(None)
        return self._settling.reject(self.delivery.tag, requeue, delay, note).addErrback(self._failed)

    def extend(self) -> Deferred[None]:
        """The lease begins anew: the message is not delivered again for as long as the queue's ``lease``."""
        if self._is_settled:
            return self._settled_already()
        return self._settling.extend(self.delivery.tag) if self.delivery.lease else succeed(None)

    def _settled_already(self) -> Deferred[None]:
        done: Deferred[None] = Deferred()
        done.errback(LeaseLost("it is settled already", queue=self._settling.queue, sequence=self.sequence))
        return done

    def _failed(self, failure: Any) -> Any:
        self._is_settled = isinstance(failure.value, LeaseLost)
        return failure

    # What a `Delivery` has.

    @property
    def sequence(self) -> int:
        """Its number in the queue."""
        return self.delivery.sequence

    @property
    def body(self) -> bytes:
        """What was published."""
        return self.delivery.body

    @property
    def lease(self) -> int:
        """With the number, the `Tag`; 0 where it need not be settled."""
        return self.delivery.lease

    @property
    def attempt(self) -> int:
        """How often it was delivered, this time included."""
        return self.delivery.attempt

    @property
    def redelivered(self) -> bool:
        """Whether it may have reached a consumer before."""
        return self.delivery.redelivered

    @property
    def published(self) -> float:
        """When it was published; of a dead letter, at first."""
        return self.delivery.published

    @property
    def expires(self) -> float | None:
        """When it expires."""
        return self.delivery.expires

    @property
    def subject(self) -> str:
        """By which it is chosen."""
        return self.delivery.subject

    @property
    def headers(self) -> dict[str, str]:
        """The same, by name."""
        return self.delivery.headers

    @property
    def key(self) -> str:
        """Of a queue that keeps the last value of each."""
        return self.delivery.key

    @property
    def priority(self) -> int:
        """0 to 9."""
        return self.delivery.priority

    @property
    def dead(self) -> DeadLetter | None:
        """Of a dead letter, why it is one."""
        return self.delivery.dead

    @property
    def tag(self) -> Tag:
        """Which delivery this is."""
        return self.delivery.tag


class Consumer(AsyncIterator[ReceivedMessage]):
    """Messages of a queue, as `QueueClient.consume` gives them: an async iterator, for one reader at a time.

    It consumes from when the first message is asked for.  When the connection is lost it does so again over the next;
    messages that had not been handed to the reader by then come again.  It ends with an error of the queue's own, such
    as `NoSuchQueue`, or when the client is stopped, with `ConnectionLost`.

    When the loop over it is left, by ``break``, an error or its cancellation, or by `aclose`, the messages that came
    and were not handed out are given back, as if they had not been delivered.  What was handed out and is not settled
    by then is delivered again.
    """

    def __init__(self, consuming: Consuming) -> None:
        self._consuming = consuming

    async def __aenter__(self) -> Consumer:  # noqa: PYI034 - there is no other
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[ReceivedMessage]:  # noqa: PYI034 - a generator ends when its loop is left
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[ReceivedMessage, None]:
        consuming = self._consuming
        try:
            while await consuming.wait():
                while (message := consuming.take()) is not None:
                    yield message
        finally:
            consuming.leave()

    async def __anext__(self) -> ReceivedMessage:
        if await self._consuming.wait():
            message = self._consuming.take()
            if message is not None:
                return message
        raise StopAsyncIteration

    async def take(self, most: int = MOST_AT_ONCE) -> list[ReceivedMessage]:
        """Some messages: those that are there, or the next, when one comes; none when it was closed.

        A call that is cancelled takes none, and closes nothing.

        :param most: how many at most.
        :raises Error: with which it ended.
        """
        messages: list[ReceivedMessage] = []
        if await self._consuming.wait():
            while len(messages) < most and (message := self._consuming.take()) is not None:
                messages.append(message)
        return messages

    async def aclose(self) -> None:
        """Takes no more; returns when what was not handed out is given back."""
        await self._consuming.leave()

    def __del__(self) -> None:
        self._consuming.leave()


class Consuming:
    """What consumes, and keeps what came until it is taken.

    :param queue: the client.
    :param settling: for what comes.
    """

    def __init__(
        self,
        queue: QueueClient,
        settling: Settling,
        prefetch: int,
        subject: str,
        headers: Mapping[str, str],
        exclusive: bool,
        limit: int | None,
    ) -> None:
        self._queue = queue
        self._settling = settling
        self._prefetch = prefetch
        self._subject = subject
        self._headers = dict(headers)
        self._exclusive = exclusive
        # Messages that may yet be taken.
        self._left = math.inf if limit is None else limit
        self._came: deque[Delivery] = deque()
        self._octets = 0
        self._reader: Deferred[None] | None = None
        # Fires when there is room again for what comes.
        self._room: Deferred[None] | None = None
        self._pump: Deferred[None] | None = None
        self._is_reading = False
        self._is_left = False
        self._error: Exception | None = None
        self._has_ended = False
        self._leaving: list[Deferred[None]] = []
        self._unseen: list[Tag] = []
        self._giving: Deferred[None] = succeed(None)

    # For the reader.

    async def wait(self) -> bool:
        """Waits until something is there to be taken; ``False`` where nothing will be.

        :raises Error: with which it ended.
        """
        if self._reader is not None:
            raise LocalProtocolError("a consumer has one reader at a time")
        if self._pump is None and not self._is_left:
            self._start()
        while self._is_left or not self._came:
            if self._has_ended or self._is_left or not self._left:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return False
            self._reader = Deferred()
            try:
                await self._reader
            finally:
                self._reader = None
        return True

    def take(self) -> ReceivedMessage | None:
        """The next message that is there."""
        if not self._came or self._is_left:
            return None
        delivery = self._came.popleft()
        self._left -= 1
        self._octets -= len(delivery.body)
        if self._room is not None and self._octets < _MOST_OCTETS // 2:
            self._wake_pump()
        return ReceivedMessage(delivery, self._settling)

    def leave(self) -> Deferred[None]:
        """Nobody takes any more; fires when what came is given back."""
        left: Deferred[None] = Deferred()
        self._leaving.append(left)
        if not self._is_left:
            self._is_left = True
            self._queue.forget(self)
            if self._pump is None or self._has_ended:
                self._has_ended = True
                self._came.clear()
            else:
                self._leave()
            self._wake_reader()
        self._tell_left()
        return left

    def _leave(self) -> None:
        if self._is_reading:
            # It is in the midst of what came, and sees to the rest.
            return
        if self._room is not None:
            self._wake_pump()
            return
        # What is settled goes before the end of the stream, which settles all that is left.
        self._give_back()
        if self._pump is not None:
            self._pump.cancel()

    # What consumes.

    def _start(self) -> None:
        self._queue.remember(self)
        self._pump = pump = Deferred.fromCoroutine(self._run())
        pump.addErrback(self._failed)
        pump.addBoth(self._ended)

    def _failed(self, failure: Any) -> None:
        if not self._is_left:
            self._error = failure.value

    def _ended(self, _: Any) -> None:
        self._giving.addBoth(self._finished)

    def _finished(self, _: Any) -> None:
        self._has_ended = True
        self._wake_reader()
        self._tell_left()

    def _tell_left(self) -> None:
        if self._has_ended:
            leaving, self._leaving = self._leaving, []
            for one in leaving:
                one.callback(None)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        lost_at: float | None = None
        while True:
            await self._queue.when_up()
            if not self._left:
                return
            if self._unseen:
                # They were delivered by a stream that is lost, and looked at by nobody.
                unseen, self._unseen = self._unseen, []
                self._queue.hold(self._settling.give_back(unseen))
            wait = 0.0
            began = self._queue.now()
            try:
                await self._consume()
                lost_at = self._queue.now()
            except Error as error:
                if self._is_left:
                    return
                if is_passing(error):
                    lost_at = self._queue.now()
                if not self._may_go_on(error, lost_at):
                    raise
                wait = error.retry_after if isinstance(error, TryLater) else 0.0
            if self._is_left:
                return
            self._drop()
            if self._queue.now() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            await deferLater(self._queue.reactor, max(pause, wait))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _may_go_on(self, error: Error, lost_at: float | None) -> bool:
        """Whether the queue is consumed again after an error, which is not the queue's own."""
        if isinstance(error, Exclusive):
            # That may be this consumer's own former connection.
            return lost_at is not None and self._queue.now() - lost_at < _NOTICED
        if isinstance(error, DeadlineExceeded):
            # No server was there in time; or the deadline is one that surrounds this consumer.
            return not self._queue.is_up
        return is_passing(error) or isinstance(error, StoreFull)

    async def _consume(self) -> None:
        """Takes what comes of one stream, to its end."""
        stream = self._queue.calls.consume(
            self._settling.queue,
            self._settling.group,
            self._prefetch,
            self._subject,
            self._headers,
            self._exclusive,
            None if self._left == math.inf else int(self._left),
        )
        deliveries = aiter(stream)
        async for delivery in deliveries:
            self._is_reading = True
            self._take_in(delivery)
            self._is_reading = False
            if self._octets >= _MOST_OCTETS and not self._is_left:
                self._room = Deferred()
                await self._room
            if self._is_left:
                await self._take_rest(deliveries)
                return

    def _take_in(self, delivery: Delivery) -> None:
        self._came.append(delivery)
        self._octets += len(delivery.body)
        self._wake_reader()

    async def _take_rest(self, deliveries: AsyncIterator[Delivery]) -> None:
        """Gives back what came, what is here of the stream and was not looked at yet included, and ends the stream."""
        while True:
            coming: Deferred[Delivery] = Deferred.fromCoroutine(_next(deliveries))
            if not coming.called:
                break
            try:
                self._came.append(await coming)
            except (Error, StopAsyncIteration):
                break
        self._give_back()
        if not coming.called:
            coming.addErrback(lambda _: None)
            coming.cancel()

    def _give_back(self) -> None:
        """Has what came, and was not handed out, be delivered to others."""
        tags = [delivery.tag for delivery in self._came if delivery.lease]
        self._came.clear()
        self._octets = 0
        if tags and self._queue.is_up:
            # First of all: a server that settles others first has room, and sends more.
            self._giving = self._settling.give_back(tags)
        self._settling.flush()

    def _drop(self) -> None:
        """The stream is lost: what was not handed out comes again, but for what does not."""
        kept = [delivery for delivery in self._came if not delivery.lease]
        self._unseen += [delivery.tag for delivery in self._came if delivery.lease]
        self._came = deque(kept)
        self._octets = sum(len(delivery.body) for delivery in kept)

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.callback(None)

    def _wake_pump(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            room.callback(None)

    def stop(self) -> Deferred[None]:
        """The client is stopped: whoever waits is told so."""
        if not self._is_left and not self._has_ended:
            self._error = ConnectionLost("the client was stopped")
        error = self._error
        left = self.leave()
        self._error = error
        return left


async def _next(deliveries: AsyncIterator[Delivery]) -> Delivery:
    return await anext(deliveries)
