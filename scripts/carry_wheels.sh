#!/bin/sh
# Fill .wheels with what scripts/gpu_session.sh needs beside torch, transformers and pytest, for a machine with
# Python 3.12 on Linux (x86-64) that reaches no package index: copy the folder along with the repository.
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .wheels \
    tyro==1.0.17 docstring_parser==0.18.0 typeguard==4.6.1 simplejpeg
ls .wheels
