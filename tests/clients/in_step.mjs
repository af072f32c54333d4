// Sends requests one after the other over a UNIX socket, with bodies of unknown length (which node sends in chunks),
// and checks that each response is the one to its request.
//
//   node in_step.mjs SOCKET COUNT http|fetch
//
// Prints the number of connections that it took. Fails at the first response that belongs to another request.

import http from "node:http";
import net from "node:net";

const [socketPath, count, kind] = process.argv.slice(2);

let connections = 0;
const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...rest) {
  connections += 1;
  return connect.apply(this, rest);
};

// The request with this number, and what its response, and no other, has.
function wanted(number) {
  const field = `field_${number}`;
  switch (number % 5) {
    case 0:
      return ["PATCH", "/machine-config", `{"mem_size_mib": ${64 + number}}`, 204, ""];
    case 1:
      return ["GET", "/machine-config", "", 200, `"mem_size_mib":${64 + number - 1},`];
    case 2:
      return ["PUT", "/actions", `{"${field}": 1}`, 400, `unknown field \`${field}\``];
    case 3:
      return ["GET", `/${field}`, "", 400, field];
    default:
      return ["PUT", "/logger", `{"${field}": "${"x".repeat(40000)}"}`, 400, `unknown field \`${field}\``];
  }
}

function pieces(text) {
  const middle = text.length >> 1;
  return [text.slice(0, middle), text.slice(middle)].filter((piece) => piece !== "");
}

// fetch takes the socket's path from a dispatcher only, and node has the class of its own one nowhere else.
let dispatcher;
async function sendByFetch(method, path, body) {
  if (dispatcher === undefined) {
    await fetch("data:,"); // loads it
    const Agent = globalThis[Symbol.for("undici.globalDispatcher.1")].constructor;
    dispatcher = new Agent({ connect: { socketPath }, connections: 1, pipelining: 1 });
  }
  const options = { method, dispatcher };
  if (body !== "") {
    const encoder = new TextEncoder();
    options.duplex = "half";
    options.body = new ReadableStream({
      async start(controller) {
        for (const piece of pieces(body)) controller.enqueue(encoder.encode(piece));
        controller.close();
      },
    });
  }
  const response = await fetch(`http://localhost${path}`, options);
  return [response.status, await response.text()];
}

const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
function sendByHttp(method, path, body) {
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath, method, path, agent }, (response) => {
      let text = "";
      response.setEncoding("utf8");
      response.on("data", (piece) => (text += piece));
      response.on("end", () => resolve([response.statusCode, text]));
    });
    request.on("error", reject);
    for (const piece of pieces(body)) request.write(piece);
    request.end();
  });
}

const send = kind === "fetch" ? sendByFetch : sendByHttp;
for (let number = 0; number < Number(count); number += 1) {
  const [method, path, body, status, contains] = wanted(number);
  const [gotStatus, text] = await send(method, path, body);
  if (gotStatus !== status || !text.includes(contains)) {
    console.error(`request ${number}: ${method} ${path} was answered ${gotStatus} ${text}`);
    process.exit(1);
  }
}
console.log(connections);
process.exit(0);
