"""The program cellblock: its help, its mistakes, and that it loads no more than the command that is called."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from base.version import CELLBLOCK_VERSION, FIRECRACKER_VERSION
from cellblock import main as cellblock
from devtool.project import ROOT


def run(*arguments: str) -> int:
    return cellblock.main(["/usr/bin/cellblock", *arguments])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """A command that a test fills with life: ``cellblock tried …``."""
    module = SimpleNamespace(main=lambda argv: 0)
    monkeypatch.setitem(sys.modules, "cellblock_tried", module)
    monkeypatch.setitem(cellblock.COMMANDS, "tried", cellblock.Command("cellblock_tried", "for this test"))
    return module


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_command(word, capsys):
    assert run(word) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "usage: cellblock COMMAND" in out
    for name, command in cellblock.COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version_names_ours_and_the_one_that_clients_know(word, capsys):
    assert run(word) == 0
    assert capsys.readouterr().out == f"Cellblock {CELLBLOCK_VERSION} (Firecracker v{FIRECRACKER_VERSION})\n"


def test_without_a_command_the_help_is_an_error(capsys):
    assert run() == 2
    out, err = capsys.readouterr()
    assert not out
    assert "usage: cellblock COMMAND" in err


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("chek", "cellblock: there is no command 'chek'; did you mean 'check'?\n"),
        ("frobnicate", "cellblock: there is no command 'frobnicate'\n"),
        ("--check", "cellblock: there is no option '--check'\n"),
    ],
)
def test_what_is_no_command_is_refused(word, text, capsys):
    assert run(word) == 2
    assert capsys.readouterr().err == f"{text}\nFor more information try cellblock --help.\n"


def test_a_command_gets_its_name_and_the_rest_and_its_status_is_ours(command):
    calls = []

    def main(argv):
        calls.append(argv)
        return 7

    command.main = main
    assert run("tried", "--help", "x") == 7
    assert calls == [["cellblock tried", "--help", "x"]]


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (FileNotFoundError(2, "…", "/x"), "cellblock tried: /x: No such file or directory (os error 2)\n"),
        (KeyboardInterrupt(), "cellblock tried: interrupted\n"),
    ],
)
def test_what_a_command_does_not_handle_is_one_line(raised, text, command, capsys):
    def main(argv):
        raise raised

    command.main = main
    assert run("tried") == 1
    assert capsys.readouterr().err == text


def test_every_command_has_a_folder_and_its_own_help(capsys):
    for name, command in cellblock.COMMANDS.items():
        folder = name.replace("-", "_")
        assert command.module == f"cellblock.{folder}.main"
        assert (ROOT / "cellblock" / folder / "main.py").is_file()
        with pytest.raises(SystemExit) as ended:
            run(name, "--help")
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: cellblock {name} ")


@pytest.mark.parametrize(("arguments", "loaded"), [(["--help"], []), (["check", "--help"], ["cellblock.check"])])
def test_nothing_is_loaded_of_other_commands(arguments, loaded):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from cellblock.main import main\n"
        f"try: main(['cellblock', *{arguments!r}])\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('cellblock', 'vmm')), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-IS", "-c", code], check=True, capture_output=True, text=True)
    mine = [name for part in loaded for name in (part, f"{part}.main")]
    assert ran.stderr.strip() == str(sorted(["cellblock", "cellblock.main", *mine]))
