"""The dashboards of deploy/grafana: that Grafana can read them, and that they show what happened.

The second half runs a real serin under a load that is counted, and a real Prometheus that scrapes it: every
query of every panel has an answer, and the answers are what the load generator saw.
"""

import bisect
import collections
import copy
import itertools
import json
import math
import re
import subprocess

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from conftest import DEPLOY
from promql import unknown_names
from running import program  # noqa: F401
from under_load import CANARY_SECONDS, DAWDLING_SECONDS, REQUESTS, STABLE_SECONDS, observed_under_load

GRAFANA = DEPLOY / "grafana"
FILES = sorted(GRAFANA.glob("dashboards/*.json"))
DASHBOARDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
# What Grafana fills in itself.
BUILT_IN = {"__rate_interval", "__range"}
# Which Grafana's plugin for Prometheus adds to annotations, beside what the schema has.
OF_ANNOTATIONS = {"step", "textFormat", "titleFormat"}

plugins.register_default_plugins()


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard):
    """All queries: where they stand, and what they ask."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield f"{dashboard['title']} / {panel['title']} {target['refId']}", target.get("expr", "")
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield f"{dashboard['title']} / annotation {annotation['name']}", annotation["expr"]


def overlaps(one, other):
    across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
    return across and one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]


def lost(before, after, path=""):
    """What is in a dashboard and not in what Grafana's own types make of it."""
    if isinstance(before, dict):
        for key, value in before.items():
            there = isinstance(after, dict) and key in after
            yield from lost(value, after[key], f"{path}.{key}") if there else [f"{path}.{key}"]
    elif isinstance(before, list):
        for number, (one, other) in enumerate(itertools.zip_longest(before, after)):
            yield from lost(one, other, f"{path}[{number}]")
    elif before != after:
        yield path


def complaints(dashboard):
    """Everything that is wrong with a dashboard by itself."""
    found = []
    read = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    for path in lost(dashboard, read):
        if not ("annotations" in path and path.split(".")[-1] in OF_ANNOTATIONS):
            found.append(f"Grafana does not know {path}")
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    if len(set(identifiers)) < len(identifiers):
        found.append("two panels have the same id")
    for one, other in itertools.combinations(dashboard["panels"], 2):
        if overlaps(one["gridPos"], other["gridPos"]):
            found.append(f"{one['title']} and {other['title']} overlap")
    if any(place["x"] + place["w"] > 24 for place in (panel["gridPos"] for panel in dashboard["panels"])):
        found.append("a panel is wider than the dashboard")
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps([dashboard["panels"], dashboard["annotations"], dashboard["templating"]])
    used = set(re.findall(r"\$\{?(\w+)", text.replace("$$", ""))) - BUILT_IN
    found += [f"there is no variable {name}" for name in used - variables - {"__all"}]
    found += [f"nothing uses the variable {name}" for name in variables - used]
    for panel in panels(dashboard):
        title = panel["title"]
        if not all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]):
            found.append(f"{title} has a data source of its own")
        if not (panel["description"] and panel["targets"]):
            found.append(f"{title} has no description or no query")
        if not panel["fieldConfig"]["defaults"].get("unit"):
            found.append(f"{title} has no unit")
    for place, expression in expressions(dashboard):
        if not expression:
            found.append(f"{place} has no expression")
        found += [f"{place}: there is no {name}" for name in unknown_names(expression)]
    return found


# === as files ===


def test_there_are_the_three_dashboards():
    found = {name: dashboard["uid"] for name, dashboard in DASHBOARDS.items()}
    assert found == {
        "versions-compared": "serin-versions-compared",
        "proxy-health": "serin-proxy-health",
        "configuration-and-lists": "serin-configuration-and-lists",
    }


@pytest.mark.parametrize("name", DASHBOARDS)
def test_nothing_is_wrong_with_a_dashboard(name):
    assert complaints(DASHBOARDS[name]) == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_narrowed_to_routes_and_backends(name):
    variables = {variable["name"]: variable for variable in DASHBOARDS[name]["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for one in ("route", "backend"):
        assert variables[one]["multi"] and variables[one]["includeAll"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_leads_to_the_others_and_marks_changes(name):
    [link] = DASHBOARDS[name]["links"]
    assert link["type"] == "dashboards" and link["includeVars"] and link["keepTime"]
    assert all(set(link["tags"]) <= set(dashboard["tags"]) for dashboard in DASHBOARDS.values())
    marked = " ".join(one.get("expr", "") for one in DASHBOARDS[name]["annotations"]["list"])
    assert "serin_backend_weight" in marked and "serin_config_reloads_total" in marked


def test_the_dashboards_are_what_the_generator_writes(tmp_path):
    subprocess.run([str(GRAFANA / "generate"), str(tmp_path)], check=True)
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in FILES}


def first(dashboard):
    return panels(dashboard)[0]


MISTAKES = {
    "two panels have the same id": lambda one: first(one).update(id=one["panels"][0]["id"]),
    "overlap": lambda one: panels(one)[1].update(gridPos=first(one)["gridPos"]),
    "wider than the dashboard": lambda one: first(one)["gridPos"].update(w=25),
    "there is no variable routes": lambda one: first(one)["targets"][0].update(expr='up{job="$routes"}'),
    "nothing uses the variable spare": lambda one: one["templating"]["list"].append({"name": "spare"}),
    "a data source of its own": lambda one: first(one)["targets"][0].update(datasource={"uid": "abc"}),
    "has no unit": lambda one: first(one)["fieldConfig"]["defaults"].pop("unit"),
    "has no description": lambda one: first(one).update(description=""),
    "has no expression": lambda one: first(one)["targets"][0].update(expr=""),
    "there is no serin_requests": lambda one: first(one)["targets"][0].update(expr="serin_requests"),
    "does not know .panels[1].optoins": lambda one: first(one).update(optoins={}),
    "custom.lineWith": lambda one: panels(one)[-2]["fieldConfig"]["defaults"]["custom"].update(lineWith=2),
}


@pytest.mark.parametrize("why", MISTAKES)
def test_a_broken_dashboard_is_caught(why):
    dashboard = copy.deepcopy(DASHBOARDS["proxy-health"])
    MISTAKES[why](dashboard)
    assert any(why in complaint for complaint in complaints(dashboard))


def test_grafana_is_provisioned_with_a_data_source_and_the_dashboards():
    [datasources] = (GRAFANA / "provisioning" / "datasources").glob("*.yaml")
    [providers] = (GRAFANA / "provisioning" / "dashboards").glob("*.yaml")
    with open(datasources, encoding="utf-8") as one, open(providers, encoding="utf-8") as other:
        datasource, provider = yaml.safe_load(one), yaml.safe_load(other)
    assert datasource["apiVersion"] == provider["apiVersion"] == 1
    [prometheus] = datasource["datasources"]
    assert prometheus["type"] == "prometheus" and prometheus["access"] == "proxy"
    with open(DEPLOY / "prometheus" / "prometheus.yaml", encoding="utf-8") as file:
        # $__rate_interval is made from it.
        assert prometheus["jsonData"]["timeInterval"] == yaml.safe_load(file)["global"]["scrape_interval"]
    [files] = provider["providers"]
    assert files["type"] == "file" and files["options"]["path"] == "/var/lib/grafana/dashboards/serin"
    assert not files["allowUiUpdates"]


# === under load ===


def filled_in(expression, window="5m"):
    """An expression as Grafana sends it, with everything selected."""
    values = {"__rate_interval": window, "__range": window, "job": "serin"}
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".*"), expression)


@pytest.fixture(scope="module")
def observed(program, tools, tmp_path_factory):  # noqa: F811
    """Serin and Prometheus after the load."""
    with observed_under_load(program, tools, tmp_path_factory.mktemp("observed")) as found:
        yield found


@pytest.fixture
def ask(observed):
    """Asks for an expression as it was at the end of the load, and over nothing but the load."""

    def ask(labels, expression):
        # A millisecond more than from scrape to scrape: newer versions leave out the very beginning.
        window = f"{round((observed.ended - observed.began) * 1000) + 1}ms"
        samples = observed.prometheus.query(filled_in(expression, window), time=observed.ended)
        values = {tuple(metric.get(label) for label in labels): value for metric, value in samples}
        assert len(values) == len(samples)
        # What is no version's, and the ratios of one that had no request.
        nobodys = {key for key, value in values.items() if {None, "_NONE"} & set(key) or math.isnan(value)}
        return {key: value for key, value in values.items() if key not in nobodys}

    return ask


def expression_of(title, dashboard="versions-compared", number=0):
    """The query of a panel."""
    [found] = [one for one in panels(DASHBOARDS[dashboard]) if one["title"] == title]
    return found["targets"][number]["expr"]


def seconds(seen, part):
    """Of so many, the one below which this part of them is."""
    return sorted(one.seconds for one in seen)[math.ceil(part * len(seen)) - 1]


def bucket(value):
    """The bounds of the histogram's bucket that a value falls into."""
    above = bisect.bisect_left(BUCKETS, value)
    return BUCKETS[above - 1], BUCKETS[above]


VERSIONS = ("1.8.2", "1.9.0")
# As config/reference.yaml has them.
BUCKETS = [0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_has_an_answer(observed, name):
    unanswered = []
    for place, expression in expressions(DASHBOARDS[name]):
        values = [value for _, value in observed.prometheus.query(filled_in(expression))]
        if not any(map(math.isfinite, values)):
            unanswered.append(f"{place}: {values}")
    assert unanswered == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_has_values(observed, name):
    for variable in DASHBOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            values = {metric.get(label) for metric, _ in observed.prometheus.query(filled_in(series))}
            # There are no namespaces on machines; then everything is selected.
            assert values == {None} if label == "namespace" else values and None not in values


def test_counters_are_what_the_load_generator_saw(observed, ask):
    def seen(key):
        return dict(collections.Counter(map(key, observed.seen)))

    def sent(field):
        return {(version,): sum(getattr(one, field) for one in observed.of(version)) for version in VERSIONS}

    def counted(labels, metric):
        now = ask(labels, f"sum by ({', '.join(labels)}) ({metric})")
        first = ask(labels, f"sum by ({', '.join(labels)}) ({metric} @ {observed.began})")
        return {key: value - first.get(key, 0) for key, value in now.items()}

    def reason(one):
        backend = "shop-canary" if one.version == "1.9.0" else "shop-stable"
        return backend, "rule" if one.by_rule else "sticky"

    assert len(observed.seen) == REQUESTS
    by_code = counted(["version", "code"], "serin_requests_total")
    assert by_code == seen(lambda one: (one.version, str(one.status)))
    assert counted(["version"], "serin_request_duration_seconds_count") == seen(lambda one: (one.version,))
    failures = {(version,): observed.failures(version) for version in VERSIONS}
    assert counted(["version"], "serin_request_failures_total") == failures
    assert counted(["backend", "reason"], "serin_routing_decisions_total") == seen(reason)
    assert counted(["version"], "serin_request_bytes_total") == sent("sent")
    assert counted(["version"], "serin_response_bytes_total") == sent("received")


def test_panels_compare_versions_as_the_load_generator_does(observed, ask):
    numbers = {version: len(observed.of(version)) for version in VERSIONS}
    ratios = {version: observed.failures(version) / numbers[version] for version in VERSIONS}
    shares = {version: count / REQUESTS for version, count in numbers.items()}
    duration = observed.ended - observed.began

    def shown(title):
        return {version: value for (version,), value in ask(["version"], expression_of(title)).items()}

    def nearly(expected):
        # Of what was before the window Prometheus takes a millisecond's part.
        return pytest.approx(expected, rel=1e-3)

    assert shown("Requests") == nearly({version: count / duration for version, count in numbers.items()})
    assert shown("Share of requests") == nearly(shares)
    assert shown("Error ratio") == nearly(ratios)
    assert shown("Error ratio, difference") == nearly({"1.9.0": ratios["1.9.0"] - ratios["1.8.2"]})
    [in_table] = [one for one in panels(DASHBOARDS["versions-compared"]) if one["type"] == "table"]
    roles, weights = (ask(["version"], target["expr"]) for target in in_table["targets"][:2])
    assert roles == {("1.8.2",): 1, ("1.9.0",): 0}
    assert weights == {("1.8.2",): 0.75, ("1.9.0",): 0.25}


@pytest.mark.parametrize(("title", "part"), [("50th", 0.5), ("95th", 0.95), ("99th", 0.99)])
def test_percentiles_are_those_that_clients_saw(observed, ask, title, part):
    """Within the bucket: not below what the version itself took, and not above what its clients waited."""
    shown = ask(["version"], expression_of(f"{title} percentile"))
    for version in VERSIONS:
        seen = observed.of(version)
        of_version = CANARY_SECONDS if version == "1.9.0" else STABLE_SECONDS
        # Of the canary's requests, 4 % dawdle.
        least = DAWDLING_SECONDS if version == "1.9.0" and part > 0.96 else of_version
        assert bucket(least)[0] <= shown[(version,)] <= bucket(seconds(seen, part))[1], (version, shown)
    difference = ask(["version"], expression_of(f"{title} percentile, difference"))
    assert difference == {("1.9.0",): pytest.approx(shown[("1.9.0",)] - shown[("1.8.2",)])}


def test_recording_rules_say_the_same(observed):
    series = "route_backend_version:serin_request_failures_per_request:ratio_rate5m"
    for version in VERSIONS:
        [(_, ratio)] = observed.prometheus.query(f'{series}{{version="{version}"}}')
        # The first few requests are among them.
        assert ratio == pytest.approx(observed.failures(version) / len(observed.of(version)), rel=0.1)
    [(metric, _)] = observed.prometheus.query("route_backend:serin_baseline_info:max == 1")
    assert (metric["route"], metric["backend"]) == ("shop", "shop-stable")


def test_alerts_are_about_the_canary_and_what_was_broken_and_nothing_else(observed):
    active = {alert["alertname"]: alert for alert in observed.prometheus.active_alerts()}
    assert set(active) == {
        "SerinCanaryErrorRatioHigh",
        "SerinCanaryErrorRatioElevated",
        "SerinCanaryLatencyHigh",
        "SerinErrorBudgetBurnsFast",
        "SerinErrorBudgetBurnsSlowly",
        "SerinConfigReloadFailed",
    }
    for name, alert in active.items():
        assert alert.get("version", "1.9.0") == "1.9.0", name
