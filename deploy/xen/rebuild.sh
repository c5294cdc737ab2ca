#!/bin/bash
# Rebuilds what Debian 12 builds without COLO, out of Debian's own source packages, into .deb files:
#     rebuild.sh tools [DIRECTORY [VERSION]]   libxl with COLO and with Remus' network buffer: libxenmisc4.17, xen-utils-common
#     rebuild.sh qemu [DIRECTORY [VERSION]]    Xen's device model with block replication: qemu-system-xen
#     rebuild.sh precopy [DIRECTORY]           a library for libxl's save helper (precopy/precopy.c): coloebpf-precopy
# VERSION of the source package: the one that the hosts have. Without it the newest, which is what `apt-get upgrade` gives them.
# For a build machine with Debian 12, as root: it works in a root file system of its own, which is gone afterwards; the
# machine is left as it is, but for mmdebstrap. What is changed in the sources, and why, is in edits/: a small patch for
# each thing, that must match to the letter. In the packages only the rebuilt files are exchanged: the rest is Debian's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
suffix=+coloebpf1 # sorts behind Debian's version, and before its next one

die() { echo "rebuild: $*" >&2; exit 1; }
say() { echo "rebuild: $* (after ${SECONDS} s)"; }

what=${1:-}
case "$what" in
    tools) source=xen ;;
    qemu) source=qemu ;;
    precopy) source= ;;
    *) die "usage: rebuild.sh tools|qemu|precopy [DIRECTORY [VERSION]]" ;;
esac
output=${2:-$PWD} asked=${3:-}
[ "$(id -u)" -eq 0 ] || die "must run as root: it makes a root file system"
command -v mmdebstrap >/dev/null || die "mmdebstrap is missing: apt-get install mmdebstrap"
# The mirrors of this machine's own apt.
sources=$(apt-get indextargets --format '$(SITE) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    sort -u | awk '$2 ~ /^bookworm/ && $3 == "main" { print "deb", $0; print "deb-src", $0 }')
[ -n "$sources" ] || die "apt knows no packages of Debian 12 (bookworm): apt-get update"

work=$(mktemp -d /var/tmp/coloebpf-rebuild.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root tree=$work/root/build/source
mkdir -p "$output"
log=$output/rebuild-$what.log
: >"$log"

failed() { tail -n 20 "$log" >&2; die "$1; the whole is in $log"; }

# inside WHAT-HAS-FAILED COMMANDS: in the root file system, in /build; with mounts of its own, so that nothing of this
# machine is in the tree when it is removed.
inside() {
    unshare --mount chroot "$root" /bin/bash -ec "
        mount -t proc proc /proc
        export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 DEB_BUILD_OPTIONS='nocheck parallel=$(nproc)'
        cd /build
        $2" >>"$log" 2>&1 </dev/null || failed "$1"
}

# exchange PACKAGE DEPENDS FILE=BUILT...: Debian's own package with files out of the source tree in place of its own, or
# (+FILE=BUILT) beside them. DEPENDS: what they need on top of what the package needs.
exchange() {
    local package=$1 depends=$2 pair file built
    shift 2
    # A package that was only compiled anew has a +b1 behind its source's version.
    inside "there is no $package of $source $version" "
        binary=\$(apt-cache madison $package | awk '{ print \$3 }' | grep -Ex '$(sed 's/[+.]/[&]/g' <<<"$version")([+]b[0-9]+)?' | head -n 1)
        apt-get -qq download $package=\$binary && dpkg-deb -R ${package}_*.deb $package && rm ${package}_*.deb"
    local unpacked=$root/build/$package
    for pair in "$@"; do
        file=${pair%%=*} built=$tree/${pair#*=}
        [ -f "$built" ] || die "the build has made no ${pair#*=}: see $log"
        if [ "${file#+}" = "$file" ]; then
            [ -f "$unpacked/$file" ] || die "$package has no $file any more"
            same_symbols "$unpacked/$file" "$built"
        else
            file=${file#+}
            mkdir -p "$(dirname "$unpacked/$file")"
            case "$file" in etc/*) echo "/$file" >>"$unpacked/DEBIAN/conffiles" ;; esac
        fi
        install -m 755 "$built" "$unpacked/$file"
    done
    sed -i -e "s/^Version: .*/&$suffix/" -e "s/^Depends: .*/&${depends:+, $depends}/" "$unpacked/DEBIAN/control"
    (cd "$unpacked" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
    local binary
    binary=$(sed -n 's/^Version: //p' "$unpacked/DEBIAN/control")
    local target=$output/${package}_${binary#*:}_amd64.deb
    dpkg-deb --root-owner-group --build "$unpacked" "$target" >>"$log" || failed "$package can't be packed"
    say "$target"
}

# A library may gain functions, and must not lose any: others of Debian's programs use it.
same_symbols() {
    case "$1" in *.so.*) ;; *) return 0 ;; esac
    local lost
    lost=$(comm -23 <(symbols "$1") <(symbols "$2"))
    [ -z "$lost" ] || die "what was built lacks $(echo $lost)"
}
symbols() { inside_quiet "nm -D --defined-only ${1#"$root"} | awk '{ print \$3 }' | sort"; }
inside_quiet() { chroot "$root" /bin/bash -ec "$1"; }

# Of a string that is the argument of a call: one that initialises an array may be scattered over instructions.
has() { grep -q "$2" "$tree/$1" || die "$1 was built, but has no $2: COLO is still missing, see $log"; }

say "a root file system to build in"
unshare --mount mmdebstrap --mode=root --variant=buildd --format=directory --skip=cleanup/apt/lists \
    bookworm "$root" - <<<"$sources" >>"$log" 2>&1 || failed "mmdebstrap failed"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
mkdir "$root/build"

if [ "$what" = precopy ]; then
    # Headers and library are of one version: 4.17, whose internals the file's head names.
    cp "$here/precopy/precopy.c" "$root/build"
    inside "its compiler can't be installed, or the build failed" "
        apt-get -qq -y --no-install-recommends install gcc libc6-dev libxen-dev
        dpkg-query -W -f '\${Version}' libxen-dev | grep -q '^4\.17\.'
        mkdir -p package/DEBIAN package/usr/lib/coloebpf
        gcc -O2 -Wall -Wextra -Werror -shared -fPIC -Wl,-z,relro,-z,now -s -o package/usr/lib/coloebpf/precopy.so precopy.c"
    cat >"$root/build/package/DEBIAN/control" <<CONTROL
Package: coloebpf-precopy
Version: 4.17$suffix
Architecture: amd64
Maintainer: The coloebpf founders <coloebpf@xen.cluster.invalid>
Depends: libc6 (>= 2.34), xen-utils-4.17
Section: admin
Priority: optional
Description: copies of Xen guests that are kept going in the background
 A library for the save helper of Xen 4.17's libxl: coloebpf's engine libxl-live
 then copies a guest's memory all the time, and a checkpoint sends the rest.
CONTROL
    dpkg-deb --root-owner-group --build "$root/build/package" "$output/coloebpf-precopy_4.17${suffix}_amd64.deb" >>"$log" ||
        failed "coloebpf-precopy can't be packed"
    say "$output/coloebpf-precopy_4.17${suffix}_amd64.deb"
    exit
fi

inside "Debian's mirrors don't give the source of $source $asked" \
    "apt-get -qq --only-source source $source${asked:+=$asked} && mv $source-*/ source"
version=$(sed -n '1s/.*(\(.*\)).*/\1/p' "$tree/debian/changelog")
say "$source $version"
for edit in "$here/edits/$what"/*.patch; do
    patch --quiet --strip=1 --fuzz=0 --directory="$tree" <"$edit" ||
        die "$edit doesn't match $source $version: look at what has changed, and whether it is still needed"
    say "changed: $(sed -n 's/^Description: //p' "$edit")"
done
inside "its build dependencies can't be installed" "apt-get -qq -y --no-install-recommends --arch-only build-dep ./source"
say "building"
case "$what" in
    tools)
        # With the arguments that Debian's rules have for all tools.
        cat >"$root/build/libraries.mk" <<'MAKE'
include debian/rules
libraries:
	+$(MAKE) $(make_args_tools) -C tools/include
	+$(MAKE) $(make_args_tools) -C tools/libs
MAKE
        inside "the build failed" "
            cd source
            debian/rules override_dh_update_autotools_config
            dh_autoreconf
            debian/rules override_dh_auto_configure
            make -f ../libraries.mk -j$(nproc) libraries
            strip --strip-unneeded tools/libs/light/libxenlight.so.4.17.0 tools/libs/guest/libxenguest.so.4.17.0"
        has tools/libs/light/libxenlight.so.4.17.0 "qemu colo-compare"
        exchange libxenmisc4.17 "libnl-3-200, libnl-route-3-200" \
            usr/lib/x86_64-linux-gnu/libxenlight.so.4.17.0=tools/libs/light/libxenlight.so.4.17.0 \
            usr/lib/x86_64-linux-gnu/libxenguest.so.4.17.0=tools/libs/guest/libxenguest.so.4.17.0
        exchange xen-utils-common "" +etc/xen/scripts/remus-netbuf-setup=tools/hotplug/Linux/remus-netbuf-setup
        ;;
    qemu)
        inside "the build failed" "cd source && debian/rules build-xen && strip --strip-unneeded b/xen/qemu-system-i386"
        has b/xen/qemu-system-i386 xen-colo-do-checkpoint
        exchange qemu-system-xen "" usr/libexec/xen-qemu-system-i386=b/xen/qemu-system-i386
        ;;
esac
say "done"
