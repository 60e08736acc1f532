#!/usr/bin/env bash
# Builds the extension under the sanitizers and runs the tests of the C++ core with it.
# Usage: tests/sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")

runtime() { for name in "$@"; do gcc -print-file-name="$name"; done | paste -sd' '; }

run() { # name, sanitizers, runtimes to preload
  local build=$PWD/build/sanitize-$1
  rm -rf "$build" && mkdir -p "$build/package"
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSPANBERT_FAST_WERROR=ON \
    -DSPANBERT_FAST_SANITIZE="$2" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$build/configure.log"
  cmake --build "$build"
  cp -r spanbert_fast "$build/package/"
  rm -f "$build"/package/spanbert_fast/_core*.so
  cp "$build"/_core*.so "$build/package/spanbert_fast/"
  # -P keeps the checkout, and with it the extension without sanitizers, off the path.
  echo "== $1 sanitizer"
  PYTHONPATH=$build/package PYTHONMALLOC=malloc LD_PRELOAD=$(runtime "${@:3}" libstdc++.so) \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 TSAN_OPTIONS=halt_on_error=1 \
    setarch -R bash -euc "
      '$python' -P -c 'import spanbert_fast._core as c; assert c.__file__.startswith(\"$build\")'
      '$python' -P -m pytest -q -p no:cacheprovider tests/test_core.py \
        tests/data/test_masking.py tests/data/test_masking_behaviour.py \
        tests/data/test_masking_errors.py tests/test_segmentation_core.py"
}

export PATH=$(dirname "$python"):$PATH
run address address,undefined libasan.so libubsan.so
run thread thread libtsan.so
