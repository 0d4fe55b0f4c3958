"""``python -m distpatch`` and the ``distpatch`` command: one process, or, started by torchrun, one of its ranks."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its libraries, say how to get them and exit with 2."""
    try:
        from distpatch.cli import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "launch"}:
            raise
        print(f"the distpatch command needs {error.name}: pip install 'distpatch[cli]'", file=sys.stderr)
        raise SystemExit(2) from error
    app()


if __name__ == "__main__":
    main()
