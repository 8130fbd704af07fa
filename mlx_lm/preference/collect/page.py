# Copyright © 2026 MLX Contributors

"""The page itself, what a browser may do with it, and the secret part of its address."""

import base64
import hashlib
import hmac
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from ..files import user_cache_folder

PAGE = Path(__file__).with_name("page.html")


def page_token(folder: str | Path, name: str) -> str:
    """The random part of an address: the same when the command starts again."""
    path = user_cache_folder("collect") / "page-key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
        key = path.read_bytes()
    except OSError:
        key = b""
    if len(key) != 32:
        key = secrets.token_bytes(32)
    text = f"{os.path.realpath(folder)}\n{name}".encode("utf-8", "surrogateescape")
    digest = hmac.digest(key, text, "sha256")
    return base64.urlsafe_b64encode(digest[:18]).decode()


def read_page() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run nothing but what is in it."""
    text = PAGE.read_text("utf-8")

    def sources(tag: str) -> str:
        inner = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inner
        digest = hashlib.sha256(inner[1].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = (
        f"default-src 'none'; script-src {sources('script')}; "
        f"style-src {sources('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text.encode(), policy
