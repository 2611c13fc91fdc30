#!/usr/bin/env bash
# Runs every benchmark, each beside its peers, and writes docs/benchmarks.md. Hours on two cores; nothing else may run meanwhile.
#
#   bash benchmarks/run.sh --text 'DIR/*.txt' --vocab vocab.txt --sst2 GLUE/SST-2
#   bash benchmarks/run.sh ... --only train_base,startup        some of them; the page keeps what the others said before
#
# Raw output goes to runs/benchmarks/NAME.txt and from there to docs/benchmarks.json, of which the page is made;
# gpu.txt is what benchmarks/gpu.sh leaves on a machine with a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

text='' vocab='' sst2='' only=''
while [ $# -gt 0 ]; do
  case $1 in
    --text) text=$2; shift 2 ;;
    --vocab) vocab=$2; shift 2 ;;
    --sst2) sst2=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
[ -n "$text" ] && [ -n "$vocab" ] && [ -n "$sst2" ] || { echo "error: --text, --vocab and --sst2 are needed; see --help" >&2; exit 2; }

. launch/environment.sh
environment requirements-test.txt
out=runs/benchmarks
mkdir -p "$out"
store=$out/store
python -m bert_jax.prepare --input "$text" --tokenizer "$vocab" --output "$store"
machine="$(nproc) cores of $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1 | grep . || uname -m)"
failed=0

bench() { # NAME COMMAND...: its output, command, commit and machine to NAME.txt
  local name=$1 commit
  shift
  [ -z "$only" ] || [[ ,$only, == *,$name,* ]] || return 0
  echo "== $name: $*"
  rm -f "$out/$name.json"
  commit=$(git describe --always --dirty)
  local line="$*"
  line=${line//"$text"/\$TEXT} line=${line//"$vocab"/\$VOCAB} line=${line//"$sst2"/\$SST2}
  { echo "\$ $line"
    PYTHONPATH=$PWD "$@" 2> "$out/$name.err" || { touch "$out/$name.failed"; echo 'failed:'; tail -n 3 "$out/$name.err"; }
    echo "commit $commit, $(date +%F), $machine"
  } | tee "$out/$name.partial"
  [ ! -e "$out/$name.failed" ] || { failed=1; rm "$out/$name.failed"; }
  mv "$out/$name.partial" "$out/$name.txt"
}
step() { # NAME ARGUMENTS...
  bench "$1" python benchmarks/train_step.py --json "$out/$1.json" "${@:2}"
}
step train_base --config configs/pretrain.py:base --length 128 --batch_size 16 --sides ours,eager,eager_masked # more sides need more than 24 GB
step train_base_tuned --config configs/pretrain.py:base --length 128 --batch_size 16 --sides ours,compiled_masked,eager_masked_kept
step train_base_bf16 --config configs/pretrain.py:base,bf16 --length 128 --batch_size 16 --sides ours,eager,eager_masked
step train_base_512 --config configs/pretrain.py:base --length 512 --batch_size 4 --sides ours,eager,eager_masked,compiled_masked
step train_large_512 --config configs/pretrain.py:large --length 512 --batch_size 8 --sides ours --repeats 1
step packed_128 --config configs/pretrain.py:mini --length 128 --batch_size 32 --store "$store" --sides packed,ours
step packed_512 --config configs/pretrain.py:mini --length 512 --batch_size 16 --store "$store" --sides packed,ours
bench prepare python benchmarks/prepare.py --input "$text" --tokenizer "$vocab" --megabytes 60 1000 --peers
bench pipeline python benchmarks/pipeline.py --store "$store"
bench startup python benchmarks/startup.py --store "$store"
bench predict python benchmarks/predict.py --vocab "$vocab"
bench finetune python benchmarks/finetune.py --folder "$sst2" --vocab "$vocab"
python benchmarks/page.py --figures "$out" --output docs/benchmarks.md
exit $failed
