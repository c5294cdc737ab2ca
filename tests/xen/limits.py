"""The unit's limits on a host without systemd: capabilities, what can be written, and devices, as the unit's file says.

Not the filter of system calls, nor memory that is both writable and executable.
"""

from __future__ import annotations

import re
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy/systemd/coloebpf.service"
# What DevicePolicy=closed allows by itself (systemd.resource-control(5)), and ptmx, which it adds.
PSEUDO = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
# RuntimeDirectory, StateDirectory, ConfigurationDirectory.
DIRECTORIES = ("/run/coloebpf", "/var/lib/coloebpf", "/etc/coloebpf")


def _words(key: str) -> list[str]:
    lines = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.M)
    return [word.lstrip("-") for line in lines for word in line.split()]


def script() -> str:
    """A shell script that runs its arguments as the unit would."""
    capabilities = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in _words("CapabilityBoundingSet"))
    allowed = [*PSEUDO, *(word.removeprefix("/dev/") for word in _words("DeviceAllow") if word.startswith("/dev/"))]
    return f"""#!/bin/bash
set -e
[ "$1" = limited ] || exec unshare --mount --propagation private "$0" limited "$@"
shift
mkdir -p -m 0700 /sys/fs/bpf/coloebpf {" ".join(DIRECTORIES)}
mount --bind /proc/sys /proc/sys
for path in {" ".join([*DIRECTORIES, *_words("ReadWritePaths")])}; do
    [ ! -e "$path" ] || mount --rbind "$path" "$path"
    writable="$writable $(readlink -f "$path") "
done
for place in $(awk '{{ print $2 }}' /proc/mounts | sort -u); do
    case "$place" in /dev* | /proc | /proc/xen) continue ;; esac
    case "$writable" in *" $place "*) continue ;; esac
    mount -o remount,bind,ro "$place"
done
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/tmp
mount -t tmpfs -o mode=755 tmpfs /mnt
for device in {" ".join(allowed)}; do
    [ ! -e "/dev/$device" ] || {{ mkdir -p "/mnt/$(dirname "$device")" && cp -a "/dev/$device" "/mnt/$device"; }}
done
for place in pts shm; do mkdir "/mnt/$place" && mount --rbind "/dev/$place" "/mnt/$place"; done
for link in fd stdin stdout stderr; do cp -a "/dev/$link" /mnt; done
mount -n --move /mnt /dev
ulimit -l unlimited
exec setpriv --no-new-privs --bounding-set=-all,{capabilities} "$@"
"""
