#!/usr/bin/env bash
# Compiles every kernel for every architecture and compares what the compiler made of it with budget.txt: registers, spills, static
# shared memory, and how often the inner instructions occur. A difference is an event to look at.
#
#   kernels/check.sh [NAME...]       all .cu files, or those of these names (rows, gemv, ...), without the comparison of the others
#   kernels/check.sh --update [NAME...]   writes budget.txt, or the lines of these files in it
#
# NVCC_WHEELS is a site-packages/nvidia/cu13 folder with nvcc and cuobjdump; without it both come from PATH. OUT takes the output.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-${TMPDIR:-/tmp}/quadriga-kernel-check}
update=0
[[ ${1:-} == --update ]] && { update=1; shift; }
[[ -z ${NVCC_WHEELS:-} ]] || PATH=$NVCC_WHEELS/bin:$PATH
for tool in nvcc cuobjdump nvdisasm; do
  command -v "$tool" >/dev/null || { echo "check.sh: no $tool in NVCC_WHEELS/bin or on PATH" >&2; exit 2; }
done
names=("$@")
((${#names[@]})) || for f in "$here"/*.cu; do n=${f##*/}; names+=("${n%.cu}"); done
mkdir -p "$out"
archs=()
for a in 80 86 89 90a 100 120; do archs+=("-gencode=arch=compute_$a,code=sm_$a"); done
archs+=("-gencode=arch=compute_80,code=compute_80")  # PTX, for what comes later

table=$out/table.txt
: >"$table"
failed=0
for name in "${names[@]}"; do
  image=$out/$name.fatbin log=$out/$name.log
  if ! nvcc -fatbin -std=c++17 -O3 -t "${JOBS:-1}" -Xptxas -v,--warn-on-spills -I"$here" "${archs[@]}" "$here/$name.cu" -o "$image" >"$log" 2>&1; then
    echo "$name.cu does not compile:"
    grep -v "^ptxas info" "$log" || true
    failed=1
    continue
  fi
  # Warnings other than those about spills, which the table tells.
  grep -i "warning" "$log" | grep -vi "spill" && failed=1
  { for a in sm_80 sm_90a; do
      echo "ARCH $a"
      cuobjdump -sass -arch "$a" "$image" | grep -oE "Function : [A-Za-z0-9_]+|HMMA|IMMA|HGMMA|LDSM|LDGSTS|UTMALDG|UBLKCP" || true
    done
    cat "$log"
  } | awk -v file="$name" '
    $1 == "ARCH" { arch = $2; next }
    $1 == "Function" { kernel = $3; next }
    NF == 1 && /^[A-Z]+$/ { count[kernel " " arch " " $1]++; next }
    /Compiling entry function/ { split($0, q, "\047"); key = q[2] " " q[4]; keys[++n] = key; next }
    /bytes stack frame/ { spill[key] = $5 + $9; next }
    /Used [0-9]+ registers/ {
      for (i = 1; i < NF; i++) {
        if ($(i + 1) ~ /^registers/) registers[key] = $i
        if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared[key] = $i
      }
    }
    END {
      words = split("HMMA IMMA HGMMA LDSM LDGSTS UTMALDG UBLKCP", word, " ")
      for (i = 1; i <= n; i++) {
        split(keys[i], k, " ")
        counted = k[2] == "sm_80" || k[2] == "sm_90a"
        if ((!counted || file ~ /^selftest/) && !spill[keys[i]]) continue  # self-tests only must not spill
        printf "%s %s %s registers %d spill %d shared %d", file, k[1], k[2], registers[keys[i]], spill[keys[i]], shared[keys[i]]
        for (w = 1; w <= words; w++) if (count[keys[i] " " word[w]]) printf " %s %d", word[w], count[keys[i] " " word[w]]
        printf "\n"
      }
    }' | sort >>"$table"
done

compiler=$(nvcc --version | grep -oE "V[0-9.]+")
budget=$here/budget.txt
if ((update)); then
  if [[ -e $budget ]]; then  # keep the lines of files that were not compiled
    grep -v "^#" "$budget" | while read -r line; do [[ " ${names[*]} " == *" ${line%% *} "* ]] || echo "$line"; done >"$out/others.txt"
    sort "$table" "$out/others.txt" -o "$table"
  fi
  { echo "# What nvcc $compiler makes of the kernels (kernels/check.sh --update): file, kernel, architecture; bytes spilled and of static"
    echo "# shared memory; how often an instruction stands in the code. Other architectures appear only if they spill."
    cat "$table"
  } >"$budget"
  echo "wrote ${budget##*/}: $(wc -l <"$table") lines"
  exit $failed
fi

awk '/^#/ { next } { print $1, $2, $3, $7 }' "$budget" >"$out/budgeted.txt"
awk 'NR == FNR { allowed[$1 " " $2 " " $3] = $4; next }
     $7 > allowed[$1 " " $2 " " $3] + 0 { print "spill without a budget: " $0; bad = 1 }
     END { exit bad }' "$out/budgeted.txt" "$table" || failed=1
if ! grep -q "nvcc $compiler " "$budget"; then
  echo "budget.txt was made by another compiler than $compiler: only spills are compared"
elif ! diff <(for n in "${names[@]}"; do grep "^$n " "$budget" || true; done) <(for n in "${names[@]}"; do grep "^$n " "$table" || true; done); then
  echo "registers, shared memory or instructions differ from budget.txt (<): look at them, then kernels/check.sh --update"
  failed=1
fi
((failed)) || echo "${#names[@]} files, all as budget.txt has it"
exit $failed
