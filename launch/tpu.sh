#!/usr/bin/env bash
# TPU slices through queued resources: one host or a pod, on demand or spot.
#
#   bash launch/tpu.sh create NAME --type v5litepod-16 [--version V] [--spot] [--slices N]
#   bash launch/tpu.sh run    NAME --store gs://B/store --workdir gs://B/run -- --config configs/pretrain.py:base,bf16 ...
#   bash launch/tpu.sh logs   NAME            the last lines of worker 0, and what follows
#   bash launch/tpu.sh ssh    NAME [WORKER]   a shell on a worker (default: 0)
#   bash launch/tpu.sh setup  NAME            copies the code and installs requirements-tpu.txt; run does it too
#   bash launch/tpu.sh stop   NAME            ends the run; it saves a checkpoint first
#   bash launch/tpu.sh delete NAME            gives the slice back
#
# --zone Z and --project P with each, or ZONE and PROJECT, or gcloud's own defaults; --dry_run prints every gcloud call.
# `run` copies this checkout to every worker, the store to every worker's disk, and starts the same pretrain command on all of
# them. It then watches: when a spot slice is taken away, it asks for another and goes on from the last checkpoint.
# --detach leaves it alone.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "tpu.sh: $*" >&2; }
fail() { say "error: $*"; exit 2; }
usage() { sed -n '2,16s/^# \{0,1\}//p' launch/tpu.sh; }

case ${1:-} in
  '' | -h | --help) usage; exit 0 ;;
  create | setup | run | logs | ssh | stop | delete) action=$1; shift ;;
  *) fail "unknown action $1; create, setup, run, logs, ssh, stop and delete are known." ;;
esac
case ${1:-} in '' | -*) fail "$action needs the slice's NAME." ;; *) name=$1; shift ;; esac

zone=${ZONE:-} project=${PROJECT:-} dry='' detach='' spot='' slices=1 type='' version='' store='' workdir='' worker=0
poll=${TPU_POLL_SECONDS:-30}
need() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value."; }
while [ $# -gt 0 ]; do
  case $1 in
    --zone) need "$@"; zone=$2; shift 2 ;;
    --project) need "$@"; project=$2; shift 2 ;;
    --type) need "$@"; type=$2; shift 2 ;;
    --version) need "$@"; version=$2; shift 2 ;;
    --slices) need "$@"; slices=$2; shift 2 ;;
    --store) need "$@"; store=$2; shift 2 ;;
    --workdir) need "$@"; workdir=$2; shift 2 ;;
    --spot) spot=1; shift ;;
    --detach) detach=1; shift ;;
    --dry_run) dry=1; shift ;;
    --) shift; break ;;
    -*) fail "unknown option $1; see bash launch/tpu.sh --help" ;;
    *) [ "$action" = ssh ] || fail "unexpected $1; pretrain's own arguments come after --"; worker=$1; shift ;;
  esac
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices: a number is expected."

where=()
[ -z "$zone" ] || where+=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

qr() { # one call of gcloud: COMMAND, then flags; scp takes its two places instead of the name
  local places=("$name") call
  if [ "$1" = scp ]; then places=("$2" "$name:$3"); set -- "$1" "${@:4}"; fi
  call=(gcloud compute tpus queued-resources "$1" "${places[@]}" "${where[@]}" "${@:2}")
  if [ -n "$dry" ]; then printf '%q ' "${call[@]}"; echo; return; fi
  "${call[@]}"
}
everywhere() { qr ssh --node=all --worker=all --command="$1"; }
state() { qr describe --format='value(state.state)'; }

runtime() { # the image that each generation is documented to start with
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  [ -n "$type" ] || fail "create needs --type, for example v4-64, v5litepod-16 or v6e-256."
  local request=("--accelerator-type=$type" "--runtime-version=${version:-$(runtime "$type")}")
  if [ "$slices" -gt 1 ]; then request+=("--node-count=$slices" "--node-prefix=$name"); else request+=("--node-id=$name"); fi
  [ -z "$spot" ] || request+=(--spot)
  qr create "${request[@]}" || fail "gcloud did not take the request for $type (quota? zone?); nothing was created."
}

wait_until_active() {
  [ -z "$dry" ] || { state; return; }
  local now last=''
  while true; do
    now=$(state) || now=UNKNOWN
    [ "$now" != UNKNOWN ] || [ -n "$last" ] || fail "$name: gcloud cannot describe it."
    [ "$now" = "$last" ] || say "$name is $now"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    last=$now
    sleep "$poll"
  done
}

setup() {
  local archive
  archive=$(mktemp -d)/bert_jax.tar.gz
  [ -n "$dry" ] || git ls-files -co --exclude-standard -z | tar czf "$archive" --null --files-from=-
  qr scp "$archive" bert_jax.tar.gz --node=all --worker=all || fail "$name: the code did not reach every worker."
  # a run that goes on keeps its code
  # shellcheck disable=SC2016  # the workers' shells expand these
  everywhere 'mkdir -p bert_jax/run && { kill -0 "$(cat bert_jax/run/loop 2> /dev/null)" 2> /dev/null || tar xzf bert_jax.tar.gz -C bert_jax; } &&
    bash bert_jax/launch/worker.sh setup' ||
    fail "$name: the installation failed on a worker (above)."
}

start() {
  everywhere "bash bert_jax/launch/worker.sh start $(printf '%q ' "$store" "$workdir" "$@")" ||
    fail "$name: the run did not start on every worker (above)."
}

watch() { # until the run has ended; asks for a new slice when this one is gone
  while true; do
    sleep "$poll"
    case $(state || echo UNKNOWN) in
      ACTIVE)
        local codes
        codes=$(everywhere 'bash bert_jax/launch/worker.sh status') || { say "a worker does not answer; trying again"; continue; }
        case $codes in
          *running*) ;;
          *failed*) everywhere 'bash bert_jax/launch/worker.sh tail' || true; fail "the run failed on a worker (above)." ;;
          *finished*) say "the run has finished: $workdir"; return ;;
          *) say "a worker does not answer; trying again" ;;
        esac ;;
      SUSPENDING | SUSPENDED | FAILED)
        say "$name was taken away; asking for another, to go on from the last checkpoint"
        again "$@" ;;
      *) ;;
    esac
  done
}

again() { # the same request once more, until it is granted
  if [ -z "$type" ]; then
    type=$(qr describe --format='value(tpu.nodeSpec[0].node.acceleratorType)')
    version=$(qr describe --format='value(tpu.nodeSpec[0].node.runtimeVersion)')
    slices=$(qr describe --format='value(tpu.nodeSpec[0].multisliceParams.nodeCount)')
    spot=1 slices=${slices:-1}
  fi
  while true; do
    qr delete --force --quiet || say "$name could not be deleted; it may be gone already"
    create
    ! wait_until_active || break
    say "still no capacity; trying again"
    sleep "$poll"
  done
  setup
  start "$@"
}

case $action in
  create) create; say "asked for $type; bash launch/tpu.sh run $name waits for it" ;;
  setup) wait_until_active || fail "$name is not active."; setup ;;
  run)
    [ -n "$store" ] && [ -n "$workdir" ] || fail "run needs --store gs://BUCKET/STORE and --workdir gs://BUCKET/RUN."
    [ $# -gt 0 ] || fail "run needs pretrain's arguments after --, for example: -- --config configs/pretrain.py:base,bf16"
    if wait_until_active; then setup; start "$@"; else again "$@"; fi
    say "running; bash launch/tpu.sh logs $name"
    [ -n "$detach$dry" ] || watch "$@" ;;
  logs) qr ssh --node=0 --worker=0 --command='tail -n 100 -F bert_jax/run/log.txt' ;;
  ssh) qr ssh --node=0 --worker="$worker" ;;
  stop) everywhere 'bash bert_jax/launch/worker.sh stop' ;;
  delete) qr delete --force --quiet ;;
esac
