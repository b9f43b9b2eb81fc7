# shellcheck shell=bash
# What the scripts of this folder share; sourced in the root of the repository.
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

present() { # tool, where it comes from: whether it is there; says so if not
    command -v "$1" >/dev/null && return
    echo "missing: $1 ($2)" >&2
    return 1
}

has_gpu() {
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" && return
    echo "missing: a CUDA device that PyTorch can use" >&2
    return 1
}

# A report of parts: $REPORT.json and $REPORT.md are whole after each part, so that a kill loses no more than the part
# under way, which they name.
begin_report() { # path without ending, title, device
    REPORT=$1
    FAILED=0
    "$PYTHON" profiling/parts.py begin "$REPORT" "$2" "$3"
}

part() { # name, seconds, command …: runs it in the time it has; its fate and the end of its output go to the report
    local name=$1 seconds=$2 log code=0 begin=$SECONDS left=$((${BUDGET:-86400} - SECONDS))
    shift 2
    if [ "$left" -lt 3 ]; then
        FAILED=$((FAILED + 1))
        skip "$name" "no time was left"
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    log=$(mktemp)
    "$PYTHON" profiling/parts.py start "$REPORT" "$name" "$seconds"
    echo "== $name (at most $seconds s)"
    # A part may hang with children that hold its output open: the group is killed, and nobody waits for a pipe.
    timeout --kill-after=2 "$seconds" "$@" >"$log" 2>&1 || code=$?
    tail -n 12 "$log"
    [ "$code" = 0 ] || FAILED=$((FAILED + 1))
    "$PYTHON" profiling/parts.py end "$REPORT" "$name" "$code" $((SECONDS - begin)) "$log"
    rm -f "$log"
}

skip() { # name, why
    echo "== $1: left out, $2"
    "$PYTHON" profiling/parts.py skip "$REPORT" "$1" "$2"
}

end_report() { # exits 1 if a part failed
    "$PYTHON" profiling/parts.py finish "$REPORT"
    echo "$REPORT.md: $FAILED parts failed"
    [ "$FAILED" = 0 ]
}
