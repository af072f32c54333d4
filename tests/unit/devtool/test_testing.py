"""./dev's own logic: which tests run where, what a report says, what the launchers look like."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from devtool import process, setup, testing
from devtool.project import LAUNCHERS, PYTHON, ROOT, DevError


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def stages(paths=(), *, quick=False):
    return {stage.name: stage for stage in testing.plan_stages(paths, quick=quick)}


def test_the_lab_is_used_only_without_hardware_paging(monkeypatch):
    for here in (False, True):
        monkeypatch.setattr(testing, "has_hardware_paging", lambda here=here: here)
        in_lab = [stage.in_lab for name, stage in stages().items() if name.startswith("lab, ")]
        assert in_lab and set(in_lab) == {not here}
    assert not [name for name in stages(quick=True) if name.startswith("lab")]


def test_chosen_paths_choose_the_stage():
    chosen = "tests/lab/test_lab_itself.py::test_x"
    assert [stage.paths for stage in stages([chosen]).values()] == [[chosen]]
    assert set(stages(["tests/unit"])) == {"host, parallel"}
    assert stages(["tests"]).keys() == stages().keys()


def test_arguments_are_divided_into_paths_and_options():
    paths, options = testing.split_arguments(["-k", "lab", "tests/unit", "-x", "tests/lab/test_lab_itself.py::t[a b]"])
    assert paths == ["tests/unit", "tests/lab/test_lab_itself.py::t[a b]"]
    assert options == ["-k", "lab", "-x"]
    with pytest.raises(DevError, match="no such test"):
        testing.split_arguments(["tests/unit/test_not_there.py"])


def test_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    assert testing.read_report(report) is None
    report.write_text("<testsuites><testsuite tests='7' failures='1' errors='2' skipped='1'/></testsuites>")
    assert testing.read_report(report) == (3, 3, 1)
    report.write_text("<testsuites>")
    assert testing.read_report(report) is None


@pytest.mark.parametrize("argument", ["--help", "setup --help", "test --help", "lab --help", "where --help"])
def test_help_is_given(argument):
    done = subprocess.run([ROOT / "dev", *argument.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: ./dev" in done.stdout


def test_wrong_commands_are_refused():
    for arguments, message in ((["lint", "x"], "unexpected argument 'x'"), (["bench", "none"], "no benchmark 'none'")):
        done = subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_failing_test_fails_the_whole(tmp_path):
    """Through the real thing: a stage with a failed test, one that dies, and one without tests."""
    failing = tmp_path / "test_failing.py"
    for text, closing in (
        ("def test_a(): pass\ndef test_b(): assert False\n", "1 passed, 1 failed, 0 skipped"),
        ("import os\ndef test_a(): os._exit(3)\n", "0 passed, 1 failed, 0 skipped"),
        ("", "0 passed, 1 failed, 0 skipped"),
    ):
        failing.write_text(text)
        script = (
            "from devtool import testing\n"
            f"stage = testing.Stage('one', [{str(failing)!r}], ['-c', '/dev/null'])\n"
            "testing.plan_stages = lambda paths, quick: [stage]\n"
            "raise SystemExit(testing.run_tests(quick=True, soak=None, arguments=[]))"
        )
        done = subprocess.run([PYTHON, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == closing
        assert done.returncode == 1


def test_launchers_are_recognisable_and_start(tmp_path, monkeypatch):
    head = (LAUNCHERS / "firecracker").read_bytes()[:1024]
    assert setup.LAUNCHER_MARKER.encode() in head
    (tmp_path / "fake_main.py").write_text("def main(argv): print(argv[1:]); return 7\n")
    for python in (PYTHON, tmp_path / "a folder with blanks" / "python"):
        if not python.exists():
            python.parent.mkdir()
            python.symlink_to("/usr/bin/python3")
        monkeypatch.setattr(setup, "PYTHON", python)
        monkeypatch.setattr(setup, "ROOT", tmp_path)
        program = tmp_path / "program"
        program.write_text(setup.launcher_text("fake_main", "program"))
        program.chmod(0o755)
        done = subprocess.run([program, "a b", "c"], stdout=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stdout) == (7, "['a b', 'c']\n")


def test_missing_packages_are_named():
    assert setup.missing_debian_packages(["dpkg", "no-such-package-at-all"]) == ["no-such-package-at-all"]
    assert setup.missing_debian_packages(setup.needed_debian_packages()) == []


def test_a_program_that_is_there_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.needed_debian_packages() == [*setup.DEBIAN_PACKAGES, "golang-go", "nodejs"]
    (tmp_path / "go").symlink_to("/bin/true")
    assert setup.needed_debian_packages() == [*setup.DEBIAN_PACKAGES, "nodejs"]


def test_hardware_paging_is_read_from_the_modules():
    assert testing.has_hardware_paging() in {True, False}
    assert Path("/dev/kvm").exists() or not testing.has_hardware_paging()


@pytest.mark.parametrize(
    ("statuses", "result", "said"),
    [
        ([0], 0, []),
        ([125, 0], 0, ["emulated machines that died: 1", "1 passed, 0 failed"]),
        ([125, 125], 1, ["emulated machines that died: 1", "0 passed, 1 failed"]),
        ([125, 1], 1, ["emulated machines that died: 1", "0 passed, 1 failed"]),
        ([1], 1, ["0 passed, 1 failed"]),
        ([124], 1, ["0 passed, 1 failed"]),
    ],
)
def test_a_dead_machine_is_replaced_once_and_a_failed_test_is_not_repeated(monkeypatch, capsys, statuses, result, said):
    left = list(statuses)

    def run_stage(_stage, _options, _environment, report):
        status = left.pop(0)
        if status in {0, 1}:
            report.write_text(f'<testsuites><testsuite tests="1" failures="{status}"/></testsuites>')
        return status

    monkeypatch.setattr(testing, "has_hardware_paging", lambda: False)
    monkeypatch.setattr(testing, "_run_stage", run_stage)
    arguments = ["tests/lab/test_lab_itself.py"]
    assert testing.run_tests(quick=False, soak=None, arguments=arguments) == result
    assert not left
    output = "".join(capsys.readouterr())
    assert all(text in output for text in said), output


def test_tests_on_this_host_are_not_repeated(monkeypatch):
    statuses = [125]
    monkeypatch.setattr(testing, "_run_stage", lambda *_: statuses.pop())
    assert testing.run_tests(quick=False, soak=None, arguments=["tests/unit/devtool/test_testing.py"]) == 1


def test_a_soak_starts_a_lab_only_for_files_with_tests_of_its_own():
    stages = testing.plan_stages(["tests/lab"], quick=False)
    taking_part = {name: [s.name for s in stages if testing._takes_part(s, name)] for name in ("smp", "fuzz", "all")}
    assert not taking_part["fuzz"]
    assert "lab, test_smp.py" in taking_part["smp"]
    assert set(taking_part["smp"]) <= set(taking_part["all"]) < {stage.name for stage in stages}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_takes_its_command_down_in_order(tmp_path, end):
    ready, told = tmp_path / "ready", tmp_path / "told"
    command = f"trap 'echo > {told}; exit' INT; echo > {ready}; while :; do sleep 0.01; done"
    script = (
        "import signal; from devtool import process; process.end_on_signals(); "
        f"process.run(['bash', '-c', {command!r}], environment={{'PATH': '/bin'}}, stop=signal.SIGINT)"
    )
    # A shell's background jobs ignore SIGINT, and a child inherits that for ever.
    outer = subprocess.Popen(["env", "--default-signal=INT", PYTHON, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not ready.exists():
        assert outer.poll() is None
        time.sleep(0.01)
    outer.send_signal(end)
    assert outer.wait(60.0) != 0
    assert told.exists()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_the_command_is_started_ends_it_too(monkeypatch, end):
    started = []
    start = subprocess.Popen

    def start_and_be_ended(*arguments, **options):
        started.append(start(*arguments, **options))
        signal.raise_signal(end)
        return started[0]

    def ended(_number, _frame):
        raise SystemExit(1)

    monkeypatch.setattr(subprocess, "Popen", start_and_be_ended)
    before = signal.signal(end, ended)
    try:
        with pytest.raises(SystemExit):
            process.run(["sleep", "1000"], environment={"PATH": "/bin"})
        assert signal.getsignal(end) is ended
    finally:
        signal.signal(end, before)
    assert started[0].returncode == -signal.SIGTERM
