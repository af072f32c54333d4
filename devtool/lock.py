"""Maintenance: write the lock files from the requirements in pyproject.toml (`python3 -m devtool.lock`).

Run it with Debian's Python on x86-64: the hashes are those of the files that pip picks there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from devtool.project import ROOT

BUILD_REQUIREMENTS = ["setuptools"]


def resolve(python: Path, requirements: list[str]) -> str:
    """Resolve `requirements` with pip and return the text of a lock file."""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE).stdout)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    lines = [f"# Locked for Python {version} on x86-64 by devtool/lock.py; do not edit.\n"]
    for item in sorted(report["install"], key=lambda entry: str(entry["metadata"]["name"]).lower()):
        sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{sha256}\n")
    return "".join(lines)


def main() -> int:
    """Write both lock files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        python = Path(scratch) / "bin" / "python"
        requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
        (ROOT / "requirements-build.lock").write_text(resolve(python, BUILD_REQUIREMENTS))
        (ROOT / "requirements.lock").write_text(resolve(python, requirements))
    return 0


if __name__ == "__main__":
    sys.exit(main())
