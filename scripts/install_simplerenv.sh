#!/bin/sh
# SIMPLER's original simulator in an environment of its own, and a Vulkan layer with which SAPIEN 2.2.2 starts on Mesa's CPU driver.
# SIMPLERENV_PYTHON is a Python 3.10; SIMPLERENV_SOURCE a checkout of ManiSkill2_real2sim, which is cloned otherwise.
set -eu
prefix=${1:-.venv-simplerenv}
python=${SIMPLERENV_PYTHON:-python3.10}
commit=ef7a4d4fdf4b69f2c2154db5b15b9ac8dfe10682
here=$(cd "$(dirname "$0")" && pwd)
if [ -f "$prefix/env.sh" ]; then
    exit 0
fi
if ! "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; then
    echo "$python is no Python 3.10, which SAPIEN 2.2.2 needs: give SIMPLERENV_PYTHON" >&2
    exit 1
fi
"$python" -m venv "$prefix"
prefix=$(cd "$prefix" && pwd)
source=${SIMPLERENV_SOURCE:-$prefix/ManiSkill2_real2sim}
if [ ! -d "$source" ]; then
    git clone --quiet https://github.com/simpler-env/ManiSkill2_real2sim "$source"
fi
[ -n "${SIMPLERENV_SOURCE:-}" ] || git -C "$source" checkout --quiet $commit
"$prefix/bin/python" -m pip install --quiet "setuptools<81" wheel numpy==1.26.4 gymnasium==0.29.1 sapien==2.2.2 scipy==1.15.3 \
    opencv-python==4.11.0.86 transforms3d==0.4.2 ruckig==0.19.4 rtree==1.4.1 trimesh==5.2.0 h5py==3.16.0 \
    GitPython==3.2.1 gdown==6.5.1 imageio==2.38.0 tabulate==0.10.0 PyYAML==6.0.4 tqdm
"$prefix/bin/python" -m pip install --quiet --no-deps --no-build-isolation "$source"
echo "export LAC_SIMPLER_PYTHON=\"$prefix/bin/python\"" >"$prefix/env.sh.partial"
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1; then
    include=/usr/include
    if [ ! -f $include/vulkan/vk_layer.h ]; then
        (cd "$prefix" && rm -f libvulkan-dev_*.deb && apt-get download libvulkan-dev >/dev/null && dpkg-deb -x libvulkan-dev_*.deb vulkan && rm libvulkan-dev_*.deb)
        include=$prefix/vulkan/usr/include
    fi
    mkdir -p "$prefix/layer"
    cp "$here/vulkan_layer/drop_external_semaphore.json" "$prefix/layer"
    cc -shared -fPIC -O2 -I"$include" -o "$prefix/layer/libdrop_external_semaphore.so" "$here/vulkan_layer/drop_external_semaphore.c"
    echo "export VK_LAYER_PATH=\"$prefix/layer\" VK_INSTANCE_LAYERS=VK_LAYER_LAC_drop_external_semaphore" >>"$prefix/env.sh.partial"
fi
mv "$prefix/env.sh.partial" "$prefix/env.sh"
