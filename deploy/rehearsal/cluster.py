"""What a cluster does for Serin, on one machine: mounts a ConfigMap, starts pods, leads clients to them."""

import collections
import contextlib
import http.client
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(DEPLOY / "checks"))

import under_load  # noqa: E402
from running import Serin, eventually  # noqa: E402

# Time runs so many times as fast for the rules of Prometheus: five minutes are fifteen seconds.
HASTE = 20
# Not so for the discovery of targets, for which Prometheus takes 5 seconds: no process is down sooner.
LEAST_DOWN = 15
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@contextlib.contextmanager
def stopped_if_it_fails(started):
    """Nobody else would end a process whose start fails."""
    try:
        yield
    except BaseException:
        started.stop()
        raise


class ConfigMap:
    """A directory as the kubelet mounts a ConfigMap: all files change at once, by the swap of one link."""

    def __init__(self, directory):
        self.directory = directory
        self.numbers = itertools.count(1)
        directory.mkdir()

    def put(self, files):
        """Mounts a generation: file names with their contents."""
        generation = self.directory / f"..generation-{next(self.numbers)}"
        generation.mkdir()
        for name, content in files.items():
            (generation / name).write_text(content, encoding="utf-8")
        data = self.directory / "..data"
        before = os.readlink(data) if data.is_symlink() else None
        (self.directory / "..data_tmp").symlink_to(generation.name)
        (self.directory / "..data_tmp").rename(data)
        for name in files:
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        if before:
            for file in (self.directory / before).iterdir():
                file.unlink()
            (self.directory / before).rmdir()


class Replica(Serin):
    """A pod of Serin: it reads the file that all read, and works in a directory of its own."""

    def __init__(self, program, config, directory):
        directory.mkdir()
        self.directory = directory
        self.starts = itertools.count(1)
        self.command = [program, "--log-format", "json", "run", "--config", str(config)]
        self.begin()

    def begin(self):
        """Starts the process, at ports that the system chooses, and waits until it serves."""
        self.output = self.directory / f"log-{next(self.starts)}"
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.directory)
        with stopped_if_it_fails(self):
            self.web = eventually("serin listens", lambda: self.told("listening", "address"))
            # The Service asks there whether it is ready, and takes the address above then.
            self.admin = eventually("serin is up", lambda: self.told("serin is up", "admin"))

    def ready(self):
        """What the kubelet's readiness probe finds out."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            probe = http.client.HTTPConnection(self.admin, timeout=1)
            with contextlib.closing(probe):
                probe.request("GET", "/readyz")
                return probe.getresponse().status == 200
        return False

    def terminate(self):
        """Ends it as the kubelet does, and waits until it has gone by itself. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def hash(self):
        """The hash of the configuration in force."""
        return self.ask("/api/v1/config/status")["hash"]

    def stop(self):
        if self.process.poll() is None:
            super().stop()


class Service:
    """Leads connections to ready replicas, as kube-proxy on a node does, which hears of changes late."""

    PERIOD = 0.2
    DELAY = 1

    def __init__(self, replicas):
        self.replicas = replicas
        self.known = collections.deque([(time.monotonic(), [])])
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        while not self.ending.wait(self.PERIOD):
            ready = [replica.web for replica in self.replicas if replica.ready()]
            if ready != self.known[-1][1]:
                self.known.append((time.monotonic(), ready))

    def endpoints(self):
        """The addresses that this node takes for ready."""
        heard = time.monotonic() - self.DELAY
        return next((ready for when, ready in reversed(self.known) if when <= heard), [])

    def knows(self, count):
        """Waits until so many replicas get connections, and these are those that are ready now."""

        def known():
            now = self.endpoints()
            return len(now) == count and now == self.known[-1][1]

        eventually(f"the Service knows {count} replicas", known)

    def stop(self):
        self.ending.set()
        self.thread.join()


class Seen(collections.namedtuple("Seen", "sent version failed tester")):
    """One request: when it was sent, who answered, and why it failed, if it did."""


class Load:
    """Users who ask again and again, and a tester who names his version. Nothing is tried a second time.

    The tester is why either version always has some requests, and dashboards have something to compare."""

    USERS = 24
    PAUSE = 0.1
    TESTERS_PAUSE = 0.4

    def __init__(self, service):
        self.service = service
        self.seen = []
        self.ending = threading.Event()
        clients = [self.user] * self.USERS + [self.tester]
        self.threads = [threading.Thread(target=client, daemon=True) for client in clients]
        for thread in self.threads:
            thread.start()

    def user(self):
        """A connection like that of an ingress: many users come by it, so that each request is a new draw."""
        every = (f"user-{random.randrange(10_000_000)}" for _ in itertools.count())
        self.ask_on(self.PAUSE, ({"x-user-id": user} for user in every))

    def tester(self):
        backends = itertools.cycle(["shop-stable", "shop-canary"])
        self.ask_on(self.TESTERS_PAUSE, ({"x-canary": backend} for backend in backends))

    def ask_on(self, pause, requests):
        connection = None
        for headers in requests:
            if self.ending.wait(random.uniform(0.5, 1.5) * pause):
                break
            sent, version, failed = time.time(), None, None
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(
                        random.choice(self.service.endpoints()), timeout=10
                    )
                    connection.connect()
                    connection.auto_open = 0
                connection.request("GET", "/items/1", headers=headers)
                response = connection.getresponse()
                response.read()
                version = response.headers["x-service-version"]
                failed = f"status {response.status}" if response.status >= 400 else None
                again = not response.will_close
            except Exception as error:
                failed, again = f"{type(error).__name__}: {error}", False
            self.seen.append(Seen(sent, version, failed, "x-canary" in headers))
            if connection and not again:
                connection.close()
                connection = None
        if connection:
            connection.close()

    def stop(self):
        self.ending.set()
        for thread in self.threads:
            thread.join()


def tail(count, hits, share):
    """How likely so many hits of `count` or still fewer are, or so many or still more: the lesser."""

    def exactly(k):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return math.exp(ways + k * math.log(share) + (count - k) * math.log(1 - share))

    if share in (0, 1):
        return float(hits == count * share)
    return min(math.fsum(map(exactly, range(hits + 1))), math.fsum(map(exactly, range(hits, count + 1))))


def hurried(expression):
    """A rule's expression with shorter ranges, and with what it counts in them by their seconds."""
    expression = re.sub(r"\[(\w+)\]", lambda found: f"[{seconds(found[1]) / HASTE:g}s]", expression)
    return re.sub(r"\* (300|3600|21600)\b", lambda found: f"* {int(found[1]) // HASTE}", expression)


def seconds(duration):
    """A duration of Prometheus in seconds."""
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration))


def hurry(rules):
    """A file of rules for which time runs faster. The names of series stay as they are."""
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = hurried(rule["expr"])
        if "for" in rule:
            least = LEAST_DOWN if rule["labels"]["area"] == "process" else 0
            rule["for"] = f"{max(seconds(rule['for']) / HASTE, least) * 1000:.0f}ms"
    return rules


class Prometheus(under_load.Prometheus):
    """A Prometheus with the rules of deploy/prometheus in a hurry, and targets that come and go."""

    def __init__(self, program, directory, targets):
        directory.mkdir()
        self.targets = directory / "targets.yaml"
        self.scrape(targets)
        machines = DEPLOY / "prometheus" / "prometheus-machines.yaml"
        config = yaml.safe_load(machines.read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        rules = sorted(DEPLOY.glob("prometheus/rules/*.yaml"))
        config["rule_files"] = [self.copy(path, directory) for path in rules]
        del config["alerting"]
        [job] = config["scrape_configs"]
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": [str(self.targets)], "refresh_interval": "1s"}]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [program, f"--config.file={directory / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={directory / 'data'}", "--web.listen-address=127.0.0.1:0"]
        self.output = directory / "log"
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        with stopped_if_it_fails(self):
            self.address = eventually("Prometheus is ready", self.ready)

    @staticmethod
    def copy(path, directory):
        rules = hurry(yaml.safe_load(path.read_text(encoding="utf-8")))
        (directory / path.name).write_text(yaml.safe_dump(rules, width=1000), encoding="utf-8")
        return str(directory / path.name)

    def scrape(self, addresses):
        """Names the pods, as the discovery of Kubernetes does."""
        new = self.targets.with_suffix(".new")
        new.write_text(yaml.safe_dump([{"targets": addresses}]), encoding="utf-8")
        new.rename(self.targets)

    def firing(self):
        """The names of the alerts that somebody would hear of."""
        alerts = self.get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def fired(self):
        """The names of those that have fired at any time since it runs."""
        fired = self.query('last_over_time(ALERTS{alertstate="firing"}[1h])')
        return {metric["alertname"] for metric, _ in fired}

    def wait_for(self, expression):
        """Waits until an expression has a sample."""
        eventually(expression, lambda: self.query(expression))
