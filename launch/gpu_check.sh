#!/usr/bin/env bash
# Checks this program on a machine with an NVIDIA GPU, within ten minutes and
# without a network: bfloat16 and cuDNN attention against float32, step times
# against the rate of a matrix product, a short study.
#
#   launch/gpu_check.sh OUTPUT [--minutes=9] [--small]
#
# OUTPUT is a new folder, see docs/training.md. --small takes small networks and
# does without a GPU. PYTHON names another interpreter than python3; packages may
# lie in a folder that PYTHONPATH names.
#
# Exit codes: 0 every part ran and every comparison is within its tolerance, 1
# not so, 2 bad input, 124 the time is over.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
minutes=9
small=

[ $# -ge 1 ] || fail "give a folder for the results: launch/gpu_check.sh OUTPUT"
output=$1
shift
case $output in
  -*) fail "the folder for the results must come first, not $output" ;;
esac
for word in "$@"; do
  case $word in
    --minutes=*) minutes=${word#--minutes=} ;;
    --small) small=--small ;;
    *) fail "unknown argument $word: use --minutes=N or --small" ;;
  esac
done
case $minutes in
  '' | *[!0-9]* | 0*) fail "--minutes=$minutes must be a whole number above 0" ;;
esac

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$python is no Python 3.11 or newer: set PYTHON"
"$python" -c 'import jax' 2>/dev/null ||
  fail "$python has no jax: set PYTHON, or PYTHONPATH to a folder with it"
if [ -z "$small" ]; then
  # Its process ends before the check begins, so the memory is free again.
  "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' \
    2>/dev/null || fail "jax finds no GPU here: add --small to run on a CPU"
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The check ends by itself; this is for one that hangs.
exec timeout --kill-after=10 $((60 * minutes + 30)) "$python" \
  -m attmask_jax.gpu_check --output="$output" --minutes="$minutes" ${small:+"$small"}
