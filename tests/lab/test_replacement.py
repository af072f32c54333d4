"""Workers are replaced under a Debian guest with load on every CPU: contents stay right, no clock goes back."""

from __future__ import annotations

import hashlib
import random
import re
import time
from statistics import median

import pytest

from lab.client import Microvm
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, COMPLAINTS, config, jail, run

LINES = 3000
DIGEST = hashlib.md5("".join(f"{number}\n" for number in range(1, LINES + 1)).encode()).hexdigest()
#: On each CPU: pipes, forks and file pages, whose content must come out right.
CONTENT = (
    f'while [ -e /tmp/go ]; do seq {LINES} > /tmp/c$c; [ "$(cat /tmp/c$c | md5sum | cut -c1-32)" = {DIGEST} ] '
    "&& echo x >> /tmp/content$c || echo BAD-CONTENT; done"
)
#: The kernel's monotonic clock in ns, read now on one CPU, now on another: never less than before.
CLOCK = (
    "p=0; while [ -e /tmp/go ]; do for k in 1 2; do n=$(taskset $k sed -n 's/^now at \\([0-9]*\\).*/\\1/p' "
    "/proc/timer_list); [ ${n:-0} -ge $p ] && echo x >> /tmp/clock || echo BAD-CLOCK $p $n; p=$n; done; done"
)


def uptime(vm: Microvm) -> tuple[float, float, float]:
    """The guest's time since boot, and the host's clock before it was asked and after it has answered."""
    asked = time.monotonic()
    output = run(vm, "cat /proc/uptime")
    found = re.search(r"^(\d+\.\d+) \d+\.\d+\r?$", output, re.MULTILINE)
    assert found is not None, output
    return float(found.group(1)), asked, time.monotonic()


def replace_all_the_time(vm: Microvm, generator: random.Random, count: int, vcpus: int) -> None:
    for _ in range(count):
        vcpu = generator.randrange(vcpus)
        before = vm.must("GET", "/vcpus")[vcpu]
        vm.must("PATCH", f"/vcpus/{vcpu}", {"action": "Replace"})
        after = vm.must("GET", "/vcpus")[vcpu]
        assert after["pid"] != before["pid"]
        assert after["replacements"] == before["replacements"] + 1
        vm.pump(generator.random() * 0.5)


@pytest.mark.soak("smp")
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "where",
    [
        (2, "Split"),
        pytest.param((2, "Grouped"), marks=pytest.mark.soak("smp", only=True)),
        pytest.param((3, "0,1/2"), marks=pytest.mark.soak("smp", only=True)),
    ],
    ids=str,
)
def test_a_guest_under_load_does_not_notice(guest_image, no_leftovers, scale, seed, where):
    vcpus, placement = where
    generator = random.Random(seed)
    count = scale(6, 200 if placement == "Split" else 50)
    name = f"replace-{placement.replace(',', '').replace('/', '-').lower()}"
    with jail(name) as made, no_leftovers(names=(name,)):
        machine = {"vcpu_count": vcpus, "vcpu_placement": placement}
        path = config(made, guest_image, machine, "", "stay", patient=True)
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as vm:
            vm.expect("CELLBLOCK-READY", BOOT_TIMEOUT)
            begin = uptime(vm)
            run(vm, "mkdir -p /tmp; touch /tmp/go")
            run(vm, f"for c in $(seq {vcpus}); do ({CONTENT}) & done; ({CLOCK}) &")
            replace_all_the_time(vm, generator, count, vcpus)
            vm.must("PATCH", "/vcpus", {"action": "Replace"})
            progress = "for f in /tmp/content* /tmp/clock; do echo $f $(wc -l < $f); done"
            first = run(vm, progress)
            vm.pump(2.0)
            output = run(vm, f"{progress}; cat /sys/devices/system/cpu/online; {COMPLAINTS}")
            end = uptime(vm)
            run(vm, "rm /tmp/go")
            console = vm.console.decode(errors="replace")
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0
    times = [int(found) for found in re.findall(r"the guest stood still for (\d+) us", console)]
    print(
        f"\n{vcpus} vCPUs, {placement}: {len(times)} replacements, pause median {median(times)} us, "
        f"maximum {max(times)} us\n{output}"
    )
    assert "BAD" not in console.replace("echo BAD", ""), console[-3000:]
    assert "\nno complaint" in output
    assert re.search(rf"^0-{vcpus - 1}\r?$", output, re.MULTILINE)
    before, after = counts(first), counts(output)
    assert before.keys() == after.keys() and len(after) == vcpus + 1
    assert all(after[name] > before[name] for name in after), "somebody has stopped working"
    # A guest of the lab may take seconds to answer (docs/lab.md).
    guest, least, most = end[0] - begin[0], end[1] - begin[2], end[2] - begin[1]
    assert 0.98 * least < guest < 1.02 * most, (
        f"the guest's clock went on by {guest} s, the host's by {least} to {most} s"
    )


def counts(output: str) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(/tmp/\w+) (\d+)\r?$", output, re.MULTILINE)}
