"""A real serin under a load that is counted, and a real Prometheus that scrapes it. All on loopback."""

import contextlib
import dataclasses
import http.client
import http.server
import itertools
import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

from conftest import DEPLOY, REPOSITORY
from running import PATIENCE, Serin, eventually

CONFIG = """
listeners: [ {{ name: web, address: "127.0.0.1:0" }} ]
admin: {{ address: "127.0.0.1:0" }}
shutdown: {{ timeout: 1s, lameDuck: 0s }}
stateFile: state.json
accessLog: {{ output: access.log }}
userLists: [ {{ name: beta, file: beta.txt, expires: "2099-12-31" }} ]
backends:
  # What goes wrong here is to be counted, and not to be made up for.
  - name: shop-stable
    version: "1.8.2"
    endpoints: [ "localhost:{stable}" ]
    healthCheck: {{ tcp: {{}} }}
    outlierDetection: {{ disabled: true }}
  - name: shop-canary
    version: "1.9.0"
    endpointsFile: canary.yaml
    outlierDetection: {{ disabled: true }}
  # Nobody is sent there; it has a certificate that expires.
  - name: shop-next
    endpoints: [ "127.0.0.1:9" ]
    tls: {{ certificateFile: {keys}/shop.crt, keyFile: {keys}/shop.key, insecureSkipVerify: true }}
routes:
  - name: shop
    backendRefs:
      - {{ name: shop-stable, weight: {weight} }}
      - {{ name: shop-canary, weight: 1 }}
      - {{ name: shop-next, weight: 0 }}
    shield: {{ requests: none }}
    retry: {{ attempts: 0 }}
    exposeVersion: true
    gray:
      identity: [ {{ header: x-user-id }} ]
      rules:
        - {{ name: beta, userList: beta, backend: shop-canary }}
        - {{ name: qa, header: {{ name: x-qa, value: always }}, backend: shop-canary }}
"""

FIRST_REQUESTS = 40
REQUESTS = 2000
STABLE_SECONDS = 0.012
CANARY_SECONDS = 0.03
DAWDLING_SECONDS = 0.6


class Version(http.server.ThreadingHTTPServer):
    """A version of a service that fails and dawdles every so many requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, seconds, fails_every, dawdles_every=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.seconds = seconds
        self.fails_every = fails_every
        self.dawdles_every = dawdles_every
        self.numbers = itertools.count(1)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    def stop(self):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        number = next(self.server.numbers)
        dawdles = self.server.dawdles_every and number % self.server.dawdles_every == 0
        time.sleep(DAWDLING_SECONDS if dawdles else self.server.seconds)
        body = b"x" * (number % 100)
        self.send_response(500 if number % self.server.fails_every == 0 else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        """Prometheus says more."""


@dataclasses.dataclass
class Seen:
    """What the load generator saw of one request."""

    version: str
    status: int
    seconds: float
    sent: int
    received: int
    by_rule: bool


def load(address, requests, clients=16):
    """Sends so many requests, and returns what was seen of each. Every fifth names the canary by a header."""
    numbers, seen, errors = itertools.count(), [], []

    def client():
        connection = http.client.HTTPConnection(address, timeout=PATIENCE)
        try:
            while (number := next(numbers)) < requests:
                seen.append(exchange(connection, number))
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return seen


def exchange(connection, number):
    by_rule = number % 5 == 0
    headers = {"x-qa": "always"} if by_rule else {"x-user-id": f"user-{number}"}
    body = b"y" * (number % 50) if number % 3 == 0 else None
    began = time.perf_counter()
    connection.request("POST" if body else "GET", f"/items/{number}", body, headers)
    response = connection.getresponse()
    received = len(response.read())
    seconds = time.perf_counter() - began
    version = response.headers["x-service-version"]
    return Seen(version, response.status, seconds, len(body or b""), received, by_rule)


class Prometheus:
    """A Prometheus with the configuration of deploy/prometheus, in a hurry."""

    def __init__(self, tools, directory, target):
        directory.mkdir()
        with open(DEPLOY / "prometheus" / "prometheus-machines.yaml", encoding="utf-8") as file:
            config = yaml.safe_load(file)
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / path) for path in config["rule_files"]]
        del config["alerting"]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [tools.path("prometheus"), f"--config.file={directory / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={directory / 'data'}", "--web.listen-address=127.0.0.1:0"]
        self.output = directory / "log"
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.address = eventually("Prometheus is ready", self.ready)

    def ready(self):
        """Its address, as soon as it answers queries."""
        text = self.output.read_text(encoding="utf-8")
        assert self.process.poll() is None, text
        found = re.search(r'msg="Listening on" address=(\S+)', text)
        return found and "Server is ready to receive web requests" in text and found[1]

    def get(self, path, **parameters):
        """What its API answers."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression, **when):
        """The samples of an expression, now or at a `time`: labels and value."""
        samples = self.get("query", query=expression, **when)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in samples]

    def active_alerts(self):
        """The alerts that are pending or firing, with the labels of each."""
        return [alert["labels"] for alert in self.get("alerts")["alerts"]]

    def stop(self):
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass
class Observed:
    """A serin after its load and two changes of its configuration: what scraped it, and what clients saw."""

    prometheus: Prometheus
    # Without the first few, by which every series began.
    seen: list[Seen]
    # When Prometheus had none of them, and when it had them all.
    began: float
    ended: float

    def of(self, version):
        """What was seen of a version."""
        return [one for one in self.seen if one.version == version]

    def failures(self, version):
        """How many of a version's requests failed."""
        return sum(one.status == 500 for one in self.of(version))


@contextlib.contextmanager
def observed_under_load(program, tools, directory):
    """Starts everything, sends the load, changes the weights, breaks the configuration; ends everything."""
    with contextlib.ExitStack() as running:

        def run(what):
            running.callback(what.stop)
            return what

        stable = run(Version(seconds=STABLE_SECONDS, fails_every=50))
        canary = run(Version(seconds=CANARY_SECONDS, fails_every=10, dawdles_every=25))
        places = {"stable": stable.port, "keys": REPOSITORY / "config" / "keys"}
        home = directory / "serin"
        home.mkdir()
        (home / "beta.txt").write_text("nobody\n", encoding="utf-8")
        (home / "canary.yaml").write_text(f'[ "127.0.0.1:{canary.port}" ]\n', encoding="utf-8")
        serin = run(Serin(program, home, CONFIG.format(weight=3, **places)))
        prometheus = run(Prometheus(tools, directory / "prometheus", serin.admin))

        def shows(expression):
            eventually(expression, lambda: prometheus.query(expression))

        def scraped(requests):
            """When Prometheus had seen so many."""
            shows(f"sum(serin_request_duration_seconds_count) == {requests}")
            [(_, when)] = prometheus.query("timestamp(serin_build_info)")
            return when

        load(serin.web, FIRST_REQUESTS)
        began = scraped(FIRST_REQUESTS)
        seen = load(serin.web, REQUESTS)
        ended = scraped(FIRST_REQUESTS + REQUESTS)
        serin.config.write_text(CONFIG.format(weight=1, **places), encoding="utf-8")
        shows('serin_backend_weight{backend="shop-stable"} == 1')
        serin.config.write_text("listeners: nowhere\n", encoding="utf-8")
        shows('serin_config_reloads_total{result="failure"} == 1')
        # Rules see it one evaluation later.
        shows('ALERTS{alertname="SerinConfigReloadFailed"}')
        yield Observed(prometheus, seen, began, ended)
