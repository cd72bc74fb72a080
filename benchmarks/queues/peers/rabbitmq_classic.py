"""RabbitMQ's classic queues."""

from __future__ import annotations

from benchmarks.loads import Task
from benchmarks.queues.peers import rabbitmq

__all__ = ["take"]


def take(task: Task, port: int) -> float:
    return rabbitmq.take(task, port, "classic")
