#!/usr/bin/env bash
# Brings VENV to what requirements/STACK pins, with this project in it, editable. `make setup` calls it where that changed.
# Takes prebuilt wheels from PIP_FIND_LINKS, and packages from PIP_INDEX_URL, as pip does; uv's own UV_* work too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
python=$VENV/bin/python
lock=requirements/$STACK/lock.txt
case $STACK in
    onedl) mmcv=onedl-mmcv newest=12 ;;
    openmmlab) mmcv=mmcv newest=11 ;;
    *) echo "ERROR: unknown STACK=$STACK; allowed: onedl, openmmlab" >&2; exit 1 ;;
esac
fail() { echo "ERROR: $*" >&2; exit 1; }

links=()
for link in ${PIP_FIND_LINKS:-}; do  # uv refuses a folder that is missing
    if [[ -d $link || $link == *://* ]]; then links+=(--find-links "$link"); fi
done
if [[ -n ${PIP_INDEX_URL:-} ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}; fi
install() { $VENV/bin/uv pip install --python $python --no-build-isolation -c $lock "${links[@]}" "$@"; }
works() { $python -c "import $1" 2> /dev/null; }

# mmcv's setup.py compiles for CUDA wherever torch sees a GPU, and fails without a toolkit that fits torch.
prepare_compile() {
    local cuda
    command -v g++ > /dev/null || fail 'compiling mmcv needs g++. On Debian and Ubuntu: apt-get install g++'
    [[ -e $($python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
        fail 'compiling mmcv needs Python.h. On Debian and Ubuntu: apt-get install python3-dev'
    cuda=$($python -c 'import torch; print(str(torch.version.cuda).split(".")[0])')
    if ! PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH nvcc --version 2> /dev/null | grep -q "release $cuda\."; then
        export CUDA_VISIBLE_DEVICES=
    fi
    export MAX_JOBS=${MAX_JOBS:-$(nproc)}
    echo "No prebuilt $mmcv fits: compiling it, about 15 minutes on 2 cores (CPU only)"
}

if [[ ! -x $VENV/bin/uv ]]; then
    "$PYTHON" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" ||
        fail "STACK=$STACK needs Python 3.10 to 3.$newest, and $PYTHON is none: make setup PYTHON=/path/to/python3.11"
    "$PYTHON" -m venv --clear $VENV
    $python -m pip install -q -c $lock uv
fi
# What mmcv and onedl-mmdetection are built with comes first.
install ninja packaging setuptools wheel torch torchvision
install --no-deps --only-binary $mmcv $mmcv 2> /dev/null || prepare_compile
install -r requirements/$STACK/direct.txt -e .
if ! works cv2; then
    echo 'OpenCV does not load here (usually libGL is missing): keeping its headless build only'
    $VENV/bin/uv pip uninstall --python $python opencv-python opencv-python-headless
    install --no-deps opencv-python-headless
fi
if ! works mmcv.ops; then  # a wheel for another torch
    prepare_compile
    install --no-deps --reinstall --no-cache --no-binary $mmcv $mmcv
fi
$python -c 'import mmcv.ops'
