#!/bin/sh
# The port's assets of SIMPLER's WidowX tasks: $1 is ManiSkill3's folder, which holds data/, or an archive of one. Without it
# ManiSkill3's own tool fetches them (CC BY-NC). .vulkan/assets then names the folder.
set -eu
assets=${1:-}
mkdir -p .vulkan
if [ -z "$assets" ]; then
    assets=${MS_ASSET_DIR:-$HOME/.maniskill}
    for name in bridge_v2_real2sim widowx250s; do
        MS_ASSET_DIR=$assets "$PYTHON" -m mani_skill.utils.download_asset -y $name ||
            echo "$name cannot be fetched here: fetch it elsewhere, and give ASSETS=FOLDER or ASSETS=ARCHIVE" >&2
    done
elif [ -f "$assets" ]; then
    rm -rf .vulkan/unpacked
    mkdir -p .vulkan/unpacked
    tar -xf "$assets" -C .vulkan/unpacked
    data=$(find .vulkan/unpacked -type d -path '*/data/tasks' | head -n 1)
    if [ -z "$data" ]; then
        echo "$assets holds no data/tasks: it is no archive of ManiSkill3's folder" >&2
        exit 1
    fi
    assets=$(dirname "$(dirname "$data")")
fi
if [ ! -d "$assets" ]; then
    echo "there is no folder or archive $assets" >&2
    exit 1
fi
folder=$(cd "$assets" && pwd)
echo "$folder" >.vulkan/assets
