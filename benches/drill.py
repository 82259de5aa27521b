#!/usr/bin/env python3
"""Drills of a real Serin between real peers on this machine, too long for the test suite.

    cargo build --release
    benches/drill.py ramp     # nginx upstreams, wrk load, 100,000 users, weights 5 -> 20 -> 0 -> 100 under load
    benches/drill.py list     # one list of 10,000,000 ids: memory, load time, latency of traffic while it is reloaded

Both need nginx and wrk (Debian: nginx-light, wrk) and Python 3 alone. All traffic stays on 127.0.0.1. They print the
Markdown that stands in benches/RESULTS.md, and exit with 1 when a promise is broken.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(what, is_so):
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit(f"not within {PATIENCE} s: {what}")
        time.sleep(0.02)


class Stage:
    """Two nginx upstreams and a Serin in front of them, in a directory of their own."""

    def __init__(self, serin):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="serin-drill-"))
        self.stable, self.canary, self.web, self.admin = (free_port() for _ in range(4))
        self.serin = serin
        self.processes = []

    def start_upstreams(self):
        # Many requests per connection, or nginx closes it after 1000 and the drill measures nginx.
        servers = "\n".join(
            f"server {{ listen 127.0.0.1:{port}; location / {{ return 200 '{name}'; }} }}"
            for port, name in ((self.stable, "1.8.2"), (self.canary, "1.9.0"))
        )
        conf = self.directory / "nginx.conf"
        conf.write_text(
            f"daemon off; worker_processes 1; pid {self.directory}/nginx.pid; error_log stderr crit;\n"
            f"events {{ worker_connections 4096; }}\n"
            f"http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {self.directory}/body;\n"
            f"proxy_temp_path {self.directory}/proxy; fastcgi_temp_path {self.directory}/fastcgi;\n"
            f"uwsgi_temp_path {self.directory}/uwsgi; scgi_temp_path {self.directory}/scgi;\n{servers} }}\n"
        )
        self.spawn(["nginx", "-p", str(self.directory), "-c", str(conf)])
        for port in (self.stable, self.canary):
            eventually("nginx listens", lambda port=port: can_connect(port))

    def start_serin(self, config):
        self.write("serin.yaml", config)
        log = (self.directory / "serin.log").open("w")
        self.proxy = self.spawn([self.serin, "run", "--config", str(self.directory / "serin.yaml")], stderr=log)
        eventually("serin listens", lambda: can_connect(self.web) and can_connect(self.admin))

    def spawn(self, command, **options):
        process = subprocess.Popen(command, **options)
        self.processes.append(process)
        return process

    def write(self, name, content):
        """Writes a file as an editor does: a new one, renamed over the old."""
        path = self.directory / (name + ".new")
        path.write_text(content)
        path.rename(self.directory / name)

    def api(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=10) as reply:
            return reply.read().decode()

    def status(self):
        return json.loads(self.api("/api/v1/config/status"))

    def metric(self, name):
        lines = [line for line in self.api("/metrics").splitlines() if re.match(name + r"[{ ]", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def config(self, stable, canary, more=""):
        return (
            f"listeners: [ {{ name: web, address: '127.0.0.1:{self.web}' }} ]\n"
            f"admin: {{ address: '127.0.0.1:{self.admin}' }}\n"
            f"backends:\n"
            f"  - {{ name: shop-stable, version: '1.8.2', endpoints: ['127.0.0.1:{self.stable}'] }}\n"
            f"  - {{ name: shop-canary, version: '1.9.0', endpoints: ['127.0.0.1:{self.canary}'] }}\n"
            f"routes:\n  - name: shop\n    backendRefs:\n"
            f"      - {{ name: shop-stable, weight: {stable} }}\n"
            f"      - {{ name: shop-canary, weight: {canary} }}\n"
            f"    exposeVersion: true\n"
            f"    gray:\n      identity: [ {{ header: x-user-id }} ]\n{more}"
        )

    def close(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait()


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


def versions_of(port, users):
    """The version that each user gets, over one connection, many requests at a time."""
    versions = []
    with socket.create_connection(("127.0.0.1", port)) as stream:
        reader = stream.makefile("rb")
        for start in range(0, len(users), 100):
            batch = users[start : start + 100]
            requests = (f"GET / HTTP/1.1\r\nhost: shop\r\nx-user-id: {user}\r\n\r\n" for user in batch)
            stream.sendall("".join(requests).encode())
            for user in batch:
                status = reader.readline()
                assert status.startswith(b"HTTP/1.1 200"), (user, status)
                length = 0
                while (line := reader.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                versions.append(reader.read(length).decode())
    return versions


def wrk(port, seconds, connections, script=None):
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{port}/"]
    if script:
        command[1:1] = ["-s", str(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


USERS_SCRIPT = """
local user = 0
request = function()
  user = user + 7919
  return wrk.format("GET", "/", {["Host"] = "shop", ["x-user-id"] = "load-" .. (user % 1000003)})
end
"""


def ramp(stage, arguments):
    users = [f"user-{number}" for number in range(arguments.users)]
    stage.start_upstreams()
    stage.start_serin(stage.config(95, 5))
    script = stage.directory / "users.lua"
    script.write_text(USERS_SCRIPT)
    load = wrk(stage.web, 3600, 16, script)
    failures, rows, before, weight_before = [], [], None, None
    try:
        for weight in (5, 20, 0, 100):
            if before is not None:
                revision = stage.status()["revision"]
                stage.write("serin.yaml", stage.config(100 - weight, weight))
                eventually("the edit is in force", lambda: stage.status()["revision"] > revision)
            now = versions_of(stage.web, users)
            again = versions_of(stage.web, users)
            moved = sum(one != other for one, other in zip(now, again))
            share = now.count("1.9.0") / len(users)
            sigma = math.sqrt(weight / 100 * (1 - weight / 100) / len(users))
            wrong = 0
            if before is not None:
                into, out = ("1.8.2", "1.9.0"), ("1.9.0", "1.8.2")
                forbidden = out if weight > weight_before else into
                wrong = collections.Counter(zip(before, now))[forbidden]
            rows.append((weight, share, (share - weight / 100) / sigma if sigma else 0.0, moved, wrong))
            if abs(share - weight / 100) > 4 * sigma or moved or wrong:
                failures.append(f"at weight {weight}")
            before, weight_before = now, weight
    finally:
        # wrk prints its summary at SIGINT.
        load.send_signal(2)
        summary, _ = load.communicate()
    bad = re.search(r"Non-2xx.*: (\d+)", summary)
    errors = re.search(r"Socket errors: (.*)", summary)
    served = re.search(r"(\d+) requests in", summary)
    if bad or errors:
        failures.append(f"the load saw {bad and bad[0]} {errors and errors[1]}")
    print(f"| weight of the canary | share of {len(users):,} users | deviation in sigma | changed sides when asked again | moved the wrong way |")
    print("|---|---|---|---|---|")
    for weight, share, deviation, moved, wrong in rows:
        print(f"| {weight} % | {share:.3%} | {deviation:+.2f} | {moved} | {wrong} |")
    print(f"\nLoad meanwhile: {int(served[1]):,} requests, failed: {bad[1] if bad else 0}; socket errors: {errors[1] if errors else 'none'}.")
    return failures


def latency(summary):
    values = {}
    for percentile in ("50%", "99%"):
        number, unit = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", summary).groups()
        values[percentile] = float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
    return values


def user_list(stage, arguments):
    rules = (
        "      rules: [ { name: beta, userList: beta, backend: shop-canary } ]\n"
        "userLists: [ { name: beta, file: beta.txt } ]\n"
    )
    write = lambda first: stage.write("beta.txt", "".join(f"customer-{first + id:08}\n" for id in range(arguments.ids)))
    stage.start_upstreams()
    stage.write("beta.txt", "nobody\n")
    stage.start_serin(stage.config(95, 5, rules))
    script = stage.directory / "users.lua"
    script.write_text(USERS_SCRIPT)
    wrk(stage.web, 3, 16, script).communicate()
    empty = stage.metric("process_resident_memory_bytes")
    entries = lambda: stage.metric("serin_user_list_entries")
    first, times, rows = 0, [], []

    def reload():
        nonlocal first
        first += 1
        write(first)
        started = time.monotonic()
        loaded = stage.status()["userLists"][0]["loadedAt"]
        eventually("the list is in force", lambda: stage.status()["userLists"][0]["loadedAt"] != loaded)
        times.append(time.monotonic() - started)

    reload()
    eventually("all ids are there", lambda: entries() == arguments.ids)
    heap = stage.metric("serin_user_list_bytes") / arguments.ids
    resident = (stage.metric("process_resident_memory_bytes") - empty) / arguments.ids
    for _ in range(arguments.rounds):
        # Written beforehand, so that only Serin's own work falls into the window with the reload.
        first += 1
        following = stage.directory / "following.txt"
        ids = (f"customer-{first + id:08}\n" for id in range(arguments.ids))
        following.write_text("".join(ids))
        quiet = latency(wrk(stage.web, 10, 4, script).communicate()[0])
        loaded = stage.status()["userLists"][0]["loadedAt"]
        busy = wrk(stage.web, 10, 4, script)
        following.rename(stage.directory / "beta.txt")
        summary = busy.communicate()[0]
        rows.append((quiet, latency(summary)))
        if "Non-2xx" in summary or "Socket errors" in summary:
            return ["requests failed during the reload: " + summary]
        eventually("the list is in force", lambda: stage.status()["userLists"][0]["loadedAt"] != loaded)
    ratio = statistics.median(busy["99%"] / quiet["99%"] for quiet, busy in rows)
    print(f"| what | {arguments.ids:,} ids of 17 bytes |\n|---|---|")
    print(f"| the list's own memory | {heap:.1f} B an id |")
    print(f"| resident memory after loading | {resident:.1f} B an id |")
    print(f"| from the change of the file to the new list in force (0.2 to 0.4 s of it waiting for rest) | {statistics.median(times):.1f} s |")
    print(f"| p99 of traffic without a reload | {statistics.median(quiet['99%'] for quiet, _ in rows):.2f} ms |")
    print(f"| p99 of traffic with a reload in the same 10 s | {statistics.median(busy['99%'] for _, busy in rows):.2f} ms, {ratio:.2f} x |")
    print(f"| resident memory after {len(rows) + 1} reloads | {stage.metric('process_resident_memory_bytes') / 2**20:.0f} MiB |")
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=("ramp", "list"))
    parser.add_argument("--serin", default=str(ROOT / "target/release/serin"), help="the binary to drill")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    stage = Stage(arguments.serin)
    try:
        failures = {"ramp": ramp, "list": user_list}[arguments.drill](stage, arguments)
    finally:
        stage.close()
    for failure in failures:
        print(f"BROKEN: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
