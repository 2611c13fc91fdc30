#!/usr/bin/env bash
# Every GPU figure in one call of under ten minutes: base and large, 128 and 512 tokens, with and without dropout on attention, XLA's
# attention and cuDNN's, beside Hugging Face under torch.compile (SDPA, bf16 autocast).
#
#   bash benchmarks/gpu.sh [DIR]        figures to DIR/gpu.json and DIR/gpu.txt (default: runs/gpu)
#   ONLY=base_512,base_512_dropout bash benchmarks/gpu.sh        some of them, added to those that are there
#
# COMMIT=abc1234 names the commit where there is no git. Needs jax for CUDA, flax, optax, orbax, torch, transformers, and ml_collections: as a wheel beside it, where nothing can be downloaded
# (pip download --no-deps -d wheels ml_collections; WHEELS=wheels bash benchmarks/gpu.sh). LAYERS=2 BATCH=2 REPEATS=1 tries it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/gpu}")
python=${PYTHON:-python3}
platform=cuda sides=ours_cudnn,ours_xla
[ -z "${LAYERS:-}" ] || { platform=cpu sides=ours_xla; }
mkdir -p "$out"
[ -n "${ONLY:-}" ] || rm -f "$out/gpu.json" "$out/gpu.txt"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
  PYTHONPATH=$site:$PYTHONPATH
fi
failed=0
say() { echo "$*" | tee -a "$out/gpu.txt"; }
say "commit ${COMMIT:-$(git describe --always --dirty 2> /dev/null || echo unknown)}; $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo no GPU)"

measure() { # NAME SIZE LENGTH BATCH DROPOUT SIDES
  [ -z "${ONLY:-}" ] || [[ ,$ONLY, == *,$1,* ]] || return 0
  local left=$((${LIMIT:-570} - SECONDS)) small=()
  if [ "$left" -lt 45 ]; then say "$1: left out, for time"; return; fi
  [ -z "${LAYERS:-}" ] || small=("--config.model.encoder.num_layers=$LAYERS" "--config.model.embeddings.hidden_size=128" "--config.model.encoder.num_heads=2")
  say "== $1"
  timeout -k 5 "$left" "$python" benchmarks/train_step.py --config "configs/pretrain.py:$2,bf16" --length "$3" --batch_size "${BATCH:-$4}" \
    --config.model.encoder.attention_dropout_rate="$5" "${small[@]}" --sides "$6" --repeats "${REPEATS:-5}" --turn "${TURN:-10}" \
    --json "$out/gpu.json" 2> "$out/$1.err" | tee -a "$out/gpu.txt" \
    || { failed=1; say "$1 failed; the end of $1.err:"; tail -n 5 "$out/$1.err" | tee -a "$out/gpu.txt"; }
}
measure large_128 large 128 256 0 "$sides,compiled_masked"
measure base_128 base 128 512 0 "$sides,compiled_masked"
measure large_512 large 512 64 0 "$sides,compiled_masked"
measure base_512 base 512 128 0 "$sides,compiled_masked"
measure large_128_dropout large 128 256 0.1 ours_xla,compiled_masked
measure base_128_dropout base 128 512 0.1 ours_xla,compiled_masked
measure large_512_dropout large 512 64 0.1 ours_xla,compiled_masked
measure base_512_dropout base 512 128 0.1 ours_xla,compiled_masked
measure large_128_whole_head large 128 256 0 ours_xla,compiled
measure base_128_whole_head base 128 512 0 ours_xla,compiled
BERT_JAX_TEST_PLATFORM=$platform timeout 60 "$python" -m pytest -q -W ignore -p no:cacheprovider tests/test_attention.py -k fused > "$out/parity.txt" 2>&1 \
  || failed=1
tail -n 2 "$out/parity.txt" | tee -a "$out/gpu.txt"
echo "$SECONDS seconds in all"
exit $failed
