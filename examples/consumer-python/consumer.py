"""Counts in SQLite who says how much in which channel, from Inlet's stream: each event once, whatever is killed on the
way, this program or the server.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python consumer.py chat.db

The pattern: the effect, and the note that it is done, are one transaction. Adding one to a counter is not idempotent; with
the event's id noted beside it, it is, whoever delivers it again and whenever. Messages are acknowledged when the
transaction is on disk, many at a time: order does not matter to a counter, and `seq` keeps it for whoever reads the table.
"""

import asyncio
import json
import os
import sqlite3
import sys

import nats
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

SERVERS = os.environ.get("NATS_URL", "nats://127.0.0.1:4222").split(",")
STREAM = os.environ.get("NATS_STREAM", "INLET")
SUBJECT = os.environ.get("SUBJECT", "internal.ingress.v1")
DURABLE = os.environ.get("CONSUMER", "chat-counts")

BATCH = 100
# Longer than a batch ever takes: after it, the server delivers its messages again.
ACK_WAIT_SECONDS = 2

TABLES = """
CREATE TABLE IF NOT EXISTS event (
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, type TEXT NOT NULL, at TEXT NOT NULL, channel TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS said (
    channel TEXT, user TEXT, messages INTEGER NOT NULL, PRIMARY KEY (channel, user)
) WITHOUT ROWID;
"""


def apply(database, envelope, seq):
    """One event's effect, unless it was there before."""
    channel, user = envelope["source"]["channel"], envelope.get("user", {}).get("id")
    done = database.execute(
        "INSERT INTO event VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        (envelope["id"], seq, envelope["type"], envelope["occurredAt"], channel),
    )
    if done.rowcount == 1 and user and envelope["type"] == "external.chat.message.v1":
        database.execute(
            "INSERT INTO said VALUES (?, ?, 1) ON CONFLICT (channel, user) DO UPDATE SET messages = messages + 1",
            (channel, user),
        )


async def handle(database, messages):
    """A batch: its effect is on disk before any of it is acknowledged."""
    with database:  # Commits at its end, and takes everything back on an error.
        for message in messages:
            try:
                envelope = json.loads(message.data)
                apply(database, envelope, message.metadata.sequence.stream)
            except (ValueError, KeyError, TypeError):
                print("no envelope, left out", file=sys.stderr)
    for message in messages:
        await message.ack()  # One that is lost costs a delivery more.


async def consume(connection, database):
    """Follows the stream for as long as that goes well."""
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.EXPLICIT, ack_wait=ACK_WAIT_SECONDS
    )
    subscription = await connection.jetstream().pull_subscribe(SUBJECT, DURABLE, stream=STREAM, config=config)
    while True:
        try:
            await handle(database, await subscription.fetch(BATCH, timeout=5))
        except nats.errors.TimeoutError:
            pass  # Nothing was said for so long.


async def tell(error):
    """The library goes on by itself after this."""
    print(f"NATS: {error!r}", file=sys.stderr)


async def main(path):
    database = sqlite3.connect(path)
    database.executescript(TABLES)
    connection = await nats.connect(SERVERS, error_cb=tell, max_reconnect_attempts=-1, reconnect_time_wait=0.5)
    while True:
        try:
            await consume(connection, database)
        except nats.errors.Error as error:
            print(f"interrupted ({error!r}); trying again", file=sys.stderr)
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "chat.db"))
