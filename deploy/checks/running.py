"""A real serin with upstreams behind it, for the tests of what is used beside it, all on loopback."""

import importlib.util
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from conftest import DEPLOY

TOKEN = "0123456789abcdef0123456789abcdef"
PATIENCE = 20

_spec = importlib.util.spec_from_file_location("upstream", DEPLOY / "compose" / "upstream" / "upstream.py")
upstream = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(upstream)

CONFIG = """
listeners: [ {{ name: web, address: "127.0.0.1:0" }} ]
admin: {{ address: "127.0.0.1:0", writers: [ {{ name: tests, tokenFile: pipeline.token }} ] }}
backends:
  - {{ name: shop-stable, version: "1.8.2", endpoints: ["{stable}"] }}
  - {{ name: shop-canary, version: "1.9.0", endpoints: ["{canary}"] }}
routes:
  - name: shop
    backendRefs:
      - {{ name: shop-stable, weight: {weights[0]} }}
      - {{ name: shop-canary, weight: {weights[1]} }}
    gray: {{ identity: [ {{ header: x-user-id }} ] }}
"""


@pytest.fixture(scope="session")
def program(request):
    """The program; SERIN names one that is built already."""
    return os.environ.get("SERIN") or request.getfixturevalue("serin")


def eventually(what, find):
    """Waits for a fact, and returns what proves it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {PATIENCE} s")


def serve(server):
    """Runs a server of `http.server` in a thread, and returns its address."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return "{}:{}".format(*server.server_address)


@pytest.fixture
def versions():
    """Two versions of a service: `stable` and `canary`."""
    services = {
        name: upstream.Service(("127.0.0.1", 0), version)
        for name, version in (("stable", "1.8.2"), ("canary", "1.9.0"))
    }
    for service in services.values():
        serve(service)
    yield services
    for service in services.values():
        service.shutdown()
        service.server_close()


def addresses(services):
    """Where they listen, by name."""
    return {name: "{}:{}".format(*service.server_address) for name, service in services.items()}


class Serin:
    """A process of serin that runs until it is stopped."""

    def __init__(self, program, directory, config):
        self.config = directory / "serin.yaml"
        self.config.write_text(config, encoding="utf-8")
        (directory / "pipeline.token").write_text(TOKEN + "\n", encoding="utf-8")
        self.token_file = directory / "pipeline.token"
        self.output = directory.parent / f"{directory.name}.log"
        self.command = [program, "--log-format", "json", "run", "--config", str(self.config)]
        self.begin()

    def begin(self):
        """Starts the process, and waits until it serves."""
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.config.parent)
        self.admin = eventually("serin is up", lambda: self.told("serin is up", "admin"))
        self.web = eventually("serin listens", lambda: self.told("listening", "address"))

    def start_again(self):
        """Starts it anew after it was stopped, with its admin listener where it was."""
        text = self.config.read_text(encoding="utf-8")
        text = text.replace('admin: { address: "127.0.0.1:0"', f'admin: {{ address: "{self.admin}"')
        self.config.write_text(text, encoding="utf-8")
        self.begin()

    def told(self, message, field):
        """A field of the first line of the log with this message."""
        assert self.process.poll() is None, self.output.read_text(encoding="utf-8")
        for line in self.output.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)["fields"] if line.startswith("{") else {}
            if fields.get("message") == message:
                return fields[field]
        return None

    def ask(self, path, method="GET", body=None, headers=()):
        """What the admin listener answers, as JSON."""
        return json.loads(ask(f"http://{self.admin}{path}", method, body, headers))

    def weights(self):
        """The weights in force."""
        return self.ask("/api/v1/routes/shop/weights")["weights"]

    def stop(self):
        """Ends it, and waits until it has gone."""
        self.process.kill()
        self.process.wait()


def ask(url, method="GET", body=None, headers=()):
    """Sends a request, and returns the body of its response, whatever its status."""
    request = urllib.request.Request(url, method=method, data=body, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        return error.read()


@pytest.fixture
def start(program, tmp_path):
    """Starts processes, each in a directory of its own, and ends them after the test."""
    running = []

    def start(config):
        directory = tmp_path / f"serin-{len(running)}"
        directory.mkdir()
        running.append(Serin(program, directory, config))
        return running[-1]

    yield start
    for serin in running:
        serin.stop()
