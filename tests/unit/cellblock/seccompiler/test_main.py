"""seccompiler-bin: Firecracker's flags, its JSON, and filters that do what the JSON says."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellblock.seccompiler.errors import CompilerError
from cellblock.seccompiler.main import main
from cellblock.seccompiler.source import parse
from ipc.filter_file import decode
from tests.harness.bpf import RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, evaluate

RET_TRAP, RET_TRACE, RET_LOG, RET_KILL_THREAD = 0x00030000, 0x7FF00000, 0x7FFC0000, 0
IOCTL, READ, OPENAT = 16, 0, 257
UPPER = 0xABCD << 32


def document(*rules: Any, default: Any = "trap", action: Any = "allow") -> dict[str, Any]:
    return {"vcpu": {"default_action": default, "filter_action": action, "filter": list(rules)}}


def condition(op: Any, val: int, kind: str = "qword", index: int = 1) -> dict[str, Any]:
    return {"index": index, "type": kind, "op": op, "val": val, "comment": "why"}


def compile_(tmp_path: Path, content: Any, *flags: str) -> bytes:
    source, output = tmp_path / "in.json", tmp_path / "out"
    source.write_text(json.dumps(content))
    arguments = ["--input-file", str(source), "--target-arch", "x86_64", "--output-file", str(output), *flags]
    assert main(["seccompiler-bin", *arguments]) == 0
    return decode(output.read_bytes())["vcpu"]


@pytest.mark.parametrize(
    ("op", "good", "bad"),
    [
        ("eq", (7,), (6, 8, UPPER | 7)),
        ("ne", (6, 8, UPPER | 7), (7,)),
        ("lt", (6, 0), (7, 8)),
        ("le", (6, 7), (8, UPPER)),
        ("gt", (8, UPPER), (7, 6)),
        ("ge", (7, 8), (6,)),
        ({"masked_eq": 15}, (7, 0x17, UPPER | 7), (8, 6)),
    ],
)
def test_every_comparison(tmp_path, op, good, bad):
    program = compile_(tmp_path, document({"syscall": "ioctl", "args": [condition(op, 7)]}))
    for value in good:
        assert evaluate(program, IOCTL, (0, value)) == RET_ALLOW, value
    for value in bad:
        assert evaluate(program, IOCTL, (0, value)) == RET_TRAP, value


def test_a_dword_is_equal_whatever_the_upper_half_is(tmp_path):
    program = compile_(tmp_path, document({"syscall": "ioctl", "args": [condition("eq", 7, "dword")]}))
    assert evaluate(program, IOCTL, (0, UPPER | 7)) == RET_ALLOW
    assert evaluate(program, IOCTL, (0, UPPER | 6)) == RET_TRAP


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ("allow", RET_ALLOW), ("kill_thread", RET_KILL_THREAD), ("kill_process", RET_KILL_PROCESS), ("log", RET_LOG),
        ({"errno": 38}, RET_ERRNO | 38), ({"trace": 3}, RET_TRACE | 3),
    ],
)  # fmt: skip
def test_every_action(tmp_path, action, answer):
    program = compile_(tmp_path, document({"syscall": "read"}, action=action))
    assert evaluate(program, READ) == answer
    assert evaluate(program, OPENAT) == RET_TRAP


def test_basic_compares_no_arguments(tmp_path):
    program = compile_(tmp_path, document({"syscall": "ioctl", "args": [condition("eq", 7)]}), "--basic")
    assert evaluate(program, IOCTL, (0, 8)) == RET_ALLOW


def test_split_output_and_the_default_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text(json.dumps(document({"syscall": "read"})))
    assert main(["seccompiler-bin", "--input-file", "in.json", "--target-arch", "x86_64", "--split-output"]) == 0
    assert decode((tmp_path / "seccomp_binary_filter.out").read_bytes())["vcpu"] == (tmp_path / "vcpu.bpf").read_bytes()


def test_another_architecture(tmp_path, capsys):
    (tmp_path / "in.json").write_text(json.dumps(document({"syscall": "read"})))
    arguments = ["--input-file", str(tmp_path / "in.json"), "--output-file", str(tmp_path / "out")]
    assert main(["seccompiler-bin", *arguments, "--target-arch", "aarch64"]) == 0, capsys.readouterr().err
    program = decode((tmp_path / "out").read_bytes())["vcpu"]
    assert evaluate(program, 63, arch=0xC00000B7) == RET_ALLOW  # read on aarch64
    assert evaluate(program, 0, arch=0xC00000B7) == RET_TRAP
    assert evaluate(program, 0) == RET_KILL_THREAD  # another architecture


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "Cannot deserialize json: EOF while parsing"),
        ([], "Cannot deserialize json: the document: expected an object"),
        ({"vmm": {}}, "vmm: missing field default_action"),
        (document("read"), r"vcpu.filter\[0\]: expected an object"),
        (document({"syscall": "read", "extra": 1}), r"vcpu.filter\[0\]: unknown field extra"),
        (document({"syscall": "no_such_call"}), r"vcpu.filter\[0\]: no_such_call: libseccomp"),
        (document({"syscall": "read", "args": [condition("about", 1)]}), r"args\[0\].op: expected one of eq"),
        (document({"syscall": "read", "args": [condition("eq", -1)]}), r"args\[0\].val: expected a number"),
        (document({"syscall": "read", "args": [condition("eq", 1, index=6)]}), r"args\[0\].index: expected a number"),
        (
            document({"syscall": "read", "args": [condition("eq", 1, "word")]}),
            r"args\[0\].type: expected dword or qword",
        ),
        (document(default="shout"), "vcpu.default_action: expected one of allow"),
        (document(action={"errno": 70000}), "vcpu.filter_action.errno: expected a number from 0 to 65535"),
    ],
)
def test_bad_input(tmp_path, capsys, content, text):
    source = tmp_path / "in.json"
    source.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["seccompiler-bin", "--input-file", str(source), "--target-arch", "x86_64"]) == 1
    assert re.search(f"^seccompiler-bin: .*{text}", capsys.readouterr().err)


def test_files_that_cannot_be_used(tmp_path, capsys):
    assert main(["seccompiler-bin", "--input-file", str(tmp_path / "no"), "--target-arch", "x86_64"]) == 1
    assert "Cannot open input file" in capsys.readouterr().err
    (tmp_path / "in.json").write_text(json.dumps(document({"syscall": "read"})))
    arguments = ["--input-file", str(tmp_path / "in.json"), "--target-arch", "x86_64", "--output-file", str(tmp_path)]
    assert main(["seccompiler-bin", *arguments]) == 1
    assert "Cannot create output file" in capsys.readouterr().err


@given(st.recursive(st.one_of(st.none(), st.integers(), st.text(), st.booleans()),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
                        st.sampled_from(["filter", "default_action", "filter_action", "syscall", "args", "errno", "x"]),
                        inner, max_size=4)), max_leaves=12))  # fmt: skip
def test_any_json_is_parsed_or_refused(value):
    with suppress(CompilerError):
        parse(json.dumps(value).encode())


def test_the_program_is_installed():
    from tests.harness.jail import FIRECRACKER

    done = subprocess.run(
        [FIRECRACKER.parent / "seccompiler-bin", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Seccompiler-bin v")
