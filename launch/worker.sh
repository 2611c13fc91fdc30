#!/usr/bin/env bash
# What launch/tpu.sh runs on each worker: setup | start STORE WORKDIR ARGS... | status | tail | stop.
#
# `start` copies the store to this disk and leaves a loop behind, which starts pretrain again whenever it asks for it (exit
# code 75) or was killed by a signal, for all workers begin anew together; other codes are the end. Where one runs already,
# `setup` and `start` leave it alone. `status` says running, finished, stopped, failed with code N, or dead: a loop that
# is gone without a word, after a reboot say.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p run
running() { [ -e run/loop ] && grep -qa bert_jax.pretrain "/proc/$(cat run/loop)/cmdline" 2> /dev/null; }

case ${1:-} in
  setup)
    if running; then exit; fi
    . launch/environment.sh
    if ! (new_python) > /dev/null 2>&1; then # images of some generations carry Python 3.10
      python3 -m pip install --quiet --user uv
      PATH=$HOME/.local/bin:$PATH
      [ -x .venv/bin/pip ] || uv venv --quiet --clear --seed --python 3.12 .venv
    fi
    environment requirements-tpu.txt
    timeout 300 python -c 'import jax; print(jax.local_device_count(), "devices of", jax.devices()[0].device_kind)' ;;
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
      code=0
      for attempt in $(seq 100); do
        [ ! -e run/stopped ] || break
        code=0
        JAX_COMPILATION_CACHE_DIR=${2%/}_xla python -m bert_jax.pretrain --coordinator auto "$@" >> run/log.txt 2>&1 &
        echo $! > run/pid
        wait $! || code=$?
        echo "pretrain ended with code $code (attempt $attempt)" >> run/log.txt
        [ $code = 75 ] || [ $code -ge 128 ] || break
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
    elif [ -e run/stopped ]; then echo stopped
    else echo "failed with code $(cat run/exit)"; fi ;;
  tail) tail -n 20 run/log.txt ;;
  stop)
    touch run/stopped
    kill -TERM "$(cat run/pid)" || true ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
