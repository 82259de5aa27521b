"""Rules, alerts and configurations of deploy/prometheus and deploy/alertmanager, and the pages about alerts.

That promtool and amtool find nothing; that every alert is tested by a case that fires and one that does not,
has a page, and is routed; that no rule asks for a metric or a label that there is none of; and that mistakes
are caught.
"""

import json
import re
import shutil

import pytest
import yaml

from conftest import DEPLOY, REPOSITORY
from promql import unknown_names

PROMETHEUS = DEPLOY / "prometheus"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yaml"
PAGES = REPOSITORY / "docs" / "alerts"
GRAFANA = DEPLOY / "grafana" / "dashboards"
RULES = sorted(PROMETHEUS.glob("rules/*.yaml"))
TESTS = sorted(PROMETHEUS.glob("tests/*.yaml"))
BLOB = "https://github.com/serin-proxy/serin/blob/main/docs/alerts"


def read(path):
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def rules(*paths):
    return [rule for path in paths or RULES for group in read(path)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def labels_of(name):
    return ALERTS[name]["labels"]


def cases():
    """What is expected of alerts, in all tests."""
    tests = [test for path in TESTS for test in read(path)["tests"]]
    return [case for test in tests for case in test.get("alert_rule_test", [])]


def pages():
    return sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")


def changed(path, directory, old, new):
    """A copy of a file with a mistake in it."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    copy = directory / path.name
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


# === rules ===


def test_promtool_finds_nothing_in_the_rules(tools):
    tools.passes("promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_rules_do_in_time_what_their_tests_say(tools):
    tools.passes("promtool", "test", "rules", *TESTS)


def test_names_of_recorded_series_tell_level_metric_and_operation():
    for rule in rules(PROMETHEUS / "rules" / "recording.yaml"):
        assert re.fullmatch(r"[a-z_]+:serin_[a-z_]+:[a-z0-9_]+|serin:[a-z_]+:ratio", rule["record"]), rule
        level = rule["record"].split(":")[0]
        grouped = re.search(r"by \(namespace, job, (.*?)(?:, le)?\)", rule["expr"])
        if grouped:
            assert grouped[1].replace(", ", "_") == level, rule


def test_rules_ask_only_for_what_there_is():
    for rule in rules():
        assert unknown_names(rule["expr"]) == set(), rule
        recorded = re.findall(r"[\w]+:[\w]+:[\w]+", str(rule.get("annotations", "")))
        assert all(unknown_names(name) == set() for name in recorded), rule


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_is_the_matter_and_what_to_do(name):
    alert = ALERTS[name]
    assert alert["for"] and alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["labels"].keys() == {"severity", "area"}
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url", "dashboard_url"}
    assert annotations["runbook_url"] == f"{BLOB}/{name}.md"
    uid = re.match(r"https://grafana\.example\.com/d/([a-z-]+)($|\?var-)", annotations["dashboard_url"])[1]
    assert uid in {json.loads(path.read_text("utf-8"))["uid"] for path in GRAFANA.glob("*.json")}
    # Which of many it is stands there, or there is only one.
    assert "{{" in annotations["summary"] + annotations["description"]


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_tested_to_fire_and_to_stay_quiet(name):
    expected = [case["exp_alerts"] for case in cases() if case["alertname"] == name]
    assert any(expected), f"no case fires {name}"
    # A case that fires for one series alone among several is one that stays quiet for the others.
    assert [] in expected or name in QUIET_BESIDE, f"no case keeps {name} quiet"


# Cases in which it fires for one replica or backend and stays quiet for others, which are in the same input.
QUIET_BESIDE = {
    "SerinAccessLogLinesDropped",
    "SerinBackendOverflows",
    "SerinBackendQueueing",
    "SerinConnectionsNearLimit",
    "SerinDescriptorsNearLimit",
    "SerinInFlightNearLimit",
    "SerinRestartsRepeatedly",
}


def test_every_case_names_an_alert_that_there_is():
    assert {case["alertname"] for case in cases()} == set(ALERTS)


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        ("alerts.yaml", "serin_state_saved == 0", "serin_state_saved = 0", "unexpected"),
        ("alerts.yaml", "for: 15m", "for: 15 minutes", "not a valid duration"),
        ("alerts.yaml", "{{ $labels.endpoint }}", "{{ $labels.endpoint }", "unexpected"),
        ("recording.yaml", "expr: vector(0.001)", "expression: vector(0.001)", "field expression not found"),
    ],
)
def test_a_broken_rule_is_caught(tools, tmp_path, file, old, new, why):
    done = tools.run("promtool", "check", "rules", changed(PROMETHEUS / "rules" / file, tmp_path, old, new))
    assert done.returncode != 0 and why in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "test", "why"),
    [
        ("alerts.yaml", "rate5m * 300 >= 100", "rate5m * 300 >= 0", "canary", "six failures of sixty"),
        ("alerts.yaml", "max == 0", "max >= 0", "canary", "a baseline that is the worse one"),
        ("recording.yaml", "namespace, job, route", "job, route", "canary", "in staging"),
        ("recording.yaml", 'code!~"5.."', 'code="5.."', "burn-rate", "seen by nobody"),
        ("recording.yaml", "vector(0.001)", "vector(0.01)", "burn-rate", "two percent of failures"),
        ("alerts.yaml", "offset 15m)", "offset 1m)", "endpoints", "count in full"),
        ("alerts.yaml", "and serin_workers", "", "saturation", "another program"),
    ],
)
def test_a_rule_that_says_something_else_is_caught(tools, tmp_path, file, old, new, test, why):
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    changed(PROMETHEUS / "rules" / file, tmp_path / "prometheus" / "rules", old, new)
    done = tools.run("promtool", "test", "rules", tmp_path / "prometheus" / "tests" / f"{test}.yaml")
    assert done.returncode != 0 and why in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("expression", "unknown"),
    [
        ("rate(serin_request_total[5m])", {"serin_request_total"}),
        ("route:serin_request:rate5m > 0", {"route:serin_request:rate5m"}),
        ('sum by (backend) (serin_backend_weight{rout="shop"})', {"serin_backend_weight: rout"}),
        ('sum by (backend, le) (rate(serin_request_duration_seconds_bucket{route="shop"}[5m]))', set()),
    ],
)
def test_a_metric_or_a_label_that_there_is_none_of_is_caught(expression, unknown):
    assert unknown_names(expression) == unknown


# === runbooks ===


def test_every_alert_has_its_page_and_every_page_its_alert():
    assert pages() == sorted(ALERTS)


def test_the_index_of_pages_has_every_alert_with_its_severity():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", index, re.MULTILINE))
    assert rows == {name: alert["labels"]["severity"] for name, alert in ALERTS.items()}


@pytest.mark.parametrize("name", ALERTS)
def test_every_page_says_what_it_means_and_what_to_do(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What it means", "What users see", "What to do"]
    assert ALERTS[name]["labels"]["severity"] in text.split("##")[0]
    for linked in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (PAGES / linked).exists(), linked
    assert unknown_names("\n".join(re.findall(r"```promql\n(.*?)```", text, re.DOTALL))) == set()


# === configurations ===


def test_promtool_finds_nothing_in_the_configuration_for_machines(tools):
    tools.passes("promtool", "check", "config", PROMETHEUS / "prometheus-machines.yaml")


def discovered(**labels):
    """A target as Kubernetes would show it."""
    pod = {"namespace": "shop", "pod_name": "serin-0", "pod_phase": "Running", **labels}
    names = {f"__meta_kubernetes_{name}": value for name, value in pod.items()}
    return {"targets": [f"10.0.0.1:{labels['pod_container_port_number']}"], "labels": names}


@pytest.fixture
def kubernetes(tmp_path):
    """The configuration for Kubernetes, told of some pods: Debian's Prometheus cannot discover them."""
    config = read(PROMETHEUS / "prometheus.yaml")
    config["rule_files"] = [str(PROMETHEUS / path) for path in config["rule_files"]]
    [job] = config["scrape_configs"]
    [discovery] = job.pop("kubernetes_sd_configs")
    selector = {"role": "pod", "label": "app.kubernetes.io/name=serin"}
    assert discovery == {"role": "pod", "selectors": [selector]}
    admin = {"pod_container_port_name": "admin", "pod_container_port_number": "9901"}
    web = {"pod_container_port_name": "http", "pod_container_port_number": "8080"}
    ended = discovered(**admin, pod_phase="Succeeded")
    job["static_configs"] = [discovered(**admin), discovered(**web), ended]
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_in_kubernetes_the_admin_port_of_each_pod_is_scraped(tools, kubernetes):
    tools.passes("promtool", "check", "config", kubernetes)
    command = ["check", "service-discovery", "--timeout=2s", kubernetes, "serin"]
    found = json.loads(tools.passes("promtool", *command))
    kept = [one["labels"] for one in found if one["labels"]]
    assert len(found) == 3 and len(kept) == 1
    assert kept[0]["__address__"] == "10.0.0.1:9901"
    assert {name: kept[0][name] for name in ("namespace", "pod", "job")} == {
        "namespace": "shop",
        "pod": "serin-0",
        "job": "serin",
    }


def test_the_job_is_called_as_alerts_expect_it():
    pattern = re.search(r'up\{job=~"(.*?)"\}', ALERTS["SerinInstanceDown"]["expr"])[1]
    for name in ("prometheus.yaml", "prometheus-machines.yaml"):
        [job] = read(PROMETHEUS / name)["scrape_configs"]
        assert re.fullmatch(pattern, job["job_name"])
        # serin_endpoint_healthy has a label `endpoint`, and so has every target of the Prometheus Operator.
        assert job["honor_labels"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("scrape_interval: 15s", "scrape_intervall: 15s", "scrape_intervall"),
        ("- rules/*.yaml", "- rules/alerts.yml", "does not point to an existing file"),
        ('[ "127.0.0.1:9901" ]', '[ "http://127.0.0.1:9901/metrics" ]', "not a valid hostname"),
    ],
)
def test_a_broken_configuration_is_caught(tools, tmp_path, old, new, why):
    shutil.copytree(PROMETHEUS / "rules", tmp_path / "rules")
    broken = changed(PROMETHEUS / "prometheus-machines.yaml", tmp_path, old, new)
    done = tools.run("promtool", "check", "config", broken)
    assert done.returncode != 0 and why in done.stdout + done.stderr


# === Alertmanager ===


def test_amtool_finds_nothing_in_the_configuration(tools):
    tools.passes("amtool", "check-config", ALERTMANAGER)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_reaches_who_its_severity_is_for(tools, name):
    labels = [f"{label}={value}" for label, value in {"alertname": name, **ALERTS[name]["labels"]}.items()]
    told = tools.passes("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels)
    receivers = {"critical": "pager", "warning": "chat", "info": "digest"}
    assert told.strip() == receivers[labels_of(name)["severity"]]


def test_inhibition_names_alerts_and_areas_that_there_are():
    areas = {alert["labels"]["area"] for alert in ALERTS.values()}
    for rule in read(ALERTMANAGER)["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, values = re.fullmatch(r'(alertname|area)=~?"(.*)"', matcher).groups()
            assert set(values.split("|")) <= (set(ALERTS) if label == "alertname" else areas), matcher


def held_back(*alerts):
    """Which of these alerts, all of them firing, the rules of inhibition hold back."""
    firing = [{**labels_of(labels["alertname"]), **labels} for labels in alerts]

    def fits(matchers, labels):
        for matcher in matchers:
            name, kind, value = re.fullmatch(r'(\w+)(=~?)"(.*)"', matcher).groups()
            if not re.fullmatch(value if kind == "=~" else re.escape(value), labels[name]):
                return False
        return True

    def holds_back(rule, source, target):
        same = all(source.get(name) == target.get(name) for name in rule["equal"])
        return same and fits(rule["source_matchers"], source) and fits(rule["target_matchers"], target)

    rules_of_inhibition = read(ALERTMANAGER)["inhibit_rules"]
    return sorted(
        target["alertname"]
        for target in firing
        if any(holds_back(rule, source, target) for rule in rules_of_inhibition for source in firing)
    )


def test_while_no_serin_answers_nothing_is_said_of_versions():
    here = {"namespace": "shop", "job": "serin"}
    about = {**here, "route": "shop", "backend": "shop-canary", "version": "1.9.0"}
    assert held_back(
        {"alertname": "SerinDown", **here},
        {"alertname": "SerinCanaryErrorRatioHigh", **about},
        {"alertname": "SerinCanaryErrorRatioElevated", **about},
        {"alertname": "SerinCanaryLatencyHigh", **about},
        {"alertname": "SerinInstanceDown", **here, "instance": "10.0.0.1:9901"},
        {"alertname": "SerinCertificateExpires", **here, "certificate": "shop.crt"},
    ) == [
        "SerinCanaryErrorRatioElevated",
        "SerinCanaryErrorRatioHigh",
        "SerinCanaryLatencyHigh",
        "SerinInstanceDown",
    ]


def test_a_proxy_that_is_down_elsewhere_holds_nothing_back():
    about = {"namespace": "shop", "job": "serin", "route": "shop", "backend": "shop-canary"}
    down = {"alertname": "SerinDown", "namespace": "staging", "job": "serin"}
    assert held_back(down, {"alertname": "SerinCanaryErrorRatioHigh", **about}) == []


def test_of_two_alerts_that_say_the_same_the_louder_one_is_heard():
    about = {"job": "serin", "route": "shop"}
    assert held_back(
        {"alertname": "SerinErrorBudgetBurnsFast", **about},
        {"alertname": "SerinErrorBudgetBurnsSlowly", **about},
        {"alertname": "SerinCanaryErrorRatioHigh", **about, "backend": "a", "version": "2"},
        {"alertname": "SerinCanaryErrorRatioElevated", **about, "backend": "b", "version": "2"},
    ) == ["SerinErrorBudgetBurnsSlowly"]


@pytest.mark.parametrize("name", ALERTS)
def test_no_alert_holds_back_itself(name):
    assert held_back({"alertname": name, "job": "serin"}) == []


def templates(value):
    """Every text of the receivers with something to be filled in."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in templates(one)]
    return [value] if isinstance(value, str) and "{{" in value else []


def test_every_message_can_be_written(tools, tmp_path):
    (tmp_path / "none.tmpl").write_text("", encoding="utf-8")
    command = ["amtool", "template", "render", f"--template.glob={tmp_path / 'none.tmpl'}"]
    texts = templates(read(ALERTMANAGER)["receivers"])
    assert len(texts) > 5
    for text in texts:
        tools.passes(*command, f"--template.text={text}")
    assert tools.run(*command, "--template.text={{ .Sumary }}").returncode != 0


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("receiver: digest", "receiver: digset", 'undefined receiver "digset"'),
        ("group_wait: 10s", "group_wait: ten", "not a valid duration"),
        ('severity="critical"\'', "severity is critical'", "bad matcher format"),
        ("equal: [ namespace, job ]", "equals: [ namespace, job ]", "field equals not found"),
    ],
)
def test_a_broken_configuration_of_alertmanager_is_caught(tools, tmp_path, old, new, why):
    done = tools.run("amtool", "check-config", changed(ALERTMANAGER, tmp_path, old, new))
    assert done.returncode != 0 and why in done.stdout + done.stderr
