# Process 1 of the lab: takes orders from lab/runner.py over a virtio-serial port and runs commands.
#   run JOB   runs .lab/JOB/script of the exchange folder; answers `exit JOB STATUS` after its output went out
#   shell JOB the same on the console hvc0, with job control
# Output goes over two more ports. When the host's side closes the port, the machine goes off.
# Not a function: in the background that would be one process more, and a kill of it would leave the program running.
busybox=/run/lab/bin/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="${HOME:-/root}"
exchange=/run/lab/exchange

for port in /sys/class/virtio-ports/*; do
    read -r name <"$port/name"
    case $name in
    cellblock.control) exec 3<>"/dev/${port##*/}" ;;
    cellblock.stdout) exec 4>"/dev/${port##*/}" ;;
    cellblock.stderr) exec 5>"/dev/${port##*/}" ;;
    esac
done
$busybox mkfifo /run/lab/stdout /run/lab/stderr

run() {
    # Through pipes, because a port can be opened only once and commands may reopen their standard output.
    $busybox cat /run/lab/stdout >&4 3>&- 5>&- &
    out=$!
    $busybox cat /run/lab/stderr >&5 3>&- 4>&- &
    err=$!
    $busybox setsid /bin/sh "$exchange/.lab/$1/script" </dev/null >/run/lab/stdout 2>/run/lab/stderr 3>&- 4>&- 5>&-
    status=$?
    # What the command left running may hold the pipes: its output is cut off after two seconds.
    { $busybox sleep 2; kill "$out" "$err"; } 2>/dev/null 3>&- 4>&- 5>&- &
    limit=$!
    wait "$out"
    wait "$err"
    kill "$limit" 2>/dev/null
    wait "$limit"
    echo "exit $1 $status" >&3
}

# The kernel has started the first processor only. The others come when nothing changes the kernel's code any more.
$busybox setsid /usr/bin/python3 -IS /run/lab/bin/keep_vm.py </dev/null >/run/lab/stdout 3>&- 4>&- 5>&- &
read -r kept </run/lab/stdout
[ "$kept" = kept ] || { echo "lab: no virtual machine can be kept: see lab/keep_vm.py" >/dev/console; $busybox poweroff -f; }
for processor in /sys/devices/system/cpu/cpu[1-9]*/online; do
    echo 1 >"$processor" || { echo "lab: $processor does not start" >/dev/console; $busybox poweroff -f; }
done
# No virtual machine may run on the first processor. Whenever any processor restores FPU state, QEMU
# clears a bit of the first one's flags (cpu_clear_ignne), without a lock: it may undo what VMRUN or an exit has just done
# there to the global interrupt flag. A guest then never lets the lab have that processor back, or the kernel is
# interrupted while it still has the guest's GS.
for process in $! $$; do
    $busybox taskset -p -c "1-$(($($busybox nproc) - 1))" "$process" >/dev/null
done

echo ready >&3
while read -r order job <&3; do
    case $order in
    run) run "$job" ;;
    shell)
        $busybox setsid -c /bin/sh "$exchange/.lab/$job/script" </dev/hvc0 >/dev/hvc0 2>&1 3>&- 4>&- 5>&-
        echo "exit $job $?" >&3
        ;;
    off) break ;;
    esac
done
$busybox sync
$busybox poweroff -f
