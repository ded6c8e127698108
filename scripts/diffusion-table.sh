#!/usr/bin/env bash
# Points of all methods on the development tasks of scripts/make-diffusion.sh, as a table of points, AUP and a picture.
#
# usage: diffusion-table.sh FOLDER [LIMIT]
set -euo pipefail
out=${1:?usage: diffusion-table.sh FOLDER [LIMIT]} limit=${2:-0}
bin=${QUADRIGA:-${CARGO_TARGET_DIR:-target}/release/quadriga}
rm -f "$out/points.json"
m() { # MODEL METHOD FLAGS..
    echo "== $2"
    local model=$1 method=$2
    shift 2
    # A curve that ends too low is a result too.
    "$bin" eval aup -m "$out/$model" --data "$out/dev.jsonl" --limit "$limit" --answer-length 72 --method "$method" \
        --points "$out/points.json" "$@" || [[ $? == 1 ]]
}
h=0.02,0.05,0.1,0.2,0.35,0.5
p=0.98,0.95,0.9,0.8,0.7
m ar/model autoregressive
m vanilla/model vanilla --block-size 24 --passes 72
m vanilla/model confidence --block-size 24 --confidence 0.9 --thresholds $p
m vanilla/model D2F-style --block-size 24 --confidence 0.9 --add 10 --activate 95 --thresholds $p
m random/model random-masks --block-size 24 --thresholds $h
m d3llm/model d3LLM-one-block --block-size 24 --add 100 --activate 100 --thresholds $h
m d3llm/model d3LLM --block-size 24 --thresholds $h
m d3llm/model d3LLM-cached --block-size 24 --cache delayed --delay 1 --thresholds $h
"$bin" eval aup "$out/points.json" --svg "$out/points.svg" || [[ $? == 1 ]]
