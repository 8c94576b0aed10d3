#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has python3 with torch and nothing else: no network, no installation.
#
#   tests/gpu/run.sh [FOLDER]     full logs and the benchmark's files go to FOLDER; a table of all parts comes last
#
# What python3 lacks is taken from the wheels that tests/gpu/fetch.sh has put into tests/gpu/wheels beforehand.
# It takes under eight minutes, and ends with 0 where nothing failed. Without a GPU every part is skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/gpu/parts.py "$@"
