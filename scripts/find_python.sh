#!/bin/sh
# Print a Python from 3.10 to 3.13: the one that $PYTHON names, else 3.11 (LIBERO's reference physics is built for it) or another.
for candidate in ${PYTHON:-python3.11 python3.10 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
        echo "$candidate"
        exit 0
    fi
done
case ${PYTHON:-} in
    "") echo "no Python from 3.10 to 3.13 with venv found; on Debian: apt-get install python3 python3-venv" >&2 ;;
    *) echo "$PYTHON is no Python from 3.10 to 3.13 with venv" >&2 ;;
esac
exit 1
