#!/usr/bin/env bash
# TPU slices through queued resources: one host or a pod, on demand or spot.
#
#   bash launch/tpu.sh create NAME --type v5litepod-16 [--version V] [--spot] [--slices N]
#   bash launch/tpu.sh run    NAME --store gs://B/store --workdir gs://B/run -- --config configs/pretrain.py:base,bf16 ...
#   bash launch/tpu.sh logs   NAME            the last lines of worker 0, and what follows
#   bash launch/tpu.sh ssh    NAME [WORKER]   a shell on a worker (default: 0)
#   bash launch/tpu.sh setup  NAME            copies the code and installs requirements-tpu.txt; run does it too
#   bash launch/tpu.sh stop   NAME            ends the run, and waits until it has saved a checkpoint
#   bash launch/tpu.sh delete NAME            gives the slice back
#
# --zone Z and --project P with each, or ZONE and PROJECT, or gcloud's own defaults; --dry_run prints every gcloud call.
# `run` copies this checkout to every worker, the store to every worker's disk, and starts the same pretrain command on all of
# them. It then watches: when a slice is taken away, it asks for the same once more and resumes from the last checkpoint.
# --detach leaves it alone. Several workers: ssh-add ~/.ssh/google_compute_engine first, or gcloud reaches none of them.
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
poll=${TPU_POLL_SECONDS:-30} patience=${TPU_POLLS:-40} # without an answer
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
  call=(gcloud compute tpus queued-resources "$1" "${places[@]}" ${where[@]+"${where[@]}"} "${@:2}")
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
  local request=("--accelerator-type=$type" "--runtime-version=${version:-$(runtime "$type")}")
  if [ "$slices" -gt 1 ]; then request+=("--node-count=$slices" "--node-prefix=$name"); else request+=("--node-id=$name"); fi
  [ -z "$spot" ] || request+=(--spot)
  qr create "${request[@]}"
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
      FAILED) say "$(qr describe --format='value(state.failedData.error.message)')"; return 1 ;;
      SUSPENDING | SUSPENDED) return 1 ;;
    esac
    last=$now
    sleep "$poll"
  done
}

temporary=$(mktemp -d) archive=$temporary/bert_jax.tar.gz
trap 'rm -rf "$temporary"' EXIT

pack() { # this checkout as it is now: a run keeps its code, whatever becomes of the checkout
  [ -z "$dry" ] || return 0
  git ls-files -co --exclude-standard -z | while IFS= read -r -d '' file; do
    [ ! -e "$file" ] || printf '%s\0' "$file"
  done | tar czf "$archive" --null --files-from=-
}

setup() {
  qr scp "$archive" bert_jax.tar.gz --node=all --worker=all || fail "$name: the code did not reach every worker."
  # a run that resumes keeps its code; else nothing of an older copy stays but what was installed
  everywhere 'mkdir -p bert_jax/run && { bash bert_jax/launch/worker.sh status 2> /dev/null | grep -qx running ||
    { find bert_jax -mindepth 1 -maxdepth 1 ! -name run ! -name .venv -exec rm -rf {} + && tar xzf bert_jax.tar.gz -C bert_jax; }; } &&
    bash bert_jax/launch/worker.sh setup' ||
    fail "$name: the installation failed on a worker (above)."
}

start() {
  local said
  # BERT_JAX_RUN: a workdir that this slice's earlier workers have not let go is its own all the same
  said=$(everywhere "BERT_JAX_RUN=$name bash bert_jax/launch/worker.sh start $(printf '%q ' "$store" "$workdir" "$@")") ||
    fail "$name: the run did not start on every worker (above)."
  echo "$said"
  case $dry$said in
    1* | *started* | *'already running'*) ;;
    *) fail "$name: no worker answered. Is the key known to ssh-agent? ssh-add ~/.ssh/google_compute_engine" ;;
  esac
}

persist() { # sets up and starts; nobody is there to try again
  local tries=1
  until (setup && start "$@"); do
    [ "$tries" -lt "$patience" ] || fail "$tries tries. $name is still there, and costs: bash launch/tpu.sh delete $name"
    tries=$((tries + 1))
    say "trying again"
    sleep "$poll"
  done
}

statuses() { everywhere 'bash bert_jax/launch/worker.sh status'; }

given_back() { [ "$(qr describe --format='value(state.stateInitiator)')" = USER ]; }

watch() { # until the run has ended; asks for a new slice when this one is gone
  local found silent=0 costs="$name is still there, and costs: bash launch/tpu.sh delete $name"
  while true; do
    sleep "$poll"
    case $(state || echo UNKNOWN) in
      ACTIVE)
        found=$(statuses) || found=''
        [ -z "$found" ] || silent=0
        case $found in
          *dead*) say "the run is gone from a worker (a reboot?); starting it again"; persist "$@" ;;
          *running*) ;;
          *failed*) everywhere 'bash bert_jax/launch/worker.sh tail' || true; fail "the run failed on a worker (above). $costs" ;;
          *stopped*) say "the run was stopped; the same command resumes. $costs"; return ;;
          *finished*) say "the run has finished: $workdir. $costs"; return ;;
          *)
            silent=$((silent + 1))
            say "a worker does not answer; trying again"
            [ "$silent" -lt "$patience" ] || fail "no answer $silent times in a row. $costs" ;;
        esac ;;
      SUSPENDING | SUSPENDED | FAILED)
        if given_back; then say "$name was given back; the same command resumes the run on another"; return; fi
        say "$name was taken away; asking for another, to go on from the last checkpoint"
        again "$@" ;;
      DELETING) say "$name is being deleted; the same command resumes the run on another"; return ;;
      *)
        silent=$((silent + 1))
        [ "$silent" -lt "$patience" ] || fail "gcloud does not say what $name is, $silent times in a row. Was it deleted? If not, it costs." ;;
    esac
  done
}

recall() { # what was asked for
  local forgot="$name: gcloud does not say what it was; give run its --type (and --spot, --slices) too."
  type=$(qr describe --format='value(tpu.nodeSpec[0].node.acceleratorType)') || fail "$forgot"
  version=$(qr describe --format='value(tpu.nodeSpec[0].node.runtimeVersion)') || fail "$forgot"
  slices=$(qr describe --format='value(tpu.nodeSpec[0].multisliceParams.nodeCount)') || fail "$forgot"
  spot=$(qr describe --format='json(spot)') || fail "$forgot"
  slices=${slices:-1}
  case $spot in *'"spot"'*) spot=1 ;; *) spot='' ;; esac
}

again() { # the same request once more, until it is granted; who waits for capacity waits in the queue, not here
  local tries=1
  [ -n "$type" ] || recall
  while true; do
    qr delete --force --quiet || say "$name could not be deleted; it may be gone already"
    if ! create; then say "gcloud did not take the request; trying again"
    elif wait_until_active; then break
    else say "still no capacity; trying again"; fi
    [ "$tries" -lt "$patience" ] || fail "$tries requests for $type came to nothing (above)."
    tries=$((tries + 1))
    sleep "$poll"
  done
  persist "$@"
}

case $action in
  create)
    [ -n "$type" ] || fail "create needs --type, for example v4-64, v5litepod-16 or v6e-256."
    create || fail "gcloud did not take the request for $type (quota? zone?); nothing was created."
    say "asked for $type; bash launch/tpu.sh run $name waits for it" ;;
  setup) wait_until_active || fail "$name is not active."; pack; setup ;;
  run)
    [ -n "$store" ] && [ -n "$workdir" ] || fail "run needs --store gs://BUCKET/STORE and --workdir gs://BUCKET/RUN."
    [ $# -gt 0 ] || fail "run needs pretrain's arguments after --, for example: -- --config configs/pretrain.py:base,bf16"
    pack
    if wait_until_active; then setup; start "$@"; else again "$@"; fi
    say "running; bash launch/tpu.sh logs $name"
    [ -n "$detach$dry" ] || watch "$@" ;;
  logs) qr ssh --node=0 --worker=0 --command='tail -n 100 -F bert_jax/run/log.txt' ;;
  ssh) qr ssh --node=0 --worker="$worker" ;;
  stop)
    everywhere 'bash bert_jax/launch/worker.sh stop'
    for _ in $([ -n "$dry" ] || seq "$patience"); do
      found=$(statuses) || found=''
      case $found in
        '' | *running*) sleep "$poll" ;;
        *'stopped with'* | *failed*) fail "stopped, but the run had not saved: $found. It resumes from the last checkpoint." ;;
        *stopped*) say 'stopped; a checkpoint is saved'; exit ;;
        *) say 'nothing is running there'; exit ;;
      esac
    done
    [ -n "$dry" ] || fail "no worker says that it has stopped (bash launch/tpu.sh logs $name)." ;;
  delete) qr delete --force --quiet ;;
esac
