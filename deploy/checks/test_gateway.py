"""The components of deploy/gateway: that they go together with the overlays, that an API server takes their
objects, and that a gateway hands Serin whole hosts.
"""

import subprocess

import pytest
import yaml

import composed
from conftest import DEPLOY
from manifests import insecure, invalid, invalid_custom, named, of_kind
from running import program  # noqa: F401

GATEWAY = DEPLOY / "gateway"
ROUTES = ["HTTPRoute", "GRPCRoute"]


@pytest.fixture(scope="module")
def gateway_api(tools, tmp_path_factory):
    return composed.compose(tools, composed.copied(tmp_path_factory.mktemp("gateway")), "gateway/gateway-api")


@pytest.fixture(scope="module")
def ingress(tools, tmp_path_factory):
    return composed.compose(tools, composed.copied(tmp_path_factory.mktemp("ingress")), "gateway/ingress")


def is_gateway_api(item):
    return item["apiVersion"].startswith("gateway.networking.k8s.io/")


def wrong(tools, objects, scratch):
    """What is wrong with objects, those of the Gateway API among them."""
    others = [item for item in objects if not is_gateway_api(item)]
    routes = [item for item in objects if is_gateway_api(item)]
    return invalid(tools, others, scratch) + invalid_custom(tools, routes, scratch)


def routes(objects):
    return [item for kind in ROUTES for item in of_kind(objects, kind)]


def test_an_api_server_takes_what_the_overlay_becomes(tools, gateway_api, ingress, tmp_path):
    assert wrong(tools, gateway_api, tmp_path) == []
    assert wrong(tools, ingress, tmp_path) == []


def test_everything_is_where_serin_is(gateway_api, ingress):
    assert composed.outside_of("serin", gateway_api) == []
    assert composed.outside_of("serin", ingress) == []


def test_scanners_have_nothing_against_it(tools, gateway_api, ingress, tmp_path):
    own = composed.only_those_of("gateway/ingress", ingress)
    own += composed.only_those_of("gateway/gateway-api", gateway_api)
    assert insecure(tools, own, tmp_path) == []


def test_routes_hang_on_a_gateway_of_somebody_else(gateway_api):
    assert not of_kind(gateway_api, "Gateway") and not of_kind(gateway_api, "GatewayClass")
    for route in routes(gateway_api):
        (parent,) = route["spec"]["parentRefs"]
        assert parent.keys() == {"name", "namespace", "sectionName"}
        assert parent["namespace"] != route["metadata"]["namespace"]


def test_a_host_goes_to_serin_whole(gateway_api):
    services = {item["metadata"]["name"]: item for item in of_kind(gateway_api, "Service")}
    for route in routes(gateway_api):
        (rule,) = route["spec"]["rules"]
        assert "matches" not in rule and "retry" not in rule
        if "filters" in rule:
            continue
        (backend,) = rule["backendRefs"]
        assert backend["port"] in [port["port"] for port in services[backend["name"]]["spec"]["ports"]]


def test_the_gateway_sets_no_limit_of_time(gateway_api):
    (rule,) = named(gateway_api, "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}


def test_without_tls_there_is_only_the_way_to_it(gateway_api):
    secure = named(gateway_api, "HTTPRoute")["spec"]
    plain = named(gateway_api, "HTTPRoute", "serin-redirect")["spec"]
    assert plain["hostnames"] == secure["hostnames"]
    assert (secure["parentRefs"][0]["sectionName"], plain["parentRefs"][0]["sectionName"]) == (
        "https",
        "http",
    )
    ((redirect,),) = [rule["filters"] for rule in plain["rules"]]
    assert redirect["requestRedirect"]["scheme"] == "https"


def test_grpc_gets_http2_and_a_host_of_its_own(gateway_api):
    route = named(gateway_api, "GRPCRoute")["spec"]
    assert not set(route["hostnames"]) & set(named(gateway_api, "HTTPRoute")["spec"]["hostnames"])
    ((backend,),) = [rule["backendRefs"] for rule in route["rules"]]
    service = named(gateway_api, "Service", backend["name"])["spec"]
    assert service["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    # The same pods as with HTTP/1.1.
    other = named(gateway_api, "Service")["spec"]
    assert service["selector"] == other["selector"]
    assert service["ports"][0]["targetPort"] == other["ports"][0]["targetPort"]


def test_an_ingress_hands_over_the_whole_host_with_tls(ingress):
    item = named(ingress, "Ingress")
    spec = item["spec"]
    assert spec["ingressClassName"]
    assert "annotations" not in item["metadata"]
    (rule,) = spec["rules"]
    assert spec["tls"][0]["hosts"] == [rule["host"]]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/", "Prefix")
    port = path["backend"]["service"]["port"]["name"]
    assert port in [port["name"] for port in named(ingress, "Service")["spec"]["ports"]]


def test_serin_yaml_may_have_the_listeners_that_the_readme_tells(program, tmp_path):  # noqa: F811
    (listeners,) = composed.listeners_in(GATEWAY / "README.md")
    (tmp_path / "beta-testers.txt").write_text("user-17\n")
    (tmp_path / "pipeline.token").write_text("0123456789abcdef" * 4)
    file = tmp_path / "serin.yaml"
    file.write_text(yaml.safe_dump(composed.with_listeners(listeners)))
    subprocess.run([program, "check", str(file)], check=True)


@pytest.mark.parametrize(
    "component, file, old, new, complaint",
    [
        (
            "gateway-api",
            "httproute.yaml",
            "request: 0s",
            "request: none",
            "timeouts/request must match pattern",
        ),
        ("gateway-api", "httproute.yaml", "sectionName", "section", "section is not known"),
        ("gateway-api", "httproute.yaml", "statusCode: 301", "statusCode: 404", "allowed values"),
        ("gateway-api", "grpcroute.yaml", "hostnames:", "hosts:", "hosts is not known"),
        ("gateway-api", "grpcroute.yaml", "targetPort: http", "targetport: http", "targetport"),
        ("ingress", "ingress.yaml", "pathType: Prefix", "pathtype: Prefix", "'pathType' is a required"),
        ("ingress", "ingress.yaml", "ingressClassName", "ingressClass", "ingressClass"),
    ],
)
def test_a_mistake_is_found(tools, tmp_path, component, file, old, new, complaint):
    root = composed.copied(tmp_path)
    broken = root / "gateway" / component / file
    text = broken.read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    found = wrong(tools, composed.compose(tools, root, f"gateway/{component}"), tmp_path)
    assert any(complaint in entry for entry in found), found
