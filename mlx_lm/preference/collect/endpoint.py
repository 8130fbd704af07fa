# Copyright © 2026 MLX Contributors

"""A judge behind an address: any server of OpenAI's chat completions, in both orders."""

import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError
from ..terminal import rprint
from .compare import compare
from .function import LONGEST, TooSlow, bounded
from .verdicts import Verdict

# The only place that a key is read from. No other variable is: what was meant for one
# company's server must not go to another's.
KEY = "MLX_LM_JUDGE_KEY"
MOST_BYTES, MOST_TOKENS = 10**6, 2048
# Seconds before another try, unless the server asks for more, and the most of these.
WAITS, LONGEST_WAIT = (1.0, 2.0, 4.0, 8.0), 60.0
# Prompts in a row without any reply: nothing is gained by asking on.
MOST_FAILED = 3
# Times that one question may take too long: many servers go on with what nobody awaits.
MOST_SLOW = 2
_ADDRESS = re.compile(
    r"(?P<url>https?://(?:\[[^\]]+\]|[^/:]+)(?::\d+)?(?:/[^:]*)?):(?P<model>.+)"
)
_ASK = "\nThink it over in a few sentences, then end with one line: Better: A, or Better: B."
_AGAIN = "Reply with one line and nothing else: Better: A, or Better: B."
_LINE = re.compile(r"better\W{0,12}(A|B|tie)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(?:(?:Reply|Answer)\W+)?([AB])\W*")
_SHARES = {"a": 1.0, "b": 0.0, "tie": 0.5}
UNREADABLE = "the reply named neither A nor B, twice"


class _Failed(Exception):
    """A request without a usable reply, and whether the server may answer another."""

    def __init__(self, reason: str, is_again: bool = True, wait: float = 0.0):
        super().__init__(reason)
        self.is_again, self.wait = is_again, wait


class _Slow(_Failed):
    """A request without a reply in the time that it has."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to no other address than the one it was given for."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """Ask a server which of two responses is better."""

    def __init__(self, address: str, longest: float = LONGEST):
        self.url, self.model = read_address(address)
        self._longest = longest
        self._key = os.environ.get(KEY, "").strip()
        is_near = _is_near(urlsplit(self.url).hostname or "")
        if self._key and self.url.startswith("http:") and not is_near:
            rprint(f"[WARNING] {KEY} goes to {self.url} unencrypted: use https.")
        handlers: list[Any] = [_NoRedirect()]
        if is_near:
            handlers.append(urllib.request.ProxyHandler({}))
        self._open = urllib.request.build_opener(*handlers).open
        self._failed, self._is_silent, self._is_known = 0, False, False
        self._said = ""
        self.sleep = time.sleep

    def __call__(self, prompt: Any, responses: list[str], row: dict) -> Verdict:
        """Compare all responses."""
        self._is_silent = False
        found = compare(prompt, responses, self._prefer)
        self._failed = self._failed + 1 if self._is_silent else 0
        if self._failed == MOST_FAILED:
            raise InputError(
                f"{self.url} failed {MOST_FAILED} times in a row: {found.why}. Labels "
                "so far are kept, and the same command goes on."
            )
        return found

    def _prefer(self, question: str) -> float | str:
        messages = [{"role": "user", "content": question + _ASK}]
        try:
            said = self._reply(messages)
            if (share := read_reply(said)) is None:
                more = {"role": "assistant", "content": said}, {
                    "role": "user",
                    "content": _AGAIN,
                }
                share = read_reply(self._reply([*messages, *more]))
        except _Failed as e:
            # A question that is refused, such as one too long, is no sign of an end.
            self._is_silent = e.is_again
            if not e.is_again and not self._is_known:
                self._check_short_one()
            return str(e)
        return UNREADABLE if share is None else share

    def _check_short_one(self):
        """What refuses a short question as well refuses all."""
        try:
            self._ask([{"role": "user", "content": _AGAIN}])
        except _Failed as e:
            if not e.is_again:
                raise InputError(f"{self.url} refuses every question: {e}.") from e

    def _reply(self, messages: list[dict[str, str]]) -> str:
        """What the server says, asked again where that may help."""
        slow = 0
        for wait in (*WAITS, None):
            try:
                return self._ask(messages)
            except _Failed as e:
                if wait is None or not e.is_again:
                    raise
                slow += isinstance(e, _Slow)
                if slow == MOST_SLOW:
                    raise
                if self._said != str(e):
                    self._said = str(e)
                    rprint(f"{self.url}: {e}. It is asked again.")
                self.sleep(min(max(wait, e.wait), LONGEST_WAIT))
        raise AssertionError

    def _ask(self, messages):
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": MOST_TOKENS,
            "stream": False,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, headers)
        try:
            # A socket's own limit is for each of its bytes.
            raw = bounded(self._fetch, (request,), self._longest)
        except TooSlow:
            reason = f"no reply in {self._longest:g} s, which judge_timeout allows"
            raise _Slow(reason) from None
        except urllib.error.HTTPError as e:
            raise self._refusal(e) from None
        except urllib.error.URLError as e:
            raise self._lost(e.reason) from None
        except (OSError, HTTPException, ValueError) as e:
            raise self._lost(e) from None
        self._is_known, self._said = True, ""
        return _content(raw)

    def _fetch(self, request):
        with self._open(request, timeout=self._longest) as reply:
            raw = reply.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise _Failed(f"a reply of more than {MOST_BYTES:,} bytes")
        return raw

    def _refusal(self, error):
        """What a status means: to be mended, to be tried again, or of this prompt."""
        code = error.code
        if code in (401, 403):
            hint = "refuses the key in" if self._key else "wants a key: set"
            raise InputError(f"{self.url} {hint} {KEY} (status {code}).")
        if 300 <= code < 400:
            where = _plain(error.headers.get("Location"))
            raise InputError(
                f"{self.url} leads to {where}, where nothing is sent: give the address "
                "itself."
            )
        if code in (404, 405):
            raise InputError(
                f"{self.url} has no chat completions (status {code}): give the "
                f"server's address, such as http://localhost:11434/v1, and a model that "
                f"it has, not {self.model!r}."
            )
        try:
            text = bounded(error.read, (1000,), 5.0).decode("utf-8", "replace")
        except (OSError, HTTPException, TooSlow):
            text = ""
        try:
            wait = float(error.headers.get("Retry-After") or 0)
        except ValueError:
            wait = 0.0
        reason = f"status {code} {self._hidden(_plain(text))}".rstrip()
        return _Failed(reason, code >= 500 or code in (408, 425, 429), wait)

    def _lost(self, reason):
        if isinstance(reason, ConnectionRefusedError):
            if not self._is_known:
                raise InputError(f"Nobody listens at {self.url}: start the server.")
            return _Failed("the server is gone")
        return _Failed(self._hidden(_plain(f"{type(reason).__name__}: {reason}")))

    def _hidden(self, text):
        return text.replace(self._key, "…") if self._key else text


def read_address(address: str) -> tuple[str, str]:
    """The address of the completions, and the model, of ``URL:MODEL``."""
    found = _ADDRESS.fullmatch(address)
    # A port and a path where the model should be.
    if not found or re.fullmatch(r"\d+(/.*)?", found["model"]):
        raise InputError(
            "An endpoint judge is endpoint:URL:MODEL, such as "
            f"endpoint:http://localhost:11434/v1:qwen3, got {address!r}."
        )
    url = found["url"].rstrip("/")
    try:
        parts = urlsplit(url)
    except ValueError as e:
        raise InputError(f"{url} is no address: {e}.") from e
    # A password before a host would read as a model.
    if parts.query or "@" in address:
        raise InputError(
            "An address is kept with each label, so it must hold no password or key: "
            f"set {KEY} instead."
        )
    if not url.endswith("/chat/completions"):
        url += "/chat/completions" if parts.path.strip("/") else "/v1/chat/completions"
    return url, found["model"]


def read_reply(text: str) -> float | None:
    """How much a reply prefers A: 1, 0, 0.5 for a tie; None if it says neither."""
    # Of a thought, only what follows it.
    text = text.rpartition("</think>")[2]
    found = _LINE.findall(text)
    if found:
        return _SHARES[found[-1].lower()]
    alone = _ALONE.fullmatch(text)
    return _SHARES[alone[1].lower()] if alone else None


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise _Failed("no chat completion in the reply") from e
    # A model that only thought says nothing.
    if content is not None and not isinstance(content, str):
        raise _Failed("no text in the reply")
    return content or ""


def _is_near(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _plain(text: Any) -> str:
    return " ".join(str(text).split())[:200]
