# shellcheck shell=bash
# Functions of profiling's scripts, which source it in the root of the repository: checks for tools, reports of parts.
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
BACKGROUND='' MATCHED=''
SECONDS=0 # the budget's clock, whatever the caller's environment says

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

# A report of parts: $REPORT.json, $REPORT.md and $REPORT-logs.tar.gz, which holds the whole output of each part, are
# complete after each part. A kill loses no more than the part that is running, and the report names it.
# $BUDGET is the number of seconds that all parts share. If $ONLY is set, a regular expression, only
# parts whose names begin with it run.
begin_report() { # path without ending, title, device
    REPORT=$1
    FAILED=0
    ASKED_FOR=${ONLY:-} # some parts run in any case, without $ONLY
    LOGS=$(mktemp -d)
    trap 'rm -rf "$LOGS"' EXIT
    trap interrupted INT TERM
    "$PYTHON" -m profiling.common.parts begin "$REPORT" "$2" "$3"
}

interrupted() { # ends what is running; the report names it
    # Ctrl-C may come right after the start of a job, before a variable holds its number, so bash is asked for it.
    # The new process may miss a signal, and `timeout` may end before its child, which is in the same group. So the
    # whole group is signalled until it is empty: for two seconds with SIGTERM, then with SIGKILL, which nobody ignores.
    local job try signal
    for job in $(jobs -pr); do
        signal=TERM
        for ((try = 0; try < 30; try++)); do
            [ "$try" -lt 20 ] || signal=KILL
            kill -s "$signal" -- "$job" "-$job" 2>/dev/null || break
            sleep 0.1
        done
    done
    echo "interrupted: $REPORT.md has the parts that were finished" >&2
    exit 130
}

wanted() { # name: whether --only asks for it
    [[ -z ${ASKED_FOR:-} || ! $1 =~ ^($ASKED_FOR) ]] || MATCHED=1
    [[ -z ${ONLY:-} || $1 =~ ^($ONLY) ]]
}

log_of() { # name: the file that holds its output
    echo "$LOGS/$(printf %02d "$(find "$LOGS" -type f | wc -l)")-${1//[^A-Za-z0-9]/-}.log"
}

time_for() { # seconds that a part may take, of those that are left; 0: there is no time
    local left=$((${BUDGET:-86400} - SECONDS))
    [ "$left" -ge 3 ] || left=0
    echo $(($1 < left ? $1 : left))
}

late() { # name, seconds: whether there is no time for it, which counts as a failure
    [ "$2" = 0 ] || return
    FAILED=$((FAILED + 1))
    skip "$1" "no time was left" || true
}

record_end() { # name, exit status, seconds, log
    [ "$2" = 0 ] || FAILED=$((FAILED + 1))
    "$PYTHON" -m profiling.common.parts end "$REPORT" "$1" "$2" "$3" "$4"
    # tar's status is 1 if a background part wrote to its log meanwhile; the archive is good.
    tar -C "$LOGS" -czf "$LOGS.tar.gz" . 2>/dev/null || [ $? = 1 ]
    mv "$LOGS.tar.gz" "$REPORT-logs.tar.gz"
}

listed() { # name: with --list, prints it in place of running it
    [ -n "${LIST:-}" ] && echo "$1"
}

part() { # name, seconds, command …: runs the command for at most that time and records its end and its last lines
    wanted "$1" || return 0
    listed "$1" && return
    local name=$1 seconds log job code=0 begin=$SECONDS
    seconds=$(time_for "$2")
    shift 2
    late "$name" "$seconds" && return
    log=$(log_of "$name")
    "$PYTHON" -m profiling.common.parts start "$REPORT" "$name" "$seconds"
    echo "== $name (at most $seconds s)"
    # A part may hang with children that hold its output open: the group is killed, and nobody waits for a pipe.
    timeout --kill-after=2 "$seconds" "$@" >"$log" 2>&1 &
    job=$!
    wait "$job" || code=$?
    tail -n "${TAIL:-12}" "$log"
    record_end "$name" "$code" $((SECONDS - begin)) "$log"
}

background() { # name, seconds, command …: starts a part that runs at the same time as those that follow, until `await`
    wanted "$1" || return 0
    listed "$1" && return
    local seconds
    seconds=$(time_for "$2")
    late "$1" "$seconds" && return
    BACKGROUND=$1
    shift 2
    BACKGROUND_BEGIN=$SECONDS
    BACKGROUND_LOG=$(log_of "$BACKGROUND")
    "$PYTHON" -m profiling.common.parts start "$REPORT" "$BACKGROUND" "$seconds"
    echo "== $BACKGROUND (at most $seconds s, during the next parts)"
    timeout --kill-after=2 "$seconds" "$@" >"$BACKGROUND_LOG" 2>&1 &
    BACKGROUND_JOB=$!
}

await() { # waits for the part in the background; its exit status
    local code=0
    [ -n "$BACKGROUND" ] || return 0
    wait "$BACKGROUND_JOB" || code=$?
    echo "== $BACKGROUND has ended"
    tail -n 3 "$BACKGROUND_LOG"
    record_end "$BACKGROUND" "$code" $((SECONDS - BACKGROUND_BEGIN)) "$BACKGROUND_LOG"
    BACKGROUND=''
    return "$code"
}

skip() { # name, why
    wanted "$1" || return 0
    listed "$1" && return
    echo "== $1: left out, $2"
    "$PYTHON" -m profiling.common.parts skip "$REPORT" "$1" "$2"
}

end_report() { # exits 1 if a part failed
    [ -z "${LIST:-}" ] || return 0
    if [[ -n ${ASKED_FOR:-} && -z $MATCHED ]]; then
        echo "no part's name begins with '$ASKED_FOR'; --list names them" >&2
        exit 2
    fi
    await || true
    "$PYTHON" -m profiling.common.parts finish "$REPORT"
    echo "$REPORT.md: $FAILED parts failed"
    [ "$FAILED" = 0 ]
}
