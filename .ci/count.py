# Copyright © 2026 MLX Contributors

"""Count the tests in unittest's output: ``N passed, N failed, N skipped``."""

import re
import sys
from pathlib import Path


def count(log: str) -> tuple[int, int, int]:
    """Return passed, failed and skipped; no summary at all is one failure."""
    ran = re.findall(r"^Ran (\d+) tests? in ", log, re.M)
    if not ran:
        return 0, 1, 0
    skipped = re.findall(r"^(?:OK|FAILED) \(.*?skipped=(\d+)", log, re.M)
    # Subtests repeat their test's name, and a fixture is no test that ran.
    heading = r"^(?:FAIL|ERROR|UNEXPECTED SUCCESS): (\S+ \([^)]*\))"
    failed = set(re.findall(heading, log, re.M))
    fixtures = {f for f in failed if re.match(r"(setUp|tearDown)(Class|Module) ", f)}
    skips = int(skipped[-1]) if skipped else 0
    passed = int(ran[-1]) - len(failed - fixtures) - skips
    return max(passed, 0), len(failed), skips


if __name__ == "__main__":
    passed, failed, skipped = count(Path(sys.argv[1]).read_text())
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or passed == 0)
