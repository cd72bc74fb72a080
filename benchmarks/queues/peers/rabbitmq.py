"""RabbitMQ, by pika's `SelectConnection`, which has as many messages on the way as one wants.

Knows callbacks, as pika gives them; the kinds of queues are modules of their own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import pika

from benchmarks.loads import Task, per_second
from benchmarks.queues.workloads import BODY, PREFETCH, SETTLED_TOGETHER
from benchmarks.workloads import Kind

__all__ = ["take"]

PERSISTENT = pika.BasicProperties(delivery_mode=2)


def take(task: Task, port: int, kind: str) -> float:
    return _Client(task, port, kind).run()


class _Client:
    """One connection with one channel."""

    def __init__(self, task: Task, port: int, kind: str) -> None:
        self._task = task
        self._name = f"bench-{uuid.uuid4().hex}"
        self._arguments = {"x-queue-type": kind}
        self._found: float | None = None
        self._why: object = "the connection ended"
        # Publishing: which tags are on the way, in order, and how many of each batch are.
        self._sent = 0
        self._last = 0
        self._waiting: dict[int, None] = {}
        self._left: dict[int, int] = {}
        self._then: Callable[[], None] = self._end
        self._began = 0.0
        self._channel: Any = None
        self._connection = pika.SelectConnection(
            pika.ConnectionParameters("127.0.0.1", port, heartbeat=0),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_open_error_callback=self._closed,
            on_close_callback=self._closed,
        )

    def run(self) -> float:
        self._connection.ioloop.start()
        if self._found is None:
            raise SystemExit(f"RabbitMQ: {self._why}")
        return self._found

    def _closed(self, _: Any, why: object) -> None:
        self._why = why
        self._connection.ioloop.stop()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._channel_closed)
        channel.confirm_delivery(self._confirmed, callback=self._confirming)

    def _channel_closed(self, _: Any, why: object) -> None:
        if self._connection.is_open:
            self._why = why
            self._connection.close()

    def _confirming(self, _: Any) -> None:
        self._channel.queue_declare(
            self._name, durable=True, arguments=self._arguments, callback=lambda _: self._declared()
        )

    def _declared(self) -> None:
        if self._task.kind is Kind.CONSUME:
            self._publish(self._task.count, 10, 100, self._consume)
        else:
            self._publish(self._task.warm_up, self._task.at_once, self._task.workload.batch, self._measure)

    def _measure(self) -> None:
        self._began = time.perf_counter()
        self._publish(self._task.count, self._task.at_once, self._task.workload.batch, self._end)

    # Publishing.

    def _publish(self, count: int, at_once: int, batch: int, then: Callable[[], None]) -> None:
        self._last = self._sent + count
        self._size = batch
        self._first = self._sent
        self._left.clear()
        self._then = then
        for _ in range(min(at_once, -(-count // batch))):
            self._send_batch()

    def _send_batch(self) -> None:
        number = (self._sent - self._first) // self._size
        together = min(self._size, self._last - self._sent)
        self._left[number] = together
        for _ in range(together):
            self._sent += 1
            self._waiting[self._sent] = None
            self._channel.basic_publish("", self._name, BODY, PERSISTENT)

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        if not isinstance(method, pika.spec.Basic.Ack):
            self._why = f"message {method.delivery_tag} was refused"
            self._connection.close()
            return
        if method.multiple:
            tags = []
            for tag in self._waiting:
                if tag > method.delivery_tag:
                    break
                tags.append(tag)
        else:
            tags = [method.delivery_tag]
        for tag in tags:
            del self._waiting[tag]
            number = (tag - 1 - self._first) // self._size
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
                if self._sent < self._last:
                    self._send_batch()
        if not self._waiting and self._sent == self._last:
            self._then()

    # Consuming.

    def _consume(self) -> None:
        self._taken = 0
        self._channel.basic_qos(prefetch_count=PREFETCH, callback=lambda _: self._begin_consuming())

    def _begin_consuming(self) -> None:
        self._began = time.perf_counter()
        self._channel.basic_consume(self._name, self._delivered)

    def _delivered(self, channel: Any, method: Any, _: Any, body: bytes) -> None:
        self._taken += 1
        is_last = self._taken == self._task.count
        if self._taken % SETTLED_TOGETHER == 0 or is_last:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if is_last:
            # A channel's methods are done in order.
            channel.queue_declare(self._name, passive=True, callback=lambda _: self._end())

    def _end(self) -> None:
        self._found = per_second(self._task, time.perf_counter() - self._began)
        self._channel.queue_delete(self._name, callback=lambda _: self._connection.close())
