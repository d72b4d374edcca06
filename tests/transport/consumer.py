"""consumer.py URL QUEUE [--hold]: a consumer in a process of its own.

Writes "ready", then the body of each message, with "again" after it if it was delivered before. Acknowledges each one
unless --hold. Ends when it is killed.
"""

import argparse
from typing import Any

from kombu import Connection, Queue

import aque.transport  # noqa: F401 (registers the scheme)

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("queue")
parser.add_argument("--hold", action="store_true")
arguments = parser.parse_args()


def show(body: Any, message: Any) -> None:
    print(body, *["again"] * bool(message.delivery_info["redelivered"]), flush=True)
    if not arguments.hold:
        message.ack()


connection = Connection(arguments.url)
with connection, connection.Consumer([Queue(arguments.queue)], callbacks=[show], prefetch_count=10):
    print("ready", flush=True)
    while True:
        connection.drain_events()
