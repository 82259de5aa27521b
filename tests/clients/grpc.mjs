// gRPC through Serin with grpc-js: each case is tried directly and through Serin, without TLS and with it, and what
// client and service saw must be the same.
//
//   node grpc.mjs SERIN [PATTERN]      PATTERN: only cases whose name contains it

import { createHash } from 'node:crypto';
import http2 from 'node:http2';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';

import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

import { binary, inTurn, Report, selfSigned, sleep, startSerin, until, within } from './serin.mjs';

const PROTO = fileURLToPath(new URL('probe.proto', import.meta.url));
const { Probe } = grpc.loadPackageDefinition(loadSync(PROTO, { defaults: true })).serin.clients;
const MB = 1 << 20;

// Where Serin is meant to differ, or is known to, and why. A difference that is not here is a failure.
const KNOWN = [
  [/underscore/, 'Serin removes names with an underscore, which some servers take for other names'],
  [/40 KB, by default/, 'a head is limited to 32 KiB unless the configuration says more'],
  [/^service is cut off/, 'grpc-js says CANCELLED where its connection breaks, and Serin UNAVAILABLE'],
  [
    /^connections of the service age/,
    'a call that the service refused by GOAWAY is made anew by grpc-js, not by Serin',
  ],
];

// What a gateway adds to a request; everything else must come as it was sent.
const OF_GATEWAY = new Set(['via', 'x-forwarded-for', 'x-forwarded-host', 'x-forwarded-proto']);

const SERIN = binary();
const PATTERN = process.argv[3] ?? '';
const certificate = selfSigned();

// ---------------------------------------------------------------------------------------------------- what is compared

/// Metadata as a plain object; of the date only that there is one.
function plain(metadata) {
  const fields = Object.entries(metadata.toJSON()).filter(([name]) => !OF_GATEWAY.has(name));
  const shown = (name, value) => (name === 'date' ? '(a date)' : short(value));
  return Object.fromEntries(fields.sort().map(([name, values]) => [name, values.map((value) => shown(name, value))]));
}

/// A message as a plain object.
const note = ({ text, payload, number }) => ({ text, number, payload: short(payload) });

/// Text or bytes as text; of much only the digest.
function short(value) {
  const digest = () => createHash('sha256').update(value).digest('hex').slice(0, 16);
  if (value.length > 200) return `${value.length} bytes, ${digest()}`;
  return Buffer.isBuffer(value) ? value.toString('hex') : value;
}

/// How a call ended. That a deadline has passed, client and proxy notice at about the same time, and each has words of
/// its own for it.
function ending({ code, details, metadata }) {
  const late = code === grpc.status.DEADLINE_EXCEEDED && /^Deadline exceeded after|in time$|than it may$/.test(details);
  const said = late ? { details: '(too late)', trailers: {} } : { details, trailers: plain(metadata) };
  return { code: grpc.status[code], ...said };
}

/// Makes a call and gathers all that the client sees of it. `start` is given a callback for methods with one answer.
function observe(start) {
  return new Promise((resolve) => {
    const seen = { head: null, messages: [], status: null };
    let open = 1;
    const close = () => --open || resolve(seen);
    const call = start((_, message) => message && seen.messages.push(note(message)));
    call.on('metadata', (metadata) => (seen.head = plain(metadata)));
    call.on('status', (status) => close((seen.status = ending(status))));
    if (call.readable !== undefined) {
      open += 1;
      call
        .on('data', (message) => seen.messages.push(note(message)))
        .on('error', () => {})
        .on('end', close);
    }
  });
}

/// What a service sees of a call, gathered in the object that is returned.
function witness(call) {
  const seen = { metadata: plain(call.metadata), messages: [], cancelled: false };
  call.on('cancelled', () => (seen.cancelled = true));
  if (call.request) seen.messages.push(note(call.request));
  return seen;
}

function metadata(fields) {
  const metadata = new grpc.Metadata();
  for (const [name, values] of Object.entries(fields)) [values].flat().forEach((value) => metadata.add(name, value));
  return metadata;
}

/// A payload that no compression makes small.
function noise(length, seed = 1) {
  const bytes = Buffer.alloc(length);
  for (let i = 0, state = seed; i < length; i++) bytes[i] = (state = (state * 1103515245 + 12345) & 0x7fffffff) >> 16;
  return bytes;
}

const failure = (code, details, fields = {}) => ({ code, details, metadata: metadata(fields) });

// ------------------------------------------------------------------------------------------------------------ the ways

/// A service and the way to it: directly, or through a Serin of its own. TLS is what the client meets, so behind Serin
/// the service goes without.
async function open({ tls, through }, listen, { listener, backend: settings } = {}) {
  const backend = await listen(tls && !through);
  let serin;
  if (through) {
    const { certificateFile, keyFile } = certificate;
    serin = await startSerin(SERIN, {
      listeners: [{ name: 'grpc', ...(tls && { tls: { certificates: [{ certificateFile, keyFile }] } }), ...listener }],
      backends: [{ name: 'service', endpoints: [backend.address], protocol: 'h2c', ...settings }],
      routes: [{ name: 'all', backendRefs: [{ name: 'service' }] }],
    });
  }
  const address = serin ? serin.addresses.grpc : backend.address;
  const credentials = tls ? grpc.credentials.createSsl(certificate.cert) : grpc.credentials.createInsecure();
  const clients = [];
  return {
    backend,
    serin,
    client(options = {}) {
      // Each client gets a connection of its own, and waits little for a lost one.
      const own = {
        'grpc.use_local_subchannel_pool': 1,
        'grpc.initial_reconnect_backoff_ms': 100,
        ...(tls && { 'grpc.ssl_target_name_override': 'localhost' }), // A name, since an address is none for SNI.
      };
      clients.push(new Probe(address, credentials, { ...own, ...options }));
      return clients.at(-1);
    },
    async close() {
      clients.forEach((client) => client.close());
      await serin?.stop();
      await backend.stop();
    },
  };
}

/// A grpc-js server. `handlers` may be changed at any time.
function grpcServer(handlers, options = {}) {
  return async (tls) => {
    const server = new grpc.Server(options);
    const method = (name) => (call, answer) => handlers[name](call, answer);
    const kinds = ['unary', 'clientStream', 'serverStream', 'bidi'];
    server.addService(Probe.service, Object.fromEntries(kinds.map((name) => [name, method(name)])));
    const { key: private_key, cert: cert_chain } = certificate;
    const credentials = tls
      ? grpc.ServerCredentials.createSsl(null, [{ private_key, cert_chain }])
      : grpc.ServerCredentials.createInsecure();
    const port = await new Promise((resolve, reject) => {
      server.bindAsync('127.0.0.1:0', credentials, (error, port) => (error ? reject(error) : resolve(port)));
    });
    return { address: `127.0.0.1:${port}`, server, stop: () => server.forceShutdown() };
  };
}

/// A server that speaks HTTP/2 and answers as it likes, as a broken service or another gateway does.
function http2Server(answer) {
  return async (tls) => {
    const server = tls ? http2.createSecureServer(certificate) : http2.createServer();
    const sessions = new Set();
    server.on('session', (session) => sessions.add(session.on('error', () => {})));
    server.on('stream', (stream) => answer(stream.on('error', () => {})));
    await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
    const stop = () => {
      sessions.forEach((session) => session.destroy());
      server.close();
    };
    return { address: `127.0.0.1:${server.address().port}`, stop };
  };
}

// What such a server answers with: a note with the number 1.
const NOTE = Buffer.from([0x18, 1]);

/// A message as it is sent, behind its length.
function framed(message, { compressed = false } = {}) {
  const head = Buffer.alloc(5);
  head.writeUInt8(Number(compressed), 0);
  head.writeUInt32BE(message.length, 1);
  return Buffer.concat([head, message]);
}

// ----------------------------------------------------------------------------------------------------------- the cases

// Each is given a `stage`: `client(options)`, `serve(handlers)` for what the service does, and `open(listen)` for a
// service of its own. It returns what is to be compared.
const cases = {};

const echo = (call, answer) => answer(null, call.request);

cases['unary'] = async ({ client, serve }) => {
  let service;
  serve({
    unary(call, answer) {
      service = witness(call);
      answer(null, { text: `hello ${call.request.text}` });
    },
  });
  const seen = await observe((answer) => client().unary({ text: 'ü' }, answer));
  return { seen, service };
};

cases['unary, empty message'] = async ({ client, serve }) => {
  serve({ unary: echo });
  return observe((answer) => client().unary({}, answer));
};

cases['client streaming'] = async ({ client, serve }) => {
  let service;
  serve({
    clientStream(call, answer) {
      service = witness(call);
      call.on('data', (message) => service.messages.push(note(message)));
      call.on('end', () => answer(null, { number: service.messages.length }));
    },
  });
  const seen = await observe((answer) => {
    const call = client().clientStream(answer);
    for (let number = 0; number < 100; number++) call.write({ number });
    call.end();
    return call;
  });
  return { seen, service };
};

cases['client streaming, answered before the end'] = async ({ client, serve }) => {
  serve({ clientStream: (call, answer) => call.once('data', () => answer(null, { text: 'enough' })) });
  return observe((answer) => {
    const call = client().clientStream(answer);
    call.write({ number: 1 });
    return call;
  });
};

cases['client streaming, no message'] = async ({ client, serve }) => {
  serve({ clientStream: (call, answer) => call.on('data', () => {}).on('end', () => answer(null, { text: 'none' })) });
  return observe((answer) => {
    const call = client().clientStream(answer);
    call.end();
    return call;
  });
};

cases['server streaming'] = async ({ client, serve }) => {
  serve({
    serverStream(call) {
      for (let number = 0; number < 1000; number++) call.write({ number });
      call.end();
    },
  });
  return observe(() => client().serverStream({}));
};

cases['server streaming, no message'] = async ({ client, serve }) => {
  serve({ serverStream: (call) => call.end() });
  return observe(() => client().serverStream({}));
};

cases['server streaming, head alone comes at once'] = async ({ client, serve }) => {
  let end;
  serve({
    serverStream(call) {
      call.sendMetadata(metadata({ 'x-early': 'yes' }));
      end = () => call.end(metadata({ 'x-late': 'yes' }));
    },
  });
  // The service ends only after the client has the head: were it held back, this would hang.
  return observe(() =>
    client()
      .serverStream({})
      .on('metadata', () => end()),
  );
};

cases['bidi streaming, message by message'] = async ({ client, serve }) => {
  serve({
    bidi(call) {
      call.on('data', (message) => call.write({ number: message.number + 1 }));
      call.on('end', () => call.end());
    },
  });
  return observe(() => {
    const call = client().bidi();
    // Each side goes on only after the other has: nothing may be held back.
    call.on('data', ({ number }) => (number < 200 ? call.write({ number }) : call.end()));
    call.write({ number: 0 });
    return call;
  });
};

cases['bidi streaming, service goes on after half-close'] = async ({ client, serve }) => {
  serve({
    bidi(call) {
      call.on('data', () => {});
      call.on('end', async () => {
        for (let number = 0; number < 3; number++) {
          call.write({ number });
          await sleep(50);
        }
        call.end();
      });
    },
  });
  return observe(() => {
    const call = client().bidi();
    call.end();
    return call;
  });
};

cases['bidi streaming, service ends first'] = async ({ client, serve }) => {
  serve({ bidi: (call) => call.once('data', () => call.emit('error', failure(9, 'no more of this'))) });
  return observe(() => {
    const call = client().bidi();
    call.write({ number: 1 });
    return call;
  });
};

cases['large messages, unary'] = async ({ client, serve }) => {
  let service;
  serve({
    unary(call, answer) {
      service = witness(call);
      echo(call, answer);
    },
  });
  const seen = await observe((answer) => client().unary({ payload: noise(3 * MB) }, answer));
  return { seen, service };
};

cases['large messages, streams both ways'] = async ({ client, serve }) => {
  serve({
    bidi(call) {
      call.on('data', (message) => call.write(message));
      call.on('end', () => call.end());
    },
  });
  return observe(() => {
    const call = client().bidi();
    for (const seed of [1, 2, 3, 4]) call.write({ payload: noise(3 * MB, seed) });
    call.end();
    return call;
  });
};

cases['large messages, to a client that reads late'] = async ({ client, serve }) => {
  serve({
    serverStream(call) {
      for (const seed of [1, 2, 3, 4]) call.write({ payload: noise(3 * MB, seed) });
      call.end();
    },
  });
  return observe(() => {
    const call = client().serverStream({});
    call.once('data', () => {
      call.pause();
      setTimeout(() => call.resume(), 1500);
    });
    return call;
  });
};

cases['message larger than the client takes'] = async ({ client, serve }) => {
  serve({ unary: (call, answer) => answer(null, { payload: Buffer.alloc(5 * MB) }) });
  return observe((answer) => client().unary({}, answer));
};

cases['message larger than the service takes'] = async ({ client, serve }) => {
  serve({ unary: echo });
  return observe((answer) => client().unary({ payload: Buffer.alloc(5 * MB) }, answer));
};

cases['metadata both ways'] = async ({ client, serve }) => {
  let service;
  serve({
    unary(call, answer) {
      service = witness(call);
      call.sendMetadata(metadata({ 'x-head': ['a', 'b'], 'x-head-bin': [Buffer.from([0, 255]), Buffer.from([1])] }));
      answer(null, {}, metadata({ 'x-trailer': 'c, d', 'x-trailer-bin': Buffer.from('ü') }));
    },
  });
  const asked = {
    'x-text': ['one', 'two'],
    'x-signs': '!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~',
    'x-empty': '',
    'x-blob-bin': [Buffer.from([0, 1, 2, 253, 254, 255]), Buffer.alloc(0), Buffer.from('plain')],
    'x-underscore-free': 'yes',
    authorization: 'Bearer token',
    'x-large-bin': noise(300),
  };
  const seen = await observe((answer) => client().unary({}, metadata(asked), answer));
  return { seen, service };
};

cases['metadata with an underscore in its name'] = async ({ client, serve }) => {
  let service;
  serve({
    unary(call, answer) {
      service = witness(call);
      answer(null, {}, metadata({ x_answer: 'b' }));
    },
  });
  const seen = await observe((answer) => client().unary({}, metadata({ x_asked: 'a' }), answer));
  return { seen, service };
};

for (const bytes of [1, 8, 16, 28]) {
  cases[`metadata of ${bytes} KB in one field, both ways`] = async ({ client, serve }) => {
    let service;
    const value = 'x'.repeat(bytes * 1000);
    serve({
      unary(call, answer) {
        service = witness(call);
        call.sendMetadata(metadata({ 'x-head': value }));
        answer(null, {}, metadata({ 'x-trailer': value }));
      },
    });
    const seen = await observe((answer) => client().unary({}, metadata({ 'x-asked': value }), answer));
    return { seen, service };
  };
}

const MORE = { listener: { limits: { requestHead: '64Ki' } }, backend: { http2: { headerList: '64Ki' } } };
for (const [limits, settings] of [
  ['by default', {}],
  ['with limits raised', MORE],
]) {
  const value = 'x'.repeat(40_000);
  cases[`metadata of 40 KB, ${limits}, to the service`] = async ({ open }) => {
    const own = await open(grpcServer({ unary: echo }), settings);
    return observe((answer) => own.client().unary({}, metadata({ 'x-asked': value }), answer));
  };
  cases[`metadata of 40 KB, ${limits}, to the client`] = async ({ open }) => {
    const unary = (call, answer) => {
      call.sendMetadata(metadata({ 'x-head': value }));
      answer(null, {});
    };
    const own = await open(grpcServer({ unary }), settings);
    return observe((answer) => own.client().unary({}, answer));
  };
  cases[`metadata of 40 KB, ${limits}, to the client in trailers`] = async ({ open }) => {
    const unary = (_, answer) => answer(null, {}, metadata({ 'x-trailer': value }));
    const own = await open(grpcServer({ unary }), settings);
    return observe((answer) => own.client().unary({}, answer));
  };
}

cases['metadata of 60 fields, both ways'] = async ({ client, serve }) => {
  let service;
  const fields = Object.fromEntries(Array.from({ length: 60 }, (_, i) => [`x-field-${i}`, `value ${i}`]));
  serve({
    unary(call, answer) {
      service = witness(call);
      call.sendMetadata(metadata(fields));
      answer(null, {}, metadata(fields));
    },
  });
  const seen = await observe((answer) => client().unary({}, metadata(fields), answer));
  return { seen, service };
};

cases["authority of the client's choice"] = async ({ client, serve }) => {
  let host;
  serve({
    unary(call, answer) {
      host = call.getHost();
      answer(null, {});
    },
  });
  const named = client({ 'grpc.default_authority': 'service.example:443' });
  const seen = await observe((answer) => named.unary({}, answer));
  return { seen, host };
};

// The message of gRPC's own interoperability tests, which has everything that must be encoded.
const SPECIAL = '\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈 100 %\t\n';

for (let code = 1; code <= 16; code++) {
  const details = Buffer.from([8, code]); // google.rpc.Status, with its code alone.
  const failing = failure(code, `${grpc.status[code]}: ${SPECIAL}`, {
    'grpc-status-details-bin': details,
    'x-why': 'why',
  });
  cases[`status ${code}, in trailers alone`] = async ({ client, serve }) => {
    serve({ unary: (_, answer) => answer(failing) });
    return observe((answer) => client().unary({}, answer));
  };
  cases[`status ${code}, behind messages`] = async ({ client, serve }) => {
    serve({
      serverStream(call) {
        call.sendMetadata(metadata({ 'x-head': 'yes' }));
        call.write({ number: 1 });
        call.write({ number: 2 });
        call.emit('error', failing);
      },
    });
    return observe(() => client().serverStream({}));
  };
}

cases['status without a message'] = async ({ client, serve }) => {
  serve({ unary: (_, answer) => answer({ code: 5, details: '' }) });
  return observe((answer) => client().unary({}, answer));
};

cases['unknown method'] = async ({ client }) => {
  const identity = (value) => value;
  const unknown = (answer) =>
    client().makeUnaryRequest('/serin.clients.Probe/None', identity, identity, Buffer.alloc(0), answer);
  return observe(unknown);
};

cases['service throws'] = async ({ client, serve }) => {
  serve({
    unary() {
      throw new Error('a mistake');
    },
  });
  return observe((answer) => client().unary({}, answer));
};

cases['client cancels unary'] = async ({ client, serve }) => {
  let service;
  serve({ unary: (call) => (service = witness(call)) });
  let call;
  const seen = observe((answer) => (call = client().unary({}, answer)));
  await until(() => service);
  call.cancel();
  await until(() => service.cancelled);
  return { seen: await seen, service };
};

cases['client cancels client streaming'] = async ({ client, serve }) => {
  let service;
  serve({
    clientStream(call) {
      service = witness(call);
      call.on('data', (message) => service.messages.push(note(message)));
    },
  });
  let call;
  const seen = observe((answer) => (call = client().clientStream(answer)));
  call.write({ number: 1 });
  await until(() => service?.messages.length === 1);
  call.cancel();
  await until(() => service.cancelled);
  return { seen: await seen, service };
};

cases['client cancels server streaming'] = async ({ client, serve }) => {
  let service;
  serve({
    serverStream(call) {
      service = witness(call);
      call.write({ number: 1 });
      call.write({ number: 2 });
    },
  });
  const seen = await observe(() => {
    const call = client().serverStream({});
    return call.on('data', ({ number }) => number === 2 && call.cancel());
  });
  await until(() => service.cancelled);
  return { seen, service };
};

cases['client cancels bidi streaming'] = async ({ client, serve }) => {
  let service;
  serve({
    bidi(call) {
      service = witness(call);
      call.on('data', (message) => {
        service.messages.push(note(message));
        call.write(message);
      });
    },
  });
  const seen = await observe(() => {
    const call = client().bidi();
    call.write({ number: 1 });
    return call.on('data', () => call.cancel());
  });
  await until(() => service.cancelled);
  return { seen, service };
};

cases['client goes away in mid-stream'] = async ({ client, serve }) => {
  let service;
  serve({
    serverStream(call) {
      service = witness(call);
      call.write({ number: 1 });
    },
  });
  const gone = client({});
  const call = gone.serverStream({}).on('error', () => {});
  await new Promise((resolve) => call.once('data', resolve));
  gone.close(); // Lets calls finish ...
  call.cancel(); // ... but there are none left.
  await until(() => service.cancelled);
  return { service };
};

cases['deadline exceeded, unary'] = async ({ client, serve }) => {
  let service;
  serve({ unary: (call) => (service = witness(call)) });
  const seen = await observe((answer) => client().unary({}, { deadline: Date.now() + 300 }, answer));
  await until(() => service.cancelled);
  delete service.metadata['grpc-timeout'];
  return { seen, service };
};

cases['deadline exceeded, behind messages'] = async ({ client, serve }) => {
  let service;
  serve({
    serverStream(call) {
      service = witness(call);
      call.write({ number: 1 });
    },
  });
  const seen = await observe(() => client().serverStream({}, { deadline: Date.now() + 300 }));
  await until(() => service.cancelled);
  return { seen, service };
};

cases['deadline exceeded, client streaming'] = async ({ client, serve }) => {
  let service;
  serve({
    clientStream(call) {
      service = witness(call);
      call.on('data', () => {});
    },
  });
  const seen = await observe((answer) => {
    const call = client().clientStream({ deadline: Date.now() + 300 }, answer);
    call.write({});
    return call;
  });
  await until(() => service.cancelled);
  return { seen, service };
};

cases['deadline passed before the call'] = async ({ client, serve }) => {
  serve({ unary: echo });
  return observe((answer) => client().unary({}, { deadline: Date.now() - 1 }, answer));
};

cases['deadline reaches the service'] = async ({ client, serve }) => {
  let left;
  serve({
    unary(call, answer) {
      left = call.getDeadline() - Date.now();
      answer(null, {});
    },
  });
  const seen = await observe((answer) => client().unary({}, { deadline: Date.now() + 20_000 }, answer));
  return { seen, left: left > 19_000 && left <= 20_050 };
};

cases['gzip from the client'] = async ({ client, serve }) => {
  const gzip = { 'grpc.default_compression_algorithm': grpc.compressionAlgorithms.gzip };
  let service;
  serve({
    unary(call, answer) {
      service = witness(call);
      echo(call, answer);
    },
  });
  const zipping = client(gzip);
  const seen = await observe((answer) => zipping.unary({ text: 'a', payload: Buffer.alloc(MB) }, answer));
  return { seen, service };
};

// grpc-js services do not compress.
cases['gzip from the service'] = async ({ open }) => {
  const own = await open(
    http2Server((stream) => {
      const encoded = { 'content-type': 'application/grpc', 'grpc-encoding': 'gzip' };
      stream.respond({ ':status': 200, ...encoded }, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
      stream.end(framed(gzipSync(NOTE), { compressed: true }));
    }),
  );
  return observe((answer) => own.client().unary({}, answer));
};

cases['200 calls at once on one channel'] = async ({ client, serve }) => {
  let [most, now] = [0, 0];
  serve({
    async unary(call, answer) {
      most = Math.max(most, ++now);
      await sleep(50);
      now -= 1;
      answer(null, { number: call.request.number * 2 });
    },
  });
  const one = client();
  const calls = Array.from({ length: 200 }, (_, number) => observe((answer) => one.unary({ number }, answer)));
  return { seen: await Promise.all(calls), atOnce: most > 50 };
};

cases['200 streams at once on one channel'] = async ({ client, serve }) => {
  serve({
    async bidi(call) {
      call.on('data', (message) => call.write(message));
      call.on('end', () => call.end());
    },
  });
  const one = client();
  const stream = (number) => {
    const call = one.bidi();
    call.write({ number });
    return call.on('data', () => call.end());
  };
  return Promise.all(Array.from({ length: 200 }, (_, number) => observe(() => stream(number))));
};

cases['2,000 calls one after another'] = async ({ client, serve }) => {
  serve({ unary: echo });
  const one = client();
  const statuses = {};
  for (let number = 0; number < 2000; number++) {
    const { status } = await observe((answer) => one.unary({ number }, answer));
    statuses[status.code] = (statuses[status.code] ?? 0) + 1;
  }
  return statuses;
};

const PINGS = {
  'grpc.keepalive_time_ms': 50,
  'grpc.keepalive_timeout_ms': 500,
  'grpc.keepalive_permit_without_calls': 1,
};

cases['keepalive pings from both sides of a stream that rests'] = async ({ open }) => {
  const handlers = {
    async serverStream(call) {
      call.write({ number: 1 });
      await sleep(2000);
      call.write({ number: 2 });
      call.end();
    },
  };
  const own = await open(grpcServer(handlers, PINGS));
  return observe(() => own.client(PINGS).serverStream({}));
};

cases['keepalive pings without calls'] = async ({ client, serve }) => {
  serve({ unary: echo });
  const pinging = client(PINGS);
  const before = await observe((answer) => pinging.unary({ number: 1 }, answer));
  const states = new Set();
  for (let i = 0; i < 100; i++, await sleep(10)) {
    states.add(grpc.connectivityState[pinging.getChannel().getConnectivityState(false)]);
  }
  const after = await observe((answer) => pinging.unary({ number: 2 }, answer));
  return { before, after, states: [...states] };
};

cases["retries as the client's service config has them"] = async ({ client, serve }) => {
  const attempts = [];
  serve({
    unary(call, answer) {
      attempts.push(call.metadata.get('grpc-previous-rpc-attempts'));
      if (attempts.length < 3) answer(failure(14, 'not yet'));
      else answer(null, { text: 'at last' });
    },
  });
  const retryPolicy = {
    maxAttempts: 4,
    initialBackoff: '0.01s',
    maxBackoff: '0.1s',
    backoffMultiplier: 2,
    retryableStatusCodes: ['UNAVAILABLE'],
  };
  const config = { methodConfig: [{ name: [{ service: 'serin.clients.Probe' }], retryPolicy }] };
  const retrying = client({ 'grpc.service_config': JSON.stringify(config) });
  return { seen: await observe((answer) => retrying.unary({}, answer)), attempts };
};

cases['service shuts down gracefully in mid-stream'] = async ({ open }) => {
  let stream;
  const own = await open(
    grpcServer({
      unary: echo,
      serverStream(call) {
        stream = call;
        call.write({ number: 1 });
      },
    }),
  );
  const client = own.client();
  const seen = observe(() => client.serverStream({}));
  await until(() => stream);
  const down = new Promise((resolve) => own.backend.server.tryShutdown(resolve));
  await sleep(200);
  stream.write({ number: 2 });
  stream.end();
  const error = await down;
  const later = await observe((answer) => client.unary({}, answer));
  return { seen: await seen, down: error ?? 'in peace', later: later.status.code };
};

cases['the next hop shuts down gracefully in mid-stream'] = async ({ open }) => {
  let stream;
  const own = await open(
    grpcServer({
      serverStream(call) {
        stream = call;
        call.write({ number: 1 });
      },
    }),
  );
  const seen = observe(() => own.client().serverStream({}));
  await until(() => stream);
  const down = own.serin ? own.serin.stop() : new Promise((resolve) => own.backend.server.tryShutdown(resolve));
  await sleep(1500); // Serin waits for a second before it says that it goes.
  stream.write({ number: 2 });
  stream.end();
  return { seen: await seen, down: !(await down) };
};

cases['service is cut off in mid-stream'] = async ({ open }) => {
  let stream;
  const own = await open(
    grpcServer({
      serverStream(call) {
        stream = call;
        call.on('error', () => {}).write({ number: 1 });
      },
    }),
  );
  const seen = observe(() => own.client().serverStream({}));
  await until(() => stream);
  await sleep(100); // The message is to be on its way.
  own.backend.server.forceShutdown();
  const { messages, status } = await seen;
  return { messages, code: status.code };
};

cases['service is not there'] = async ({ open }) => {
  const own = await open(grpcServer({}));
  own.backend.stop();
  await sleep(50);
  const { status } = await observe((answer) => own.client().unary({}, answer));
  return { code: status.code };
};

const AGEING = { 'grpc.max_connection_age_ms': 100, 'grpc.max_connection_age_grace_ms': 5000 };

cases['connections of the service age while calls go on'] = async ({ open }) => {
  const own = await open(grpcServer({ unary: echo }, AGEING));
  return hammer(own.client());
};

cases['connections of the service age while streams hold them'] = async ({ open }) => {
  const handlers = {
    unary: echo,
    async serverStream(call) {
      call.write({ number: 1 });
      await sleep(300);
      call.end();
    },
  };
  const own = await open(grpcServer(handlers, AGEING));
  const client = own.client();
  const streams = [];
  const timer = setInterval(() => streams.push(observe(() => client.serverStream({}))), 40);
  const statuses = await hammer(client);
  clearInterval(timer);
  const ends = (await Promise.all(streams)).map(
    ({ messages, status }) => `${status.code} ${status.details}, ${messages.length}`,
  );
  return { statuses, streams: [...new Set(ends)] };
};

cases['connections of the service end when idle'] = async ({ open }) => {
  const own = await open(grpcServer({ unary: echo }, { 'grpc.max_connection_idle_ms': 20 }));
  return hammer(own.client(), 20);
};

/// Calls for two seconds, and says which statuses there were.
async function hammer(client, pause = 0) {
  const statuses = new Set();
  for (const end = Date.now() + 2000; Date.now() < end; await sleep(pause)) {
    const { status } = await observe((answer) => client.unary({}, answer));
    statuses.add(`${status.code} ${status.details}`);
  }
  return [...statuses].sort();
}

// What servers that are no gRPC services answer; the client makes a status of it, and must be able to behind a proxy.
for (const status of [200, 400, 401, 403, 404, 429, 500, 502, 503, 504]) {
  cases[`no gRPC: HTTP ${status}`] = async ({ open }) => {
    const own = await open(
      http2Server((stream) => {
        stream.respond({ ':status': status, 'content-type': 'text/html' });
        stream.end('<p>no gRPC');
      }),
    );
    const { messages, status: seen } = await observe((answer) => own.client().unary({}, answer));
    return { messages, seen };
  };
}

const RESETS = {
  NO_ERROR: 0,
  PROTOCOL_ERROR: 1,
  INTERNAL_ERROR: 2,
  FLOW_CONTROL_ERROR: 3,
  REFUSED_STREAM: 7,
  CANCEL: 8,
  ENHANCE_YOUR_CALM: 11,
  INADEQUATE_SECURITY: 12,
};
// The words for it are each one's own.
for (const [name, code] of Object.entries(RESETS)) {
  cases[`service resets before the head: ${name}`] = async ({ open }) => {
    const own = await open(http2Server((stream) => stream.close(code)));
    const { messages, status } = await observe((answer) => own.client().unary({}, answer));
    return { messages, code: status.code };
  };
  cases[`service resets behind a message: ${name}`] = async ({ open }) => {
    const own = await open(
      http2Server(async (stream) => {
        // Node would end the body before it resets the stream, did it not wait for trailers.
        stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
        stream.write(framed(NOTE));
        await sleep(100);
        stream.close(code);
      }),
    );
    const { messages, status } = await observe(() => own.client().serverStream({}));
    return { messages, code: status.code };
  };
}

cases['service ends without a status'] = async ({ open }) => {
  const own = await open(
    http2Server((stream) => {
      stream.respond({ ':status': 200, 'content-type': 'application/grpc' });
      stream.end(framed(NOTE));
    }),
  );
  const { messages, status } = await observe(() => own.client().serverStream({}));
  return { messages, status };
};

// --------------------------------------------------------------------------------------------------------- the program

async function main() {
  const ways = [false, true].flatMap((tls) => [false, true].map((through) => ({ tls, through })));
  for (const way of ways) {
    way.handlers = {};
    way.main = await open(way, grpcServer(way.handlers));
    way.shared = way.main.client();
  }
  const report = new Report(KNOWN);
  for (const [name, run] of Object.entries(cases).filter(([name]) => name.includes(PATTERN))) {
    const [h2c, throughH2c, tls, throughTls] = await inTurn(ways, (way) => attempt(way, run));
    report.compare(
      name,
      [
        ['h2c', throughH2c, h2c],
        ['TLS', throughTls, tls],
      ],
      summary(h2c),
    );
  }
  for (const way of ways) await way.main.close();
  process.exit(report.print(['case', 'h2c', 'TLS', 'outcome, directly']));
}

/// What comes of a case on one of the ways. Whatever it opened is closed again.
async function attempt(way, run) {
  const opened = [];
  const clients = [];
  const stage = {
    client(options) {
      if (!options) return way.shared;
      clients.push(way.main.client(options));
      return clients.at(-1);
    },
    serve: (handlers) => Object.assign(way.handlers, handlers),
    async open(listen, settings) {
      opened.push(await open(way, listen, settings));
      return opened.at(-1);
    },
  };
  try {
    return await within(20_000, run(stage));
  } catch (error) {
    return error;
  } finally {
    clients.forEach((client) => client.close());
    for (const own of opened) await own.close();
  }
}

/// The statuses and the number of messages in an outcome, wherever they stand.
function summary(outcome) {
  const statuses = {};
  let messages = 0;
  const look = (value) => {
    if (value === null || typeof value !== 'object') return;
    if (typeof value.code === 'string') statuses[value.code] = (statuses[value.code] ?? 0) + 1;
    if (value.status && Array.isArray(value.messages)) messages += value.messages.length;
    Object.values(value).forEach(look);
  };
  look(outcome);
  const counted = Object.entries(statuses).map(([code, count]) => (count > 1 ? `${count} × ${code}` : code));
  if (!counted.length) return JSON.stringify(outcome).slice(0, 80);
  return [...counted, ...(messages ? [`${messages} message${messages > 1 ? 's' : ''}`] : [])].join(', ');
}

await main();
