#!/usr/bin/env bash
# A stand-in for gcloud and the cloud behind it, which lies in the folder $CLOUD. What the workers of its slice are told
# they really do, each in a home of its own. A test reads and writes these files:
#
# state          of the slice; without it there is none     calls      the verbs that were called, one a line
# first          the state after `create` (ACTIVE)          workers/N  the home of a worker, gone with the slice
# fail-VERB      how often a verb is still to fail          programs   what comes first on the workers' PATH
# missing        the buckets that are not there             lost       `create` does its work, but its answer is lost
# away           a line `WORKER [WORD]` each: no SSH to the worker, or no command with that word
# shellcheck disable=SC2317 # two functions are called by name
set -u
cd "$CLOUD" || exit
words=() worker="" command=""
for argument in "$@"; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
    --*) ;;
    *) words+=("$argument") ;;
  esac
done
verb=${words[3]:-${words[1]}} name=${words[-1]%:} # gcloud compute tpus GROUP VERB, or gcloud storage ls
echo "$verb" >>calls

fail() { # CODE WORDS, as gcloud has them
  echo "ERROR: (gcloud.$verb) $2" >&2
  exit "$1"
}

is_away() { # WORKER
  local who word
  while read -r who word; do
    [[ $who != "$1" || $command != *"$word"* ]] || return 0
  done < <(cat away 2>/dev/null)
  return 1
}

on_workers() { # FUNCTION, on each that is asked for, at once; the exit code is one of those that are not 0
  local home pids=() code=0
  [ "$(cat state 2>/dev/null)" = ACTIVE ] || fail 1 "This TPU has state PREEMPTED, so it cannot be used anymore."
  for home in workers/*; do
    [ "$worker" = all ] || [ "$worker" = "${home##*/}" ] || continue
    echo "SSH: Attempting to connect to worker ${home##*/}..." >&2
    if is_away "${home##*/}"; then
      echo "ssh: connect to host ${home##*/} port 22: Connection timed out" >&2
      code=255
      continue
    fi
    (cd "$home" && "$1") &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
  done
  exit $code
}

run_command() {
  exec env -i HOME="$PWD" CLOUD="$CLOUD" PATH="$CLOUD/programs:/usr/bin:/bin" bash -c "$command"
}

copy() {
  cp "${words[@]:4:${#words[@]}-5}" .
}

left=$(cat "fail-$verb" 2>/dev/null)
if [ "${left:-0}" -gt 0 ]; then
  echo $((left - 1)) >"fail-$verb"
  fail 1 "UNAVAILABLE: no network, or what else there is"
fi
case $verb in
  create)
    [ ! -e state ] || fail 1 "ALREADY_EXISTS: Resource '$name' already exists"
    mkdir -p workers/0 workers/1
    cat first >state 2>/dev/null || echo ACTIVE >state
    [ ! -e lost ] || fail 1 "DEADLINE_EXCEEDED: no answer"
    ;;
  ls)
    ! grep -q --line-regexp "$name" missing 2>/dev/null || fail 1 "$name not found: 404."
    exit 0
    ;;
  ssh) on_workers run_command ;;
  scp) on_workers copy ;;
esac
[ -e state ] || fail 1 "NOT_FOUND: Resource '$name' was not found"
case $verb in
  describe) cat state ;;
  delete)
    for home in workers/*; do
      pkill -KILL --session "$(cat "$home/vitcls-run/session" 2>/dev/null || echo 999999999)"
    done
    rm -rf state workers
    ;;
esac
exit 0
