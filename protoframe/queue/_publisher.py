"""`Publisher`: gathers messages by number, octets and time, and publishes them in batches.

Knows batches and who waits for them; not how a batch is published (`protoframe.queue.QueueClient.publish_batch`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed

from protoframe import LocalProtocolError
from protoframe.queue._calls import own_copy, run_in
from protoframe.queue._contract import (
    HIGHEST_PRIORITY,
    LARGEST_BODY,
    LARGEST_PROPERTIES,
    LONGEST,
    MOST_AT_ONCE,
    InvalidMessage,
    Message,
    QueueFull,
    Receipt,
)

__all__ = ["ONE_PIECE", "Publisher", "checked"]

#: Batches on their way at once.
_MOST_BATCHES = 4
_LONGEST_TEXT = 255
#: Octets of a batch: such as are counted here, and a call takes four times as many.
_MOST_OCTETS = 1024 * 1024
#: Octets that a message takes beside its texts, about.
_OVERHEAD = 64
#: Octets of a batch that goes in one piece.  One that does not is overtaken by what is sent after it.
ONE_PIECE = 48 * 1024

_Publish = Callable[[list[Message]], Deferred[list[Receipt]]]


class Publisher:
    """Publishes messages of one queue in batches: many times as many a second as one by one.

    A message goes as soon as there are ``count`` of them or ``octets`` of bodies, or after ``seconds``; up to four
    batches are on their way at once.  `publish` fires when its message is durable.  ``async with`` waits at the end
    until every message has its outcome.

    Messages are stored in the order of `publish`; only where a batch fails and is published again, those of the next
    may be before it.

    :ivar waiting: messages that wait for their batch to begin.
    """

    def __init__(
        self,
        reactor: Any,
        queue: str,
        publish: _Publish,
        *,
        count: int,
        octets: int,
        seconds: float,
        most_waiting: int,
        context: Context | None = None,
        idle: Callable[[], Any] | None = None,
    ) -> None:
        _bounded("count", count, 1, MOST_AT_ONCE)
        _bounded("octets", octets, 1, _MOST_OCTETS)
        _bounded("seconds", seconds, 0, 3600)
        _bounded("most_waiting", most_waiting, 1, 10_000_000)
        self._reactor = reactor
        self._queue = queue
        self._publish = publish
        self._count = count
        self._octets = octets
        self._seconds = seconds
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[Message, Deferred[Receipt], int]] = deque()
        self._waiting_octets = 0
        self._batches = 0
        # Whether a batch is on its way that what is sent after it may overtake.
        self._is_overtaken = False
        self._timer: Any = None
        # Whether what waits goes though it is no whole batch.
        self._is_due = False
        self._is_closed = False
        # That of who made this, where no other is given: a batch has messages of several.
        self._context = context if context is not None else copy_context()
        self._idle = idle
        self._ready: deque[Deferred[None]] = deque()
        self._flushed: list[Deferred[None]] = []

    async def __aenter__(self) -> Publisher:  # noqa: PYI034 - there is no other
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        await self.flush()

    @property
    def waiting(self) -> int:
        """Messages that wait for their batch to begin."""
        return len(self._waiting)

    def publish(
        self,
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
        """Publishes a message; fires with its receipt when it is durable.

        Whoever publishes more without waiting for that waits for `ready` before each.

        It fails with `InvalidMessage` for a message that cannot be, and with `QueueFull` for one that has no room; that
        fails no other.  What else becomes of a batch becomes of each of its messages.
        """
        if self._is_closed:
            raise LocalProtocolError("the publisher is closed")
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
        try:
            checked(self._queue, message)
        except InvalidMessage as error:
            return fail(error)
        return self.add(message)

    def add(self, message: Message) -> Deferred[Receipt]:
        """The same, of a message that was looked at."""
        done: Deferred[Receipt] = Deferred()
        size = _size(message)
        self._waiting.append((message, done, size))
        self._waiting_octets += size
        if self._is_whole():
            self._send()
        elif self._timer is None and not self._is_due:
            self._timer = self._reactor.callLater(self._seconds, self._expired)
        return done

    def ready(self) -> Deferred[None]:
        """Fires when fewer than ``most_waiting`` messages wait: then there is room for one."""
        if len(self._waiting) < self._most_waiting:
            return succeed(None)
        ready: Deferred[None] = Deferred()
        self._ready.append(ready)
        return ready

    def flush(self) -> Deferred[None]:
        """Publishes what waits at once; fires when every message has its outcome."""
        flushed: Deferred[None] = Deferred()
        self._flushed.append(flushed)
        self._expired()
        return flushed

    def _is_whole(self) -> bool:
        return len(self._waiting) >= self._count or self._waiting_octets >= self._octets

    def _expired(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        self._is_due = True
        self._send()

    def _send(self) -> None:
        while (
            self._waiting
            and self._batches < _MOST_BATCHES
            and not self._is_overtaken
            and (self._is_due or self._is_whole())
        ):
            self._send_batch()
        if not self._waiting:
            self._is_due = False
        while self._ready and len(self._waiting) < self._most_waiting:
            ready = self._ready.popleft()
            # One that was given up has been called.
            if not ready.called:
                ready.callback(None)
        if not self._waiting and not self._batches:
            flushed, self._flushed = self._flushed, []
            for one in flushed:
                one.callback(None)
            if self._idle is not None:
                self._idle()

    def _send_batch(self) -> None:
        batch: list[tuple[Message, Deferred[Receipt]]] = []
        octets = 0
        # One without a key would keep the others from being published again, where nobody knows whether they were.
        has_keys = bool(self._waiting[0][0].dedup)
        while self._waiting and len(batch) < self._count:
            message, done, size = self._waiting[0]
            if batch and (octets + size > self._octets or bool(message.dedup) is not has_keys):
                break
            self._waiting.popleft()
            batch.append((message, done))
            octets += size
        self._waiting_octets -= octets
        self._is_overtaken = octets > ONE_PIECE
        if self._timer is not None and not self._waiting:
            self._timer.cancel()
            self._timer = None
        self._batches += 1
        sending = run_in(self._context, self._publish_batch(batch))
        sending.addBoth(self._sent, self._is_overtaken)

    async def _publish_batch(self, batch: list[tuple[Message, Deferred[Receipt]]]) -> None:
        try:
            receipts = await self._publish([message for message, _ in batch])
        except (InvalidMessage, QueueFull) as error:
            if len(batch) == 1:
                batch[0][1].errback(error)
                return
            # The server has stored none: the others need not suffer for the one that it does not take.
            for one in batch:
                await self._publish_batch([one])
        except BaseException as error:
            for _, done in batch:
                done.errback(own_copy(error))
        else:
            for (_, done), receipt in zip(batch, receipts, strict=True):
                done.callback(receipt)

    def _sent(self, _: Any, was_overtaken: bool) -> None:
        self._batches -= 1
        if was_overtaken:
            self._is_overtaken = False
        self._send()


def checked(queue: str, message: Message) -> Message:
    """The message, if it may be one.

    :raises InvalidMessage: no queue takes it.
    :raises TypeError: something is not of its type.
    """
    if not isinstance(message.body, bytes | bytearray | memoryview):
        raise TypeError(f"body: expected bytes, got {type(message.body).__name__}")
    if len(message.body) > LARGEST_BODY:
        raise _invalid(f"the body has {len(message.body)} octets, more than {LARGEST_BODY}", queue)
    has_texts = message.subject or message.key or message.dedup or message.headers
    has_times = message.ttl is not None or message.delay is not None
    if not has_texts and not has_times and type(message.priority) is int and message.priority == 0:
        # Most have nothing else.
        return message
    size = 0
    for name in ("subject", "key", "dedup"):
        text = getattr(message, name)
        if text:
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected str, got {type(text).__name__}")
            if len(text) > _LONGEST_TEXT:
                raise _invalid(f"the {name} has {len(text)} characters, more than {_LONGEST_TEXT}", queue)
            size += _octets(name, text, queue)
    for name, text in message.headers.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError("headers: expected str by str")
        size += _octets("headers", name, queue) + _octets("headers", text, queue)
    if size > LARGEST_PROPERTIES:
        raise _invalid(f"the properties have {size} octets, more than {LARGEST_PROPERTIES}", queue)
    if not isinstance(message.priority, int):
        raise TypeError(f"priority: expected int, got {type(message.priority).__name__}")
    if not 0 <= message.priority <= HIGHEST_PRIORITY:
        raise _invalid(f"the priority is {message.priority}, not 0 to {HIGHEST_PRIORITY}", queue)
    # Of NaN none of these holds.
    if message.ttl is not None and not 0 < message.ttl <= LONGEST:
        raise _invalid(f"the ttl is {message.ttl}, not above 0 and up to {LONGEST:g} seconds", queue)
    if message.delay is not None and not 0 <= message.delay <= LONGEST:
        raise _invalid(f"the delay is {message.delay}, not 0 to {LONGEST:g} seconds", queue)
    return message


def _size(message: Message) -> int:
    """Octets that a message takes, about."""
    texts = len(message.subject) + len(message.key) + len(message.dedup)
    if message.headers:
        texts += sum(len(name) + len(text) + 4 for name, text in message.headers.items())
    return len(message.body) + texts + _OVERHEAD


def _octets(name: str, text: str, queue: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(f"{name}: {text!r} is not Unicode", queue) from None


def _invalid(text: str, queue: str) -> InvalidMessage:
    error = InvalidMessage(text, queue=queue)
    error.may_have_run = False
    return error


def _bounded(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least:g} to {most:g}, got {value!r}")
