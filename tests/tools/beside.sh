#!/bin/sh
# Install the SDK with all its integrations beside the newest frameworks, in one environment: no conflict, no version
# other than without the SDK, and it records what they run.
#
#   beside.sh PYTHON VENV
set -eu
python=$1 venv=$2
frameworks="langchain llama-index haystack-ai ragas"

versions() { # of a resolution's report: of all packages but ours and those that only our extras bring
  "$python" - "$1" <<'END'
import json, sys
for item in json.load(open(sys.argv[1], encoding="utf-8"))["install"]:
    print(item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"])
END
}

rm -rf "$venv"
"$python" -m venv "$venv"
pip="$venv/bin/pip --quiet --disable-pip-version-check"
# shellcheck disable=SC2086 # lists of words
$pip install --dry-run --report "$venv/without.json" $frameworks
# shellcheck disable=SC2086
$pip install --report "$venv/with.json" $frameworks '.[langchain,llama-index,otel,prometheus]'
$pip check
versions "$venv/without.json" | sort > "$venv/without.txt"
versions "$venv/with.json" | sort > "$venv/with.txt"
changed=$(comm -23 "$venv/without.txt" "$venv/with.txt")
if [ -n "$changed" ]; then
  echo "beside the SDK these are of another version, or gone:" >&2
  echo "$changed" >&2
  exit 1
fi
cd "$venv" # not the checkout: what is installed is what is tried
bin/python - <<'END'
import evalvault_sdk
from evalvault_sdk.testing import record_stages
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.llms import MockLLM

tracer = evalvault_sdk.StageTracer("beside", file="events.jsonl")
done = evalvault_sdk.instrument("langchain", "llama_index", tracer=tracer)
print(done)
with record_stages(tracer) as stages:
    ChatPromptTemplate.from_messages([("human", "{question}")]).invoke({"question": "?"})
    MockLLM().complete("?")
print(stages.outline())
assert len(stages.roots) >= 2, "each of them is seen"
END
echo "no conflict with $frameworks"
