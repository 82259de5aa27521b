"""Clusters on one machine: deploy/local/cluster with stand-ins for what it calls, and with a real serin."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from conftest import CHECKS, DEPLOY, REPOSITORY
from manifests import build, invalid, named, release
from running import CONFIG, TOKEN, addresses, eventually, program, start, versions  # noqa: F401

LOCAL = DEPLOY / "local"
IMAGE = f"ghcr.io/serin-proxy/serin:{release()}"
PROVIDERS = ["kind", "minikube"]

# Notes how it is called. Fails if its words begin with those in FAIL, and knows the clusters in a file.
STAND_IN = r"""#!/usr/bin/env bash
me=${0##*/}
echo "$me $*" >> "$NOTES/calls"
echo "$me KUBECONFIG=${KUBECONFIG:-}" >> "$NOTES/environment"
[[ -z ${FAIL:-} || "$me $*" != "$FAIL"* ]] || { echo "$me is told to fail" >&2; exit 7; }
case "$me $*" in
  'kind create cluster'* | 'minikube start'*) echo serin-local > "$NOTES/clusters" ;;
  'kind delete cluster'* | 'minikube delete'*) rm -f "$NOTES/clusters" ;;
  'kind get clusters') cat "$NOTES/clusters" ;;
  'minikube profile list'*) printf '{"valid":[{"Name":"%s"}]}\n' "$(cat "$NOTES/clusters")" ;;
  'kubectl get pods'*) sed 's|:.*||' "$NOTES/forwards" | grep '^pod/' ;;
  'kubectl port-forward'*)
    port=$(sed -n "s|^$4:||p" "$NOTES/forwards")
    echo $$ >> "$NOTES/forwarding"
    echo "Forwarding from 127.0.0.1:$port -> ${5#:}"
    exec sleep 60
    ;;
  'kubectl apply --filename -') cat > /dev/null ;;
esac
"""


class Machine:
    """A machine with stand-ins for kind, minikube, kubectl, docker and podman."""

    def __init__(self, directory):
        self.notes = directory
        self.state = directory / "state"
        (directory / "bin").mkdir()
        for name in ("kind", "minikube", "kubectl", "docker", "podman"):
            path = directory / "bin" / name
            path.write_text(STAND_IN, encoding="utf-8")
            path.chmod(0o755)

    def cluster(self, *arguments, code=0, fail=""):
        """Runs deploy/local/cluster, which has to end with this exit code, and returns what it wrote."""
        environment = {
            **os.environ,
            "PATH": f"{self.notes / 'bin'}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "SERIN_LOCAL_STATE": str(self.state),
            "FAIL": fail,
            "NO_PROXY": "*",
        }
        command = [str(LOCAL / "cluster"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def calls(self):
        """How the programs were called, in order; forgotten afterwards."""
        path = self.notes / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def forward(self, **targets):
        """What port-forward leads to: pods by their names, and the service."""
        lines = [f"{name.replace('__', '/').replace('_', '-')}:{port}\n" for name, port in targets.items()]
        (self.notes / "forwards").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def running(machine, start, versions):  # noqa: F811
    """Two replicas that the stand-in for kubectl leads to, with the token that the script would have made."""
    config = CONFIG.format(weights=(100, 0), **addresses(versions)) + "    exposeVersion: true\n"
    replicas = [start(config), start(config)]
    ports = [replica.admin.split(":")[1] for replica in replicas]
    web = replicas[0].web.split(":")[1]
    machine.forward(pod__serin_1=ports[0], pod__serin_2=ports[1], service__serin=web)
    for provider in PROVIDERS:
        (machine.state / provider).mkdir(parents=True)
        (machine.state / provider / "pipeline.token").write_text(TOKEN, encoding="utf-8")
    return replicas


def steps_of_up(machine, provider):
    """What `up` has to call, by its first words."""
    state = machine.state / provider
    made = {
        "kind": [f"kind create cluster --config {LOCAL}/kind/cluster.yaml --wait 3m"],
        "minikube": ["minikube start --profile=serin-local --driver=docker"],
    }
    loaded = {
        "kind": [f"kind load image-archive {state}/image.tar --name serin-local"],
        "minikube": [f"minikube image load {state}/image.tar --profile serin-local"],
    }
    return [
        {"kind": "kind get clusters", "minikube": "minikube profile list"}[provider],
        *made[provider],
        f"docker build --tag {IMAGE} {REPOSITORY}",
        f"docker save --output {state}/image.tar {IMAGE}",
        *loaded[provider],
        "kubectl create namespace serin-dev --dry-run=client",
        "kubectl apply --filename -",
        f"kubectl create secret generic serin-writers --namespace serin-dev --from-file {state}/",
        "kubectl apply --filename -",
        f"kubectl apply --kustomize {LOCAL}/overlay",
        "kubectl rollout status deployment/serin --namespace serin-dev",
        "kubectl rollout status deployment/shop-stable --namespace serin-dev",
        "kubectl rollout status deployment/shop-canary --namespace serin-dev",
    ]


def assert_begin(calls, steps):
    """Each call begins as said. Of the two programs of a pipe, either may come first."""
    piped = "kubectl apply --filename -"
    assert calls.count(piped) == steps.count(piped)
    calls, steps = [[line for line in lines if line != piped] for lines in (calls, steps)]
    for call, step in zip(calls, steps, strict=True):
        assert call.startswith(step), f"{call!r} is not {step!r}"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_up_makes_builds_loads_and_installs_in_this_order(machine, provider):
    machine.cluster(provider, "up")
    assert_begin(machine.calls(), steps_of_up(machine, provider))
    token = machine.state / provider / "pipeline.token"
    assert re.fullmatch("[0-9a-f]{64}", token.read_text(encoding="utf-8"))
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("provider", PROVIDERS)
def test_up_keeps_the_cluster_and_the_token_that_are_there(machine, provider):
    machine.cluster(provider, "up")
    token = (machine.state / provider / "pipeline.token").read_bytes()
    first = machine.calls()
    machine.cluster(provider, "up")
    second = machine.calls()
    assert len(second) == len(first) - 1
    assert not any("create cluster" in call or "minikube start" in call for call in second)
    assert (machine.state / provider / "pipeline.token").read_bytes() == token


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_cluster_of_somebody_else_is_left_alone(machine, provider):
    (machine.notes / "clusters").write_text("serin-local\n", encoding="utf-8")
    assert "did not make it" in machine.cluster(provider, "up", code=1)
    assert "nothing that this script has made" in machine.cluster(provider, "down")
    assert len(machine.calls()) == 1
    assert (machine.notes / "clusters").exists()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_down_deletes_what_up_has_made_and_only_once(machine, provider):
    machine.cluster(provider, "up")
    machine.calls()
    machine.cluster(provider, "down")
    name = {"kind": "kind delete cluster --name", "minikube": "minikube delete --profile"}[provider]
    assert machine.calls() == [f"{name} serin-local"]
    assert not (machine.state / provider).exists()
    machine.cluster(provider, "down")
    assert machine.calls() == []


@pytest.mark.parametrize(
    "fail",
    ["docker build", "kind load", "kubectl create secret", "kubectl apply --kustomize", "kubectl rollout"],
)
def test_a_step_that_fails_stops_the_script(machine, fail):
    machine.cluster("kind", "all", code=7, fail=fail)
    calls = machine.calls()
    after = [call for call in calls if call.startswith(fail)]
    assert len(after) == 1
    # Of a pipe, the other program may have been noted behind it.
    assert calls.index(after[0]) >= len(calls) - 2
    assert not any("delete" in call for call in calls)
    # Half a cluster can be deleted.
    machine.cluster("kind", "down")
    assert machine.calls() == ["kind delete cluster --name serin-local"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_ramps_a_canary_on_every_replica_and_tears_down(machine, running, provider):
    output = machine.cluster(provider, "all", "--pause", "0")
    assert [replica.weights()["shop-canary"] for replica in running] == [100, 100]
    for step in (1, 10, 50, 100):
        assert output.count(f"shop-canary {step}, shop-stable {100 - step}") == 2
    assert re.search(r"^ *100 1\.9\.0$", output, re.MULTILINE)
    calls = machine.calls()
    assert "delete" in calls[-1] and not (machine.notes / "clusters").exists()
    forwarded = [call for call in calls if call.startswith("kubectl port-forward")]
    assert [call.split()[4] for call in forwarded] == ["pod/serin-1", "pod/serin-2", "service/serin"]


def test_a_ramp_that_fails_leaves_the_cluster_to_be_looked_at(machine, running, versions):  # noqa: F811
    machine.cluster("kind", "up")
    machine.calls()
    for replica in running:
        replica.token_file.write_text("z" * 32, encoding="utf-8")
        replica.ask("/api/v1/reload", "POST")
    assert "HTTP 401" in machine.cluster("kind", "all", "--pause", "0", code=3)
    assert not any("delete" in call for call in machine.calls())
    assert [replica.weights()["shop-canary"] for replica in running] == [0, 0]


def test_forwards_end_with_the_script(machine, running):
    machine.cluster("kind", "up")
    machine.cluster("kind", "ramp", "--pause", "0")
    processes = (machine.notes / "forwarding").read_text(encoding="utf-8").split()
    assert len(processes) == 3
    paths = [pathlib.Path("/proc", process) for process in processes]
    eventually("they have ended", lambda: not any(path.exists() for path in paths))
    assert list((machine.state / "kind").glob("forward.*")) == []


def test_a_ramp_without_a_cluster_says_how_to_begin(machine):
    assert "kind up" in machine.cluster("kind", "ramp", code=1)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_touches_the_kubeconfig_of_the_user(machine, provider):
    machine.cluster(provider, "up")
    machine.cluster(provider, "down")
    lines = (machine.notes / "environment").read_text(encoding="utf-8").splitlines()
    assert {line.split("KUBECONFIG=")[1] for line in lines} == {str(machine.state / provider / "kubeconfig")}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_dry_run_prints_all_commands_and_runs_none(machine, provider):
    output = machine.cluster(provider, "all", "--dry-run")
    assert machine.calls() == [] and not machine.state.exists()
    printed = [" ".join(shlex.split(line[2:])) for line in output.splitlines()]
    steps = [step for step in steps_of_up(machine, provider)[1:] if step != "kubectl apply --filename -"]
    for step in steps:
        assert any(line.startswith(step) for line in printed), step
    assert all(line.startswith("+ ") for line in output.splitlines())


def test_podman_builds_as_well(machine):
    machine.cluster("kind", "up", "--engine", "podman")
    calls = machine.calls()
    assert any(call.startswith("podman build") for call in calls)
    assert not any(call.startswith("docker") for call in calls)


@pytest.mark.parametrize(
    "arguments", [[], ["kind"], ["kind", "upp"], ["k3s", "up"], ["kind", "up", "--engine", "x"]]
)
def test_a_command_line_that_cannot_be_understood_is_refused(machine, arguments):
    assert "--help" in machine.cluster(*arguments, code=2)


def test_the_script_is_clean_for_shellcheck_and_has_a_manual(tools, machine):
    tools.passes("shellcheck", LOCAL / "cluster")
    manual = machine.cluster("--help")
    for word in ("--engine", "--pause", "--dry-run", "up ", "ramp ", "down ", "all "):
        assert word in manual


def test_a_broken_script_is_caught(tools, tmp_path):
    text = (LOCAL / "cluster").read_text(encoding="utf-8")
    broken = text.replace(
        'kubectl apply --kustomize "$here/overlay"', "kubectl apply --kustomize $here/overlay"
    )
    assert broken != text
    (tmp_path / "cluster").write_text(broken, encoding="utf-8")
    assert "SC2086" in tools.run("shellcheck", tmp_path / "cluster").stdout


# === the files ===

SCHEMA = CHECKS / "kind-v1alpha4.schema.json"


def test_the_cluster_of_kind_is_what_kind_takes(tools):
    tools.passes("check-jsonschema", "--schemafile", SCHEMA, LOCAL / "kind" / "cluster.yaml")
    cluster = yaml.safe_load((LOCAL / "kind" / "cluster.yaml").read_text(encoding="utf-8"))
    assert f"name={cluster['name']}\n" in (LOCAL / "cluster").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("sound", "broken", "why"),
    [
        ("role: worker", "role: wroker", "'wroker' is not one of"),
        ("apiServerAddress", "apiServerAdress", "'apiServerAdress' was unexpected"),
        ("v1alpha4", "v1alpha3", "was expected"),
        ("nodes:", "node:", "'node' was unexpected"),
    ],
)
def test_a_broken_cluster_of_kind_is_caught(tools, tmp_path, sound, broken, why):
    text = (LOCAL / "kind" / "cluster.yaml").read_text(encoding="utf-8")
    lines = [line.replace(sound, broken) for line in text.splitlines() if not line.lstrip().startswith("#")]
    (tmp_path / "cluster.yaml").write_text("\n".join(lines), encoding="utf-8")
    done = tools.run("check-jsonschema", "--schemafile", SCHEMA, tmp_path / "cluster.yaml")
    assert done.returncode != 0 and why in done.stdout


def test_the_options_of_minikube_name_the_same_cluster():
    lines = (LOCAL / "minikube" / "start.args").read_text(encoding="utf-8").splitlines()
    options = dict(line.removeprefix("--").split("=", 1) for line in lines if not line.startswith("#"))
    assert all(line.startswith(("#", "--")) for line in lines)
    known = {"profile", "driver", "container-runtime", "cni", "nodes", "cpus", "memory", "wait"}
    assert set(options) <= known
    assert options["profile"] == "serin-local"


def test_what_is_installed_is_valid_and_named_as_the_script_expects(tools, tmp_path):
    objects = build(tools, LOCAL / "overlay")
    assert not invalid(tools, objects, tmp_path, ["1.32"])
    assert {item["metadata"].get("namespace", item["metadata"]["name"]) for item in objects} == {"serin-dev"}
    serin = named(objects, "Deployment")
    assert serin["spec"]["replicas"] == 2
    pod = serin["spec"]["template"]
    labels = {"app.kubernetes.io/name": "serin", "app.kubernetes.io/instance": "serin"}
    assert labels.items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["containers"][0]["image"] == IMAGE
    sources = pod["spec"]["volumes"][0]["projected"]["sources"]
    assert {"secret": {"name": "serin-writers"}} in sources
    assert {port["port"] for port in named(objects, "Service")["spec"]["ports"]} == {80}
    named(objects, "Deployment", "shop-stable")
    named(objects, "Deployment", "shop-canary")


def test_what_is_installed_is_what_was_built_whatever_dev_runs(tools, tmp_path):
    for name in ("kubernetes", "local", "pipelines"):
        shutil.copytree(DEPLOY / name, tmp_path / name)
    bump = [tmp_path / "pipelines" / "bump-image", "--new-name", "registry.example.com/serin"]
    subprocess.run([*bump, "9.9.9", "sha256:" + "f" * 64], check=True, capture_output=True)
    bumped = "registry.example.com/serin:9.9.9"
    for path, image in {"kubernetes/overlays/dev": bumped, "local/overlay": IMAGE}.items():
        deployment = named(build(tools, tmp_path / path), "Deployment")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["image"].partition("@")[0] == image


def test_serin_accepts_the_configuration_that_is_installed(tools, program, tmp_path):  # noqa: F811
    objects = build(tools, LOCAL / "overlay")
    config = named(objects, "ConfigMap", "serin-config")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "pipeline.token").write_text(TOKEN, encoding="utf-8")
    done = subprocess.run([program, "check", tmp_path / "serin.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = yaml.safe_load(config["data"]["serin.yaml"])
    assert [ref["weight"] for ref in said["routes"][0]["backendRefs"]] == [100, 0]


def test_the_scripts_are_where_the_cluster_looks_for_them():
    assert (REPOSITORY / "Dockerfile").exists() and shutil.which("curl")
    assert pathlib.Path(REPOSITORY / "deploy" / "scripts" / "serin-ramp").exists()
