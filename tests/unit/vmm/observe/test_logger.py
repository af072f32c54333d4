"""The log: line format, targets, losses, limits."""

from __future__ import annotations

import os
import re
import time

import pytest

from vmm.cli import parse
from vmm.observe import logger as module
from vmm.observe.logger import (
    DEBUG,
    ERROR,
    INFO,
    OFF,
    TRACE,
    WARN,
    LimitedSite,
    Logger,
    LoggerConfig,
    LoggerConfigError,
    level_by_name,
)

STAMP = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{9}"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "log")


@pytest.fixture
def logger(path):
    logger = Logger("vm-1")
    logger.configure(LoggerConfig(path))
    yield logger
    logger.close()


def lines(path):
    with open(path) as file:
        return file.read().splitlines()


def test_format(logger, path):
    logger.info("hello")
    logger.error("from the API", thread="fc_api")
    logger.configure(LoggerConfig(show_level=True))
    logger.warn("level")
    logger.configure(LoggerConfig(show_log_origin=True))
    logger.log("Warn", "origin")
    found = lines(path)
    assert re.fullmatch(rf"{STAMP} \[vm-1:main\] hello", found[0])
    assert re.fullmatch(rf"{STAMP} \[vm-1:fc_api\] from the API", found[1])
    assert re.fullmatch(rf"{STAMP} \[vm-1:main:WARN\] level", found[2])
    assert re.fullmatch(rf"{STAMP} \[vm-1:main:WARN:tests/unit/vmm/observe/test_logger.py:\d+\] origin", found[3])


def test_timestamp_is_local_time(logger, path, monkeypatch):
    before = time.time()
    logger.info("x")
    text = lines(path)[0].split(" ")[0]
    stamp = time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) + float(text[19:])
    assert before - 1 <= stamp <= time.time() + 1


@pytest.mark.parametrize("level", [OFF, ERROR, WARN, INFO, DEBUG, TRACE])
def test_levels(logger, path, level):
    logger.configure(LoggerConfig(level=level, show_level=True))
    for name in ("error", "warn", "info", "debug", "trace"):
        getattr(logger, name)("x")
    assert [line.partition("]")[0].rpartition(":")[2] for line in lines(path)] == [
        "ERROR", "WARN", "INFO", "DEBUG", "TRACE",
    ][:level]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "level"),
    [("Off", OFF), ("ERROR", ERROR), ("wArN", WARN), ("warning", WARN), ("Info", INFO), ("debug", DEBUG), ("x", None)],
)
def test_level_names(name, level):
    assert level_by_name(name) == level


def test_a_configuration_without_a_level_means_info(logger):
    logger.configure(LoggerConfig(level=DEBUG, show_level=True))
    logger.configure(LoggerConfig())
    assert (logger.level, logger.show_level) == (INFO, True)


def test_module_filter(logger, path):
    logger.configure(LoggerConfig(module="vmm::api"))
    logger.error("from a test")
    logger.configure(LoggerConfig(module=__name__.rpartition(".")[0]))
    logger.error("seen")
    assert [line.rpartition("] ")[2] for line in lines(path)] == ["seen"]


def test_a_target_that_cannot_be_opened_changes_nothing(logger, path):
    with pytest.raises(
        LoggerConfigError, match=r"Failed to open target file: No such file or directory \(os error 2\)"
    ):
        logger.configure(LoggerConfig("/nix/log", TRACE, show_level=True))
    assert (logger.level, logger.show_level) == (INFO, False)
    logger.info("still here")
    assert len(lines(path)) == 1


def test_the_file_is_appended_to_and_not_inherited(logger, path):
    logger.info("1")
    second = Logger("vm-2")
    second.configure(LoggerConfig(path))
    second.info("2")
    logger.info("3")
    second.close()
    assert [line[-1] for line in lines(path)] == ["1", "2", "3"]
    assert not os.get_inheritable(logger._fd)


def test_lines_cannot_be_broken_up_by_what_is_logged(logger, path):
    logger.info("a\nb\r\x1b[31m\x00\x7f\x9b\u2028é\udce4")
    [line] = lines(path)[0:1]
    assert line.endswith("] a\\nb\\r\\x1b[31m\\x00\\x7f\\x9b\\u2028é\\udce4")


def test_a_long_message_is_cut(logger, path):
    logger.info("x" * (module.MAX_MESSAGE + 1))
    [line] = lines(path)
    assert line.endswith(f"x… ({module.MAX_MESSAGE + 1} characters)")


def test_a_fifo_without_a_reader_takes_what_fits_and_counts_the_rest(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    logger = Logger("vm-1")
    logger.configure(LoggerConfig(fifo))
    for _ in range(200):
        logger.info("x" * 1000)
    assert 0 < logger.missed_log_count < 200
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    taken = 0
    while taken < 200 - logger.missed_log_count:
        taken += os.read(reader, 1 << 20).count(b"\n")
    logger.info("again")
    assert os.read(reader, 1 << 20).endswith(b"again\n")
    os.close(reader)
    logger.close()


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    logger = Logger("vm-1")
    logger.configure(LoggerConfig(fifo))
    for _ in range(3):
        logger.info("y" * 60_000)  # larger than what a pipe takes at once: written in part
    assert logger.missed_log_count >= 1
    data = b""
    while True:
        try:
            data += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
    logger.info("whole")
    data += os.read(reader, 1 << 20)
    assert re.fullmatch(rf"{STAMP} \[vm-1:main\] whole", data.decode().splitlines()[-1])
    os.close(reader)
    logger.close()


def test_an_inherited_pipe_that_is_full_does_not_block():
    reader, writer = os.pipe()  # blocking, as standard output is
    logger = Logger("vm-1")
    logger.use_descriptor(writer)
    for _ in range(100):
        logger.info("z" * 5000)
    assert logger.missed_log_count > 0
    assert os.get_blocking(writer)
    logger.close()
    assert os.fstat(writer)  # the descriptor is the caller's
    os.close(reader)
    os.close(writer)


def test_a_closed_reader_is_a_loss_and_no_error():
    reader, writer = os.pipe()
    logger = Logger("vm-1")
    logger.use_descriptor(writer)
    os.close(reader)
    logger.info("nobody")
    assert logger.missed_log_count == 1
    os.close(writer)


def test_limited_site(logger, path, monkeypatch):
    now = [0]
    monkeypatch.setattr("vmm.observe.logger.time.monotonic_ns", lambda: now[0])
    site = LimitedSite(logger, "UART overrun")
    for number in range(25):
        site.warn(f"line {number}")
    site.debug("below the level: not counted")
    assert len(lines(path)) == module.LIMIT_LINES
    assert (site.suppressed, logger.rate_limited_log_count) == (15, 15)
    now[0] = module.LIMIT_NS - 1
    site.error("still held back")
    now[0] = module.LIMIT_NS
    site.info("after the pause")
    assert [line.rpartition("] ")[2] for line in lines(path)[-2:]] == [
        "16 log lines were held back: UART overrun",
        "after the pause",
    ]
    site.flush()
    assert len(lines(path)) == module.LIMIT_LINES + 2
    other = LimitedSite(logger, "other")
    other.info("each site has its own limit")
    assert len(lines(path)) == module.LIMIT_LINES + 3


def test_limited_site_reports_its_callers_place(logger, path):
    logger.configure(LoggerConfig(show_log_origin=True))
    LimitedSite(logger, "x").error("where")
    assert "test_logger.py" in lines(path)[0]


def test_configuration_of_a_command_line():
    line = parse(["--log-path", "p", "--level", "Warning", "--show-level", "--module", "vmm"])
    assert LoggerConfig.of(line) == LoggerConfig("p", WARN, True, None, "vmm")
    assert LoggerConfig.of(parse([])) == LoggerConfig()
