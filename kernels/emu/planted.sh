#!/usr/bin/env bash
# Plants the bugs of test/planted.cu one by one: each must be caught by the tool named here, and with none planted nothing may be
# reported. Prints what every tool says of every bug.
#
#   kernels/emu/planted.sh          OUT and CXX as for kernels/test.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-${TMPDIR:-/tmp}/quadriga-kernel-tests}
cxx=${CXX:-g++}
mkdir -p "$out"
flags=(-std=c++17 -g -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -I"$here/.." -I"$here")
emulator=()
for f in "$here"/emu*.cpp; do
  n=${f##*/}
  "$cxx" "${flags[@]}" -O2 -c "$f" -o "$out/planted-${n%.cpp}.o"
  emulator+=("$out/planted-${n%.cpp}.o")
done
modes=(plain address,undefined thread)
for mode in "${modes[@]}"; do
  san=() opt=-O2
  [[ $mode == plain ]] || san=("-fsanitize=$mode") opt=-O1
  "$cxx" "${flags[@]}" $opt "${san[@]}" -x c++ "$here/test/planted.cu" -x none "${emulator[@]}" -o "$out/planted-$mode" -pthread
done

# What a run shows: `values` wrong ones, `schedules` that differ, `emulator` a check of its own, `asan`, `tsan`; or nothing.
saw() {  # mode, case, number
  local log=$out/planted.log seen=()
  ASAN_OPTIONS=detect_leaks=0 PLANTED=$3 "$out/planted-$1" "$2" >"$log" 2>&1 || true
  grep -q "wrong values" "$log" && seen+=(values)
  grep -q "schedule . differs" "$log" && seen+=(schedules)
  grep -q "gpu-emu:" "$log" && seen+=(emulator)
  grep -q "AddressSanitizer\|runtime error" "$log" && seen+=(asan)
  grep -q "ThreadSanitizer" "$log" && seen+=(tsan)
  # Whatever else went wrong is no silence.
  ((${#seen[@]})) || grep -q ", 0 failures" "$log" || seen+=(crash)
  echo "${seen[*]:-nothing}"
}

failed=0
for mode in "${modes[@]}"; do
  got=$(saw "$mode" "" 0)
  echo "right, $mode: $got"
  [[ $got == nothing ]] || { failed=1; echo "  FALSE ALARM"; cat "$out/planted.log"; }
done
while IFS='|' read -r number case tool what; do
  plain=$(saw plain "$case" "$number") asan=$(saw address,undefined "$case" "$number") tsan=$(saw thread "$case" "$number")
  verdict=caught
  case $tool in
    asan) [[ " $asan " == *" asan "* ]] || verdict=MISSED ;;
    tsan) [[ " $tsan " == *" tsan "* ]] || verdict=MISSED ;;
    *) [[ " $plain " == *" $tool "* ]] || verdict=MISSED ;;
  esac
  [[ $verdict == caught ]] || failed=1
  printf '%2d %-62s %s by %-9s | plain: %s | asan: %s | tsan: %s\n' "$number" "$what" "$verdict" "$tool" "$plain" "$asan" "$tsan"
done <<'LIST'
1|tiles|tsan|no barrier before a tile is overwritten
2|tiles|values|cp.async.wait_group one too few
3|tiles|values|no barrier after the copies
4|sum|tsan|no barrier in a reduction
5|tail|asan|a store one past the end
6|mask|values|the wrong bit of a mask
7|compact|schedules|rows compacted in place while others read them
8|branch|emulator|a barrier that only some threads reach
9|branch|emulator|lanes of a warp at different collectives
10|largest|tsan|an unsynchronised store to global memory
11|meet|tsan|blocks that do not wait for each other
12|ring|tsan|no wait for an mbarrier
13|ring|emulator|the wrong parity of an mbarrier
14|ring|emulator|an mbarrier's init without a fence
15|ring|emulator|fewer bytes expected than copied
16|ring|emulator|a buffer filled again before it is free
17|product|values|a product's registers read before the wait
18|product|emulator|an operand overwritten under a product
19|product|emulator|no wgmma.fence before a product
20|product|emulator|no proxy fence behind the stores of an operand
LIST
exit $failed
