#!/usr/bin/env bash
# Checks and measures everything on this machine's GPU, in at most eight minutes; writes one JSON.
#
#   FOLDER/gpu-check.sh [--json FILE] [--limit SECONDS] [--only NAME,..] [--emulated]
#
# FOLDER is what scripts/gpu-pack.sh made. Needs python3, and nothing else: compute-sanitizer and PyTorch are used where they are
# installed. Ends with 0 if all is well, 1 if something failed or a test was cut, 2 if there is nothing to check it on. --emulated: the folder was
# packed with --emulated, and the emulated GPU takes the place of this machine's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v python3 >/dev/null || { echo "gpu-check: needs python3" >&2; exit 2; }
exec python3 "$here/gpu_check.py" "$@"
