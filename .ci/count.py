# Copyright © 2026 MLX Contributors

"""Count the tests in pytest's output: ``N passed, N failed, N skipped``."""

import re
import sys
from pathlib import Path


def count(log: str) -> tuple[int, int, int]:
    """Return passed, failed and skipped; no summary at all is one failure."""
    lines = re.findall(r"^(?:=+ )?(\d+ [a-z].*) in [\d.]+s\b", log, re.M)
    if not lines:
        return 0, 1, 0
    found = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)(?=,|$)", lines[-1])}
    failed = sum(found.get(what, 0) for what in ("failed", "error", "errors"))
    return found.get("passed", 0), failed, found.get("skipped", 0)


if __name__ == "__main__":
    passed, failed, skipped = count(Path(sys.argv[1]).read_text())
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or passed == 0)
