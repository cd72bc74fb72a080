"""Metrics of a queue server: that Prometheus's own parser reads them, and that they say how the queues stand."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.test.requesthelper import DummyRequest

from protoframe.queue import Message, Settings, Tag
from protoframe.servers.queue.broker import Broker
from protoframe.servers.queue.memory import MemoryStore
from protoframe.servers.queue.metrics import metrics_site
from protoframe.servers.queue.store import Action, Verdict


class MetricsTest(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        disk, memory = (MemoryStore(self.clock, self.clock.seconds) for _ in range(2))
        self.broker = Broker(self.clock, self.clock.seconds, disk, memory, broken=self.fail)
        self.broker.open()

    def do(self, coroutine: Any) -> Any:
        from twisted.internet.defer import Deferred

        return self.successResultOf(Deferred.fromCoroutine(coroutine))

    def read(self) -> dict[tuple[str, str], float]:
        request: Any = DummyRequest([b"metrics"])
        metrics_site(self.broker).resource.render_GET(request)
        self.clock.advance(0)
        text = b"".join(request.written).decode()
        return {
            (sample.name, sample.labels.get("group", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels["queue"] == "orders"
        }

    def test_they_say_how_each_group_stands(self):
        self.do(self.broker.declare("orders", Settings(groups=("a", "b")), replace=False))
        self.broker.publish("orders", [Message(body=b"1234"), Message(body=b"56"), Message(body=b"7", delay=60.0)])
        self.clock.advance(10)
        consumer = self.broker.consume("orders", "a", 2, None, is_exclusive=False)
        self.clock.advance(0)
        self.broker.settle("orders", "a", [Tag(1, 1)], Verdict(Action.DONE))
        consumer.leave()
        metrics = self.read()
        self.assertEqual(metrics["protoframe_queue_published_total", ""], 3)
        self.assertEqual(metrics["protoframe_queue_ready", "a"], 1)
        self.assertEqual(metrics["protoframe_queue_ready", "b"], 2)
        self.assertEqual(metrics["protoframe_queue_delayed", "b"], 1)
        self.assertEqual(metrics["protoframe_queue_bytes", "a"], 3)
        self.assertEqual(metrics["protoframe_queue_delivered_total", "a"], 2)
        self.assertEqual(metrics["protoframe_queue_acknowledged_total", "a"], 1)
        self.assertEqual(metrics["protoframe_queue_acknowledged_total", "b"], 0)
        self.assertEqual(metrics["protoframe_queue_oldest_age_seconds", "b"], 10)

    def test_a_server_without_queues_has_none(self):
        self.assertEqual(self.read(), {})
