#!/usr/bin/env bash
# Unpacks Ceph's gateway and what it needs from Debian packages into a folder; nothing is installed, no service is set up.
#
#     tests/ceph_install.sh FOLDER [SECONDS]       # then: export ORCHESTRATOR_CEPH=FOLDER
#
# About 61 MB, 260 MB unpacked. Does nothing if it is there. Where that takes longer than SECONDS (120) or fails it says
# why, leaves nothing, and exits with 1: without Ceph, tests/test_ceph.py skips.
set -euo pipefail
target=$(realpath -m "${1:?usage: ceph_install.sh FOLDER [SECONDS]}")
seconds=${2:-120}
# Ceph itself, and of what it depends on what the daemons load.
packages="ceph-base ceph-common ceph-mon ceph-osd radosgw python3-ceph-argparse python3-ceph-common python3-rados"
libraries='^(lib|python3-(prettytable|wcwidth|cephfs|rbd|rgw)$)'

if [ -x "$target/usr/bin/radosgw" ] || command -v radosgw > /dev/null; then
  exit 0
fi
give_up() {
  echo "Ceph is not there, its tests will be skipped: $1" >&2
  exit 1
}
[ "$(dpkg --print-architecture 2> /dev/null)" = amd64 ] || give_up "this is no Debian machine with an amd64 processor"

mkdir -p "$(dirname "$target")"
part=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$part"' EXIT
export part packages libraries
# shellcheck disable=SC2016
timeout "$seconds" bash -euo pipefail -c '
  mkdir "$part/debs" "$part/root"
  cd "$part/debs"
  if ! apt-cache show radosgw > /dev/null 2>&1; then apt-get update -qq; fi
  missing=$(apt-get install --simulate --no-install-recommends $packages | sed -n "s/^Inst \([^ ]*\).*/\1/p")
  wanted=$(for name in $missing; do
    if [[ " $packages " == *" $name "* || $name =~ $libraries ]]; then echo "$name"; fi
  done)
  apt-get download -qq $wanted
  printf "%s\0" *.deb | xargs -0 -P "$(nproc)" -I{} dpkg-deb -x {} "$part/root"
' > "$part/log" 2>&1 || give_up "$(tail -n 3 "$part/log" | tr '\n' ' ')(or it took longer than $seconds s)"
[ -x "$part/root/usr/bin/radosgw" ] || give_up "the packages hold no radosgw"
mv "$part/root" "$target" || [ -x "$target/usr/bin/radosgw" ]
