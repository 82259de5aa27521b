"""The parts of deploy/rehearsal: that what it says is worth something. The rehearsal itself is run by CI."""

import os
import sys
import time

import pytest
import yaml

from conftest import DEPLOY

sys.path.insert(0, str(DEPLOY / "rehearsal"))

from cluster import ConfigMap, Load, Service, hurried, hurry, tail  # noqa: E402
from running import eventually  # noqa: E402
from under_load import Version  # noqa: E402

RULES = sorted(DEPLOY.glob("prometheus/rules/*.yaml"))
IMPOSSIBLE = 1e-6


class Pod:
    """What the Service knows of a replica."""

    def __init__(self, web, is_ready=True):
        self.web = web
        self.is_ready = is_ready

    def ready(self):
        return self.is_ready


def test_the_script_is_clean_for_shellcheck(tools):
    tools.passes("shellcheck", DEPLOY / "rehearsal" / "run")


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_in_a_hurry_are_rules(tools, tmp_path, path):
    rules = hurry(yaml.safe_load(path.read_text(encoding="utf-8")))
    (tmp_path / path.name).write_text(yaml.safe_dump(rules), encoding="utf-8")
    tools.passes("promtool", "check", "rules", tmp_path / path.name)
    # Nothing is left of the time that rules have in production.
    assert not any(
        unit in rule["expr"] for group in rules["groups"] for rule in group["rules"] for unit in ("m]", "h]")
    )


def test_counts_in_a_hurry_are_those_of_the_shorter_range():
    assert hurried("rate(a[5m]) * 300 >= 100") == "rate(a[15s]) * 15 >= 100"
    assert hurried("rate(a[6h]) * 21600 >= 10") == "rate(a[1080s]) * 1080 >= 10"
    assert hurried("2 * a:rate5m > 0.01") == "2 * a:rate5m > 0.01"


@pytest.mark.parametrize(("hits", "share"), [(10, 0.01), (113, 0.1), (520, 0.5), (0, 0), (1000, 1)])
def test_a_share_that_chance_explains_is_believed(hits, share):
    assert tail(1000, hits, share) > IMPOSSIBLE


@pytest.mark.parametrize(("hits", "share"), [(50, 0.01), (0, 0.1), (600, 0.5), (1, 0), (999, 1)])
def test_a_share_that_is_wrong_is_caught(hits, share):
    assert tail(1000, hits, share) <= IMPOSSIBLE


def test_a_config_map_changes_as_the_kubelet_changes_it(tmp_path):
    mounted = ConfigMap(tmp_path / "etc")
    mounted.put({"serin.yaml": "one", "bots.txt": "a"})
    first = os.readlink(tmp_path / "etc" / "..data")
    mounted.put({"serin.yaml": "two", "bots.txt": "b"})
    assert os.readlink(tmp_path / "etc" / "serin.yaml") == "..data/serin.yaml"
    assert (tmp_path / "etc" / "serin.yaml").read_text(encoding="utf-8") == "two"
    assert not (tmp_path / "etc" / first).exists()


@pytest.fixture
def version():
    """A version that does well."""
    server = Version(seconds=0, fails_every=sys.maxsize)
    yield server
    server.stop()


@pytest.fixture
def led_to():
    """Starts a Service of these pods and a load, and ends both after the test."""
    running = []

    def start(*pods):
        running.append(Service(pods))
        running[0].knows(len(pods))
        running.append(Load(running[0]))
        return running

    yield start
    for one in reversed(running):
        one.stop()


def test_the_service_hears_of_changes_late(led_to, version):
    pods = Pod(f"127.0.0.1:{version.port}"), Pod(f"localhost:{version.port}")
    service, _ = led_to(*pods)
    pods[1].is_ready = False
    changed = time.monotonic()
    eventually("the Service leaves it out", lambda: service.endpoints() == [pods[0].web])
    assert Service.DELAY <= time.monotonic() - changed < 3 * Service.DELAY


def test_a_pod_that_refuses_connections_is_a_failed_request(led_to, version, free_port):
    _, load = led_to(Pod(f"127.0.0.1:{version.port}"), Pod(f"127.0.0.1:{free_port()}"))
    eventually("a failure", lambda: any("refused" in (one.failed or "") for one in load.seen))
    eventually("one that another pod answers", lambda: any(one.failed is None for one in load.seen))


def test_a_status_of_500_is_a_failed_request(led_to, version):
    version.fails_every = 2
    _, load = led_to(Pod(f"127.0.0.1:{version.port}"))
    eventually("a failure", lambda: any(one.failed == "status 500" for one in load.seen))
