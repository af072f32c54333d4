"""Serving requests must import nothing: inside the jail there is nothing that could be imported."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]

SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[3]]
import os, socket
from vmm.api.dispatch import Dispatcher
from vmm.api.server import ApiServer, bind
from vmm.config.file import ConfigFileError, parse
from base.event_manager import EventManager
from vmm.observe.logger import LOG, LimitedSite
from vmm.config.resources import VmResources
from vmm.session import Session

class Vmm:
    def version(self):
        return "1"

    def pause_vm(self):
        raise AssertionError("bug")

    def read_metrics(self):
        pass

def build(resources):
    return Vmm()

os.chdir(sys.argv[2])
open("kernel", "wb").close()
manager = EventManager()
session = Session(VmResources(), "late", build, manager)
server = ApiServer(bind("api.socket"), Dispatcher(session), LOG, 300)

loaded = set(sys.modules)
manager.add_subscriber(server)

def exchange(data):
    client = socket.socket(socket.AF_UNIX)
    client.connect("api.socket")
    client.sendall(data)
    while manager.run(0):
        pass
    client.setblocking(False)
    answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 "), answer
    client.close()
    while manager.run(0):
        pass

def put(path, body, method=b"PUT"):
    exchange(b"%s %s HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (method, path, len(body), body))

exchange(b"GET / HTTP/1.1\\r\\n\\r\\n")
exchange(b"GET /\\xff HTTP/1.1\\r\\n\\r\\n")
exchange(b"GET / HTTP/1.1\\r\\na\\xff\\r\\n\\r\\n")
exchange(b"GET / HTTP/1.1\\r\\n" + b"\\xff" * 2000)
exchange(b"PUT / HTTP/1.1\\r\\nContent-Length: 1000\\r\\n\\r\\n")
put(b"/logger", b'{"log_path": "log", "level": "trace", "show_log_origin": true, "module": "vmm"}')
for body in (b"\\xff", b'"\\xff"', b'"\\\\ud83d\\\\ude00"', b"1.5e300", b"-1", b"[" * 200, b"{}",
             b'{"kernel_image_path": "nix"}',
             b'{"kernel_image_path": "kernel", "boot_args": "\\xc3\\xa9"}', b'{"kernel_image_path": "kernel"}'):
    put(b"/boot-source", body)
put(b"/machine-config", b'{"cpu_template": "T2"}', b"PATCH")
put(b"/machine-config", b'{"cpu_template": "None"}', b"PATCH")
put(b"/actions", b'{"action_type": "InstanceStart"}')
put(b"/vm", b'{"state": "Paused"}', b"PATCH")
LimitedSite(LOG, "x").warn("line")
try:
    parse(b"{")
except ConfigFileError:
    pass
assert session.vmm is not None
print(sorted(set(sys.modules) - loaded))
"""


def test_serving_requests_imports_nothing(tmp_path):
    command = [sys.executable, "-IS", "-c", SCRIPT, str(ROOT), str(tmp_path), sysconfig.get_path("purelib")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
