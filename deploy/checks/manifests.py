"""What the checks of Kubernetes manifests and of the Helm chart share: building, validating and scanning
objects, and laying out a pod's files as the kubelet does.
"""

import functools
import json
import pathlib
import subprocess
import sys

import kubernetes_validate
import yaml
from kubernetes_validate import utils

from conftest import DEPLOY, REPOSITORY, TOOLS

KUBERNETES = DEPLOY / "kubernetes"
CHART = DEPLOY / "helm" / "serin"
GENERATE = KUBERNETES / "components" / "prometheus-operator" / "generate"

# From the oldest that the chart allows to the newest there is.
VERSIONS = ["1.27", "1.32", utils.latest_version()]

# It reads the same large files for every object.
utils.schema_contents = functools.cache(utils.schema_contents)


def build(tools, directory):
    """The objects of a kustomization."""
    return list(yaml.safe_load_all(tools.passes("kustomize", "build", directory)))


def of_kind(objects, kind):
    return [item for item in objects if item["kind"] == kind]


def named(objects, kind, name="serin"):
    """The only object of this kind and name."""
    (found,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return found


def pod_of(workload):
    """The pod of a Deployment, or a Pod itself, as (labels, spec)."""
    pod = workload if workload["kind"] == "Pod" else workload["spec"]["template"]
    return pod["metadata"]["labels"], pod["spec"]


def is_custom(item):
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


def invalid(tools, objects, scratch, versions=VERSIONS):
    """What the API server would refuse, and what it would drop without a word, such as a misspelt field."""
    distinct = [json.loads(text) for text in sorted({json.dumps(item, sort_keys=True) for item in objects})]
    core = [item for item in distinct if not is_custom(item)]
    custom = [item for item in distinct if is_custom(item)]
    complaints = [
        f"{item['kind']} {item['metadata']['name']} in {version}: {complaint}"
        for item in core
        for version in versions
        for complaint in complaints_about(item, version)
    ]
    return complaints + invalid_custom(tools, custom, scratch)


def complaints_about(item, version):
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def invalid_custom(tools, objects, scratch):
    if not objects:
        return []
    file = scratch / "custom-resources.json"
    file.write_text(json.dumps(objects))
    answers = json.loads(tools.node("validate.mjs", file))
    return [
        f"{item['kind']} {item['metadata']['name']}: {complaint}"
        for item, complaints in zip(objects, answers, strict=True)
        for complaint in complaints
    ]


def insecure(tools, objects, scratch):
    """What scanners have against the objects: trivy from HIGH on, and checkov but for its .checkov.yaml."""
    directory = scratch / "scanned"
    directory.mkdir(exist_ok=True)
    # One file for each: checkov leaves out a file with `{{`, and the alerts of a PrometheusRule have that.
    for number, item in enumerate(objects):
        (directory / f"{number}-{item['kind']}.yaml").write_text(yaml.safe_dump(item))
    return trivy(tools, directory) + checkov(tools, directory)


def trivy(tools, directory):
    options = ["--skip-check-update", "--quiet", "--cache-dir", TOOLS / "trivy", "--format", "json"]
    report = json.loads(tools.passes("trivy", "config", *options, directory))
    # Without any, it did not understand the file.
    assert report.get("Results"), report
    found = [failure for result in report["Results"] for failure in result.get("Misconfigurations", [])]
    return [
        f"{failure['ID']} {failure['Severity']}: {failure['Message']}"
        for failure in found
        if failure["Severity"] in ("HIGH", "CRITICAL")
    ]


def checkov(tools, directory):
    options = ["--framework", "kubernetes", "--skip-download", "--output", "json"]
    done = tools.run(
        "checkov", *options, "--config-file", KUBERNETES / ".checkov.yaml", "--directory", directory
    )
    report = json.loads(done.stdout)
    assert report["summary"]["passed"], report
    failed = report["results"]["failed_checks"]
    return [f"{failure['check_id']}: {failure['check_name']} ({failure['resource']})" for failure in failed]


def generated(into):
    """Runs `generate`, which makes files from Prometheus rules, on another directory."""
    subprocess.run([sys.executable, str(GENERATE), "--into", str(into)], check=True)


def lay_out(directory, files):
    """Writes files into a mounted directory as the kubelet does: one rename replaces all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    revision = directory / f"..{len(list(directory.iterdir()))}"
    revision.mkdir()
    for name, text in files.items():
        (revision / name).write_text(text)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(pathlib.Path("..data") / name)
    (directory / "..data_tmp").symlink_to(revision.name)
    (directory / "..data_tmp").rename(directory / "..data")


def mounted_files(objects, deployment="serin"):
    """The files in /etc/serin of a pod. The Secret has what it should: a token for the writer `pipeline`."""
    _, spec = pod_of(named(objects, "Deployment", deployment))
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "config"]
    files = {}
    for source in volume["projected"]["sources"]:
        if "configMap" in source:
            files.update(named(objects, "ConfigMap", source["configMap"]["name"])["data"])
        else:
            files["pipeline.token"] = "0123456789abcdef" * 4
    return files


def release():
    """The version of the program, as Cargo.toml says it."""
    (line, *_) = [
        line for line in (REPOSITORY / "Cargo.toml").read_text().splitlines() if line.startswith("version = ")
    ]
    return line.split('"')[1]
