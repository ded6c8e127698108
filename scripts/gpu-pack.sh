#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh takes to a machine that has a GPU and no compiler, into one folder.
#
#   NVCC_WHEELS=... scripts/gpu-pack.sh FOLDER [--emulated]
#
# The binary, the tests that use a GPU, the self-test of the kernels' primitives with its images, tiny models, and the check itself.
# KERNEL_ARCHS (default 90a) says for which GPUs; NVCC_WHEELS, CUDA_HOME or PATH, where nvcc is. --emulated packs tests that
# bring an emulated GPU with them, to try the check where there is none; needs no nvcc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($#)) || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
features=()
if [[ ${2:-} == --emulated ]]; then
  features=(--features emu)
else
  export KERNELS=require KERNEL_ARCHS=${KERNEL_ARCHS:-90a}
fi
rm -rf "$out"/{tests,models,images}
mkdir -p "$out"/{tests,models,images}

cargo build --release "${features[@]}"
cp target/release/quadriga "$out/"
names=(kernels model invariance kv graphs)
cargo test --release --no-run --message-format=json "${features[@]}" "${names[@]/#/--test=}" |
  python3 -c '
import json, shutil, sys
for line in sys.stdin:
    m = json.loads(line) if line.startswith("{") else {}
    if m.get("executable") and "test" in m["target"]["kind"]:
        shutil.copy(m["executable"], sys.argv[1] + "/" + m["target"]["name"])
' "$out/tests"
strip "$out/quadriga" "$out"/tests/*
if [[ ${#features[@]} -gt 0 ]]; then
  library=$(find target/release/build -name 'libcuda.so*' -o -name 'libquadriga_emu*.so' | xargs -r ls -t | head -1)
  [[ -z $library ]] || cp "$library" "$out/tests/"
else
  MODES=plain OUT=$out/images kernels/test.sh selftest hopper
  mv "$out/images/selftest" "$out/images/hopper" "$out/tests/"
  rm -f "$out"/images/*.o "$out"/images/*.log
  nvcc=$(for d in ${NVCC_WHEELS:-} ${CUDA_HOME:-} ${CUDA_PATH:-} /usr/local/cuda; do ls "$d/bin/nvcc" 2>/dev/null || true; done | head -1)
  for name in selftest selftest_hopper; do
    codes=()
    for a in ${KERNEL_ARCHS//,/ }; do
      # What only Hopper has does not compile for others.
      [[ $name == selftest || $a == 90a ]] && codes+=("-gencode=arch=compute_$a,code=sm_$a")
    done
    [[ ${#codes[@]} == 0 ]] || "${nvcc:-nvcc}" -fatbin -std=c++17 -O3 -Ikernels "${codes[@]}" "kernels/$name.cu" -o "$out/images/$name.fatbin"
  done
fi
cp -r models/tiny* "$out/models/"
cp scripts/gpu-check.sh scripts/gpu_check.py scripts/gpu_torch.py "$out/"
du -sh "$out" | cut -f1
