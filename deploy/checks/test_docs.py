"""The documentation: guides do what they say, links lead somewhere, and no page is left alone."""

import os
import pathlib
import re
import subprocess

import pytest

from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(
    path
    for path in [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md"), *(REPOSITORY / "deploy").rglob("*.md")]
    if "node_modules" not in path.parts
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MARK = "@@@"


def console(page):
    """The commands of a page with what it shows of their output: pairs of a command and lines."""
    steps = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL):
        lines = iter(block.splitlines())
        for line in lines:
            if line.startswith("$ "):
                command = line[2:]
                end = re.search(r"<<'(\w+)'", command)
                while end and not command.endswith("\n" + end.group(1)):
                    command += "\n" + next(lines)
                steps.append((command, []))
            else:
                steps[-1][1].append(line)
    return steps


def run(steps, directory, environment):
    """Runs commands one after the other in one shell; returns what each has written."""
    script = ["set -m"]
    for command, _ in steps:
        script += [f"echo '{MARK}'", command]
    script.append("kill $(jobs -p) 2> /dev/null; wait 2> /dev/null")
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    outputs = done.stdout.split(f"{MARK}\n")[1:]
    assert len(outputs) == len(steps), f"{done.stdout}\n{done.stderr}"
    return outputs, done.stderr


def shows(expected, output):
    """True if a page shows this output: `...` stands for any lines, and for the rest of one."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in expected
    )
    return re.fullmatch(pattern, output) is not None


def test_the_first_canary_goes_as_its_guide_says(serin, free_port, tmp_path):
    """Every command is run, on free ports instead of those of the guide."""
    page = DOCS / "first-canary.md"
    ports = {port: str(free_port()) for port in ("8080", "9901", "9001", "9002")}
    steps = []
    for command, expected in console(page):
        # The program is built already, and where it is differs from the guide.
        if command.startswith(("cargo build", "export PATH")):
            continue
        for port, free in ports.items():
            command = re.sub(rf"\b{port}\b", free, command)
        steps.append((command, expected))
    environment = {**os.environ, "PATH": f"{pathlib.Path(serin).parent}:{os.environ['PATH']}"}
    outputs, errors = run(steps, tmp_path, environment)
    for (command, expected), output in zip(steps, outputs):
        if expected:
            assert shows(expected, output), f"$ {command}\n{output}--- expected\n" + "\n".join(expected) + errors
    assert not (tmp_path / "first-canary").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: there is no such heading"


def anchors(page):
    """The anchors of a page's headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.exists():
            continue
        reached.add(page)
        for target in LINK.findall(page.read_text()):
            path = target.partition("#")[0]
            if path.endswith(".md") and not target.startswith("http"):
                waiting.append((page.parent / path).resolve())
    lonely = [page for page in DOCS.rglob("*.md") if page.resolve() not in {one.resolve() for one in reached}]
    assert lonely == []


def test_a_guide_that_says_something_else_is_caught():
    assert shows(["a", "...", "c ..."], "a\nb\nb\nc d\n")
    assert not shows(["a"], "b\n")
    assert not shows(["a"], "a\nb\n")
