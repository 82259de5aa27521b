"""Writes figures into benches/RESULTS.md, each command between markers of its own."""

import datetime
import os
import pathlib
import platform
import re
import subprocess

from stage import ROOT, VENV

RESULTS = ROOT / "benches" / "RESULTS.md"


def write(section, lines):
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = RESULTS.read_text().split(begin)
    after = rest.split(end)[1]
    RESULTS.write_text(before + begin + "\n\n" + "\n".join(lines) + "\n" + end + after)


def preamble(how, versions):
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Measured on {datetime.date.today()} on {machine()} with {told}; {how}."


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, Linux {kernel}"


def rustc():
    return {"rustc": first(["rustc", "--version"], r"rustc (\S+)")}


def versions():
    return {
        "nginx": first(["nginx", "-v"], r"nginx/(\S+)"),
        "HAProxy": first(["haproxy", "-v"], r"version (\d+\.\d+\.\d+)"),
        "Envoy": first([VENV / "bin/envoy", "--version"], r"/(\d+\.\d+\.\d+)/"),
        "Traefik": first([VENV / "bin/traefik", "version"], r"Version:\s+(\S+)"),
        "Caddy": first([VENV / "bin/caddy", "version"], r"v(\S+)"),
    } | rustc()


def first(command, pattern):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return re.search(pattern, done.stdout + done.stderr)[1]
