"""A scripted OpenAI-compatible endpoint: a real HTTP server on this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def says(text: str) -> Answer:
    """A well-formed answer with this text."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def fails(status: int, message: str = "no", **headers: str) -> Answer:
    """An HTTP error in the shape of OpenAI's."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class Server:
    """A scripted endpoint: each request gets the next answer, the last one for ever; requests are kept."""

    def __init__(self) -> None:
        self.script: list[Answer | Callable[[dict[str, Any]], Answer]] = [says("[]")]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.gone = threading.Event()  # set when the client has left before the answer
        self.packet = 1_000_000  # bytes sent at once
        self.pause_s = 0.0  # after each packet
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                status, headers, content = answer(body) if callable(answer) else answer
                self.close_connection = True
                if server.gone.is_set():
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for start in range(0, len(content), server.packet):
                        self.wfile.write(content[start : start + server.packet])
                        time.sleep(server.pause_s)
                except OSError:  # the client has left
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answers(self, *script: Answer | Callable[[dict[str, Any]], Answer]) -> None:
        self.script = list(script)

    def user(self, index: int = -1) -> str:
        """The instruction of one request."""
        return str(self.bodies[index]["messages"][-1]["content"])


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers as long as the context lasts."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
