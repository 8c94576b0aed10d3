#!/usr/bin/env bash
# Fetch the packages that a machine with a GPU may lack into tests/gpu/wheels, for tests/gpu/run.sh there.
#
#   tests/gpu/fetch.sh [PYTHON VERSION, by default 3.12]     for 64-bit x86 Linux
set -euo pipefail
cd "$(dirname "$0")"
rm -rf wheels
python3 -m pip download --quiet --dest wheels --only-binary=:all: --implementation cp --python-version "${1:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  numpy pillow pytest pytest-timeout rich safetensors tyro
ls wheels
