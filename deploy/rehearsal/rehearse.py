"""A release on three replicas: ramped up, restarted under load, followed by a bad one that is taken back."""

import argparse
import contextlib
import datetime
import http.server
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# It comes first, since it knows where the checks are from which the others come.
from cluster import DEPLOY, ConfigMap, Load, Prometheus, Replica, Service, tail

from running import PATIENCE, TOKEN, eventually
from test_grafana import DASHBOARDS, expressions, filled_in
from under_load import Version

HERE = Path(__file__).resolve().parent
REPOSITORY = DEPLOY.parent
KEYS = REPOSITORY / "config" / "keys"
PAUSE = "5s"
# Four scrapes and some more: Grafana takes four.
RATE_INTERVAL = "10s"
# What the bad canary does once it has some load: every third request fails, and takes this long.
FAILS_EVERY = 3
SLOW = 0.12
OF_CANARY = {"SerinCanaryErrorRatioHigh", "SerinCanaryErrorRatioElevated", "SerinCanaryLatencyHigh"}

# One file for all replicas. Port 0 stands for the address of a pod, and the working directory of the process
# for the volumes that a pod has to itself.
CONFIG = """
listeners: [ {{ name: web, address: "127.0.0.1:0" }} ]
admin: {{ address: "127.0.0.1:0", writers: [ {{ name: pipeline, tokenFile: pipeline.token }} ] }}
stateFile: /proc/self/cwd/state.json
accessLog: {{ output: /proc/self/cwd/access.log }}
userLists: [ {{ name: bots, file: bots.txt, expires: "2099-12-31" }} ]
backends:
  - name: shop-stable
    version: "{stable.version}"
    endpoints: [ "localhost:{stable.port}" ]
    healthCheck: {{ tcp: {{}} }}
  - name: shop-canary
    version: "{canary.version}"
    endpointsFile: canary.yaml
    # It would take the bad version out of the way, before the alert and the ramp have had their say.
    outlierDetection: {{ disabled: true }}
  # Nobody is sent there; its certificate is what dashboards show.
  - name: shop-next
    endpoints: [ "127.0.0.1:9" ]
    tls: {{ certificateFile: shop.crt, keyFile: shop.key, insecureSkipVerify: true }}
routes:
  - name: shop
    backendRefs:
      - {{ name: shop-stable, weight: {weights[0]} }}
      - {{ name: shop-canary, weight: {weights[1]} }}
      - {{ name: shop-next, weight: 0 }}
    exposeVersion: true
    gray:
      identity: [ {{ header: x-user-id }} ]
      denyList: bots
      override: {{ header: x-canary }}
"""


class Release(Version):
    """A version of the shop, which does well unless it is spoilt."""

    def __init__(self, version):
        super().__init__(seconds=0.01, fails_every=sys.maxsize)
        self.version = version

    def spoil(self):
        self.fails_every, self.seconds = FAILS_EVERY, SLOW


def promise(kept, words):
    """Ends the rehearsal if a promise is broken."""
    if not kept:
        raise AssertionError(words)


def script(name, *arguments):
    """Runs a script of deploy/scripts, and returns its exit code and what it wrote."""
    command = [str(DEPLOY / "scripts" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return done.returncode, done.stdout + done.stderr


class Rehearsal:
    """The cluster, and what has happened in it."""

    def __init__(self, running, directory, serin, prometheus):
        def run(what):
            running.callback(what.stop)
            return what

        self.began, self.rows = time.monotonic(), []
        # Rows begin where the one before ended.
        self.row_began, self.counted = self.began, 0
        self.releases = {version: run(Release(version)) for version in ("1.8.2", "1.9.0", "2.0.0")}
        self.token = directory / "pipeline.token"
        self.token.write_text(TOKEN + "\n", encoding="utf-8")
        self.config = ConfigMap(directory / "etc")
        self.stable, self.canary = "1.8.2", "1.9.0"
        self.config.put(self.files(100, 0))
        mounted = directory / "etc" / "serin.yaml"
        self.replicas = [run(Replica(serin, mounted, directory / f"serin-{number}")) for number in (1, 2, 3)]
        admins = [replica.admin for replica in self.replicas]
        self.prometheus = run(Prometheus(prometheus, directory / "prometheus", admins))
        self.service = run(Service(self.replicas))
        self.service.knows(3)
        self.load = run(Load(self.service))

    # === what is in force ===

    def files(self, *weights):
        """The content of the ConfigMap and the Secret that the pods have mounted as one directory."""
        stable, canary = self.releases[self.stable], self.releases[self.canary]
        return {
            "serin.yaml": CONFIG.format(stable=stable, canary=canary, weights=weights),
            "canary.yaml": f'[ "127.0.0.1:{canary.port}" ]\n',
            "bots.txt": "crawler\n",
            "pipeline.token": TOKEN + "\n",
            "shop.crt": (KEYS / "shop.crt").read_text(encoding="utf-8"),
            "shop.key": (KEYS / "shop.key").read_text(encoding="utf-8"),
        }

    def mount(self, files):
        """Swaps the ConfigMap, waits until all follow, and returns the hash that all have then."""
        before = self.the_hash()
        self.config.put(files)
        eventually("a replica takes the file over", lambda: self.replicas[0].hash() != before)
        eventually("all have the same hash", lambda: len({replica.hash() for replica in self.replicas}) == 1)
        return self.the_hash()

    def the_hash(self):
        hashes = {replica.hash() for replica in self.replicas}
        promise(len(hashes) == 1, f"replicas have different configurations: {hashes}")
        return hashes.pop()

    def in_force(self, canary, source):
        """Demands a weight of the canary on all replicas."""
        for replica in self.replicas:
            said = replica.ask("/api/v1/routes/shop/weights")
            wanted = {"shop-stable": 100 - canary, "shop-canary": canary, "shop-next": 0}
            promise(
                said["weights"] == wanted and said["source"] == source, f"{wanted} by {source}, not {said}"
            )

    # === what was seen ===

    def row(self, name, share, settled=0, may_fire=frozenset()):
        """Ends a step: looks at what users saw, at alerts and at dashboards.

        `share` of the users' requests since `settled` had the canary's answer."""
        eventually("requests of users", lambda: self.load.seen and self.load.seen[-1].sent > settled + 1)
        asked, answered = self.dashboards()
        firing, fired = self.prometheus.firing(), self.prometheus.fired()
        promise(fired <= may_fire, f"{name}: alerts fire that should not: {fired - may_fire}")
        seen = self.load.seen[self.counted :]
        self.counted += len(seen)
        self.no_failure(name, seen, testers_too=not may_fire)
        users = [one for one in seen if not one.tester and one.sent >= settled]
        of_canary = sum(one.version == self.canary for one in users)
        of_stable = sum(one.version == self.stable for one in users)
        promise(
            users and of_canary + of_stable == len(users), f"{name}: answers by a version that is none here"
        )
        likely = tail(len(users), of_canary, share)
        promise(
            likely > 1e-6, f"{name}: {of_canary} of {len(users)} users met the canary, and {share:.2%} should"
        )
        now = time.monotonic()
        self.rows.append(
            {
                "step": name,
                "seconds": f"{now - self.row_began:.1f}",
                "requests": len(seen),
                "failed for users": sum(bool(one.failed) for one in seen if not one.tester),
                "failed for the tester": sum(bool(one.failed) for one in seen if one.tester),
                "canary expected": f"{share:.2%}",
                "canary seen": f"{of_canary / len(users):.2%}",
                "alerts that fire": ", ".join(sorted(firing)) or "none",
                "queries asked": asked,
                "with data": answered,
            }
        )
        self.row_began = now
        print(f"{now - self.began:6.1f} s  {name}: {of_canary} of {len(users)} by the canary", flush=True)

    @staticmethod
    def no_failure(name, seen, testers_too):
        failures = [one.failed for one in seen if one.failed and (testers_too or not one.tester)]
        words = f"{name}: {len(failures)} of {len(seen)} requests failed: {', '.join(sorted(set(failures)))}"
        promise(not failures, words)

    def dashboards(self):
        """Evaluates all queries of all dashboards. Each panel must show something, and changes are marked."""
        queries = [query for dashboard in DASHBOARDS.values() for query in expressions(dashboard)]
        deadline = time.monotonic() + PATIENCE
        while True:
            empty = [place for place, expression in queries if not self.has_data(expression)]
            missing = [place for place in empty if self.is_due(place)]
            if not missing:
                return len(queries), len(queries) - len(empty)
            promise(time.monotonic() < deadline, f"dashboards show nothing at {', '.join(missing)}")
            time.sleep(0.5)

    def is_due(self, place):
        """Whether a query must have data: an annotation has none before there is something to mark."""
        return "annotation" not in place or (self.rows and place.endswith("annotation Weights"))

    def has_data(self, expression):
        samples = self.prometheus.query(filled_in(expression, RATE_INTERVAL))
        return any(math.isfinite(value) for _, value in samples)

    # === what is done ===

    def admins(self):
        return [word for replica in self.replicas for word in ("--admin", replica.admin)]

    def ramp(self, steps, at_step=None):
        """Runs serin-ramp. With `at_step` it is gated after each step: by that, and by Prometheus."""
        options = ["--route=shop", "--stable=shop-stable", "--canary=shop-canary", f"--steps={steps}"]
        options += [f"--pause={PAUSE}", f"--token-file={self.token}", *self.admins()]
        if at_step is None:
            return script("serin-ramp", *options)
        with gate(at_step) as (command, broken):
            options += [
                f"--gate={command}",
                f"--prometheus=http://{self.prometheus.address}",
                f"--window={PAUSE}",
            ]
            done = script("serin-ramp", *options)
        if broken:
            raise broken[0]
        return done

    def settled(self):
        """When the weights were in force on all replicas: a little after the last was told."""
        told = (replica.ask("/api/v1/routes/shop/weights")["setAt"] for replica in self.replicas)
        return (
            max(datetime.datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp() for at in told) + 0.1
        )

    def restart(self, number):
        """Replaces a pod: the next one is only begun when the Service knows the new one."""
        replica = self.replicas[number]
        code = replica.terminate()
        promise(code == 0, f"replica {number + 1} ended with {code}")
        others = [other.admin for other in self.replicas if other is not replica]
        self.prometheus.scrape(others)
        self.service.knows(2)
        replica.begin()
        self.prometheus.scrape([*others, replica.admin])
        self.service.knows(3)

    # === the story ===

    def play(self):
        self.row("three replicas, all users on 1.8.2", 0)

        def good_step(step):
            self.in_force(step, "api")
            self.row(f"1.9.0 ramped to {step}", step / 100, self.settled())

        code, words = self.ramp("1,10,50,100", good_step)
        promise(code == 0, f"the ramp of a good canary ended with {code}: {words}")

        released = self.files(0, 100)
        hash_of_release = self.mount(released)
        self.in_force(100, "file")
        self.row("the file says 100, and all follow", 1)

        for number in range(3):
            self.restart(number)
            self.in_force(100, "file")
            promise(self.the_hash() == hash_of_release, "another configuration after the restart")
            self.row(f"replica {number + 1} restarted", 1)

        # Users stay where they are: the version that was the canary is the baseline now.
        self.stable, self.canary = "1.9.0", "2.0.0"
        promise(
            self.mount(self.files(100, 0)) != hash_of_release, "the next release has the hash of the last"
        )
        self.in_force(0, "file")
        settled = time.time()
        self.prometheus.wait_for('serin_requests_in_flight{backend="shop-canary",version="2.0.0"}')
        self.row("the file of the next release: 2.0.0 is the canary, at 0", 0, settled)
        self.bad_canary()

        hash_before = self.the_hash()
        self.stable, self.canary = "1.8.2", "1.9.0"
        promise(self.mount(released) == hash_of_release != hash_before, "the file of before has another hash")
        self.in_force(100, "file")
        settled = time.time()
        gone = 'ALERTS{alertname="SerinCanaryErrorRatioHigh",alertstate="firing"}'
        eventually("the alert ends", lambda: not self.prometheus.query(gone))
        self.row("the file of before, all users on 1.9.0", 1, settled, may_fire=OF_CANARY)

    def bad_canary(self):
        def bad_step(step):
            self.in_force(step, "api")
            if step == 1:
                self.row("2.0.0 ramped to 1", 0.01, self.settled())
                self.releases["2.0.0"].spoil()
                return
            self.prometheus.wait_for('ALERTS{alertname="SerinCanaryErrorRatioHigh",alertstate="firing"}')
            # The baseline answers what the canary fails.
            share = step / 100 * (1 - 1 / FAILS_EVERY)
            self.row(f"2.0.0 ramped to {step}, and fails", share, self.settled(), may_fire=OF_CANARY)

        code, words = self.ramp("1,10,50,100", bad_step)
        promise(code == 1 and "step 10 failed, and the canary was taken back" in words, f"{code}: {words}")
        self.in_force(0, "api")
        self.row("serin-ramp has taken it back", 0, self.settled(), may_fire=OF_CANARY)

        code, words = self.ramp("10")
        promise(code == 0, f"a ramp without a gate ended with {code}: {words}")
        self.in_force(10, "api")
        share = 0.1 * (1 - 1 / FAILS_EVERY)
        self.row("somebody tries again without a gate", share, self.settled(), may_fire=OF_CANARY)
        options = ["--route=shop", "--canary=shop-canary", f"--token-file={self.token}", *self.admins()]
        code, words = script("serin-rollback", *options)
        promise(code == 0, f"the rollback ended with {code}: {words}")
        for replica in self.replicas:
            weights = replica.weights()
            promise(weights["shop-canary"] == 0 < weights["shop-stable"], f"after the rollback: {weights}")
        self.row("serin-rollback has taken it back", 0, self.settled(), may_fire=OF_CANARY)

    def end(self):
        """Ends the load and the replicas, and demands that nothing has failed until then."""
        self.load.stop()
        self.no_failure("the end", self.load.seen[self.counted :], testers_too=False)
        for replica in self.replicas:
            replica.process.send_signal(signal.SIGTERM)
        codes = [replica.process.wait(30) for replica in self.replicas]
        promise(codes == [0, 0, 0], f"the replicas ended with {codes}")

    def table(self):
        """The rows, in Markdown."""
        heads = list(self.rows[0])
        lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextlib.contextmanager
def gate(at_step):
    """A command for --gate that calls `at_step` with the step, and what that has raised."""
    broken = []

    class Gate(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                at_step(int(self.path.strip("/")))
            except Exception as error:
                broken.append(error)
            self.send_response(500 if broken else 204)
            self.end_headers()

        def log_message(self, *_):
            """The rehearsal says more."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/$SERIN_RAMP_STEP"
        yield f"curl --fail --silent --show-error --request POST {url}", broken
    finally:
        server.shutdown()
        server.server_close()


def built():
    """The program, as `cargo build` leaves it."""
    command = ["cargo", "build", "--quiet", "--locked", "--bin", "serin", "--message-format=json"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    messages = map(json.loads, done.stdout.splitlines())
    return next(message["executable"] for message in messages if message.get("executable"))


def results(rehearsal, serin):
    """What RESULTS.md says."""
    version = subprocess.run([serin, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    users = [one for one in rehearsal.load.seen if not one.tester]
    failed = sum(bool(one.failed) for one in users)
    place = f"{datetime.date.today()}, {version} on {os.cpu_count()} processors ({platform.machine()})"
    took = f"{time.monotonic() - rehearsal.began:.0f} seconds"
    what = f"{len(users)} requests of users, {failed} of them failed"
    return f"""# The last rehearsal

Written by `deploy/rehearsal/run --write`; [the README](README.md) says what the columns mean.

{place}: {took}, {what}.

{rehearsal.table()}
"""


def main():
    parser = argparse.ArgumentParser(prog="deploy/rehearsal/run", description=__doc__)
    default = REPOSITORY / "target" / "deploy-tools" / "bin" / "prometheus"
    parser.add_argument(
        "--serin", default=os.environ.get("SERIN"), help="default: SERIN, or what cargo builds"
    )
    parser.add_argument("--prometheus", default=default, help="default: that of deploy/checks")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md as well")
    options = parser.parse_args()
    serin = os.path.abspath(options.serin or built())
    # Everything is here.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    # Whoever ends the rehearsal ends all that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    directory = Path(tempfile.mkdtemp(prefix="serin-rehearsal-"))
    try:
        with contextlib.ExitStack() as running:
            rehearsal = Rehearsal(running, directory, serin, str(options.prometheus))
            rehearsal.play()
            rehearsal.end()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"The rehearsal failed: {error}\nThe logs are in {directory}.")
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(directory)
        raise
    print(rehearsal.table())
    if options.write:
        (HERE / "RESULTS.md").write_text(results(rehearsal, serin), encoding="utf-8")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
