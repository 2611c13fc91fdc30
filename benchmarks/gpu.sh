#!/usr/bin/env bash
# Every GPU figure in one call of under ten minutes: base and large, 128 and 512 tokens, with and without dropout on attention, XLA's
# attention and cuDNN's, beside Hugging Face under torch.compile (SDPA, bf16 autocast).
#
#   bash benchmarks/gpu.sh [DIR]        figures to DIR/gpu.json and DIR/gpu.txt (default: runs/gpu)
#
# Needs jax for CUDA, flax, optax, orbax, torch, transformers, and ml_collections: as a wheel beside it, where nothing can be downloaded
# (pip download --no-deps -d wheels ml_collections; WHEELS=wheels bash benchmarks/gpu.sh). LAYERS=2 BATCH=2 REPEATS=1 tries it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/gpu}")
python=${PYTHON:-python3}
platform=cuda
[ -z "${LAYERS:-}" ] || platform=cpu
mkdir -p "$out"
rm -f "$out/gpu.json"
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
  export PYTHONPATH=$out/site:${PYTHONPATH:-}
fi
BERT_JAX_TEST_PLATFORM=$platform "$python" -m pytest -q -W ignore -p no:cacheprovider tests/test_attention.py -k fused 2>&1 | tail -n 3 | tee "$out/gpu.txt" || true

measure() { # SIZE LENGTH BATCH DROPOUT SIDES
  if [ "$SECONDS" -gt "${LIMIT:-500}" ]; then echo "left out, for time: $*" | tee -a "$out/gpu.txt"; return; fi
  local small=()
  [ -z "${LAYERS:-}" ] || small=("--config.model.encoder.num_layers=$LAYERS" "--config.model.embeddings.hidden_size=128" "--config.model.encoder.num_heads=2")
  "$python" benchmarks/train_step.py --config "configs/pretrain.py:$1,bf16" --length "$2" --batch_size "${BATCH:-$3}" \
    --config.model.encoder.attention_dropout_rate="$4" "${small[@]}" --sides "$5" --repeats "${REPEATS:-5}" --turn "${TURN:-10}" \
    --json "$out/gpu.json" 2> "$out/errors.txt" | tee -a "$out/gpu.txt" || { echo "failed: $*"; tail -n 5 "$out/errors.txt"; } | tee -a "$out/gpu.txt"
}
both=${SIDES:-ours_cudnn,ours_xla,compiled_masked}
measure large 128 256 0 "$both,compiled"
measure base 128 512 0 "$both,compiled"
measure large 512 64 0 "$both"
measure base 512 128 0 "$both"
measure large 128 256 0.1 ours_xla,compiled_masked
measure base 128 512 0.1 ours_xla,compiled_masked
measure large 512 64 0.1 ours_xla,compiled_masked
measure base 512 128 0.1 ours_xla,compiled_masked
echo "$SECONDS seconds in all"
