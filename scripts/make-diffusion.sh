#!/usr/bin/env bash
# A small diffusion model and its relatives from nothing: data, an autoregressive model, its conversion to a diffusion model, and
# the distillation of that one's own trajectories, with the control that masks at random. Run from the repository's root after
# `cargo build --release --examples --bins`; FOLDER gets everything. Resumes where it stopped.
#
# usage: make-diffusion.sh FOLDER [SEED [large]]
set -euo pipefail
out=${1:?usage: make-diffusion.sh FOLDER [SEED [large]]} seed=${2:-1} size=${3:-}
bin=${CARGO_TARGET_DIR:-target}/release
q() { "$bin/quadriga" --seed "$seed" "$@"; }
steps=(1200 1500 2000 200) batch=2048 lr=(2e-3 1.5e-3 5e-4)
[[ $size == large ]] && steps=(6000 10000 10000 2000) batch=65536 lr=(6e-4 6e-4 1e-4)

[[ -f $out/init/config.json ]] || "$bin/examples/make_diffusion" "$out" 40000 ${size:+"$size"}
data=(--data "$out/train.jsonl" --held-out "$out/dev.jsonl" --batch-tokens "$batch" --beta2 0.95 --weight-decay 0.01 --schedule cosine --resume)
# The autoregressive twin learns the answers alone, as the diffusion model does.
[[ -d $out/ar/model ]] || q train full -m "$out/init" "${data[@]}" --steps "${steps[0]}" --lr "${lr[0]}" --warmup 50 --out "$out/ar"
# Rows go on predicting their successors; attention opens over the first fifth.
[[ -d $out/converted/model ]] || q train diffusion -m "$out/ar/model" "${data[@]}" --answer-length 72 --mask-token '<|mask|>' \
    --anneal 0.2 --weighting uniform --steps "${steps[1]}" --lr "${lr[1]}" --warmup 50 --out "$out/converted"
[[ -d $out/vanilla/model ]] || q train diffusion -m "$out/converted/model" "${data[@]}" --answer-length 72 \
    --weighting bound --steps "${steps[2]}" --lr "${lr[1]}" --warmup 50 --out "$out/vanilla"
distil() {
    local name=$1; shift
    [[ -d $out/$name/model ]] || q distill -m "$out/vanilla/model" "${data[@]}" --answer-length 72 --limit 2000 --teacher-block 24 \
        --cached-teacher --window 24,24,48,72 --steps "${steps[3]}" --lr "${lr[2]}" --warmup 20 --out "$out/$name" "$@"
}
distil d3llm
distil random --random
