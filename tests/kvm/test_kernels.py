"""Kernels and command lines as clients have them, started by the real program: each must run its guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.client import launch_unjailed
from tests.guests.build import build
from tests.harness import kernel_images as images

#: Sends the four bytes at 0x8a000 to COM1, then has the keyboard controller reset the machine.
_SEND_LOW_WORD = bytes.fromhex("baf8030000 8b3500a00800 b904000000 89f0 ee c1ee08 49 75f7 b0fe e664 f4ebfd")


def run(folder: Path, kernel: Path, **boot_source: str) -> bytes:
    """Start a guest that resets itself; return what it sent to COM1."""
    document = {
        "boot-source": {"kernel_image_path": str(kernel), **boot_source},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "logger": {"log_path": str(folder / "log")},
    }
    (folder / "log").touch()
    (folder / "config").write_text(json.dumps(document))
    with launch_unjailed(folder, ["--config-file", str(folder / "config"), "--no-api"]) as vm:
        code = vm.wait()
        assert code == 0, (folder / "log").read_text()
        return bytes(vm.console)


@pytest.mark.parametrize(
    ("boot_args", "line"),
    [
        ("console=ttyS0 panic=1\n", "console=ttyS0 panic=1 pci=off"),
        ("console=ttyS0\tpanic=1", "console=ttyS0\tpanic=1 pci=off"),
        ("console=ttyS0\r\n", "console=ttyS0 pci=off"),
        ("quiet motd=grüß 💖 -- 1\n", "quiet motd=grüß 💖 pci=off -- 1"),
    ],
)
def test_boot_args_reach_the_kernel(boot_args, line, tmp_path):
    console = run(tmp_path, build("command_line"), boot_args=boot_args)
    assert line.encode() in console


def test_a_kernel_with_a_segment_below_1_mib_and_one_over_another(tmp_path):
    loads = [
        images.Load(0x10_0000, b"\xf4" * 64),
        images.Load(0x8_A000, b"low!"),
        images.Load(0x10_0010, _SEND_LOW_WORD),
    ]
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf(loads, 0xFFFF_FFFF_8010_0000, images.pvh_note(0x10_0010)))
    assert b"low!" in run(tmp_path, kernel)


def test_the_log_names_what_boot_structures_are_written_over(tmp_path):
    loads = [images.Load(0x10_0000, _SEND_LOW_WORD), images.Load(0x8_A000, b"low!"), images.Load(0x1_FFF0, bytes(32))]
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf(loads, 0x10_0000, images.pvh_note(0x10_0000)))
    assert b"low!" in run(tmp_path, kernel)
    text = "What the kernel has for 0x20000 to 0x20010 lies where boot structures are written."
    assert text in (tmp_path / "log").read_text()
