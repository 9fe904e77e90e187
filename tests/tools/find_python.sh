#!/bin/sh
# Print the path of a Python that can run this project: 3.10 or newer, or exactly the version given.
# A name on PATH may be a shim that refuses to run, so each candidate is started and asked.
want=${1:-}
check='import sys
want = sys.argv[1]
ok = (sys.version_info >= (3, 10)) if not want else "%d.%d" % sys.version_info[:2] == want
sys.exit(not ok or print(sys.executable) or 0)'

if [ -n "$want" ]; then
  set -- "python$want" "$HOME/.pyenv/versions/$want".*/bin/python python3 python
else
  set -- python3 python python3.13 python3.12 python3.11 python3.10 "$HOME"/.pyenv/versions/3.1?.*/bin/python
fi
for candidate in "$@"; do
  found=$("$candidate" -c "$check" "$want" 2>/dev/null) && { echo "$found"; exit 0; }
done
exit 1
