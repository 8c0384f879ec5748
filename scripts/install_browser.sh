#!/bin/sh
# The report is tested in a real browser. Install Chromium as root; else its test is skipped, and says so.
if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Chromium for the report's test"
    apt-get update -qq && apt-get install -y --no-install-recommends -qq chromium >/dev/null && exit 0
fi
echo "no Chromium here: the report's browser test will be skipped (apt-get install chromium)" >&2
