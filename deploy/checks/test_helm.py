"""The Helm chart: that it renders what deploy/kubernetes has, with all that its values can change, and
refuses values that cannot be meant. Rendered by Helm itself, as a library.
"""

import json
import pathlib
import shutil
import tarfile

import helm_python as helm
import pytest
import yaml

import manifests
from conftest import DEPLOY
from manifests import CHART, KUBERNETES, build, named, of_kind, pod_of

# What the chart says of itself.
OWN_LABELS = {"helm.sh/chart", "app.kubernetes.io/managed-by"}

# The values that stand for a component of the kustomizations.
PARITY = {
    "": {},
    "hpa": {"autoscaling": {"enabled": True}},
    "hpa hpa-in-flight": {"autoscaling": {"enabled": True, "inFlight": {"enabled": True}}},
    "prometheus-operator": {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}},
    "writers": {"writers": {"existingSecret": "serin-writers"}},
}

EVERYTHING = {
    "image": {"digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "lists": {"files": {"partners.txt": "user-1\n"}},
    "writers": {"existingSecret": "serin-writers"},
    "env": [{"name": "SERIN_LOG", "value": "debug"}],
    "listeners": [
        {"name": "http", "port": 8080, "servicePort": 80, "appProtocol": "http"},
        {"name": "https", "port": 8443, "servicePort": 443},
    ],
    "service": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "autoscaling": {"enabled": True, "inFlight": {"enabled": True}},
    "podDisruptionBudget": {"maxUnavailable": "25%"},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"serin.dev/client": "true"}}}],
        "extraIngress": [{"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}],
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "platform"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "proxies", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "priorityClassName": "serin",
    "extraVolumes": [{"name": "lists", "persistentVolumeClaim": {"claimName": "lists"}}],
    "extraVolumeMounts": [{"name": "lists", "mountPath": "/srv/lists", "readOnly": True}],
    "test": {"path": "/health", "host": "shop.example.com"},
}


def render(values=None, name="serin", namespace="serin", chart=CHART):
    """The chart's templates by their path in it."""
    with helm.Chart.load(chart) as loaded:
        rendered = loaded.render(values or {}, name=name, namespace=namespace)
    return {path.removeprefix("serin/templates/"): text for path, text in rendered.items()}


def objects_of(rendered, with_test=False):
    """What is rendered, without the test pod, which is there only for `helm test`."""
    return [
        item
        for path, text in rendered.items()
        if path.endswith(".yaml") and (with_test or not path.startswith("tests/"))
        for item in yaml.safe_load_all(text)
        if item
    ]


def objects(values=None, **options):
    return objects_of(render(values, **options))


@pytest.fixture
def copy(tmp_path):
    """A copy of the chart, to break."""
    return pathlib.Path(shutil.copytree(CHART, tmp_path / "serin"))


def replace(file, old, new):
    text = file.read_text()
    assert old in text, f"{file.name} has no {old!r} any more"
    file.write_text(text.replace(old, new))


# ----------------------------------------------------------------------------- the same as the kustomizations


def without_labels(item, ignored):
    labels = {key: value for key, value in item["metadata"]["labels"].items() if key not in ignored}
    return item | {"metadata": item["metadata"] | {"labels": labels}}


def by_name(objects, ignored):
    return {f"{item['kind']} {item['metadata']['name']}": without_labels(item, ignored) for item in objects}


def component(tools, directory, name):
    """What is built of the base with these components, if any."""
    shutil.copytree(KUBERNETES, directory)
    overlay = {
        "namespace": "serin",
        "resources": ["../base"],
        "components": [f"../components/{part}" for part in name.split()],
    }
    (directory / "overlay").mkdir()
    (directory / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return build(tools, directory / "overlay")


@pytest.mark.parametrize("name", PARITY)
def test_it_renders_what_kustomize_builds(tools, tmp_path, name):
    expected = component(tools, tmp_path / "kubernetes", name)
    # Components leave the version to the base.
    ignored = OWN_LABELS | ({"app.kubernetes.io/version"} if name else set())
    rendered = by_name(objects(PARITY[name]), ignored)
    for key, item in by_name(expected, ignored).items():
        annotations = item.get("spec", {}).get("template", {}).get("metadata", {})
        if annotations.get("annotations") == {}:
            del annotations["annotations"]
        assert rendered.pop(key, None) == item
    assert rendered == {}


def test_nothing_but_its_own_labels_is_left_out_of_the_comparison():
    for item in objects(EVERYTHING):
        assert item["metadata"]["labels"]["helm.sh/chart"] == f"serin-{manifests.release()}"
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert item["metadata"]["namespace"] == "serin"


def test_another_replica_or_another_file_is_a_difference(tools, tmp_path, copy):
    expected = by_name(component(tools, tmp_path / "kubernetes", ""), OWN_LABELS)
    replace(copy / "values.yaml", "replicas: 3", "replicas: 2")
    replace(copy / "values.yaml", "weight: 95", "weight: 96")
    rendered = by_name(objects(chart=copy), OWN_LABELS)
    different = {key for key in expected if expected[key] != rendered[key]}
    assert different == {"Deployment serin", "ConfigMap serin-config"}


def test_its_rules_are_those_of_prometheus(tmp_path):
    manifests.generated(tmp_path)
    made = {file.name: file.read_bytes() for file in (tmp_path / "helm/serin/files/rules").iterdir()}
    there = {file.name: file.read_bytes() for file in (CHART / "files/rules").iterdir()}
    assert made == there, f"run {manifests.GENERATE.relative_to(DEPLOY.parent)}"


# -------------------------------------------------------------------------------------------- what others say


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_lint_has_nothing_against_it(values):
    report = helm.lint(CHART, values, strict=True)
    # An icon is recommended, which is severity 1.
    assert report["errors"] == [] and all(message["severity"] < 2 for message in report["messages"]), report


def test_lint_finds_a_broken_template(copy):
    replace(copy / "templates" / "service.yaml", "{{- end }}", "")
    assert any("service.yaml" in error for error in helm.lint(copy)["errors"])


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_manifest_is_valid_for_its_kind(tools, tmp_path, values):
    rendered = objects_of(render(values), with_test=True)
    assert manifests.invalid(tools, rendered, tmp_path) == []


def test_a_misspelt_field_is_found(tools, tmp_path, copy):
    replace(copy / "templates" / "servicemonitor.yaml", "jobLabel", "joblabel")
    replace(copy / "templates" / "deployment.yaml", "enableServiceLinks", "enableServiceLink")
    complaints = "\n".join(
        manifests.invalid(tools, objects(PARITY["prometheus-operator"], chart=copy), tmp_path)
    )
    assert "/spec/joblabel is not known" in complaints
    assert "'enableServiceLink' was unexpected" in complaints


def test_scanners_find_nothing(tools, tmp_path):
    rendered = objects_of(render(), with_test=True) + objects_of(
        render(EVERYTHING, name="all"), with_test=True
    )
    assert manifests.insecure(tools, rendered, tmp_path) == []


# ----------------------------------------------------------------------------------------------------- values

REFUSED = [
    ({"replica": 3}, "replica"),
    ({"replicas": "three"}, "replicas"),
    ({"replicas": -1}, "replicas"),
    ({"image": {"tag": "latest"}}, "image/tag"),
    ({"image": {"digest": "sha256:abc"}}, "image/digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, "image/pullPolicy"),
    ({"config": {"text": {"listeners": []}}}, "config/text"),
    ({"config": {"existingConfigMap": "Not_A_Name"}}, "config/existingConfigMap"),
    ({"lists": {"files": {"serin.yaml": "x"}}}, "propertyName 'serin.yaml'"),
    ({"lists": {"files": {"lists/a.txt": "x"}}}, "propertyName 'lists/a.txt'"),
    ({"listeners": []}, "listeners"),
    ({"listeners": [{"name": "admin", "port": 9901, "servicePort": 9901}]}, "listeners/0/name"),
    ({"listeners": [{"name": "http", "port": 80800, "servicePort": 80}]}, "listeners/0/port"),
    ({"service": {"type": "ExternalName"}}, "service/type"),
    ({"resources": {"limit": {"memory": "1Gi"}}}, "resources"),
    ({"autoscaling": {"enabled": "yes"}}, "autoscaling/enabled"),
    ({"autoscaling": {"cpuUtilization": 700}}, "autoscaling/cpuUtilization"),
    ({"podDisruptionBudget": {"maxUnavailable": 0}}, "podDisruptionBudget/maxUnavailable"),
    ({"networkPolicy": {"clients": [{"namespace": "ingress"}]}}, "networkPolicy/clients/0"),
    ({"serviceMonitor": {"interval": "often"}}, "serviceMonitor/interval"),
    ({"podAnnotations": {"a": 1}}, "podAnnotations/a"),
    ({"topologySpreadConstraints": [{"topologyKey": "zone"}]}, "topologySpreadConstraints/0"),
    ({"extraVolumes": [{"name": "config"}]}, "extraVolumes/0/name"),
    ({"test": {"path": "health"}}, "test/path"),
]


@pytest.mark.parametrize(("values", "where"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_values_that_cannot_be_meant_are_refused(values, where):
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmError) as refused:
        chart.validate_schema(values)
    assert where in str(refused.value)


def test_every_value_is_in_the_schema_and_the_other_way_round():
    def keys(values, path=""):
        for key, value in values.items():
            yield f"{path}{key}"
            if isinstance(value, dict):
                yield from keys(value, f"{path}{key}/")

    def schema_keys(schema, path=""):
        for key, value in schema.get("properties", {}).items():
            yield f"{path}{key}"
            yield from schema_keys(value, f"{path}{key}/")

    with helm.Chart.load(CHART) as chart:
        schema, values = set(schema_keys(chart.schema)), chart.values
    # Of Kubernetes' own words, and free names, the schema says no more.
    free = ("resources/", "lists/files/", "autoscaling/behavior/", "ecurityContext/", "affinity/")
    known = {key for key in keys(values) if not any(part in key for part in free)}
    expected = {key for key in schema if not any(part in key for part in free)} - {"global"}
    assert known == expected


def test_fewer_replicas_at_most_than_at_least_are_refused():
    with pytest.raises(helm.HelmError, match="minReplicas is larger"):
        render({"autoscaling": {"enabled": True, "minReplicas": 11}})


def test_the_configuration_arrives_as_it_was_written():
    text = "# {{ not a template }}\n\n  listeners: []\t\nlast: line"
    rendered = objects(
        {"config": {"text": text}, "lists": {"files": {"beta-testers.txt": None, "a.txt": " x\n\n"}}}
    )
    assert named(rendered, "ConfigMap", "serin-config")["data"] == {"serin.yaml": text}
    assert named(rendered, "ConfigMap", "serin-lists")["data"] == {"a.txt": " x\n\n"}


def test_configmaps_of_others_are_mounted_and_none_are_made():
    values = {"config": {"existingConfigMap": "routes"}, "lists": {"existingConfigMap": "users"}}
    rendered = objects(values)
    assert of_kind(rendered, "ConfigMap") == []
    (volume,) = pod_of(named(rendered, "Deployment"))[1]["volumes"]
    assert volume["projected"]["sources"] == [
        {"configMap": {"name": "users"}},
        {"configMap": {"name": "routes"}},
    ]


def test_without_lists_none_are_mounted():
    rendered = objects({"lists": {"files": {"beta-testers.txt": None}}})
    (volume,) = pod_of(named(rendered, "Deployment"))[1]["volumes"]
    assert volume["projected"]["sources"] == [{"configMap": {"name": "serin-config"}}]


def test_what_is_given_reaches_the_pod():
    rendered = objects(EVERYTHING)
    labels, spec = pod_of(named(rendered, "Deployment"))
    (container,) = spec["containers"]
    assert labels["team"] == "platform"
    assert container["image"] == "ghcr.io/serin-proxy/serin@" + EVERYTHING["image"]["digest"]
    assert container["env"] == EVERYTHING["env"]
    assert [port["containerPort"] for port in container["ports"]] == [8080, 8443, 9901]
    assert container["volumeMounts"][-1:] == EVERYTHING["extraVolumeMounts"]
    assert spec["volumes"][-1:] == EVERYTHING["extraVolumes"]
    for key in ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert spec[key] == EVERYTHING[key]
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint["whenUnsatisfiable"] == "DoNotSchedule"
    assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    annotations = named(rendered, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"a": "b"}
    assert named(rendered, "PodDisruptionBudget")["spec"]["maxUnavailable"] == "25%"
    assert [port["port"] for port in named(rendered, "Service")["spec"]["ports"]] == [80, 443]
    traffic, admin, extra = named(rendered, "NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for port in traffic["ports"]] == [8080, 8443]
    assert traffic["from"][0] == EVERYTHING["networkPolicy"]["clients"][0]
    assert extra == EVERYTHING["networkPolicy"]["extraIngress"][0]


def test_the_user_can_be_left_to_the_cluster():
    rendered = objects({"podSecurityContext": {"runAsUser": None, "runAsGroup": None}})
    context = pod_of(named(rendered, "Deployment"))[1]["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_what_is_switched_off_is_not_there():
    off = {
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
    }
    rendered = objects(off)
    kinds = {item["kind"] for item in rendered}
    assert kinds == {"ConfigMap", "Deployment", "Service"}
    assert pod_of(named(rendered, "Deployment"))[1]["serviceAccountName"] == "default"


def names_referred_to(item):
    """Names of other objects that an object has somewhere in it."""
    if isinstance(item, dict):
        for key, value in item.items():
            if key in ("configMap", "scaleTargetRef"):
                yield value["name"]
            elif key == "serviceAccountName":
                yield value
            else:
                yield from names_referred_to(value)
    elif isinstance(item, list):
        for value in item:
            yield from names_referred_to(value)


@pytest.mark.parametrize(
    ("release", "values", "expected"),
    [
        ("shop", {}, "shop-serin"),
        ("shop-serin-eu", {}, "shop-serin-eu"),
        ("shop", {"fullnameOverride": "edge"}, "edge"),
        ("a" * 53, {}, "a" * 50),
    ],
)
def test_two_releases_do_not_meet(release, values, expected):
    rendered = objects(EVERYTHING | values, name=release, namespace="edge")
    names = {item["metadata"]["name"] for item in rendered}
    assert names == {expected, *(f"{expected}-{part}" for part in ("config", "lists", "metrics"))}
    assert max(map(len, names)) <= 63
    assert {name for item in rendered for name in names_referred_to(item)} <= names
    selector = named(rendered, "Service", expected)["spec"]["selector"]
    assert selector == {"app.kubernetes.io/name": "serin", "app.kubernetes.io/instance": release}
    assert selector.items() <= pod_of(named(rendered, "Deployment", expected))[0].items()


# ----------------------------------------------------------------------------------- the test, notes, package


def test_the_test_pod_is_a_hook_and_no_replica():
    rendered = objects_of(render(EVERYTHING), with_test=True)
    pod = named(rendered, "Pod", "serin-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["restartPolicy"] == "Never"
    labels, spec = pod_of(pod)
    for selector in (
        named(rendered, "Service")["spec"]["selector"],
        named(rendered, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        named(rendered, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert not selector.items() <= labels.items()
    # It may come in where only some may.
    peers = named(rendered, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert any(
        peer["podSelector"]["matchLabels"].items() <= labels.items()
        for peer in peers
        if "podSelector" in peer
    )
    environment = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
    assert environment == {"HOST": "shop.example.com", "URL": "http://serin:80/health"}


def test_the_notes_say_where_it_is_and_how_to_ask_it():
    notes = render({"writers": {"existingSecret": "tokens"}}, name="edge", namespace="shop")["NOTES.txt"]
    assert "edge-serin.shop.svc:80 (http)" in notes
    assert "kubectl --namespace shop port-forward deployment/edge-serin 9901" in notes
    assert "helm test edge --namespace shop" in notes
    assert "serin.dev/backend" in notes
    assert "as long as the pod lives" in notes
    assert "serin.dev/backend" not in render({"networkPolicy": {"enabled": False}})["NOTES.txt"]
    assert "\n\n\n" not in notes


def test_it_is_packaged_with_all_that_it_needs(tmp_path):
    archive = helm.package(CHART, destination=tmp_path)
    archive = archive["path"] if isinstance(archive, dict) else archive
    assert pathlib.Path(archive).name == f"serin-{manifests.release()}.tgz"
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    files = {
        f"serin/{file.relative_to(CHART)}"
        for file in CHART.rglob("*")
        if file.is_file() and file.name != ".helmignore"
    }
    assert files <= names
    everything = objects(EVERYTHING, chart=archive)
    assert everything == objects(EVERYTHING)


def test_it_has_the_version_of_the_program():
    with helm.Chart.load(CHART) as chart:
        assert chart.metadata["version"] == chart.metadata["appVersion"] == manifests.release()
