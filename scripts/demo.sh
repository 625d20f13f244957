#!/bin/sh
# Backs up a small VM disk with a real ext4 file system, changes files in it, backs it up again, restores
# it and compares. Works in a temporary folder that it removes, or in DEMO_DIR, which it keeps.
set -eu

cd "$(dirname "$0")/.."
CASBACKUP=$(realpath "${CASBACKUP:-.venv/bin/casbackup}")
PYTHON=${PYTHON:-python3}
case $PYTHON in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps mke2fs and debugfs

if [ -n "${DEMO_DIR:-}" ]; then
    mkdir -p "$DEMO_DIR"
    if [ -n "$(ls -A "$DEMO_DIR")" ]; then
        echo "DEMO_DIR must be empty: $DEMO_DIR" >&2
        exit 1
    fi
    cd "$DEMO_DIR"
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/casbackup-demo.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    cd "$work"
fi
export CASBACKUP_REPOSITORY="$PWD/repository"
export XDG_CONFIG_HOME="$PWD/no-config" # your own settings stay out of it

step() {
    printf '\n== %s\n' "$*"
}

casbackup() {
    printf '$ casbackup %s\n' "$*"
    "$CASBACKUP" "$@"
}

allocated() { # FILE-OR-FOLDER...: the bytes that they take on disk
    "$PYTHON" - "$@" <<'PY'
import os, sys

paths = [path for top in sys.argv[1:] for path in [top, *(os.path.join(d, f) for d, _, fs in os.walk(top) for f in fs)]]
print(sum(os.lstat(path).st_blocks * 512 for path in paths))
PY
}

mib() { # BYTES
    awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'
}

# ---- the disk ---------------------------------------------------------------------------------------

make_files() { # what lies in the guest: programs, a log, data that does not compress
    "$PYTHON" - <<'PY'
import os, pathlib, shutil, sysconfig

guest = pathlib.Path("guest")
for folder in ("etc", "srv", "var/log"):
    (guest / folder).mkdir(parents=True)
skip = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test", "tests", "config-*")
shutil.copytree(sysconfig.get_path("stdlib"), guest / "usr/lib/python3", ignore=skip, ignore_dangling_symlinks=True)
(guest / "etc/motd").write_text("Welcome. This is day 1.\n")
lines = (f"Nov {1 + n // 4000:2d} 10:{n // 60 % 60:02d}:{n % 60:02d} vm app[{n % 97}]: served {n * 7919 % 10007} requests\n"
         for n in range(100_000))
(guest / "var/log/app.log").write_text("".join(lines))
(guest / "srv/photos-1.bin").write_bytes(os.urandom(24 << 20))
(guest / "srv/photos-2.bin").write_bytes(os.urandom(8 << 20))
PY
}

make_ext4() {
    make_files
    truncate -s 512M vm.raw
    mke2fs -q -F -t ext4 -L demo -d guest vm.raw
    echo "vm.raw: an ext4 file system with $(find guest -type f | wc -l) files, $(mib "$(allocated guest)") of them," \
        "on a disk of 512 MiB"
}

change_ext4() { # as a day in the guest's life: files written, replaced, appended to, copied, deleted
    "$PYTHON" - <<'PY'
import os, pathlib

pathlib.Path("new-motd").write_text("Welcome. This is day 2.\n")
log = pathlib.Path("guest/var/log/app.log").read_bytes()
pathlib.Path("new-log").write_bytes(log + log[:200_000].replace(b"Nov  1", b"Nov 30"))
pathlib.Path("new-photos").write_bytes(os.urandom(4 << 20))
PY
    cat >debugfs-commands <<'DEBUGFS'
cd /etc
rm motd
write new-motd motd
cd /var/log
rm app.log
write new-log app.log
cd /srv
rm photos-2.bin
write new-photos photos-3.bin
write guest/srv/photos-1.bin copy-of-photos-1.bin
DEBUGFS
    debugfs -w -f debugfs-commands vm.raw >debugfs-output 2>&1
    if [ "$(debugfs -R 'cat /etc/motd' vm.raw 2>/dev/null)" != "$(cat new-motd)" ]; then
        cat debugfs-output >&2
        echo "debugfs could not change the files in vm.raw" >&2
        exit 1
    fi
    echo "replaced /etc/motd, appended to /var/log/app.log, added 4 MiB of photos, deleted 8 MiB of them," \
        "copied a file of 24 MiB"
}

make_plain() {
    echo "NOTE: mke2fs and debugfs (package e2fsprogs) are not here, so this disk has no file system:"
    echo "it is generated data, laid out in 4 KiB blocks."
    "$PYTHON" - <<'PY'
import os

with open("vm.raw", "wb") as disk:
    disk.truncate(512 << 20)
    disk.seek(1 << 20)
    disk.write(os.urandom(32 << 20))
    disk.seek(128 << 20)
    disk.write(b"".join(b"%015d\n" % n for n in range(4 << 20)))
PY
}

change_plain() {
    "$PYTHON" - <<'PY'
import os

with open("vm.raw", "r+b") as disk:
    disk.seek(1 << 20)
    part = disk.read(24 << 20)
    disk.seek(256 << 20)
    disk.write(part)
    disk.seek(400 << 20)
    disk.write(os.urandom(4 << 20))
PY
    echo "copied 24 MiB to another place, wrote 4 MiB of new data"
}

# ---- the figures ------------------------------------------------------------------------------------

show_stats() { # FILE: what `casbackup --json stats` printed; shows its sizes and factors, whatever else is there
    "$PYTHON" - "$1" <<'PY'
import json, sys

def figures(value, path=()):
    if isinstance(value, dict) and len(path) < 2:
        for key, inner in value.items():
            yield from figures(inner, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield " ".join(path).replace("_", " "), value

with open(sys.argv[1]) as file:
    printed = file.read()
try:
    shown = list(figures(json.loads(printed)))
except ValueError as error:
    sys.exit(f"`casbackup --json stats` did not print JSON: {error}")
for name, value in shown:
    if name.endswith(" bytes"):
        print(f"  {name.removesuffix(' bytes'):<32} {value / 1048576:10.1f} MiB")
    elif "factor" in name or "ratio" in name:
        print(f"  {name:<32} {value:10.2f}")
PY
}

# ---- the demo ---------------------------------------------------------------------------------------

step "A disk of a virtual machine"
if command -v mke2fs >/dev/null && command -v debugfs >/dev/null; then
    kind=ext4
else
    kind=plain
fi
make_$kind

step "An empty repository"
casbackup init

step "Day 1: the first backup"
casbackup backup vm/100 scsi0=vm.raw
after_first=$(allocated repository)
first_disk=$(allocated vm.raw)

step "A day passes in the VM"
change_$kind

step "Day 2: the second backup stores only what is new"
casbackup backup vm/100 scsi0=vm.raw
after_second=$(allocated repository)
second_disk=$(allocated vm.raw)

step "What is in the repository"
casbackup snapshots
casbackup stats

step "Restore the latest snapshot and compare it with the disk"
casbackup restore vm/100 --to restored
cmp vm.raw restored/scsi0.raw
echo "restored/scsi0.raw is the same as vm.raw, byte for byte"
if [ $kind = ext4 ] && command -v e2fsck >/dev/null; then
    e2fsck -fn restored/scsi0.raw >e2fsck-output 2>&1 || { cat e2fsck-output >&2; exit 1; }
    echo "e2fsck finds its file system clean"
fi

step "Read every stored byte and check it"
casbackup check --read-data

step "What it came to"
"$CASBACKUP" --json stats >stats.json
show_stats stats.json
echo "two backups of $(mib "$first_disk") and $(mib "$second_disk") of data in the disk's file" \
    "take $(mib "$after_second") on disk; the second one added $(mib $((after_second - after_first)))"
awk -v in_bytes=$((first_disk + second_disk)) -v out_bytes="$after_second" \
    'BEGIN { printf "reduction by deduplication and compression, measured on the folder: %.2f to 1\n", in_bytes / out_bytes }'
if [ -n "${DEMO_DIR:-}" ]; then
    echo "Everything is kept in $PWD"
fi
