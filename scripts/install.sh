#!/usr/bin/env bash
# Makes the virtual environment $1 with the pinned packages and this project, editable.
# Called by `make install`. PYTHON names the interpreter; without it the first one that is new enough.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

fail() {
  echo "install: $1" >&2
  exit 2
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

has_headers() {
  "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for name in python3 python3.13 python3.12 python3.11; do
    if new_enough "$name"; then python=$name && break; fi
  done
fi
[ -n "$python" ] || fail "found no Python 3.11 or newer; install one, or name it: make install PYTHON=/path/to/python3.12"
new_enough "$python" || fail "got PYTHON=$python, expected Python 3.11 or newer; name another"

# DeepSpeed compiles its communication between CPU processes when it first runs.
command -v c++ >/dev/null || command -v g++ >/dev/null ||
  fail "found no C++ compiler (c++ or g++); on Debian: apt-get install g++"
has_headers "$python" || fail "$python lacks its C headers (Python.h); on Debian: apt-get install python3-dev"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || fail "$python cannot make a virtual environment; on Debian: apt-get install python3-venv"
fi

pip() {
  "$venv/bin/python" -m pip install --disable-pip-version-check -c requirements/constraints.txt "$@"
}

# torch comes first because DeepSpeed's setup imports it; hence no build isolation either.
echo "== 1/3 torch and build tools"
pip setuptools wheel ninja packaging py-cpuinfo numpy torch
echo "== 2/3 deepspeed"
pip --no-build-isolation deepspeed
echo "== 3/3 llmtrain and the rest"
pip --no-build-isolation -e '.[dev,tensorboard,wandb]'
