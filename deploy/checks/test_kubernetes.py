"""The kustomizations of deploy/kubernetes: that every combination builds into objects that an API server
takes, that scanners find nothing, and that the objects do what their comments say.
"""

import itertools
import json
import re
import shutil
import subprocess

import pytest
import yaml

import manifests
from conftest import DEPLOY, documents
from manifests import KUBERNETES, build, named, of_kind, pod_of
from running import Serin, ask, eventually, program  # noqa: F401

SELECTOR = {"app.kubernetes.io/name": "serin", "app.kubernetes.io/instance": "serin"}
AUTOSCALERS = ["hpa", "hpa hpa-in-flight"]
COMPONENTS = ["namespace", "operators", "prometheus-operator", "sample", "writers"]
OVERLAYS = ["overlays/dev", "overlays/production"]

# Files that the tests break.
BUDGET = "base/poddisruptionbudget.yaml"
KUSTOMIZATION = "base/kustomization.yaml"
CONFIG = "base/config/serin.yaml"
DEPLOYMENT = "base/deployment.yaml"
SERVICE = "base/service.yaml"
POLICY = "base/networkpolicy.yaml"
MONITOR = "components/prometheus-operator/servicemonitor.yaml"
METRICS = "components/prometheus-operator/service.yaml"
RULE = "components/prometheus-operator/prometheusrule.yaml"
SCALER = "components/hpa/hpa.yaml"
ROLE = "components/operators/role.yaml"
BINDING = "components/operators/rolebinding.yaml"


def kustomization(root, components):
    """A directory in a copy of deploy/kubernetes with the base and these components."""
    directory = root / "combinations" / ("-".join(components) or "base")
    directory.mkdir(parents=True)
    content = {
        "namespace": "serin",
        "resources": ["../../base"],
        "components": [f"../../components/{name}" for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return directory


def combinations():
    """Every choice of components, with no autoscaler or one."""
    for size in range(len(COMPONENTS) + 1):
        for chosen in itertools.combinations(COMPONENTS, size):
            for autoscaler in ["", *AUTOSCALERS]:
                yield [*chosen, *autoscaler.split()]


@pytest.fixture(scope="session")
def combined(tools, tmp_path_factory):
    """The objects of every combination of components, by their names."""
    root = tmp_path_factory.mktemp("combined") / "kubernetes"
    shutil.copytree(KUBERNETES, root)
    return {" ".join(chosen): build(tools, kustomization(root, chosen)) for chosen in combinations()}


@pytest.fixture(scope="session")
def overlays(tools):
    return {name: build(tools, KUBERNETES / name) for name in OVERLAYS}


@pytest.fixture(scope="session")
def everything(combined, overlays):
    """All that can be built, by a name that says what it is."""
    return combined | overlays


@pytest.fixture
def broken(tools, tmp_path):
    """Builds a copy of deploy/kubernetes in which something is not as it should be."""

    def build_broken(file, old, new):
        root = tmp_path / "kubernetes"
        shutil.copytree(KUBERNETES, root)
        text = (root / file).read_text()
        assert old in text, f"{file} has no {old!r} any more"
        (root / file).write_text(text.replace(old, new))
        return build(tools, kustomization(root, [*COMPONENTS, *AUTOSCALERS[-1].split()]))

    return build_broken


# -------------------------------------------------------------------------- what others say about the objects


def test_every_combination_of_components_builds(combined):
    assert len(combined) == 2 ** len(COMPONENTS) * (len(AUTOSCALERS) + 1)
    for name, objects in combined.items():
        keys = [
            (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects
        ]
        assert len(keys) == len(set(keys)), name


def test_every_component_is_among_the_combinations():
    known = {*COMPONENTS, *" ".join(AUTOSCALERS).split()}
    assert {path.name for path in (KUBERNETES / "components").iterdir()} == known


@pytest.fixture
def beside(tools, tmp_path):
    """Builds an overlay of production, or of something else, with components of its own."""

    def build_beside(resource, *components):
        root = tmp_path / "kubernetes"
        shutil.copytree(KUBERNETES, root)
        directory = kustomization(root, components)
        file = directory / "kustomization.yaml"
        content = yaml.safe_load(file.read_text()) | {"resources": [f"../../{resource}"]}
        file.write_text(yaml.safe_dump(content))
        return build(tools, directory)

    return build_beside


def test_an_overlay_of_production_can_scale_by_requests_in_flight_as_well(beside, combined):
    objects = beside("overlays/production", "hpa-in-flight")
    spec = named(objects, "HorizontalPodAutoscaler")["spec"]
    assert spec == named(combined["hpa hpa-in-flight"], "HorizontalPodAutoscaler")["spec"]
    assert spec["metrics"][0] == named(combined["hpa"], "HorizontalPodAutoscaler")["spec"]["metrics"][0]
    assert "replicas" not in named(objects, "Deployment")["spec"]


def test_what_says_no_replicas_can_be_scaled(tools, tmp_path):
    root = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, root)
    deployment = root / DEPLOYMENT
    text = deployment.read_text()
    assert "  replicas: 3\n" in text
    deployment.write_text(text.replace("  replicas: 3\n", ""))
    objects = build(tools, kustomization(root, ["hpa"]))
    assert "replicas" not in named(objects, "Deployment")["spec"]


def test_requests_in_flight_without_an_autoscaler_are_refused(beside):
    with pytest.raises(AssertionError, match="no resource matches strategic merge patch"):
        beside("base", "hpa-in-flight")


def test_every_manifest_is_valid_for_its_kind(tools, everything, tmp_path):
    objects = list(itertools.chain.from_iterable(everything.values()))
    kinds = {item["kind"] for item in objects}
    assert {"HorizontalPodAutoscaler", "NetworkPolicy", "PrometheusRule", "ServiceMonitor"} <= kinds
    assert manifests.invalid(tools, objects, tmp_path) == []


# A file, what is replaced in it and by what, and what the validator then says.
MISTAKES = [
    (DEPLOYMENT, "maxUnavailable: 0", "maxUnavailble: 0", "'maxUnavailble' was unexpected"),
    (DEPLOYMENT, "readOnlyRoot", "readonlyRoot", "'readonlyRootFilesystem' was unexpected"),
    (POLICY, "podSelector:\n    match", "podSelectors:\n    match", "'podSelectors' was unexpected"),
    (SERVICE, "port: 80\n", "port: http\n", "'http' is not of type 'integer'"),
    (SCALER, "minReplicas: 4", "minReplicas: four", "'four' is not of type 'integer'"),
    (BUDGET, "policy/v1", "policy/v1beta1", "Couldn't find schema"),
    (MONITOR, "scrapeTimeout", "scrapeTimeOut", "/scrapeTimeOut is not known"),
    (MONITOR, "interval: 15s", "interval: often", "pattern"),
    (RULE, "for: 1m\n", "for: soon\n", "pattern"),
]


@pytest.mark.parametrize(("file", "old", "new", "complaint"), MISTAKES)
def test_a_mistake_in_a_manifest_is_found(tools, broken, tmp_path, file, old, new, complaint):
    complaints = manifests.invalid(tools, broken(file, old, new), tmp_path)
    assert any(complaint in found for found in complaints), complaints


def test_scanners_find_nothing(tools, everything, tmp_path):
    """Of the same object in several builds one is scanned, since that takes its time."""
    objects = list(itertools.chain.from_iterable(everything.values()))
    distinct = {json.dumps(item, sort_keys=True): item for item in objects}
    assert manifests.insecure(tools, list(distinct.values()), tmp_path) == []


def test_scanners_find_what_is_insecure(tools, broken, tmp_path):
    objects = broken("base/deployment.yaml", "allowPrivilegeEscalation: false", "privileged: true")
    complaints = "\n".join(manifests.insecure(tools, [named(objects, "Deployment")], tmp_path))
    assert "KSV017 HIGH" in complaints, complaints
    assert "CKV_K8S_16: Container should not be privileged" in complaints, complaints


# -------------------------------------------------------------------- what the objects must do, and do not do
# Each function says what is wrong with a set of objects. One for which a set has no object says nothing.


def has_no_hot_reload(objects):
    """A file that is mounted alone stays the old one, and so does one whose name changes with its content."""
    _, spec = pod_of(named(objects, "Deployment"))
    mounts = {mount["name"]: mount for container in spec["containers"] for mount in container["volumeMounts"]}
    yield from (f"{name} is mounted by subPath" for name, mount in mounts.items() if "subPath" in mount)
    if mounts["config"]["mountPath"] != "/etc/serin":
        yield "the configuration is not mounted at /etc/serin"
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "config"]
    sources = [source.get("configMap", {}).get("name") for source in volume["projected"]["sources"]]
    if sources[:2] != ["serin-lists", "serin-config"]:
        yield f"a list can take the place of serin.yaml: {sources}"
    if {"serin-lists", "serin-config"} - {item["metadata"]["name"] for item in of_kind(objects, "ConfigMap")}:
        yield "a ConfigMap has another name"


def is_restarted_for_a_bad_release(objects):
    container = pod_of(named(objects, "Deployment"))[1]["containers"][0]
    for probe, path in {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}.items():
        if container.get(f"{probe}Probe", {}).get("httpGet") != {"path": path, "port": "admin"}:
            yield f"the {probe} probe does not ask the admin listener for {path}"


def loses_requests_in_an_update(objects):
    deployment = named(objects, "Deployment")
    update = deployment["spec"]["strategy"]["rollingUpdate"]
    if update["maxUnavailable"] != 0 or not update["maxSurge"]:
        yield "an update takes a pod away before it has another"
    config = yaml.safe_load(named(objects, "ConfigMap", "serin-config")["data"]["serin.yaml"])
    timeout = int(config["shutdown"]["timeout"].removesuffix("s"))
    # Behind the timeout, the last spans are exported and the ends of logs written, which takes 3 s at most.
    if pod_of(deployment)[1]["terminationGracePeriodSeconds"] <= timeout + 3:
        yield "a pod is killed before shutdown.timeout is over"


def selects_nobody(objects):
    deployment = named(objects, "Deployment")
    labels, spec = pod_of(deployment)
    selectors = {
        "Deployment": deployment["spec"]["selector"]["matchLabels"],
        "Service": named(objects, "Service")["spec"]["selector"],
        "NetworkPolicy": named(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for constraint in spec["topologySpreadConstraints"]:
        selectors[constraint["topologyKey"]] = constraint["labelSelector"]["matchLabels"]
    for budget in of_kind(objects, "PodDisruptionBudget"):
        selectors["PodDisruptionBudget"] = budget["spec"]["selector"]["matchLabels"]
    for name, selector in selectors.items():
        if selector != SELECTOR or not selector.items() <= labels.items():
            yield f"{name} selects {selector}, and pods have {labels}"
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) != ("Deployment", "serin"):
            yield "the autoscaler scales something else"


def scrapes_nobody_or_twice(objects):
    annotations = named(objects, "Deployment")["spec"]["template"]["metadata"].get("annotations") or {}
    monitors = of_kind(objects, "ServiceMonitor")
    if bool(monitors) == ("prometheus.io/scrape" in annotations):
        yield "pods are scraped by annotation and ServiceMonitor, or by neither"
    for monitor in monitors:
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = [
            service
            for service in of_kind(objects, "Service")
            if selector.items() <= service["metadata"]["labels"].items()
        ]
        ports = [port["name"] for service in services for port in service["spec"]["ports"]]
        (endpoint,) = monitor["spec"]["endpoints"]
        if ports != [endpoint["port"]]:
            yield f"the ServiceMonitor finds the ports {ports}"
        if not endpoint.get("honorLabels"):
            yield "the operator's label `endpoint` takes the place of Serin's"


def exposes_the_admin_listener(objects):
    for service in of_kind(objects, "Service"):
        has_address = service["spec"].get("clusterIP") != "None"
        targets = [port["targetPort"] for port in service["spec"]["ports"]]
        if has_address and targets != ["http"]:
            yield f"the Service {service['metadata']['name']} leads to {targets}"


def may_do_what_it_need_not(objects):
    for pod in [pod_of(item)[1] for item in of_kind(objects, "Deployment")]:
        if pod.get("automountServiceAccountToken") is not False:
            yield "a pod has a token for the API server"
    if named(objects, "ServiceAccount")["automountServiceAccountToken"]:
        yield "the account gives pods a token"
    subjects = [subject for item in of_kind(objects, "RoleBinding") for subject in item["subjects"]]
    yield from (f"a Role is bound to {subject}" for subject in subjects if subject["kind"] != "Group")
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            writes = set(rule["verbs"]) - {"get", "list", "watch"}
            is_narrow = "resourceNames" in rule or rule["resources"] == ["pods/portforward"]
            if "*" in str(rule) or "secrets" in rule["resources"] or writes and not is_narrow:
                yield f"a Role allows {rule}"


def fights_the_autoscaler(objects):
    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    if bool(scalers) == ("replicas" in named(objects, "Deployment")["spec"]):
        yield "the Deployment says how many replicas there are, and so does an autoscaler; or nobody does"


RULES = [
    has_no_hot_reload,
    is_restarted_for_a_bad_release,
    loses_requests_in_an_update,
    selects_nobody,
    scrapes_nobody_or_twice,
    exposes_the_admin_listener,
    may_do_what_it_need_not,
    fights_the_autoscaler,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_that_can_be_built(everything, rule):
    for name, objects in everything.items():
        assert list(rule(objects)) == [], name


ETC = "mountPath: /etc/serin\n"
# A rule, a file, what is replaced in it and by what, and what the rule then says.
SLIPS = [
    (has_no_hot_reload, DEPLOYMENT, ETC, f"{ETC}              subPath: a\n", "by subPath"),
    (has_no_hot_reload, DEPLOYMENT, "name: serin-lists", "name: serin-config", "a list can take"),
    (has_no_hot_reload, KUSTOMIZATION, "SuffixHash: true", "SuffixHash: false", "a list can take"),
    (is_restarted_for_a_bad_release, DEPLOYMENT, "path: /livez", "path: /readyz", "the liveness probe"),
    (is_restarted_for_a_bad_release, DEPLOYMENT, "port: admin", "port: http", "the readiness probe"),
    (loses_requests_in_an_update, DEPLOYMENT, "Unavailable: 0", "Unavailable: 1", "takes a pod away"),
    (loses_requests_in_an_update, DEPLOYMENT, "Seconds: 30", "Seconds: 25", "is killed before"),
    (loses_requests_in_an_update, CONFIG, "timeout: 25s", "timeout: 60s", "is killed before"),
    (selects_nobody, BUDGET, "instance: serin", "instance: other", "PodDisruptionBudget selects"),
    (selects_nobody, SERVICE, "name: serin\n    app", "name: shop\n    app", "Service selects"),
    (selects_nobody, SCALER, "Deployment\n    name: serin", "Deployment\n    name: shop", "something else"),
    (scrapes_nobody_or_twice, MONITOR, "port: admin", "port: http", "finds the ports"),
    (scrapes_nobody_or_twice, MONITOR, "honorLabels: true", "honorLabels: false", "takes the place"),
    (scrapes_nobody_or_twice, METRICS, "component: metrics", "component: admin", "finds the ports"),
    (exposes_the_admin_listener, SERVICE, "targetPort: http", "targetPort: admin", "leads to ['admin']"),
    (may_do_what_it_need_not, ROLE, "resourceNames: [serin-config", "# [", "a Role allows"),
    (may_do_what_it_need_not, BINDING, "kind: Group", "kind: ServiceAccount", "a Role is bound to"),
    (may_do_what_it_need_not, DEPLOYMENT, "automountServiceAccountToken: false", "", "has a token"),
    (fights_the_autoscaler, "components/hpa/kustomization.yaml", "replicas: null", "replicas: 3", "how many"),
]


@pytest.mark.parametrize(("rule", "file", "old", "new", "complaint"), SLIPS)
def test_a_slip_is_found(broken, rule, file, old, new, complaint):
    try:
        complaints = list(rule(broken(file, old, new)))
    except AssertionError as error:
        # What cannot even be built.
        complaints = [str(error)]
    assert any(complaint in found for found in complaints), complaints


def test_a_base_without_an_autoscaler_has_three_replicas(combined):
    assert named(combined[""], "Deployment")["spec"]["replicas"] == 3


def test_the_base_runs_the_image_of_this_version(combined):
    """Production runs what a pipeline has put there."""
    deployment = named(combined[""], "Deployment")
    (container,) = pod_of(deployment)[1]["containers"]
    assert container["image"] == f"ghcr.io/serin-proxy/serin:{manifests.release()}"
    assert deployment["metadata"]["labels"]["app.kubernetes.io/version"] == manifests.release()


# ---------------------------------------------------------------------------------------------------- scaling


def seconds_to_grow(scaler):
    """How long the policies need from the fewest replicas to the most, when the load is there at once."""
    spec = scaler["spec"]
    grow = spec["behavior"]["scaleUp"]
    assert grow["selectPolicy"] == "Max"
    assert len({policy["periodSeconds"] for policy in grow["policies"]}) == 1
    replicas, seconds = spec["minReplicas"], grow["stabilizationWindowSeconds"]
    while True:
        steps = {
            policy["type"]: policy["value"] if policy["type"] == "Pods" else replicas * policy["value"] // 100
            for policy in grow["policies"]
        }
        replicas += max(steps.values())
        if replicas >= spec["maxReplicas"]:
            return seconds
        seconds += grow["policies"][0]["periodSeconds"]


@pytest.mark.parametrize("component", AUTOSCALERS)
def test_the_autoscaler_goes_from_4_to_10_within_3_minutes(combined, component):
    scaler = named(combined[component], "HorizontalPodAutoscaler")
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (4, 10)
    cpu = scaler["spec"]["metrics"][0]["resource"]
    assert cpu == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    (container,) = pod_of(named(combined[component], "Deployment"))[1]["containers"]
    assert "cpu" in container["resources"]["requests"]
    # A minute for metrics that are a while behind, and half of one until a pod is ready.
    assert seconds_to_grow(scaler) + 90 <= 180


def test_the_autoscaler_shrinks_slowly(combined):
    shrink = named(combined["hpa"], "HorizontalPodAutoscaler")["spec"]["behavior"]["scaleDown"]
    assert shrink["stabilizationWindowSeconds"] >= 300
    assert [(policy["type"], policy["value"]) for policy in shrink["policies"]] == [("Pods", 1)]


def adapter_rule():
    (values,) = documents(KUBERNETES / "components" / "hpa-in-flight" / "prometheus-adapter.yaml")
    (rule,) = values["rules"]["custom"]
    return rule


def test_the_metric_of_the_autoscaler_is_the_one_that_the_adapter_offers(combined):
    (metric,) = [
        metric["pods"]
        for metric in named(combined["hpa hpa-in-flight"], "HorizontalPodAutoscaler")["spec"]["metrics"]
        if metric["type"] == "Pods"
    ]
    assert metric["metric"]["name"] == adapter_rule()["name"]["as"] == "serin_requests_in_flight"


def test_the_adapter_sums_what_is_in_flight_in_each_pod(tools, tmp_path):
    """The query as the adapter asks it, on what two pods have, told by Prometheus itself."""
    rule = adapter_rule()
    query = rule["metricsQuery"]
    parts = {"Series": rule["name"]["as"], "LabelMatchers": 'namespace="serin",pod=~"a|b"', "GroupBy": "pod"}
    for part, text in parts.items():
        query = query.replace(f"<<.{part}>>", text)
    series = {
        'namespace="serin",pod="a",route="shop",backend="stable"': "300+0x20",
        'namespace="serin",pod="a",route="shop",backend="canary"': "20+0x20",
        'namespace="serin",pod="b",route="shop",backend="stable"': "240+0x20",
        'namespace="other",pod="b",route="shop",backend="stable"': "1000+0x20",
    }
    expected = [{"labels": '{pod="a"}', "value": 320}, {"labels": '{pod="b"}', "value": 240}]
    test = {
        "interval": "15s",
        "input_series": [
            {"series": f"{rule['name']['as']}{{{labels}}}", "values": values}
            for labels, values in series.items()
        ],
        "promql_expr_test": [{"expr": query, "eval_time": "285s", "exp_samples": expected}],
    }
    file = tmp_path / "adapter.yaml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    tools.passes("promtool", "test", "rules", file)
    assert re.fullmatch(r'serin_requests_in_flight\{namespace!="",pod!=""\}', rule["seriesQuery"])


# ---------------------------------------------------------------------------------------------------- network


def fits(selector, labels):
    return selector is None or selector.get("matchLabels", {}).items() <= labels.items()


def fits_peer(peer, namespace, pod):
    if "ipBlock" in peer:
        return False
    return fits(peer["namespaceSelector"], namespace) and fits(peer.get("podSelector"), pod)


def is_allowed(policy, direction, port, namespace=None, pod=None):
    """Whether the policy lets a connection through, to or from a pod with these labels in a namespace with
    these. An address outside of the cluster has neither.
    """
    for rule in policy["spec"].get(direction, []):
        if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
            continue
        peers = rule.get("from" if direction == "ingress" else "to")
        if peers is None:
            return True
        if namespace is not None and any(fits_peer(peer, namespace, pod or {}) for peer in peers):
            return True
    return False


MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
SHOP = {"kubernetes.io/metadata.name": "shop"}
INGRESS = {"kubernetes.io/metadata.name": "ingress-nginx", "serin.dev/client": "true"}
SYSTEM = {"kubernetes.io/metadata.name": "kube-system"}


def test_who_may_reach_serin_and_whom_it_may_reach(everything):
    for name, objects in everything.items():
        policy = named(objects, "NetworkPolicy")
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"], name
        assert is_allowed(policy, "ingress", 8080, INGRESS)
        assert is_allowed(policy, "ingress", 9901, MONITORING)
        assert not is_allowed(policy, "ingress", 9901, SHOP)
        assert not is_allowed(policy, "ingress", 9901, INGRESS)
        assert not is_allowed(policy, "ingress", 9901)
        assert is_allowed(policy, "egress", 53, SYSTEM, {"k8s-app": "kube-dns"})
        assert not is_allowed(policy, "egress", 53, SYSTEM, {"k8s-app": "metrics-server"})
        assert not is_allowed(policy, "egress", 53)
        assert is_allowed(policy, "egress", 8080, SHOP, {"serin.dev/backend": "true"})
        assert not is_allowed(policy, "egress", 8080, SHOP, {})
        assert is_allowed(policy, "egress", 4317, MONITORING)
        assert is_allowed(policy, "egress", 4318, MONITORING)
        assert not is_allowed(policy, "egress", 9090, MONITORING)
        assert not is_allowed(policy, "egress", 443)


def test_names_come_from_the_caches_of_nodes_as_well(everything):
    """Those have addresses and no labels, and listen on the same one everywhere."""
    for name, objects in everything.items():
        egress = named(objects, "NetworkPolicy")["spec"]["egress"]
        (rule,) = [rule for rule in egress if {"port": 53, "protocol": "UDP"} in rule.get("ports", [])]
        assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"], name
        blocks = [peer for rule in egress for peer in rule["to"] if "ipBlock" in peer]
        assert len(blocks) == 1, name


def test_in_production_only_labelled_namespaces_send_requests(combined, overlays):
    assert is_allowed(named(combined[""], "NetworkPolicy"), "ingress", 8080)
    policy = named(overlays["overlays/production"], "NetworkPolicy")
    assert not is_allowed(policy, "ingress", 8080)
    assert not is_allowed(policy, "ingress", 8080, SHOP)
    assert is_allowed(policy, "ingress", 8080, INGRESS)


def test_an_open_policy_is_found(broken):
    policy = named(broken("base/networkpolicy.yaml", "from:", "to:"), "NetworkPolicy")
    assert is_allowed(policy, "ingress", 9901)


# --------------------------------------------------------------------------------------------------- overlays


def test_production_spreads_protects_and_does_not_fix_the_number_of_replicas(overlays):
    objects = overlays["overlays/production"]
    _, spec = pod_of(named(objects, "Deployment"))
    host, zone = spec["topologySpreadConstraints"]
    assert (host["topologyKey"], host["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "DoNotSchedule")
    assert host["nodeTaintsPolicy"] == "Honor"
    assert zone["topologyKey"] == "topology.kubernetes.io/zone"
    assert zone["whenUnsatisfiable"] == "ScheduleAnyway"
    assert spec["priorityClassName"] == named(objects, "PriorityClass")["metadata"]["name"]
    assert named(objects, "HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 4
    assert named(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_development_is_small_and_talkative(overlays):
    objects = overlays["overlays/dev"]
    assert named(objects, "Deployment")["spec"]["replicas"] == 1
    assert of_kind(objects, "PodDisruptionBudget") == []
    container = pod_of(named(objects, "Deployment"))[1]["containers"][0]
    assert container["env"] == [{"name": "SERIN_LOG", "value": "debug"}]
    assert container["resources"]["requests"]["cpu"] == "50m"


def test_both_overlays_are_in_a_namespace_that_lets_only_restricted_pods_in(overlays):
    for name, namespace in {"overlays/dev": "serin-dev", "overlays/production": "serin"}.items():
        found = named(overlays[name], "Namespace", namespace)
        assert found["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        cluster_wide = ("Namespace", "PriorityClass")
        others = {
            item["metadata"].get("namespace") for item in overlays[name] if item["kind"] not in cluster_wide
        }
        assert others == {namespace}


def test_every_pod_is_as_restricted_as_its_namespace_wants(everything):
    for name, objects in everything.items():
        for _, spec in map(pod_of, of_kind(objects, "Deployment")):
            context = spec["securityContext"]
            assert context["runAsNonRoot"] and context["runAsUser"] > 10000, name
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for container in spec["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }, name


def endpoints(objects):
    config = yaml.safe_load(named(objects, "ConfigMap", "serin-config")["data"]["serin.yaml"])
    return [endpoint for backend in config["backends"] for endpoint in backend["endpoints"]]


def test_the_sample_answers_to_the_names_in_the_configuration(overlays):
    objects = overlays["overlays/dev"]
    for endpoint in endpoints(objects):
        name, port = endpoint.split(":")
        service = named(objects, "Service", name)
        assert service["spec"]["clusterIP"] == "None"
        labels, spec = pod_of(named(objects, "Deployment", name))
        assert service["spec"]["selector"].items() <= labels.items()
        assert spec["containers"][0]["ports"] == [{"name": "http", "containerPort": int(port)}]
        assert f"-listen=:{port}" in spec["containers"][0]["args"]
        assert is_allowed(named(objects, "NetworkPolicy"), "egress", int(port), {}, labels)
        assert is_allowed(named(objects, "NetworkPolicy", "shop"), "ingress", int(port), {}, SELECTOR)
        assert not is_allowed(named(objects, "NetworkPolicy", "shop"), "ingress", int(port), {}, {})


# ---------------------------------------------------------------------------------------- Serin's own opinion


@pytest.mark.parametrize("name", ["", *OVERLAYS])
def test_serin_accepts_the_files_as_they_are_mounted(program, everything, tmp_path, name):
    directory = tmp_path / "etc" / "serin"
    manifests.lay_out(directory, manifests.mounted_files(everything[name]))
    done = subprocess.run([program, "check", str(directory / "serin.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["base", *OVERLAYS[1:]])
def test_serin_accepts_the_files_as_they_are_in_the_repository(program, tmp_path, name):
    directory = tmp_path / "config"
    shutil.copytree(KUBERNETES / name / "config", directory)
    (directory / "pipeline.token").write_text("0123456789abcdef" * 4)
    done = subprocess.run([program, "check", str(directory / "serin.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_serin_refuses_a_route_to_a_backend_that_is_not_there(program, broken, tmp_path):
    objects = broken("base/config/serin.yaml", "{ name: shop-canary, weight: 5 }", "{ name: shop-canry }")
    manifests.lay_out(tmp_path / "serin", manifests.mounted_files(objects))
    file = tmp_path / "serin" / "serin.yaml"
    done = subprocess.run([program, "check", str(file)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "unknown backend `shop-canry`" in done.stderr


class Pod(Serin):
    """Serin with the files of a pod, mounted as the kubelet does it, and on the loopback interface."""

    def __init__(self, program, directory, files):
        self.files = files
        self.directory = directory / "serin"
        self.config = self.directory / "serin.yaml"
        self.output = directory / "serin.log"
        self.command = [program, "--log-format", "json", "run", "--config", str(self.config)]
        self.mount()
        self.begin()

    def mount(self, **changed):
        self.files |= changed
        manifests.lay_out(self.directory, self.files)


@pytest.fixture
def pod(program, overlays, tmp_path):
    """A pod of production."""
    files = manifests.mounted_files(overlays["overlays/production"])
    (tmp_path / "state").mkdir()
    replacements = {
        r"0\.0\.0\.0:\d+": "127.0.0.1:0",
        r"shop-\w+\.shop\.svc\.cluster\.local\.:8080": "127.0.0.1:9",
        "/var/lib/serin": str(tmp_path / "state"),
    }
    for pattern, here in replacements.items():
        files["serin.yaml"], count = re.subn(pattern, here, files["serin.yaml"])
        assert count, pattern
    pod = Pod(program, tmp_path, files)
    yield pod
    pod.stop()


def test_a_pod_follows_its_configmaps(pod):
    assert pod.weights() == {"shop-stable": 95, "shop-canary": 5}
    text = pod.files["serin.yaml"].replace("weight: 95", "weight: 80").replace("weight: 5 ", "weight: 20 ")
    pod.mount(**{"serin.yaml": text, "beta-testers.txt": "user-1\nuser-2\nuser-3\n"})
    eventually("new weights", lambda: pod.weights() == {"shop-stable": 80, "shop-canary": 20})
    entries = b'serin_user_list_entries{list="beta-testers"} 3\n'
    eventually("a new list", lambda: entries in ask(f"http://{pod.admin}/metrics"))


def test_a_pod_follows_its_secret_and_keeps_what_is_set(pod):
    token = "fedcba9876543210" * 4
    pod.mount(**{"pipeline.token": token})

    def is_saved():
        body = b'{"weights": {"shop-stable": 1, "shop-canary": 1}}'
        headers = {"authorization": f"Bearer {token}"}
        return pod.ask("/api/v1/routes/shop/weights", "PUT", body, headers).get("saved")

    eventually("a new token", is_saved)


# ------------------------------------------------------------------------------------------------------ rules


def test_the_rules_for_the_operator_are_those_of_prometheus(tmp_path):
    manifests.generated(tmp_path)
    file = "kubernetes/components/prometheus-operator/prometheusrule.yaml"
    assert (tmp_path / file).read_text() == (DEPLOY / file).read_text(), f"run {manifests.GENERATE}"


def test_prometheus_accepts_the_rules_for_the_operator(tools, tmp_path):
    (rule,) = documents(KUBERNETES / "components" / "prometheus-operator" / "prometheusrule.yaml")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    tools.passes("promtool", "check", "rules", "--lint-fatal", file)
    names = [group["name"] for group in rule["spec"]["groups"]]
    assert names and len(names) == len(set(names))
