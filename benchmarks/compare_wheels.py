# Copyright © 2026 MLX Contributors

"""Build a wheel from the tree and one from its source archive, and compare.

Both must list the same files, and every file of upstream's wheel. Works on a
copy of the tree, in an environment of its own with the build requirements only.

    python benchmarks/compare_wheels.py
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from fresh_install import extract

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def copy_tree(target: Path) -> None:
    """Copy what git tracks, and what it would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def build(python: Path, kind: str, source: Path, out: Path) -> Path:
    """Build an ``sdist`` or a ``wheel`` of ``source`` and return its path."""
    out.mkdir(exist_ok=True)
    command = [str(python), "-c", BUILD.format(kind, str(out))]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"The {kind} of {source} failed:\n{result.stderr}")
    return out / result.stdout.splitlines()[-1]


def members(wheel: Path) -> set[str]:
    """List the files of a wheel, its metadata folder aside."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def main() -> None:
    """Compare the two wheels and upstream's installed files."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *requires["requires"]], check=True)
        tree = scratch / "tree"
        copy_tree(tree)

        source = build(python, "sdist", tree, scratch / "sdist")
        with tarfile.open(source) as archive:
            extract(archive, scratch / "unpacked")
            shipped = {name.partition("/")[2] for name in archive.getnames()}
        (unpacked,) = (scratch / "unpacked").iterdir()
        from_sdist = members(build(python, "wheel", unpacked, scratch / "one"))
        from_tree = members(build(python, "wheel", tree, scratch / "two"))

        (packages,) = (scratch / "venv" / "lib").glob("python*/site-packages")
        upstream = {
            path.relative_to(packages).as_posix()
            for path in (packages / "mlx_lm").rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        composed = (tree / "mlx_lm" / ".gitignore").read_text().splitlines()
        findings = {
            "only in the wheel from the tree": from_tree - from_sdist,
            "only in the wheel from the source archive": from_sdist - from_tree,
            "of upstream's files, missing": upstream - from_tree,
            "upstream's, in the source archive": shipped
            & {f"mlx_lm{line}" for line in composed if line.startswith("/")},
        }
    for what, names in findings.items():
        print(f"{len(names)} {what}", *sorted(names), sep="\n  ")
    print(f"{len(from_tree)} files in the wheel, {len(upstream)} of them upstream's")
    sys.exit(any(findings.values()))


if __name__ == "__main__":
    main()
