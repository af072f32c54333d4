"""The configuration file."""

from __future__ import annotations

import json
import os

import pytest

from base.event_manager import EventManager
from vmm.api.dispatch import Dispatcher
from vmm.config import file as config_file
from vmm.config.file import ConfigFileError
from vmm.config.resources import VmResources
from vmm.observe.logger import DEBUG, Logger
from vmm.observe.metrics import Metrics
from vmm.session import Session

VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)
FAILED = "Configuration for VMM from one single json failed: "


@pytest.fixture
def load(tmp_path, kernel):
    """Return a function that loads a document (bytes, or what JSON is made of) into fresh resources."""
    loggers = []
    events = EventManager()

    def load_document(document):
        path = tmp_path / "config.json"
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        resources = VmResources()
        loggers.append(Logger("test"))
        try:
            session = Session(resources, "test", cannot_build, events, logger=loggers[-1], metrics=Metrics())
            Dispatcher(session).apply(config_file.parse(config_file.read(str(path))))
        finally:
            resources.close()
        return resources, loggers[-1]

    yield load_document
    for logger in loggers:
        logger.close()
    events.close()


def cannot_build(*_arguments, **_named):
    raise AssertionError("a document only configures")


@pytest.fixture
def minimal(kernel):
    return {"boot-source": {"kernel_image_path": kernel}, "drives": []}


def test_minimal(load, minimal, kernel):
    resources, _ = load(minimal)
    assert resources.boot_source.config.kernel_image_path == kernel
    assert resources.machine_config.vcpu_count == 1


def test_full(load, minimal, tmp_path):
    log = str(tmp_path / "log")
    resources, logger = load(
        {
            **minimal,
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": False, "track_dirty_pages": True},
            "logger": {"log_path": log, "level": "Debug", "show_level": True, "show_log_origin": False},
            "network-interfaces": [],
            "pmem": [],
            "balloon": None,
            "cpu-config": None,
            "metrics": None,
            "mmds-config": None,
            "vsock": None,
            "entropy": None,
            "memory-hotplug": None,
            "something-else": {"is": ["ignored"]},
        }
    )
    assert resources.machine_config.mem_size_mib == 1024
    assert logger.level == DEBUG
    assert os.path.exists(log)


def test_what_get_vm_config_shows_can_be_loaded(load, minimal):
    shown = load(minimal)[0].to_json()
    assert load(shown)[0].to_json() == shown


@pytest.fixture
def everything(minimal, kernel, tmp_path):
    """A document with every section."""
    return {
        **minimal,
        "drives": [{"drive_id": "data", "is_root_device": False, "path_on_host": kernel}],
        "network-interfaces": [
            {"iface_id": "eth1", "host_dev_name": "tap1"},
            {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02", "mtu": 1400},
        ],
        "mmds-config": {"network_interfaces": ["eth0"], "version": "V2"},
        "vsock": {"guest_cid": 3, "uds_path": "v.sock", "vsock_id": None},
        "balloon": {"amount_mib": 100, "deflate_on_oom": False},
        "entropy": {},
        "pmem": [{"id": "root", "path_on_host": "nix", "root_device": True}],
        "memory-hotplug": {"total_size_mib": 256},
        "cpu-config": {"kvm_capabilities": ["!56"]},
        "metrics": {"metrics_path": str(tmp_path / "metrics"), "emit_id": True},
    }


def test_every_section_is_applied_and_shown(load, everything, kernel, tmp_path):
    resources, _ = load(everything)
    assert resources.cpu_template.kvm_capabilities == [(56, False)]
    assert (tmp_path / "metrics").exists()
    shown = resources.to_json()
    assert shown == {
        "balloon": {"amount_mib": 100, "deflate_on_oom": False, "stats_polling_interval_s": 0,
                    "free_page_hinting": False, "free_page_reporting": False},
        "drives": [{"drive_id": "data", "partuuid": None, "is_root_device": False, "cache_type": "Unsafe",
                    "is_read_only": False, "path_on_host": kernel, "rate_limiter": None, "io_engine": "Sync",
                    "socket": None}],
        "boot-source": {"kernel_image_path": kernel, "initrd_path": None, "boot_args": None},
        "cpu-config": None,
        "logger": None,
        "machine-config": resources.machine_config.to_json(),
        "metrics": None,
        "mmds-config": {"version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.254",
                        "imds_compat": False},
        "network-interfaces": [
            {"iface_id": "eth1", "host_dev_name": "tap1", "guest_mac": None, "mtu": None, "rx_rate_limiter": None,
             "tx_rate_limiter": None},
            {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1400,
             "rx_rate_limiter": None, "tx_rate_limiter": None},
        ],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "entropy": {"rate_limiter": None},
        "pmem": [{"id": "root", "path_on_host": "nix", "root_device": True, "read_only": False, "rate_limiter": None}],
        "memory-hotplug": {"total_size_mib": 256, "block_size_mib": 2, "slot_size_mib": 128},
    }  # fmt: skip
    assert load(shown)[0].to_json() == shown


def test_a_cpu_template_may_be_in_a_file(load, minimal, tmp_path):
    path = tmp_path / "template.json"
    path.write_text('{"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1x0"}]}')
    resources, _ = load({**minimal, "cpu-config": str(path)})
    assert resources.cpu_template.msr_modifiers == [(0x10A, (0b101, 0b100))]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"[]", "Invalid JSON: invalid length 0, expected struct VmmConfig with 13 elements at line 1 column 2"),
        (b"{}", "Invalid JSON: missing field `drives` at line 1 column 2"),
        (b'{"drives": []}', "Invalid JSON: missing field `boot-source` at line 1 column 14"),
        (b'{"drives": null}', "Invalid JSON: invalid type: null, expected a sequence at line 1 column 15"),
        (b'{"drives": [], "drives": []}', "Invalid JSON: duplicate field `drives` at line 1 column 23"),
        (b'{"boot-source": {}}', "Invalid JSON: missing field `kernel_image_path` at line 1 column 18"),
        (b'{"drives": [{"drive_id": "a"}]}', "Invalid JSON: missing field `is_root_device` at line 1 column 29"),
        (b'{"pmem": [1]}', "Invalid JSON: invalid type: integer `1`, expected struct PmemConfig at line 1 column 11"),
        (b'{"cpu-config": "/nix"}',
         ("Invalid JSON: The CPU template /nix cannot be used: No such file or directory (os error 2) "
         "at line 1 column 22")),
        (b'{"x": nul}', "Invalid JSON: expected ident at line 1 column 10"),
        (b'{\n "machine-config": {\n  "vcpu_count": 300}}',
         "Invalid JSON: invalid value: integer `300`, expected u8 at line 3 column 19"),
        (b'{"x": "\xff"}', "Invalid JSON: invalid unicode code point at line 1 column 9"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(load, document, message):
    with pytest.raises(ConfigFileError) as error:
        load(document)
    assert str(error.value) == FAILED + message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"boot-source": {"kernel_image_path": "nix"}},
         "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"),
        ({"machine-config": {"vcpu_count": 0, "mem_size_mib": 1}},
         VCPUS),
        ({"logger": {"log_path": "/nix/log"}},
         "Logger error: Failed to open target file: No such file or directory (os error 2)"),
        ({"drives": [{"drive_id": "a", "is_root_device": True}]},
         "Drive config error: Unable to create the virtio block device: Invalid block config."),
        ({"vsock": {"guest_cid": 2, "uds_path": "v"}},
         "Vsock config error: The guest CID 2 is reserved: it must be at least 3."),
        ({"balloon": {"amount_mib": 129, "deflate_on_oom": True}},
         "Balloon config error: Amount of pages requested is too large."),
        ({"mmds-config": {"network_interfaces": ["eth0"]}},
         ("MMDS config error: The list of network interface IDs provided contains at least one ID that does not "
         "correspond to any existing network interface.")),
        ({"metrics": {"metrics_path": "/nix/metrics"}},
         ("Metrics error: Cannot initialize the metrics system due to bad user input: "
         "No such file or directory (os error 2)")),
        ({"memory-hotplug": {"total_size_mib": 64}},
         "Memory hotplug config error: Total size must not be lower than slot size (128 MiB)"),
    ],
)  # fmt: skip
def test_sections_that_are_refused(load, minimal, sections, message):
    with pytest.raises(ConfigFileError) as error:
        load({**minimal, **sections})
    assert str(error.value) == FAILED + message


def test_files_that_cannot_be_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(config_file.MAX_SIZE + 1)
    for path, reason in (
        ("/nix", "No such file or directory (os error 2)"),
        ("/", "Is a directory (os error 21)"),
        (str(fifo), "not a regular file"),
        (str(large), "the file is larger than 1048576 bytes"),
        ("a\0b", "file name contained an unexpected NUL byte"),
    ):
        with pytest.raises(ConfigFileError) as error:
            config_file.read(path)
        assert str(error.value) == f"Unable to open or read from the configuration file: {reason}"
    with open(large, "wb") as file:
        file.truncate(config_file.MAX_SIZE)
    assert len(config_file.read(str(large))) == config_file.MAX_SIZE
