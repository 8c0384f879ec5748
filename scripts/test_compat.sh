#!/bin/sh
# The engine and the model family with both ends of the supported transformers versions.
set -e
python=$(sh "$(dirname "$0")/find_python.sh")
for version in 4.57.6 5.23.0; do
    env=.venv-compat-$version
    echo "== transformers $version"
    if [ ! -e "$env/ready" ]; then
        "$python" -m venv "$env"
        "$env/bin/pip" install --quiet "torch==2.13.0"
        "$env/bin/pip" install --quiet -e ".[data]" pytest "transformers==$version"
        touch "$env/ready"
    fi
    "$env/bin/python" -m pytest -q -p no:cacheprovider tests/engine tests/models "$@"
done
