#!/usr/bin/env bash
# Runs a statically linked x86-64 program on an emulated CPU with AVX-512, for machines that have none.
#
#   RUSTFLAGS="-C target-feature=+crt-static" cargo test --lib --no-run --target x86_64-unknown-linux-gnu --target-dir target/static
#   scripts/avx512-emulated.sh target/static/x86_64-unknown-linux-gnu/debug/deps/quadriga-HASH [ARGS..]
#
# Prints what the program prints and ends with its exit status. 124: no end within $EMU_TIMEOUT seconds (default 1800); 125: the
# emulator failed. $EMU_ENV names variables to hand on. One core at about 10 million instructions a second: name the tests you want.
#
# Bochs boots Debian's kernel with an initramfs of busybox and the program; the console is a serial port that goes to a file. All
# parts are Debian packages, unpacked and not installed, under $QUADRIGA_SCRATCH/emulator (default: quadriga-compare in the
# temporary folder). The CPU, $EMU_CPU, is tigerlake: AVX-512 F, BW, VL, DQ, VNNI. AVX-512 BF16 and AVX-VNNI need a newer Bochs than
# Debian 12's 2.7, configured with --with-nogui --enable-x86-64 --enable-avx --enable-evex --enable-pci: name its build folder in
# $BOCHS_BUILD, and the CPU is sapphire_rapids.
set -euo pipefail

(($#)) || { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
program=$1
shift
[[ -f $program ]] || { echo "avx512-emulated: no file $program" >&2; exit 2; }
if readelf -l "$program" 2>/dev/null | grep -q 'program interpreter'; then
  echo "avx512-emulated: $program is linked dynamically; build it with -C target-feature=+crt-static" >&2
  exit 2
fi
cache=${QUADRIGA_SCRATCH:-${TMPDIR:-/tmp}/quadriga-compare}/emulator
root=$cache/root
packages="bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso busybox-static
  libltdl7 libsamplerate0 libgtk-3-0 libcolord2 libepoxy0 libwayland-cursor0 libwayland-egl1 libasound2
  libburn4 libjte2 libisofs6 libisoburn1"

if [[ ! -f $cache/ready ]]; then
  mkdir -p "$cache/deb" "$root"
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
  echo "avx512-emulated: fetching $kernel, Bochs and what they need into $cache" >&2
  # shellcheck disable=SC2086
  (cd "$cache/deb" && apt-get download -q $kernel $packages >apt.log 2>&1) || { cat "$cache/deb/apt.log" >&2; echo "avx512-emulated: no packages; apt-get update may help" >&2; exit 125; }
  for deb in "$cache"/deb/*.deb; do dpkg -x "$deb" "$root"; done
  touch "$cache/ready"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/avx512-emulated.XXXXXX")
emulator=''
cleanup() {
  [[ -z $emulator ]] || pkill -KILL -P "$emulator" || true
  wait 2>/dev/null || true
  [[ -n ${EMU_KEEP:-} ]] || rm -rf "$work"
}
trap cleanup EXIT

# The initramfs, uncompressed: unpacking it is cheaper than decompressing it in the emulator.
mkdir -p "$work/init/"{bin,proc,sys,dev,tmp} "$work/iso"
cp "$root/bin/busybox" "$work/init/bin/"
cp "$program" "$work/init/bin/program"
strip "$work/init/bin/program" 2>/dev/null || true
chmod +x "$work/init/bin/program"
marker="emulated-exit-$RANDOM$RANDOM"
{
  echo '#!/bin/busybox sh'
  echo '/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys; /bin/busybox mount -t devtmpfs dev /dev'
  echo '/bin/busybox stty -opost -echo </dev/console'
  echo 'export PATH=/bin HOME=/tmp RUST_BACKTRACE=0 RUST_TEST_THREADS=1; cd /tmp'
  for name in ${EMU_ENV:-}; do printf 'export %s=%q\n' "$name" "${!name}"; done
  echo "echo $marker begin"
  printf '/bin/program'
  (($# == 0)) || printf ' %q' "$@"
  printf '\necho; echo %s $?\n' "$marker" | sed 's/^echo; echo \(.*\) \$?$/s=$?; echo; echo \1 $s/'
  echo '/bin/busybox sleep 600'
} >"$work/init/init"
chmod +x "$work/init/init"
python3 - "$work/init" "$work/iso/initrd" <<'PY'
"""cpio in its newc form, so that no cpio program is needed."""
import os, stat, sys

root, out = sys.argv[1:]
with open(out, "wb") as f:
    def entry(name, mode, data=b"", rdev=(0, 0)):
        fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name) + 1, 0]
        f.write(b"070701" + b"".join(b"%08X" % x for x in fields) + name.encode() + b"\0")
        f.write(b"\0" * (-f.tell() % 4) + data)
        f.write(b"\0" * (-f.tell() % 4))
    for folder, dirs, files in os.walk(root):
        for d in sorted(dirs):
            entry(os.path.relpath(os.path.join(folder, d), root), stat.S_IFDIR | 0o755)
        for n in sorted(files):
            with open(os.path.join(folder, n), "rb") as g:
                entry(os.path.relpath(os.path.join(folder, n), root), stat.S_IFREG | 0o755, g.read())
    entry("dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1))
    entry("TRAILER!!!", 0)
PY

# Without fast string operations the kernel must not believe in short ones either (fsrm): its memmove would go wrong. Bochs 2.7
# misreports the compacted form of the extended state (xsaves, xsavec) and the size of protection keys (pku). The timer is the plain
# old one, since the emulated clock and the frequencies that CPUID names do not agree.
kernel_options="clearcpuid=fsrm,xsaves,xsavec,pku nopku mitigations=off nokaslr nosmp nolapic noapic nohpet tsc=unstable
 clocksource=acpi_pm random.trust_cpu=on nowatchdog audit=0 apparmor=0 panic=-1"
kernel_options=${kernel_options//$'\n'/}

# A bootable CD.
export LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
cp "$root"/boot/vmlinuz-* "$work/iso/vmlinuz"
cp "$root/usr/lib/ISOLINUX/isolinux.bin" "$root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$work/iso/"
cat >"$work/iso/isolinux.cfg" <<CFG
default linux
prompt 0
label linux
  kernel vmlinuz
  append initrd=initrd console=ttyS0 ${EMU_APPEND:-quiet} $kernel_options
CFG
"$root/usr/bin/xorriso" -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/iso" >"$work/iso.log" 2>&1 || { cat "$work/iso.log" >&2; exit 125; }

# The emulator.
if [[ -n ${BOCHS_BUILD:-} ]]; then
  bochs=$BOCHS_BUILD/bochs gui=nogui cpu=${EMU_CPU:-sapphire_rapids} start=(-q -f bochsrc)
else
  # Debian's is built with its debugger, which waits for a command to go on.
  bochs=$root/usr/bin/bochs-bin gui=term cpu=${EMU_CPU:-tigerlake} start=(-q -f bochsrc -rc commands)
  ln -s "$root/usr/lib/x86_64-linux-gnu/bochs/plugins" "$work/plugins"
  export LTDL_LIBRARY_PATH=./plugins
fi
# Short relative paths: Bochs 2.7 has small buffers.
ln -s "$root/usr/share/bochs" "$work/share"
cat >"$work/bochsrc" <<CFG
megs: 1024
cpu: model=$cpu, count=1, ips=20000000
romimage: file=share/BIOS-bochs-latest
vgaromimage: file=share/VGABIOS-lgpl-latest
ata0: enabled=1
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial
display_library: $gui
config_interface: textconfig
clock: sync=none
log: bochs.log
panic: action=fatal
error: action=report
CFG
: >"$work/serial"
export BXSHARE=share TERM=${TERM:-vt100}
echo c >"$work/commands"
# Debian's has no display but those that want a terminal or a window; script(1) gives it a terminal.
(cd "$work" && exec script -qec "exec '$bochs' ${start[*]}" /dev/null </dev/null >screen 2>&1) &
emulator=$!
deadline=$((SECONDS + ${EMU_TIMEOUT:-1800}))
until grep -aq "^$marker [0-9]" "$work/serial"; do
  if ! kill -0 "$emulator" 2>/dev/null; then
    sleep 1
    grep -aq "^$marker [0-9]" "$work/serial" && break
    echo "avx512-emulated: the emulator stopped; its last words:" >&2
    tail -n 20 "$work/bochs.log" "$work/serial" >&2 || true
    exit 125
  fi
  if ((SECONDS > deadline)); then
    echo "avx512-emulated: no end within ${EMU_TIMEOUT:-1800} s; so far:" >&2
    cat "$work/serial"
    exit 124
  fi
  sleep 1
done
sed -n "/^$marker begin/,/^$marker [0-9]/p" "$work/serial" | sed '1d;$d' | tr -d '\r'
exit "$(sed -n "s/^$marker \([0-9]*\).*/\1/p" "$work/serial")"
