#!/bin/sh
# Four new users, from the wheel alone, in a clean environment and outside the repository:
# a first look, a robot with its own data, an own method and an own model, and a reader of the help.
set -eu
repository=$(cd "$(dirname "$0")/.." && pwd)
python=$(sh "$repository/scripts/find_python.sh")
place=$(mktemp -d)
server=""
trap 'if [ -n "$server" ]; then kill "$server"; fi; rm -rf "$place"' EXIT
say() { printf '\n== %s\n' "$*"; }

say "the wheel"
"$python" -m venv "$place/env"
PATH=$place/env/bin:$PATH
pip install --quiet --upgrade pip
pip wheel --quiet --no-deps --wheel-dir "$place" "$repository"
wheel=$(ls "$place"/lac_vla-*.whl)
size=$(wc -c <"$wheel")
echo "$(basename "$wheel"): $size bytes"
[ "$size" -le 20000000 ] || { echo "the wheel is over 20 MB: the bundled models have to become a package of their own" >&2; exit 1; }
pip install --quiet -c "$repository/constraints.txt" torch==2.13.0
pip install --quiet -c "$repository/constraints.txt" "$wheel[demo,serve]"
cp "$repository"/scripts/users/*.py "$repository"/examples/own_*.py "$repository/README.md" "$place"
cd "$place"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

say "user 1: a first look"
python -c 'import lac_vla, sys; assert not lac_vla.__file__.startswith(sys.argv[1]), "not the wheel"' "$repository"
lac --version
python -m lac_vla --version
sed -n '/^```python$/,/^```$/p' README.md | sed '/^```/d' >snippet.py
python snippet.py
lac demo --tasks 0 --episodes 1 --out demo
ls -l demo/report.html

say "user 2: a robot, its own data, its own names"
"${LAC_LEROBOT_PYTHON:-python}" make_dataset.py kitchen  # with LeRobot, where an environment that has it is named
lac train --model mini --dataset kitchen --camera agentview=front_cam wrist=gripper_cam --stage1-steps 2 --stage2-steps 2 \
    --out my-lac
lac serve --model mini --policy lac:path=my-lac/policy,ratio=0.5 --camera agentview=front wrist=gripper --state-key joints \
    --port 8765 2>serve.log &
server=$!
for _ in $(seq 120); do
    python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:8765/healthz", timeout=2)' 2>/dev/null && break
    kill -0 "$server" || { cat serve.log >&2; exit 1; }
    sleep 1
done
"$python" -m venv robot
robot/bin/pip install --quiet openpi-client typing_extensions || echo "openpi's client cannot be had here"
if robot/bin/python -c 'import openpi_client' 2>/dev/null; then robot/bin/python robot.py 8765; else python robot.py 8765; fi
kill "$server" && wait "$server" || true
server=""

say "user 3: an own method and an own model, by file and as a package"
lac bench --quick --policies own_policy:RoundRobin:ratio=0.5 --out bench-policy
lac bench --quick --model own_model:load --policies own_policy:RoundRobin:ratio=0.5 --out bench-model
lac train --model own_model:load --dataset kitchen --camera front=front_cam --stage1-steps 2 --stage2-steps 2 --out toy-lac
mkdir package
cat >package/pyproject.toml <<'END'
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "mine"
version = "1"
[project.entry-points."lac_vla.policies"]
round-robin = "own_policy:RoundRobin"
[project.entry-points."lac_vla.models"]
toy = "own_model:load"
[tool.hatch.build.targets.wheel]
only-include = ["own_policy.py", "own_model.py"]
END
mv own_policy.py own_model.py package
pip install --quiet ./package
lac policies | grep round-robin
lac models | grep toy
lac bench --quick --model toy --policies round-robin:ratio=0.5 --out bench-package

say "user 4: a reader of the help"
for verb in demo eval bench reproduce report film check train pretrain collect serve view policies models; do
    lac "$verb" --help >"$verb.txt"
    [ -s "$verb.txt" ]
done
lac --help
say "all four are there"
