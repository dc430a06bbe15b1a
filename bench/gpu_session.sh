#!/usr/bin/env bash
# One call on a machine with a GPU and no network: build attnengine in this checkout, check its CUDA
# kernels, time them.
#
#   bench/gpu_session.sh OUT [arguments of `python -m bench.gpu`, --minutes excepted]
#
# The machine has: python3 with torch >= 2.11, setuptools >= 77, pybind11, ninja, numpy and rich; a
# C++20 compiler; nvcc on the PATH or under CUDA_HOME. Nothing is installed and nothing is fetched.
# CUTLASS's headers come from an installed nvidia-cutlass, from ATTNENGINE_CUTLASS, or from a wheel
# that travels with the checkout:
#   pip download --no-deps -d .whl nvidia-cutlass      # 6 MB; WHEELS names another folder
#
# All of it ends within BUDGET_S seconds (570: a call of ten minutes). Exit status: that of
# bench.gpu; where attnengine cannot be built, the baselines are timed all the same.
set -uo pipefail

if (($# == 0)); then
  echo "usage: bench/gpu_session.sh OUT [arguments of python -m bench.gpu]" >&2
  exit 64
fi
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit 64
shift
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-570}
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export ATTNENGINE_CACHE_DIR="${ATTNENGINE_CACHE_DIR:-$PWD/build/gpu-cache}"

if ! "$PYTHON" -c 'import torch' 2>"$OUT/build.log"; then
  echo "bench/gpu_session.sh: $PYTHON cannot import torch; name another with PYTHON=" >&2
  exit 1
fi

wheel=$(find "${WHEELS:-.whl}" -maxdepth 1 -name 'nvidia_cutlass-*.whl' 2>/dev/null | sort | tail -n 1)
if [[ -z ${ATTNENGINE_CUTLASS:-} && -n $wheel ]]; then
  "$PYTHON" -m zipfile -e "$wheel" build/cutlass || exit 1
  export ATTNENGINE_CUTLASS="$PWD/build/cutlass/cutlass_library/source"
fi

if "$PYTHON" setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1; then
  echo "built in $SECONDS s"
else
  echo "attnengine cannot be built here ($OUT/build.log ends so); its columns stay empty:"
  tail -n 15 "$OUT/build.log"
fi

minutes=$("$PYTHON" -c "print(round(max(0.2, ($BUDGET_S - $SECONDS) / 60), 2))")
exec "$PYTHON" -m bench.gpu --out "$OUT" --minutes "$minutes" "$@"
