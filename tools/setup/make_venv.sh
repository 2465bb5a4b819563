#!/bin/sh
# Makes .venv in the repository root and installs phi1_megatron into it, editable.
#
#   sh tools/setup/make_venv.sh [EXTRA ...]        for example: dev gpu
#
# Does nothing when the environment already holds these extras and neither setup.py nor
# pyproject.toml has changed. From the environment:
#   PYTHON       the interpreter to use (else python3.11, else python3, else 3.12 or 3.13)
#   TORCH_INDEX  a package index to take torch from, or "none"; unset, the index of CPU builds is
#                added where there is no NVIDIA GPU and the index answers within three seconds
# pip's own configuration (indexes, proxies, local wheels) is used as it stands.
set -eu

CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }
fail() {
    printf 'make_venv: %s\n' "$*" >&2
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
cd -- "$root"
venv=.venv
python=$venv/bin/python
stamp=$venv/.phi1-setup

supported() { # is the interpreter $1 one that setup.py admits?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 && supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>&1) || found="no python3"
    fail "Python 3.11, 3.12 or 3.13 is needed and this machine has $found: install one (on Debian 12:" \
        "apt-get install python3.11 python3-venv) or name it with PYTHON=/path/to/python."
}

# Debian splits venv's ensurepip into a package of its own.
ensure_venv_module() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null && return
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if command -v apt-get >/dev/null 2>&1; then
        [ "$(id -u)" -eq 0 ] ||
            fail "$1 cannot make virtual environments yet: run  sudo apt-get install $package  and then this again."
        say "Installing $package (virtual environments for $1) ..."
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } >&2 </dev/null ||
            fail "apt-get could not install $package, which $1 needs to make a virtual environment."
    fi
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$1 has no venv module with ensurepip: install it, or name another interpreter with PYTHON=."
}

make_environment() {
    if [ -e "$python" ] || [ -h "$python" ]; then
        supported "$python" ||
            fail "$root/$venv holds no working Python 3.11 to 3.13: remove it (rm -r $venv) and run this again."
        if "$python" -m pip --version >/dev/null 2>&1; then
            return
        fi
    fi
    chosen=$(choose_python)
    ensure_venv_module "$chosen" || exit 1
    say "Making $venv with $("$chosen" --version) ..."
    "$chosen" -m venv "$venv" || fail "$chosen -m venv $venv failed; its words are above."
}

# The index to take torch from: empty, or a URL. PyPI's Linux wheels of torch bring several GB of
# CUDA libraries, of no use without a GPU; a CPU build's version ("+cpu") sorts above the plain one,
# so pip prefers it as soon as it can see it.
torch_index() {
    case ${TORCH_INDEX:-auto} in
    none) return ;;
    auto) ;;
    *)
        printf '%s' "$TORCH_INDEX"
        return
        ;;
    esac
    [ "$(uname -s)" = Linux ] || return 0
    if [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1; then
        return
    fi
    # torch is there already (pip will judge the version): nothing to fetch, nothing to ask.
    "$python" -m pip show --quiet torch >/dev/null 2>&1 && return
    if timeout 3 "$python" -c 'import sys, urllib.request as request
request.urlopen(request.Request(sys.argv[1], method="HEAD"), timeout=3)' "$CPU_INDEX/torch/" 2>/dev/null; then
        printf '%s' "$CPU_INDEX"
    else
        say "No NVIDIA GPU here, and $CPU_INDEX did not answer: pip takes the torch it is configured" \
            "to find (PyPI's brings several GB of CUDA libraries; TORCH_INDEX=URL names another index)." >&2
    fi
}

# What an installation depends on besides its extras; a moved repository counts as a change.
fingerprint=$({
    printf '%s\n' "$root"
    cat setup.py pyproject.toml
} | cksum)

installed="" # the extras that the environment already has
if [ -f "$stamp" ] && "$python" -m pip --version >/dev/null 2>&1; then
    { read -r stamped && read -r installed; } <"$stamp" || stamped=""
    [ "$stamped" = "$fingerprint" ] || stale=yes
    for extra in "$@"; do
        case " $installed " in
        *" $extra "*) ;;
        *) stale=yes ;;
        esac
    done
    [ "${stale:-no}" = yes ] || exit 0
fi

extras=$installed # keep what was asked for before, so that quickstart after test does not lose it
for extra in "$@"; do
    case " $extras " in
    *" $extra "*) ;;
    *) extras="$extras $extra" ;;
    esac
done
# shellcheck disable=SC2086  # a list of words: extras' names hold no spaces
list=$(printf '%s,' $extras)
list=${list%,}

make_environment
index=$(torch_index)
set -- --editable ".${list:+[$list]}"
[ -z "$index" ] || set -- --extra-index-url "$index" "$@"
[ -t 1 ] || set -- --quiet "$@" # no progress bars in a log
say "Installing phi1_megatron and what it needs into $venv (a minute or two) ..."
rm -f "$stamp"
"$python" -m pip install --disable-pip-version-check "$@" ||
    fail "pip could not install phi1_megatron${list:+ with the extras $list}; its words are above."
printf '%s\n%s\n' "$fingerprint" "${list:+$(printf '%s' "$list" | tr ',' ' ')}" >"$stamp"
say "Ready: $venv/bin/phi1 --help"
