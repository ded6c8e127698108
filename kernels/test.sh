#!/usr/bin/env bash
# Runs the kernel tests on the CPU, without Rust and without CUDA: plain, under ASan + UBSan and under TSan.
#
#   kernels/test.sh [NAME...]        all test_*.cpp, or those of these names (rows, matmul, ...)
#
# MODES="plain address,undefined thread" chooses among the builds; OUT is the folder they go to; CXX the compiler, with LDFLAGS; JOBS how many
# run at a time (default: one a core).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-${TMPDIR:-/tmp}/quadriga-kernel-tests}
cxx=${CXX:-g++}
names=("$@")
((${#names[@]})) || for f in "$here"/emu/test/test_*.cpp; do n=${f##*/test_}; names+=("${n%.cpp}"); done
mkdir -p "$out"
flags=(-std=c++17 -g -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -I"$here" -I"$here/emu")
# The emulator is never built with -fsanitize: its hooks are weak symbols, the same objects serve all builds.
emulator=()
for f in "$here"/emu/emu*.cpp; do
  n=${f##*/}
  object=$out/${n%.cpp}.o
  if [[ ! $object -nt $f || -n $(find "$here"/emu/*.h -newer "$object") ]]; then
    "$cxx" "${flags[@]}" -O2 -c "$f" -o "$object.$$" && mv "$object.$$" "$object"
  fi
  emulator+=("$object")
done
# Builds and runs one; what it has to say is kept until the others before it have said theirs.
one() {
  echo "== $name, $mode"
  # A test includes the .cu files it is about.
  "$cxx" "${flags[@]}" $opt "${san[@]}" -x c++ "$here/emu/test/test_$name.cpp" -x none "${emulator[@]}" -o "$out/$name" -pthread ${LDFLAGS:-} || return 1
  local status=0
  ASAN_OPTIONS=detect_leaks=0 "$out/$name" >"$out/$name.log" 2>&1 || { status=1; cat "$out/$name.log"; }
  tail -1 "$out/$name.log"
  return $status
}
failed=0
for mode in ${MODES:-plain address,undefined thread}; do
  san=() opt=-O2 pids=()
  [[ $mode == plain ]] || san=("-fsanitize=$mode") opt=-O1
  for name in "${names[@]}"; do
    while (($(jobs -rp | wc -l) >= ${JOBS:-$(nproc)})); do sleep 0.2; done
    one >"$out/$name.said" 2>&1 &
    pids+=($!)
  done
  for i in "${!names[@]}"; do
    wait "${pids[i]}" || failed=1
    cat "$out/${names[i]}.said"
  done
done
exit $failed
