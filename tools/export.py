"""Clean the notebooks, export the package from them and lay it out; run from the repository root."""

import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
PACKAGE = "loftr_curriculum"
STEPS = (
    ("nbdev-clean",),
    ("nbdev-export",),
    # relative imports sort otherwise than the absolute ones of the notebooks
    ("ruff", "check", "--quiet", "--select", "I", "--fix", PACKAGE),
    ("ruff", "format", "--quiet", PACKAGE),
)


def main() -> int:
    for program, *words in STEPS:
        status = subprocess.run([BIN / program, *words]).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
