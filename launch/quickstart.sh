#!/usr/bin/env bash
# The main job in one command: raw text to a pre-trained, fine-tuned BERT.
#
#   bash launch/quickstart.sh                       on the docstrings that every Python carries
#   bash launch/quickstart.sh --corpus 'my/*.txt'   on your own text (one sentence a line, blank line between documents)
#
# A twentieth of the documents is held out to score by; of fewer than about a hundred, --held_out 0.2 takes more.
# Results go to runs/quickstart (runs/quickstart_own for your own text; --run DIR for another place).
# Called again it resumes where it stopped and repeats nothing that is finished.
set -euo pipefail
cd "$(dirname "$0")/.."

corpus=stdlib: held_out='' run=''
while [ $# -gt 0 ]; do
  case $1 in
    --corpus) corpus=${2:?--corpus needs a file or a glob}; shift 2 ;;
    --held_out) held_out=${2:?--held_out needs a share}; shift 2 ;;
    --run) run=${2:?--run needs a folder}; shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $1; see bash launch/quickstart.sh --help" >&2; exit 2 ;;
  esac
done
[ -n "$run" ] || { run=runs/quickstart; [ "$corpus" = stdlib: ] || run=runs/quickstart_own; }

. launch/environment.sh
environment requirements.txt
mkdir -p "$run"
[ -e "$run/corpus" ] || echo "$corpus" > "$run/corpus"
[ "$(cat "$run/corpus")" = "$corpus" ] || {
  echo "error: $run holds a run on $(cat "$run/corpus"); give another --run DIR, or delete it." >&2; exit 2; }
[ -e "$run/held_out" ] || echo "${held_out:-0.05}" > "$run/held_out"
if [ -n "$held_out" ] && [ "$(cat "$run/held_out")" != "$held_out" ]; then
  [ ! -e "$run/pretrain/checkpoints" ] || {
    echo "error: $run was pre-trained with --held_out $(cat "$run/held_out"); give another --run DIR, or delete it." >&2; exit 2; }
  rm -rf "$run/store" # nothing was trained on it yet: the documents are divided anew
  echo "$held_out" > "$run/held_out"
fi
stage() { printf '\n== %s\n' "$*"; }
finished() { [ -e "$1" ] && echo "already there: $1"; }

stage "1. a vocabulary of 4,096 pieces"
finished "$run/vocab" || python -m bert_jax.vocab --input "$corpus" --vocab_size 4096 --lowercase --strip_accents --split_cjk --output "$run/vocab"

stage "2. the token store"
finished "$run/store/store.json" || python -m bert_jax.prepare --input "$corpus" --tokenizer "$run/vocab" --output "$run/store" --held_out "$(cat "$run/held_out")"

stage "3. pre-training a BERT-tiny: masked words and next sentences, 128 tokens, then 512"
finished "$run/pretrain/results.json" || python -m bert_jax.pretrain --config configs/quickstart.py \
  --config.store="$run/store" --workdir "$run/pretrain"

if [ "$corpus" = stdlib: ]; then
  stage "4. fine-tuning: which package does a docstring come from? Then the same without pre-training"
  finished "$run/packages.tsv" || python -m bert_jax.data.stdlib --output "$run/packages.tsv"
  for scratch in False True; do
    work=$run/finetune; [ $scratch = False ] || work=$run/finetune_from_scratch
    finished "$work/results.json" || python -m bert_jax.finetune --config configs/finetune.py:classification \
      --config.init_from="$run/pretrain" --config.from_scratch=$scratch --config.task.train_file="$run/packages.tsv" \
      --config.task.label_column=package --config.task.dev_share=0.2 --config.epochs=8 --config.schedule.peak=3e-4 \
      --workdir "$work"
  done
fi

stage "5. what came out"
python -m bert_jax.report --run "$run"
