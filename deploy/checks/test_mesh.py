"""The components of deploy/mesh: that they go together with the overlays, that the meshes take their objects,
and that what matters between a mesh and Serin is as the README says.
"""

import http.client
import json
import re
import subprocess

import pytest
import yaml

import composed
from conftest import DEPLOY, documents
from manifests import invalid, named, of_kind, pod_of
from running import addresses, program, start, versions  # noqa: F401

MESH = DEPLOY / "mesh"
SERIN = {"app.kubernetes.io/name": "serin", "app.kubernetes.io/instance": "serin"}
BACKEND = {"serin.dev/backend": "true"}

CONFIG = """
listeners: [ {listener} ]
admin: {{ address: "127.0.0.1:0" }}
backends:
  - {{ name: shop-stable, version: "1.8.2", endpoints: ["{stable}"] }}
  - {{ name: shop-canary, version: "1.9.0", endpoints: ["{canary}"] }}
routes:
  - name: shop
    backendRefs: [ {{ name: shop-stable, weight: 1 }}, {{ name: shop-canary, weight: 0 }} ]
    gray: {{ rules: [ {{ name: office, clientCidrs: ["203.0.113.0/24"], backend: shop-canary }} ] }}
    exposeVersion: true
"""


@pytest.fixture(scope="module")
def istio(tools, tmp_path_factory):
    return composed.compose(tools, composed.copied(tmp_path_factory.mktemp("istio")), "mesh/istio")


@pytest.fixture(scope="module")
def linkerd(tools, tmp_path_factory):
    return composed.compose(tools, composed.copied(tmp_path_factory.mktemp("linkerd")), "mesh/linkerd")


@pytest.fixture(scope="module")
def shop():
    """The Services of the versions, and what Istio is told about them."""
    return documents(MESH / "istio" / "versions.yaml")


def annotations(objects):
    return named(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]


def without_linkerd(objects):
    """Objects whose schemas are at hand."""
    return [item for item in objects if not item["apiVersion"].startswith("policy.linkerd.io/")]


def rules(objects, name):
    """Who may ask what for, by an AuthorizationPolicy for Serin's pods."""
    spec = named(objects, "AuthorizationPolicy", name)["spec"]
    assert (spec["action"], spec["selector"]["matchLabels"]) == ("ALLOW", SERIN)
    return spec["rules"]


def asked_from(serin, source):
    """The version for a request from this address, with a client of the office in X-Forwarded-For."""
    host, port = serin.web.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20, source_address=(source, 0))
    connection.request("GET", "/", headers={"x-forwarded-for": "203.0.113.9"})
    return connection.getresponse().headers["x-service-version"]


# ------------------------------------------------------------------------------------------------------- both


def test_a_mesh_takes_what_the_overlay_becomes(tools, istio, linkerd, shop, tmp_path):
    assert invalid(tools, istio + shop, tmp_path) == []
    assert invalid(tools, without_linkerd(linkerd), tmp_path) == []


def test_everything_is_where_serin_is(istio, linkerd):
    assert composed.outside_of("serin", istio) == []
    assert composed.outside_of("serin", linkerd) == []


def test_serin_yaml_may_have_the_listeners_that_the_readme_tells(program, tmp_path):  # noqa: F811
    (tmp_path / "beta-testers.txt").write_text("user-17\n")
    (tmp_path / "pipeline.token").write_text("0123456789abcdef" * 4)
    told = composed.listeners_in(MESH / "README.md")
    assert len(told) == 2
    for listeners in told:
        file = tmp_path / "serin.yaml"
        file.write_text(yaml.safe_dump(composed.with_listeners(listeners)))
        subprocess.run([program, "check", str(file)], check=True)


def test_clients_behind_the_sidecar_are_known_by_their_own_addresses(start, versions):  # noqa: F811
    ((listener,), _) = composed.listeners_in(MESH / "README.md")
    listener["address"] = "127.0.0.1:0"
    serin = start(CONFIG.format(listener=json.dumps(listener), **addresses(versions)))
    assert asked_from(serin, "127.0.0.6") == "1.9.0"
    # Nobody else is believed.
    assert asked_from(serin, "127.0.0.1") == "1.8.2"


def test_the_sidecar_reaches_its_control_plane(istio, linkerd):
    for objects, namespace, ports in (
        (istio, "istio-system", {15012}),
        (linkerd, "linkerd", {8080, 8086, 8090}),
    ):
        egress = named(objects, "NetworkPolicy")["spec"]["egress"]
        (rule,) = [rule for rule in egress if namespace in json.dumps(rule["to"])]
        assert {port["port"] for port in rule["ports"]} == ports


def test_the_readme_knows_every_file():
    readme = (MESH / "README.md").read_text()
    for mesh in "istio", "linkerd":
        for file in (MESH / mesh).glob("*.yaml"):
            assert file.name == "kustomization.yaml" or f"({mesh}/{file.name})" in readme


# ------------------------------------------------------------------------------------------------------ Istio


def test_the_host_goes_to_serin_whole_and_nothing_is_repeated(istio):
    spec = named(istio, "VirtualService")["spec"]
    (route,) = spec["http"]
    assert route["route"] == [{"destination": {"host": "serin", "port": {"number": 80}}}]
    assert route["retries"] == {"attempts": 0}
    assert route["timeout"] == "0s"
    assert not {"match", "rewrite", "headers", "redirect", "mirror", "fault"} & set(route)
    assert named(istio, "Service")["spec"]["ports"][0]["port"] == 80


def test_the_gateway_takes_the_host_of_the_virtual_service_with_tls_alone(istio):
    gateway = named(istio, "Gateway")["spec"]
    service = named(istio, "VirtualService")["spec"]
    assert service["gateways"] == ["serin"]
    hosts = [f"./{host}" for host in service["hosts"]]
    by_protocol = {server["port"]["protocol"]: server for server in gateway["servers"]}
    assert by_protocol["HTTPS"]["hosts"] == by_protocol["HTTP"]["hosts"] == hosts
    assert by_protocol["HTTPS"]["tls"]["mode"] == "SIMPLE"
    assert by_protocol["HTTP"]["tls"] == {"httpsRedirect": True}


def test_a_bad_version_does_not_get_serin_ejected(istio, shop):
    for rule in of_kind(istio + shop, "DestinationRule"):
        assert "outlierDetection" not in rule["spec"]["trafficPolicy"]


def test_the_gateway_closes_idle_connections_before_serin_does(istio):
    pool = named(istio, "DestinationRule")["spec"]["trafficPolicy"]["connectionPool"]
    # The default of `timeouts.idle`.
    assert int(pool["http"]["idleTimeout"].removesuffix("s")) < 60
    assert pool["http"]["useClientProtocol"] is True


def test_mtls_is_strict_but_for_metrics(istio, shop):
    spec = named(istio, "PeerAuthentication")["spec"]
    assert spec["selector"]["matchLabels"] == SERIN
    assert spec["mtls"] == {"mode": "STRICT"}
    assert spec["portLevelMtls"] == {"9901": {"mode": "PERMISSIVE"}}
    spec = named(shop, "PeerAuthentication", "versions")["spec"]
    assert spec == {"selector": {"matchLabels": BACKEND}, "mtls": {"mode": "STRICT"}}


def test_traffic_comes_from_the_ingress_gateway_alone(istio):
    (rule,) = rules(istio, "serin-traffic")
    assert rule["to"] == [{"operation": {"ports": ["8080"]}}]
    ((source,),) = [entry["source"]["principals"] for entry in rule["from"]]
    assert re.fullmatch(r"\*/ns/[a-z-]+/sa/[a-z-]+", source)


def test_of_the_admin_listener_nothing_is_reached_but_metrics_and_only_by_monitoring(istio):
    (rule,) = rules(istio, "serin-metrics")
    operation = {"ports": ["9901"], "methods": ["GET"], "paths": ["/metrics"]}
    assert rule["to"] == [{"operation": operation}]
    assert len(of_kind(istio, "AuthorizationPolicy")) == 2
    ingress = named(istio, "NetworkPolicy")["spec"]["ingress"]
    (admin,) = [entry for entry in ingress if 9901 in [port["port"] for port in entry["ports"]]]
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert admin["from"] == [{"namespaceSelector": namespace}]


def test_the_policies_are_about_the_ports_and_the_pods_that_serin_has(istio):
    labels, spec = pod_of(named(istio, "Deployment"))
    assert SERIN.items() <= labels.items()
    (container,) = spec["containers"]
    assert {port["containerPort"] for port in container["ports"]} == {8080, 9901}


def test_the_sidecar_is_there_before_serin_and_after_it(istio):
    labels, spec = pod_of(named(istio, "Deployment"))
    assert labels["sidecar.istio.io/inject"] == "true"
    proxy = yaml.safe_load(annotations(istio)["proxy.istio.io/config"])
    assert proxy["holdApplicationUntilProxyStarts"] is True
    # Variables of the environment are text.
    assert proxy["proxyMetadata"] == {"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true"}
    assert spec["terminationGracePeriodSeconds"] == 30


def test_probes_and_metrics_come_through_the_sidecar(istio):
    found = annotations(istio)
    assert found["sidecar.istio.io/rewriteAppHTTPProbers"] == "true"
    assert found["prometheus.istio.io/merge-metrics"] == "false"


def test_serin_reaches_pods_of_the_versions_with_mtls(istio, shop):
    """Ports of TCP on headless Services that Serin's namespace knows, with mTLS said and not found out."""
    namespace = named(istio, "Deployment")["metadata"]["namespace"]
    config = yaml.safe_load(named(istio, "ConfigMap", "serin-config")["data"]["serin.yaml"])
    services = {item["metadata"]["name"]: item for item in of_kind(shop, "Service")}
    rules = {item["spec"]["host"]: item for item in of_kind(shop, "DestinationRule")}
    assert services.keys() == rules.keys() == {backend["name"] for backend in config["backends"]}
    for backend in config["backends"]:
        service, rule = services[backend["name"]], rules[backend["name"]]
        name = f"{backend['name']}.{service['metadata']['namespace']}.svc.cluster.local."
        (port,) = service["spec"]["ports"]
        assert backend["endpoints"] == [f"{name}:{port['targetPort']}"]
        assert service["spec"]["clusterIP"] == "None"
        assert port["appProtocol"] == "tcp"
        assert service["metadata"]["annotations"]["networking.istio.io/exportTo"] == namespace
        assert rule["metadata"]["namespace"] == service["metadata"]["namespace"]
        assert rule["spec"]["exportTo"] == [namespace]
        assert rule["spec"]["trafficPolicy"]["tls"] == {"mode": "ISTIO_MUTUAL"}
        # A sidecar takes every connection, so only a request tells whether somebody is there.
        assert "http" in backend["healthCheck"]


# ---------------------------------------------------------------------------------------------------- Linkerd


def test_linkerds_proxy_is_there_before_serin_and_after_it(linkerd):
    found = annotations(linkerd)
    assert found["linkerd.io/inject"] == "enabled"
    assert found["config.linkerd.io/proxy-await"] == "enabled"
    assert found["config.beta.linkerd.io/proxy-enable-native-sidecar"] == "true"
    _, spec = pod_of(named(linkerd, "Deployment"))
    grace = int(found["config.linkerd.io/shutdown-grace-period"].removesuffix("s"))
    # Serin's own 28 s come first.
    assert spec["terminationGracePeriodSeconds"] >= 28 + grace


def test_the_admin_listener_goes_past_linkerds_proxy(linkerd):
    assert annotations(linkerd)["config.linkerd.io/skip-inbound-ports"] == "9901"


def test_linkerd_lets_nobody_through_but_the_ingress_controller(linkerd):
    server = named(linkerd, "Server")
    _, spec = pod_of(named(linkerd, "Deployment"))
    assert server["spec"]["podSelector"]["matchLabels"] == SERIN
    assert server["spec"]["port"] in [port["name"] for port in spec["containers"][0]["ports"]]
    policies = of_kind(linkerd, "AuthorizationPolicy")
    (policy,) = [item for item in policies if item["apiVersion"].startswith("policy.linkerd.io/")]
    assert policy["spec"]["targetRef"] == {"group": "policy.linkerd.io", "kind": "Server", "name": "serin"}
    (reference,) = policy["spec"]["requiredAuthenticationRefs"]
    assert reference["group"] == "policy.linkerd.io"
    authentication = named(linkerd, reference["kind"], reference["name"])
    (identity,) = authentication["spec"]["identityRefs"]
    assert identity.keys() == {"kind", "name", "namespace"} and identity["kind"] == "ServiceAccount"


# --------------------------------------------------------------------------------------------- what is caught


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        ("peerauthentication.yaml", "mode: STRICT", "mode: STRICTLY", "allowed values"),
        ("peerauthentication.yaml", "portLevelMtls", "portLevelMTLS", "portLevelMTLS is not known"),
        ("virtualservice.yaml", "attempts: 0", "attempts: none", "retries/attempts must be integer"),
        ("virtualservice.yaml", "host: serin", "hots: serin", "required property host"),
        ("destinationrule.yaml", "idleTimeout", "idleTimeOut", "idleTimeOut is not known"),
        ("authorizationpolicy.yaml", "action: ALLOW", "action: PERMIT", "allowed values"),
        ("gateway.yaml", "credentialName", "credentialname", "credentialname is not known"),
    ],
)
def test_a_mistake_for_istio_is_found(tools, tmp_path, file, old, new, complaint):
    root = composed.copied(tmp_path)
    broken = root / "mesh" / "istio" / file
    text = broken.read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    found = invalid(tools, composed.compose(tools, root, "mesh/istio"), tmp_path)
    assert any(complaint in entry for entry in found), found


def test_a_patch_for_something_that_is_not_there_is_found(tools, tmp_path):
    root = composed.copied(tmp_path)
    patch = root / "mesh" / "linkerd" / "deployment.yaml"
    patch.write_text(patch.read_text().replace("name: serin", "name: serin-proxy"))
    with pytest.raises(AssertionError, match="no matches for Id Deployment"):
        composed.compose(tools, root, "mesh/linkerd")
