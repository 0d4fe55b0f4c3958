"""Every page of the repository, and none of what was built or installed in its folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = {"out", "build", "dist"}


def pages() -> list[Path]:
    """Those of its root, of its folders, and the forms of .github."""
    found = (*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("[!.]*/**/*.md"))
    return sorted(path for path in found if path.relative_to(ROOT).parts[0] not in BUILT)
