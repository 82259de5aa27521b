"""deploy/rollouts: what lets Flagger and Argo Rollouts drive Serin.

That every object is valid for its kind and fits the others; that the commands of hooks and Jobs, as the
manifests have them, move the weights of real replicas; that the queries, asked of a real Prometheus, let a good
canary pass and stop a bad one and one without requests; and that mistakes are caught.
"""

import dataclasses
import json
import os
import re
import signal
import ssl
import subprocess
import textwrap
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonschema
import pytest
import yaml

import manifests
from conftest import CHECKS, DEPLOY, documents
from manifests import build, named, of_kind
from promql import unknown_names
from running import CONFIG, TOKEN, Serin, addresses, ask, eventually, serve
from running import program, start, versions  # noqa: F401
from under_load import Prometheus, Version, load

ROLLOUTS = DEPLOY / "rollouts"
SCRIPT = ROLLOUTS / "weights" / "serin-weights"
SCHEMA = json.loads((CHECKS / "flagger-v1beta1.schema.json").read_text(encoding="utf-8"))

# Files that the tests break.
CANARY = "flagger/canary.yaml"
TEMPLATES = "flagger/metrictemplates.yaml"
TESTER = "flagger/loadtester.yaml"
ROLLOUT = "argo-rollouts/rollout.yaml"
ANALYSES = "argo-rollouts/analysistemplates.yaml"


# === manifests ===


def serin_side(tools, directory):
    """What is beside Serin in its own namespace, as an overlay of deploy/kubernetes would build it."""
    directory.mkdir(exist_ok=True)
    content = {
        "namespace": "serin",
        "resources": [os.path.relpath(DEPLOY / "kubernetes" / "base", directory)],
        "components": [os.path.relpath(ROLLOUTS / "serin", directory)],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return build(tools, directory)


@pytest.fixture(scope="module")
def built(tools, tmp_path_factory):
    """The objects of each directory, by its name."""
    objects = {name: build(tools, ROLLOUTS / name) for name in ("flagger", "argo-rollouts")}
    return {**objects, "serin": serin_side(tools, tmp_path_factory.mktemp("serin") / "overlay")}


def unwrapped(objects):
    """The objects, and as kinds that validators and scanners know what custom resources carry in them."""
    return [*objects, *(one for item in objects for one in carried(item))]


def carried(item):
    """The Deployment in a Rollout, and the Jobs in an AnalysisTemplate, with names in place of arguments."""
    metadata = item["metadata"]
    if item["kind"] == "Rollout":
        spec = {key: item["spec"][key] for key in ("replicas", "selector", "template")}
        yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}
    for metric in item["spec"].get("metrics", []) if item["kind"] == "AnalysisTemplate" else []:
        if job := metric["provider"].get("job"):
            spec = json.loads(re.sub(r"\{\{args\.([\w-]+)\}\}", r"\1", json.dumps(job["spec"])))
            yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def is_of_flagger(item):
    return item["apiVersion"].startswith("flagger.app/")


def invalid(tools, objects, scratch):
    """What the API server, or the CRD of the controller, has against the objects."""
    others = [item for item in unwrapped(objects) if not is_of_flagger(item)]
    validator = jsonschema.Draft7Validator(SCHEMA)
    return manifests.invalid(tools, others, scratch) + [
        f"{item['kind']} {item['metadata']['name']}: {error.json_path}: {error.message}"
        for item in objects
        if is_of_flagger(item)
        for error in validator.iter_errors(item)
    ]


def mistake(tools, tmp_path, file, old, new):
    """The objects of a copy of deploy/rollouts with a mistake in one of its files."""
    root = tmp_path / "rollouts"
    if not root.exists():
        subprocess.run(["cp", "-r", str(ROLLOUTS), str(root)], check=True)
    text = (root / file).read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r} any more"
    (root / file).write_text(text.replace(old, new), encoding="utf-8")
    return build(tools, (root / file).parent)


def test_every_manifest_is_valid_for_its_kind(tools, built, tmp_path):
    objects = [item for items in built.values() for item in items]
    assert {"Canary", "MetricTemplate", "Rollout", "AnalysisTemplate"} <= {item["kind"] for item in objects}
    assert invalid(tools, objects, tmp_path) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        (CANARY, "iterations: 3", "iteration: 3", "'iteration' was unexpected"),
        (CANARY, "type: pre-rollout", "type: before-rollout", "'before-rollout' is not one of"),
        (CANARY, 'requests: "100"', "requests: 100", "100 is not of type 'string'"),
        (CANARY, "    interval: 1m\n", "    interval: 1 minute\n", "'1 minute' does not match"),
        (TEMPLATES, "    address:", "    url:", "'address' is a required property"),
        (TESTER, "readOnlyRootFile", "readonlyRootFile", "'readonlyRootFilesystem' was unexpected"),
        (ROLLOUT, "templateName: serin-canary", "template: serin-canary", "not known to the schema"),
        (ROLLOUT, "setWeight: 20", 'setWeight: "20"', "must be integer"),
        (ANALYSES, "failureLimit: 1", "failuresLimit: 1", "failuresLimit is not known to the schema"),
        (ANALYSES, "restartPolicy: Never", "restartPolicy: Seldom", "restartPolicy must be equal to one of"),
    ],
)
def test_a_broken_manifest_is_caught(tools, tmp_path, file, old, new, why):
    complaints = invalid(tools, mistake(tools, tmp_path, file, old, new), tmp_path)
    assert any(why in complaint for complaint in complaints), complaints


def test_scanners_find_nothing(tools, built, tmp_path):
    objects = [item for items in built.values() for item in unwrapped(items) if not manifests.is_custom(item)]
    assert manifests.insecure(tools, objects, tmp_path) == []


def test_a_scanner_finds_a_job_that_may_do_too_much(tools, tmp_path):
    objects = mistake(tools, tmp_path, ANALYSES, "allowPrivilegeEscalation: false", "privileged: true")
    (tmp_path / "scanned").mkdir()
    (tmp_path / "scanned" / "jobs.yaml").write_text(yaml.safe_dump_all(of_kind(unwrapped(objects), "Job")))
    found = manifests.trivy(tools, tmp_path / "scanned")
    assert any("should set 'securityContext.privileged' to false" in one for one in found), found


def pods(objects):
    """The pods in the objects, as (labels, spec)."""
    workloads = [item for item in unwrapped(objects) if item["kind"] in ("Deployment", "Job")]
    return [manifests.pod_of(item) for item in workloads]


def namespace(name):
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def test_what_sets_weights_may_reach_serin_and_nobody_may_reach_it(built):
    writer = {"serin.dev/writer": "true"}
    (ingress,) = named(built["serin"], "NetworkPolicy", "serin-writers")["spec"]["ingress"]
    (peer,) = ingress["from"]
    assert peer == {"namespaceSelector": namespace("shop"), "podSelector": {"matchLabels": writer}}
    for name in ("flagger", "argo-rollouts"):
        policy = named(built[name], "NetworkPolicy", "serin-writer")
        assert policy["metadata"]["namespace"] == "shop"
        assert policy["spec"]["podSelector"]["matchLabels"] == writer
        assert "Ingress" in policy["spec"]["policyTypes"] and "ingress" not in policy["spec"]
        (_,) = [labels for labels, _ in pods(built[name]) if writer.items() <= labels.items()]
        (names,) = [rule for rule in policy["spec"]["egress"] if rule["ports"][0]["port"] == 53]
        assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]
    (flagger,) = named(built["flagger"], "NetworkPolicy", "flagger-loadtester")["spec"]["ingress"]
    assert flagger["from"] == [{"namespaceSelector": namespace("flagger-system")}]


def test_the_admin_service_leads_to_every_replica(built):
    service = named(built["serin"], "Service", "serin-admin")
    labels, spec = manifests.pod_of(named(built["serin"], "Deployment"))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= labels.items()
    (port,) = service["spec"]["ports"]
    ports = {one["name"]: one["containerPort"] for one in spec["containers"][0]["ports"]}
    assert ports[port["targetPort"]] == port["port"]
    place = f"http://serin-admin.{service['metadata']['namespace']}.svc:{port['port']}"
    assert environment_of_hooks(built["flagger"])["SERIN_ADMIN"] == place
    assert job_of(built["argo-rollouts"], "set 5").environment["SERIN_ADMIN"] == place


def test_both_versions_let_serin_in(built):
    for name in ("flagger", "argo-rollouts"):
        services = [labels for labels, _ in pods(built[name]) if "serin.dev/backend" in labels]
        assert [labels["serin.dev/backend"] for labels in services] == ["true"]
        (ingress,) = named(built[name], "NetworkPolicy", "shop")["spec"]["ingress"]
        (peer,) = ingress["from"]
        assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "serin"}
        assert ingress["ports"] == [{"port": 8080, "protocol": "TCP"}]


def test_the_script_and_the_token_are_where_commands_look_for_them(built):
    for name in ("flagger", "argo-rollouts"):
        assert named(built[name], "ConfigMap", "serin-weights")["data"] == {
            "serin-weights": SCRIPT.read_text(encoding="utf-8")
        }
        (spec,) = [spec for labels, spec in pods(built[name]) if "serin.dev/writer" in labels]
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert mounts == {"serin-weights": "/opt/serin", "serin-writer": "/etc/serin-writer"}
        script, token = volumes["serin-weights"]["configMap"], volumes["serin-writer"]["secret"]
        assert (script["name"], script["defaultMode"]) == ("serin-weights", 0o555)
        # The group of the pod reads it, and nobody else.
        assert (token["secretName"], token["defaultMode"]) == ("serin-writer", 0o440)
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
        environment = {one["name"]: one["value"] for one in spec["containers"][0]["env"]}
        assert environment["SERIN_TOKEN_FILE"] == "/etc/serin-writer/token"


def test_hooks_go_to_the_service_of_what_runs_them(built):
    service = named(built["flagger"], "Service", "flagger-loadtester")["metadata"]
    hooks = named(built["flagger"], "Canary", "shop")["spec"]["analysis"]["webhooks"]
    for hook in hooks:
        assert hook["url"].startswith(f"http://{service['name']}.{service['namespace']}/")
    # Flagger wants the hooks of a check to be over before the next one.
    assert sum(int(hook["timeout"][:-1]) for hook in hooks if hook["type"] == "rollout") < 60


def test_canaries_ask_metric_templates_that_there_are_for_all_that_they_want_to_know(built):
    templates = {item["metadata"]["name"]: item for item in of_kind(built["flagger"], "MetricTemplate")}
    metrics = named(built["flagger"], "Canary", "shop")["spec"]["analysis"]["metrics"]
    assert {metric["templateRef"]["name"] for metric in metrics} == templates.keys()
    for metric in metrics:
        query = templates[metric["templateRef"]["name"]]["spec"]["query"]
        assert set(re.findall(r"variables\.(\w+)", query)) <= metric["templateVariables"].keys()


def analyses(rollout):
    """The analyses of a Rollout: that in the background, and those of its steps."""
    canary = rollout["spec"]["strategy"]["canary"]
    return [canary["analysis"], *(step["analysis"] for step in canary["steps"] if "analysis" in step)]


def test_rollouts_name_templates_that_there_are_and_give_them_what_they_need(built):
    objects = built["argo-rollouts"]
    templates = {item["metadata"]["name"]: item for item in of_kind(objects, "AnalysisTemplate")}
    rollout = named(objects, "Rollout", "shop")
    for analysis in analyses(rollout):
        (reference,) = analysis["templates"]
        template = templates[reference["templateName"]]
        known = {arg["name"] for arg in template["spec"]["args"]}
        needed = {arg["name"] for arg in template["spec"]["args"] if "value" not in arg}
        given = {arg["name"] for arg in analysis.get("args", [])}
        assert needed <= given <= known
        assert set(re.findall(r"\{\{args\.([\w-]+)\}\}", json.dumps(template))) == known
    canary = rollout["spec"]["strategy"]["canary"]
    for service in (canary["stableService"], canary["canaryService"]):
        assert named(objects, "Service", service)["spec"]["clusterIP"] == "None"


def test_a_rollout_has_as_many_pods_of_the_new_version_as_users_need(built):
    rollout = named(built["argo-rollouts"], "Rollout", "shop")
    canary = rollout["spec"]["strategy"]["canary"]
    # Without it, the old version would have fewer pods with every step.
    assert canary["trafficRouting"] == {}
    pods_of_it, orders = None, []
    for step in canary["steps"]:
        if "setWeight" in step:
            pods_of_it = step["setWeight"]
        for arg in step.get("analysis", {}).get("args", []):
            orders.append(arg["value"])
            assert arg["value"] == f"set {pods_of_it}"
    # `guard` takes a canary that has all users for one that has passed.
    assert orders == ["set 0", "set 5", "set 20", "set 50", "set 100"]
    assert canary["analysis"]["args"] == [{"name": "do", "value": "guard"}]
    # After each step and before the next, somebody looks how the canary does.
    names = [analysis["templates"][0]["templateName"] for analysis in analyses(rollout)[2:]]
    assert names == ["serin-weights", "serin-canary"] * 3 + ["serin-weights"]


def test_no_autoscaler_of_nodes_ends_what_guards_a_rollout(built):
    template = named(built["argo-rollouts"], "AnalysisTemplate", "serin-weights")
    (metric,) = template["spec"]["metrics"]
    assert metric["provider"]["job"]["spec"]["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


def test_the_configurations_in_the_readme_are_what_serin_takes(program, tmp_path):  # noqa: F811
    text = (ROLLOUTS / "README.md").read_text(encoding="utf-8")
    rest, *backends = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(backends) == 2 and "shop-primary" in backends[0]
    (tmp_path / "rollouts.token").write_text(TOKEN, encoding="utf-8")
    for part in backends:
        config = 'listeners: [ { name: web, address: "127.0.0.1:8080" } ]\n' + part + rest
        config = config.replace("/var/lib/serin", str(tmp_path))
        (tmp_path / "serin.yaml").write_text(config, encoding="utf-8")
        done = subprocess.run([program, "check", "serin.yaml"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_shell_checker_finds_nothing_in_the_script(tools):
    tools.passes("shellcheck", SCRIPT)


# === weights ===


@dataclasses.dataclass
class Command:
    """A command of a manifest, with what is in the environment of its container."""

    words: list[str]
    environment: dict[str, str]

    def start(self, urls, token, **more):
        """Runs it with real replicas, in a container whose /opt/serin is the directory of the script."""
        words = [word.replace("/opt/serin/", f"{SCRIPT.parent}/") for word in self.words]
        places = {"SERIN_ADMIN": " ".join(urls), "SERIN_TOKEN_FILE": str(token)}
        environment = {**os.environ, **self.environment, **places, **more}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, env=environment, **pipe)

    def run(self, urls, token, **more):
        """Runs it to its end: its exit code and what it wrote."""
        process = self.start(urls, token, **more)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


def environment_of_hooks(objects):
    _, spec = manifests.pod_of(named(objects, "Deployment", "flagger-loadtester"))
    (container,) = spec["containers"]
    return {one["name"]: one["value"] for one in container["env"]}


def hook(objects, kind):
    """The command of a hook, as flagger-loadtester runs one of the type `bash`."""
    hooks = named(objects, "Canary", "shop")["spec"]["analysis"]["webhooks"]
    (metadata,) = [one["metadata"] for one in hooks if one["type"] == kind]
    assert metadata["type"] == "bash"
    return Command(["bash", "-c", metadata["cmd"]], environment_of_hooks(objects))


def resolved(item, args):
    """A part of a template with arguments in the places of their names, as Argo Rollouts puts them there."""
    text = json.dumps(item)
    for name, value in args.items():
        text = text.replace(f"{{{{args.{name}}}}}", value)
    assert "{{" not in text, text
    return json.loads(text)


def arguments_of(template, **given):
    defaults = {arg["name"]: arg["value"] for arg in template["spec"]["args"] if "value" in arg}
    return {**defaults, **{name.replace("_", "-"): value for name, value in given.items()}}


def job_of(objects, do):
    """The command of the Job that an AnalysisTemplate makes."""
    template = named(objects, "AnalysisTemplate", "serin-weights")
    (metric,) = resolved(template["spec"]["metrics"], arguments_of(template, do=do))
    (container,) = metric["provider"]["job"]["spec"]["template"]["spec"]["containers"]
    return Command(container["command"], {one["name"]: one["value"] for one in container["env"]})


@pytest.fixture
def replicas(start, versions):  # noqa: F811
    """Two replicas of Serin whose file gives the canary nothing."""
    config = CONFIG.format(weights=(100, 0), **addresses(versions))
    return [start(config), start(config)]


def urls(replicas):
    return [f"http://{replica.admin}" for replica in replicas]


def canaries(replicas):
    """The canary's weight on each of them; of a hundred, or the assertion fails."""
    found = [replica.weights() for replica in replicas]
    assert all(sum(weights.values()) == 100 for weights in found)
    return [weights["shop-canary"] for weights in found]


def put(replica, canary, reason="by hand"):
    """Sets weights on one replica, as somebody else would."""
    body = {"weights": {"shop-stable": 100 - canary, "shop-canary": canary}, "reason": reason}
    answer = replica.ask(
        "/api/v1/routes/shop/weights",
        "PUT",
        json.dumps(body).encode(),
        [("authorization", f"Bearer {TOKEN}")],
    )
    assert answer["weights"] == body["weights"]


def audited(replica):
    """What its audit log says."""
    lines = [json.loads(line) for line in replica.output.read_text(encoding="utf-8").splitlines()]
    return [line["fields"] for line in lines if line["target"] == "serin::audit"]


def direct(*words):
    """The script itself with these words, in the environment of a Job."""
    return Command([str(SCRIPT), "shop", "shop-stable", "shop-canary", *words], {})


def test_the_hooks_of_flagger_take_all_replicas_through_a_release(built, replicas):
    places, token = urls(replicas), replicas[0].token_file
    objects = built["flagger"]

    def does(kind, code, weight):
        done, output = hook(objects, kind).run(places, token)
        assert (done, canaries(replicas)) == (code, [weight, weight]), output

    put(replicas[0], 33, reason="left behind by a rollout before")
    does("confirm-rollout", 0, 0)
    does("pre-rollout", 0, 5)
    does("rollout", 0, 5)
    # Each check that went well makes a step. Flagger promotes when the hook has nothing more to do.
    does("confirm-promotion", 1, 10)
    does("rollout", 0, 10)
    does("confirm-promotion", 1, 25)
    does("confirm-promotion", 1, 50)
    does("confirm-promotion", 0, 50)
    does("confirm-promotion", 0, 50)
    does("post-rollout", 0, 0)
    for replica in replicas:
        answer = replica.ask("/api/v1/routes/shop/weights")
        assert (answer["setBy"], answer["reason"]) == ("tests", "flagger")
        assert {fields["by"] for fields in audited(replica)} == {"tests"}


def test_an_analysis_that_begins_again_begins_with_the_first_step(built, replicas):
    for replica in replicas:
        put(replica, 50)
    code, output = hook(built["flagger"], "pre-rollout").run(urls(replicas), replicas[0].token_file)
    assert (code, canaries(replicas)) == (0, [5, 5]), output


def test_the_jobs_of_argo_rollouts_set_weights_on_all_replicas(built, replicas):
    places, token = urls(replicas), replicas[0].token_file
    rollout = named(built["argo-rollouts"], "Rollout", "shop")
    orders = [arg["value"] for analysis in analyses(rollout)[1:] for arg in analysis.get("args", [])]
    for do in orders:
        code, output = job_of(built["argo-rollouts"], do).run(places, token)
        assert code == 0, output
        assert canaries(replicas) == [int(do.split()[1])] * 2
    assert replicas[1].ask("/api/v1/routes/shop/weights")["reason"] == "argo rollouts"


def test_a_wrong_token_fails_and_changes_nothing(built, replicas, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 32, encoding="utf-8")
    for command in (
        hook(built["flagger"], "pre-rollout"),
        job_of(built["argo-rollouts"], "set 5"),
    ):
        code, output = command.run(urls(replicas), wrong)
        assert code == 1 and output.count("HTTP 401") == 2, output
        assert "f" * 32 not in output
    code, output = direct("set", "5").run(urls(replicas), tmp_path / "missing")
    assert code == 1, output
    assert canaries(replicas) == [0, 0]


def test_a_replica_that_does_not_answer_keeps_no_other_from_losing_its_canary(built, replicas):
    for replica in replicas:
        put(replica, 25)
    places = [urls(replicas)[0], "http://127.0.0.1:9", urls(replicas)[1]]
    code, output = hook(built["flagger"], "post-rollout").run(places, replicas[0].token_file)
    assert code == 1 and "1 of 3 replicas do not have the canary at 0" in output
    assert canaries(replicas) == [0, 0]


def test_no_step_is_made_while_a_replica_does_not_answer(built, replicas):
    for replica in replicas:
        put(replica, 5)
    places = [*urls(replicas), "http://127.0.0.1:9"]
    code, output = hook(built["flagger"], "confirm-promotion").run(places, replicas[0].token_file)
    assert code == 1 and "does not answer" in output
    assert canaries(replicas) == [5, 5]


def test_a_replica_that_comes_meanwhile_is_told_what_the_others_were(built, replicas):
    put(replicas[0], 25, reason="flagger")
    code, output = hook(built["flagger"], "rollout").run(urls(replicas), replicas[0].token_file)
    assert (code, canaries(replicas)) == (0, [25, 25]), output
    assert output.count("shop-canary:25") == 1
    assert replicas[1].ask("/api/v1/routes/shop/weights")["reason"] == "flagger"


def test_a_replica_whose_file_was_edited_is_left_alone(replicas):
    for replica in replicas:
        put(replica, 25)
    config = replicas[1].config
    config.write_text(config.read_text("utf-8").replace("weight: 100", "weight: 90"), encoding="utf-8")
    assert "revision" in replicas[1].ask("/api/v1/reload", "POST")
    code, output = direct("hold").run(urls(replicas), replicas[0].token_file)
    assert code == 0, output
    assert replicas[1].ask("/api/v1/routes/shop/weights")["source"] == "file"


def test_what_somebody_took_back_by_hand_stays_so(built, replicas):
    for replica in replicas:
        put(replica, 25)
    put(replicas[1], 0)
    # The later word, also for the replica that he did not reach.
    code, output = hook(built["flagger"], "rollout").run(urls(replicas), replicas[0].token_file)
    assert (code, canaries(replicas)) == (0, [0, 0]), output
    code, output = hook(built["flagger"], "confirm-promotion").run(urls(replicas), replicas[0].token_file)
    assert code == 1 and "it was taken back" in output
    assert canaries(replicas) == [0, 0]


class Meddler(BaseHTTPRequestHandler):
    """Stands before a replica, and sets weights itself just before others do."""

    def do_GET(self):
        self.forward(None)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        put(self.server.replica, 77)
        self.forward(body)

    def forward(self, body):
        url = f"http://{self.server.replica.admin}{self.path}"
        request = urllib.request.Request(url, method=self.command, data=body)
        for name in ("authorization", "if-match"):
            if self.headers[name]:
                request.add_header(name, self.headers[name])
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """The replica logs."""


def test_a_step_does_not_overwrite_what_somebody_has_set_meanwhile(replicas):
    put(replicas[0], 5)
    meddler = ThreadingHTTPServer(("127.0.0.1", 0), Meddler)
    meddler.replica = replicas[0]
    code, output = direct("next", "5", "10").run([f"http://{serve(meddler)}"], replicas[0].token_file)
    meddler.shutdown()
    meddler.server_close()
    assert code == 1 and "HTTP 412" in output
    assert canaries(replicas[:1]) == [77]


def test_other_versions_of_the_route_keep_their_weights(start, versions):  # noqa: F811
    config = yaml.safe_load(CONFIG.format(weights=(100, 0), **addresses(versions)))
    config["backends"].append({"name": "shop-next", "endpoints": ["127.0.0.1:9"]})
    config["routes"][0]["backendRefs"].append({"name": "shop-next", "weight": 7})
    replica = start(json.dumps(config))
    code, output = direct("set", "20").run(urls([replica]), replica.token_file)
    assert code == 0, output
    assert replica.weights() == {"shop-stable": 80, "shop-canary": 20, "shop-next": 7}
    code, output = Command([str(SCRIPT), "shop", "shop-stable", "shop-canry", "set", "5"], {}).run(
        urls([replica]), replica.token_file
    )
    assert code == 1 and "has no versions shop-stable and shop-canry" in output


@pytest.mark.parametrize(
    "words",
    [
        ["shop", "shop-stable", "shop-canary"],
        ["shop", "shop-stable", "shop-canary", "set"],
        ["shop", "shop-stable", "shop-canary", "set", "101"],
        ["shop", "shop-stable", "shop-canary", "set", "5", "10"],
        ["shop", "shop-stable", "shop-canary", "next"],
        ["shop", "shop-stable", "shop-canary", "raise", "5"],
        ["shop", "shop-stable", "shop/canary", "set", "5"],
    ],
)
def test_a_command_line_that_says_nothing_sensible_is_refused(words, tmp_path):
    code, output = Command([str(SCRIPT), *words], {}).run(["http://127.0.0.1:9"], tmp_path / "token")
    assert code == 2 and output.startswith("serin-weights: "), output


# === guard ===


def guard(objects, places, token):
    """The Job that Argo Rollouts runs in the background, in a hurry; it guards when this returns."""
    process = job_of(objects, "guard").start(places, token, SERIN_INTERVAL="0.2", SERIN_SETTLE="1")
    assert "is guarded" in process.stdout.readline()
    return process


@pytest.fixture
def guarded(built, replicas):
    """Gives the canary so many users, and returns what guards it."""

    def begin(weight, also=()):
        for replica in replicas:
            put(replica, weight)
        return guard(built["argo-rollouts"], [*urls(replicas), *also], replicas[0].token_file)

    return begin


def end(process):
    """Ends it as the kubelet does when a Job is deleted."""
    process.send_signal(signal.SIGTERM)


def outcome(process):
    """What becomes of it: its exit code and what it wrote."""
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_an_abort_takes_the_canary_back(guarded, replicas):
    process = guarded(20)
    assert canaries(replicas) == [20, 20]
    end(process)
    code, output = outcome(process)
    # For a Job, 0 would mean that its work is done, also when its node is drained in the middle of a rollout.
    assert (code, canaries(replicas)) == (143, [0, 0]), output


def test_an_abort_takes_the_canary_back_where_it_can_and_says_where_it_cannot(guarded, replicas):
    process = guarded(20, also=["http://127.0.0.1:9"])
    end(process)
    code, output = outcome(process)
    assert (code, canaries(replicas)) == (143, [0, 0])
    assert "THE CANARY MAY STILL GET REQUESTS" in output


def test_a_replica_that_comes_during_a_rollout_is_told(built, replicas):
    put(replicas[0], 20)
    process = guard(built["argo-rollouts"], urls(replicas), replicas[0].token_file)
    eventually("the other replica is told", lambda: canaries(replicas) == [20, 20])
    end(process)
    outcome(process)


def test_after_a_promotion_users_stay_until_serin_has_heard_of_it(guarded, replicas):
    process = guarded(100)
    end(process)
    assert "keeps them for 1 s" in process.stdout.readline()
    assert canaries(replicas) == [100, 100]
    code, output = outcome(process)
    assert (code, canaries(replicas)) == (143, [0, 0]), output


def test_a_rollout_that_begins_right_after_a_promotion_is_left_alone(guarded, replicas):
    process = guarded(100)
    end(process)
    assert "keeps them for 1 s" in process.stdout.readline()
    for replica in replicas:
        put(replica, 5)
    outcome(process)
    assert canaries(replicas) == [5, 5]


# === all addresses of a name, and TLS ===

TLS_CONFIG = """
listeners: [ {{ name: web, address: "127.0.0.1:0" }} ]
admin:
  address: "{address}"
  tls:
    certificates: [ {{ certificateFile: {keys}/admin.crt, keyFile: {keys}/admin.key }} ]
    clientCa: {{ file: {keys}/ca.crt, mode: optional }}
  writers:
    - {{ name: tests, tokenFile: pipeline.token }}
    - {{ name: flagger, certificateSubject: "CN=serin-admin.serin.svc" }}
backends:
  - {{ name: shop-stable, endpoints: ["127.0.0.1:9"] }}
  - {{ name: shop-canary, endpoints: ["127.0.0.1:10"] }}
routes:
  - name: shop
    backendRefs: [ {{ name: shop-stable, weight: 100 }}, {{ name: shop-canary, weight: 0 }} ]
"""


def issue(keys, name, subject, *options):
    """A key and a certificate, which it signs itself unless options say who does."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", subject, "-keyout", keys / f"{name}.key", "-out", keys / f"{name}.crt"]
    subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True)


@pytest.fixture
def behind_a_name(program, tmp_path):  # noqa: F811
    """Two replicas with TLS behind a name that no DNS knows: its URL, the keys, and a directory for PATH."""
    keys, bin_directory = tmp_path / "keys", tmp_path / "bin"
    keys.mkdir()
    bin_directory.mkdir()
    issue(keys, "ca", "/CN=test authority")
    by_it = ["-CA", keys / "ca.crt", "-CAkey", keys / "ca.key", "-addext", "basicConstraints=CA:FALSE"]
    by_it += ["-addext", "subjectAltName=DNS:serin-admin.serin.svc"]
    issue(keys, "admin", "/CN=serin-admin.serin.svc", *by_it)
    # As the resolver of glibc and that of musl write it: one line for each kind of socket.
    (bin_directory / "getent").write_text(
        '#!/bin/sh\n[ "$*" = "ahosts serin-admin.serin.svc" ] || exit 2\n'
        'for a in 127.0.0.1 127.0.0.2; do echo "$a       STREAM serin-admin"; echo "$a       DGRAM"; done\n'
    )
    (bin_directory / "getent").chmod(0o755)
    running, port = [], "0"
    for address in ("127.0.0.1", "127.0.0.2"):
        directory = tmp_path / f"at-{address}"
        directory.mkdir()
        config = TLS_CONFIG.format(address=f"{address}:{port}", keys=keys)
        running.append(Serin(program, directory, config))
        port = running[0].admin.rpartition(":")[2]
    yield f"https://serin-admin.serin.svc:{port}", keys, bin_directory
    for replica in running:
        replica.stop()


def weights_over_tls(address):
    """What is in force on a replica whose certificate is for another name."""
    url = f"https://{address}/api/v1/routes/shop/weights"
    with urllib.request.urlopen(url, context=ssl._create_unverified_context()) as response:
        answer = json.load(response)
    return answer["weights"]["shop-canary"], answer.get("setBy")


def test_every_address_of_a_name_is_told_over_tls(built, behind_a_name, tmp_path):
    url, keys, bin_directory = behind_a_name
    port = url.rpartition(":")[2]
    token = tmp_path / "at-127.0.0.1" / "pipeline.token"
    more = {"PATH": f"{bin_directory}:{os.environ['PATH']}", "SERIN_CACERT": str(keys / "ca.crt")}

    def in_force():
        return [weights_over_tls(f"127.0.0.{number}:{port}") for number in (1, 2)]

    code, output = hook(built["flagger"], "pre-rollout").run([url], token, **more)
    assert code == 0, output
    assert in_force() == [(5, "tests")] * 2
    # By a certificate in place of a token.
    certificate = {"SERIN_CERT": str(keys / "admin.crt"), "SERIN_KEY": str(keys / "admin.key")}
    code, output = hook(built["flagger"], "confirm-promotion").run([url], "", **more, **certificate)
    assert code == 1, output
    assert in_force() == [(10, "flagger")] * 2
    # Nobody else's certificate will do.
    code, output = hook(built["flagger"], "post-rollout").run([url], token, **{**more, "SERIN_CACERT": ""})
    assert code == 1 and "certificate" in output
    assert in_force() == [(10, "flagger")] * 2


# === queries ===

STAGE = """
listeners: [ {{ name: web, address: "127.0.0.1:0" }} ]
admin: {{ address: "127.0.0.1:0" }}
backends:
  - {{ name: shop-stable, endpoints: ["127.0.0.1:{stable}"], outlierDetection: {{ disabled: true }} }}
  - {{ name: shop-canary, endpoints: ["127.0.0.1:{good}"], outlierDetection: {{ disabled: true }} }}
  - {{ name: shop-slow, endpoints: ["127.0.0.1:{slow}"], outlierDetection: {{ disabled: true }} }}
  - {{ name: shop-failing, endpoints: ["127.0.0.1:{failing}"], outlierDetection: {{ disabled: true }} }}
routes:
  - name: shop
    hostnames: [ "127.0.0.1" ]
    backendRefs: [ {{ name: shop-stable, weight: 50 }}, {{ name: shop-canary, weight: 50 }} ]
  - name: bad
    hostnames: [ localhost ]
    backendRefs:
      - {{ name: shop-stable, weight: 40 }}
      - {{ name: shop-slow, weight: 30 }}
      - {{ name: shop-failing, weight: 30 }}
  - name: quiet
    hostnames: [ quiet.test ]
    backendRefs: [ {{ name: shop-stable, weight: 50 }}, {{ name: shop-canary, weight: 50 }} ]
  - name: silent
    hostnames: [ silent.test ]
    backendRefs: [ {{ name: shop-stable, weight: 100 }}, {{ name: shop-canary, weight: 0 }} ]
"""

# In the middle of a bucket, so that a busy machine changes nothing.
USUAL_SECONDS = 0.11
SLOW_SECONDS = 0.6
GOOD, SLOW, FAILING, QUIET, SILENT, ELSEWHERE = (
    {"route": "shop", "canary": "shop-canary"},
    {"route": "bad", "canary": "shop-slow"},
    {"route": "bad", "canary": "shop-failing"},
    {"route": "quiet", "canary": "shop-canary"},
    {"route": "silent", "canary": "shop-canary"},
    {"route": "shop", "canary": "shop-canary", "namespace": "staging"},
)


@pytest.fixture(scope="module")
def stage(program, tools, tmp_path_factory):  # noqa: F811
    """A Prometheus that has seen a good canary, a slow one, one that fails, and some without requests."""
    directory = tmp_path_factory.mktemp("stage")
    (directory / "serin").mkdir()
    running = [
        Version(USUAL_SECONDS, fails_every=1000),
        Version(USUAL_SECONDS, fails_every=1000),
        Version(SLOW_SECONDS, fails_every=1000),
        Version(USUAL_SECONDS, fails_every=10),
    ]
    try:
        ports = dict(zip(("stable", "good", "slow", "failing"), [version.port for version in running]))
        running.append(serin := Serin(program, directory / "serin", STAGE.format(**ports)))
        running.append(prometheus := Prometheus(tools, directory / "prometheus", serin.admin))
        label_namespace(prometheus, directory / "prometheus" / "prometheus.yaml")
        port = serin.web.rpartition(":")[2]
        # Series begin with the first request, which no rate can see.
        load(serin.web, 20)
        load(f"localhost:{port}", 40)
        counted(prometheus, 60)
        load(serin.web, 400, clients=48)
        load(f"localhost:{port}", 800, clients=96)
        for _ in range(10):
            ask(f"http://{serin.web}/", headers=[("host", "quiet.test")])
        counted(prometheus, 1270)
        yield prometheus
    finally:
        for one in reversed(running):
            one.stop()


def label_namespace(prometheus, file):
    """Has its targets the label that service discovery gives them in a cluster."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["scrape_configs"][0]["static_configs"][0]["labels"] = {"namespace": "serin"}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    prometheus.process.send_signal(signal.SIGHUP)
    counted(prometheus, None)


def counted(prometheus, requests):
    """Waits until it has seen so many requests; without a number, until it has seen Serin."""
    expression = 'serin_build_info{namespace="serin"}'
    if requests:
        expression = f'sum(serin_request_duration_seconds_count{{namespace="serin"}}) == {requests}'
    eventually(expression, lambda: prometheus.query(expression))


def in_go_template(text, interval, variables):
    """A query as Flagger writes it from its template."""
    text = text.replace("{{ interval }}", interval)
    for name, value in variables.items():
        text = text.replace(f"{{{{ variables.{name} }}}}", value)
    # What is left would be an error, or part of a query that Flagger does not send.
    assert "{{" not in text, text
    return text


def flagger_says(prometheus, objects, name, about):
    """What a check of the Canary comes to: `passes`, `fails`, or `no values`, which fails as well."""
    metrics = named(objects, "Canary", "shop")["spec"]["analysis"]["metrics"]
    (metric,) = [one for one in metrics if one["name"] == name]
    template = named(objects, "MetricTemplate", metric["templateRef"]["name"])
    variables = {**metric["templateVariables"], **about}
    values = prometheus.query(in_go_template(template["spec"]["query"], metric["interval"], variables))
    if not values:
        return "no values"
    ((_, value),) = values
    limits = metric["thresholdRange"]
    # As Flagger compares: what is not a number is neither too large nor too small.
    too_small, too_large = value < limits.get("min", value), value > limits.get("max", value)
    return "fails" if too_small or too_large else "passes"


def argo_says(prometheus, objects, name, about):
    """What a measurement of the AnalysisTemplate comes to, in the words of Argo Rollouts."""
    template = named(objects, "AnalysisTemplate", "serin-canary")
    metrics = resolved(template["spec"]["metrics"], arguments_of(template, **about))
    (metric,) = [one for one in metrics if one["name"] == name]
    result = [value for _, value in prometheus.query(metric["provider"]["prometheus"]["query"])]
    if holds(metric["failureCondition"], result):
        return "Failed"
    return "Successful" if holds(metric["successCondition"], result) else "Inconclusive"


def holds(condition, result):
    """Whether a condition holds; of the language of conditions, this knows what the templates say in it."""
    assert re.fullmatch(r"len\(result\) == 1 && result\[0\] (<=|>) [0-9.]+", condition), condition
    return eval(condition.replace("&&", "and"), {"result": result, "len": len})


CHECKS_OF_FLAGGER = ["success-rate", "latency-p99", "failures-beside-baseline", "latency-beside-baseline"]


@pytest.mark.parametrize(
    ("about", "verdicts"),
    [
        (GOOD, ["passes", "passes", "passes", "passes"]),
        (SLOW, ["passes", "fails", "passes", "fails"]),
        (FAILING, ["fails", "passes", "fails", "passes"]),
        (QUIET, ["no values"] * 4),
        (SILENT, ["no values"] * 4),
        (ELSEWHERE, ["no values"] * 4),
    ],
    ids=["good", "slow", "failing", "too-few-requests", "no-requests", "of-another-namespace"],
)
def test_flagger_lets_a_good_canary_pass_and_no_other(built, stage, about, verdicts):
    assert [flagger_says(stage, built["flagger"], name, about) for name in CHECKS_OF_FLAGGER] == verdicts


@pytest.mark.parametrize(
    ("about", "verdicts"),
    [
        (GOOD, ["Successful", "Successful"]),
        (SLOW, ["Successful", "Failed"]),
        (FAILING, ["Failed", "Successful"]),
        (QUIET, ["Inconclusive"] * 2),
        (SILENT, ["Inconclusive"] * 2),
        (ELSEWHERE, ["Inconclusive"] * 2),
    ],
    ids=["good", "slow", "failing", "too-few-requests", "no-requests", "of-another-namespace"],
)
def test_argo_rollouts_lets_a_good_canary_pass_and_no_other(built, stage, about, verdicts):
    objects = built["argo-rollouts"]
    assert [argo_says(stage, objects, name, about) for name in ("failures", "latency")] == verdicts


def value_for_flagger(stage, built, name, about):
    """The value that a template brings."""
    template = named(built["flagger"], "MetricTemplate", name)["spec"]["query"]
    variables = {"namespace": "serin", "requests": "100", **about}
    ((_, value),) = stage.query(in_go_template(template, "1m", variables))
    return value


def test_the_success_rate_is_the_part_of_responses_below_500(built, stage):
    # Not by a rate: the counter of a status begins with its first response, which no rate can see.
    which = 'route="bad",backend="shop-failing"'
    below_500 = f'sum(serin_requests_total{{{which},code!~"5.."}})'
    ((_, share),) = stage.query(f"100 * {below_500} / sum(serin_requests_total{{{which}}})")
    value = value_for_flagger(stage, built, "serin-success-rate", FAILING)
    assert value == pytest.approx(share, abs=1)
    # It fails every tenth of its requests, though the baseline answers most of those.
    assert value == pytest.approx(90, abs=1.5)


def test_the_latency_is_in_milliseconds(built, stage):
    value = value_for_flagger(stage, built, "serin-latency-p99", SLOW)
    # In the bucket from 500 to 750.
    assert 500 < value < 750


def queries(built):
    """All queries, with what stands in the places of variables."""
    for item in of_kind(built["flagger"], "MetricTemplate"):
        variables = {"namespace": "serin", "route": "shop", "canary": "shop-canary", "requests": "100"}
        yield in_go_template(item["spec"]["query"], "1m", variables)
    template = named(built["argo-rollouts"], "AnalysisTemplate", "serin-canary")
    for metric in resolved(template["spec"]["metrics"], arguments_of(template)):
        yield metric["provider"]["prometheus"]["query"]


def test_queries_ask_only_for_what_there_is(built):
    for query in queries(built):
        assert unknown_names(query) == set(), query


@pytest.mark.parametrize(
    ("old", "new", "about", "verdict"),
    [
        # Without a least number of requests, a canary without any would pass, or bring what is not a number.
        (">= {{ variables.requests }}", ">= 0", QUIET, "passes"),
        ('backend="{{ variables.canary }}"', 'backend!="{{ variables.canary }}"', FAILING, "passes"),
        ("serin_request_failures_total", "serin_request_failure_total", GOOD, "no values"),
        ("100 - 100 *", "1 - 1 *", GOOD, "fails"),
    ],
)
def test_another_query_gives_another_verdict(tools, stage, tmp_path, old, new, about, verdict):
    objects = mistake(tools, tmp_path, TEMPLATES, old, new)
    assert flagger_says(stage, objects, "success-rate", about) == verdict
