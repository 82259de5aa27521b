"""A version of a service to try Serin with. It can be made slow, and made to fail.

VERSION         what it says it is (default 1.0.0)
PORT            where it listens (default 8080)
ERROR_PERCENT   how many requests in a hundred get 500 (default 0)
LATENCY_MS      how long each takes, in milliseconds (default 0)

/healthz is always well, so that what it does wrong is seen in requests alone.
"""

import json
import os
import random
import signal
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service(ThreadingHTTPServer):
    """Listens for requests, each connection in a thread of its own."""

    daemon_threads = True
    # More than the default of five connections come at once.
    request_queue_size = 128

    def __init__(self, address, version, error_percent=0.0, latency=0.0):
        super().__init__(address, Request)
        self.version = version
        self.error_percent = error_percent
        self.latency = latency


class Request(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"
    # Head and body are two writes: without this, the second may wait for the client's acknowledgement.
    disable_nagle_algorithm = True

    def answer(self):
        """Reads the request's body, and says who is here."""
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/healthz":
            self.send(200, {"status": "ok"})
            return
        time.sleep(self.server.latency)
        status = 500 if random.uniform(0, 100) < self.server.error_percent else 200
        said = {"version": self.server.version, "instance": socket.gethostname(), "path": self.path}
        self.send(status, said)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def send(self, status, said):
        """Sends a JSON object."""
        body = json.dumps(said).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Serin's access log says more."""


def stop(*_):
    """Ends the process: the first process of a container would ignore the signal."""
    raise SystemExit


def main():
    """Serves until it is told to end."""
    signal.signal(signal.SIGTERM, stop)
    environment = os.environ
    service = Service(
        ("0.0.0.0", int(environment.get("PORT", "8080"))),
        environment.get("VERSION", "1.0.0"),
        float(environment.get("ERROR_PERCENT", "0")),
        float(environment.get("LATENCY_MS", "0")) / 1000,
    )
    print(f"{service.version} listens on port {service.server_port}", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
