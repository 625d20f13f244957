#!/bin/sh
# Unpacks a newer QEMU from Debian's backports into a folder, beside the one that is installed and without root, for
# tests of what only newer ones can do. Prints what to set. Ends with status 3 when it cannot be had here.
#
#   scripts/fetch_newer_qemu.sh [FOLDER]      default: .qemu-newer
set -eu

cd "$(dirname "$0")/.."
mkdir -p "${1:-.qemu-newer}"
folder=$(realpath "${1:-.qemu-newer}")
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
limit_s=${FETCH_TIMEOUT:-120}

give_up() {
    echo "no newer QEMU: $*" >&2
    exit 3
}

say_how() {
    echo "export CASBACKUP_QEMU_NEWER=$folder/bin"
    exit 0
}

[ -x "$folder/bin/qemu-system-x86_64" ] && "$folder/bin/qemu-system-x86_64" --version >/dev/null 2>&1 && say_how

command -v apt-get >/dev/null && command -v dpkg >/dev/null || give_up "apt-get and dpkg are not here"
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$release" ] || give_up "/etc/os-release names no release"

# Lists and packages of its own, so that the system's are as they were.
apt="$folder/apt"
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
cat >"$apt/sources.list" <<END
deb $mirror $release main
deb $mirror $release-backports main
END
apt_get() {
    timeout "$limit_s" apt-get -qq \
        -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::archives="$apt/archives" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Acquire::Retries=2 "$@"
}

apt_get update || give_up "the lists of $mirror cannot be had"
apt_get install --yes --no-install-recommends --download-only -t "$release-backports" \
    qemu-system-x86 qemu-utils >/dev/null || give_up "the packages of $release-backports cannot be had"
for package in "$apt"/archives/*.deb; do
    dpkg -x "$package" "$folder"
done
rm -rf "$apt"

# The programs look for firmware, modules and libraries where the system has those of another version.
libraries=$(echo "$folder"/usr/lib/*-linux-gnu)
mkdir -p "$folder/bin"
for program in qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-nbd; do
    firmware=
    [ "$program" = qemu-system-x86_64 ] && firmware="-L $folder/usr/share/seabios -L $folder/usr/share/qemu"
    cat >"$folder/bin/$program" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" QEMU_MODULE_DIR="$libraries/qemu"
exec "$folder/usr/bin/$program" $firmware "\$@"
END
    chmod +x "$folder/bin/$program"
done
"$folder/bin/qemu-system-x86_64" --version >/dev/null || give_up "what was unpacked does not run here"
say_how
