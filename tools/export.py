"""Clean the notebooks, export the package from them and lay it out; run from the repository root."""

import re
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
PACKAGE = "loftr_curriculum"
EXPORT = (("nbdev-clean",), ("nbdev-export",))
LAYOUT = (
    # relative imports sort otherwise than the absolute ones of the notebooks
    ("ruff", "check", "--quiet", "--select", "I", "--fix", PACKAGE),
    ("ruff", "format", "--quiet", PACKAGE),
)


OWN_IMPORT = re.compile(rf"^( *)from {PACKAGE}((?:\.\w+)*) import ", re.MULTILINE)


def relative_imports(text: str, room: tuple[str, ...]) -> str:
    """The text of a module with its imports from this package written relative to its room."""

    def rewrite(found: re.Match) -> str:
        target = found[2].split(".")[1:]
        shared = 0
        while shared < min(len(room), len(target)) and room[shared] == target[shared]:
            shared += 1
        dots = "." * (len(room) - shared + 1)
        return f"{found[1]}from {dots}{'.'.join(target[shared:])} import "

    return OWN_IMPORT.sub(rewrite, text)


def make_imports_relative() -> None:
    """What nbdev leaves: imports over several lines and inside functions."""
    for path in Path(PACKAGE).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        changed = relative_imports(text, path.parent.parts[1:])
        if changed != text:
            path.write_text(changed, encoding="utf-8")


def run(steps) -> int:
    """Exit status of the first step that fails, 0 where none does."""
    for program, *words in steps:
        status = subprocess.run([BIN / program, *words]).returncode
        if status:
            return status
    return 0


def main() -> int:
    status = run(EXPORT)
    if status:
        return status
    make_imports_relative()
    return run(LAYOUT)


if __name__ == "__main__":
    sys.exit(main())
