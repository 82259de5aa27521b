"""The scripts of deploy/scripts: that they are sound, and do to a real serin what they say, only once."""

import gzip
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tarfile
import time
import urllib.error

import pytest

from conftest import DEPLOY
from running import CONFIG, TOKEN, addresses, ask, eventually, program, serve, start, versions  # noqa: F401

SCRIPTS = DEPLOY / "scripts"
NAMES = sorted(path.name for path in SCRIPTS.glob("serin-*"))
DAY = 86400


def run(script, *arguments, **options):
    """Runs a script, and returns what became of it."""
    environment = {**os.environ, "NO_PROXY": "*", **options.pop("env", {})}
    command = [str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **options)


def does(code, script, *arguments, **options):
    """Runs a script that has to end with this exit code, and returns all that it wrote."""
    done = run(script, *arguments, **options)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    # What is foreseen is told in words, and not as a failure of the script.
    assert "failed in line" not in done.stderr, done.stderr
    return done.stdout + done.stderr


# === what holds for all of them ===


def test_there_are_the_scripts_that_the_readme_names():
    readme = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert NAMES == ["serin-config", "serin-health", "serin-log-cleanup", "serin-ramp", "serin-rollback"]
    assert set(re.findall(r"^\| `(serin-[a-z-]+)` \|", readme, re.MULTILINE)) == set(NAMES)


@pytest.mark.parametrize("name", [*NAMES, "lib.bash"])
def test_every_script_is_clean_for_shellcheck(tools, name):
    tools.passes("shellcheck", "--external-sources", name, cwd=SCRIPTS)


@pytest.mark.parametrize(
    ("sound", "broken", "why"),
    [
        ('awk -v backend="$1"', "awk -v backend=$1", "SC2086"),
        ("local url=$1 route=$2 answer", "local url=$1 route=$2 answr", "SC2034"),
        ("needs_value() {", "needs_value() { if", "SC1"),
    ],
)
def test_a_broken_script_is_caught(tools, tmp_path, sound, broken, why):
    text = (SCRIPTS / "lib.bash").read_text(encoding="utf-8")
    assert sound in text
    (tmp_path / "lib.bash").write_text(text.replace(sound, broken), encoding="utf-8")
    done = tools.run("shellcheck", tmp_path / "lib.bash")
    assert done.returncode != 0 and why in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_option_that_is_taken(name):
    manual = does(0, name, "--help")
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    patterns = re.findall(r"^ +(--[a-z-]+(?:[ |\\\n]+--[a-z-]+)*)\)", text, re.MULTILINE)
    options = set(re.findall(r"--[a-z-]+", " ".join(patterns))) - {"--help"}
    assert "--dry-run" in options
    assert manual.startswith(("Raises", "Takes", "Compresses", "Backs up", "Asks"))
    for option in options:
        assert re.search(f"{option}[ ,]", manual), option
    # Nothing of the program itself.
    assert "set -euo" not in manual


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", [["--nonsense", "x"], ["--timeout"], ["--timeout", "soon"]])
def test_a_command_line_that_cannot_be_understood_is_refused(name, arguments):
    code = 3 if name == "serin-health" else 2
    assert arguments[0] in does(code, name, *arguments)


# === serin-ramp and serin-rollback ===


@pytest.fixture
def replicas(start, versions):  # noqa: F811
    """Two replicas of one configuration."""
    config = CONFIG.format(weights=(100, 0), **addresses(versions))
    return [start(config), start(config)]


def reached(replicas, token=True):
    """The options that lead to replicas."""
    options = [word for replica in replicas for word in ("--admin", replica.admin)]
    return [*options, "--token-file", replicas[0].token_file] if token else options


def ramp(code, replicas, *arguments):
    names = ["--route", "shop", "--stable", "shop-stable", "--canary", "shop-canary", "--pause", "0"]
    return does(code, "serin-ramp", *names, *reached(replicas), *arguments)


def canary_of(replicas):
    """The canary's weight on each replica."""
    return [replica.weights()["shop-canary"] for replica in replicas]


def put(replica, stable, canary):
    """Sets weights as somebody else."""
    body = json.dumps({"weights": {"shop-stable": stable, "shop-canary": canary}}).encode()
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert "etag" in replica.ask("/api/v1/routes/shop/weights", "PUT", body, headers)


def test_a_ramp_makes_all_steps_on_all_replicas(replicas, tmp_path):
    seen = tmp_path / "seen"
    gate = f"echo $SERIN_RAMP_ROUTE $SERIN_RAMP_STABLE $SERIN_RAMP_CANARY $SERIN_RAMP_STEP >> {seen}"
    output = ramp(0, replicas, "--steps", "1,10,50,100", "--gate", gate, "--reason", 'release "9"')
    assert canary_of(replicas) == [100, 100]
    steps = [f"shop shop-stable shop-canary {step}" for step in (1, 10, 50, 100)]
    assert seen.read_text(encoding="utf-8").splitlines() == steps
    assert output.count("shop-canary 10, shop-stable 90") == 2
    assert (
        replicas[0].ask("/api/v1/routes/shop/weights")["reason"] == 'serin-ramp: release "9", step 100 of 100'
    )


def test_a_ramp_that_is_made_changes_nothing(replicas):
    ramp(0, replicas, "--steps", "5,20")
    before = [replica.ask("/api/v1/routes/shop/weights") for replica in replicas]
    assert "as before" in ramp(0, replicas, "--steps", "5,20")
    assert [replica.ask("/api/v1/routes/shop/weights") for replica in replicas] == before


def test_a_dry_run_of_a_ramp_says_what_would_be_set(replicas):
    output = ramp(0, replicas, "--steps", "1,50", "--total", "1000", "--dry-run")
    assert output.count("would be set to shop-canary 50, shop-stable 950") == 2
    assert canary_of(replicas) == [0, 0]
    assert replicas[0].ask("/api/v1/routes/shop/weights")["source"] == "file"


def test_a_gate_that_says_no_takes_the_canary_back(replicas):
    output = ramp(1, replicas, "--steps", "1,10,50", "--gate", "((SERIN_RAMP_STEP < 10))")
    assert canary_of(replicas) == [0, 0]
    assert "step 10: the gate said no (exit code 1)" in output
    assert (
        replicas[1].ask("/api/v1/routes/shop/weights")["reason"] == "serin-ramp, taken back: step 10 failed"
    )


def test_a_ramp_goes_on_where_it_was_interrupted(replicas, tmp_path):
    command = [str(SCRIPTS / "serin-ramp"), "--route=shop", "--stable=shop-stable", "--canary=shop-canary"]
    command += ["--steps=5,40", "--pause=1h", *map(str, reached(replicas))]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually("the first step", lambda: canary_of(replicas) == [5, 5])
    waiting.send_signal(signal.SIGTERM)
    _, complaint = waiting.communicate(timeout=20)
    assert waiting.returncode == 3 and "interrupted" in complaint
    assert canary_of(replicas) == [5, 5]
    # A replica was put back to its file meanwhile; it catches up.
    put(replicas[1], 100, 0)
    gates = tmp_path / "gates"
    ramp(0, replicas, "--steps", "5,40", "--gate", f"echo $SERIN_RAMP_STEP >> {gates}")
    assert gates.read_text(encoding="utf-8").split() == ["5", "40"]
    assert canary_of(replicas) == [40, 40]


def test_what_somebody_else_sets_meanwhile_ends_the_ramp(replicas):
    body = '{"weights":{"shop-stable":1,"shop-canary":0}}'
    url = f"http://{replicas[1].admin}/api/v1/routes/shop/weights"
    gate = f"curl -sS -X PUT -H 'Authorization: Bearer {TOKEN}' -d '{body}' {url} > /dev/null"
    output = ramp(3, replicas, "--steps", "5,40", "--gate", gate)
    assert "somebody else has set shop-canary 0, shop-stable 1 meanwhile" in output
    assert canary_of(replicas) == [5, 0]


def test_a_replica_that_does_not_answer_keeps_the_others_as_they_are(replicas):
    replicas[1].stop()
    output = ramp(3, replicas)
    assert f"{replicas[1].admin} does not answer" in output and "nothing was changed" in output
    assert canary_of(replicas[:1]) == [0]


def test_replicas_go_back_when_one_cannot_follow(replicas):
    """The second replica knows another token, which shows only when it is told to change something."""
    replicas[1].token_file.write_text("f" * 32, encoding="utf-8")
    replicas[1].ask("/api/v1/reload", "POST")
    output = ramp(3, replicas, "--steps", "10")
    assert "HTTP 401" in output and "undone: another replica could not follow" not in output
    assert output.index("shop-canary 10") < output.index("shop-canary 0, shop-stable 100")
    assert canary_of(replicas) == [0, 0]


def test_a_wrong_token_is_told(replicas, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("x" * 32, encoding="utf-8")
    output = ramp(3, replicas, "--token-file", wrong)
    assert "HTTP 401" in output and "admin.writers" in output
    assert "x" * 32 not in output
    assert canary_of(replicas) == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--canary", "shop-canry"], "has no backend shop-canry"),
        (["--route", "shp"], "there is no route `shp`"),
    ],
)
def test_a_name_that_serin_does_not_know_is_told(replicas, arguments, why):
    assert why in ramp(3, replicas, *arguments)


@pytest.mark.parametrize("steps", ["0,5", "5,5", "50,10", "101", "a"])
def test_steps_that_do_not_ascend_are_refused(replicas, steps):
    assert "--steps" in ramp(2, replicas, "--steps", steps)


def test_prometheus_decides_about_a_step(tools, replicas, versions, free_port, tmp_path):  # noqa: F811
    address = f"127.0.0.1:{free_port()}"
    scrape = {"job_name": "serin", "scrape_interval": "200ms"}
    scrape["static_configs"] = [{"targets": [replicas[0].admin]}]
    (tmp_path / "prometheus.yaml").write_text(json.dumps({"scrape_configs": [scrape]}), encoding="utf-8")
    options = [f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    command = [tools.path("prometheus"), *options, f"--web.listen-address={address}"]
    with open(tmp_path / "prometheus.log", "wb") as log:
        prometheus = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        eventually("Prometheus is ready", lambda: is_ready(f"http://{address}/-/ready"))
        judged_by(address, replicas[0], versions["canary"])
    finally:
        prometheus.kill()
        prometheus.wait()


def is_ready(url):
    try:
        return b"Ready" in ask(url)
    except urllib.error.URLError:
        return False


def judged_by(prometheus, replica, canary):
    """A canary without requests, one that does well, and one that fails."""
    arguments = ["--prometheus", prometheus, "--window", "5s", "--max-error-ratio", "0.01"]
    assert "no request has reached shop-canary in 5s" in ramp(1, [replica], "--steps", "90", *arguments)
    put(replica, 0, 1)
    send_until_rising(prometheus, replica, "serin_requests_total")
    assert "a share of 0 failed" in ramp(0, [replica], "--steps", "100", *arguments)
    canary.error_percent = 100
    send_until_rising(prometheus, replica, "serin_request_failures_total")
    assert "and 0.01 may" in ramp(1, [replica], "--steps", "100", *arguments)
    assert canary_of([replica]) == [0]


def send_until_rising(prometheus, replica, counter):
    """Sends requests until Prometheus knows a rate of those to the canary that this counts."""
    query = f'query=sum(rate({counter}{{backend="shop-canary"}}[5s])) > 0'

    def found():
        for number in range(10):
            ask(f"http://{replica.web}/", headers={"x-user-id": f"user-{number}"})
        return json.loads(ask(f"http://{prometheus}/api/v1/query", "POST", query.encode()))["data"]["result"]

    eventually(f"{counter} rises", found)


def rollback(code, replicas, *arguments):
    return does(code, "serin-rollback", "--route", "shop", *reached(replicas), *arguments)


def test_a_rollback_takes_the_weight_on_all_replicas_and_only_once(replicas):
    for replica in replicas:
        put(replica, 60, 40)
    rollback(0, replicas, "--canary", "shop-canary", "--reason", "errors")
    assert [replica.weights() for replica in replicas] == [{"shop-stable": 60, "shop-canary": 0}] * 2
    before = [replica.ask("/api/v1/routes/shop/weights") for replica in replicas]
    assert before[0]["reason"] == "serin-rollback: errors"
    assert rollback(0, replicas, "--canary", "shop-canary").count("as before") == 2
    assert [replica.ask("/api/v1/routes/shop/weights") for replica in replicas] == before


def test_a_rollback_from_everybody_leads_to_the_baseline(replicas):
    put(replicas[0], 0, 100)
    assert b"1.9.0" in ask(f"http://{replicas[0].web}/", headers={"x-user-id": "a"})
    rollback(0, replicas, "--canary", "shop-canary")
    assert b"1.8.2" in ask(f"http://{replicas[0].web}/", headers={"x-user-id": "a"})


def test_a_replica_that_does_not_answer_saves_no_other_from_a_rollback(replicas):
    put(replicas[1], 60, 40)
    replicas[0].stop()
    output = rollback(1, replicas, "--canary", "shop-canary")
    assert (
        f"{replicas[0].admin} does not answer" in output and "1 of 2 replicas are not rolled back" in output
    )
    assert canary_of(replicas[1:]) == [0]


def test_a_rollback_can_leave_the_weights_to_the_file(replicas):
    put(replicas[0], 60, 40)
    assert "would be left to the file" in rollback(0, replicas, "--to-file", "--dry-run")
    assert canary_of(replicas) == [40, 0]
    output = rollback(0, replicas, "--to-file")
    assert replicas[0].ask("/api/v1/routes/shop/weights")["source"] == "file"
    assert "the file's weights, as before" in output
    assert rollback(0, replicas, "--to-file").count("as before") == 2


def test_a_dry_run_of_a_rollback_changes_nothing(replicas):
    put(replicas[0], 60, 40)
    assert "would be set to shop-canary 0" in rollback(0, replicas, "--canary", "shop-canary", "--dry-run")
    assert canary_of(replicas) == [40, 0]


def test_a_rollback_without_the_right_to_it_says_so(replicas):
    put(replicas[0], 60, 40)
    options = reached(replicas, token=False)
    output = does(1, "serin-rollback", "--route", "shop", "--canary", "shop-canary", *options)
    assert "HTTP 401" in output and canary_of(replicas) == [40, 0]
    output = does(1, "serin-rollback", "--route", "shop", "--to-file", *options)
    assert "HTTP 401" in output and canary_of(replicas) == [40, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--route", "shop"],
        ["--route", "shop", "--config", "x"],
        ["--route", "shop", "--canary", "c", "--to-file"],
    ],
)
def test_a_rollback_of_nothing_or_of_two_things_is_refused(arguments):
    assert "--help" in does(2, "serin-rollback", *arguments)


@pytest.fixture
def stand_in(tmp_path):
    """A program that notes how it is called, and ends with the exit code in SERIN_EXIT."""
    path = tmp_path / "serin"
    path.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nexit "${SERIN_EXIT:-0}"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ([], "rollback --config my file.yaml"),
        (["--to", "17"], "rollback --config my file.yaml --to 17"),
        (["--dry-run"], "rollback --config my file.yaml --dry-run"),
        (["--list"], "history --config my file.yaml"),
        (["--directory", "a b"], "rollback --config my file.yaml --directory a b"),
    ],
)
def test_a_configuration_is_rolled_back_by_serin(stand_in, arguments, call):
    does(0, "serin-rollback", "--config", "my file.yaml", *arguments, env={"SERIN": str(stand_in)})
    assert pathlib.Path(f"{stand_in}.calls").read_text(encoding="utf-8") == call + "\n"


def test_a_configuration_that_cannot_be_rolled_back_is_told(stand_in):
    environment = {"SERIN": str(stand_in), "SERIN_EXIT": "4"}
    output = does(1, "serin-rollback", "--config", "x.yaml", env=environment)
    assert "x.yaml is not rolled back" in output and "exited with 4" in output


def test_replicas_are_told_of_a_configuration_that_was_rolled_back(replicas, stand_in):
    environment = {"SERIN": str(stand_in)}
    config = replicas[0].config
    options = ["--config", config, *reached(replicas[:1], token=False)]
    assert "has taken the files over" in does(0, "serin-rollback", *options, env=environment)
    config.write_text("listeners: []\n", encoding="utf-8")
    output = does(1, "serin-rollback", *options, env=environment)
    assert "HTTP 422" in output and "not all replicas have taken it over" in output


def test_a_real_configuration_goes_back_to_what_it_said_before(start, versions, program):  # noqa: F811
    config = CONFIG.format(weights=(95, 5), **addresses(versions))
    replica = start(config + "history: { directory: history }\n")
    edit(replica.config.parent)
    replica.ask("/api/v1/reload", "POST")
    assert canary_of([replica]) == [6]
    options, environment = ["--config", replica.config], {"SERIN": program}
    listed = does(0, "serin-rollback", *options, "--list", env=environment).splitlines()
    assert len(listed) == 2
    first = listed[1].split()[-1]
    assert "weight: 5" in does(0, "serin-rollback", *options, "--dry-run", env=environment)
    assert canary_of([replica]) == [6]
    for _ in range(2):
        does(0, "serin-rollback", *options, "--to", first, "--admin", replica.admin, env=environment)
        assert canary_of([replica]) == [5]
    assert "is not rolled back" in does(1, "serin-rollback", *options, "--to", "99", env=environment)


# === serin-health ===

CHECK = "{ http: { path: /healthz }, interval: 100ms, unhealthyAfter: 1, healthyAfter: 1 }"


@pytest.fixture
def checked(start, versions):  # noqa: F811
    """A replica that asks its endpoints, and the function that makes its canary ill or well."""
    config = CONFIG.format(weights=(90, 10), **addresses(versions))
    canary = versions["canary"]
    well = canary.RequestHandlerClass
    replica = start(config.replace('version: "1.9.0",', f'version: "1.9.0", healthCheck: {CHECK},'))

    def healthy(value):
        canary.RequestHandlerClass = well if value else Refusing
        labels = f'backend="shop-canary",endpoint="{addresses(versions)["canary"]}"'
        gauge = f"serin_endpoint_healthy{{{labels}}} {int(value)}"
        eventually(gauge, lambda: gauge in ask(f"http://{replica.admin}/metrics").decode())

    return replica, healthy


class Refusing(http.server.BaseHTTPRequestHandler):
    """An upstream that is ill."""

    def do_GET(self):
        self.send_error(503)

    def log_message(self, *_):
        pass


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes alerts as Alertmanager does, or refuses them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.headers["content-type"] == "application/json"
        self.server.posts.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.posts, server.status = [], 200
    server.address = serve(server)
    yield server
    server.shutdown()
    server.server_close()


def test_a_replica_that_is_well_is_told_in_lines(replicas):
    output = does(0, "serin-health", *reached(replicas, token=False))
    lines = output.splitlines()
    assert lines[0] == "SERIN OK - 2 of 2 replicas are well"
    facts = {line.split(": ", 1)[1] for line in lines[1:] if replicas[0].admin in line}
    assert {
        "ready",
        "the last reload was taken over",
        "shop-canary: 1 of 1 endpoints are healthy",
        "shop-stable: 1 of 1 endpoints are healthy",
    } <= facts
    assert any(re.fullmatch(r"\d+ of \d+ connections", fact) for fact in facts)


def test_a_replica_that_does_not_answer_is_critical(replicas):
    replicas[1].stop()
    output = does(2, "serin-health", *reached(replicas, token=False))
    assert output.startswith(f"SERIN CRITICAL - http://{replicas[1].admin}: does not answer")


def test_a_backend_without_a_healthy_endpoint_is_critical(checked):
    replica, healthy = checked
    healthy(True)
    does(0, "serin-health", "--admin", replica.admin)
    healthy(False)
    assert "shop-canary: 0 of 1 endpoints are healthy" in does(2, "serin-health", "--admin", replica.admin)


def test_a_refused_reload_and_replicas_that_differ_are_warnings(replicas):
    config = replicas[1].config
    config.write_text(config.read_text(encoding="utf-8") + "nonsense: 1\n", encoding="utf-8")
    replicas[1].ask("/api/v1/reload", "POST")
    output = does(1, "serin-health", *reached(replicas, token=False))
    assert "WARNING  http://" + replicas[1].admin + ": the last reload was refused" in output
    assert "different configurations" not in output
    text = config.read_text(encoding="utf-8").replace("nonsense: 1", "workers: 1")
    config.write_text(text.replace("weight: 0", "weight: 1"), encoding="utf-8")
    replicas[1].ask("/api/v1/reload", "POST")
    output = does(1, "serin-health", *reached(replicas, token=False))
    assert "WARNING  all replicas: 2 different configurations are in force" in output
    assert "WARNING  http://" + replicas[1].admin + ": a change in the file needs a restart" in output


METRICS = """# HELP something
serin_config_last_reload_successful 1
serin_config_watch_polling 1
serin_state_saved 0
serin_config_info{revision="3",hash="abc"} 1
serin_user_list_last_load_successful{list="beta"} 0
serin_user_list_last_load_successful{list="gone"} NaN
serin_endpoints_file_last_load_successful{backend="shop-stable"} 0
serin_certificate_not_after_timestamp_seconds{certificate="/etc/serin/old.crt"} %(past)d
serin_certificate_not_after_timestamp_seconds{certificate="/etc/serin/soon.crt"} %(soon)d
serin_certificate_not_after_timestamp_seconds{certificate="/etc/serin/far.crt"} %(far)d
serin_endpoint_healthy{backend="shop-stable",endpoint="10.0.0.1:80"} 1
serin_endpoint_healthy{backend="shop-stable",endpoint="10.0.0.2:80"} 0
serin_connections_active{listener="web"} 90
serin_connections_active{listener="tls"} 5
serin_connections_limit 100
serin_overload_requests_in_flight 99
serin_overload_limit NaN
process_open_fds 5
process_max_fds 100
"""


class Stub(http.server.BaseHTTPRequestHandler):
    """An admin listener that is not ready, and shows these metrics."""

    def do_GET(self):
        ready = self.path == "/readyz"
        now = time.time()
        times = {"past": now - 1, "soon": now + 3.5 * DAY, "far": now + 90.5 * DAY}
        body = "starting" if ready else METRICS % times
        self.send_response(503 if ready else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def test_each_fact_of_the_metrics_is_told():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    address = serve(server)
    try:
        output = does(2, "serin-health", "--admin", address)
        relaxed = does(
            2, "serin-health", "--admin", address, "--certificate-days", "1", "--limit-percent", "96"
        )
    finally:
        server.shutdown()
        server.server_close()
    told = {tuple(line.split(f" http://{address}: ")) for line in output.splitlines()[1:]}
    assert {(level.strip(), fact) for level, fact in told} == {
        ("CRITICAL", "not ready: HTTP 503, starting "),
        ("CRITICAL", "certificate /etc/serin/old.crt has expired"),
        ("OK", "certificate /etc/serin/far.crt expires in 90 days"),
        ("WARNING", "certificate /etc/serin/soon.crt expires in 3 days"),
        ("OK", "the last reload was taken over"),
        ("WARNING", "changes of files are found by polling alone"),
        ("WARNING", "weights that are set cannot be saved"),
        ("OK", "configuration abc"),
        ("WARNING", "user list beta was refused"),
        ("WARNING", "file of endpoints of shop-stable was refused"),
        ("WARNING", "shop-stable: 1 of 2 endpoints are healthy"),
        ("WARNING", "95 of 100 connections"),
        ("OK", "5 of 100 file descriptors"),
    }
    assert "OK       http://" + address + ": 95 of 100 connections" in relaxed
    assert "OK       http://" + address + ": certificate /etc/serin/soon.crt" in relaxed


def test_an_alert_is_raised_when_something_changes_and_only_then(replicas, receiver, tmp_path):
    replica = replicas[0]
    url = f"http://{receiver.address}/api/v2/alerts"
    arguments = ["--admin", replica.admin, "--alert-url", url, "--state-file", tmp_path / "states" / "health"]
    does(0, "serin-health", *arguments)
    assert receiver.posts == []
    replica.stop()
    does(2, "serin-health", *arguments)
    does(2, "serin-health", *arguments)
    [(path, [alert])] = receiver.posts
    assert path == "/api/v2/alerts"
    assert alert["labels"] == {"alertname": "SerinUnhealthy", "service": "serin", "severity": "critical"}
    assert f"{replica.admin}: does not answer" in alert["annotations"]["summary"]
    assert "CRITICAL http://" in alert["annotations"]["description"]
    assert seconds_until(alert["endsAt"]) == pytest.approx(7200, abs=60)
    replica.start_again()
    does(0, "serin-health", *arguments)
    does(0, "serin-health", *arguments)
    [_, (_, [resolved])] = receiver.posts
    assert resolved["labels"] == alert["labels"] and seconds_until(resolved["endsAt"]) <= 0


def seconds_until(text):
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone - time.time()


def test_another_severity_is_another_alert(checked, receiver, tmp_path):
    replica, healthy = checked
    healthy(False)
    arguments = ["--admin", replica.admin, "--alert-url", f"http://{receiver.address}/api/v2/alerts"]
    arguments += ["--state-file", tmp_path / "state"]
    does(2, "serin-health", *arguments)
    healthy(True)
    replica.config.write_text("nonsense: 1\n", encoding="utf-8")
    replica.ask("/api/v1/reload", "POST")
    does(1, "serin-health", *arguments)
    severities = [[alert["labels"]["severity"] for alert in alerts] for _, alerts in receiver.posts]
    assert severities == [["critical"], ["critical", "warning"]]
    ends = [seconds_until(alert["endsAt"]) for alert in receiver.posts[1][1]]
    assert ends[0] <= 0 < ends[1]


def test_an_alert_that_goes_on_is_renewed(receiver, tmp_path):
    arguments = ["--admin", "127.0.0.1:1", "--alert-url", f"http://{receiver.address}/api/v2/alerts"]
    arguments += ["--state-file", tmp_path / "state"]
    does(2, "serin-health", *arguments)
    does(2, "serin-health", *arguments, "--renew", "3600")
    assert len(receiver.posts) == 1
    does(2, "serin-health", *arguments, "--renew", "0")
    assert len(receiver.posts) == 2


def test_an_alert_that_nobody_took_is_said_again(receiver, tmp_path):
    arguments = ["--admin", "127.0.0.1:1", "--alert-url", f"http://{receiver.address}/api/v2/alerts"]
    arguments += ["--state-file", tmp_path / "state"]
    receiver.status = 500
    assert "could not be delivered" in does(3, "serin-health", *arguments)
    receiver.status = 200
    does(2, "serin-health", *arguments)
    does(2, "serin-health", *arguments)
    assert len(receiver.posts) == 2


def test_a_command_hears_of_a_change_once(tmp_path):
    notes = tmp_path / "notes"
    command = f'{{ echo "$SERIN_HEALTH_STATUS|$SERIN_HEALTH_SUMMARY"; cat; }} >> {notes}'
    arguments = ["--admin", "127.0.0.1:1", "--alert-command", command, "--state-file", tmp_path / "state"]
    does(2, "serin-health", *arguments)
    does(2, "serin-health", *arguments)
    lines = notes.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("CRITICAL|http://127.0.0.1:1: does not answer")
    assert lines[1].startswith("CRITICAL http://127.0.0.1:1: does not answer")


def test_a_dry_run_of_the_health_check_alerts_nobody(receiver, tmp_path):
    state = tmp_path / "state"
    arguments = [
        "--admin",
        "127.0.0.1:1",
        "--alert-url",
        f"http://{receiver.address}/",
        "--state-file",
        state,
    ]
    assert '"severity":"critical"' in does(2, "serin-health", *arguments, "--dry-run")
    assert receiver.posts == [] and not state.exists()


# === serin-log-cleanup ===


@pytest.fixture
def logs(tmp_path):
    """A directory of logs of several ages, with things in it that are none."""
    directory = tmp_path / "log"
    directory.mkdir()
    ages = {
        "access.log": 40,
        "access.log.1": 0,
        "access.log.2": 2,
        "access.log.3": 31,
        "access.log.4.gz": 3,
        "access.log-20260101": 40,
        "access.log-20260202.gz": 40,
        "access.log.bak": 40,
        "access.logs": 40,
        "error.log.1": 40,
    }
    (directory / "access.log.d").mkdir()
    outside = tmp_path / "outside.log"
    for path, age in [*((directory / name, age) for name, age in ages.items()), (outside, 40)]:
        path.write_text(f"{path.name}\n", encoding="utf-8")
        os.utime(path, (time.time() - age * DAY - 60,) * 2)
    (directory / "access.log.9").symlink_to(outside)
    os.utime(directory / "access.log.9", (time.time() - 40 * DAY,) * 2, follow_symlinks=False)
    return directory


def names_in(directory):
    """What is there; times in names are left out."""
    return sorted(re.sub(r"\d{8}T\d{6}Z", "TIME", path.name) for path in directory.iterdir())


UNTOUCHED = ["access.log", "access.log.9", "access.log.bak", "access.log.d", "access.logs", "error.log.1"]


def test_old_logs_are_deleted_and_nothing_else(logs):
    output = does(0, "serin-log-cleanup", "--directory", logs, "--days", "30")
    assert output.count(": deleted\n") == 3
    assert names_in(logs) == sorted([*UNTOUCHED, "access.log.1", "access.log.2", "access.log.4.gz"])
    assert (logs.parent / "outside.log").exists()
    assert does(0, "serin-log-cleanup", "--directory", logs, "--days", "30") == ""


def test_logs_are_compressed_under_names_that_serin_does_not_use(logs):
    written = (logs / "access.log.2").stat().st_mtime
    output = does(0, "serin-log-cleanup", "--directory", logs, "--days", "30", "--compress-after", "1")
    assert output.count(": compressed\n") == 1
    assert names_in(logs) == sorted([*UNTOUCHED, "access.log.1", "access.log.4.gz", "access.log.TIME.gz"])
    [compressed] = logs.glob("access.log.*Z.gz")
    assert gzip.decompress(compressed.read_bytes()) == b"access.log.2\n"
    assert compressed.stat().st_mtime == pytest.approx(written, abs=1)
    assert does(0, "serin-log-cleanup", "--directory", logs, "--days", "30", "--compress-after", "1") == ""
    # Serin rotates on, and the next one does not meet it.
    (logs / "access.log.1").rename(logs / "access.log.2")
    os.utime(logs / "access.log.2", (written, written))
    does(0, "serin-log-cleanup", "--directory", logs, "--days", "30", "--compress-after", "1")
    assert len(list(logs.glob("access.log.*Z*.gz"))) == 2


def test_a_dry_run_of_the_clean_up_leaves_everything(logs):
    before = names_in(logs)
    arguments = ["--directory", logs, "--days", "30", "--compress-after", "1", "--dry-run"]
    output = does(0, "serin-log-cleanup", *arguments)
    assert output.count(": would be deleted\n") == 3 and output.count(": would be compressed\n") == 1
    assert names_in(logs) == before


def test_compressed_logs_are_deleted_in_their_turn(logs):
    does(0, "serin-log-cleanup", "--directory", logs, "--days", "30", "--compress-after", "1")
    does(0, "serin-log-cleanup", "--directory", logs, "--days", "1")
    assert names_in(logs) == sorted([*UNTOUCHED, "access.log.1"])


def test_logs_that_a_real_serin_rotates_can_be_cleaned_up(start, versions):  # noqa: F811
    config = CONFIG.format(weights=(1, 0), **addresses(versions))
    replica = start(config + "accessLog: { output: access.log, rotation: { size: 64Ki, keep: 3 } }\n")
    directory = replica.config.parent
    long = "x" * 3000

    def rotated():
        ask(f"http://{replica.web}/{long}")
        return (directory / "access.log.1").exists()

    eventually("a rotation", rotated)
    content = (directory / "access.log.1").read_bytes()
    os.utime(directory / "access.log.1", (time.time() - 2 * DAY,) * 2)
    does(0, "serin-log-cleanup", "--directory", directory, "--compress-after", "1")
    [compressed] = directory.glob("access.log.*Z.gz")
    assert gzip.decompress(compressed.read_bytes()) == content
    assert all(json.loads(line)["route"] == "shop" for line in content.splitlines())
    eventually("the next rotation", rotated)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--directory", "/nonexistent"], 1),
        ([], 2),
        (["--directory", "/tmp", "--days", "0"], 2),
        (["--directory", "/tmp", "--name", "../x"], 2),
    ],
)
def test_a_clean_up_of_nowhere_or_of_everything_is_refused(arguments, code):
    does(code, "serin-log-cleanup", *arguments)


# === serin-config ===


@pytest.fixture
def etc(tmp_path, program):  # noqa: F811
    """A configuration with a key, and a way to call the script for it."""
    directory = tmp_path / "etc"
    (directory / "keys").mkdir(parents=True)
    config = CONFIG.format(weights=(95, 5), stable="127.0.0.1:9001", canary="127.0.0.1:9002")
    (directory / "serin.yaml").write_text(config, encoding="utf-8")
    (directory / "pipeline.token").write_text(TOKEN, encoding="utf-8")
    (directory / "keys" / "secret").write_text("secret", encoding="utf-8")
    (directory / "keys" / "secret").chmod(0o600)
    (directory / "keys" / "link").symlink_to("../keys/secret")
    directory.chmod(0o750)

    def call(code, command, *arguments):
        options = ["--config-dir", directory, "--backups", tmp_path / "backups"]
        return does(code, "serin-config", command, *options, *arguments, env={"SERIN": program})

    return directory, call


def backups(directory):
    return sorted((directory.parent / "backups").glob("*.tar"))


def edit(directory, old="weight: 5", new="weight: 6"):
    config = directory / "serin.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def snapshot(directory):
    """All that is there: kinds, modes, targets of links, content."""
    found = {}
    for path in [directory.resolve(), *directory.resolve().rglob("*")]:
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory.resolve()))] = (oct(path.lstat().st_mode), content)
    return found


def test_a_backup_holds_everything_with_checksums_and_is_written_once(etc):
    directory, call = etc
    assert "written" in call(0, "backup")
    assert "has this content already" in call(0, "backup")
    [archive] = backups(directory)
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar}
        assert names >= {"SHA256SUMS", "config/serin.yaml", "config/keys/secret", "config/keys/link"}
        assert tar.getmember("config/keys/secret").mode == 0o600
        assert tar.getmember("config/keys/link").linkname == "../keys/secret"
        assert len(tar.extractfile("SHA256SUMS").read().splitlines()) == 3
    subprocess.run(
        ["sha256sum", "--check", "--quiet", f"{archive.name}.sha256"], cwd=archive.parent, check=True
    )
    assert "is as it was written" in call(0, "verify")


def test_the_oldest_backups_go(etc):
    directory, call = etc
    for number in range(4):
        edit(directory, f"weight: {5 + number} }}", f"weight: {6 + number} }}")
        call(0, "backup", "--keep", "2")
    assert len(backups(directory)) == 2
    assert len(list((directory.parent / "backups").iterdir())) == 4
    assert call(0, "list").split() == [str(path) for path in backups(directory)]


def test_a_restore_brings_everything_back_and_can_be_undone(etc):
    directory, call = etc
    call(0, "backup")
    before = snapshot(directory)
    edit(directory)
    (directory / "new").mkdir()
    (directory / "new" / "file").write_text("x", encoding="utf-8")
    (directory / "keys" / "secret").unlink()
    changed = snapshot(directory)
    output = call(0, "restore")
    assert snapshot(directory) == before
    assert "has the content of" in call(0, "restore", "--from", backups(directory)[0])
    undo = re.search(r"--from (\S+)", output)[1]
    call(0, "restore", "--from", undo)
    assert snapshot(directory) == changed


def test_a_restore_behind_a_symbolic_link_switches_the_link(etc):
    directory, call = etc
    directory.rename(directory.parent / "etc-1")
    directory.symlink_to("etc-1")
    call(0, "backup")
    before = snapshot(directory)
    edit(directory)
    call(0, "restore", "--from", backups(directory)[0])
    assert directory.is_symlink() and directory.resolve().name != "etc-1"
    assert snapshot(directory) == before
    assert "weight: 6" in (directory.parent / "etc-1" / "serin.yaml").read_text(encoding="utf-8")


def test_what_is_excluded_is_left_alone(etc):
    directory, call = etc
    state = directory / "state.json"
    state.write_text("old", encoding="utf-8")
    call(0, "backup", "--exclude", "state.json")
    edit(directory)
    state.write_text("new", encoding="utf-8")
    call(0, "restore", "--exclude", "state.json")
    assert "weight: 5" in (directory / "serin.yaml").read_text(encoding="utf-8")
    assert state.read_text(encoding="utf-8") == "new"


def test_a_backup_that_is_damaged_is_not_restored(etc):
    directory, call = etc
    call(0, "backup")
    edit(directory)
    before = snapshot(directory)
    [archive] = backups(directory)
    sound = archive.read_bytes()
    archive.write_bytes(sound.replace(b"weight: 5", b"weight: 9"))
    for command in ("verify", "restore"):
        assert "does not have the checksum" in call(1, command)
    # Somebody has written the outer checksum anew.
    with open(f"{archive}.sha256", "w", encoding="utf-8") as sums:
        subprocess.run(["sha256sum", archive.name], cwd=archive.parent, stdout=sums, check=True)
    assert "other files than its list of checksums says" in call(1, "restore")
    pathlib.Path(f"{archive}.sha256").unlink()
    assert "is missing" in call(1, "restore")
    assert snapshot(directory) == before


def test_a_configuration_that_serin_would_refuse_is_not_restored(etc):
    directory, call = etc
    edit(directory, "name: shop-canary, weight", "name: shop-canry, weight")
    call(0, "backup")
    edit(directory, "name: shop-canry, weight", "name: shop-canary, weight")
    before = snapshot(directory)
    output = call(1, "restore")
    assert "unknown backend `shop-canry`" in output and "nothing was changed" in output
    assert snapshot(directory) == before


def test_a_dry_run_of_a_backup_or_a_restore_changes_nothing(etc):
    directory, call = etc
    assert "would be written" in call(0, "backup", "--dry-run")
    assert backups(directory) == []
    call(0, "backup")
    edit(directory)
    before = snapshot(directory)
    output = call(0, "restore", "--dry-run")
    assert "would be restored" in output and "would be written" in output
    assert snapshot(directory) == before and len(backups(directory)) == 1


def test_a_running_serin_takes_a_restored_configuration_over(replicas, program):  # noqa: F811
    replica = replicas[0]
    directory = replica.config.parent
    options = ["--config-dir", directory, "--backups", directory.parent / "b", "--exclude", "log"]
    environment = {"SERIN": program}
    does(0, "serin-config", "backup", *options, env=environment)
    edit(directory, "weight: 0 }", "weight: 33 }")
    assert "revision" in replica.ask("/api/v1/reload", "POST")
    assert replica.weights()["shop-canary"] == 33
    output = does(0, "serin-config", "restore", *options, "--admin", replica.admin, env=environment)
    assert "has taken the files over" in output
    assert replica.weights()["shop-canary"] == 0


def test_there_is_nothing_to_restore_without_a_backup(etc):
    _, call = etc
    assert "there is no backup" in call(1, "restore")


def test_scripts_work_from_anywhere_and_by_a_link(tmp_path):
    link = tmp_path / "bin" / "serin-log-cleanup"
    link.parent.mkdir()
    link.symlink_to(SCRIPTS / link.name)
    done = subprocess.run([link, "--help"], cwd="/", capture_output=True, text=True, check=True)
    assert "rotated access logs" in done.stdout
    assert shutil.which("jq") is None or not any(
        "jq " in (SCRIPTS / name).read_text("utf-8") for name in NAMES
    )
