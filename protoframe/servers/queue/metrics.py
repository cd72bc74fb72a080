"""How the queues stand, for Prometheus: a page that it reads.

Knows statistics, and Prometheus's text format by its own library; not how queues come to stand so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from protoframe import Error
from protoframe.queue import GroupStatistics, Statistics
from protoframe.servers.queue.broker import Broker

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["metrics_site"]

_log = Logger(namespace="protoframe.queue")

_QUEUE = (
    ("published", "counter", "Messages that were stored."),
    ("duplicates", "counter", "Messages that were stored already, by their deduplication keys."),
    ("refused", "counter", "Messages for which there was no room."),
)
_GROUP = (
    ("ready", "gauge", "Messages that wait for a consumer."),
    ("delayed", "gauge", "Messages that wait for their time."),
    ("leased", "gauge", "Messages that consumers have."),
    ("bytes", "gauge", "Octets of the messages that are in the queue."),
    ("oldest_age", "gauge", "Seconds since the oldest message in the queue was published; 0 where there is none."),
    ("consumers", "gauge", "Consumers that are there."),
    ("delivered", "counter", "Messages that were given to consumers."),
    ("redelivered", "counter", "Messages that were given to consumers again."),
    ("acknowledged", "counter", "Messages that consumers were done with."),
    ("dead_lettered", "counter", "Messages that were given up."),
    ("expired", "counter", "Messages that were given up because their time had passed."),
    ("dropped", "counter", "Messages that made room for others."),
)


class _Collector:
    """What Prometheus's library writes out."""

    def __init__(self, queues: Sequence[Statistics]) -> None:
        self._queues = queues

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kinds: dict[str, Any] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        for name, kind, text in _QUEUE:
            family = kinds[kind](f"protoframe_queue_{name}", text, labels=["queue"])
            for queue in self._queues:
                family.add_metric([queue.name], getattr(queue, name))
            yield family
        for name, kind, text in _GROUP:
            unit = "_seconds" if name == "oldest_age" else ""
            family = kinds[kind](f"protoframe_queue_{name}{unit}", text, labels=["queue", "group"])
            for where, group in self._groups():
                family.add_metric([where, group.name], getattr(group, name) or 0)
            yield family

    def _groups(self) -> Iterable[tuple[str, GroupStatistics]]:
        return ((queue.name, group) for queue in self._queues for group in queue.groups)


class _Metrics(Resource):
    isLeaf = True

    def __init__(self, broker: Broker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._broker = broker

    def render_GET(self, request: Any) -> int:
        writing: Deferred[bytes] = Deferred.fromCoroutine(self._write())
        gone = request.notifyFinish()
        gone.addErrback(lambda _: writing.cancel())
        writing.addCallbacks(self._written, self._not_written, callbackArgs=(request,), errbackArgs=(request, gone))
        return NOT_DONE_YET

    async def _write(self) -> bytes:
        from prometheus_client import CollectorRegistry, generate_latest

        queues = []
        for name in self._broker.names(""):
            try:
                queues.append(await self._broker.look(name))
            except Error as error:
                # It was deleted meanwhile, or the store is at its end.
                _log.debug("no metrics of {name}: {error}", name=name, error=error)
        registry = CollectorRegistry()
        registry.register(_Collector(queues))
        return generate_latest(registry)

    def _written(self, text: bytes, request: Any) -> None:
        from prometheus_client import CONTENT_TYPE_LATEST

        request.setHeader(b"content-type", CONTENT_TYPE_LATEST.encode())
        request.setHeader(b"content-length", str(len(text)).encode())
        request.write(text)
        request.finish()

    def _not_written(self, failure: Failure, request: Any, gone: Deferred[Any]) -> None:
        if gone.called:
            return
        _log.failure("the metrics could not be written", failure)
        request.setResponseCode(500)
        request.finish()


def metrics_site(broker: Broker) -> Site:
    """What answers to HTTP with the metrics of a broker's queues, whatever the path.

    :raises ImportError: ``prometheus_client`` is not installed.
    """
    import prometheus_client  # noqa: F401 - to say so at once

    return Site(_Metrics(broker))
