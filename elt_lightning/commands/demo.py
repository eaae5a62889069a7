"""`elt demo`: a page in the browser on this machine, whose picture follows a slider over the loops."""

import argparse
import json
import os
import select
import socket
import sys
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from elt_lightning.commands.arguments import Parser, whole
from elt_lightning.commands.demo_answers import Answers
from elt_lightning.commands.drawing_arguments import add_model_arguments
from elt_lightning.errors import UserError

PAGE = Path(__file__).with_name("demo.html")
HOST, PORT = "127.0.0.1", 7860


def run(name: str, arguments: list[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the command line or the model is wrong, or the port is not free.
    """
    options = build_parser().parse_args(arguments)
    with server(options) as serving:
        url = f"http://{HOST}:{serving.server_port}"
        print(f"{url} shows the page, on this machine alone; Ctrl-C ends it", flush=True)
        if not options.no_browser and has_screen():
            webbrowser.open(url)
        serving.serve_forever()


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = Parser(prog="elt demo", description=__doc__, allow_abbrev=False)
    add_model_arguments(parser, required=False)
    port = f"of the page (default {PORT}); 0 takes any that is free"
    parser.add_argument("--port", type=whole(0, 65535), default=PORT, help=port)
    parser.add_argument("--no_browser", action="store_true", help="open no browser")
    return parser


def server(options: argparse.Namespace) -> ThreadingHTTPServer:
    """Load the first model, take the port, and return what serves the page (UserError: as :func:`run`)."""
    handler = partial(Handler, Answers(options))
    try:
        return ThreadingHTTPServer((HOST, options.port), handler)
    except OSError as error:
        advice = "choose another, or --port 0 for any that is free"
        raise UserError(f"--port {options.port}: {error.strerror}: {advice}") from error


def has_screen() -> bool:
    """Return whether a browser has somewhere to open; in a bare terminal a text browser would take it over."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class Handler(BaseHTTPRequestHandler):
    """Answers the page itself, and in JSON what it asks for.

    What is refused is an answer too, ``{"error": line}``: browsers would report another status as an error of the page.
    """

    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer
    alone = ThreadPoolExecutor(1)  # one after the other, or they would slow each other and the milliseconds be wrong

    def __init__(self, answers: Answers, *connection: Any) -> None:
        self.answers = answers
        super().__init__(*connection)

    def handle(self) -> None:
        """Answer requests until the browser has gone, which misses nothing."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer one request."""
        path, _, query = self.path.partition("?")
        if path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path[1:] in Answers.KINDS:
            found = self.alone.submit(self.answers.answer, path[1:], query, self.check_awaited).result()
            self.answer(200, "application/json", json.dumps(found).encode())
        else:
            self.answer(404, "text/plain; charset=utf-8", b"there is no such page\n")

    def check_awaited(self) -> None:
        """End a picture that nobody waits for (ConnectionError): its browser has left or wants another, or we end."""
        if self.server.fileno() < 0:
            raise ConnectionAbortedError("the server has been closed")
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the browser has closed the connection")

    def answer(self, status: int, kind: str, content: bytes) -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing: the terminal keeps the line that names the page."""
