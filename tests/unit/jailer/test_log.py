"""The supervisor's log: lines for people, records for machines, and nobody who waits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from jailer.log import MAX_LINE, Log


def test_lines_have_firecrackers_format() -> None:
    read_end, write_end = os.pipe()
    log = Log(write_end, "my-vm")
    log.error("two\nlines")
    line = os.read(read_end, 4096).decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} \[my-vm:supervisor:ERROR\] two lines\n", line)
    os.close(read_end)
    os.close(write_end)


def test_a_reader_that_does_not_read_costs_lines_not_time() -> None:
    read_end, write_end = os.pipe()
    log = Log(write_end, "id")
    for _ in range(100):
        log.info("x" * 5000)
    assert log.lost > 50
    os.set_blocking(read_end, False)
    lines = os.read(read_end, 1 << 20).splitlines(keepends=True)
    assert all(len(line) == MAX_LINE for line in lines)
    os.close(read_end)
    log.info("nobody there")
    os.close(write_end)
    log.info("not even a descriptor")


def test_records_are_json_on_one_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        Log(file.fileno(), "id").record({"text": "a\nb" * 5000})
    assert json.loads((tmp_path / "log").read_text()) == {"text": "a\nb" * 5000}
