# Copyright © 2026 MLX Contributors

"""The page on which a person judges answers, and the small server behind it.

It is for this machine alone unless a host is named. Whoever asks must know the random
part of the address, and come from the page itself.
"""

import errno
import getpass
import ipaddress
import json
import os
import platform
import re
import secrets
import shlex
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..errors import InputError
from ..terminal import resuming, rprint, visible
from .labels import HUMAN
from .page import page_token, read_page
from .round_log import STATE
from .voting import Refused, Voting, read_review

HOST, PORT = "127.0.0.1", 8421
# Bytes of a request, and connections at once.
MOST_BYTES, MOST_CONNECTIONS = 2 * 10**6, 64
LONGEST_NAME = 60


class PageServer(ThreadingHTTPServer):
    """Serves the page of one person's votes."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"

    def __init__(
        self,
        voting: Voting,
        host: str,
        port: int,
        commands: dict[str, str],
        make_pairs: Callable[[], Mapping[str, int]],
    ):
        self.voting, self.commands, self.make_pairs = voting, commands, make_pairs
        self.finishing = threading.Lock()
        self.made: dict[int, dict[str, int]] = {}
        self.title = voting.folder.resolve().name
        self.token = page_token(voting.folder, voting.judge)
        self.page, self.policy = read_page()
        self.given_host = host
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as e:
            raise InputError(_unusable(host, port, e)) from e

    def server_bind(self) -> None:
        """Bind, without asking the network for the host's name."""
        # HTTPServer's look-up can take seconds.
        TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def hosts(self, arrived: str) -> set[str]:
        """The names by which a browser may call this server, at an address of it."""
        names = {self.given_host.lower(), arrived}
        with suppress(ValueError):
            if ipaddress.ip_address(arrived).is_loopback:
                names.add("localhost")
            else:
                node = platform.node().lower()
                names |= {node, f"{node}.local", node.removesuffix(".local")}
        return names - {""}

    def address(self) -> str:
        """The page's address, as somebody in the same network writes it."""
        host = self.given_host
        if host in ("", "0.0.0.0", "::"):
            host = _own_address() or "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_port}/{self.token}/"


def _unusable(host, port, error):
    if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
        what = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed"
        return (
            f"Port {port} {what}: name another one with --port, or end what uses it "
            "(perhaps the same command in another terminal)."
        )
    reason = getattr(error, "strerror", None) or error
    return f"Can't listen at {host}:{port}: {reason}. See --host and --port."


def _own_address():
    """This machine's address in its network; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("10.255.255.255", 1))
        return probe.getsockname()[0]
    return None


class Handler(BaseHTTPRequestHandler):
    """Answers the page's requests, and those of nobody else."""

    protocol_version = "HTTP/1.1"
    server: PageServer
    timeout = 30
    # One packet for head and body: two would wait for each other.
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal stays as it is."""

    def version_string(self) -> str:
        """Say nothing of the server."""
        return "mlx_lm"

    def do_GET(self) -> None:
        """The page, and what it asks for."""
        self._answer("GET")

    def do_POST(self) -> None:
        """A vote, or one taken back."""
        self._answer("POST")

    def _answer(self, method):
        try:
            path = self._check()
            body = self._body() if method == "POST" else {}
            if (method, path) == ("GET", ""):
                return self._send(200, self.server.page, "text/html; charset=utf-8")
            known = {
                ("GET", "state"): self._state,
                ("GET", "pulse"): lambda _: {"version": self.server.voting.version()},
                ("POST", "vote"): self.server.voting.vote,
                ("POST", "undo"): self.server.voting.undo,
                ("POST", "again"): lambda _: self.server.voting.again(),
                ("POST", "finish"): self._finish,
            }
            if (method, path) not in known:
                raise Refused(404, "There is nothing here.")
            content, status = known[method, path](body), 200
        except Refused as e:
            content, status = {"error": str(e)}, e.status
            if status == HTTPStatus.CONFLICT:
                content |= self._state({})
        except InputError as e:
            content, status = {"error": str(e)}, 507
        if "total" in content:
            content |= {"title": self.server.title, "commands": self.server.commands}
        if status in (403, 411, 413):
            # What the request still holds is not read.
            self.close_connection = True
        self._send(status, json.dumps(content).encode(), "application/json")

    def _check(self):
        """Refuse what the page did not ask for; return the path behind the token."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        name, _, port = host.rpartition(":")
        arrived = self.connection.getsockname()[0]
        if (
            len(self.headers.get_all("Host", ())) != 1
            or name.strip("[]").lower() not in self.server.hosts(arrived)
            or port != str(self.server.server_port)
        ):
            raise Refused(403, "This server does not answer to that host.")
        try:
            parts = urlsplit(self.path)
        except ValueError:
            raise Refused(403, "That is no address.") from None
        token, _, path = parts.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "The address is not the one that the command printed.")
        # A link from elsewhere may open the page, and do nothing else.
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        is_page = path == "" and self.command == "GET"
        if origin not in (None, f"http://{host}") or not (
            is_page or site in ("same-origin", "none")
        ):
            raise Refused(403, "Another site asked for this.")
        return path if "/" in parts.path.removeprefix("/") else "?"

    def _body(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length, re.ASCII):
            raise Refused(411, "How long is the request?")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"A request has at most {MOST_BYTES:,} bytes.")
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Requests are JSON.")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused(400, "That is no JSON object.")
        return body

    def _state(self, _):
        asked = parse_qs(urlsplit(self.path).query)
        key = None
        with suppress(KeyError, ValueError):
            key = int(asked["round"][0]), asked["id"][0]
        return self.server.voting.state(key)

    def _finish(self, _):
        """Make pairs of the labels, once for each state of them."""
        server = self.server
        with server.finishing:
            version = server.voting.version()
            if version not in server.made:
                server.made = {version: dict(server.make_pairs())}
            return {"made": server.made[version]}

    def _send(self, status, content, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def label_by_hand(
    folder: str | Path,
    name: str = "",
    *,
    host: str = HOST,
    port: int = PORT,
    review: str | None = None,
    model: str | None = None,
    browse: bool = True,
    go_on: str = "",
    train: str = "",
    make_pairs: Callable[[], Mapping[str, int]],
) -> None:
    """Let a person judge a folder's answers until Ctrl-C, then make pairs of them.
    ``go_on`` and ``train`` are what the commands for these have besides."""
    name = name or user_name()
    if name != visible(name.strip(), "") or len(name) > LONGEST_NAME:
        raise InputError(
            f"{name!r} is no name for a judge: use at most {LONGEST_NAME} plain "
            "characters, such as --label human:anna."
        )
    keys, mark, again = None, "", ""
    if review is not None:
        keys, mark = read_review(review, folder, HUMAN + name)
        again = f" --review {shlex.quote(review)}"
    voting = Voting(folder, name, keys, mark)
    place, rounds = shlex.quote(str(folder)), Path(folder).resolve().parent
    own = f"--model {shlex.quote(model or 'MODEL')} --data {place} --train --epochs 1"
    # Labels of rounds are for these to go on.
    if (rounds / STATE).exists():
        own, train = resuming(rounds), ""
    judge = f"--label human:{shlex.quote(name)}{again}"
    commands = {
        "go_on": f"mlx_lm.dpo_collect {judge} --output {place}{go_on}",
        "train": f"mlx_lm.dpo {own}{train}",
    }
    with PageServer(voting, host, port, commands, make_pairs) as server:
        serve(server, browse)
    rprint(summary(voting, commands))
    # The page may have made them when the last vote was there.
    if voting.version() not in server.made:
        make_pairs()


def user_name() -> str:
    """The name under which votes are stored, unless one is given."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "me"


def serve(server: PageServer, browse: bool = True) -> None:
    """Print the address and serve the page until Ctrl-C."""
    voting, address = server.voting, server.address()
    left, total = len(voting.questions) - voting.done, len(voting.questions)
    rprint(f"{left:,} of {total:,} to judge as {voting.judge.removeprefix(HUMAN)}:")
    rprint(f"  {address}")
    if server.given_host not in (HOST, "localhost", "::1"):
        rprint(
            "[WARNING] Whoever has this address in your network can vote, and read "
            "along: it is not encrypted."
        )
    rprint("Every vote is on the disk at once. Ctrl-C ends.")
    if browse and _has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with _until_stopped():
        server.serve_forever(poll_interval=0.1)
    # A vote that is being written is written.
    with voting.finished():
        pass


def _has_screen():
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextmanager
def _until_stopped() -> Iterator[None]:
    """End without a traceback on Ctrl-C, and on the signal that asks for an end."""
    is_main = threading.current_thread() is threading.main_thread()

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def summary(voting: Voting, commands: dict[str, str]) -> str:
    """What was judged, and the command that goes on."""
    names = {"ranking": "preferred", "tie": "tied", "bad": "all bad", "none": "skipped"}
    counts = voting.counts()
    parts = [f"{counts[k]:,} {name}" for k, name in names.items() if counts[k]]
    total = len(voting.questions)
    text = f"\nJudged {voting.done:,} of {total:,}"
    text += f" ({', '.join(parts)})." if parts else "."
    if voting.done < total:
        return f"{text} Go on with\n  {commands['go_on']}"
    return f"{text} Train with\n  {commands['train']}"
