"""A message queue: what it answers, `Queue`; and a client, `QueueClient`."""

from protoframe.queue._contract import *  # noqa: F403
