"""The pipelines of GitHub Actions and GitLab CI, and the scripts that both of them run: that their formats
are right, that nothing is run but what is pinned, with no more permissions than it needs, and that the
scripts do what they say.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from conftest import DEPLOY, REPOSITORY, TOOLS, documents
from manifests import build, named

WORKFLOWS = REPOSITORY / ".github" / "workflows"
GITLAB = REPOSITORY / ".gitlab-ci.yml"
PIPELINES = DEPLOY / "pipelines"
SCRIPTS = ["build-image", "bump-image", "open-change", "publish-image", "release-version", "scan", "tools"]
OVERLAYS = [f"deploy/kubernetes/overlays/{name}/kustomization.yaml" for name in ("dev", "production")]

IMAGE = "ghcr.io/serin-proxy/serin"
DIGEST = "sha256:" + "0123456789abcdef" * 4
PINNED = re.compile(r"[a-z0-9./-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}")

# Scripts are run in Debian's shell and in Alpine's, which know no more than POSIX asks for.
SHELL = shutil.which("dash") or "/bin/sh"


def load(file):
    (content,) = documents(file)
    return content


@pytest.fixture(scope="module")
def workflows():
    return {file.name: load(file) for file in sorted(WORKFLOWS.glob("*.yml"))}


@pytest.fixture(scope="module")
def gitlab():
    return load(GITLAB)


def jobs_of(workflows):
    return {
        f"{file} {name}": job for file, content in workflows.items() for name, job in content["jobs"].items()
    }


def gitlab_jobs(gitlab):
    words = {"stages", "workflow", "variables", "default", "include"}
    return {name: job for name, job in gitlab.items() if name not in words and not name.startswith(".")}


def inherited(gitlab, name):
    """A job of GitLab with what it extends."""
    job = gitlab[name]
    parents = job.get("extends", [])
    whole = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        whole |= inherited(gitlab, parent)
    return whole | job


def text_of(job):
    return json.dumps(job)


@pytest.fixture
def repository(tmp_path):
    """A repository as the scripts find it: themselves, and the files that they are about."""
    root = tmp_path / "repository"
    shutil.copytree(PIPELINES, root / "deploy" / "pipelines")
    for name in (*OVERLAYS, "Cargo.toml", "Cargo.lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return root


class Commands:
    """Stand-ins for programs, which note how they were called."""

    def __init__(self, directory):
        self.directory = directory
        self.log = directory / "calls"
        directory.mkdir()

    def add(self, name, body=""):
        """A program of this name, which does this much."""
        file = self.directory / name
        note = f'{{ printf "%s\\037" "{name}" "$@"; printf "\\036"; }} >> "{self.log}"'
        file.write_text(f"#!/bin/sh\n{note}\n{body}\n")
        file.chmod(0o755)

    def calls(self):
        if not self.log.exists():
            return []
        # Words may be empty, and have lines: they end with a unit separator, calls with a record separator.
        return [call.split("\x1f")[:-1] for call in self.log.read_text().split("\x1e")[:-1]]


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path / "commands")


def run(repository, commands, script, *arguments, **environment):
    """Runs a script of the pipelines with the stand-ins before all other programs."""
    own = {"PATH": f"{commands.directory}:{os.environ['PATH']}", "HOME": str(repository.parent)}
    # What the git of whoever runs the tests is set to is nothing that a pipeline has.
    own |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    return subprocess.run(
        [SHELL, repository / "deploy" / "pipelines" / script, *arguments],
        capture_output=True,
        text=True,
        env=own | environment,
        timeout=60,
        check=False,
    )


# --------------------------------------------------------------------------------------------- GitHub Actions


def test_github_takes_the_workflows(tools):
    files = sorted(WORKFLOWS.glob("*.yml"))
    assert [file.name for file in files] == ["ci.yml", "flux-change.yml", "release.yml"]
    # It looks for shellcheck, and asks it about the steps.
    path = f"{TOOLS}/venv/bin:{os.environ['PATH']}"
    tools.passes("actionlint", *files, env=os.environ | {"PATH": path})
    tools.passes("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *files)


def unpinned(text):
    """The lines that use an action otherwise than by its commit, with the version beside it."""
    return [
        line.strip()
        for line in text.splitlines()
        if re.search(r"\buses:", line)
        and not re.search(r" uses: \./\.github/workflows/[a-z-]+\.yml$", line)
        and not re.search(r" uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)
    ]


def test_actions_are_pinned_by_commit_with_their_version_beside_it():
    text = "".join(file.read_text() for file in WORKFLOWS.glob("*.yml"))
    assert text.count(" uses: ") > 5
    assert unpinned(text) == []


@pytest.mark.parametrize(
    "reference", ["v6", "main", "de0fac2 # v6.0.2", "de0fac2e4500dabe0009e67214ff5f5447ce83dd"]
)
def test_an_action_that_is_not_pinned_is_found(reference):
    line = f"- uses: actions/checkout@{reference}"
    assert unpinned(f"    steps:\n      {line}\n") == [line]


def test_one_action_has_one_version():
    text = "".join(file.read_text() for file in WORKFLOWS.glob("*.yml"))
    versions = {}
    for name, commit, version in re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40}) # (\S+)", text):
        versions.setdefault(name, set()).add((commit, version))
    assert all(len(found) == 1 for found in versions.values()), versions


def test_containers_are_pinned_by_digest(workflows):
    for job in jobs_of(workflows).values():
        assert "container" not in job or PINNED.fullmatch(job["container"])


def test_each_job_has_the_permissions_that_it_needs(workflows):
    assert all(content["permissions"] == {} for content in workflows.values())
    writes = {
        name: {scope for scope, level in job["permissions"].items() if level == "write"}
        for name, job in jobs_of(workflows).items()
    }
    assert {name: scopes for name, scopes in writes.items() if scopes} == {
        "flux-change.yml propose": {"actions", "pull-requests"},
        "release.yml build": {"packages"},
        "release.yml publish": {"attestations", "id-token", "packages"},
        "release.yml gitops": {"actions", "contents", "pull-requests"},
    }


def test_credentials_stay_only_where_something_is_pushed(workflows):
    for name, job in jobs_of(workflows).items():
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is (name == "release.yml gitops")


def test_no_step_is_written_by_whoever_names_a_branch(workflows):
    """What a request brings comes to a step as a variable, and never as a part of its text."""
    for job in jobs_of(workflows).values():
        for step in job.get("steps", []):
            assert "${{" not in step.get("run", "")


def test_every_job_ends_by_itself(workflows, gitlab):
    for name, job in jobs_of(workflows).items():
        assert "uses" in job or job["timeout-minutes"] <= 60, name


def test_a_release_is_checked_before_it_is_published_and_published_before_it_is_proposed(workflows, gitlab):
    jobs = workflows["release.yml"]["jobs"]
    assert workflows["release.yml"][True] == {"push": {"tags": ["v*"]}}
    assert (
        jobs["checks"]["uses"] == "./.github/workflows/ci.yml"
        and "workflow_call" in workflows["ci.yml"][True]
    )
    assert {"checks", "version", "build"} == set(jobs["publish"]["needs"])
    assert "publish" in jobs["gitops"]["needs"]
    checks = {name for name, job in gitlab_jobs(gitlab).items() if job["stage"] == "check"}
    assert set(gitlab["publish"]["needs"]) == checks | {"build"}
    assert "publish" in gitlab["gitops"]["needs"]


def test_an_image_is_looked_through_before_it_has_a_tag(workflows, gitlab):
    for job in workflows["release.yml"]["jobs"]["build"], gitlab["build"]:
        text = text_of(job)
        assert text.index("build-image") < text.index("scan image")
        assert "publish-image" not in text


def test_two_platforms_are_built_each_on_its_own(workflows, gitlab):
    matrix = workflows["release.yml"]["jobs"]["build"]["strategy"]["matrix"]["include"]
    assert [entry["arch"] for entry in matrix] == ["amd64", "arm64"]
    (outputs,) = [workflows["release.yml"]["jobs"]["build"]["outputs"]]
    assert outputs.keys() == {"amd64", "arm64"}
    assert [entry["ARCH"] for entry in gitlab["build"]["parallel"]["matrix"]] == ["amd64", "arm64"]


# -------------------------------------------------------------------------------------------------- GitLab CI


def listed(tools, root, **variables):
    """The jobs of a pipeline for GitLab, by gitlab-ci-local."""
    options = [word for name, value in variables.items() for word in ("--variable", f"{name}={value}")]
    done = tools.run("gitlab-ci-local", "--list-csv", *options, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(";")[0].strip('"') for line in done.stdout.splitlines() if ";" in line][1:]


@pytest.fixture
def project(tmp_path):
    """A project of GitLab with the pipeline alone."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(GITLAB, root)
    git(root, "init", "--quiet", "--initial-branch", "main", ".")
    git(root, "remote", "add", "origin", "git@gitlab.example.com:serin-proxy/serin.git")
    commit(root)
    return root


def git(root, *arguments):
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    return subprocess.run(
        # In a container, a checkout may belong to somebody else.
        ["git", "-c", "safe.directory=*", *arguments],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout


def commit(root, message="A state"):
    git(root, "add", "--all")
    git(
        root,
        "-c",
        "user.name=Tests",
        "-c",
        "user.email=tests@serin.invalid",
        "commit",
        "--quiet",
        "-m",
        message,
    )


def test_gitlab_takes_the_pipeline(tools, project):
    tools.passes("check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", GITLAB)
    assert "gitops" in listed(tools, project, CI_COMMIT_TAG="v0.1.0")


def test_only_a_tag_publishes(tools, project):
    checks = ["test", "deploy-files", "dependencies", "dockerfile", "image-builds", "scan"]
    assert listed(tools, project, CI_COMMIT_BRANCH="main") == checks
    released = listed(tools, project, CI_COMMIT_TAG="v0.1.0")
    assert [name.partition(":")[0] for name in released] == [
        *checks,
        "version",
        "build",
        "build",
        "publish",
        "gitops",
    ]


def test_a_schedule_looks_for_vulnerabilities(tools, project, workflows):
    assert listed(tools, project, CI_PIPELINE_SOURCE="schedule") == ["dependencies", "scan"]
    assert "schedule" in workflows["ci.yml"][True]


def test_images_of_gitlab_are_pinned_by_digest(gitlab):
    for name in gitlab_jobs(gitlab):
        job = inherited(gitlab, name)
        image = job["image"]
        assert PINNED.fullmatch(image if isinstance(image, str) else image["name"]), name
        assert all(PINNED.fullmatch(service["name"]) for service in job.get("services", []))


def test_gitlab_signs_by_its_own_identity(gitlab):
    assert gitlab["publish"]["id_tokens"] == {"SIGSTORE_ID_TOKEN": {"aud": "sigstore"}}
    assert [name for name, job in gitlab_jobs(gitlab).items() if "id_tokens" in job] == ["publish"]


def test_both_pipelines_run_the_same_programs():
    """Of the same versions: what GitLab runs as an image, GitHub takes out of that image."""
    text = GITLAB.read_text() + "".join(file.read_text() for file in WORKFLOWS.glob("*.yml"))
    text += (PIPELINES / "images").read_text()
    images = {}
    for image in PINNED.findall(text):
        name, _, rest = image.partition(":")
        images.setdefault((name, "dind" in rest), set()).add(rest)
    assert len(images) == 7
    assert all(len(found) == 1 for found in images.values()), images


def test_both_pipelines_run_the_same_steps(workflows, gitlab):
    steps = [".ci/run", "deploy/checks/run", "cargo deny --locked check", "hadolint Dockerfile"]
    steps += ["deploy/rehearsal/run", "docker build --tag serin:ci .", "docker run --rm serin:ci --version"]
    steps += [
        "deploy/pipelines/scan files",
        "deploy/pipelines/scan dependencies",
        "deploy/pipelines/scan image",
    ]
    steps += [f"deploy/pipelines/{name} " for name in ("build-image", "publish-image", "open-change")]
    for text in text_of(workflows), text_of(gitlab):
        assert [step for step in steps if step not in text] == []


# ---------------------------------------------------------------------------------------------------- scripts


def test_scripts_are_clean_and_tell_what_they_do(tools, repository, commands):
    files = [PIPELINES / name for name in SCRIPTS]
    tools.passes("shellcheck", "--external-sources", "--source-path", PIPELINES, *files, PIPELINES / "images")
    for name in SCRIPTS:
        assert os.access(PIPELINES / name, os.X_OK)
        done = run(repository, commands, name, "--help")
        assert done.returncode == 0 and f"{name} " in done.stdout, done.stderr
        assert "set -eu" not in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_word_that_is_missing_or_empty_ends_a_script(repository, commands, name):
    """Or a variable that nobody has set would have a pipeline do nothing, and succeed."""
    assert run(repository, commands, name).returncode == 2
    assert run(repository, commands, name, "").returncode == 2


@pytest.fixture
def contents(repository):
    """What the overlays are, as bytes, and when they became that."""

    def contents():
        files = [repository / overlay for overlay in OVERLAYS]
        return [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]

    return contents


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_new_version_is_written_into_both_overlays(repository, commands, overlay):
    before = (repository / overlay).read_text()
    done = run(repository, commands, "bump-image", "0.2.0", DIGEST)
    assert done.returncode == 0, done.stderr
    after = (repository / overlay).read_text()
    (entry,) = yaml.safe_load(after)["images"]
    assert entry == {"name": IMAGE, "newTag": "0.2.0", "digest": DIGEST}
    # Nothing else has changed, comments least of all.
    removed = set(before.splitlines()) - set(after.splitlines())
    added = set(after.splitlines()) - set(before.splitlines())
    assert all("newTag:" in line or "digest:" in line for line in removed | added)
    assert before.count("#") == after.count("#")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlay_runs_that_version_then(tools, tmp_path, commands, overlay):
    root = tmp_path / "repository"
    shutil.copytree(PIPELINES, root / "deploy" / "pipelines")
    shutil.copytree(DEPLOY / "kubernetes", root / "deploy" / "kubernetes")
    run(root, commands, "bump-image", "0.2.0", DIGEST)
    deployment = named(build(tools, (root / overlay).parent), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"{IMAGE}:0.2.0@{DIGEST}"


def test_the_same_version_again_changes_nothing(repository, commands, contents):
    run(repository, commands, "bump-image", "0.2.0", DIGEST)
    before = contents()
    done = run(repository, commands, "bump-image", "0.2.0", DIGEST)
    assert done.returncode == 0 and done.stdout.count("already") == 2
    assert contents() == before


def test_a_dry_run_shows_the_change_and_makes_none(repository, commands, contents):
    before = contents()
    done = run(repository, commands, "bump-image", "--dry-run", "0.2.0", DIGEST)
    assert done.returncode == 0
    assert len(re.findall(r"^\+ +newTag: 0\.2\.0 # ", done.stdout, re.MULTILINE)) == 2
    assert contents() == before


BEFORE = """\
images:
  - name: example.com/other
    newTag: 1.0.0
  # Ours.
  - name: ghcr.io/serin-proxy/serin
    digest: sha256:old
    newTag: 0.1.0 # by the pipeline
  - name: example.com/another
    newTag: 2.0.0
configMapGenerator:
  - name: ghcr.io/serin-proxy/serin
    newTag: not one of ours
"""

AFTER = f"""\
images:
  - name: example.com/other
    newTag: 1.0.0
  # Ours.
  - name: ghcr.io/serin-proxy/serin
    newName: registry.example.com/serin
    digest: {DIGEST}
    newTag: 0.2.0 # by the pipeline
  - name: example.com/another
    newTag: 2.0.0
configMapGenerator:
  - name: ghcr.io/serin-proxy/serin
    newTag: not one of ours
"""


def test_one_entry_among_others_is_changed(repository, commands, tmp_path):
    file = tmp_path / "kustomization.yaml"
    file.write_text(BEFORE)
    options = ["--file", str(file), "--new-name", "registry.example.com/serin"]
    done = run(repository, commands, "bump-image", *options, "0.2.0", DIGEST)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == AFTER


@pytest.mark.parametrize(
    "arguments, code, complaint",
    [
        (["0.2.0"], 2, "a version and a digest"),
        (["v0.2", DIGEST], 2, "v0.2 is not a version"),
        (["0.2.0", "latest"], 2, "latest is not a digest"),
        (["--file"], 2, "--file needs a value"),
        (["--force", "0.2.0", DIGEST], 2, "no option --force"),
        (["--file", "/nowhere", "0.2.0", DIGEST], 2, "there is no /nowhere"),
        (["--image", "example.com/x", "0.2.0", DIGEST], 1, "has no image `- name: example.com/x`"),
    ],
)
def test_what_cannot_be_written_is_refused(repository, commands, contents, arguments, code, complaint):
    before = contents()
    done = run(repository, commands, "bump-image", *arguments)
    assert done.returncode == code and complaint in done.stderr, done.stderr
    assert contents() == before


def test_where_one_file_cannot_be_changed_none_is(repository, commands, contents, tmp_path):
    before = contents()
    (tmp_path / "other.yaml").write_text("images: []\n")
    files = ["--file", str(repository / OVERLAYS[0]), "--file", str(tmp_path / "other.yaml")]
    done = run(repository, commands, "bump-image", *files, "0.2.0", DIGEST)
    assert done.returncode == 1 and "other.yaml has no image" in done.stderr
    assert contents() == before


def version():
    return re.search(r'^version = "(.*)"$', (REPOSITORY / "Cargo.toml").read_text(), re.MULTILINE)[1]


def test_a_tag_stands_for_the_version_of_the_program(repository, commands):
    (repository / "CHANGELOG.md").write_text(f"# Changelog\n\n## {version()}\n\nFirst.\n")
    done = run(repository, commands, "release-version", f"v{version()}")
    assert (done.returncode, done.stdout) == (0, f"{version()}\n")


@pytest.mark.parametrize(
    "tag, lock, log, complaint",
    [
        ("v99.0.0", "", "", "the tag is v99.0.0"),
        (None, "99.0.0", "", "but Cargo.lock 99.0.0"),
        (None, "", "## Unreleased\n", "CHANGELOG.md has no section"),
    ],
)
def test_a_tag_that_nobody_has_prepared_is_refused(repository, commands, tag, lock, log, complaint):
    (repository / "CHANGELOG.md").write_text(log or f"## {version()}\n")
    if lock:
        text = (repository / "Cargo.lock").read_text()
        own = f'name = "serin"\nversion = "{version()}"'
        assert own in text
        (repository / "Cargo.lock").write_text(text.replace(own, f'name = "serin"\nversion = "{lock}"'))
    done = run(repository, commands, "release-version", tag or f"v{version()}")
    assert done.returncode == 1 and complaint in done.stderr


# --------------------------------------------------------------------------------------------------- scanning


@pytest.fixture
def trivy(tools, commands):
    """Trivy as the pipelines have it, but without a network: with the checks that it brings along."""
    (commands.directory / "trivy").symlink_to(tools.path("trivy"))
    return {"TRIVY_SKIP_CHECK_UPDATE": "true", "TRIVY_CACHE_DIR": str(TOOLS / "trivy"), "TRIVY_QUIET": "true"}


def checked_out(root):
    """The files of this repository, as a pipeline finds them: those that Git knows or would know."""
    names = git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    # Benchmarks and tests hold nothing that a scanner has checks for, and many files.
    left_out = ("benches/", "fuzz/", "tests/", ".git/")
    for name in names:
        if name and not name.startswith(left_out) and (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
    return root


def test_the_repository_holds_no_secret_and_nothing_unsafe(commands, trivy, tmp_path):
    root = checked_out(tmp_path / "checkout")
    done = run(root, commands, "scan", "files", **trivy)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_secret_and_an_unsafe_pod_are_found(repository, commands, trivy):
    key = (REPOSITORY / "config" / "keys" / "shop.key").read_text()
    (repository / "deploy" / "shop.pem").write_text(key)
    done = run(repository, commands, "scan", "files", **trivy)
    assert done.returncode == 1 and "AsymmetricPrivateKey" in done.stdout
    (repository / "deploy" / "shop.pem").unlink()
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "unsafe"}, "spec": {}}
    pod["spec"]["containers"] = [{"name": "a", "image": "a:1", "securityContext": {"privileged": True}}]
    (repository / "deploy" / "pod.yaml").write_text(yaml.safe_dump(pod))
    done = run(repository, commands, "scan", "files", **trivy)
    assert done.returncode == 1 and "privileged" in done.stdout.lower()


def test_the_gate_is_closed_from_high_on(repository, commands):
    commands.add("trivy")
    for arguments in ["files"], ["dependencies"], ["image", f"{IMAGE}@{DIGEST}"]:
        assert run(repository, commands, "scan", *arguments).returncode == 0
    assert len(commands.calls()) == 3
    for call in commands.calls():
        assert call[call.index("--severity") + 1] == "HIGH,CRITICAL"
        assert call[call.index("--exit-code") + 1] == "1"
    assert run(repository, commands, "scan").returncode == 2


def test_the_list_of_what_is_in_the_image_names_its_dependencies(tools, tmp_path):
    """As publish-image makes it: from Cargo.lock."""
    text = (PIPELINES / "publish-image").read_text()
    command = re.search(r"^trivy (filesystem Cargo\.lock --format spdx-json) --output", text, re.MULTILINE)[1]
    tools.passes("trivy", *command.split(), "--output", tmp_path / "sbom", "--skip-db-update", cwd=REPOSITORY)
    names = {package["name"] for package in json.loads((tmp_path / "sbom").read_text())["packages"]}
    assert {"hyper", "rustls", "tokio"} <= names


# ------------------------------------------------------------------------------------------------- publishing


def test_an_image_is_pushed_by_digest_with_its_provenance(repository, commands):
    build = (
        'case "$1 $2" in "buildx inspect") exit 1 ;; "buildx build") ;; *) exit 0 ;; esac\n'
        'while [ "$1" != --metadata-file ]; do shift; done\n'
        f'echo \'{{ "a": "b", "containerimage.digest": "{DIGEST}" }}\' > "$2"\n'
        "echo what Docker has to say"
    )
    commands.add("docker", build)
    done = run(repository, commands, "build-image", IMAGE, "linux/arm64", "0.2.0", "cafe")
    assert (done.returncode, done.stdout) == (0, f"{DIGEST}\n"), done.stderr
    _, create, built = commands.calls()
    assert PINNED.fullmatch(create[create.index("--driver-opt") + 1].removeprefix("image="))
    assert built[built.index("--platform") + 1] == "linux/arm64"
    assert built[built.index("--provenance") + 1] == "mode=max"
    assert {"VERSION=0.2.0", "REVISION=cafe"} <= set(built)
    output = built[built.index("--output") + 1]
    assert f"name={IMAGE}," in output and "push-by-digest=true" in output
    assert "--tag" not in built


def test_docker_that_is_reached_by_tls_gets_a_context(repository, commands):
    commands.add("docker", 'case "$2" in inspect) exit 1 ;; build) exit 3 ;; esac')
    done = run(
        repository, commands, "build-image", IMAGE, "linux/amd64", "0.2.0", "cafe", DOCKER_CERT_PATH="/certs"
    )
    assert done.returncode == 3
    assert ["docker", "context", "create", "serin"] in commands.calls()
    (create,) = [call for call in commands.calls() if call[1:3] == ["buildx", "create"]]
    assert create[-1] == "serin"


def test_a_build_without_a_digest_fails(repository, commands):
    commands.add("docker")
    done = run(repository, commands, "build-image", IMAGE, "linux/amd64", "0.2.0", "cafe")
    assert done.returncode == 1 and "no digest" in done.stderr


OTHER = "sha256:" + "f" * 64


@pytest.fixture
def publishing(repository, commands, tmp_path):
    """Publishes by a registry that has the version with this digest, or lacks it and says this of it."""
    tag = tmp_path / "tag"

    def publishing(published=None, complaint="not found", cosign="", moved=DIGEST):
        if published:
            tag.write_text(published)
        commands.add(
            "docker",
            f"""case "$3 $4 $5" in
              inspect*:candidate-0.2.0*) echo {DIGEST} ;;
              inspect*) cat "{tag}" 2> /dev/null || {{ echo "ERROR: $4: {complaint}" >&2; exit 1; }} ;;
              create*:candidate-0.2.0) ;;
              create*) echo {moved} > "{tag}" ;;
            esac""",
        )
        commands.add("cosign", cosign)
        commands.add("trivy")
        return run(repository, commands, "publish-image", IMAGE, "0.2.0", OTHER, DIGEST)

    return publishing


def published_tags(commands):
    return [call[5].partition(":")[2] for call in commands.calls() if call[3:4] == ["create"]]


def test_an_image_is_signed_by_digest_and_gets_its_tag_then(publishing, commands):
    done = publishing()
    assert (done.returncode, done.stdout) == (0, f"{DIGEST}\n"), done.stderr
    create, _, _, sign, _, attest, publish, _ = commands.calls()
    assert create[1:4] == ["buildx", "imagetools", "create"]
    assert create[4:] == ["--tag", f"{IMAGE}:candidate-0.2.0", f"{IMAGE}@{OTHER}", f"{IMAGE}@{DIGEST}"]
    assert publish[1:] == ["buildx", "imagetools", "create", "--tag", f"{IMAGE}:0.2.0", f"{IMAGE}@{DIGEST}"]
    assert sign == ["cosign", "sign", "--yes", "--recursive", f"{IMAGE}@{DIGEST}"]
    assert attest[1] == "attest" and attest[-1] == f"{IMAGE}@{DIGEST}"
    assert attest[attest.index("--type") + 1] == "spdxjson"


@pytest.mark.parametrize("command", ["sign", "attest"])
def test_what_cannot_be_signed_gets_no_tag(publishing, commands, command):
    done = publishing(cosign=f'[ "$1" != {command} ]')
    assert done.returncode != 0 and done.stdout == ""
    assert published_tags(commands) == ["candidate-0.2.0"]


def test_a_version_that_is_there_is_not_moved(publishing, commands):
    done = publishing(published=OTHER)
    assert (done.returncode, done.stdout) == (1, "") and f"{OTHER}, and is not moved" in done.stderr
    assert published_tags(commands) == ["candidate-0.2.0"]
    assert "cosign" not in [call[0] for call in commands.calls()]


def test_a_release_that_is_repeated_signs_what_is_there(publishing, commands):
    done = publishing(published=DIGEST)
    assert (done.returncode, done.stdout) == (0, f"{DIGEST}\n"), done.stderr
    assert published_tags(commands) == ["candidate-0.2.0"]
    assert [call[1] for call in commands.calls() if call[0] == "cosign"] == ["sign", "attest"]


def test_a_registry_that_does_not_say_is_not_taken_for_one_without_the_version(publishing, commands):
    done = publishing(complaint="503 Service Unavailable")
    assert (done.returncode, done.stdout) == (1, "") and "503" in done.stderr
    assert published_tags(commands) == ["candidate-0.2.0"]


def test_a_tag_that_leads_to_something_else_than_what_was_signed_is_no_release(publishing):
    done = publishing(moved=OTHER)
    assert (done.returncode, done.stdout) == (1, "") and "is what was signed" in done.stderr


def test_programs_come_out_of_pinned_images(repository, commands, tmp_path):
    commands.add("docker", 'case "$1" in create) echo container ;; cp) echo program > "$3" ;; esac')
    directory = tmp_path / "bin"
    done = run(repository, commands, "tools", str(directory), "cosign", "hadolint", "trivy")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in directory.iterdir()} == {"cosign", "hadolint", "trivy"}
    created = [call[2] for call in commands.calls() if call[1] == "create"]
    assert len(created) == 3 and all(PINNED.fullmatch(image) for image in created)
    done = run(repository, commands, "tools", str(directory), "curl")
    assert done.returncode == 2 and "there is no `curl`" in done.stderr


# -------------------------------------------------------------------------------------------------- proposing


@pytest.fixture
def cloned(repository, tmp_path):
    """A clone of a bare repository whose branch `main` has the files."""
    git(repository, "init", "--quiet", "--initial-branch", "main", ".")
    commit(repository)
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "origin.git")
    git(tmp_path, "clone", "--quiet", f"file://{tmp_path}/origin.git", "clone")
    # As a pipeline has it for a tag.
    git(tmp_path / "clone", "switch", "--quiet", "--detach")
    return tmp_path / "clone"


def proposed(clone):
    """The branches of the repository beside `main`, and what the overlays name there, each the same."""
    origin = clone.parent / "origin.git"
    branches = git(origin, "for-each-ref", "--format=%(refname:short)", "refs/heads/gitops").split()
    found = {}
    for branch in branches:
        dev, production = [yaml.safe_load(git(origin, "show", f"{branch}:{file}")) for file in OVERLAYS]
        assert dev["images"] == production["images"]
        found[branch] = dev["images"]
    return found


BRANCH = "gitops/serin-0.2.0-0123456789ab"


def test_a_pull_request_is_opened_and_checked(cloned, commands):
    commands.add("gh")
    done = run(cloned, commands, "open-change", IMAGE, "0.2.0", DIGEST, GITHUB_ACTIONS="true")
    assert done.returncode == 0, done.stderr
    assert proposed(cloned) == {BRANCH: [{"name": IMAGE, "newTag": "0.2.0", "digest": DIGEST}]}
    listed, created, started = commands.calls()
    assert created[:7] == ["gh", "pr", "create", "--base", "main", "--head", BRANCH]
    assert started == ["gh", "workflow", "run", "ci.yml", "--ref", BRANCH]


def test_a_release_that_is_repeated_proposes_nothing_twice(cloned, commands):
    commands.add("gh", '[ "$2" != list ] || echo 17')
    for _ in range(2):
        done = run(cloned, commands, "open-change", IMAGE, "0.2.0", DIGEST, GITHUB_ACTIONS="true")
        assert done.returncode == 0, done.stderr
    assert list(proposed(cloned)) == [BRANCH]
    assert not [call for call in commands.calls() if "create" in call]


def test_an_image_that_both_overlays_have_is_not_proposed(cloned, commands):
    commands.add("gh")
    run(cloned, commands, "open-change", IMAGE, "0.2.0", DIGEST, GITHUB_ACTIONS="true")
    git(cloned, "push", "--quiet", "origin", f"{BRANCH}:main")
    git(cloned.parent / "origin.git", "branch", "--quiet", "-D", BRANCH)
    commands.log.unlink()
    done = run(cloned, commands, "open-change", IMAGE, "0.2.0", DIGEST, GITHUB_ACTIONS="true")
    assert (done.returncode, proposed(cloned), commands.calls()) == (0, {}, [])
    assert "nothing to propose" in done.stdout


def gitlab_environment(clone):
    return {
        "GITLAB_CI": "true",
        "GITOPS_TOKEN": "a secret",
        "CI_PROJECT_URL": f"file://{clone.parent}/origin",
        "CI_API_V4_URL": "https://gitlab.example.com/api/v4",
        "CI_PROJECT_ID": "42",
    }


@pytest.mark.parametrize("status, code", [("201", 0), ("409", 0), ("403", 1)])
def test_a_merge_request_is_opened(cloned, commands, status, code):
    commands.add("curl", f"printf {status}")
    image = "registry.example.com/serin-proxy/serin"
    done = run(cloned, commands, "open-change", image, "0.2.0", DIGEST, **gitlab_environment(cloned))
    assert done.returncode == code, done.stderr
    entry = {"name": IMAGE, "newName": image, "newTag": "0.2.0", "digest": DIGEST}
    assert proposed(cloned) == {BRANCH: [entry]}
    (call,) = commands.calls()
    assert call[-1] == "https://gitlab.example.com/api/v4/projects/42/merge_requests"
    assert {f"source_branch={BRANCH}", "target_branch=main"} <= set(call)
    # Whoever sees processes or logs does not see it.
    assert "a secret" not in " ".join(call) + done.stdout + done.stderr


def test_elsewhere_nothing_is_proposed(cloned, commands):
    done = run(cloned, commands, "open-change", IMAGE, "0.2.0", DIGEST)
    assert done.returncode == 1 and "neither GitHub Actions nor GitLab CI" in done.stderr
    assert proposed(cloned) == {}


# --------------------------------------------------------------------------------------------- what is caught


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        ("ci.yml", "runs-on: ubuntu-24.04", "runs-on: ubuntu-2404", 'label "ubuntu-2404" is unknown'),
        ("release.yml", "needs: [version, publish]", "needs: [version, publisher]", '"publisher"'),
        ("release.yml", "steps.publish.outputs.digest", "steps.publsh.outputs.digest", '"publsh"'),
        ("release.yml", "id-token: write", "id_token: write", 'unknown permission scope "id_token"'),
        ("flux-change.yml", "timeout-minutes", "timeout", 'unexpected key "timeout"'),
    ],
)
def test_a_mistake_in_a_workflow_is_found(tools, tmp_path, file, old, new, complaint):
    directory = tmp_path / ".github" / "workflows"
    shutil.copytree(WORKFLOWS, directory)
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new, 1))
    done = tools.run("actionlint", "-shellcheck", "", directory / file)
    assert done.returncode != 0 and complaint in done.stdout, done.stdout


def test_a_mistake_in_gitlabs_pipeline_is_found(tools, project):
    text = GITLAB.read_text()
    broken = project / ".gitlab-ci.yml"
    broken.write_text(
        text.replace("interruptible: true", "interruptable: 1", 1).replace("timeout: 1 hour", "timeout: []")
    )
    done = tools.run("check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", broken)
    assert done.returncode != 0 and "timeout" in done.stdout
    broken.write_text(text.replace("needs: [version, publish]", "needs: [version, publisher]"))
    done = tools.run("gitlab-ci-local", "--list", "--variable", "CI_COMMIT_TAG=v0.1.0", cwd=project)
    assert done.returncode != 0 and "publisher" in done.stdout + done.stderr
