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
# What comes meanwhile is gathered into a batch.
GATHER_SECONDS = 1
# Longer than a batch ever takes, gathering it too: after it, the server delivers its messages again.
ACK_WAIT_SECONDS = 5

TABLES = """
CREATE TABLE IF NOT EXISTS event (
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, type TEXT NOT NULL, at TEXT NOT NULL, channel TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS said (
    channel TEXT, user TEXT, messages INTEGER NOT NULL, PRIMARY KEY (channel, user)
) WITHOUT ROWID;
"""


def read(data):
    """Of an envelope, what is used here: id, type, time, channel, and the user's id or None. ValueError at anything else."""
    try:
        envelope = json.loads(data)
        said = envelope["id"], envelope["type"], envelope["occurredAt"], envelope["source"]["channel"]
        user = envelope["user"]["id"] if "user" in envelope else None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("no envelope") from error
    if not all(isinstance(text, str) for text in (*said, user or "")):
        raise ValueError("no envelope")
    return *said, user


def apply(database, event, seq):
    """One event's effect, unless it was there before."""
    event_id, kind, at, channel, user = event
    done = database.execute(
        "INSERT INTO event VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", (event_id, seq, kind, at, channel)
    )
    if done.rowcount == 1 and user and kind == "external.chat.message.v1":
        database.execute(
            "INSERT INTO said VALUES (?, ?, 1) ON CONFLICT (channel, user) DO UPDATE SET messages = messages + 1",
            (channel, user),
        )


async def handle(database, messages):
    """A batch: its effect is on disk before any of it is acknowledged."""
    with database:  # Commits at its end, and takes everything back on an error.
        for message in messages:
            try:
                apply(database, read(message.data), message.metadata.sequence.stream)
            except ValueError:
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
            await handle(database, await subscription.fetch(BATCH, timeout=GATHER_SECONDS))
        except nats.errors.TimeoutError:
            # Nothing was said for so long; or the stream was made again, and the durable consumer is gone with the old one.
            await subscription.consumer_info()


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
