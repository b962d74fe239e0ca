#!/usr/bin/env bash
# Builds the wheel and the sdist, and tries both as users get them; about two minutes on two cores.
#
#   tests/wheel/check.sh PYTHON TESTS_PYTHON TORCH
#
#   PYTHON        makes the environments, which lie in build/wheel with all else that is made here
#   TESTS_PYTHON  has what the tests need; nothing is installed into it
#   TORCH         the requirement of the environment that holds PyTorch and the wheel alone, such as torch==2.13.0
#
# The wheel: smoke.py computes with it, mypy and pyright check consumer.py against it.
# The sdist: all tests are collected from it, those of FAST, which start no processes, are run.
set -euo pipefail
python=$1 tests_python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2") torch=$3
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/build/wheel
FAST=(documents layout mask merge kernels package)

rm -rf "$work"
mkdir -p "$work/user"
grep -v -e '^torch==' -e '^triton==' "$root/constraints.txt" > "$work/constraints.txt"
export PIP_CONSTRAINT=$work/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_QUIET=2

echo "== build"
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install build mypy 'pyright[nodejs]'
"$work/tools/bin/python" -m build --outdir "$work/dist" "$root" > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }

echo "== the wheel with $torch alone"
"$python" -m venv "$work/alone"
"$work/alone/bin/pip" install "$torch"
"$work/alone/bin/pip" install "$work"/dist/*.whl
cp "$here/smoke.py" "$here/consumer.py" "$work/user"
cd "$work/user" # where no dtensor_ring lies that would be taken for the wheel
"$work/alone/bin/python" -I -W 'ignore:Failed to initialize NumPy' smoke.py

echo "== types of the wheel"
"$work/tools/bin/mypy" --strict --python-executable "$work/alone/bin/python" --cache-dir "$work/mypy" consumer.py
"$work/tools/bin/pyright" --pythonpath "$work/alone/bin/python" consumer.py

echo "== tests from the sdist"
mkdir "$work/sdist"
tar -xzf "$work"/dist/*.tar.gz -C "$work/sdist" --strip-components 1
cd "$work/sdist"
for file in Makefile constraints.txt CONTRIBUTING.md CHANGELOG.md LICENSE .ci/run tests/wheel/check.sh docs/kernels.md dtensor_ring/py.typed; do
    test -e "$file" || { echo "the sdist lacks $file"; exit 1; }
done
"$tests_python" -c "import dtensor_ring; f = dtensor_ring.__file__; assert f.startswith('$work/sdist'), f'not the sdist: {f}'"
"$tests_python" -m pytest -q --collect-only -m '' > "$work/collected.log" || { cat "$work/collected.log"; exit 1; }
tail -n 1 "$work/collected.log"
"$tests_python" -m pytest -q $(printf "tests/test_%s.py " "${FAST[@]}")
