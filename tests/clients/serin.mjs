// What both programs need: a Serin that runs, a certificate, waiting with an end, and a report.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

// All that was started and would outlive this program, so that an exception leaves nothing behind.
const atExit = new Set();
process.on('exit', () => atExit.forEach((end) => end()));
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1));

/// The binary that the command line names.
export function binary() {
  const [, program, path] = process.argv;
  if (path) return path;
  console.error(`usage: node ${program} SERIN`);
  process.exit(2);
}

/// Starts Serin with a configuration and waits until it listens. Ports are chosen by the kernel; which ones, the log
/// says. Warnings of the log are shown, and all of it when SERIN_LOG says how much to log.
export async function startSerin(path, config) {
  const directory = scratch();
  const file = join(directory, 'serin.yaml');
  const accessLog = join(directory, 'access.log');
  const listeners = config.listeners.map((listener) => ({ address: '127.0.0.1:0', ...listener }));
  const whole = { admin: { address: '127.0.0.1:0' }, accessLog: { output: accessLog }, ...config, listeners };
  writeFileSync(file, JSON.stringify(whole)); // JSON is YAML.
  const child = spawn(path, ['--log-format', 'json', 'run', '--config', file], {
    stdio: ['ignore', 'inherit', 'pipe'],
  });
  const kill = () => child.kill('SIGKILL');
  atExit.add(kill);
  const ended = new Promise((resolve) => child.on('close', resolve));
  ended.then(() => atExit.delete(kill));

  const addresses = {};
  let admin;
  const log = [];
  const upAndListening = new Promise((resolve, reject) => {
    createInterface({ input: child.stderr }).on('line', (line) => {
      log.push(line);
      if (!line.startsWith('{')) return;
      const { level, fields } = JSON.parse(line);
      if (level === 'WARN' || level === 'ERROR' || process.env.SERIN_LOG) console.error(`serin: ${line}`);
      if (fields.message === 'serin is up') admin = fields.admin;
      if (fields.message === 'listening') addresses[fields.listener] = fields.address;
      if (admin && Object.keys(addresses).length === listeners.length) resolve();
    });
    ended.then(() => reject(new Error(`Serin did not start:\n${log.join('\n')}`)));
  });
  await upAndListening;
  return {
    addresses,
    admin,
    /// The lines of the access log that satisfy `wanted`, once there are so many; they are written within a second.
    async logged(wanted, count = 1) {
      const lines = () =>
        readFileSync(accessLog, 'utf8')
          .split('\n')
          .slice(0, -1)
          .map((line) => JSON.parse(line))
          .filter(wanted);
      await until(() => lines().length >= count, 3000);
      return lines();
    },
    /// Asks it to end, as an orchestrator does, and says how it ended.
    async stop() {
      child.kill('SIGTERM');
      return await ended;
    },
  };
}

/// A directory that goes with this program.
export function scratch() {
  const directory = mkdtempSync(join(tmpdir(), 'serin-clients-'));
  atExit.add(() => rmSync(directory, { recursive: true, force: true }));
  return directory;
}

/// A certificate for this machine, signed by itself.
export function selfSigned() {
  const directory = scratch();
  const [certificateFile, keyFile] = [join(directory, 'tls.crt'), join(directory, 'tls.key')];
  const request = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  const names = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'];
  execFileSync('openssl', [...request, ...names, '-out', certificateFile, '-keyout', keyFile], { stdio: 'ignore' });
  return { certificateFile, keyFile, cert: readFileSync(certificateFile), key: readFileSync(keyFile) };
}

/// Waits until something holds, and says whether it ever did.
export async function until(holds, limit = 5000) {
  for (const end = Date.now() + limit; Date.now() < end; await sleep(10)) {
    if (await holds()) return true;
  }
  return false;
}

export const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));

/// Does something with each, one after another.
export async function inTurn(all, what) {
  const done = [];
  for (const one of all) done.push(await what(one));
  return done;
}

/// Gives up on something that hangs, so that one case does not hold up the others.
export async function within(limit, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`nothing within ${limit} ms`)), limit);
  });
  try {
    return await Promise.race([what, late]);
  } finally {
    clearTimeout(timer);
  }
}

/// What came of all cases.
export class Report {
  #rows = [];
  #differences = [];
  #known;

  /// `known` has patterns of names with the reason why such a case differs.
  constructor(known) {
    this.#known = known;
  }

  /// Takes note of what came of a case: for each way through Serin its name, the outcome, and the outcome without.
  compare(name, ways, summary) {
    const cells = ways.map(([way, actual, expected]) => {
      const how = difference(actual, expected);
      return how ? this.#differs(`${name}, ${way} (+ through Serin, - directly)`, name, how) : 'same';
    });
    this.#rows.push([name, ...cells, summary]);
  }

  /// Takes note of a case that was to come to its end.
  passed(name, outcome) {
    this.#rows.push([name, outcome instanceof Error ? this.#differs(name, name, outcome.stack) : 'passed', '', '']);
  }

  /// Prints everything; the exit code says whether there is a difference that is not known.
  print(head) {
    printTable(head, this.#rows);
    for (const { title, known, how } of this.#differences) {
      console.log(`\n${title}\n${known ? `known: ${known}\n` : ''}${how}`);
    }
    const unknown = this.#differences.filter(({ known }) => !known).length;
    console.log(`\n${this.#rows.length} cases, ${this.#differences.length} differences, ${unknown} of them not known`);
    return unknown ? 1 : 0;
  }

  #differs(title, name, how) {
    const known = this.#known.find(([pattern]) => pattern.test(name))?.[1];
    this.#differences.push({ title, known, how });
    return known ? 'differs' : 'DIFFERS';
  }
}

/// What differs between two outcomes, if anything does. No outcome is like an error, not even another one.
function difference(actual, expected) {
  const error = [expected, actual].find((outcome) => outcome instanceof Error);
  if (error) return error.stack;
  try {
    assert.deepStrictEqual(actual, expected);
  } catch ({ message }) {
    return message;
  }
}

/// Prints rows below a head, in columns.
function printTable(head, rows) {
  const all = [head, head.map((cell) => '-'.repeat(cell.length)), ...rows];
  const widths = head.map((_, column) => Math.max(...all.map((row) => row[column].length)));
  for (const row of all)
    console.log(
      row
        .map((cell, column) => cell.padEnd(widths[column]))
        .join('  ')
        .trimEnd(),
    );
}
