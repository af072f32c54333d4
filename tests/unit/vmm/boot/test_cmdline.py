"""The kernel command line: limits, characters, where additions go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot.cmdline import Cmdline, complete, root_parameters, virtio_mmio_parameter
from vmm.boot.errors import CmdlineError


def reason(caught: pytest.ExceptionInfo[CmdlineError]) -> tuple[str, str]:
    return caught.value.code, str(caught.value)


def test_the_default_is_used_only_without_boot_args() -> None:
    assert str(Cmdline(None)) == (
        "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
    )
    assert str(Cmdline("")) == ""
    assert Cmdline("").to_bytes() == b"\0"


@pytest.mark.parametrize(
    ("text", "boot_args", "init_args"),
    [
        ("foo -- bar", "foo", "bar"),
        ("foo --  bar ", "foo", "bar"),
        ("a --b -- c --d", "a --b", "c --d"),
        ("a-- b --c", "a-- b --c", ""),
        ("--a-- -- b -- --c", "--a--", "b -- --c"),
        ('a="b -- c" d -- e ', 'a="b -- c" d', "e"),
        ('x=y a="b -- c"', 'x=y a="b -- c"', ""),
        ("  spaces  ", "spaces", ""),
        ("foo -- ", "foo", ""),
        ("a -- -- b", "a", "-- b"),
    ],
)
def test_arguments_of_init_are_split_off(text: str, boot_args: str, init_args: str) -> None:
    cmdline = Cmdline(text)
    assert cmdline.boot_args == boot_args
    assert cmdline.init_args == init_args


def test_additions_come_before_the_arguments_of_init() -> None:
    cmdline = Cmdline("console=ttyS0 -- single -x")
    complete(cmdline, pci=False, parameters=[root_parameters("/dev/vda", read_only=True), ""])
    cmdline.append(virtio_mmio_parameter(0xC0001000, 4096, 5))
    assert str(cmdline) == ("console=ttyS0 pci=off root=/dev/vda ro virtio_mmio.device=4K@0xc0001000:5 -- single -x")
    assert cmdline.to_bytes() == str(cmdline).encode() + b"\0"
    with_pci = Cmdline("quiet")
    complete(with_pci, pci=True, parameters=[root_parameters("PARTUUID=12-01", read_only=False)])
    assert str(with_pci) == "quiet root=PARTUUID=12-01 rw"


def test_arguments_of_init_alone_are_refused_until_something_is_added() -> None:
    cmdline = Cmdline(" -- init only")
    with pytest.raises(CmdlineError) as caught:
        cmdline.to_bytes()
    assert reason(caught) == ("cmdline.init_only", "Cmdline cannot contain only init args.")
    cmdline.append("pci=off")
    assert str(cmdline) == "pci=off -- init only"


@pytest.mark.parametrize(
    ("text", "boot_args", "init_args"),
    [
        ("quiet panic=1\n", "quiet panic=1", ""),
        ("console=ttyS0\r\n", "console=ttyS0", ""),
        ("\u3000\ta\tb\n -- \n1\x85", "a\tb", "1"),
        ("one\ntwo", "one\ntwo", ""),
        ("motd=grüß 💖 \x7f\x01", "motd=grüß 💖 \x7f\x01", ""),
        ("\x1ca\x1f", "\x1ca\x1f", ""),
    ],
)
def test_white_space_and_characters_beyond_ascii_reach_the_kernel(text: str, boot_args: str, init_args: str) -> None:
    cmdline = Cmdline(text)
    assert (cmdline.boot_args, cmdline.init_args) == (boot_args, init_args)
    complete(cmdline, pci=False)
    line = f"{boot_args} pci=off" + (f" -- {init_args}" if init_args else "")
    assert cmdline.to_bytes() == line.encode() + b"\0"


def test_a_nul_is_refused() -> None:
    with pytest.raises(CmdlineError) as caught:
        Cmdline("a\0b")
    assert reason(caught) == ("cmdline.nul", "Null terminator detected in the command line structure.")


@pytest.mark.parametrize("text", ["quiet\n", "naïve", "a\0b", "tab\there", "\x7f", "emoji 💖"])
def test_only_printable_ascii_is_appended(text: str) -> None:
    cmdline = Cmdline("grüß")
    with pytest.raises(CmdlineError) as caught:
        cmdline.append(text + "x")
    assert reason(caught) == ("cmdline.ascii", "String contains a non-printable ASCII character.")
    assert str(cmdline) == "grüß"


def test_the_limit_includes_the_nul_and_all_additions() -> None:
    cmdline = Cmdline("x" * 2047)
    assert len(cmdline.to_bytes()) == 2048
    with pytest.raises(CmdlineError) as caught:
        Cmdline("x" * 2048)
    assert reason(caught) == ("cmdline.capacity", "Invalid cmdline capacity provided.")
    with pytest.raises(CmdlineError) as caught:
        cmdline.append("y")
    assert reason(caught) == ("cmdline.too_large", "Inserting string would make command line too long.")
    assert str(cmdline) == "x" * 2047
    exact = Cmdline("x" * 2039)
    exact.append("pci=off")
    assert len(exact.to_bytes()) == 2048
    with_init = Cmdline("a -- " + "b" * 2042)
    assert len(with_init.to_bytes()) == 2048
    with pytest.raises(CmdlineError):
        Cmdline("a -- " + "b" * 2043)


def test_the_limit_counts_bytes() -> None:
    cmdline = Cmdline("ü" * 1023)
    assert len(cmdline.to_bytes()) == 2047
    cmdline = Cmdline("a -- " + "€" * 680)
    cmdline.append("b")
    assert len(cmdline.to_bytes()) == 2048
    cmdline.append("")
    with pytest.raises(CmdlineError) as caught:
        cmdline.append("c")
    assert reason(caught)[0] == "cmdline.too_large"
    with pytest.raises(CmdlineError) as caught:
        Cmdline("ü" * 1024)
    assert reason(caught)[0] == "cmdline.capacity"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=2100), st.lists(st.text(max_size=30)))
def test_whatever_is_accepted_fits_and_keeps_its_words(text: str, additions: list[str]) -> None:
    try:
        cmdline = Cmdline(text)
        for addition in additions:
            cmdline.append(addition)
        data = cmdline.to_bytes()
    except CmdlineError:
        return
    assert len(data) <= 2048
    assert data.endswith(b"\0")
    assert data.count(b"\0") == 1
    words = str(cmdline).split()
    assert words[: len(cmdline.boot_args.split())] == cmdline.boot_args.split()
    for addition in additions:
        assert addition.strip() in cmdline.boot_args
    if cmdline.init_args:
        assert str(cmdline).endswith(" -- " + cmdline.init_args)
