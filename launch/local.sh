#!/usr/bin/env bash
# N processes of one run on this machine, started again when one dies, as a scheduler does.
#
# launch/local.sh [--processes=2] [--devices=1] [--restarts=3] -- vitcls train --config=... --workdir=...
#
# GPUs are split evenly among the processes; without GPUs each gets --devices virtual CPU devices. Every line that a
# process writes begins with its number. When one is killed, or stops after saving (143), the others end by themselves
# and all are started again, at most --restarts times; they go on from the last checkpoint. SIGTERM and Ctrl-C are
# passed on, and nothing is started again; nor where one ends with 2 (bad input): the others get SIGTERM then. They get it
# as well when local.sh itself is killed, on Linux. Ctrl-Z stops local.sh alone.
#
# Exit code: 0 done; 1 failure; 2 bad input, be it of one process; 143 stopped after saving; 128 + signal if one was
# killed once too often.
set -uo pipefail

processes=2 devices=1 restarts=3
patience=60 # seconds that the others have to end by themselves after one has died

fail() {
  echo "error: $1" >&2
  exit 2
}

whole_number() { # NAME VALUE LEAST
  [[ $2 =~ ^[0-9]+$ && $2 -ge $3 ]] || fail "--$1=$2 is not a whole number of at least $3"
}

while [ $# -gt 0 ]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" && exit 0 ;;
    --) shift && break ;;
    --processes | --devices | --restarts) fail "$1 takes its value after '='; write $1=N" ;;
    *) fail "'$1' is no flag of local.sh; write local.sh [--processes=N] [--devices=N] [--restarts=N] -- COMMAND" ;;
  esac
  shift
done
whole_number processes "$processes" 1
whole_number devices "$devices" 1
whole_number restarts "$restarts" 0
[ $# -gt 0 ] || fail "there is no command; write local.sh --processes=$processes -- vitcls train --config=... --workdir=..."
command -v "$1" >/dev/null || fail "the command '$1' is not installed; activate the environment of vitcls first"

gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # -1, as nothing, is how one hides them all
    IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES/#-1*/}"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
  fi
fi
[ $((${#gpus[@]} % processes)) -eq 0 ] ||
  fail "${#gpus[@]} GPUs cannot be split among $processes processes; use --processes=N that divides ${#gpus[@]}"

free_port() {
  local port
  while port=$((RANDOM % 16384 + 16384)); do
    (: <"/dev/tcp/localhost/$port") 2>/dev/null || break
  done
  echo "$port"
}

with_launcher=() # what makes a process end with this script, where even SIGKILL ends it
! setpriv --pdeathsig=TERM true 2>/dev/null || with_launcher=(setpriv --pdeathsig=TERM --)

pids=() codes=() stop=0

start_one() { # NUMBER COORDINATOR COMMAND...
  local share=$((${#gpus[@]} / processes))
  if [ "$share" -gt 0 ]; then
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:$1*share:share}")
    export CUDA_VISIBLE_DEVICES
  else
    export JAX_NUM_CPU_DEVICES=$devices
  fi
  export JAX_COORDINATOR_ADDRESS=$2 JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$1
  shift 2
  exec "${with_launcher[@]}" "$@"
}

number_lines() { # NUMBER; to the end of its input, whatever signals all others get
  trap '' INT TERM
  exec sed -u "s/^/$1: /"
}

start() { # COMMAND...
  local i coordinator
  coordinator=localhost:$(free_port)
  pids=() codes=()
  for ((i = 0; i < processes; i++)); do
    set -m # a process group of its own, which Ctrl-C in a terminal does not reach: it is passed on, once
    start_one "$i" "$coordinator" "$@" </dev/null > >(number_lines "$i") 2> >(number_lines "$i" >&2) &
    set +m
    pids+=($!)
  done
  echo "local.sh: process ids ${pids[*]}" >&2
}

pass_on() { # SIGNAL
  local i
  stop=1
  for i in "${!pids[@]}"; do
    [ -n "${codes[$i]:-}" ] || kill -s "$1" "${pids[$i]}" 2>/dev/null
  done
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

# Waits until all have ended, and fills `codes`. Those that outlive a dead one for too long are killed; bad input ends
# all at once, as the others may wait for that one before they can notice its end.
watch() {
  local i left died=0
  while :; do
    left=0
    for i in "${!pids[@]}"; do
      [ -z "${codes[$i]:-}" ] || continue
      if kill -0 "${pids[$i]}" 2>/dev/null; then
        left=1
        [ "$died" -eq 0 ] || [ $((SECONDS - died)) -lt $patience ] || kill -KILL "${pids[$i]}"
        continue
      fi
      wait "${pids[$i]}"
      codes[i]=$?
      [ "${codes[$i]}" -ne 2 ] || pass_on TERM
      [ "${codes[$i]}" -eq 0 ] || [ "$died" -ne 0 ] || died=$((SECONDS + 1))
    done
    [ $left -eq 1 ] || return
    sleep 0.2
  done
}

# The exit code of the run: that of its worst process. Bad input (2) comes first, then a signal (128 and more): they are
# the cause of others' failures.
verdict() {
  local code worst=0
  for code in "${codes[@]}"; do
    ((worst == 2 || code <= worst && code != 2)) || worst=$code
  done
  echo "$worst"
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  watch 2>/dev/null # where bash would say which was killed, in its own words
  code=$(verdict)
  if [ "$code" -lt 128 ] || [ $stop -eq 1 ]; then
    exit "$code"
  elif [ "$attempt" -ge "$restarts" ]; then
    echo "local.sh: ended with exit codes ${codes[*]} after $attempt restarts; not started again" >&2
    exit "$code"
  fi
  echo "local.sh: ended with exit codes ${codes[*]}; starting again ($((attempt + 1)) of $restarts)" >&2
done
