"""Entry point: `./dev COMMAND …`."""

import sys
from pathlib import Path

# Run as a file by ./dev: put the checkout on the path in place of this folder, so that packages import by name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from devtool.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
