"""Every "must" of docs/formats/ is kept by somebody: a test attacks it, or it is said who else has to keep it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from devtool.project import ROOT

FORMATS = ROOT / "docs" / "formats"
_MUST = re.compile(r"\bmust\b", re.IGNORECASE)
#: Instead of a test: it is asked of whoever writes a client.
OF_CLIENTS = "clients"

#: (page, words of the line with the "must") → the tests that try what must not be.
MUSTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("api.md", "a request that has begun must be complete"): (
        "tests/unit/vmm/api/test_server.py::test_a_client_that_does_not_finish_its_request_loses_its_connection",
        "tests/unit/vmm/api/test_server.py::test_a_client_that_does_not_take_its_response_loses_its_connection",
    ),
    ("api.md", "`drives` (a list) must be there"): ("tests/unit/vmm/config/test_file.py",),
    ("device-page.md", "A local answer must be what the device would have answered"): (
        "tests/unit/vmm/devices/legacy/test_i8042.py::test_the_published_status_is_what_the_device_would_answer",
    ),
    ("events.md", "a worker sent what it must not"): (
        "tests/unit/vmm/cells/test_worker_hostile.py::test_a_breach_ends_the_worker_and_is_named",
    ),
    ("events.md", "Clients must accept further events"): (OF_CLIENTS,),
    ("exit-ring.md", "worker's filter must refuse F_SETFL and FIONBIO"): (
        "tests/jail/test_attacks.py::test_each_wall_alone_stops_the_attack",
        "tests/jail/test_attack_table.py::test_every_attempt_with_every_wall_on",
    ),
    ("exit-ring.md", "must: to set the flag again or to poll before a write"): (
        "tests/jail/test_attacks.py::test_attack_succeeds_without_its_walls",
    ),
    ("exit-ring.md", "where a store must be seen before a load is made"): (
        "tests/unit/ipc/test_shared_memory_fence.py::test_fence_orders_store_before_load",
        "tests/unit/ipc/test_exit_ring_schedules.py",
    ),
    ("exit-ring.md", "It must do so before it makes a call of its own"): (
        "tests/unit/ipc/test_exit_ring.py::test_a_producer_killed_in_a_call_leaves_the_entry_open",
        "tests/kvm/test_worker_replacement.py::test_a_successor_writes_nothing_into_the_ring_before_it_runs",
    ),
    ("guest-memory.md", "The entry that is used must lie in a segment"): (
        "tests/unit/vmm/boot/test_loader.py::test_an_elf_entry_outside_the_kernel_matters_only_where_it_is_used",
        "tests/unit/vmm/boot/test_elf.py::test_a_pvh_entry_outside_the_kernel_is_refused",
    ),
    ("guest-memory.md", "It must have init_size bytes of RAM"): (
        "tests/unit/vmm/boot/test_bzimage.py::test_the_room_for_unpacking_must_be_there",
    ),
    ("kernel-cache.md", "Directory and entry must belong to root or to the user"): (
        "tests/unit/vmm/boot/test_kernel_cache.py::test_a_directory_that_others_can_write_is_refused",
        "tests/unit/vmm/boot/test_kernel_cache.py::test_foreign_owners_are_refused",
        "tests/unit/vmm/boot/test_kernel_cache.py::test_unsound_entries_are_as_good_as_missing",
    ),
    ("kernel-cache.md", "it must come from a read-only mount of its own"): (
        "tests/jail/test_walls.py::test_the_kernel_cache_leads_nowhere_else",
    ),
    ("messages.md", "They must be in a row"): (
        "tests/unit/ipc/test_channel_sequencer.py::test_too_many_refused_frames_in_a_row_end_the_channel",
        "tests/unit/vmm/cells/test_worker_hostile.py::test_frames_that_are_refused_now_and_then_are_tolerated",
    ),
    ("messages.md", "A peer that never stops sending must not keep the receiver there"): (
        "tests/unit/vmm/cells/test_worker_hostile.py::test_a_flood_is_a_breach_and_does_not_keep_the_loop",
        "tests/unit/vmm/cells/test_worker_hostile.py::test_a_flood_of_a_worker_that_cannot_be_killed_does_not_keep_the_loop",
    ),
    ("messages.md", "(RLIMIT_DATA or its cgroup) must end it"): (
        "tests/unit/ipc/test_channel_hostile.py::test_an_endless_message_is_stopped_by_the_memory_limit_only",
    ),
    ("overlay.md", "bit must not be in the durable map before"): (
        "tests/unit/virtio/block/overlay/test_engine_crashes.py::test_the_power_may_go_before_every_single_write",
        "tests/unit/virtio/block/overlay/test_engine_crashes.py::test_a_flush_does_not_speak_of_what_was_written_after_it",
    ),
    ("overlay.md", "The volatile map must be believed only if the"): (
        "tests/unit/virtio/block/overlay/test_file.py::test_the_volatile_map_counts_under_the_kernel_that_it_was_written_under",
    ),
    ("overlay.md", "A header must be written after everything else"): (
        "tests/unit/virtio/block/overlay/test_file.py::test_an_overlay_is_there_as_a_whole_or_can_be_made_again",
    ),
    ("overlay.md", "A base must have the size and the 48 checksums"): (
        "tests/unit/virtio/block/overlay/test_file.py::test_a_base_of_another_size_is_refused",
        "tests/unit/virtio/block/overlay/test_file.py::test_a_base_that_was_written_to_is_refused",
    ),
    ("overlay.md", "the overlay must not serve a machine"): (
        "tests/unit/virtio/block/overlay/test_file.py::test_an_overlay_that_is_being_committed_serves_nobody",
    ),
    ("vcpu-state.md", "What must come before what, and why"): (
        "tests/kvm/test_worker_replacement.py::test_the_whole_state_arrives",
        "tests/unit/vcpu_worker/test_state.py::test_a_one_shot_timer_that_has_fired_does_not_start_again",
    ),
}


def lines_with_must(folder: Path) -> list[tuple[str, str]]:
    """Return (page, line) of every line that says "must"."""
    return [
        (page.name, line)
        for page in sorted(folder.glob("*.md"))
        for line in page.read_text().splitlines()
        if _MUST.search(line)
    ]


def is_there(test: str) -> bool:
    """Does this test function (or file of tests) exist?"""
    path, _, name = test.partition("::")
    file = ROOT / path
    if not file.is_file():
        return False
    functions = {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
    return not name or name in functions


def without_row(lines: list[tuple[str, str]], rows: set[tuple[str, str]]) -> list[str]:
    """Return the lines that no row speaks of."""
    return [f"{page}: {line}" for page, line in lines if not any(p == page and words in line for p, words in rows)]


def test_every_must_has_a_row():
    missing = without_row(lines_with_must(FORMATS), set(MUSTS))
    assert not missing, "attack it in a test, and name the test in MUSTS:\n" + "\n".join(missing)


def test_every_row_is_of_a_must_that_is_there():
    lines = lines_with_must(FORMATS)
    assert not [row for row in MUSTS if not any(page == row[0] and row[1] in line for page, line in lines)]


def test_every_test_that_is_named_is_there():
    assert not [test for tests in MUSTS.values() for test in tests if test != OF_CLIENTS and not is_there(test)]


def test_a_must_without_a_row_is_found(tmp_path):
    (tmp_path / "page.md").write_text("A peer MUST wait.\nIt mustn't.\nIt must not look.\n")
    lines = lines_with_must(tmp_path)
    assert [line for _, line in lines] == ["A peer MUST wait.", "It must not look."]
    assert without_row(lines, {("page.md", "must not look")}) == ["page.md: A peer MUST wait."]
    assert not is_there("tests/no_such_file.py::test")
    assert not is_there("tests/unit/house/test_musts.py::test_that_nobody_wrote")
