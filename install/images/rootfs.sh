#!/usr/bin/env bash
# Lays out the file systems of the images: a program, the libraries it is linked with, and what it reads of a system. No shell, no
# package manager, nothing that runs as root or may be written to.
#
#   rootfs.sh BIN_DIR OUT [NAME...]     OUT/NAME for each of auth, mixer, pilot, proxy, lateen
#
# Runs in the build stage of the Containerfile, and as it is on any glibc system: `make images-check`.
set -euo pipefail
bin=${1:?BIN_DIR} out=${2:?OUT}
shift 2
[ $# -gt 0 ] || set -- auth mixer pilot proxy lateen

# A file at the place it has here, links followed, and every library it needs.
put() {
  local root=$1 file=$2 to=${3:-$2} library
  install -D -m "$( [ -x "$file" ] && echo 0755 || echo 0644 )" "$(readlink -f "$file")" "$root$to"
  while read -r library; do
    [ -e "$root$library" ] || install -D -m 0755 "$(readlink -f "$library")" "$root$library"
  done < <(ldd "$file" 2>/dev/null | grep -oE '/[^ ]+\.so[^ ]*' || true)
}

for name; do
  root=$out/$name
  rm -rf "$root"
  mkdir -p "$root"/{etc,var/lib/lateen} && mkdir -m 1777 "$root/tmp"
  printf 'root:x:0:0:root:/:/sbin/nologin\nlateen:x:1337:1337:lateen:/:/sbin/nologin\n' >"$root/etc/passwd"
  printf 'root:x:0:\nlateen:x:1337:\n' >"$root/etc/group"
  printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
  put "$root" "$bin/$name" "/usr/local/bin/$name"
  [ ! -e /etc/ssl/certs/ca-certificates.crt ] || put "$root" /etc/ssl/certs/ca-certificates.crt
  if [ "$name" = proxy ]; then
    # For `proxy iptables`, in the init container of sidecars.
    for tool in ip iptables-{save,restore} ip6tables-{save,restore} \
      {iptables,ip6tables}-{nft,legacy}-{save,restore}; do
      put "$root" "$(PATH=$PATH:/usr/sbin:/sbin command -v "$tool")" "/usr/sbin/$tool"
    done
    modules=$(dirname "$(find /usr/lib -path '*/xtables/libxt_REDIRECT.so' -o -path '*/xtables/libxt_owner.so' | head -n 1)")
    for module in "$modules"/*.so; do put "$root" "$module"; done
  fi
done
