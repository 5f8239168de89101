// Node's ws, as its documentation has it.
"use strict";
const { WebSocketServer } = require("ws");

const [host, mode] = process.argv.slice(2);
const server = new WebSocketServer({ host, port: 0, perMessageDeflate: mode === "deflate" }, () =>
  console.log(`listening on http://${host}:${server.address().port}`),
);

server.on("connection", (ws, request) => {
  ws.on("error", () => {});
  ws.on("message", (data, isBinary) => {
    if (request.url === "/crash") throw new Error("as it was asked to");
    ws.send(data, { binary: isBinary });
  });
});

process.once("SIGTERM", () => {
  server.close();
  for (const ws of server.clients) ws.close(1001);
});
