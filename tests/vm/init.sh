#!/bin/busybox sh
# Process 1 of the guest (in the initramfs): puts a throw-away layer over the host's read-only root, runs /command in it,
# and tells the host on the second serial port: "guest-up", the command's output, "guest-exit N".
# $REPO, $MODULES and $UNDER (init: nothing, or systemd) come from /settings, which tests/vm/initramfs.py writes.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /host /rw /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
. /settings

say() { echo "$1" >/dev/ttyS1; }
give_up() { say "guest-failed $1"; poweroff -f; }

stty -F /dev/ttyS1 raw
for module in /modules/*.ko; do
    insmod "$module" || give_up "insmod $module"
done
mount -t virtiofs -o ro host /host || give_up "mount of the host's root"
mount -t tmpfs tmpfs /rw && mkdir /rw/upper /rw/work || give_up "mount of the writable layer"
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /root || give_up "mount of the overlay"
cd /root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t bpf bpf sys/fs/bpf
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -t devpts devpts dev/pts
for dir in dev/shm run tmp; do mount -t tmpfs tmpfs "$dir"; done
# The host may keep this kernel's modules elsewhere than in /lib/modules (deploy/install-deps.sh unpacks them in .cache).
[ -d "lib/modules/$(uname -r)" ] || mkdir -p "lib/modules/$(uname -r)"
mount --bind "./$MODULES" "lib/modules/$(uname -r)" || give_up "bind mount of the modules"
ip link set lo up
cp /command run/command
# Either way this very process changes its root: kernel threads share it, and look for modprobe there when a module is to
# be loaded.
if [ "$UNDER" = systemd ]; then
    # Of the host's own units only what a boot cannot do without: nothing here is to reach for its network or its disks.
    mkdir -p run/systemd/system
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-timesyncd.service systemd-tmpfiles-setup.service \
        systemd-update-utmp.service systemd-remount-fs.service systemd-networkd.service; do
        ln -s /dev/null "run/systemd/system/$unit"
    done
    cat >run/systemd/system/command.service <<END
[Service]
WorkingDirectory=$REPO
Environment=HOME=/root LANG=C.UTF-8 TERM=dumb
ExecStart=/bin/bash -c '(echo guest-up; source /run/command) </dev/null >/dev/ttyS1 2>&1; echo "guest-exit \$?" >/dev/ttyS1; busybox poweroff -f'
END
    exec switch_root /root /lib/systemd/systemd --unit=command.service
fi
say guest-up
exec env -i HOME=/root LANG=C.UTF-8 TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /bin/chroot /root /bin/bash -c '
        cd "$1"
        (source /run/command) </dev/null >/dev/ttyS1 2>&1
        echo "guest-exit $?" >/dev/ttyS1
        busybox poweroff -f
    ' init "$REPO"
