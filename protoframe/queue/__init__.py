"""A durable message queue: what it answers, `Queue`; a client, `QueueClient`; and what works a queue off, `Worker`.

The names below are the public face; the client and the worker are imported when they are first used, so that the
declarations alone cost no reactor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from protoframe.queue._contract import (
    HIGHEST_PRIORITY,
    LARGEST_BODY,
    LARGEST_PROPERTIES,
    MOST_AT_ONCE,
    Count,
    DeadLetter,
    Delivery,
    DeliveryPolicy,
    DifferentSettings,
    Duration,
    Exclusive,
    GroupStatistics,
    Headers,
    InvalidMessage,
    InvalidSettings,
    LeaseLost,
    Message,
    Messages,
    NoSuchGroup,
    NoSuchQueue,
    NotEmpty,
    Order,
    Overflow,
    Overloaded,
    Positive,
    Priority,
    Queue,
    QueueFull,
    QueueName,
    Receipt,
    Receipts,
    Settings,
    Settled,
    ShortText,
    State,
    Statistics,
    Storage,
    StoreFailed,
    StoreFull,
    Tag,
    Tags,
    TooMany,
    Wait,
    Waiting,
)

if TYPE_CHECKING:
    from protoframe.queue._client import QueueClient
    from protoframe.queue._consumer import Consumer, ReceivedMessage
    from protoframe.queue._publisher import Publisher
    from protoframe.queue._worker import Reject, Worker, work

__all__ = [
    "HIGHEST_PRIORITY",
    "LARGEST_BODY",
    "LARGEST_PROPERTIES",
    "MOST_AT_ONCE",
    "Consumer",
    "Count",
    "DeadLetter",
    "Delivery",
    "DeliveryPolicy",
    "DifferentSettings",
    "Duration",
    "Exclusive",
    "GroupStatistics",
    "Headers",
    "InvalidMessage",
    "InvalidSettings",
    "LeaseLost",
    "Message",
    "Messages",
    "NoSuchGroup",
    "NoSuchQueue",
    "NotEmpty",
    "Order",
    "Overflow",
    "Overloaded",
    "Positive",
    "Priority",
    "Publisher",
    "Queue",
    "QueueClient",
    "QueueFull",
    "QueueName",
    "Receipt",
    "Receipts",
    "ReceivedMessage",
    "Reject",
    "Settings",
    "Settled",
    "ShortText",
    "State",
    "Statistics",
    "Storage",
    "StoreFailed",
    "StoreFull",
    "Tag",
    "Tags",
    "TooMany",
    "Wait",
    "Waiting",
    "Worker",
    "work",
]

#: The modules of what brings Twisted in.
_HOMES = {
    "Consumer": "_consumer",
    "Publisher": "_publisher",
    "QueueClient": "_client",
    "ReceivedMessage": "_consumer",
    "Reject": "_worker",
    "Worker": "_worker",
    "work": "_worker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
