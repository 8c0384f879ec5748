#!/bin/sh
# Engine, models, data, training, benchmark, server, reports and command line with the oldest and the newest of what they
# stand on. pyproject.toml's lower bounds are the versions of `oldest` (tests/test_package.py); there is no newer torch for
# CPUs alone than that of `newest`.
#   sh scripts/test_compat.sh [oldest|lerobot|newest]... [-- pytest's arguments]
set -e
python=$(sh "$(dirname "$0")/find_python.sh")
sets=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do sets="$sets $1"; shift; done
[ $# -eq 0 ] || shift
for name in ${sets:-oldest lerobot newest}; do
    case $name in
        oldest) torch=2.6.0 others="transformers==4.57.1 numpy==1.26.4 tyro==1.0.17 safetensors==0.4.3
                opencv-python-headless==4.8.1.78 pyarrow==15.0.2 av==13.1.0 simplejpeg==1.7.4 jinja2==3.1.0
                msgpack==1.0.5 websockets==14.0 filelock==3.12.0" ;;
        lerobot) torch=2.11.0 others="transformers<6" ;; # the newest torch that LeRobot 0.6.1 allows
        newest) torch=2.13.0 others="transformers<6 torchao>=0.18" ;; # torchao: tests of weights in float8
        *) echo "usage: $0 [oldest|lerobot|newest]... [-- pytest's arguments]" >&2; exit 2 ;;
    esac
    env=.venv-compat-$name-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "== $name: torch $torch, $others"
    if [ ! -e "$env/ready" ]; then
        "$python" -m venv "$env"
        "$env/bin/pip" install --quiet "torch==$torch"
        # shellcheck disable=SC2086
        "$env/bin/pip" install --quiet -e ".[data,jpeg,report,serve]" pytest pytest-xdist hypothesis "torch==$torch" $others
        touch "$env/ready"
    fi
    "$env/bin/python" -m pytest -q -p no:cacheprovider -n logical --maxprocesses 4 --dist worksteal \
        -m "not slow and not sim and not gpu" tests/engine tests/models tests/datasets tests/training tests/report \
        tests/serving/test_openpi.py tests/serving/test_record.py tests/serving/test_server.py tests/serving/test_wire.py \
        tests/test_bench.py tests/test_cli.py tests/test_examples.py "$@"
done
