#!/usr/bin/env bash
# Look inside a model and its FP8 form: healthy or not, what differs, what quantisation took. Each exam leaves a page
# that opens offline. On the small model of this repository: recipes/look-inside.sh; on your own, with a second model
# that was trained from the first: recipes/look-inside.sh Qwen/Qwen3-8B Qwen/Qwen3-8B-FP8 pages [OTHER OTHER-FP8]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:-tests/mannequin/bf16}
quantized=${2:-tests/mannequin/fp8}
pages=${3:-pages}
mkdir -p "$pages"
bin/tensorsurgeon autopsy "$model" --spectrum --html "$pages/autopsy.html"
bin/tensorsurgeon autopsy "$model" --beside "$quantized" --html "$pages/side-by-side.html"
bin/tensorsurgeon diff "$model" "$quantized" --html "$pages/diff.html"
if [ $# -gt 4 ]; then
  bin/tensorsurgeon noise "$model" "$quantized" --other "$4" --other-quantized "$5" --html "$pages/noise.html"
else
  bin/tensorsurgeon noise "$model" "$quantized" --module '*.mlp.down_proj' --html "$pages/noise.html"
fi
echo "open $pages/*.html in a browser"
