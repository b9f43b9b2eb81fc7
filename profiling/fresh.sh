#!/usr/bin/env bash
# Installs the committed state from scratch, runs the demo and the tests. Each Python gets a new clone and environment with
# packages from PyPI, without this machine's pip configuration (report: fresh.md). `packages` does the same with the newest
# packages and with the oldest that pyproject.toml allows (fresh-packages.md). All of it takes an hour on two cores and
# 15 GB, and needs python3.11 to python3.13 on the path. `ops` takes a quarter of an hour and 11 GB, and only needs
# python3.12.
#
#   profiling/fresh.sh              # all
#   profiling/fresh.sh users        # Python 3.12 and 3.13, as README says: fresh.md
#   profiling/fresh.sh packages     # newest and oldest packages: fresh-packages.md
#   profiling/fresh.sh ops          # slotkernels by itself, oldest and newest PyTorch: fresh-ops.md
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=profiling/common/parts.sh
source profiling/common/parts.sh
WHAT=${1:-all}
[[ $# -le 1 && $WHAT =~ ^(all|users|packages|ops)$ ]] ||
    { echo "usage: profiling/fresh.sh [users|packages|ops]" >&2 && exit 2; }
unset PYTHONPATH "${!PIP_@}" "${!UV_@}" "${!SLOTKERNELS_@}"
export PIP_CONFIG_FILE=/dev/null PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CONFIG=1 UV_LINK_MODE=copy TAIL=6
SOURCE=$PWD WHERE=$PWD/.fresh
UV=$WHERE/uv/bin/uv

inside() { # name of a part, seconds, folder below $WHERE, shell commands
    part "$1" "$2" bash -euo pipefail -c "cd '$WHERE/$3' && $4"
}

clone() { # folder
    rm -rf "${WHERE:?}/$1" && git clone --quiet "$SOURCE" "$WHERE/$1"
}

# Decimal units, as install.py announces them. pip names the size of each file that it downloads.
SIZES='sed -nE "s/^ *Downloading .* \(([0-9.]+) ([kMG]?)B\)$/\1 \2/p" downloads.log | awk -v disk="$(du -sB1000 .venv)" "
    {size += \$1 * (\$2 == \"G\" ? 1 : \$2 == \"M\" ? 1e-3 : 1e-6)}
    END {printf \"%.1f GB downloaded, %.1f GB on disk\n\", size, disk / 1e6}"'

user() { # version of Python: what README promises
    clone "$1"
    inside "Python $1, environment of the demo" 1800 "$1" "make PYTHON=python$1 .venv/.demo | tee downloads.log && $SIZES"
    inside "Python $1, demo, short" 900 "$1" "make PYTHON=python$1 demo SHORT=1"
    inside "Python $1, environment of the tests" 1800 "$1" "make PYTHON=python$1 .venv/.ready .venv/movi | tee -a downloads.log && $SIZES"
    inside "Python $1, tests" 3000 "$1" "make PYTHON=python$1 test"
    rm -rf "${WHERE:?}/$1" # an environment has gigabytes
}

bounds() { # name, version of Python, resolution of uv
    clone "$1"
    local extras='--extra demo --extra keops --extra vit'
    local build='echo "setuptools>=77 wheel>=0.45 ninja>=1.11 pytest>=8 geomloss>=0.3.1 hypothesis>=6.100" | tr " " "\n"'
    inside "$1 packages, environment" 1200 "$1" "python$2 -m venv .venv && $build | '$UV' pip compile --quiet --no-header \
        --no-annotate --python .venv/bin/python --resolution $3 $extras pyproject.toml - -o packages.txt && \
        '$UV' pip install --quiet --python .venv/bin/python -r packages.txt && cat packages.txt && \
        SLOTKERNELS_BUILD=1 \
        '$UV' pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e . && touch .venv/.demo"
    inside "$1 packages, demo, short" 900 "$1" "make demo SHORT=1"
    inside "$1 packages, tests of the ops and of every command" 1800 "$1" ".venv/bin/python -m pytest -q -m 'not slow' \
        tests/slotkernels/test_sinkhorn.py tests/slotkernels/test_merging.py tests/slotkernels/test_propagation.py \
        tests/slotkernels/test_slot_attention.py tests/interpreter/models tests/interpreter/test_segment.py"
    rm -rf "${WHERE:?}/$1" # an environment has gigabytes
}

# slotkernels with PyTorch only: a wheel is built and tried, and the tests run with the wheel of the *other* environment,
# because a wheel must work with every PyTorch from the oldest on. NumPy is for the tests only. The interpreter of Triton
# 3.6, which comes with the oldest PyTorch, fails with NumPy 2.4.
ALONE='python -m slotkernels | tee backends.txt && grep -q "^cpp *yes" backends.txt'
OPS="tests/slotkernels/test_native.py tests/slotkernels/test_doctests.py tests/slotkernels/test_sinkhorn_cpp.py \
    tests/slotkernels/test_slot_update_cpp.py tests/slotkernels/test_invariant_slot_attention_cpp.py \
    tests/slotkernels/test_inverted_attention.py"

ops_build() { # name, requirement of PyTorch
    clone "$1"
    inside "$1 PyTorch, slotkernels" 1200 "$1" "python3.12 -m venv .venv && export PATH=\$PWD/.venv/bin:\$PATH && \
        pip install --quiet '$2' 'setuptools>=77' wheel ninja && \
        SLOTKERNELS_BUILD=1 FORCE_CUDA=0 pip wheel --quiet --no-deps --no-build-isolation -w dist ./kernels && \
        pip install --quiet dist/slotkernels-*.whl && mkdir alone && cd alone && $ALONE"
    inside "$1 PyTorch, models before and after" 300 "$1/alone" "export PATH=\$PWD/../.venv/bin:\$PATH && \
        python ../examples/dropin/compare.py --seconds 2 savi slot_contrast"
}

ops_test() { # name, name of the environment that built the wheel, requirement of NumPy
    inside "$1 PyTorch, wheel built with the $2, tests" 1800 "$1" "export PATH=\$PWD/.venv/bin:\$PATH && \
        pip install --quiet --no-deps --force-reinstall ../$2/dist/slotkernels-*.whl && (cd alone && $ALONE) && \
        pip install --quiet '$3' pytest hypothesis && python -m pytest -q -r fE -m 'not slow' $OPS"
}

needed() { # the Pythons of what is asked for
    case $WHAT in
    ops) echo python3.12 ;;
    users) echo python3.12 python3.13 ;;
    packages) echo python3.11 python3.13 ;;
    *) echo python3.11 python3.12 python3.13 ;;
    esac
}
for python in $(needed); do
    "$python" --version >/dev/null 2>&1 || { echo "missing: $python, from python.org, uv or pyenv" >&2 && exit 1; }
done
PYTHON=$python # writes the reports, which name the packages that it has: none
mkdir -p "$WHERE"
users() {
    begin_report profiling/results/fresh "make fresh: as a user" cpu
    user 3.12
    user 3.13
    end_report
}

packages() {
    [ -x "$UV" ] || { python3 -m venv "$WHERE/uv" && "$WHERE/uv/bin/pip" install --quiet uv; }
    begin_report profiling/results/fresh-packages "make fresh: newest and oldest packages" cpu
    bounds newest 3.13 highest
    bounds oldest 3.11 lowest-direct
    end_report
}

ops() {
    begin_report profiling/results/fresh-ops "make fresh: slotkernels by itself" cpu
    ops_build oldest "torch==$(sed -nE 's/^dependencies = \["torch>=([0-9.]+)"\]$/\1/p' kernels/pyproject.toml).*"
    ops_build newest torch
    ops_test oldest newest 'numpy<2.4'
    ops_test newest oldest numpy
    rm -rf "$WHERE/oldest" "$WHERE/newest"
    end_report
}

CODE=0
[[ $WHAT != all && $WHAT != users ]] || (users) || CODE=1
[[ $WHAT != all && $WHAT != packages ]] || (packages) || CODE=1
[[ $WHAT != all && $WHAT != ops ]] || (ops) || CODE=1
exit "$CODE"
