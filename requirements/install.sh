#!/usr/bin/env bash
# Brings .venv to what requirements/ pins, with this project in it, editable. `make setup` calls it where that changed.
# Takes prebuilt wheels from PIP_FIND_LINKS, and packages from PIP_INDEX_URL, as pip does; uv's own UV_* work too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
python=.venv/bin/python
lock=requirements/lock.txt
fail() { echo "ERROR: $*" >&2; exit 1; }

links=()
for link in ${PIP_FIND_LINKS:-}; do  # uv refuses a folder that is missing
    if [[ -d $link || $link == *://* ]]; then links+=(--find-links "$link"); fi
done
if [[ -n ${PIP_INDEX_URL:-} ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}; fi
install() { .venv/bin/uv pip install --python $python --no-build-isolation -c $lock "${links[@]}" "$@"; }
works() { $python -c "import $1" 2> /dev/null; }

# onedl-mmcv's setup.py compiles for CUDA wherever torch sees a GPU, and fails without a toolkit that fits torch.
prepare_compile() {
    local cuda
    command -v g++ > /dev/null || fail 'compiling onedl-mmcv needs g++. On Debian and Ubuntu: apt-get install g++'
    [[ -e $($python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
        fail 'compiling onedl-mmcv needs Python.h. On Debian and Ubuntu: apt-get install python3-dev'
    cuda=$($python -c 'import torch; print(str(torch.version.cuda).split(".")[0])')
    if ! PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH nvcc --version 2> /dev/null | grep -q "release $cuda\."; then
        export CUDA_VISIBLE_DEVICES=
    fi
    export MAX_JOBS=${MAX_JOBS:-$(nproc)}
    echo "No prebuilt onedl-mmcv fits: compiling it, about 15 minutes on 2 cores (CPU only)"
}

if [[ ! -x .venv/bin/uv ]]; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
        fail "rl_mmdet needs Python 3.10, 3.11 or 3.12, and $PYTHON is none: make setup PYTHON=/path/to/python3.11"
    "$PYTHON" -m venv --clear .venv
    $python -m pip install -q -c $lock uv
fi
# What onedl-mmcv and onedl-mmdetection are built with comes first.
install ninja packaging setuptools wheel torch torchvision
install --no-deps --only-binary onedl-mmcv onedl-mmcv 2> /dev/null || prepare_compile
install -r requirements/direct.txt -e .
if ! works cv2; then
    echo 'OpenCV does not load here (usually libGL is missing): keeping its headless build only'
    .venv/bin/uv pip uninstall --python $python opencv-python opencv-python-headless
    install --no-deps opencv-python-headless
fi
if ! works mmcv.ops; then  # a wheel for another torch
    prepare_compile
    install --no-deps --reinstall --no-cache --no-binary onedl-mmcv onedl-mmcv
fi
$python -c 'import mmcv.ops'
