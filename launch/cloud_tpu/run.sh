#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks the queue for it, installs vitcls on all workers, trains, follows, and deletes it.
#
# launch/cloud_tpu/run.sh run --name=c100 --project=P --zone=Z --slice=v6e-16 [--spot] [--restarts=20] [--dry_run] \
#     -- vitcls train --config=configs/vit_cifar100.py --config.dataset.data_dir=gs://BUCKET/tensorflow_datasets \
#     --workdir=gs://BUCKET/c100
# launch/cloud_tpu/run.sh logs --name=c100 --project=P --zone=Z         # follow it, line by line
# launch/cloud_tpu/run.sh delete --name=c100 --project=P --zone=Z       # stop paying
#
# What is installed is the newest commit of this checkout. A slice that is preempted stays in the queue as SUSPENDED and
# never comes back by itself: the script deletes it, asks for another, and the run goes on from its last checkpoint in
# the bucket. It must therefore keep running; the training does not need it. If it was ended, the same command takes up
# the slice and what runs on it. --restarts counts trainings that are started again, on the same slice or another.
#
# A slice is deleted once its training has ended or the queue says that it is lost, never because nobody answers. With
# several workers and an SSH agent, gcloud wants its key there: ssh-add ~/.ssh/google_compute_engine.
# --dry_run prints the commands of gcloud for a run without mishap.
#
# In the environment, in seconds: VITCLS_SECONDS_BETWEEN_LOOKS (30); VITCLS_SECONDS_OF_SILENCE (1800) without an answer,
# after which it gives up and leaves the slice; VITCLS_SECONDS_OF_PATIENCE (120) for workers that outlive a dead one.
#
# Exit code: that of the training, of its worst worker, where 2 (bad input) comes first; 1 where gcloud refused or did not
# answer, or the slice was lost once too often; 2 for bad input, such as a bucket of the command that is not there, or
# where already the first question to gcloud fails: nothing is created then; 130 or 143 after a signal, which leaves the
# slice and its training alone.
set -uo pipefail

slices="v5e-1 v5e-4 v5e-8 v5e-16 v5e-32 v5e-64 v5e-128 v5e-256 v6e-1 v6e-4 v6e-8 v6e-16 v6e-32 v6e-64 v6e-128 v6e-256"
name="" project="" zone="" slice="" spot="" restarts=20 dry_run="" action=${1:-}
between_looks=${VITCLS_SECONDS_BETWEEN_LOOKS:-30}
silence=${VITCLS_SECONDS_OF_SILENCE:-1800} patience=${VITCLS_SECONDS_OF_PATIENCE:-120}
root=$(cd "$(dirname "$0")/../.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 2
}

show_help() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0"
  exit
}

case $action in
  run | logs | delete) shift ;;
  -h | --help) show_help ;;
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
    -h | --help) show_help ;;
    --) shift && break ;;
    --name | --project | --zone | --slice | --restarts) fail "$1 takes its value after '='; write $1=VALUE" ;;
    *) fail "'$1' is no flag of run.sh; see --help" ;;
  esac
  shift
done

for flag in name project zone; do
  [ -n "${!flag}" ] || fail "--$flag is missing"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name is impossible; use a to z, 0 to 9 and -, at most 40, such as c100"
[[ $project =~ ^(([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|[0-9]+)$ ]] ||
  fail "--project=$project is not the id of a project, such as my-project-1; 'gcloud projects list' has yours"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone is not a zone, such as us-east5-b"

# What `run` needs besides: a slice that is offered, and a workdir that outlives it.
check_run() { # COMMAND...
  local argument last="" workdir=""
  [[ " $slices " == *" $slice "* && -n $slice ]] || fail "--slice=$slice is not offered; use one of $slices"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts is not a whole number"
  [[ $between_looks =~ ^[0-9.]+$ && $silence =~ ^[0-9]+$ && $patience =~ ^[0-9]+$ ]] ||
    fail "VITCLS_SECONDS_BETWEEN_LOOKS, _OF_SILENCE and _OF_PATIENCE are numbers, not '$between_looks $silence $patience'"
  [ "${1:-} ${2:-}" = "vitcls train" ] || fail "after -- comes the command: vitcls train --config=... --workdir=gs://..."
  for argument in "$@"; do
    [ "$last" != --workdir ] || workdir=$argument
    [[ $argument != --workdir=* ]] || workdir=${argument#*=}
    last=$argument
  done
  [ -n "$workdir" ] || fail "the command has no --workdir=gs://BUCKET/PATH"
  [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]+/.+ ]] ||
    fail "--workdir=$workdir is not gs://BUCKET/PATH; the disks of a slice are gone after a preemption"
}

here=(--project="$project" --zone="$zone")
connection=(-oConnectTimeout=10 -oServerAliveInterval=20) # a machine that is gone closes no connection

say() {
  echo "run.sh: $1" >&2
}

leave() { # CODE REASON
  say "$2; what there is of $name goes on. The same command takes it up, '$0 logs --name=$name ${here[*]}' shows the \
training, '$0 delete --name=$name ${here[*]}' stops the bill"
  exit "$1"
}

interrupted() { # CODE NAME
  { jobs -p | xargs -r kill; wait; } 2>/dev/null # it may be about to write into $scratch
  leave "$1" "ended by $2"
}

# gcloud, and what it says in files; with --dry_run its command in print. A signal interrupts `wait`, but no command.
call() {
  if [ -n "$dry_run" ]; then
    printf 'gcloud' && printf ' %q' "$@" && echo
  elif [ "$action" != run ]; then
    gcloud "$@" 2>"$scratch/err"
  else
    gcloud "$@" >"$scratch/out" 2>"$scratch/err" &
    wait $!
  fi
}

complaint() {
  grep -m 1 ERROR "$scratch/err" || tail -n 5 "$scratch/err"
}

pause() {
  sleep "$between_looks" &
  wait $!
}

describe() {
  call compute tpus queued-resources describe "$name" "${here[@]}" --format='value(state.state)'
}

# Refuses buckets that are not there. Only the slice may have the right to see one, so that nothing else is a refusal.
check_buckets() { # COMMAND...
  local bucket
  while read -r bucket; do
    if [[ ! $bucket =~ ^gs://[a-z0-9._-]+$ ]] ||
      { ! call storage ls --buckets "$bucket" --project="$project" && grep -q "not found: 404" "$scratch/err"; }; then
      fail "there is no bucket $bucket; make it, 'gcloud storage buckets create $bucket --location=${zone%-*}', or \
change the command"
    fi
  done < <(printf '%s\n' "$@" | sed -nE 's|^(--[^=]*=)?(gs://[^/]+).*|\2|p' | sort -u)
}

create() {
  local accelerator=${slice/v5e/v5litepod} runtime=v2-alpha-tpuv6e
  [[ $slice == v6e-* ]] || runtime=v2-alpha-tpuv5-lite
  call compute tpus queued-resources create "$name" "${here[@]}" --node-id="$name" --quiet \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot:+--spot}
}

delete() {
  call compute tpus queued-resources delete "$name" "${here[@]}" --force --quiet
}

on() { # WORKER COMMAND
  call compute tpus tpu-vm ssh "$name" "${here[@]}" --worker="$1" --quiet "${connection[@]/#/--ssh-flag=}" --command="$2"
}

ask_workers() {
  on all "echo \"worker: \$(bash worker.sh state $commit 2>/dev/null || echo absent)\""
}

install() {
  local archive=$scratch/vitcls.tar.gz
  git -C "$root" archive --format=tar.gz --prefix=vitcls/ --output="$archive" "$commit" &&
    call compute tpus tpu-vm scp "$archive" "$root/launch/cloud_tpu/worker.sh" "$name:" "${here[@]}" --worker=all \
      --quiet "${connection[@]/#/--scp-flag=}" && on all "bash worker.sh install $commit"
}

train() { # COMMAND...
  on all "bash worker.sh train $restarted $id$(printf ' %q' "$@")"
}

log() { # the first worker's, from where it was shown
  on 0 "bash worker.sh log $shown"
}

show_log() {
  log || return
  cat "$scratch/out"
  shown=$((shown + $(wc -c <"$scratch/out")))
}

# What is known of the slice: its state; whether it was there, and not deleted here since; the exit code of the training
# once that is over. Of the training: how often it was started again, the id of its command, the bytes of its log that
# were shown, since when a worker is dead while others live.
state="" taken="" code="" restarted=0 id="" shown=0 died=""

again() { # CODE that ends it when that was once too often
  if ((restarted < restarts)); then
    restarted=$((restarted + 1))
    say "starting again ($restarted of $restarts)"
  else
    say "not finished after $restarts restarts; the last checkpoint is in the bucket"
    code=$1
  fi
}

# The next thing to do on a slice that is there, by what its workers say. All of them answer, or nothing is done.
work() { # COMMAND...
  local word attempt run ended line reason="" absent=0 missing=0 running=0 over=0 worst=0
  ask_workers && grep -q '^worker: ' "$scratch/out" || return
  while read -r _ word attempt run ended line; do # the newest attempt first
    [[ $word != running && $word != ended || $run == "$id" ]] ||
      fail "$name trains by another command; take another --name, or look at it with '$0 logs --name=$name ${here[*]}'"
    ((${attempt:-0} <= restarted)) || restarted=$attempt
    case $word in
      running) running=1 ;;
      ended)
        if ((attempt < restarted)); then
          missing=1
        else
          over=1
          ((worst == 2 || ended <= worst && ended != 2)) || { worst=$ended reason=$line; }
        fi
        ;;
      ready) missing=1 ;;
      *) absent=1 ;;
    esac
  done < <(grep '^worker: ' "$scratch/out" | sort -k 3,3nr)
  if ((worst == 2)); then # would come again, and the others may wait for that one
    ((!running)) || on all "bash worker.sh stop" || return
    conclude 2 "$reason"
  elif ((absent && !running)); then
    say "installing commit ${commit:0:12}"
    install
  elif ((missing && (running || !over))); then # or a start that did not reach all
    say "starting the training"
    train "$@"
  elif ((running)); then
    watch $((worst > 0 || absent))
  else
    conclude $((missing && worst < 137 ? 137 : worst)) "$reason"
  fi
}

watch() { # 1 where one is dead: the others end by themselves, or are ended, as by Slurm
  show_log || return
  if (($1 == 0)); then
    died=""
  elif ((SECONDS - ${died:=$SECONDS} >= patience)); then
    say "a worker is dead, and the others have not ended in $patience s"
    on all "bash worker.sh stop" || return
  fi
  pause
}

conclude() { # CODE [LAST-LINE of the worker that has it]
  show_log || return
  died=""
  (($1 == 0)) || say "ended with exit code $1${2:+: $2}"
  if (($1 < 128)); then # done, or a failure that would come again
    code=$1
  else
    again "$1"
  fi
}

look() { # sets `state`; fails where it is not known
  local before=$state
  if describe; then
    state=$(<"$scratch/out")
  elif grep -q NOT_FOUND "$scratch/err"; then
    state=GONE
  else
    return 1
  fi
  [[ $state == "$before" || ($state == GONE && -z $taken) ]] || say "$name is $state"
}

# Asks what there is and does the next thing; fails where a question or an order failed.
turn() { # COMMAND...
  local why
  look || return
  case ${code:+over }$state in
    GONE)
      [ -z "$taken" ] || { say "somebody has deleted $name; it is not asked for again" && exit 1; }
      check_buckets "$@"
      if ! create; then
        [ "$restarted" -eq 0 ] || return 1
        why=$(complaint)
        look || leave 1 "$why"
        [ "$state" != GONE ] || { say "$why" && exit 1; }
      fi
      taken=1 shown=0 died=""
      ;;
    "over GONE") exit "$code" ;;
    over*) delete ;;
    ACTIVE)
      taken=1
      work "$@"
      ;;
    FAILED | SUSPENDING | SUSPENDED)
      [ -z "$taken" ] || again 1
      taken=""
      delete
      ;;
    DELETING) pause ;;
    *) # in the queue, for as long as it takes
      taken=1
      pause
      ;;
  esac
}

run() { # COMMAND...
  local silent="" # since when
  id=$(printf '%q ' "$@" | cksum | cut -d' ' -f1)
  while :; do
    if turn "$@"; then
      silent=""
      continue
    fi
    [ -n "$state" ] || fail "nothing is known of $name: $(complaint)"
    say "$(complaint)"
    ((SECONDS - ${silent:=$SECONDS} < silence)) || leave 1 "gcloud or a worker has failed for $silence s"
    pause
  done
}

plan() { # COMMAND...: what `run` asks of gcloud where all goes well
  id=ID
  describe && check_buckets "$@" && create && describe
  ask_workers && install && ask_workers && train "$@" && ask_workers && log
  delete
}

[ "$action" != run ] || check_run "$@"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed; see cloud.google.com/sdk"
[ "$action" != run ] || commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) ||
  fail "$root is no checkout of git; its newest commit is what is installed"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case $dry_run$action in
  run)
    trap 'interrupted 130 Ctrl-C' INT
    trap 'interrupted 143 SIGTERM' TERM
    run "$@"
    ;;
  1run) plan "$@" ;;
  *logs) on 0 "[ ! -e worker.sh ] && echo nothing is installed yet || bash worker.sh follow" ;;
  1delete) delete ;;
  delete) delete && say "$name is deleted" ;;
esac || { say "$(complaint)" && exit 1; }
