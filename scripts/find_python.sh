#!/bin/sh
# Print a Python from 3.10 to 3.13, preferring 3.11 (the one LIBERO's reference physics is built for).
for candidate in python3.11 python3.10 "${PYTHON:-python3}" python3.12 python3.13; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
        echo "$candidate"
        exit 0
    fi
done
echo "no Python from 3.10 to 3.13 with venv found; on Debian: apt-get install python3 python3-venv" >&2
exit 1
