#!/usr/bin/env bash
# Runs the kernel tests on the CPU, without Rust and without CUDA: plain, under ASan + UBSan and under TSan.
#
#   kernels/test.sh [NAME...]        all test_*.cpp, or those of these names (rows, matmul, ...)
#
# MODES="plain address,undefined thread" chooses among the builds; OUT is the folder they go to; CXX the compiler.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-${TMPDIR:-/tmp}/quadriga-kernel-tests}
cxx=${CXX:-g++}
names=("$@")
((${#names[@]})) || for f in "$here"/emu/test/test_*.cpp; do n=${f##*/test_}; names+=("${n%.cpp}"); done
mkdir -p "$out"
flags=(-std=c++17 -g -Wall -Wextra -Wno-unknown-pragmas -I"$here" -I"$here/emu")
# Never with -fsanitize: its hooks are weak symbols, one object serves all builds.
"$cxx" "${flags[@]}" -O2 -c "$here/emu/emu.cpp" -o "$out/emu.o"
failed=0
for mode in ${MODES:-plain address,undefined thread}; do
  san=() opt=-O2
  [[ $mode == plain ]] || san=("-fsanitize=$mode") opt=-O1
  for name in "${names[@]}"; do
    echo "== $name, $mode"
    # A test includes the .cu files it is about.
    "$cxx" "${flags[@]}" $opt "${san[@]}" -x c++ "$here/emu/test/test_$name.cpp" -x none "$out/emu.o" -o "$out/$name" -pthread
    ASAN_OPTIONS=detect_leaks=0 "$out/$name" >"$out/$name.log" 2>&1 || { failed=1; cat "$out/$name.log"; }
    tail -1 "$out/$name.log"
  done
done
exit $failed
