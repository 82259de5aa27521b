"""What brings Serin into clusters, in deploy/gitops: that Argo CD and Flux take it, that it leads to overlays
that are there, and that production changes when it may.
"""

import copy
import datetime
import json
import re
import shutil
import subprocess

import helm_python as helm
import pytest
import yaml

from conftest import DEPLOY, REPOSITORY, documents
from manifests import CHART, KUBERNETES, build, insecure, invalid, named, of_kind, release
from running import program  # noqa: F401

GITOPS = DEPLOY / "gitops"
ARGO_CD = GITOPS / "argo-cd"
FLUX = GITOPS / "flux"
IMAGE = "ghcr.io/serin-proxy/serin"
MARKER = re.compile(r'^ *(newTag): (\S+) # (\{"\$imagepolicy": .*\})$', re.MULTILINE)


def objects_in(directory):
    """All objects of a directory, those beside its kustomization as well."""
    return [
        item
        for file in sorted(directory.glob("*.yaml"))
        for item in documents(file)
        if file.name != "kustomization.yaml"
    ]


@pytest.fixture(scope="module")
def argo_cd():
    return objects_in(ARGO_CD)


@pytest.fixture(scope="module")
def flux():
    return objects_in(FLUX)


@pytest.fixture(scope="module")
def overlays(tools):
    """The objects of the overlays, by their paths in the repository."""
    return {
        f"deploy/kubernetes/overlays/{name}": build(tools, KUBERNETES / "overlays" / name)
        for name in ("dev", "production")
    }


@pytest.fixture
def render(tmp_path):
    """Renders a template of Go as ApplicationSets do, in which `.` is what the generator says. By Helm, which
    has the same functions for templates.
    """

    def render(template, values):
        chart = tmp_path / "chart"
        (chart / "templates").mkdir(parents=True, exist_ok=True)
        (chart / "Chart.yaml").write_text("{ apiVersion: v2, name: chart, version: 0.1.0 }")
        text = "{{- with .Values.element }}\n" + template + "\n{{- end }}\n"
        (chart / "templates" / "it.yaml").write_text(text)
        with helm.Chart.load(chart) as loaded:
            (text,) = loaded.render({"element": values}, name="it", namespace="it").values()
        return yaml.safe_load(text) or {}

    return render


def merged(base, patch):
    """As templatePatch is merged into what the template has become."""
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return patch
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


# ---------------------------------------------------------------------------------------------------- Argo CD


def test_argo_cd_takes_it(tools, argo_cd, tmp_path):
    assert invalid(tools, argo_cd, tmp_path) == []


def test_one_command_applies_the_project_and_the_applications(tools):
    applied = build(tools, ARGO_CD)
    assert sorted(item["kind"] for item in applied) == ["AppProject", "Application", "Application"]


def test_applications_lead_to_overlays_and_into_their_namespaces(argo_cd, overlays):
    for application in of_kind(argo_cd, "Application"):
        objects = overlays[application["spec"]["source"]["path"]]
        namespace = named(objects, "Deployment")["metadata"]["namespace"]
        assert application["spec"]["destination"]["namespace"] == namespace


def test_the_project_lets_them_and_no_secrets(argo_cd, overlays):
    project = named(argo_cd, "AppProject")["spec"]
    allowed = {(rule["group"], rule["kind"]) for rule in project["clusterResourceWhitelist"]}
    for application in of_kind(argo_cd, "Application"):
        spec = application["spec"]
        assert spec["project"] == "serin"
        assert spec["source"]["repoURL"] in project["sourceRepos"]
        assert spec["destination"] in project["destinations"]
        objects = overlays[spec["source"]["path"]]
        for item in objects:
            group = item["apiVersion"].rpartition("/")[0]
            assert "namespace" in item["metadata"] or (group, item["kind"]) in allowed
        assert not of_kind(objects, "Secret")
    assert project["namespaceResourceBlacklist"] == [{"group": "", "kind": "Secret"}]


def test_dev_follows_by_itself_and_production_by_hand(argo_cd):
    automated = named(argo_cd, "Application", "serin-dev")["spec"]["syncPolicy"]["automated"]
    assert automated == {"prune": True, "selfHeal": True}
    production = named(argo_cd, "Application", "serin-production")
    assert "automated" not in production["spec"]["syncPolicy"]
    assert "finalizers" not in production["metadata"]


def test_replicas_are_left_to_the_autoscaler_where_there_is_one(argo_cd, overlays):
    for application in of_kind(argo_cd, "Application"):
        spec = application["spec"]
        scalers = of_kind(overlays[spec["source"]["path"]], "HorizontalPodAutoscaler")
        targets = [scaler["spec"]["scaleTargetRef"] for scaler in scalers]
        ignored = spec.get("ignoreDifferences", [])
        assert [(item["kind"], item["name"]) for item in ignored] == [
            (target["kind"], target["name"]) for target in targets
        ]
        assert all(item["jsonPointers"] == ["/spec/replicas"] for item in ignored)
        assert ("RespectIgnoreDifferences=true" in spec["syncPolicy"]["syncOptions"]) is bool(scalers)


def test_the_application_set_makes_the_same_applications(argo_cd, render):
    spec = named(argo_cd, "ApplicationSet")["spec"]
    assert spec["goTemplate"] is True
    made = {}
    for element in spec["generators"][0]["list"]["elements"]:
        application = render(yaml.safe_dump(spec["template"], width=1000), element)
        application = merged(application, render(spec["templatePatch"], element))
        made[application["metadata"]["name"]] = application["spec"]
    assert made == {item["metadata"]["name"]: item["spec"] for item in of_kind(argo_cd, "Application")}


def active(window, when):
    """Whether a sync window is open: its schedule says when it begins, and it lasts for its duration."""
    minute, hour, day, month, weekdays = window["schedule"].split()
    duration = datetime.timedelta(hours=int(window["duration"].removesuffix("h")))
    first, _, last = weekdays.partition("-")
    begin = when.replace(hour=int(hour), minute=int(minute), second=0)
    for _ in range(duration.days + 2):
        fits = (
            (day == "*" or begin.day == int(day))
            and (month == "*" or begin.month == int(month))
            and (weekdays == "*" or int(first) <= begin.isoweekday() % 7 <= int(last or first))
        )
        if fits and begin <= when < begin + duration:
            return True
        begin -= datetime.timedelta(days=1)
    return False


def may_sync(project, application, when, by_hand):
    """As Argo CD decides it: what is denied comes first, then what is allowed, and whoever has an `allow` may
    at no other time, unless a window says that it may by hand.
    """
    windows = [window for window in project["spec"]["syncWindows"] if application in window["applications"]]
    assert all(window["timeZone"] == "Etc/UTC" for window in windows)
    denied = [window for window in windows if window["kind"] == "deny" and active(window, when)]
    if denied:
        return by_hand and all(window["manualSync"] for window in denied)
    allows = [window for window in windows if window["kind"] == "allow"]
    if not allows or any(active(window, when) for window in allows):
        return True
    return by_hand and all(window["manualSync"] for window in allows)


@pytest.mark.parametrize(
    "when, by_hand, itself",
    [
        ("2026-11-25 09:00", True, True),
        ("2026-11-25 15:59", True, True),
        ("2026-11-25 16:00", False, False),
        ("2026-11-25 03:00", False, False),
        # A Saturday and a Sunday.
        ("2026-11-28 10:00", False, False),
        ("2026-11-29 10:00", False, False),
        # The turn of the year.
        ("2026-12-23 10:00", False, False),
        ("2027-01-03 23:00", False, False),
        ("2027-01-04 10:00", True, True),
    ],
)
def test_production_changes_in_working_hours(argo_cd, when, by_hand, itself):
    project = named(argo_cd, "AppProject")
    moment = datetime.datetime.fromisoformat(when)
    assert may_sync(project, "serin-production", moment, by_hand=True) is by_hand
    assert may_sync(project, "serin-production", moment, by_hand=False) is itself
    assert may_sync(project, "serin-dev", moment, by_hand=False) is True


@pytest.mark.parametrize(
    "number, when", [(0, "2026-11-28 10:00"), (1, "2026-12-23 10:00"), (1, "2026-12-26 03:00")]
)
def test_in_an_emergency_one_window_is_opened_for_syncs_by_hand(argo_cd, number, when):
    """The number is that of the command in the project's comment."""
    project = copy.deepcopy(named(argo_cd, "AppProject"))
    project["spec"]["syncWindows"][number]["manualSync"] = True
    moment = datetime.datetime.fromisoformat(when)
    assert may_sync(project, "serin-production", moment, by_hand=True) is True
    assert may_sync(project, "serin-production", moment, by_hand=False) is False


# ------------------------------------------------------------------------------------------------------- Flux


def test_flux_takes_it(tools, flux, tmp_path):
    assert invalid(tools, flux, tmp_path) == []


def test_one_command_applies_both_environments_and_the_window(tools):
    applied = {(item["kind"], item["metadata"]["name"]) for item in build(tools, FLUX)}
    assert {("Kustomization", "serin-dev"), ("Kustomization", "serin-production")} <= applied
    assert {
        ("GitRepository", "serin"),
        ("CronJob", "serin-window-open"),
        ("CronJob", "serin-window-close"),
    } <= applied
    assert ("HelmRelease", "serin") not in applied


def test_kustomizations_lead_to_overlays_of_the_source(flux, overlays):
    for item in of_kind(flux, "Kustomization"):
        assert item["spec"]["path"].removeprefix("./") in overlays
        reference = item["spec"]["sourceRef"]
        assert named(flux, reference["kind"], reference["name"])["spec"]["ref"] == {"branch": "main"}
        assert item["spec"]["prune"] is True and item["spec"]["wait"] is True


def test_production_waits_for_dev_and_outlives_its_kustomization(flux):
    spec = named(flux, "Kustomization", "serin-production")["spec"]
    assert [item["name"] for item in spec["dependsOn"]] == ["serin-dev"]
    assert spec["deletionPolicy"] == "Orphan"
    # Or each apply would let go what the window holds.
    assert "suspend" not in spec


def test_the_window_lets_production_go_and_holds_it(flux):
    said = {}
    for job in of_kind(flux, "CronJob"):
        spec = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert "kustomizations.kustomize.toolkit.fluxcd.io/serin-production" in container["args"]
        assert f"--namespace={job['metadata']['namespace']}" in container["args"]
        # What has been written as `kubectl` is undone by Flux.
        assert "--field-manager=serin-window" in container["args"]
        (patch,) = [argument for argument in container["args"] if argument.startswith("--patch=")]
        assert re.search(r":v[0-9.]+@sha256:[0-9a-f]{64}$", container["image"])
        said[job["metadata"]["name"]] = (json.loads(patch.removeprefix("--patch=")), job["spec"]["schedule"])
    assert said == {
        "serin-window-open": ({"spec": {"suspend": False}}, "0 9 * * 1-5"),
        "serin-window-close": ({"spec": {"suspend": True}}, "0 16 * * 1-5"),
    }


def test_the_window_is_that_of_argo_cd(argo_cd, flux):
    (window, _) = named(argo_cd, "AppProject")["spec"]["syncWindows"]
    opened = named(flux, "CronJob", "serin-window-open")["spec"]
    closed = named(flux, "CronJob", "serin-window-close")["spec"]
    assert (opened["schedule"], opened["timeZone"]) == (window["schedule"], window["timeZone"])
    hours = [int(spec["schedule"].split()[1]) for spec in (opened, closed)]
    assert f"{hours[1] - hours[0]}h" == window["duration"]


def test_the_window_may_do_no_more_than_that(tools, flux, tmp_path):
    (role,) = of_kind(flux, "Role")
    (rule,) = role["rules"]
    assert rule["resourceNames"] == ["serin-production"]
    assert sorted(rule["verbs"]) == ["get", "patch"]
    core = [item for item in flux if item["apiVersion"] in ("v1", "batch/v1", "rbac.authorization.k8s.io/v1")]
    # It does talk to the API server, and so it has a token.
    found = [entry for entry in insecure(tools, core, tmp_path) if not entry.startswith("CKV_K8S_38")]
    assert found == []


def test_new_images_are_proposed_for_lines_that_are_marked(flux):
    policies = {item["metadata"]["name"] for item in of_kind(flux, "ImagePolicy")}
    (automation,) = of_kind(flux, "ImageUpdateAutomation")
    files = list((REPOSITORY / automation["spec"]["update"]["path"]).rglob("kustomization.yaml"))
    marked = [match for file in files for match in MARKER.finditer(file.read_text())]
    assert len(marked) == len(files) == len(of_kind(flux, "Kustomization"))
    for match in marked:
        namespace, name, field = json.loads(match[3])["$imagepolicy"].split(":")
        assert (namespace, field) == (automation["metadata"]["namespace"], "tag") and name in policies
    # Not to the branch that clusters follow.
    assert (
        automation["spec"]["git"]["push"]["branch"] != automation["spec"]["git"]["checkout"]["ref"]["branch"]
    )
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "flux-change.yml").read_text())
    # YAML takes the key `on` for a truth.
    assert workflow[True]["push"]["branches"] == ["flux/**"]
    assert automation["spec"]["git"]["push"]["branch"].startswith("flux/")


@pytest.mark.parametrize(
    "tag, fits",
    [("0.1.0", True), ("0.9.12", True), ("0.2.0-rc.1", False), ("1.0.0", False), ("latest", False)],
)
def test_releases_are_proposed_and_nothing_else(flux, tag, fits):
    """The range of the policy, as semver reads it: a candidate is in it only if the range names one."""
    (policy,) = of_kind(flux, "ImagePolicy")
    low, high = re.fullmatch(r">=([0-9.]+) <([0-9.]+)", policy["spec"]["policy"]["semver"]["range"]).groups()
    numbers = [tuple(map(int, text.split("."))) for text in (low, high)]
    version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", tag)
    assert bool(version and numbers[0] <= tuple(map(int, version.groups())) < numbers[1]) is fits


@pytest.mark.parametrize("name", ["dev", "production"])
def test_the_lines_that_are_marked_say_which_image_runs_and_the_base_does_not(tools, tmp_path, name):
    """A release writes its version into the base before its image is there."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    base = tmp_path / "kubernetes" / "base" / "deployment.yaml"
    text = base.read_text()
    assert f"{IMAGE}:{release()}" in text
    base.write_text(text.replace(f"{IMAGE}:{release()}", f"{IMAGE}:9.9.9"))
    overlay = tmp_path / "kubernetes" / "overlays" / name
    file = overlay / "kustomization.yaml"
    file.write_text(MARKER.sub(lambda match: match[0].replace(match[2], "8.8.8"), file.read_text()))
    (container,) = named(build(tools, overlay), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"].partition("@")[0] == f"{IMAGE}:8.8.8"


def test_nothing_but_the_overlay_says_which_image_runs(flux):
    assert all("images" not in item["spec"] for item in of_kind(flux, "Kustomization"))


def test_the_chart_takes_the_values_of_the_release(flux, program, tmp_path):  # noqa: F811
    spec = named(flux, "HelmRelease")["spec"]
    assert (REPOSITORY / spec["chart"]["spec"]["chart"]) == CHART
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(spec["values"])
        rendered = chart.render(spec["values"], name=spec["releaseName"], namespace=spec["targetNamespace"])
    objects = [
        item for path, text in rendered.items() if path.endswith(".yaml") for item in yaml.safe_load_all(text)
    ]
    objects = [item for item in objects if item]
    deployment = named(objects, "Deployment")
    assert "replicas" not in deployment["spec"]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"{IMAGE}:{release()}"
    for config in of_kind(objects, "ConfigMap"):
        for name, text in config["data"].items():
            (tmp_path / name).write_text(text)
    subprocess.run([program, "check", str(tmp_path / "serin.yaml")], check=True)


# ------------------------------------------------------------------------------------------------------- both


def test_the_repository_is_the_same_everywhere(argo_cd, flux):
    urls = {item["spec"]["source"]["repoURL"] for item in of_kind(argo_cd, "Application")}
    urls |= {item["spec"]["url"] for item in of_kind(flux, "GitRepository")}
    assert urls == {
        "https://github.com/serin-proxy/serin",
        # With a key that may write.
        "ssh://git@github.com/serin-proxy/serin.git",
    }


def test_the_readme_knows_every_file():
    readme = (GITOPS / "README.md").read_text()
    for file in [*ARGO_CD.glob("*.yaml"), *FLUX.glob("*.yaml")]:
        known = file.name in ("kustomization.yaml", "source.yaml")
        assert known or f"({file.parent.name}/{file.name})" in readme


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        ("argo-cd/application-dev.yaml", "selfHeal", "selfheal", "selfheal is not known"),
        ("argo-cd/application-dev.yaml", "project: serin", "projects: serin", "required property project"),
        ("argo-cd/application-production.yaml", "limit: 5", "limit: five", "retry/limit must be integer"),
        ("argo-cd/applicationset.yaml", "goTemplate: true", "gotemplate: true", "gotemplate is not known"),
        ("argo-cd/project.yaml", "manualSync: false", "manualsync: false", "manualsync is not known"),
        ("flux/dev.yaml", "prune: true", "prune: yes please", "prune must be boolean"),
        ("flux/production.yaml", "dependsOn", "dependson", "dependson is not known"),
        ("flux/production.yaml", "Orphan", "Keep", "allowed values"),
        ("flux/source.yaml", "interval: 1m", "interval: 60", "interval must be string"),
        ("flux/window.yaml", "concurrencyPolicy", "concurrency", "concurrency"),
        ("flux/helmrelease.yaml", "strategy: rollback", "strategy: back", "allowed values"),
        (
            "flux/image-automation.yaml",
            "imageRepositoryRef",
            "imageRepository",
            "required property imageRepositoryRef",
        ),
    ],
)
def test_a_mistake_is_found(tools, tmp_path, file, old, new, complaint):
    shutil.copytree(GITOPS, tmp_path / "gitops")
    broken = tmp_path / "gitops" / file
    text = broken.read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    found = invalid(tools, documents(broken), tmp_path)
    assert any(complaint in entry for entry in found), found
