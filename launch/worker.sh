#!/usr/bin/env bash
# What launch/tpu.sh runs on each worker: setup | start STORE WORKDIR ARGS... | status | tail | stop.
#
# `start` copies the store to this disk and leaves a loop behind, which starts pretrain again whenever it asks for it (exit
# code 75) or was killed by a signal, for all workers begin anew together; other codes are the end, and so are five short
# lives in a row. Where one runs already, `setup` and `start` leave it alone. `status` says running, finished, stopped (a
# checkpoint is saved), stopped with code N, failed with code N, or dead: a loop that is gone without a word, after a
# reboot say.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p run
generation() { # of this TPU: v5litepod-16, say
  curl -sf --max-time 5 -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type || true
}
running() { [ -e run/loop ] && grep -qa bert_jax.pretrain "/proc/$(cat run/loop)/cmdline" 2> /dev/null; }

case ${1:-} in
  setup)
    if running; then exit; fi
    . launch/environment.sh
    if ! (new_python) > /dev/null 2>&1; then # images of some generations carry Python 3.10
      python3 -m pip install --quiet --user uv
      PATH=$HOME/.local/bin:$PATH
      [ -x .venv/bin/pip ] || uv venv --quiet --clear --seed --python 3.11 .venv # what docs/pods.md was made with
    fi
    environment requirements-tpu.txt
    # the TPU itself opens only when all workers ask for it, so no more than this can be looked at here
    case $(generation)-$(timeout 300 python -c 'import importlib.metadata, jax; print(importlib.metadata.version("libtpu"))') in
      v6e*-0.0.42*) python -m pip install --quiet --no-deps 'libtpu==0.0.43.*' ;; # 0.0.42 crashes there at long lengths
    esac ;;
  start)
    store=$2 workdir=$3
    shift 3
    if running; then echo 'already running'; exit; fi
    local_store=$PWD/run/store
    gcloud storage rsync --recursive "$store" "$local_store"
    rm -f run/exit run/stopped
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid nohup bash -c '
      echo $$ > run/loop
      . launch/environment.sh
      environment requirements-tpu.txt
      code=75 short=0
      until [ -e run/stopped ]; do
        code=0 begun=$SECONDS
        JAX_COMPILATION_CACHE_DIR=${2%/}_xla python -m bert_jax.pretrain --coordinator auto --join_seconds 1800 "$@" >> run/log.txt 2>&1 &
        echo $! > run/pid
        wait $! || code=$?
        echo "pretrain ended with code $code after $((SECONDS - begun)) s" >> run/log.txt
        [ $code = 75 ] || [ $code -ge 128 ] || break
        short=$((SECONDS - begun < 600 ? short + 1 : 0))
        [ $short -lt 5 ] || break
        sleep "${WORKER_PAUSE_SECONDS:-20}"
      done
      echo $code > run/exit
      rm run/loop' pretrain --workdir "$workdir" --config.store="$local_store" "$@" > /dev/null 2>&1 < /dev/null &
    until running || [ -e run/exit ]; do sleep 0.1; done
    echo started ;;
  status)
    if running; then echo running
    elif [ ! -e run/exit ]; then echo dead
    elif [ "$(cat run/exit)" = 0 ]; then echo finished
    elif [ -e run/stopped ]; then [ "$(cat run/exit)" = 75 ] && echo stopped || echo "stopped with code $(cat run/exit)"
    else echo "failed with code $(cat run/exit)"; fi ;;
  tail) tail -n 20 run/log.txt ;;
  stop)
    touch run/stopped
    kill -TERM "$(cat run/pid)" || true ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
