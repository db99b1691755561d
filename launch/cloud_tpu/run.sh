#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks the queue for it, installs vitcls on all workers, trains, follows, and deletes it.
#
# launch/cloud_tpu/run.sh run --name=c100 --project=P --zone=Z --slice=v6e-16 [--spot] [--restarts=20] [--dry_run] \
#     -- vitcls train --config=configs/vit_cifar100.py --workdir=gs://BUCKET/c100
# launch/cloud_tpu/run.sh logs --name=c100 --project=P --zone=Z         # follow it again
# launch/cloud_tpu/run.sh delete --name=c100 --project=P --zone=Z       # stop paying
#
# What is installed is the newest commit of this checkout. A slice that is preempted stays in the queue as SUSPENDED and
# never comes back by itself: the script deletes it, asks for another, and the run goes on from its last checkpoint in
# the bucket. It must therefore keep running; the training does not need it. --dry_run prints every gcloud command.
#
# Exit code: that of the training; 1 where a command of gcloud failed; 2 for bad input, before anything is created.
set -uo pipefail

slices="v5e-1 v5e-4 v5e-8 v5e-16 v5e-32 v5e-64 v5e-128 v5e-256 v6e-1 v6e-4 v6e-8 v6e-16 v6e-32 v6e-64 v6e-128 v6e-256"
name="" project="" zone="" slice="" spot="" restarts=20 dry_run="" action=${1:-}
seconds_between_looks=30
root=$(cd "$(dirname "$0")/../.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 2
}

case $action in
  run | logs | delete) shift ;;
  -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" && exit 0 ;;
  *) fail "the first word is run, logs or delete, not '$action'; see --help" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "'$1' is no flag of run.sh; see --help" ;;
  esac
  shift
done

for flag in name project zone; do
  [ -n "${!flag}" ] || fail "--$flag is missing"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name is impossible; use a to z, 0 to 9 and -, at most 40, such as c100"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone is not a zone, such as us-east5-b"

# What `run` needs besides: a slice that is offered, and a workdir that outlives it.
check_run() { # COMMAND...
  local argument workdir=""
  [[ " $slices " == *" $slice "* && -n $slice ]] || fail "--slice=$slice is not offered; use one of $slices"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts is not a whole number"
  [ "${1:-} ${2:-}" = "vitcls train" ] || fail "after -- comes the command: vitcls train --config=... --workdir=gs://..."
  for argument in "$@"; do
    [[ $argument != --workdir=* ]] || workdir=${argument#*=}
  done
  [ -n "$workdir" ] || fail "the command has no --workdir=gs://BUCKET/PATH"
  [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]+/.+ ]] ||
    fail "--workdir=$workdir is not gs://BUCKET/PATH; the disks of a slice are gone after a preemption"
}

call() { # gcloud, or with --dry_run its command in print
  if [ -n "$dry_run" ]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

here=(--project="$project" --zone="$zone")

create() {
  local accelerator=${slice/v5e/v5litepod} runtime=v2-alpha-tpuv6e
  [[ $slice == v6e-* ]] || runtime=v2-alpha-tpuv5-lite
  call compute tpus queued-resources create "$name" "${here[@]}" --node-id="$name" --quiet \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot:+--spot}
}

state() { # ACTIVE, SUSPENDED, ...; nothing where it is not known
  call compute tpus queued-resources describe "$name" "${here[@]}" --format='value(state.state)'
}

delete() {
  call compute tpus queued-resources delete "$name" "${here[@]}" --force --quiet
}

on() { # WORKER COMMAND
  call compute tpus tpu-vm ssh "$name" "${here[@]}" --worker="$1" --quiet --command="$2"
}

wait_until_active() {
  local now
  while :; do
    now=$(state)
    if [ -n "$dry_run" ]; then
      echo "$now"
      return
    fi
    echo "run.sh: $name is ${now:-not known}" >&2
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep $seconds_between_looks
  done
}

# The images have Python 3.10; uv brings a newer one.
install() {
  local archive=vitcls.tar.gz
  if [ -z "$dry_run" ]; then
    archive=$(mktemp -d)/vitcls.tar.gz
    git -C "$root" archive --format=tar.gz --prefix=vitcls/ --output="$archive" HEAD || return
  fi
  call compute tpus tpu-vm scp "$archive" "$name:vitcls.tar.gz" "${here[@]}" --worker=all --quiet &&
    on all "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 env && \
tar xzf vitcls.tar.gz && ~/.local/bin/uv pip install --quiet --python=env './vitcls[tpu,gcs]'"
}

train() { # COMMAND...; it goes on where the connection is lost
  local command
  command=$(printf ' %q' "$@")
  on all "cd vitcls && rm -f ~/exit && PATH=~/env/bin:\$PATH setsid nohup \
bash -c $(printf '%q' "$command; echo \$? > ~/exit") > ~/log 2>&1 < /dev/null &"
}

follow() { # ends when the training on the first worker does, or when it is gone
  on 0 "tail -n +1 -F log & until [ -e exit ]; do sleep 1; done; sleep 1; kill \$!"
}

verdict() { # the highest exit code of all workers; nothing where they do not answer, or not all have ended
  local answers
  answers=$(on all "for i in \$(seq 60); do [ -e exit ] && break; sleep 1; done; cat exit") || return
  if [ -n "$dry_run" ]; then
    echo "$answers"
  else
    sort -n <<<"$answers" | tail -1
  fi
}

run() { # COMMAND...
  local attempt code
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    [ "$attempt" -eq 0 ] || echo "run.sh: starting again ($attempt of $restarts)" >&2
    if [ "$attempt" -eq 0 ] || [ "$(state)" != ACTIVE ]; then
      [ "$attempt" -eq 0 ] || delete
      create || exit 1
      wait_until_active || continue
      install || continue
    fi
    train "$@" || continue
    follow
    code=$(verdict)
    if [ -n "$dry_run" ]; then
      echo "$code"
      delete
      exit 0
    elif [[ $code =~ ^[0-9]+$ && $code -lt 128 ]]; then # done, or a failure that would come again
      delete
      exit "$code"
    fi
  done
  delete
  echo "run.sh: not finished after $restarts restarts; the last checkpoint is in the bucket" >&2
  exit 1
}

[ "$action" != run ] || check_run "$@"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed; see cloud.google.com/sdk"
case $action in
  run) run "$@" ;;
  logs) follow ;;
  delete) delete ;;
esac
