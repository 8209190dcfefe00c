#!/usr/bin/env bash
# Run the tests on Python 3.13, from Debian 13 (trixie), in a root made for the purpose.
#
#   sudo tools/test_newest_python.sh [arguments for pytest]
#
# The root is a temporary folder, removed at the end. To keep one between runs, name an empty or new folder:
#
#   sudo NEWEST_ROOT=/var/tmp/trixie tools/test_newest_python.sh -k energy
#
# Also read: TMPDIR, DEBIAN_MIRROR, PIP_CERT, PIP_INDEX_URL, PIP_DEFAULT_TIMEOUT, http_proxy, https_proxy, no_proxy, CI.
set -euo pipefail

stop() { echo "test_newest_python.sh: $1" >&2; exit 1; }

((EUID == 0)) || stop "debootstrap and chroot need root. Please run it with sudo."
for tool in debootstrap git; do
    command -v "$tool" >/dev/null || stop "$tool is missing. On Debian: apt-get install $tool"
done

# Whatever is mounted below belongs to this process alone and goes when it ends, even if it is killed.
if [[ -z ${OWN_MOUNTS:-} ]] && unshare --mount true 2>/dev/null; then
    OWN_MOUNTS=1 exec unshare --mount --propagation private -- bash "$0" "$@"
fi

source_tree=$(realpath "$(dirname "$0")/..")
if [[ -n ${NEWEST_ROOT:-} ]]; then
    root=$(realpath --canonicalize-missing "$NEWEST_ROOT")
    [[ -e $root/.root-is-complete || -z $(ls -A "$root" 2>/dev/null) ]] ||
        stop "$root is neither empty nor a root that this script finished. Please remove it or name another."
    mkdir -p "$root"
else
    root=$(mktemp --directory --tmpdir numpyro-score-trixie.XXXXXX)
fi
[[ $root != *[[:space:]]* ]] || stop "the folder's name must not contain spaces: $root"

# Where something is mounted below the root, innermost first.
mounts() { awk -v below="$root/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | sort --reverse; }

clean_up() {
    local status=$? point
    for point in $(mounts); do umount "$point" || umount --lazy "$point" || true; done
    if [[ -n ${NEWEST_ROOT:-} ]]; then
        echo "Kept $root"
    elif [[ -n $(mounts) ]]; then
        echo "test_newest_python.sh: left $root alone, because something is still mounted there:" $(mounts) >&2
    else
        rm -rf --one-file-system -- "$root"
    fi
    exit "$status"
}
trap clean_up EXIT

if [[ ! -e $root/.root-is-complete ]]; then
    echo "Making a Debian 13 root in $root"
    debootstrap --variant=minbase --include=ca-certificates,make,python3,python3-venv \
        trixie "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2; stop "debootstrap failed; its log is $root.log"; }
    rm -f "$root.log"
    touch "$root/.root-is-complete"
fi

# In a container that may not make devices or mount /proc, take what can be had.
for device in null zero full random urandom; do
    if [[ ! -c $root/dev/$device ]]; then
        touch "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    fi
done
mount -t proc proc "$root/proc" 2>/dev/null || echo "Going on without /proc: it could not be mounted."

# The network, and who is trusted on it, are the host's.
for file in /etc/resolv.conf /etc/hosts; do
    [[ ! -e $file ]] || cp --dereference --remove-destination "$file" "$root$file"
done
certificates=/etc/ssl/certs/ca-certificates.crt
host_certificates=${PIP_CERT:-$certificates}
[[ ! -e $host_certificates ]] || cp --dereference --remove-destination "$host_certificates" "$root$certificates"
settings=(PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "PIP_CERT=$certificates" PIP_ROOT_USER_ACTION=ignore)
for name in CI PIP_INDEX_URL PIP_DEFAULT_TIMEOUT http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
done

# Copy the working tree, tracked files and new ones, over the last copy. Its .venv stays.
mkdir -p "$root/src"
find "$root/src" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf --one-file-system {} +
cd "$source_tree"
git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' path; do [[ ! -e $path && ! -L $path ]] || printf '%s\0' "$path"; done |
    tar --create --no-recursion --null --files-from=- | tar --extract --no-same-owner --directory="$root/src"

inside() { env --ignore-environment "${settings[@]}" chroot "$root" "$@" </dev/null; }
inside make --silent --directory=/src .venv/.extra-test
inside /src/.venv/bin/python -c '
import sys
from importlib.metadata import version
names = "jax", "numpyro", "optax", "arviz", "folx", "flax", "equinox", "numpy"
print("Python", sys.version.split()[0] + ":", ", ".join(f"{name} {version(name)}" for name in names))'
# The array shapes that annotations state are checked here: the checks take time, and once is enough. Unless asked for,
# tests that take long, and all cases of a test but the first, are left to the oldest Python, which runs them all.
run() { inside sh -c 'cd /src && exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"' pytest "$@"; }
if (($#)); then
    run --jaxtyping-packages=numpyro_score,beartype.beartype "$@"
else
    run --jaxtyping-packages=numpyro_score,beartype.beartype -m "not slow" --first-cases
    # With all of XLA's optimisations, as users compile the package: tests/conftest.py leaves most of them out elsewhere.
    settings+=(XLA_FLAGS=--xla_backend_optimization_level=3)
    run tests/test_operators.py tests/test_losses.py tests/test_random.py -m "not slow"
fi
