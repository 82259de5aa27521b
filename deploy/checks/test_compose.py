"""deploy/compose: that the file is sound, that its parts find each other, and that Serin works as it says."""

import copy
import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest
import yaml

from conftest import DEPLOY
from running import TOKEN, ask, eventually, program, start  # noqa: F401

COMPOSE = DEPLOY / "compose"
FILE = COMPOSE / "compose.yaml"

# Where each service listens. Those of Serin and the collector are held against their configuration below.
PORTS = {
    "serin": {8080, 9901},
    "shop-stable": {8080},
    "shop-canary": {8080},
    "prometheus": {9090},
    "grafana": {3000},
    "otel-collector": {4317, 4318, 8889, 13133},
    "jaeger": {4317, 4318, 16686},
    "state-owner": set(),
}


def load(path=FILE):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def problems(compose, directory=COMPOSE):
    """What would go wrong with a file of this content in this directory, beyond what its schema says."""
    found = []
    for name, service in compose["services"].items():
        found += [f"{name}: {problem}" for problem in problems_of(service, compose, directory)]
    return found


def problems_of(service, compose, directory):
    """What is wrong with one service."""
    if not re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*", service.get("image", "")):
        yield f"image {service.get('image')} is not pinned to a version"
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
        yield "is not hardened"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    if "mem_limit" not in service and service.get("network_mode") != "none":
        yield "may take all memory"
    for port in service.get("ports", []):
        if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port):
            yield f"port {port} is published to everybody"
    for volume in service.get("volumes", []):
        if volume["type"] == "bind" and not (directory / volume["source"]).exists():
            yield f"{volume['source']} does not exist"
        if volume["type"] == "bind" and not volume.get("read_only"):
            yield f"{volume['source']} may be written to"
        if volume["type"] == "volume" and volume["source"] not in compose["volumes"]:
            yield f"volume {volume['source']} is not declared"
    for network in service.get("networks", []):
        if network not in compose["networks"]:
            yield f"network {network} is not declared"
    for secret in service.get("secrets", []):
        if secret not in compose["secrets"]:
            yield f"secret {secret} is not declared"
    for needed, condition in service.get("depends_on", {}).items():
        if needed not in compose["services"]:
            yield f"depends on {needed}, which is no service"
        elif condition["condition"] == "service_healthy" and "healthcheck" not in compose["services"][needed]:
            yield f"waits for the health of {needed}, which has no check"


def reaches(compose, client, address):
    """Whether one service can connect to HOST:PORT."""
    host, port = address.rsplit(":", 1)
    if host in ("127.0.0.1", "localhost"):
        return int(port) in PORTS[client]
    if host not in compose["services"] or int(port) not in PORTS[host]:
        return False
    return bool(set(compose["services"][client]["networks"]) & set(compose["services"][host]["networks"]))


# === the file ===


def test_the_file_is_valid(tools):
    tools.passes("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE)


@pytest.mark.parametrize(
    ("sound", "broken", "why"),
    [
        ("    depends_on:\n", "    depend_on:\n", "'depend_on' was unexpected"),
        ("condition: service_healthy", "condition: healthy", "'healthy' is not one of"),
        ("cap_drop: [ ALL ]", "cap_drop: ALL", "is not of type 'array'"),
        ("    ports: [ ", "    ports: { a: b }\n    labels: [ ", "is not of type 'array'"),
    ],
)
def test_a_broken_file_is_caught(tools, tmp_path, sound, broken, why):
    text = FILE.read_text(encoding="utf-8")
    assert sound in text
    (tmp_path / "compose.yaml").write_text(text.replace(sound, broken, 1), encoding="utf-8")
    done = tools.run(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml", "-v"
    )
    assert done.returncode != 0 and why in done.stdout


def test_every_service_is_pinned_hardened_and_made_of_what_is_there():
    compose = load()
    assert set(compose["services"]) == set(PORTS)
    assert problems(compose) == []


@pytest.mark.parametrize(
    ("service", "change", "why"),
    [
        ("grafana", {"image": "docker.io/grafana/grafana:latest"}, "not pinned"),
        ("jaeger", {"read_only": False}, "not hardened"),
        ("serin", {"security_opt": []}, "may gain privileges"),
        ("prometheus", {"ports": ["9090:9090"]}, "published to everybody"),
        (
            "serin",
            {"volumes": [{"type": "bind", "source": "./etc", "target": "/etc/serin"}]},
            "does not exist",
        ),
        ("serin", {"secrets": ["pipeline"]}, "secret pipeline is not declared"),
        ("grafana", {"depends_on": {"jaeger": {"condition": "service_healthy"}}}, "has no check"),
        ("grafana", {"networks": ["monitoring"]}, "network monitoring is not declared"),
    ],
)
def test_a_careless_service_is_caught(service, change, why):
    compose = copy.deepcopy(load())
    compose["services"][service].update(change)
    found = problems(compose)
    assert len(found) >= 1 and any(problem.startswith(service) and why in problem for problem in found)


def test_nobody_but_the_one_who_gives_the_volume_away_is_root():
    users = {name: service.get("user") for name, service in load()["services"].items()}
    assert None not in users.values()
    assert [name for name, user in users.items() if user.startswith("0")] == ["state-owner"]
    owner = load()["services"]["state-owner"]
    assert owner["cap_add"] == ["CHOWN"] and owner["network_mode"] == "none"


def test_versions_are_reached_through_serin_alone():
    compose = load()
    for version in ("shop-stable", "shop-canary"):
        assert compose["services"][version]["networks"] == ["services"]
        assert "ports" not in compose["services"][version]
    assert compose["networks"]["services"] == {"internal": True}
    others = set(compose["services"]) - {"serin", "shop-stable", "shop-canary"}
    assert all("services" not in compose["services"][name].get("networks", []) for name in others)


def test_published_ports_are_those_that_services_listen_on():
    for name, service in load()["services"].items():
        for port in service.get("ports", []):
            assert int(port.rsplit(":", 1)[1]) in PORTS[name], (name, port)


def test_every_service_can_be_asked_whether_it_is_well():
    """But for two whose images have no client to ask with. Serin's has a check, and one ends at once."""
    services = load()["services"]
    without = {name for name, service in services.items() if "healthcheck" not in service}
    assert without == {"serin", "otel-collector", "jaeger", "state-owner"}
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
    assert "\nHEALTHCHECK " in dockerfile
    for name, service in services.items():
        for url in re.findall(r"http://\S+?:\d+", " ".join(service.get("healthcheck", {}).get("test", []))):
            assert reaches(load(), name, url.removeprefix("http://")), (name, url)


# === who finds whom ===


def test_serin_listens_where_others_look_for_it():
    config = load(COMPOSE / "config" / "serin.yaml")
    addresses = [listener["address"] for listener in config["listeners"]] + [config["admin"]["address"]]
    assert all(address.startswith("0.0.0.0:") for address in addresses)
    assert {int(address.rsplit(":", 1)[1]) for address in addresses} == PORTS["serin"]


def test_serin_finds_its_versions_and_the_collector():
    compose, config = load(), load(COMPOSE / "config" / "serin.yaml")
    endpoints = [endpoint for backend in config["backends"] for endpoint in backend["endpoints"]]
    for address in [*endpoints, config["tracing"]["endpoint"].removeprefix("http://")]:
        assert reaches(compose, "serin", address), address
    versions = {backend["name"]: backend["version"] for backend in config["backends"]}
    for name, version in versions.items():
        assert compose["services"][name]["environment"]["VERSION"] == version


def test_serin_may_write_where_it_keeps_weights_and_finds_its_token():
    compose, config = load(), load(COMPOSE / "config" / "serin.yaml")
    mounts = {volume["target"]: volume for volume in compose["services"]["serin"]["volumes"]}
    assert mounts[os.path.dirname(config["stateFile"])]["source"] == "serin-state"
    given_away = compose["services"]["state-owner"]
    assert given_away["volumes"][0]["source"] == "serin-state"
    assert given_away["command"] == ["chown", compose["services"]["serin"]["user"], "/var/lib/serin"]
    [writer] = config["admin"]["writers"]
    assert writer["tokenFile"].removeprefix("/run/secrets/") in compose["services"]["serin"]["secrets"]


def test_the_grace_period_covers_the_drain():
    assert load()["services"]["serin"]["stop_grace_period"] == "30s"
    assert "shutdown" not in load(COMPOSE / "config" / "serin.yaml")


def test_the_collector_gets_its_configuration_and_finds_the_traces_backend():
    compose = load()
    service = compose["services"]["otel-collector"]
    config = mounted(compose, "otel-collector", service["command"][0].removeprefix("--config="))
    text = config.read_text(encoding="utf-8")
    listening = {int(port) for port in re.findall(r"endpoint: 0\.0\.0\.0:(\d+)", text)}
    assert listening == PORTS["otel-collector"]
    assert reaches(compose, "otel-collector", service["environment"]["TRACES_ENDPOINT"])
    mandatory = set(re.findall(r"\$\{env:([A-Z_]+)\}", text))
    assert mandatory <= set(service["environment"])


def mounted(compose, service, path):
    """The file of the repository that a container sees at this path."""
    for volume in compose["services"][service]["volumes"]:
        if volume["type"] == "bind" and (path + "/").startswith(volume["target"] + "/"):
            return (COMPOSE / (volume["source"] + path.removeprefix(volume["target"]))).resolve()
    raise AssertionError(f"{service} has nothing at {path}")


def prometheus_file():
    compose = load()
    [option] = [
        word for word in compose["services"]["prometheus"]["command"] if word.startswith("--config.file=")
    ]
    return mounted(compose, "prometheus", option.split("=")[1])


def test_prometheus_scrapes_services_that_are_there():
    scraped = load(prometheus_file())["scrape_configs"]
    targets = [target for job in scraped for config in job["static_configs"] for target in config["targets"]]
    assert {"serin:9901", "otel-collector:8889"} <= set(targets)
    for target in targets:
        assert reaches(load(), "prometheus", target), target


def test_a_target_that_nobody_is_is_caught():
    compose = load()
    for target in ("serin:9902", "collector:8889", "shop-stable:8080", "grafana:9090"):
        assert not reaches(compose, "prometheus", target)


def test_prometheus_accepts_its_configuration_and_finds_the_rules(tools, tmp_path):
    text = prometheus_file().read_text(encoding="utf-8")
    rules = mounted(load(), "prometheus", "/etc/prometheus/rules")
    assert rules == DEPLOY / "prometheus" / "rules"
    (tmp_path / "prometheus.yaml").write_text(
        text.replace("/etc/prometheus/rules", str(rules)), encoding="utf-8"
    )
    output = tools.passes("promtool", "check", "config", tmp_path / "prometheus.yaml")
    assert len(re.findall(r"SUCCESS: \d+ rules found", output)) == len(list(rules.glob("*.yaml")))


def test_grafana_finds_its_dashboards_and_prometheus():
    compose = load()
    provisioning = mounted(compose, "grafana", "/etc/grafana/provisioning")
    sources = [
        source for path in provisioning.glob("datasources/*.yaml") for source in load(path)["datasources"]
    ]
    urls = {source["url"] for source in sources if source["type"] == "prometheus"}
    assert urls
    environment = compose["services"]["grafana"]["environment"]
    for url in urls:
        url = re.sub(r"\$\{?([A-Z_]+)\}?", lambda match: environment[match[1]], url)
        assert reaches(compose, "grafana", url.removeprefix("http://").rstrip("/")), url
    providers = [item for path in provisioning.glob("dashboards/*.yaml") for item in load(path)["providers"]]
    assert providers
    for provider in providers:
        directory = mounted(compose, "grafana", provider["options"]["path"])
        assert list(directory.glob("*.json")), directory


# === what runs in it ===


def at_home(text, directory, **places):
    """A configuration whose names are addresses of this machine."""
    for name, place in places.items():
        text = text.replace(f"{name.replace('_', '-')}:8080", place)
    text = text.replace("/run/secrets/pipeline-token", "pipeline.token")
    text = text.replace("/var/lib/serin/state.json", str(directory / "state.json"))
    return re.sub(r"0\.0\.0\.0:\d+", "127.0.0.1:0", text)


def test_serin_accepts_its_configuration(program, tmp_path):  # noqa: F811
    text = (COMPOSE / "config" / "serin.yaml").read_text(encoding="utf-8")
    (tmp_path / "serin.yaml").write_text(
        text.replace("/run/secrets/pipeline-token", "token"), encoding="utf-8"
    )
    (tmp_path / "token").write_text(TOKEN, encoding="utf-8")
    done = subprocess.run([program, "check", tmp_path / "serin.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def versions_of_the_file():
    """The two versions as the file runs them, but on this machine; by name, where they listen."""
    running, places = [], {}
    for name in ("shop-stable", "shop-canary"):
        service = load()["services"][name]
        environment = service["environment"] | {"ERROR_PERCENT": "0", "PORT": "0"}
        script = mounted(load(), name, service["command"][1])
        process = subprocess.Popen(
            [sys.executable, script],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        places[name.replace("-", "_")] = "127.0.0.1:" + process.stdout.readline().split()[-1]
    yield places
    for process in running:
        process.terminate()
        assert process.wait(timeout=10) == 0, "SIGTERM ends it"
        process.stdout.close()


def test_requests_reach_both_versions(start, versions_of_the_file, tmp_path):  # noqa: F811
    text = (COMPOSE / "config" / "serin.yaml").read_text(encoding="utf-8")
    replica = start(at_home(text, tmp_path, otel_collector="127.0.0.1:1", **versions_of_the_file))
    eventually("it is ready", lambda: b"ready" in ask(f"http://{replica.admin}/readyz").lower())
    seen = set()
    for number in range(200):
        request = urllib.request.Request(
            f"http://{replica.web}/cart", headers={"x-user-id": f"user-{number}"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            said = json.loads(response.read())
            assert said["path"] == "/cart"
            assert said["version"] == response.headers["x-service-version"]
            seen.add(said["version"])
    assert seen == {"1.8.2", "1.9.0"}
    body = b'{"weights": {"shop-stable": 0, "shop-canary": 1}}'
    answer = replica.ask("/api/v1/routes/shop/weights", "PUT", body, {"authorization": f"Bearer {TOKEN}"})
    assert answer["saved"] is True


def test_a_version_can_be_made_slow_and_made_to_fail():
    from running import serve, upstream

    service = upstream.Service(("127.0.0.1", 0), "2", error_percent=100, latency=0.05)
    address = serve(service)
    try:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(f"http://{address}/", timeout=10)
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as response:
            assert response.status == 200
    finally:
        service.shutdown()
        service.server_close()


# === make-secrets ===


def make_secrets(*arguments):
    done = subprocess.run([COMPOSE / "make-secrets", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_secrets_are_made_once_where_the_file_looks_for_them(tmp_path):
    directory = tmp_path / "secrets"
    assert make_secrets("--directory", directory)[0] == 0
    assert directory.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == {os.path.basename(secret["file"]) for secret in load()["secrets"].values()}
    assert all(re.fullmatch(rb"[0-9a-f]{64}", content) for content in files.values())
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in directory.iterdir())
    code, output = make_secrets("--directory", directory)
    assert code == 0 and output.count("is there already") == 2
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files


def test_a_dry_run_makes_no_secrets(tmp_path):
    code, output = make_secrets("--directory", tmp_path / "secrets", "--dry-run")
    assert code == 0 and output.count("would be written") == 2
    assert not (tmp_path / "secrets").exists()


def test_the_script_is_clean_for_shellcheck_and_has_a_manual(tools):
    tools.passes("shellcheck", COMPOSE / "make-secrets")
    assert "--directory DIR" in make_secrets("--help")[1]
    assert make_secrets("--nonsense")[0] == 2


def test_no_secret_is_in_the_repository():
    ignored = (COMPOSE / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/secrets/" in ignored
    assert all(secret["file"].startswith("./secrets/") for secret in load()["secrets"].values())
