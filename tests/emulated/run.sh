#!/usr/bin/env bash
# Compares the CPU kernels of each instruction set, bit for bit: compare_isas.cpp says what with what.
#
#   tests/emulated/run.sh [--every=N] [--break] [ISA...]           on this processor
#   tests/emulated/run.sh --bochs [--every=N] [--break] [ISA...]   then also on the one that Bochs emulates, which has
#                                                                  AVX-512: a Linux with the program as its only process
# Environment: BUILD, where to build (build/emulated); CXX; KERNEL, path of a kernel to boot instead of Debian's;
# TIMEOUT, seconds that Bochs may take (3600). All comparisons take seconds here and some ten minutes in Bochs.
set -euo pipefail
BUILD=$(realpath -m "${BUILD:-$(dirname "$0")/../../build/emulated}")
cd "$(dirname "$0")/../.."
mkdir -p "$BUILD"
bochs=
if [ "${1:-}" = --bochs ]; then bochs=yes; shift; fi

# As in setup.py, so that these are the very kernels that ship.
flags="-O3 -g0 -DNDEBUG -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -fPIC -fvisibility=hidden"
flags+=" -Icsrc -Wextra -std=c++17"
objects=() jobs=()
compile() { # source, more flags
  objects+=("$BUILD/$(basename "$1" .cpp).o")
  # shellcheck disable=SC2086
  ${CXX:-g++} $flags ${2:-} -c "$1" -o "${objects[-1]}" & jobs+=($!)
}
# Code for any processor comes first: of a function that several files have, the linker keeps the first.
compile tests/emulated/compare_isas.cpp
compile csrc/cpu/isa.cpp
compile csrc/cpu/scalar.cpp
if [ "$(uname -m)" = x86_64 ]; then
  compile csrc/cpu/avx2.cpp "-mavx2"
  compile csrc/cpu/avx512.cpp "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
fi
for job in "${jobs[@]}"; do wait "$job"; done
${CXX:-g++} ${bochs:+-static} "${objects[@]}" -o "$BUILD/compare_isas"

if [ -z "$bochs" ]; then exec "$BUILD/compare_isas" "$@"; fi

echo "On this processor:"
"$BUILD/compare_isas" "$@" | tee "$BUILD/native.txt" || true

# ---- a CD that boots the program ----------------------------------------------------------------------------------

modules=/usr/lib/syslinux/modules/bios
missing=()
need() { [ -e "$1" ] || missing+=("$2"); }
need /usr/bin/bochs bochs
need /usr/share/bochs/BIOS-bochs-latest bochsbios
need /usr/share/bochs/VGABIOS-lgpl-latest vgabios
ls /usr/lib/*/bochs/plugins/libbx_term_gui.so >/dev/null 2>&1 || missing+=(bochs-term)
need /usr/lib/ISOLINUX/isolinux.bin isolinux
need $modules/ldlinux.c32 syslinux-common
need /usr/bin/xorriso xorriso
need /usr/bin/cpio cpio
if [ ${#missing[@]} -gt 0 ]; then
  echo "Bochs needs more packages (these are Debian's names): apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 2
fi

cd "$BUILD"
if [ -z "${KERNEL:-}" ]; then # fetched and unpacked, not installed
  if ! [ -e kernel/boot ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p')
    apt-get -qq download "${package:?no linux-image-cloud-amd64: apt-get update, or set KERNEL}"
    dpkg-deb --extract "$package"_*.deb kernel
    rm "$package"_*.deb
  fi
  KERNEL=$(echo kernel/boot/vmlinuz-*)
fi

rm -rf cd root serial.txt
mkdir -p cd/isolinux root
cp "$KERNEL" cd/vmlinuz
cp /usr/lib/ISOLINUX/isolinux.bin $modules/ldlinux.c32 cd/isolinux
strip -o root/init compare_isas
(cd root && echo init | cpio --quiet -o -H newc) | gzip > cd/initrd.gz
# Bochs 2.7 misreports how large the compacted form of saved registers is, and the kernel would do without AVX.
cat > cd/isolinux/isolinux.cfg <<END
default compare
label compare
  kernel /vmlinuz
  append initrd=/initrd.gz console=ttyS0 quiet clearcpuid=xsavec,xsaves mitigations=off tsc=reliable panic=-1 -- avx512 $*
END
xorriso -as mkisofs -quiet -o boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table cd 2> xorriso.txt || { cat xorriso.txt >&2; exit 1; }
cat > bochsrc <<END
config_interface: textconfig
display_library: term
cpu: model=corei7_skylake_x, ips=50000000, reset_on_triple_fault=0
memory: guest=256, host=256
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.txt
panic: action=fatal
error: action=ignore
clock: sync=none
END

# Bochs wants a terminal. Debian's begins in its debugger, which is told to continue.
bochs="bochs -q -f bochsrc"
if [[ $(bochs --help 2>&1) == *"-rc filename"* ]]; then
  echo continue > go
  bochs+=" -rc go"
fi
echo "In Bochs:"
begin=$SECONDS
TERM=vt100 timeout "${TIMEOUT:-3600}" script -qec "$bochs" /dev/null < /dev/null > terminal.txt 2>&1 || true
said=$(tr -d '\r' < serial.txt | grep -v '^\[') || true
status=$(sed -n 's/^exit status //p' <<< "$said")
if [ -z "$status" ]; then
  echo "Bochs ended without a result; the ends of what it left in $BUILD:" >&2
  tail -n 20 serial.txt bochs.txt terminal.txt >&2
  exit 1
fi
printf '%s\n(%d s)\n' "$said" $((SECONDS - begin))
if ! grep -qxF "$(grep '^scalar:' native.txt)" <<< "$said"; then
  echo "The scalar kernels gave other bits in Bochs than on this processor." >&2
  exit 1
fi
exit "$status"
