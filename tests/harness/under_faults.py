"""``under_faults.py ROOT SOCKET PROGRAM…``: become a program whose calls tests.harness.system_call_faults sees."""

from __future__ import annotations

import os
import sys

sys.path[:0] = [sys.argv[1], os.path.join(sys.argv[1], ".venv/lib/python3.11/site-packages")]

from tests.harness.system_call_faults import enter  # noqa: E402

if __name__ == "__main__":
    enter(sys.argv[2], lambda: os.execv(sys.argv[3], sys.argv[3:]))
