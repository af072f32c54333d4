#!/bin/busybox sh
# First program of the lab: loads modules, builds a root file system from the host's, hands over to agent.sh.
# /modules/order names the modules in load order; on the host's side lab/runner.py wrote the exchange folder.
export PATH=/bin
die() { echo "lab: $*"; echo o >/proc/sysrq-trigger; sleep 10; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module parameters; do
    insmod "/modules/$module" $parameters || die "module $module does not load"
done </modules/order

over9p() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"; }
mkdir -p /lower /upper /exchange /keep /newroot
over9p host /lower ro,cache=loose || die "the host's root does not mount"
over9p exchange /exchange rw,cache=none || die "the exchange folder does not mount"
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /newroot || die "no overlay"

# Folders that must be empty and writable, as on a fresh machine. What the host's side needs of them is kept.
keep=0
while read -r path; do
    keep=$((keep + 1))
    mkdir -p "/keep/$keep"
    mount --bind "/newroot$path" "/keep/$keep" || die "$path is not there"
done </exchange/.lab/keep
for place in tmp run var/tmp srv/jailer; do
    mkdir -p "/newroot/$place"
    mount -t tmpfs -o "mode=$([ "${place%tmp}" = "$place" ] && echo 755 || echo 1777)" tmpfs "/newroot/$place"
done
keep=0
while read -r path; do
    keep=$((keep + 1))
    mkdir -p "/newroot$path"
    mount --move "/keep/$keep" "/newroot$path"
done </exchange/.lab/keep

for place in proc sys dev; do
    mkdir -p "/newroot/$place"
    mount --move "/$place" "/newroot/$place"
done
cd /newroot || die "no root"
mkdir -p dev/shm dev/pts run/lab/exchange run/lab/bin usr/lib/modules
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
ln -sf /proc/self/fd dev/fd
ln -sf fd/0 dev/stdin
ln -sf fd/1 dev/stdout
ln -sf fd/2 dev/stderr
mount -t cgroup2 cgroup2 sys/fs/cgroup
# What systemd does on a real machine: these controllers are there for the folders below.
echo "+cpu +memory +pids" >sys/fs/cgroup/cgroup.subtree_control
# The first memory cgroup makes the kernel rewrite its code, and so does the end of the last one: keep one, for the
# reason that keep_vm.py gives.
mkdir sys/fs/cgroup/kept
mount --move /exchange run/lab/exchange
read -r modules </newroot/run/lab/exchange/.lab/modules
mkdir -p "usr/lib/modules/$(uname -r)"
mount --bind "/newroot$modules" "usr/lib/modules/$(uname -r)"
cp /bin/busybox run/lab/bin/busybox
cp /agent.sh /keep_vm.py run/lab/bin/
hostname cellblock-lab
ip link set lo up
exec switch_root /newroot /run/lab/bin/busybox sh /run/lab/bin/agent.sh
