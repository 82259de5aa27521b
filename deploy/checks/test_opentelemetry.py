"""The collector's configuration: its parts are defined and used, and it counts what a real Serin sends."""

import http.server
import re

import pytest
import yaml

from conftest import DEPLOY, REPOSITORY
from running import CONFIG, addresses, ask, eventually, program, serve, start, versions  # noqa: F401

FILE = DEPLOY / "opentelemetry" / "collector.yaml"
KINDS = ("extensions", "receivers", "processors", "connectors", "exporters")

# The keys that components of 0.157 know, as far as they concern us.
KNOWN = {
    "health_check": {"endpoint", "path", "response_body", "tls"},
    "otlp": {"protocols"},
    "memory_limiter": {
        "check_interval",
        "limit_mib",
        "spike_limit_mib",
        "limit_percentage",
        "spike_limit_percentage",
    },
    "batch": {
        "timeout",
        "send_batch_size",
        "send_batch_max_size",
        "metadata_keys",
        "metadata_cardinality_limit",
    },
    "span_metrics": {
        "add_resource_attributes",
        "aggregation_cardinality_limit",
        "aggregation_temporality",
        "calls_dimensions",
        "dimensions",
        "events",
        "exclude_dimensions",
        "exemplars",
        "histogram",
        "include_instrumentation_scope",
        "metric_timestamp_cache_size",
        "metrics_expiration",
        "metrics_flush_interval",
        "namespace",
        "resource_metrics_cache_size",
        "resource_metrics_key_attributes",
    },
    "otlp_grpc": {
        "endpoint",
        "tls",
        "headers",
        "compression",
        "timeout",
        "retry_on_failure",
        "sending_queue",
    },
    "prometheus": {
        "endpoint",
        "tls",
        "const_labels",
        "namespace",
        "send_timestamps",
        "metric_expiration",
        "resource_constant_labels",
        "enable_open_metrics",
        "without_scope_info",
        "translation_strategy",
    },
}

# Attributes that the connector adds itself; to name one again is an error.
BUILT_IN = {"service.name", "span.name", "span.kind", "status.code"}


def text():
    return FILE.read_text(encoding="utf-8")


def problems(config):
    """What a collector would refuse, or what would never be used."""
    defined = {kind: set(config.get(kind) or {}) for kind in KINDS}
    found = [f"unknown section {section}" for section in config if section not in (*KINDS, "service")]
    found += unknown_keys(config)
    used = {kind: set() for kind in KINDS}
    used["extensions"] = set(config["service"].get("extensions", []))
    ends = {"receivers": set(), "exporters": set()}
    for name, pipeline in config["service"]["pipelines"].items():
        if name.partition("/")[0] not in ("traces", "metrics", "logs"):
            found.append(f"pipeline {name} is of no signal")
        if not pipeline.get("receivers") or not pipeline.get("exporters"):
            found.append(f"pipeline {name} begins or ends nowhere")
        if (pipeline.get("processors") or [""])[0] != "memory_limiter":
            found.append(f"pipeline {name} does not begin with memory_limiter")
        for kind in ("receivers", "processors", "exporters"):
            for component in pipeline.get(kind, []):
                is_connector = kind != "processors" and component in defined["connectors"]
                used["connectors" if is_connector else kind].add(component)
                if is_connector:
                    ends[kind].add(component)
    for kind in KINDS:
        found += [f"{kind}: {name} is not defined" for name in sorted(used[kind] - defined[kind])]
        found += [f"{kind}: {name} is not used" for name in sorted(defined[kind] - used[kind])]
    for name in sorted(ends["receivers"] ^ ends["exporters"]):
        found.append(f"connectors: {name} leads from nowhere or to nowhere")
    return found


def unknown_keys(config):
    for kind in KINDS:
        for name, settings in (config.get(kind) or {}).items():
            for key in settings or {}:
                if key not in KNOWN.get(name.partition("/")[0], ()):
                    yield f"{kind}: {name} has an unknown key {key}"


def test_every_component_is_defined_known_and_used():
    assert problems(yaml.safe_load(text())) == []


@pytest.mark.parametrize(
    ("sound", "broken", "why"),
    [
        ("exporters: [otlp_grpc, span_metrics]", "exporters: [otlp_grpc]", "span_metrics leads from nowhere"),
        (
            "receivers: [otlp, span_metrics]",
            "receivers: [otlp]",
            "span_metrics leads from nowhere or to nowhere",
        ),
        ("exporters: [prometheus]", "exporters: [prometheus/other]", "prometheus/other is not defined"),
        ("extensions: [health_check]", "extensions: []", "health_check is not used"),
        ("processors: [memory_limiter, batch]", "processors: [batch, memory_limiter]", "does not begin with"),
        ("metrics_flush_interval", "metrics_flush_intervall", "unknown key metrics_flush_intervall"),
        ("receivers: [otlp]", "receivers: []", "begins or ends nowhere"),
    ],
)
def test_a_broken_configuration_is_caught(sound, broken, why):
    assert sound in text()
    found = problems(yaml.safe_load(text().replace(sound, broken, 1)))
    assert any(why in problem for problem in found), found


def test_it_takes_otlp_and_serves_prometheus_where_it_should():
    config = yaml.safe_load(text())
    protocols = config["receivers"]["otlp"]["protocols"]
    assert protocols["grpc"]["endpoint"] == "0.0.0.0:4317"
    assert protocols["http"]["endpoint"] == "0.0.0.0:4318"
    assert config["exporters"]["prometheus"]["endpoint"] == "0.0.0.0:8889"
    traces, metrics = (config["service"]["pipelines"][name] for name in ("traces", "metrics"))
    assert traces["receivers"] == ["otlp"] and "otlp_grpc" in traces["exporters"]
    assert "span_metrics" in metrics["receivers"] and metrics["exporters"] == ["prometheus"]


def test_variables_have_a_default_or_must_be_set_and_all_are_told():
    comment = text().split("extensions:", 1)[0]
    found = dict(re.findall(r"\$\{env:([A-Z_]+)(?::-([^}]*))?\}", text().split("extensions:", 1)[1]))
    assert found == {"TRACES_ENDPOINT": "", "TRACES_INSECURE": "false", "MEMORY_LIMIT_PERCENT": "75"}
    for name, default in found.items():
        told = re.search(rf"#   {name} .*", comment)[0]
        assert f"default {default}" in told if default else "must be set" in told
    readme = (FILE.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in found)


def dimensions():
    return [
        dimension["name"] for dimension in yaml.safe_load(text())["connectors"]["span_metrics"]["dimensions"]
    ]


def test_spans_are_counted_by_words_from_closed_sets():
    assert dimensions() == [
        "serin.route",
        "serin.backend",
        "serin.version",
        "serin.reason",
        "http.response.status_code",
    ]
    assert not BUILT_IN & set(dimensions())


def test_the_buckets_are_those_of_serins_own_histograms():
    buckets = yaml.safe_load(text())["connectors"]["span_metrics"]["histogram"]["explicit"]["buckets"]
    units = {"ms": 0.001, "s": 1}
    parts = [re.fullmatch(r"([\d.]+)(ms|s)", bucket).groups() for bucket in buckets]
    seconds = [round(float(number) * units[unit], 6) for number, unit in parts]
    reference = yaml.safe_load((REPOSITORY / "config" / "reference.yaml").read_text(encoding="utf-8"))
    assert seconds == reference["telemetry"]["durationBuckets"]


def test_a_batch_holds_what_serin_sends_at_a_time():
    batch = yaml.safe_load(text())["processors"]["batch"]
    assert 512 <= batch["send_batch_size"] <= batch["send_batch_max_size"]


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans by OTLP/HTTP."""

    def do_POST(self):
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_real_span_has_every_attribute_that_is_counted(start, versions):  # noqa: F811
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.bodies = []
    endpoint = serve(server)
    try:
        tracing = f'tracing: {{ endpoint: "http://{endpoint}", protocol: http, sampling: {{ ratio: 1 }} }}\n'
        replica = start(CONFIG.format(weights=(1, 0), **addresses(versions)) + tracing)
        ask(f"http://{replica.web}/", headers={"x-user-id": "a"})
        path, body = eventually("spans arrive", lambda: server.bodies and server.bodies[0])
    finally:
        server.shutdown()
        server.server_close()
    assert path == "/v1/traces"
    # Names and texts are in the message as they are.
    for attribute in [*dimensions(), "shop-stable", "1.8.2", "sticky"]:
        assert attribute.encode() in body, attribute
    assert b"service.name" in body
