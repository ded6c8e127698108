#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh takes to a machine that has a GPU and no compiler, into one folder.
#
#   NVCC_WHEELS=... scripts/gpu-pack.sh FOLDER      the real thing; nvcc may also be in CUDA_HOME or on PATH
#   scripts/gpu-pack.sh --emulated FOLDER           with an emulated GPU instead, to try the check without one; needs no nvcc
#
# The binary, the tests that use a GPU, the self-test of the kernels' primitives with its images, the tiny models, and the check
# itself; stripped, and as FOLDER.tar.gz at most 64 MiB. KERNEL_ARCHS (default 80,90a) says for which GPUs. Needs python3.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
emulated=0
[[ ${1:-} == --emulated ]] && { emulated=1; shift; }
(($# == 1)) && [[ $1 != -* ]] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$repository"
# Only what an earlier run of this script made is replaced.
if [[ -n $(ls -A "$out") && ! -e $out/gpu_check.py ]]; then
  echo "gpu-pack: $out holds something else: name an empty folder" >&2
  exit 2
fi
rm -rf "$out.tar.gz" "$out"/{quadriga,tests,selftest,emulated,models}
mkdir -p "$out"/{tests,selftest,models}

if ((emulated)); then
  build=(--features emu)
else
  build=(--release)
  export KERNELS=require KERNEL_ARCHS=${KERNEL_ARCHS:-80,90a}
fi
# Those of the backend: others that use a GPU (backward, sessions, speculative*, eagle_train) would make the pack too large.
tests=()
for name in kernels kernels_train model invariance kv graphs sampling verify; do
  tests+=("--test=$name")
done
# Integration tests bring the binary with them; cargo says where everything went.
built=$(cargo test --no-run --message-format=json "${build[@]}" "${tests[@]}" | python3 -c '
import json, os, shutil, sys
for line in sys.stdin:
    m = json.loads(line) if line.startswith("{") else {}
    kind = m.get("target", {}).get("kind", [])
    if m.get("executable") and "test" in kind:
        shutil.copy(m["executable"], os.path.join(sys.argv[1], "tests", m["target"]["name"]))
    elif m.get("executable") and "bin" in kind:
        shutil.copy(m["executable"], os.path.join(sys.argv[1], "quadriga"))
    elif os.path.exists(os.path.join(m.get("out_dir", ""), "args_check.h")):
        print(m["out_dir"])
' "$out")
[[ -x $out/quadriga && -d $built ]] || { echo "gpu-pack: cargo built no binary" >&2; exit 1; }

# The same programs test the primitives on the emulator, which they do here and now, and on a GPU.
objects=${CARGO_TARGET_DIR:-target}/gpu-pack
MODES=plain OUT=$objects LDFLAGS="-static-libstdc++ -static-libgcc" kernels/test.sh selftest hopper
cp "$objects"/{selftest,hopper} "$out/selftest/"
if ((emulated)); then
  mkdir "$out/emulated"
  cp "$built/libquadriga_emu.so" "$out/emulated/libcuda.so"
  strip --strip-debug "$out/emulated/libcuda.so"
else
  cp "$built"/selftest*.fatbin "$out/selftest/"
fi
strip "$out/quadriga" "$out"/tests/* "$out"/selftest/{selftest,hopper}
cp -r models/tiny* "$out/models/"
cp scripts/gpu-check.sh scripts/gpu_check.py scripts/gpu_torch.py "$out/"

# What travels is the archive.
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
mib=$((($(du -sb "$out.tar.gz" | cut -f1) + (1 << 20) - 1) >> 20))
echo "$out.tar.gz: $mib MiB"
((mib <= 64)) || { echo "gpu-pack: more than 64 MiB: build for fewer GPUs than KERNEL_ARCHS=${KERNEL_ARCHS:-80,90a}" >&2; exit 1; }
