#!/bin/sh
# One virtual environment for each quantizer that quantization.py measures beside ours: sh setup.sh FOLDER [PYTHON]
# Their requirements exclude each other (onnx 1.21 and 1.23), so that none of them shares ours.
# olive and modelopt install torch: point pip at its CPU index to save a few GiB.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
for tool in nncf olive modelopt; do
  "${2:-python3.11}" -m venv "$1/$tool"
  "$1/$tool/bin/pip" install --quiet --requirement "$here/$tool.txt"
done
