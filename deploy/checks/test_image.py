"""The Dockerfile: clean for hadolint and Trivy, and what it promises. `deploy/image/check` builds and starts it."""

import json
import re
import tomllib

import pytest

from conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def final_stage():
    return TEXT[TEXT.rindex("\nFROM ") :]


def misconfigurations(tools, directory):
    """What Trivy has to say against a directory, of what is HIGH or CRITICAL."""
    arguments = ["config", "--quiet", "--skip-check-update", "--severity", "HIGH,CRITICAL", "--format", "json"]
    report = json.loads(tools.passes("trivy", *arguments, directory))
    found = [one for result in report.get("Results", []) for one in result.get("Misconfigurations", [])]
    return {one["ID"] for one in found if one["Status"] == "FAIL"}


def copied(tmp_path, *replacement):
    (tmp_path / "Dockerfile").write_text(TEXT.replace(*replacement), encoding="utf-8")
    return tmp_path


def test_hadolint_has_nothing_against_it(tools):
    assert tools.passes("hadolint", DOCKERFILE) == ""


def test_trivy_finds_nothing_that_is_high_or_critical(tools, tmp_path):
    assert misconfigurations(tools, copied(tmp_path, "", "")) == set()


@pytest.mark.parametrize(
    ("replacement", "rule"),
    [
        (("--no-install-recommends ", ""), "DL3015"),
        (("slim-bookworm", "latest"), "DL3007"),
        (("WORKDIR /build", "WORKDIR build"), "DL3000"),
    ],
)
def test_hadolint_catches_a_broken_one(tools, tmp_path, replacement, rule):
    text = copied(tmp_path, *replacement).joinpath("Dockerfile")
    if rule == "DL3007":
        text.write_text(TEXT.replace("FROM rust:${RUST_VERSION}-slim-bookworm", "FROM rust:latest"))
    done = tools.run("hadolint", text)
    assert done.returncode != 0 and rule in done.stdout, done.stdout


def test_trivy_catches_one_that_runs_as_root(tools, tmp_path):
    assert misconfigurations(tools, copied(tmp_path, "USER 10001:10001", "USER root")) == {"DS002"}


def test_the_last_stage_is_empty_but_for_the_program_and_certificates():
    stage = final_stage()
    assert stage.startswith("\nFROM scratch\n") and "RUN " not in stage
    copies = re.findall(r"^COPY --from=build \S+ (\S+)$", stage, flags=re.MULTILINE)
    assert copies == ["/etc/ssl/certs/ca-certificates.crt", "/serin"]
    user, group = re.search(r"^USER (\d+):(\d+)$", stage, flags=re.MULTILINE).groups()
    assert int(user) > 10000 and int(group) > 10000
    assert "HEALTHCHECK" in stage and '"healthcheck"]' in stage


def test_it_names_the_version_and_the_compiler_of_the_repository():
    cargo = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["package"]["version"]
    rust = tomllib.loads((REPOSITORY / "rust-toolchain.toml").read_text())["toolchain"]["channel"]
    assert f"ARG VERSION={cargo}\n" in TEXT and f"ARG RUST_VERSION={rust}\n" in TEXT


def test_the_dependencies_are_a_layer_of_their_own():
    manifest, sources = TEXT.index("COPY Cargo.toml"), TEXT.index("COPY src src")
    first, second = (found.start() for found in re.finditer("cargo build", TEXT))
    assert manifest < first < sources < second
