"""What is gathered and filled before the forks changes nothing but where things lie."""

from __future__ import annotations

import json
import subprocess

from devtool.bytecode import HOT_FUNCTIONS
from devtool.project import PYTHON, ROOT
from jailer import hot
from jailer.hot import heap

REPORT = """Small block threshold = 512, in 32 size classes.

class   size   num pools   blocks in use  avail blocks
-----   ----   ---------   -------------  ------------
    0     16           1              19          1002
   31    512           1              11            20

# arenas allocated total           =                    2
60 unused pools * 16384 bytes      =              983,040
"""
SCRIPT = """
import json, sys
sys.path[:0] = {paths}
from jailer import hot
hot.intern_names()
from base import lean_msgpack, lean_zmq
lean_zmq.install()
lean_msgpack.install()
from jailer import launch, template
template.load_roles()
from jailer.hot import heap
functions = [each for each in map(hot._find, hot._lines("functions.txt")) if each]
before = [each.__code__ for each in functions]
def spread(size):
    made = [None] * 64
    for at in range(64):
        made[at] = bytes(size - heap._BYTES_HEADER)
    return len({{id(each) // 4096 for each in made}}) - 64 * size // 4096
heap.close_gaps()
dense = [spread(size) for size in (64, 80, 160, 1040)]
hot.gather_code()
after = [each.__code__ for each in functions]
pages = [len({{id(code) // 4096 for code in codes}}) for codes in (before, after)]
copied = all(a is not b for a, b in zip(before, after))
print(json.dumps([len(functions), before == after, copied, dense, *pages]))
"""


def test_the_report_is_understood():
    assert list(heap._free_places(REPORT)) == [(16, 1002), (512, 20)]


def test_nothing_is_filled_where_the_report_is_another():
    assert list(heap._free_places("class size\n1 2 3 4\n1 2 3 4 5 6\na b c d e\n")) == []


def test_the_report_goes_nowhere_else(capfd):
    assert heap._report()
    assert capfd.readouterr().err == ""


def test_code_is_gathered_on_fewer_pages_and_stays_the_same():
    paths = [str(ROOT), *(str(path) for path in (ROOT / ".venv" / "lib").glob("python3.*/site-packages"))]
    command = [str(PYTHON), "-IS", "-c", SCRIPT.format(paths=paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    count, same, copied, dense, before, after = json.loads(done.stdout)
    assert count > 500
    assert same
    assert copied
    assert max(dense) <= 3, dense  # pages more than the objects need
    assert after < before * 0.7


def test_most_of_the_list_exists():
    import jailer.launch
    import jailer.template

    jailer.template.load_roles()
    listed = [line for line in HOT_FUNCTIONS.read_text().splitlines() if line.split(".")[0] in {"ipc", "vmm", "jailer"}]
    unknown = [line for line in listed if hot._find(line) is None]
    assert len(unknown) < len(listed) / 10, f"./dev bench pages --record; unknown: {unknown}"


def test_what_does_not_exist_is_passed_over():
    assert hot._find("no.such:thing") is None
    assert hot._find("jailer.hot:nothing.at.all") is None
    assert hot._find("jailer.hot:_Code") is None
    assert hot._lines("nothing.txt") == []
