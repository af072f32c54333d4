"""The configuration file."""

from __future__ import annotations

import json
import os

import pytest

from vmm import config_file
from vmm.config_file import ConfigFileError
from vmm.logger import DEBUG, Logger
from vmm.resources import VmResources

VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)
FAILED = "Configuration for VMM from one single json failed: "


@pytest.fixture
def load(tmp_path, kernel):
    """Return a function that loads a document (bytes, or what JSON is made of) into fresh resources."""
    loggers = []

    def load_document(document):
        path = tmp_path / "config.json"
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        resources = VmResources()
        loggers.append(Logger("test"))
        try:
            config_file.load(str(path), resources, loggers[-1])
        finally:
            resources.close()
        return resources, loggers[-1]

    yield load_document
    for logger in loggers:
        logger.close()


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


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"[]", "Invalid JSON: invalid type: sequence, expected struct VmmConfig at line 1 column 0"),
        (b"{}", "Invalid JSON: missing field `drives` at line 1 column 2"),
        (b'{"drives": []}', "Invalid JSON: missing field `boot-source` at line 1 column 14"),
        (b'{"drives": null}', "Invalid JSON: invalid type: null, expected a sequence at line 1 column 15"),
        (b'{"drives": [], "drives": []}', "Invalid JSON: duplicate field `drives` at line 1 column 23"),
        (b'{"boot-source": {}}', "Invalid JSON: missing field `kernel_image_path` at line 1 column 18"),
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
        ({"drives": [{"drive_id": "a"}]}, "The section drives is not yet supported."),
        ({"vsock": {}}, "The section vsock is not yet supported."),
        ({"network-interfaces": [1]}, "The section network-interfaces is not yet supported."),
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
