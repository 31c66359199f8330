#!/usr/bin/env bash
# Brings .venv to what requirements/*.txt say; called by the Makefile: PYTHON=python3 requirements/install.sh
#
# Every finished step leaves a stamp with a hash of what it was made from, so a second call does nothing and an
# interrupted one goes on where it stopped. Logs and stamps live in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
venv=.venv
py=$PWD/$venv/bin/python
steps=5
pins=()
for file in requirements/*.txt; do pins+=(-c "$file"); done
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*"; }
fail() { say "ERROR: $*" >&2; exit 1; }
minutes() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# ---------------------------------------------------------------- stamps

inputs() {  # what each step is made from
    case $1 in
        venv) cat requirements/build.txt ;;
        torch) cat requirements/torch.txt ;;
        packages) cat requirements/{runtime,tests}.txt ;;
        mmcv) cat requirements/{torch,mmcv}.txt ;;
        project) pwd; cat setup.py rl_mmdet/version.py ;;
    esac
}
key() { inputs "$1" | sha256sum | cut -d ' ' -f 1; }
is_done() { [[ -e $venv/.stamps/$1 && $(<"$venv/.stamps/$1") == "$(key "$1")" ]]; }
mark_done() { key "$1" > "$venv/.stamps/$1"; }

all_done() {
    local step
    for step in venv torch packages mmcv project; do is_done "$step" || return 1; done
}

# ---------------------------------------------------------------- running with a sign of life

# The last thing that the log tells: a compile's [12/87], or else pip's last line.
progress() {
    local compiled
    compiled=$(grep -aoE '^ *\[[0-9]+/[0-9]+\]' "$1" | tail -n 1 | tr -d ' ' || true)
    if [[ -n $compiled ]]; then
        say "compiled $compiled"
    elif grep -aqE "^ *building '.*' extension" "$1"; then
        say "compiling the first files"
    else
        grep -av '^WARNING' "$1" | tail -n 1 | tr -d '\r' | sed 's|^ *||' | cut -c 1-90 || true
    fi
}

# run LOG COMMAND...: everything goes to the log, a line every 30 s to the terminal, the log's end too on failure.
# The command gets its own session, so that an interruption takes its children (compilers) along.
run() {
    local log=$venv/.logs/$1.log start=$SECONDS said=$SECONDS pid status=0
    shift
    : > "$log"
    setsid "$@" > "$log" 2>&1 < /dev/null &
    pid=$!
    trap 'kill -TERM -- "-'"$pid"'" 2> /dev/null; say "      interrupted: the next make goes on here"; exit 130' INT TERM HUP
    while kill -0 "$pid" 2> /dev/null; do
        sleep 0.5
        if ((SECONDS - said >= 30)); then
            said=$SECONDS
            say "      $(minutes $((SECONDS - start)))  $(progress "$log")"
        fi
    done
    wait "$pid" || status=$?
    trap - INT TERM HUP
    if ((status)); then
        tail -n 40 "$log"
        say "      failed after $(minutes $((SECONDS - start))); the whole log: $log"
    fi
    return "$status"
}

# A package whose installation was cut off has no RECORD: pip must not take it for installed.
drop_half_installed() {
    local site=("$venv"/lib/python3*/site-packages) dist
    for dist in "${site[0]}"/*.dist-info; do
        if [[ -d $dist && ! -e $dist/RECORD ]]; then rm -rf "$dist"; fi
    done
    rm -rf "${site[0]}"/~*
}

pip_install() {  # pip_install LOG ARGUMENTS...
    local log=$1
    shift
    drop_half_installed
    run "$log" "$py" -m pip install "${pins[@]}" "$@"
}

# ---------------------------------------------------------------- the steps

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null; }

check_python() {
    local version found=() name
    version=$(version_of "$PYTHON") ||
        fail "$PYTHON does not run. Name a Python 3.10, 3.11 or 3.12: make PYTHON=/path/to/python3.11 ..."
    case $version in 3.10 | 3.11 | 3.12) ;; *)
        for name in python3.12 python3.11 python3.10; do
            if "$name" --version > /dev/null 2>&1; then found+=("$name"); fi
        done
        fail "rl_mmdet needs Python 3.10, 3.11 or 3.12, and $PYTHON is $version." \
            "Name another: make PYTHON=${found[0]:-/path/to/python3.11} ..." ;;
    esac
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null ||
        fail "$PYTHON lacks the venv module. On Debian and Ubuntu: apt-get install python$version-venv"
}

make_venv() {
    if ! "$py" -m pip --version > /dev/null 2>&1; then
        check_python
        find "$venv/" -mindepth 1 ! -path "$venv/.lock" -delete  # what an interrupted set-up left
        mkdir -p "$venv"/.stamps "$venv"/.logs "$TMPDIR"
        run venv "$PYTHON" -m venv "$venv"
    fi
    pip_install build -r requirements/build.txt
}

install_torch() {
    pip_install torch -r requirements/torch.txt
}

install_packages() {
    pip_install packages --no-build-isolation -r requirements/runtime.txt -r requirements/tests.txt
    if ! "$py" -c 'import cv2' 2> /dev/null; then
        say "      OpenCV does not load here (usually libGL is missing): keeping its headless build only"
        run opencv "$py" -m pip uninstall -y opencv-python opencv-python-headless
        pip_install opencv --no-deps "$(grep '^opencv-python-headless==' requirements/runtime.txt)"
        "$py" -c 'import cv2' || fail "OpenCV does not load, see above."
    fi
}

mmcv_pin() { grep '^onedl-mmcv==' requirements/mmcv.txt; }

mmcv_works() {
    "$py" -c 'import sys, mmcv.ops; sys.exit(mmcv.__version__ != sys.argv[1].split("==")[1])' "$(mmcv_pin)" \
        > /dev/null 2>&1
}

# CUDA ops are compiled where there are a GPU and a CUDA toolkit of torch's major version, else CPU ops alone.
# mmcv's setup.py asks for the GPU only, and fails where the toolkit is missing.
cuda_ops() {
    "$py" - 2> /dev/null <<'PY'
import subprocess, sys, torch
from torch.utils.cpp_extension import CUDA_HOME
if not (torch.cuda.is_available() and CUDA_HOME):
    sys.exit(1)
release = subprocess.run([f'{CUDA_HOME}/bin/nvcc', '--version'], capture_output=True, text=True, check=True).stdout
sys.exit(f'release {torch.version.cuda.split(".")[0]}.' not in release)
PY
}

compile_jobs() {  # one per core, but no more than one per 2 GiB of free memory
    local jobs memory
    jobs=$(nproc)
    memory=$(awk '/MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
    ((memory >= jobs)) || jobs=$memory
    ((jobs >= 1)) || jobs=1
    say "$jobs"
}

compile_mmcv() {
    local include kind=CPU
    include=$("$py" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    command -v g++ > /dev/null || fail "compiling onedl-mmcv needs g++. On Debian and Ubuntu: apt-get install g++"
    [[ -e $include/Python.h ]] ||
        fail "compiling onedl-mmcv needs Python.h. On Debian and Ubuntu: apt-get install python3-dev"
    export MAX_JOBS=${MAX_JOBS:-$(compile_jobs)}
    if cuda_ops; then
        kind='CPU and CUDA'
    elif [[ ${FORCE_CUDA:-0} != 1 ]]; then
        export CUDA_VISIBLE_DEVICES=
    fi
    say "      no fitting prebuilt $(mmcv_pin): compiling its $kind ops, $MAX_JOBS at a time"
    say "      CPU ops take about 15 minutes on 2 cores; a line every 30 s; the log: $venv/.logs/mmcv.log"
    # -v: the compiler's steps into the log. First with pip's cache, which may hold an earlier compile's result.
    pip_install mmcv -v --no-deps --force-reinstall --no-build-isolation "$(mmcv_pin)"
    if mmcv_works || grep -aq "building 'mmcv" "$venv/.logs/mmcv.log"; then return; fi
    say "      pip's cache held a build that does not fit this torch: compiling again"
    pip_install mmcv -v --no-deps --force-reinstall --no-build-isolation --no-cache-dir "$(mmcv_pin)"
}

install_mmcv() {
    mmcv_works && return
    local log=$venv/.logs/mmcv-wheel.log
    if "$py" -m pip install "${pins[@]}" --no-deps --force-reinstall --only-binary onedl-mmcv "$(mmcv_pin)" \
        > "$log" 2>&1 && mmcv_works; then
        say "      took the prebuilt wheel"
        return
    fi
    compile_mmcv
    mmcv_works || { "$py" -c 'import mmcv.ops' || true; fail "onedl-mmcv was built but does not load, see above."; }
}

install_project() {
    pip_install project --no-deps --no-build-isolation -e .
}

step() {  # step NUMBER STAMP "what: how long" FUNCTION
    is_done "$2" && return
    say "[$1/$steps] $3"
    local start=$SECONDS
    mkdir -p "$TMPDIR"
    "$4"
    mark_done "$2"
    say "      done in $(minutes $((SECONDS - start)))"
}

# ----------------------------------------------------------------

if [[ ! -x $py ]]; then
    check_python
    rm -rf "$venv/.stamps"
elif [[ $PYTHON != python3 && $(version_of "$PYTHON") != "$(version_of "$py")" ]]; then
    fail "$venv holds Python $(version_of "$py"), which $PYTHON is not. To change it, remove it first: rm -rf $venv"
fi
all_done && exit 0
mkdir -p "$venv"
exec 9> "$venv/.lock"
flock --nonblock 9 || { say "Another set-up is at work in $venv: waiting for it to end."; flock 9; }
mkdir -p "$venv"/.stamps "$venv"/.logs
export TMPDIR=$PWD/$venv/.tmp  # pip unpacks gigabytes, and leaves them when interrupted
clean_up() { rm -rf "$TMPDIR"; }
clean_up
trap clean_up EXIT

step 1 venv 'virtual environment and build tools: seconds' make_venv
step 2 torch "$(grep '^torch==' requirements/torch.txt) and torchvision: about 2 minutes, 6 GB on disk" install_torch
step 3 packages 'OpenMMLab packages but mmcv, timm, test tools: about a minute' install_packages
step 4 mmcv "$(mmcv_pin): seconds from a wheel, about 15 minutes (2 cores) where it must be compiled" install_mmcv
step 5 project 'this project, editable: seconds' install_project
