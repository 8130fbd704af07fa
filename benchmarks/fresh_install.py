# Copyright © 2026 MLX Contributors

"""Fresh environments, archives and README tables for the checks of this tree."""

import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "benchmarks" / "README.md"
EXTRAS = "[cpu,train,test]" if sys.platform == "linux" else "[train,test]"


def extract(
    archive: tarfile.TarFile,
    target: Path,
    members: Iterable[tarfile.TarInfo] | None = None,
) -> None:
    """Unpack an archive, and nothing beside the folder where Python can tell."""
    # Debian 12 has a Python 3.11 from before there were filters.
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    archive.extractall(target, members)


def make_environment(folder: Path, install: str, **variables: str) -> str:
    """
    Create an environment, install into it and return its interpreter.

    Args:
        folder (Path): The environment; one that is there is installed into.
        install (str): What pip installs, with its extras.
        variables (str): Environment variables of the installation.

    Returns:
        str: The path of the interpreter.

    Raises:
        ValueError: If pip fails; the message is its first error.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", install]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables
    )
    if result.returncode:
        lines = [x for x in (result.stderr + result.stdout).splitlines() if x.strip()]
        errors = [x for x in lines if "needs" in x or "rror" in x or "upstream" in x]
        raise ValueError(f"pip install: {(errors or lines or ['failed'])[0].strip()}")
    return str(python)


def write_table(mark: str, text: str, path: Path = README) -> None:
    """
    Put a result between its marks in the README.

    Args:
        mark (str): The name in ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
        text (str): What to put there, in Markdown.
        path (Path): The document. Default: ``benchmarks/README.md``.

    Raises:
        ValueError: If the marks are not there once.
    """
    document = path.read_text("utf-8")
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"{path.name}: needs {begin.strip()} and its end once.")
    before, _, rest = document.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", "utf-8")
