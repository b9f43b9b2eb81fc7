#!/usr/bin/env bash
# The runs of docs/results.md: trains, evaluates, and joins the seeds into scenes.json and davis-2016.json of
# profiling/results. The runs are written to runs/; each seed takes about an hour on one core.
#
#   profiling/quality.sh scenes                  # generated scenes, three seeds
#   profiling/quality.sh davis DAVIS BACKBONE    # DAVIS-2016 from the folders of the data and of a ViT's weights
#   profiling/quality.sh report RUN DAVIS        # only the evaluation of such a run
set -euo pipefail
cd "$(dirname "$0")/.."
train() { python -m interpreter.train "$@"; }

scenes() {
    local runs=()
    for seed in 0 1 2; do
        coarse=runs/scenes-coarse-$seed run=runs/scenes-$seed data="--root runs/scenes"
        train --stage image --run "$coarse" $data --steps 2500 --peak-lr 5e-4 --seed "$seed"
        train --stage image --run "$run" $data --init "$coarse" --frame-size 192 288 --steps 1200 --seed "$seed"
        train --stage video --run "$run" --seed "$seed"
        python -m interpreter.evaluate --run "$run" $data --seeds "$seed" --frame-size 256 384 --protocol interpreter \
            --baselines one-segment grid k-means k-means-positions --clusters 6 8 11
        runs+=("$run/evaluation/synthetic-val-video/scores.json")
    done
    python -m profiling.quality scenes "${runs[@]}"
}

davis() {
    local scenes=runs/davis-scenes run=runs/davis
    local vit="--backbone $2 --feature-layer 8 --no-feature-norm --no-input-positions --frame-size 168 252 --dim 192 --heads 6"
    train --stage image --run "$scenes" --root runs/scenes $vit --no-flip --num-slots 11 --steps 1500 --peak-lr 5e-4
    train --stage image --preset davis --run "$run" --root "$1" --init "$scenes" $vit
    train --stage video --preset davis --run "$run"
    report "$run" "$1"
}

# The one command that makes the report of a run on DAVIS-2016.
report() {
    python -m interpreter.evaluate --run "$1" --data davis --root "$2" --frame-size 336 504 --merge-threshold 0.15 \
        --protocol davis-2016 interpreter smtc --sweep-merge 0.05 0.1 0.2 0.3 --sweep-slots 4 8 12 \
        --baselines one-segment grid k-means spectral --clusters 6 8
    python -m profiling.quality davis-2016 "$1/evaluation/davis-2016-val-video/scores.json"
}

"$@"
