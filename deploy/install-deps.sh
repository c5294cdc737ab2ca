#!/bin/bash
# Installs the Debian 12 packages that coloebpf needs: `install-deps.sh lab` (default), `test`, or `package` for `make deb`; on a host
# with guests of its own `host`, for `make xen-lab` `xen-lab`.
# Calls apt only when something is missing, and leaves no service of Debian's running.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)

# What runs coloebpf.
host_packages=(python3-bpfcc python3-cryptography linux-headers-amd64 bpftool iproute2 ethtool python3-venv python3-pip procps kmod)
# What its lab needs on top of it.
lab_packages=(redis-server redis-tools qemu-system-x86 busybox-static cpio dropbear-bin)
# What the tests and benchmarks drive on top of it.
test_packages=(qemu-system-common qemu-utils gcc libc6-dev nginx-light curl iperf3 nftables tcpdump
               prometheus etcd-server systemd jq)
# What builds the Debian package, and what its tests make a clean root file system with.
package_packages=(debhelper dh-python python3-venv python3-pip lintian mmdebstrap)
# What makes and boots the Xen hosts of tests/xen.
xen_lab_packages=(mmdebstrap openssh-client e2fsprogs gcc libc6-dev libxen-dev)
# Servers whose packages would start them at once and at each boot; the lab starts its own copies in its namespaces.
services=(redis-server nginx prometheus etcd)

die() { echo "install-deps: $*" >&2; exit 1; }

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt() { apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -qq "$@"; }

update_once() {
    [ -n "${updated:-}" ] && return
    echo "install-deps: apt-get update"
    apt update
    updated=1
}

# policy-rc.d is Debian's way to say "start nothing"; one that is there already stays as it is.
forbid_service_starts() {
    local policy=/usr/sbin/policy-rc.d
    [ -e "$policy" ] && return
    printf '#!/bin/sh\n# Of coloebpf deploy/install-deps.sh, for the time of one apt-get.\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
}

install_missing() {
    local missing=() package service
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" -eq 0 ] || die "missing ${missing[*]}: run as root once, or install them with apt-get"
    update_once
    echo "install-deps: apt-get install ${missing[*]}"
    forbid_service_starts
    DEBIAN_FRONTEND=noninteractive apt install --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
    # Under systemd a new server would start at the next boot; one that was here before us is not ours to stop.
    [ -d /run/systemd/system ] || return 0
    for service in "${services[@]}"; do
        case " ${missing[*]} " in *" $service"*) systemctl disable --now --quiet "$service" || true ;; esac
    done
}

# The kernel that virtual machines boot is unpacked, not installed: an installed one could become this machine's own at its next boot.
fetch_vm_kernel() {
    local cache=$repo/.cache/vm-kernel package
    compgen -G "/boot/vmlinuz-*-cloud-amd64" >/dev/null && return
    compgen -G "$cache/boot/vmlinuz-*-cloud-amd64" >/dev/null && return
    update_once
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-6[^ ]*-cloud-amd64\).*/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64: is this Debian 12?"
    echo "install-deps: unpacking $package into $cache"
    rm -rf "$cache" && mkdir -p "$cache/download"
    (cd "$cache/download" && apt -o APT::Sandbox::User=root download "$package")
    dpkg-deb -x "$cache"/download/*.deb "$cache"
    rm -r "$cache/download"
    depmod -b "$cache" "${package#linux-image-}"
}

case "${1:-lab}" in
    host) install_missing "${host_packages[@]}" ;;
    lab)
        install_missing "${host_packages[@]}" "${lab_packages[@]}"
        fetch_vm_kernel
        ;;
    test)
        install_missing "${host_packages[@]}" "${lab_packages[@]}" "${test_packages[@]}" "${package_packages[@]}"
        fetch_vm_kernel
        ;;
    package) install_missing "${package_packages[@]}" ;;
    xen-lab) install_missing "${host_packages[@]}" "${lab_packages[@]}" "${xen_lab_packages[@]}" ;;
    pictures) install_missing graphviz ;;
    *) die "usage: install-deps.sh [host|lab|test|package|xen-lab|pictures]" ;;
esac
