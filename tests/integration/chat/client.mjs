// A chat client on Node's ws: talks, has a run cancelled, breaks off, comes back with its cursor, hears the rest.
// Prints the events it saw as one JSON array.

import { createRequire } from "node:module";

const WebSocket = createRequire(import.meta.url)("ws"); // NODE_PATH is for require only
const [address, subprotocol] = process.argv.slice(2);
const events = [];
let epoch;

function connect() {
  return new Promise((resolve, reject) => {
    const ws = new WebSocket(address, [subprotocol]);
    const objects = [];
    let wake = () => {};
    ws.on("error", reject);
    ws.on("message", (data, isBinary) => {
      if (isBinary) reject(new Error("a binary message"));
      for (const line of data.toString().split("\n")) objects.push(JSON.parse(line));
      wake();
    });
    ws.on("open", () => {
      if (ws.protocol !== subprotocol) reject(new Error(`subprotocol ${ws.protocol}`));
      resolve({
        ws,
        send: (object) => ws.send(JSON.stringify(object)),
        until: async (type) => {
          for (;;) {
            while (objects.length === 0) await new Promise((resolve) => (wake = resolve));
            const object = objects.shift();
            if ("seq" in object && "at" in object) events.push(object);
            if (object.type === type) return object;
          }
        },
        closed: new Promise((resolve) => ws.on("close", resolve)),
      });
    });
  });
}

const first = await connect();
first.send({ type: "open", conversation: "c" });
({ epoch } = await first.until("opened"));
first.send({ type: "post", id: "p1", conversation: "c", text: "hello" });
await first.until("agent_completed");
first.send({ type: "post", id: "p2", conversation: "c", text: "wait" });
const { run } = await first.until("tool_executing");
first.ws.terminate();
await first.closed;

const second = await connect();
second.send({ type: "open", conversation: "c", after: events.at(-1).seq, epoch });
second.send({ type: "cancel", conversation: "c", run });
await second.until("agent_completed");
second.send({ type: "post", id: "p3", conversation: "c", text: "hello again" });
await second.until("agent_completed");
second.ws.close(1000);
const code = await second.closed;
if (code !== 1000) throw new Error(`close code ${code}`);
console.log(JSON.stringify(events));
