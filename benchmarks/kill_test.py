# Copyright © 2026 MLX Contributors

"""Kill runs at many random moments, go on with each, and compare every bit.

The moments are steps, validations, half-written checkpoints, cache files and lines
of metrics, renames and deletions; each run dies twice before it may end. A quarter
as many die at random times instead.

    python benchmarks/kill_test.py --moments 20 --seed 1
"""

import argparse
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_kill import TestKill  # noqa: E402


def main() -> None:
    """
    Run the tests with other numbers.

    Raises:
        SystemExit: With code 1 if a run was not the same.

    Example:
        >>> main.__name__
        'main'
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="Runs. Default: 20.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    TestKill.moments, TestKill.seed = args.moments, args.seed
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(TestKill)
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    for line in TestKill.died:
        print(line)
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
