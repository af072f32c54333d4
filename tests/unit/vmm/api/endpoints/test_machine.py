"""Configuration of the machine, and of what it has one of: what is stored, and how it is shown."""

from __future__ import annotations

import os

import pytest

from vmm.boot.cmdline import DEFAULT_COMMAND_LINE

MACHINE = {
    "vcpu_count": 1,
    "mem_size_mib": 128,
    "smt": False,
    "track_dirty_pages": False,
    "huge_pages": "None",
}


def test_machine_config(api):
    assert list(api.send("GET", "/machine-config")[1].items()) == list(MACHINE.items())
    body = {"vcpu_count": 4, "mem_size_mib": 256, "smt": True, "cpu_template": "T2", "track_dirty_pages": True}
    assert api.send("PUT", "/machine-config", body) == (204, None)
    shown = {"vcpu_count": 4, "mem_size_mib": 256, "smt": True, "cpu_template": "T2", "track_dirty_pages": True,
             "huge_pages": "None"}  # fmt: skip
    assert list(api.send("GET", "/machine-config")[1].items()) == list(shown.items())
    # PUT resets what is not given, but for the CPU template; PATCH changes only what is given.
    assert api.send("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 128})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**MACHINE, "vcpu_count": 2, "cpu_template": "T2"}
    assert api.send("PATCH", "/machine-config", {"cpu_template": "None", "smt": None})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**MACHINE, "vcpu_count": 2}
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": (1 << 64) - 1})[0] == 204


def test_limits_are_inclusive(api, kernel):
    for body in (
        {"vcpu_count": 32, "mem_size_mib": 1, "smt": True},
        {"vcpu_count": 31, "mem_size_mib": 1},
        {"vcpu_count": 1, "mem_size_mib": 1, "smt": True},
        {"vcpu_count": 1, "mem_size_mib": 2, "huge_pages": "2M"},
        {"vcpu_count": 1, "mem_size_mib": (1 << 64) - 1},
    ):
        assert api.send("PUT", "/machine-config", body) == (204, None)
    longest = {"kernel_image_path": kernel, "boot_args": "x" * 2047}
    assert api.send("PUT", "/boot-source", longest) == (204, None)
    assert api.send("PUT", "/boot-source", {**longest, "boot_args": ""}) == (204, None)


@pytest.mark.parametrize("placement", ["Automatic", "Split", "Grouped", "0,1/2,3", "3/2,1,0"])
def test_a_vcpu_placement_is_shown_only_if_it_was_set(api, placement):
    shown = api.send("GET", "/machine-config")[1]
    assert "vcpu_placement" not in shown
    assert (
        api.send("PUT", "/machine-config", {"vcpu_count": 4, "mem_size_mib": 128, "vcpu_placement": placement})[0]
        == 204
    )
    assert api.send("GET", "/machine-config")[1] == {**shown, "vcpu_count": 4, "vcpu_placement": placement}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vcpu_placement": "0,1"}, "The vCPU placement must name each vCPU from 0 to 3 exactly once."),
        ({"vcpu_placement": "split"}, None),
        ({"vcpu_placement": "0/1/2/3/4"}, "The vCPU placement must name each vCPU from 0 to 3 exactly once."),
        ({"vcpu_count": 2}, "The vCPU placement must name each vCPU from 0 to 1 exactly once."),
    ],
)
def test_an_impossible_placement_changes_nothing(api, change, message):
    body = {"vcpu_count": 4, "mem_size_mib": 128, "vcpu_placement": "0,1/2,3"}
    assert api.send("PUT", "/machine-config", body)[0] == 204
    message = message or "The vCPU placement is Automatic, Split, Grouped, or groups of vCPU numbers such as 0,1/2,3."
    assert api.fault("PATCH", "/machine-config", change) == f"Machine config error: {message}"
    assert api.send("GET", "/machine-config")[1]["vcpu_placement"] == "0,1/2,3"


@pytest.mark.parametrize("action", ["Exit", "Restart"])
def test_a_reboot_action_is_shown_only_if_it_was_set(api, action):
    shown = api.send("GET", "/machine-config")[1]
    assert "reboot_action" not in shown
    assert api.send("PATCH", "/machine-config", {"reboot_action": action})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**shown, "reboot_action": action}
    assert api.send("PATCH", "/machine-config", {"reboot_action": "Halt"})[0] == 400
    assert api.send("GET", "/machine-config")[1] == {**shown, "reboot_action": action}


def test_the_last_cpu_template_counts(api):
    assert api.send("PATCH", "/machine-config", {"cpu_template": "T2"})[0] == 204
    assert api.send("PUT", "/cpu-config", {"kvm_capabilities": ["1"]})[0] == 204
    assert "cpu_template" not in api.send("GET", "/machine-config")[1]
    assert api.session.resources.cpu_template is not None
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": 64})[0] == 204
    assert api.session.resources.cpu_template is not None
    assert api.send("PATCH", "/machine-config", {"cpu_template": "T2A"})[0] == 204
    assert api.session.resources.cpu_template is None
    assert api.config()["cpu-config"] is None


def test_boot_source_files_are_opened_at_once_and_closed_when_replaced(api, kernel):
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": kernel, "boot_args": "quiet"})
    first = api.session.resources.require_boot_source()
    os.unlink(kernel)
    assert os.pread(first.kernel_fd, 10, 0) == b"kernel"
    assert os.pread(first.initrd_fd, 10, 0) == b"kernel"
    assert not os.get_inheritable(first.kernel_fd)
    assert first.command_line == "quiet"
    # The file is gone: the new boot source is refused, and the old one stays.
    api.fault("PUT", "/boot-source", {"kernel_image_path": kernel})
    assert api.session.resources.require_boot_source() is first
    other = kernel + "2"
    with open(other, "wb"):
        pass
    descriptors = len(os.listdir("/proc/self/fd"))
    assert api.send("PUT", "/boot-source", {"kernel_image_path": other})[0] == 204
    assert first.kernel_fd == -1
    second = api.session.resources.require_boot_source()
    assert second.command_line == DEFAULT_COMMAND_LINE
    assert second.initrd_fd == -1
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1  # two closed, one opened


def test_a_refused_boot_source_leaks_no_descriptor(api, kernel):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        api.fault("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": kernel, "boot_args": "\0"})
        api.fault("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": "nix"})
        api.fault("PUT", "/boot-source", {"kernel_image_path": "/dev/null"})
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fifo_as_kernel_does_not_block(api, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    message = api.fault("PUT", "/boot-source", {"kernel_image_path": fifo})
    assert message == "Boot source error: The kernel file cannot be opened: not a regular file"


def test_serial(api):
    bucket = {"size": 10, "refill_time": 100, "one_time_burst": None, "anything": 1}
    assert api.send("PUT", "/serial", {"serial_out_path": "x", "rate_limiter": bucket})[0] == 204
    serial = api.session.resources.serial
    assert serial.serial_out_path == "x"
    assert serial.rate_limiter is not None
    assert serial.rate_limiter._asdict() == {"size": 10, "one_time_burst": None, "refill_time": 100}
    assert api.send("PUT", "/serial", {"serial_out_path": None})[0] == 204
    assert api.session.resources.serial.serial_out_path is None
    assert api.session.resources.open_serial_output() == -1
