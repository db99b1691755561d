#!/usr/bin/env bash
# What run.sh asks of each worker of a slice, over SSH. It is copied there beside vitcls.tar.gz.
#
# worker.sh state COMMIT                 # absent, ready, running ATTEMPT RUN or ended ATTEMPT RUN CODE LAST-LINE
# worker.sh install COMMIT               # vitcls.tar.gz, which is that commit, into ~/env
# worker.sh train ATTEMPT RUN COMMAND... # starts the command, and returns
# worker.sh log BYTES                    # the log without its first BYTES
# worker.sh follow                       # the log, until the training ends
# worker.sh stop                         # kills the training
#
# A connection can be lost before an order is carried out, or after. So each may be given twice: what is installed is not
# installed again, an attempt is started once, and none beside one that is alive. What is known is in ~/vitcls-run.
#
# Exit code: 0 done, or nothing to do; else that of the command that failed.
set -uo pipefail

case ${1:-}:${2:-} in
  -h:* | --help:* | *:-h | *:--help) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" && exit 0 ;;
  state:* | install:* | train:* | log:* | follow:* | stop:*) order=$1 && shift ;;
  *) echo "error: '${1:-}' is no order for worker.sh; see --help" >&2 && exit 2 ;;
esac
mkdir -p ~/vitcls-run && cd ~/vitcls-run || exit
case $order in
  install | train | stop) # one at a time, with one whose connection was lost
    exec 8>>orders && flock --wait 600 8 || exit
    ;;
esac

is_alive() { # every process of a training holds the lock, so that it is free once the last one is gone
  ! flock --shared --nonblock lock true
}

state() { # COMMIT
  local alive=""
  ! is_alive || alive=1 # asked first: a training that ends meanwhile has left its code
  if [ -e code ]; then
    echo "ended $(<started) $(<code) $(tail --lines=1 log)"
  elif [ -e started ] && [ -n "$alive" ]; then
    echo "running $(<started)"
  elif [ -e started ]; then
    echo "ended $(<started) 137" # killed with its shell, as when the machine starts anew
  elif [ "$(cat installed 2>/dev/null)" = "$1" ]; then
    echo ready
  else
    echo absent
  fi
}

# The images have Python 3.10; uv brings a newer one.
install() { # COMMIT
  if [ "$(cat installed 2>/dev/null)" = "$1" ] || is_alive; then
    return 0
  fi
  rm -rf installed ~/vitcls && cd ~ &&
    python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 env &&
    tar xzf vitcls.tar.gz && ~/.local/bin/uv pip install --quiet --python=env './vitcls[tpu,gcs]' &&
    echo "$1" >vitcls-run/installed
}

train() { # ATTEMPT RUN COMMAND...
  local attempt=$1 run=$2 last
  last=$(cut -d' ' -f1 started 2>/dev/null)
  [ "${last:--1}" -lt "$attempt" ] || return 0
  [ ! -e code ] || stop # what is left of the last attempt
  exec 9>>lock
  flock --wait 1 9 || return 0
  rm -f code && echo "$attempt $run" >started && cd ~/vitcls || return
  shift 2
  # shellcheck disable=SC2016 # the shell that is started expands them
  PATH=~/env/bin:$PATH setsid nohup bash -c '"$@"; echo $? >~/vitcls-run/.code; mv ~/vitcls-run/.code ~/vitcls-run/code' \
    bash "$@" >>~/vitcls-run/log 2>&1 </dev/null 8>&- &
  echo $! >~/vitcls-run/session
}

log() { # BYTES
  tail --bytes=+$(($1 + 1)) log
}

follow() {
  [ -e session ] || { echo "nothing was started here yet" && return; }
  tail --lines=+1 --follow --pid="$(<session)" log
}

stop() {
  ! is_alive || pkill -KILL --session "$(<session)"
}

"$order" "$@"
