"""A real MLflow server on this machine, and a proxy before it that is slow, refuses, or wants to know who asks."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.conftest import clean_environment, free_port


class Server:
    """``mlflow server`` with a SQLite file; started again on the same port it is the same server."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        assert self._process is None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers",
             "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
             "--artifacts-destination", str(self.folder / "artifacts")],
            env=clean_environment(MLFLOW_DISABLE_TELEMETRY="true"), cwd=self.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, "the MLflow server did not start"
                time.sleep(0.3)

    @property
    def is_running(self) -> bool:
        """Whether it has been started, and not killed."""
        return self._process is not None

    def kill(self) -> None:
        """Ends it and its workers, as a power cut would."""
        if self._process is None:
            return
        for line in subprocess.run(["ps", "-o", "pid=", "-s", str(self._process.pid)], capture_output=True,
                                   text=True, check=False).stdout.split():  # fmt: skip
            with suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)
        self._process.wait(30)
        self._process = None


@dataclass
class Proxy:
    """Passes requests on to a server, or not.

    Attributes:
        delay_s: How long each answer takes.
        refusals: Statuses to answer with in place of the server, in turn.
        authorization: The only header with which a request is passed on; others get 401.
        kills_at: The server dies when it has answered a request whose path ends so; once.
        answers: Path and status of each answer, and when it was given (Unix seconds).
    """

    server: Server
    delay_s: float = 0.0
    refusals: tuple[int, ...] = ()
    authorization: str | None = None
    kills_at: str | None = None
    answers: list[tuple[str, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                time.sleep(proxy.delay_s)
                status, kind, answer = proxy._answer(self.command, self.path, dict(self.headers), body)
                proxy.answers.append((self.path, status, time.time()))
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    pass  # the client has gone

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

            def log_message(self, *_: object) -> None:
                pass

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self.address = f"127.0.0.1:{self._listener.server_port}"
        self.uri = f"http://{self.address}"
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        if self.authorization and headers.get("Authorization") != self.authorization:
            return 401, "text/plain", f"not with {headers.get('Authorization')}".encode()  # a server may say so
        if self.refusals:
            return self.refusals[len(self.answers) % len(self.refusals)], "text/plain", b"no"
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in ("host", "authorization")}
            connection.request(method, path, body, kept)
            response = connection.getresponse()
            answer = response.status, response.headers.get("Content-Type", "application/json"), response.read()
            if self.kills_at and path.endswith(self.kills_at):
                self.kills_at = None
                self.server.kill()
            return answer
        except OSError:
            return 502, "text/plain", b"the server is gone"
        finally:
            connection.close()

    def close(self) -> None:
        """Stops listening."""
        self._listener.shutdown()
        self._listener.server_close()
