#!/usr/bin/env bash
# What tpu_pod.sh does on each worker of a pod; it copies this file there. Everything lies in ~/dpojax-pod.
set -euo pipefail

usage() {
  cat <<'END'
usage: bash tpu_worker.sh install SOURCE EXTRAS [COMMAND]   Python, JAX and dpojax, once; before them COMMAND
       bash tpu_worker.sh start ARGUMENT ...                dpojax with these arguments, detached from the connection
       bash tpu_worker.sh follow LINE                       its output from this line on, with numbers, until it ends
       bash tpu_worker.sh status                            none, running, stopped, lost, or its exit status
       bash tpu_worker.sh stop                              SIGTERM: all workers save, and end
SOURCE is a git URL, or "checkout": the archive ~/dpojax-pod/source.tar.gz.
END
}

cd "$(dirname "$0")"

running() { # after a restart of the machine the number may be another program's
  [ -f pid ] && grep -q tpu_worker "/proc/$(cat pid)/cmdline" 2>/dev/null
}

install() {
  local source=$1 extras=$2 setup=${3:-} named wanted
  wanted="$* $(cat source.sum 2>/dev/null || true)"
  ! running || return 0 # nothing is changed beneath a program
  [ "$(cat installed 2>/dev/null)" != "$wanted" ] || return 0
  [ -z "$setup" ] || bash -c "$setup"
  named="dpojax${extras:+[$extras]} @ $source"
  if [ "$source" = checkout ]; then
    rm -rf source && mkdir source && tar -xzf source.tar.gz -C source
    named="$PWD/source${extras:+[$extras]}"
  fi
  # The image's own Python may be older than what dpojax needs; uv brings one.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --python 3.12 venv
  python3 -m uv pip install --quiet --python venv/bin/python "$named" 'jax[tpu]'
  echo "$wanted" >installed
}

start() {
  if running; then
    [ "$*" != "$(cat arguments)" ] || return 0
    echo "another command runs here: dpojax $(cat arguments)"
    exit 2
  fi
  [ ! -f log ] || mv log log.before
  rm -f status stopped dpojax.pid
  echo "$*" >arguments
  setsid nohup bash "$PWD/tpu_worker.sh" run "$@" </dev/null >log 2>&1 &
  echo $! >pid
}

run() {  # the process whose number is in the file pid
  local code=0
  trap : TERM # a machine that goes down sends it to this shell too, which writes down how dpojax ends
  # shellcheck disable=SC2016
  PYTHONUNBUFFERED=1 bash -c 'echo $$ >dpojax.pid && exec venv/bin/dpojax "$@"' dpojax "$@" || code=$?
  echo "$code" >status.new && mv status.new status
}

follow() {
  [ -f log ] || return 0
  local line number=$1
  tail -n +"$1" --sleep-interval=0.2 --pid="$(cat pid)" -f log | while IFS= read -r line; do
    echo "$number $line"
    number=$((number + 1))
  done
}

status() {
  if running; then
    echo "dpojax: running"
  elif [ -f status ]; then
    local code
    code=$(cat status)
    [ "$code" != 130 ] || [ ! -f stopped ] || code=stopped
    # A worker other than the first is silent until it fails: why it did is its last line.
    [ "$code" = 0 ] || [ ! -s log ] || echo "last line of $(hostname): $(tail -n 1 log)"
    echo "dpojax: $code"
  elif [ -f pid ]; then
    echo "dpojax: lost" # ended by force, as by a restart of the machine
  else
    echo "dpojax: none"
  fi
}

stop() {
  running || { echo "nothing runs here" >&2; exit 2; }
  touch stopped
  kill -TERM "$(cat dpojax.pid)"
}

case ${1:-} in
  install | start | run | follow | status | stop) "$@" ;;
  --help | -h) usage ;;
  *) usage >&2; exit 2 ;;
esac
