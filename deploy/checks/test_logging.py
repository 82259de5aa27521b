"""The way of the access log into Elasticsearch: lines that a real Serin wrote go through the pipeline, and
what comes out fits the mapping. Elasticsearch itself is not asked: the processors are played here, and the
types of its API check the rest.
"""

import copy
import fnmatch
import http.client
import http.server
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import subprocess

import pytest
import yaml

from conftest import DEPLOY, REPOSITORY, TOOLS
from running import CONFIG, addresses, ask, eventually, program, serve, start, versions  # noqa: F401

LOGGING = DEPLOY / "logging"
ELASTICSEARCH = LOGGING / "elasticsearch"
BEATS = ["filebeat.yaml", "filebeat-kubernetes.yaml"]

# What each file is the body of.
BODIES = {
    "ingest-pipeline.json": "IngestPutPipelineRequest",
    "index-template.json": "IndicesPutIndexTemplateRequest",
    "ilm-policy.json": "IlmPutLifecycleRequest",
}


def body(name):
    return json.loads((ELASTICSEARCH / name).read_text(encoding="utf-8"))


# === the pipeline, played ===


class Failure(Exception):
    """A processor cannot do its work, and may not ignore that."""


class Document:
    """A document on its way through a pipeline, whose fields are named by paths."""

    def __init__(self, content):
        self.content = copy.deepcopy(content)

    def get(self, path):
        found = self.content
        for word in path.split("."):
            if not isinstance(found, dict) or word not in found:
                return None
            found = found[word]
        return found

    def set(self, path, value):
        *parents, last = path.split(".")
        found = self.content
        for word in parents:
            found = found.setdefault(word, {})
        found[last] = value

    def pop(self, path):
        *parents, last = path.split(".")
        found = self.content
        for word in parents:
            found = found[word]
        return found.pop(last)

    def holds(self, condition):
        """What a condition in Painless says, of comparisons with `&&` between."""
        names = re.findall(r"ctx(?:\??\.\w+)+", condition)
        for name in sorted(names, key=len, reverse=True):
            path = name.replace("?", "").removeprefix("ctx.")
            condition = condition.replace(name, repr(self.get(path)))
        return eval(condition.replace("null", "None").replace("&&", "and"), {"__builtins__": {}})


def play(pipeline, content):
    """What a pipeline makes of a document."""
    document = Document(content)
    try:
        for processor in pipeline["processors"]:
            step(document, processor)
    except Failure as failure:
        for processor in pipeline["on_failure"]:
            [(kind, options)] = processor.items()
            value = re.sub(r"\{\{\{ _ingest\.on_failure_message \}\}\}", str(failure), str(options["value"]))
            document.set(options["field"], [value] if kind == "append" else value)
    return document.content


def step(document, processor):
    [(kind, options)] = processor.items()
    if "if" in options and not document.holds(options["if"]):
        return
    if "field" in options and kind != "set" and document.get(options["field"]) is None:
        if options.get("ignore_missing"):
            return
        raise Failure(f"field [{options['field']}] not present as part of path [{options['field']}]")
    PROCESSORS[kind](document, options)


def rename(document, options):
    if document.get(options["target_field"]) is not None:
        raise Failure(f"field [{options['target_field']}] already exists")
    document.set(options["target_field"], document.pop(options["field"]))


def date(document, options):
    value = document.get(options["field"])
    if options["formats"] != ["ISO8601"] or not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value
    ):
        raise Failure(f"unable to parse date [{value}]")
    document.set(options["target_field"], value)


def gsub(document, options):
    value = document.get(options["field"])
    if not isinstance(value, str):
        raise Failure(f"field [{options['field']}] is no text")
    document.set(options["target_field"], re.sub(options["pattern"], options["replacement"], value))


def dissect(document, options):
    names = re.findall(r"%\{([^}]*)\}", options["pattern"])
    literals = re.split(r"%\{[^}]*\}", options["pattern"])
    pattern = "(.*?)".join(map(re.escape, literals[:-1])) + "(.*)" + re.escape(literals[-1])
    found = re.fullmatch(pattern, document.get(options["field"]))
    if not found:
        raise Failure(f"Unable to find match for dissect pattern: {options['pattern']}")
    for name, value in zip(names, found.groups(), strict=True):
        document.set(name, value)


def script(document, options):
    found = re.fullmatch(r"ctx\.([\w.]+) = Math\.round\(ctx\.([\w.]+) \* params\.(\w+)\)", options["source"])
    target, source, factor = found.groups()
    document.set(target, round(document.get(source) * options["params"][factor]))


PROCESSORS = {
    "set": lambda document, options: document.set(options["field"], options["value"]),
    "remove": lambda document, options: document.pop(options["field"]),
    "rename": rename,
    "date": date,
    "gsub": gsub,
    "dissect": dissect,
    "lowercase": lambda document, options: document.set(
        options["field"], document.get(options["field"]).lower()
    ),
    "user_agent": lambda document, options: document.set(
        "user_agent",
        {
            "original": document.get(options["field"]),
            "name": "Other",
            "version": "1",
            "device": {"name": "Other"},
            "os": {"name": "Linux", "full": "Linux 6", "version": "6"},
        },
    ),
    "geoip": lambda document, options: document.set(
        options["target_field"], {"country_iso_code": "NL", "location": {"lat": 52.4, "lon": 4.9}}
    ),
    "script": script,
}

# === the mapping ===


def mapped(properties=None, prefix=""):
    """The type of each field of the mapping, by its path."""
    if properties is None:
        properties = body("index-template.json")["template"]["mappings"]["properties"]
    found = {}
    for name, field in properties.items():
        if "properties" in field:
            found |= mapped(field["properties"], f"{prefix}{name}.")
        else:
            found[prefix + name] = field["type"]
    return found


def leaves(content, types, prefix=""):
    """The fields of a document with their values, as deep as the mapping has objects."""
    for name, value in content.items():
        path = prefix + name
        if isinstance(value, dict) and path not in types:
            yield from leaves(value, types, f"{path}.")
        else:
            yield path, value


def is_ip(value):
    ipaddress.ip_address(value)
    return True


FITS = {
    "date": lambda value: re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", value),
    "keyword": lambda value: all(
        isinstance(one, str) for one in (value if isinstance(value, list) else [value])
    ),
    "constant_keyword": lambda value: isinstance(value, str),
    "wildcard": lambda value: isinstance(value, str),
    "match_only_text": lambda value: isinstance(value, (str, list)),
    "ip": is_ip,
    "long": lambda value: type(value) is int,
    "integer": lambda value: type(value) is int and abs(value) < 2**31,
    "short": lambda value: type(value) is int and abs(value) < 2**15,
    "double": lambda value: type(value) in (int, float),
    "geo_point": lambda value: set(value) == {"lat", "lon"},
}


def misfits(content):
    """The fields of a document that the mapping does not have, or has another type for."""
    types = mapped()
    found = []
    for path, value in leaves(content, types):
        if path not in types:
            found.append(f"{path} is not mapped")
        elif not FITS[types[path]](value):
            found.append(f"{path} is {value!r}, which is no {types[path]}")
    return found


# === what the README says of the access log ===


def documented():
    """The fields of the table in the README's chapter on the access log."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    chapter = readme.split("\n## Access log\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", chapter, re.MULTILINE)
    return [field for row in rows for field in re.findall(r"`(\w+)`", row)]


def destinations(pipeline):
    """Where each field of a line ends up, by its name: all places."""
    found = {}
    removed = set()
    for processor in pipeline["processors"]:
        [(kind, options)] = processor.items()
        source = options.get("field", "")
        if kind == "script":
            [source] = re.findall(r"ctx\.(serin\.\w+) \*", options["source"])
            targets = re.findall(r"ctx\.([\w.]+) =", options["source"])
        elif kind == "dissect":
            targets = re.findall(r"%\{([^}]*)\}", options["pattern"])
        elif kind == "user_agent":
            targets = ["user_agent.original"]
        else:
            targets = [options["target_field"]] if "target_field" in options else []
        if not source.startswith("serin."):
            continue
        name = source.removeprefix("serin.")
        if kind in ("remove", "rename"):
            removed.add(name)
        if targets:
            found.setdefault(name, []).append(targets)
    for name in documented():
        if name not in removed:
            found.setdefault(name, []).append([f"serin.{name}"])
    return found


def test_the_table_of_the_readme_is_read():
    assert len(documented()) == len(set(documented())) >= 25
    assert {"ts", "span_id", "shielded_by", "bytes_out", "error"} <= set(documented())


def test_every_documented_field_has_one_place_in_the_mapping():
    found = destinations(body("ingest-pipeline.json"))
    assert set(found) == set(documented())
    for name, places in found.items():
        assert len(places) == 1, f"{name} goes to {places}"
        for target in places[0]:
            assert target in mapped(), f"{name} goes to {target}, which is not mapped"
    # Nothing is mapped under serin that no line has.
    ours = {path.removeprefix("serin.") for path in mapped() if path.startswith("serin.")}
    assert ours <= set(documented())


def test_a_field_that_is_forgotten_is_caught():
    pipeline = body("ingest-pipeline.json")
    pipeline["processors"] = [one for one in pipeline["processors"] if "bytes_out" not in json.dumps(one)]
    [[target]] = destinations(pipeline)["bytes_out"]
    assert target not in mapped()


# === real lines ===


@pytest.fixture(scope="module")
def lines(program, tmp_path_factory):  # noqa: F811
    """Lines that a real Serin wrote: of a plain request, of all that goes wrong, of TLS and of a trace."""
    from running import Serin, upstream

    directory = tmp_path_factory.mktemp("logging")
    for name in ("shop.crt", "shop.key"):
        shutil.copy(REPOSITORY / "config" / "keys" / name, directory)
    services = {name: upstream.Service(("127.0.0.1", 0), name) for name in ("stable", "canary")}
    for service in services.values():
        serve(service)
    services["canary"].error_percent = 100
    config = CONFIG.format(weights=(1, 0), **addresses(services))
    config = config.replace(
        "listeners: [ ",
        'listeners: [ { name: tls, address: "127.0.0.1:0", tls: { certificates: '
        "[ { certificateFile: shop.crt, keyFile: shop.key } ] } }, ",
    )
    config = config.replace(
        "gray: { ",
        "gray: { rules: [ { name: qa, header: { name: x-qa, value: '1' }, backend: shop-canary } ], ",
    )
    config += "    matches: [ { path: { value: / } } ]\n"
    config += "  - { name: lost, matches: [ { path: { value: /lost } } ], backendRefs: [ { name: gone } ] }\n"
    config = config.replace("routes:", '  - { name: gone, endpoints: ["127.0.0.1:1"] }\nroutes:')
    config += 'accessLog: { output: access.log }\ntracing: { endpoint: "http://127.0.0.1:1" }\n'
    serin = Serin(program, directory, config)
    try:
        yield written(serin, directory / "access.log")
    finally:
        serin.stop()
        for service in services.values():
            service.shutdown()
            service.server_close()


def written(serin, log):
    """Sends requests, and returns their lines."""
    listening = {}
    for line in serin.output.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)["fields"]
        if fields["message"] == "listening":
            listening[fields["listener"]] = fields["address"]
    web = listening["web"]
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "user-agent": "curl/8"}
    ask(f"http://{web}/cart?secret=1", headers={**trace, "x-user-id": "ann", "host": "Shop.example.com:80"})
    ask(f"http://{web}/form", "POST", b"hello", headers={"host": "[::1]:8080"})
    ask(f"http://{web}/qa", headers={"x-qa": "1"})
    ask(f"http://{web}/lost")
    send_raw(web, b"GET /a\\b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    send_raw(web, b"BREW /pot HTTP/1.0\r\nHost: x\r\n\r\n")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(listening["tls"], context=context, timeout=10)
    connection.request("GET", "/secure")
    connection.getresponse().read()
    connection.close()
    eventually("seven lines", lambda: log.exists() and len(log.read_text(encoding="utf-8").splitlines()) >= 7)
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def send_raw(address, request):
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        while connection.recv(4096):
            pass


def shipped(line):
    """What Filebeat sends of a line, as far as it concerns the pipeline and the mapping."""
    return {
        "@timestamp": "2026-11-23T08:33:58.000Z",
        "serin": line,
        "data_stream": {"type": "logs", "dataset": "serin.access", "namespace": "default"},
    }


def through(line):
    return play(body("ingest-pipeline.json"), shipped(line))


def of(lines, path):
    """What has become of the line of one path."""
    [line] = [line for line in lines if line.get("path") == path]
    return Document(through(line))


def test_real_lines_have_documented_fields_only(lines):
    for line in lines:
        assert set(line) <= set(documented()), line


def test_every_real_line_fits_the_mapping(lines):
    assert len(lines) >= 7
    for line in lines:
        out = through(line)
        assert misfits(out) == [], line
        assert out["event"]["kind"] == "event", out
        assert out["@timestamp"] == line["ts"]


def test_a_line_with_every_field_fits_the_mapping():
    example = {name: "word" for name in documented()}
    example |= {"ts": "2026-11-23T08:33:57.123Z", "client_ip": "2001:db8::1", "protocol": "HTTP/2"}
    example |= {"tls_version": "TLSv1.3", "host": "[::1]", "status": 499, "attempts": 2, "grpc_status": 14}
    example |= {"upstream_ms": 1.5, "duration_ms": 2.25, "bytes_in": 2**40, "bytes_out": 0}
    assert misfits(through(example)) == []


def test_a_plain_request_is_found_under_the_fields_of_the_common_schema(lines):
    out = of(lines, "/cart")
    [line] = [line for line in lines if line.get("path") == "/cart"]
    expected = {
        "http.request.method": "GET",
        "http.version": "1.1",
        "network.protocol": "http",
        "http.response.status_code": 200,
        "url.domain": "Shop.example.com",
        "url.path": "/cart",
        "client.ip": "127.0.0.1",
        "trace.id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "user_agent.original": "curl/8",
        "user.id": line["user"],
        "span.id": line["span_id"],
        "event.outcome": "success",
        "serin.route": "shop",
        "serin.backend": "shop-stable",
        "serin.version": "1.8.2",
        "serin.reason": "sticky",
        "serin.endpoint": line["endpoint"],
        "serin.attempts": 1,
    }
    assert {path: out.get(path) for path in expected} == expected
    assert out.get("event.duration") == round(line["duration_ms"] * 1e6)
    assert "secret" not in json.dumps(out.content)


def test_what_goes_wrong_is_a_failure_with_its_word(lines):
    shielded, lost, refused = (of(lines, path) for path in ("/qa", "/lost", "/a\\b"))
    assert shielded.get("serin.shielded_by") == "shop-stable" and shielded.get("serin.rule") == "qa"
    assert lost.get("event.outcome") == "failure" and lost.get("error.type") == "connection_refused"
    assert lost.get("http.response.status_code") == 502
    assert refused.get("http.response.status_code") == 400 and refused.get("event.outcome") == "success"


def test_tls_ports_and_bodies_are_found(lines):
    assert of(lines, "/secure").get("tls.version") == "1.3"
    assert of(lines, "/secure").get("tls.version_protocol") == "tls"
    assert of(lines, "/cart").get("tls") is None
    form = of(lines, "/form")
    assert form.get("url.domain") == "[::1]"
    assert form.get("http.request.body.bytes") == 5
    assert of(lines, "/pot").get("http.version") == "1.0"


def test_what_is_no_line_of_the_access_log_is_kept_and_says_why():
    pipeline = body("ingest-pipeline.json")
    out = play(pipeline, {"@timestamp": "2026-11-23T08:33:58.000Z", "message": "not json"})
    assert out["event"]["kind"] == "pipeline_error" and out["message"] == "not json"
    assert "serin.ts" in out["error"]["message"][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"attempts": "1"}, "serin.attempts is '1'"),
        ({"client_ip": "localhost"}, "localhost"),
        ({"colour": "blue"}, "serin.colour is not mapped"),
    ],
)
def test_a_line_that_does_not_fit_is_caught(lines, change, why):
    try:
        found = misfits(through({**lines[0], **change}))
    except ValueError as error:
        found = [str(error)]
    assert any(why in misfit for misfit in found)


# === the bodies, by the types of Elasticsearch's API ===


def complaints(tools, tmp_path, name, content):
    """What TypeScript has against a body."""
    kind = BODIES[name]
    names = {"IndicesPutIndexTemplateRequest": "name", "IlmPutLifecycleRequest": "name"}
    content = {names.get(kind, "id"): "serin-access", **content}
    source = f'import type {{ {kind} }} from "@elastic/elasticsearch/lib/api/types";\n'
    source += f"const body: {kind} = {json.dumps(content)};\nexport default body;\n"
    directory = TOOLS / "npm" / f"bodies-{os.getpid()}-{tmp_path.name}"
    directory.mkdir()
    try:
        (directory / "body.ts").write_text(source, encoding="utf-8")
        options = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--typeRoots", "none"]
        options += ["--module", "nodenext", "--moduleResolution", "nodenext"]
        done = tools.run("tsc", *options, directory / "body.ts")
        return done.stdout
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", BODIES)
def test_every_body_has_the_type_that_elasticsearch_takes(tools, tmp_path, name):
    assert complaints(tools, tmp_path, name, body(name)) == ""


@pytest.mark.parametrize(
    ("name", "sound", "broken", "why"),
    [
        ("ingest-pipeline.json", '"target_field": "trace.id"', '"targetfield": "trace.id"', "targetfield"),
        ("ingest-pipeline.json", '{ "remove": {', '{ "delete": {', "delete"),
        ("index-template.json", '"type": "geo_point"', '"type": "geopoint"', "geopoint"),
        ("index-template.json", '"index_patterns"', '"index_pattern"', "index_pattern"),
        ("ilm-policy.json", '"max_num_segments": 1', '"max_segments": 1', "max_segments"),
    ],
)
def test_a_broken_body_is_caught(tools, tmp_path, name, sound, broken, why):
    text = (ELASTICSEARCH / name).read_text(encoding="utf-8")
    assert sound in text
    assert why in complaints(tools, tmp_path, name, json.loads(text.replace(sound, broken, 1)))


def test_the_template_names_the_policy_and_the_pipeline_that_are_installed():
    settings = body("index-template.json")["template"]["settings"]["index"]
    text = (ELASTICSEARCH / "install").read_text(encoding="utf-8")
    assert f"/_ilm/policy/{settings['lifecycle']['name']} ilm-policy.json" in text
    assert f"/_ingest/pipeline/{settings['default_pipeline']} ingest-pipeline.json" in text
    # Above the templates for logs-*-* that Elasticsearch brings, which have 100.
    assert body("index-template.json")["priority"] > 100


# === Filebeat ===


def beat(name):
    return yaml.safe_load((LOGGING / name).read_text(encoding="utf-8"))


def troubles(config):
    """What would make Filebeat lose lines, send them twice, or send them where they do not fit."""
    ids = [entry.get("id") for entry in config["filebeat.inputs"]]
    if None in ids or len(set(ids)) != len(ids):
        yield "an input has no id of its own"
    for entry in config["filebeat.inputs"]:
        yield from troubles_of(entry)
    index = re.sub(r"\$\{\w+:(\w+)\}", r"\1", config["output.elasticsearch"]["index"])
    if not any(fnmatch.fnmatch(index, pattern) for pattern in body("index-template.json")["index_patterns"]):
        yield f"no template is for {index}"
        return
    kind, dataset, namespace = index.split("-")
    for entry in config["filebeat.inputs"]:
        fields = [add["add_fields"]["fields"] for add in entry["processors"] if "add_fields" in add]
        named = {**fields[0], "namespace": re.sub(r"\$\{\w+:(\w+)\}", r"\1", fields[0]["namespace"])}
        if named != {"type": kind, "dataset": dataset, "namespace": namespace}:
            yield f"the data stream is said to be {named}"
    for setup in ("setup.template.enabled", "setup.ilm.enabled"):
        if config.get(setup) is not False:
            yield f"{setup} would replace what is there"


def troubles_of(entry):
    if entry["type"] != "filestream":
        yield f"{entry['type']} is an input of the past"
    parsers = [name for parser in entry["parsers"] for name in parser]
    ndjson = next((parser["ndjson"] for parser in entry["parsers"] if "ndjson" in parser), {})
    if ndjson.get("target") != "serin":
        yield "fields of lines would meet those of Filebeat"
    if not ndjson.get("add_error_key"):
        yield "lines that are no JSON would go without a word"
    if parsers[-1] != "ndjson":
        yield "JSON is read before what is around it is taken away"
    if "file_identity.fingerprint" not in entry:
        yield "a renamed file may be read twice"
    if entry.get("close.on_state_change.removed") is not False:
        yield "the end of a deleted file may be lost"


@pytest.mark.parametrize("name", BEATS)
def test_filebeat_ships_lines_once_to_the_data_stream(name):
    assert list(troubles(beat(name))) == []


@pytest.mark.parametrize("name", BEATS)
@pytest.mark.parametrize(
    ("sound", "broken", "why"),
    [
        ("    id: serin-access\n", "", "no id"),
        ("type: filestream", "type: container", "input of the past"),
        ("target: serin\n", 'target: ""\n', "would meet those of Filebeat"),
        ("index: logs-serin.access", "index: serin.access", "no template is for"),
        (
            "dataset: serin.access\n            namespace",
            "dataset: serin\n            namespace",
            "is said to be",
        ),
        ("setup.template.enabled: false", "setup.template.enabled: true", "would replace"),
        ("file_identity.fingerprint: ~", "file_identity.path: ~", "may be read twice"),
    ],
)
def test_a_careless_filebeat_is_caught(name, sound, broken, why):
    text = (LOGGING / name).read_text(encoding="utf-8")
    assert sound in text
    found = list(troubles(yaml.safe_load(text.replace(sound, broken, 1))))
    assert any(why in trouble for trouble in found), found


def test_filebeat_reads_what_serin_writes():
    reference = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [pattern] = beat("filebeat.yaml")["filebeat.inputs"][0]["paths"]
    assert "output: /var/log/serin/access.log" in reference
    [excluded] = beat("filebeat.yaml")["filebeat.inputs"][0]["prospector.scanner"]["exclude_files"]
    for name, is_read in {"access.log": True, "access.log.1": True, "access.log.2.gz": False}.items():
        path = f"/var/log/serin/{name}"
        assert (fnmatch.fnmatch(path, pattern) and not re.search(excluded, path)) == is_read
    [pattern] = beat("filebeat-kubernetes.yaml")["filebeat.inputs"][0]["paths"]
    # POD_NAMESPACE_CONTAINER-ID
    for name in ("serin-5d8f-x2_serin-dev_serin-0123", "x_serin_serin-0123"):
        assert fnmatch.fnmatch(f"/var/log/containers/{name}.log", pattern)
    for name in ("serin-5d8f-x2_serin-dev_filebeat-0123", "serin-1_shop_shop-0123"):
        assert not fnmatch.fnmatch(f"/var/log/containers/{name}.log", pattern)
    deployment = (DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text(encoding="utf-8")
    assert "- name: serin\n          image:" in deployment


# === install ===


class Elasticsearch(http.server.BaseHTTPRequestHandler):
    """Takes bodies, and remembers them."""

    def do_PUT(self):
        content = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.puts.append((self.path, content, dict(self.headers)))
        answer = json.dumps({"acknowledged": True} if self.server.status == 200 else {"error": "no"}).encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def elasticsearch():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elasticsearch)
    server.puts, server.status = [], 200
    server.url = f"http://{serve(server)}"
    yield server
    server.shutdown()
    server.server_close()


def install(*arguments):
    done = subprocess.run([ELASTICSEARCH / "install", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_installing_puts_what_the_template_names_before_it(elasticsearch, tmp_path):
    (tmp_path / "key").write_text("c2VjcmV0\n", encoding="utf-8")
    for _ in range(2):
        assert install("--url", elasticsearch.url, "--api-key-file", tmp_path / "key")[0] == 0
    paths = ["/_ilm/policy/serin-access", "/_ingest/pipeline/serin-access", "/_index_template/serin-access"]
    assert [path for path, _, _ in elasticsearch.puts] == paths * 2
    files = ["ilm-policy.json", "ingest-pipeline.json", "index-template.json"]
    assert [content for _, content, _ in elasticsearch.puts] == [body(name) for name in files] * 2
    for _, _, headers in elasticsearch.puts:
        assert headers["Authorization"] == "ApiKey c2VjcmV0" and headers["Content-Type"] == "application/json"


def test_installing_stops_where_elasticsearch_says_no(elasticsearch):
    elasticsearch.status = 403
    code, output = install("--url", elasticsearch.url)
    assert code == 1 and "ilm-policy.json: HTTP 403" in output
    assert len(elasticsearch.puts) == 1
    assert install("--url", "http://127.0.0.1:1")[0] == 1


def test_a_dry_run_installs_nothing(elasticsearch):
    code, output = install("--url", elasticsearch.url, "--dry-run")
    assert code == 0 and output.count("would put") == 3 and elasticsearch.puts == []


def test_the_script_is_clean_for_shellcheck_and_has_a_manual(tools):
    tools.passes("shellcheck", ELASTICSEARCH / "install")
    code, manual = install("--help")
    assert code == 0 and all(
        option in manual for option in ("--url", "--api-key-file", "--cacert", "--dry-run")
    )
    assert install("--nonsense", "x")[0] == 2
