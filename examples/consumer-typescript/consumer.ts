// Writes every event of Inlet's stream to a file: one line each, each once, in the stream's order, whatever is killed on
// the way, this program or the server.
//
//   npm ci && npm run build && npm start -- chat.jsonl
//
// The pattern: the effect and the position are one write. Each line names the position in the stream that it came from, so
// the file itself says how far we are; what is delivered again is at or before the last line, and only acknowledged again.
// For the order, one message is under way at a time (`max_ack_pending: 1`): whoever needs no order can have many, and
// tell what is done by the event's id, as the example in Python does.
import fs from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

import { AckPolicy, DeliverPolicy, jetstream, jetstreamManager, type JsMsg } from '@nats-io/jetstream';
import { connect, nanos, type NatsConnection } from '@nats-io/transport-node';

const servers = process.env.NATS_URL ?? 'nats://127.0.0.1:4222';
const stream = process.env.NATS_STREAM ?? 'INLET';
const subject = process.env.SUBJECT ?? 'internal.ingress.v1';
const durable = process.env.CONSUMER ?? 'chat-log';
const path = process.argv[2] ?? 'chat.jsonl';

/** Longer than the effect ever takes: after it, the server delivers the message again. */
const ACK_WAIT_MS = 2_000;
/** No line is longer. */
const TAIL_BYTES = 1 << 20;

/** Of an envelope, what is used here; `docs/envelope-v1.schema.json` has all of it. */
interface Envelope {
  id: string;
  type: string;
  occurredAt: string;
  source: { channel: string };
  user?: { displayName: string; tags: string[] };
  payload: { text?: string };
}

/** A line of the file: the position first, then what was said. */
interface Line {
  /** When the stream was created: a position means nothing in another one. */
  stream: string;
  seq: number;
  id: string;
  [of: string]: unknown;
}

class Log {
  private constructor(private readonly file: number, public last: Line | undefined) {}

  /** Opens the file where it ends. A line that a kill cut short was not acknowledged: it is taken off, and comes again. */
  static open(path: string): Log {
    const file = fs.openSync(path, 'a+');
    const size = fs.fstatSync(file).size;
    const tail = Buffer.alloc(Math.min(size, TAIL_BYTES));
    fs.readSync(file, tail, 0, tail.length, size - tail.length);
    const end = tail.lastIndexOf('\n') + 1;
    fs.ftruncateSync(file, size - tail.length + end);
    const last = tail.subarray(0, end).toString().trimEnd().split('\n').at(-1);
    return new Log(file, last ? (JSON.parse(last) as Line) : undefined);
  }

  /** Whether the event at this position is in the file already. */
  has(stream: string, seq: number): boolean {
    return this.last?.stream === stream && seq <= this.last.seq;
  }

  /** On disk when this returns. */
  append(line: Line): void {
    fs.writeSync(this.file, `${JSON.stringify(line)}\n`);
    fs.fdatasyncSync(this.file);
    this.last = line;
  }
}

/** What is written of an event. Throws at what is no envelope. */
function lineOf(created: string, message: JsMsg): Line {
  const { id, type, occurredAt: at, source, user, payload } = message.json<Envelope>();
  if ([id, type, at, source.channel].some((text) => typeof text !== 'string')) throw new TypeError('no envelope');
  const said = { type, at, channel: source.channel, user: user?.displayName, tags: user?.tags, text: payload.text };
  return { stream: created, seq: message.seq, id, ...said };
}

function handle(log: Log, created: string, message: JsMsg): void {
  if (!log.has(created, message.seq)) {
    let line: Line;
    try {
      line = lineOf(created, message);
    } catch {
      message.term(); // Somebody else's: not to be delivered again. Older servers do not understand a reason.
      return;
    }
    log.append(line);
  }
  message.ack(); // Only now. An ack that is lost costs a delivery more.
}

async function consume(connection: NatsConnection, log: Log): Promise<void> {
  const manager = await jetstreamManager(connection);
  const { created } = await manager.streams.info(stream);
  const consumers = jetstream(connection).consumers;
  const consumer = await consumers.get(stream, durable).catch(async () => {
    await manager.consumers.add(stream, {
      durable_name: durable,
      filter_subject: subject,
      deliver_policy: DeliverPolicy.All,
      ack_policy: AckPolicy.Explicit,
      ack_wait: nanos(ACK_WAIT_MS),
      max_ack_pending: 1,
    });
    return consumers.get(stream, durable);
  });
  // Ends where the stream was made again: its durable consumer is gone, and the next round makes another.
  const messages = await consumer.consume({ expires: 5_000, abort_on_missing_resource: true });
  for await (const message of messages) handle(log, created, message);
}

const connection = await connect({ servers, maxReconnectAttempts: -1, waitOnFirstConnect: true, reconnectTimeWait: 500 });
const log = Log.open(path);
console.error(`following ${stream} into ${path}, behind position ${log.last?.seq ?? 0}`);
for (;;) {
  try {
    await consume(connection, log);
  } catch (error) {
    console.error(`interrupted (${String(error)}); trying again`);
  }
  await sleep(1_000);
}
