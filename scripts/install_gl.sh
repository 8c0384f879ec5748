#!/bin/sh
# Headless rendering needs a software GL stack. Install it as root, else say how.
packages="libosmesa6 libegl1 libgl1-mesa-dri libegl-mesa0 libgles2 libgl1 libglib2.0-0"
if ldconfig -p | grep -q libOSMesa && ldconfig -p | grep -q libEGL; then
    exit 0
fi
command="apt-get install -y --no-install-recommends $packages"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing the GL libraries that headless rendering needs"
    apt-get update -qq && $command -qq >/dev/null
else
    echo "headless rendering needs GL libraries that are not here. Run:" >&2
    echo "    sudo $command" >&2
    exit 1
fi
