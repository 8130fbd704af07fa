# Copyright © 2026 MLX Contributors

"""Run the hooks of .pre-commit-config.yaml on every file, changing none."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# What makes a formatter report instead of write.
REPORT = {
    "black": ["--check", "--diff"],
    "isort": ["--check-only", "--diff"],
    "clang-format": ["--dry-run", "-Werror"],
}


def main() -> None:
    """Install the hooks' own versions, then run each; fail if one does."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    versions = [v for hook in hooks for v in hook["additional_dependencies"]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *versions]
    subprocess.run(pip, check=True)

    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True)
    files = [f for f in found.stdout.decode().splitlines() if (ROOT / f).is_file()]
    failed = []
    for hook in hooks:
        command = [*shlex.split(hook["entry"]), *hook.get("args", [])]
        command += REPORT.get(hook["id"], [])
        command += [f for f in files if re.search(hook["files"], f)]
        program = Path(sys.executable).with_name(command[0])
        print(f"-- {hook['id']}", flush=True)
        if subprocess.run([program, *command[1:]], cwd=ROOT).returncode:
            failed.append(hook["id"])
    if failed:
        sys.exit(f"These hooks failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
