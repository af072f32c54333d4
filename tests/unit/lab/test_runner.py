"""The lab from outside: what it promises to whoever runs a command in it. Each test boots at most once."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from devtool.project import ROOT
from lab import runner
from lab.image import ensure
from lab.runner import Lab, LabError, LabTimeoutError

pytestmark = pytest.mark.slow


def run(lab, script, **options):
    """Run a shell script in the lab; returns its status and output."""
    out, err = io.BytesIO(), io.BytesIO()
    status = lab.run(["bash", "-c", script], stdout=out, stderr=err, timeout=120, **options)
    return status, out.getvalue(), err.getvalue()


def test_commands_output_files_and_time_limit(tmp_path, no_leftovers):
    """One boot for all that a running lab can be asked."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("from the host\n")
    with no_leftovers(), Lab(keep=[tmp_path]) as lab:
        assert run(lab, "echo to stdout; echo to stderr >&2; exit 7") == (7, b"to stdout\n", b"to stderr\n")
        assert run(lab, "kill -9 $$")[0] == 128 + 9
        assert run(lab, "true") == (0, b"", b"")
        status, out, _ = run(lab, "yes 0123456789 | head -c 3000000")
        assert (status, len(out)) == (0, 3_000_000)
        assert run(lab, 'pwd; echo "$A"', directory=ROOT / "lab", environment={"A": "it's  'quoted'"})[1] == (
            f"{ROOT}/lab\nit's  'quoted'\n".encode()
        )
        assert run(lab, "cat sub/file; ls -A .. | wc -l; touch new", directory=tmp_path)[1] == b"from the host\n1\n"
        assert not (tmp_path / "new").exists()  # writes stay inside
        assert run(lab, "echo > /dev/stdout; (sleep 1000 &) ; echo ended")[1] == b"\nended\n"
        # What was left running holds the pipes still: only the next command's readers may read from them.
        order = b"".join(b"%d\n" % number for number in range(500))
        assert run(lab, "for n in $(seq 0 499); do echo $n; echo $n >&2; done") == (0, order, order)
        assert run(lab, "no-such-command")[0] == 127
        assert run(lab, "", directory=Path("/no/such/folder"))[0] == 127

        assert run(lab, "mkdir -p /root/made/deep; echo made > /root/made/deep/file")[0] == 0
        lab.fetch("/root/made", tmp_path / "fetched")
        assert (tmp_path / "fetched/deep/file").read_text() == "made\n"
        with pytest.raises(LabError, match=r"cannot bring /root/absent back: .*No such file"):
            lab.fetch("/root/absent", tmp_path / "absent")

        exchange = lab.exchange
        with pytest.raises(LabTimeoutError, match=r"(?s)did not end within 0\.5 s.*RIP=.*Not continuing.*Call Trace"):
            lab.run(["sleep", "1000"], timeout=0.5)
    assert not exchange.exists()


def test_a_machine_that_does_not_boot_is_reported(monkeypatch, tmp_path, no_leftovers):
    broken = tmp_path / "initramfs"
    broken.write_bytes(b"no archive")
    monkeypatch.setattr(runner, "ensure", lambda: ensure()._replace(initramfs=broken))
    with no_leftovers(), pytest.raises(LabError, match=r"(?s)machine went away.*Kernel panic"):
        Lab()


def test_a_machine_that_does_not_come_up_is_asked_where_it_is(monkeypatch, no_leftovers):
    """It is the lab that has failed (status 125, tests go on in a new one), not a command that took too long."""
    monkeypatch.setattr(runner, "_BOOT_SECONDS", 2.0)
    with no_leftovers(), pytest.raises(LabError, match=r"(?s)did not come up within 2 s.*RIP=") as raised:
        Lab()
    assert not isinstance(raised.value, LabTimeoutError)


def start_cli(temporary):
    """Start ./dev lab with a command that announces itself; returns the process when the command runs."""
    command = [sys.executable, "-m", "lab", "--", "sh", "-c", "echo running; sleep 1000"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started with &
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=str
)
def test_no_machine_outlives_the_tool(number, status, no_leftovers, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with no_leftovers():
        process = start_cli(tmp_path)
        (exchange,) = tmp_path.glob("cellblock-lab-*")
        process.send_signal(number)
        assert process.wait() == status
        process.stdout.close()
    if number == signal.SIGKILL:  # nobody was left to remove its folder: the next lab does
        old = time.time() - 3600
        os.utime(exchange, (old, old))
        runner.remove_abandoned()
    assert not exchange.exists()


def test_a_folder_in_use_is_not_taken_for_abandoned(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used, abandoned = tmp_path / "cellblock-lab-used", tmp_path / "cellblock-lab-abandoned"
    for folder in (used, abandoned):
        folder.mkdir()
        os.utime(folder, (0, 0))
    lock = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        runner.remove_abandoned()
    finally:
        os.close(lock)
    assert used.exists()
    assert not abandoned.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a COMMAND is needed"),
        (["--fetch", "x", "true"], "--fetch: 'x' lacks a part"),
        (["--timeout", "soon", "true"], "invalid float value"),
    ],
)
def test_wrong_arguments(arguments, message):
    command = [sys.executable, "-m", "lab", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
