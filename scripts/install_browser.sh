#!/bin/sh
# Reports and the live page are tested in a real browser. Install Chromium as root; else these tests are skipped, and say so.
if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Chromium for the tests of the report and the live page"
    apt-get update -qq && apt-get install -y --no-install-recommends -qq chromium >/dev/null && exit 0
fi
echo "no Chromium here: the browser tests will be skipped (apt-get install chromium)" >&2
