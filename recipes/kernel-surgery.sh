#!/usr/bin/env bash
# Kernel surgery from the start: sums in seven languages -> what the layers make of them -> the directions in which the
# languages differ -> models without these -> what they still can do. On the small model of this repository:
# recipes/kernel-surgery.sh; the original operated on the layers 9-26 of the 36 of a model of 3 billion parameters:
# recipes/kernel-surgery.sh Qwen/Qwen2.5-3B. What else is given goes to the sweep, such as --set engine=transformers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:-tests/mannequin/bf16}
python=.venv/bin/python
[ -x "$python" ] || python=python3
mkdir -p results
rm -f results/{activations.npz,languages.safetensors}
bin/tensorsurgeon collect "$model" recipes/studies/prompts/seven-languages.jsonl results/activations.npz \
  --chat --position mean --batch 16
bin/tensorsurgeon directions results/activations.npz results/languages.safetensors --method deviations --rank 10
"$python" recipes/studies/random_directions.py results/languages.safetensors results/random.safetensors
"$python" recipes/studies/random_directions.py results/languages.safetensors results/as-strong.safetensors results/activations.npz
bin/tensorsurgeon sweep recipes/studies/kernel-surgery.yaml --set "source=$model" "${@:2}"
bin/tensorsurgeon report results/kernel-surgery --html results/kernel-surgery.html --plot results/kernel-surgery-pictures -q
echo "open results/kernel-surgery.html in a browser"
