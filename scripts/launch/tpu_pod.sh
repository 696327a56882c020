#!/usr/bin/env bash
# Run a dpojax command on all workers of a Cloud TPU pod: create it, install, run, begin again after preemption,
# fetch the results, delete it.
set -euo pipefail

usage() {
  cat <<'END'
usage: bash scripts/launch/tpu_pod.sh --project P --zone Z --name N --type T [options] -- COMMAND OF DPOJAX

  bash scripts/launch/tpu_pod.sh --project my-project --zone us-west4-a --name align --type v5litepod-256 --spot \
    --extras gcs --setup 'gcloud storage cp gs://my-bucket/pairs.jsonl pairs.jsonl' \
    -- dpo --model gs://my-bucket/base --data pairs.jsonl --output gs://my-bucket/run --mesh.fsdp 256

Given again while the pod is there, the same call goes on where it was: it waits, installs, starts or follows.

which pod
  --project P         Google Cloud project
  --zone Z            its zone
  --name N            name of the queued resource, and of its TPU
  --type T            accelerator type, as in v5litepod-256, v5p-128, v6e-256
  --runtime-version V software of the workers (default: by the type: v2-alpha-tpuv5-lite for v5litepod, v2-alpha-tpuv5
                      for v5p, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4)
  --spot              capacity that may be taken away, and costs less
  --create-flag F     a further flag of `gcloud compute tpus queued-resources create`, as in --service-account=A;
                      may be repeated, as may the next
  --ssh-flag F        a further flag of `gcloud compute tpus tpu-vm ssh` and `scp`, as in --internal-ip
what runs there
  --source S          a git URL, as in git+https://example.org/dpojax.git@main (default: the last commit of this
                      checkout, copied)
  --extras E          extras of dpojax to install, with commas between them
  --setup C           a shell command for every worker, before the installation, as in a mount, or a copy of data; it
                      runs in the folder that the command of dpojax runs in
how it ends
  --collect DIR       copy the run's --output from worker 0 to DIR of this machine (a URL needs no copy)
  --keep              leave the pod at the end, for the next command
  --retries N         times that the command is started again where it failed and the pod was not taken away; after
                      half an hour of running they count anew (default: 3)
  --poll S            seconds between two looks at the pod (default: 30)
in place of a run
  --stop              ask the run on the pod to save and end; whoever follows it then fetches and deletes
  --delete            delete the pod
  --dry-run           print the commands of gcloud, one time each, and run none
  --help              print this

Exit status: 0 done; 1 given up; 2 bad input, which trying again would not mend; 130 stopped.
END
}

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit "${2:-2}"
}

say() { echo "# $*"; }

# ---- options ----------------------------------------------------------------------------------------------------

project='' zone='' name='' type='' runtime='' source=checkout extras='' setup='' collect=''
keep=false retries=3 poll=30 dry=false task=run
create_flags=() ssh_flags=() command=()
while [ $# != 0 ]; do
  case $1 in
    --[a-z]*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --spot) create_flags+=(--spot) ;;
    --keep) keep=true ;;
    --stop | --delete) task=${1#--} ;;
    --dry-run) dry=true ;;
    --help | -h) usage; exit ;;
    --) shift; command=("$@"); break ;;
    --project | --zone | --name | --type | --runtime-version | --create-flag | --ssh-flag | --source | --extras | \
      --setup | --collect | --retries | --poll)
      [ $# -gt 1 ] || fail "$1: needs a value"
      case $1 in
        --create-flag) create_flags+=("$2") ;;
        --ssh-flag) ssh_flags+=("$2") ;;
        --runtime-version) runtime=$2 ;;
        *) printf -v "${1#--}" '%s' "$2" ;;
      esac
      shift ;;
    *) fail "$1: is no option; put -- before the command of dpojax, and see --help" ;;
  esac
  shift
done
for needed in project zone name; do
  [ -n "${!needed}" ] || fail "--$needed: is needed, see --help"
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries $retries: must be a whole number"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll $poll: must be a whole number of seconds"

output=''
check_run() {
  local i
  [ -n "$type" ] || fail "--type: is needed, see --help"
  [ ${#command[@]} != 0 ] || fail "no command of dpojax; put it behind --, as in -- dpo --model ..."
  for i in "${!command[@]}"; do
    case ${command[i]} in
      --output) output=${command[i + 1]:-} ;;
      --output=*) output=${command[i]#--output=} ;;
    esac
  done
  if [ -z "$runtime" ]; then
    case $type in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) fail "--type $type: give its --runtime-version too" ;;
    esac
  fi
  if [ -n "$output" ] && [[ $output != *://* ]] && [ -z "$collect" ] && ! $keep; then
    fail "--output $output: is on the pod, which is deleted at the end; give a URL (gs://), --collect or --keep"
  fi
  [ -z "$collect" ] || [ -n "$output" ] || fail "--collect $collect: the command has no --output to fetch"
}

# ---- gcloud -----------------------------------------------------------------------------------------------------

here=(--project="$project" --zone="$zone")
pod=dpojax-pod # the folder on each worker
exec 3>&1      # where a dry run prints, also from within $(...)

print() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%,+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  echo "$line" >&3
}

# A command of gcloud; in a dry run it is printed, and its output is ANSWER.
tpus() {
  if $dry; then
    print gcloud compute tpus "$@"
    [ -z "${ANSWER:-}" ] || echo "$ANSWER"
  else
    gcloud compute tpus "$@" </dev/null
  fi
}

on() { # WORKER ARGUMENT ...: tpu_worker.sh there
  local worker=$1 word words=''
  shift
  for word; do words+=" $(printf %q "$word")"; done
  tpus tpu-vm ssh "$name" "${here[@]}" --worker="$worker" --quiet "${ssh_flags[@]}" \
    --command="bash $pod/tpu_worker.sh$words"
}

copy() { tpus tpu-vm scp "$@" "${here[@]}" --quiet "${ssh_flags[@]}"; }

create() {
  say "asking for $type"
  tpus queued-resources create "$name" "${here[@]}" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${create_flags[@]}"
}

delete() { tpus queued-resources delete "$name" "${here[@]}" --force --quiet; }

# The pod's state, one word, or nothing where there is no such pod. What is no answer is an error before there is a pod;
# later it is asked again, as a pod that nobody watches costs no less.
state() {
  local found question=(queued-resources describe "$name" "${here[@]}" --format='value(state.state)')
  while ! found=$(ANSWER=ACTIVE tpus "${question[@]}" 2>&1); do
    if [[ $found == *NOT_FOUND* || $found == *'not found'* ]]; then return; fi
    $reached || fail "$found" 1
    say "gcloud does not say how the pod is: $found" >&2
    sleep "$poll"
  done
  found=${found##*$'\n'}
  if [ "$found" = ACTIVE ]; then # of its TPU, what was taken away may be known earlier
    case $(ANSWER=READY tpus tpu-vm describe "$name" "${here[@]}" --format='value(state)' || true) in
      PREEMPTED | TERMINATED) found=SUSPENDED ;;
    esac
  fi
  echo "$found"
}

rest() { $dry || sleep "$poll"; }

# Wait until the pod is there. What was taken away, or has failed, is deleted and asked for again.
await() {
  local now last=-
  while true; do
    now=$(state)
    [ "$now" = "$last" ] || $dry || say "the pod is ${now:-not there}"
    last=$now
    case $now in
      ACTIVE) reached=true; return ;;
      '') create || { $reached || fail "the pod could not be asked for" 1; spend "the pod could not be asked for"; } ;;
      FAILED) spend "the request for the pod has failed"; delete || rest ;;
      SUSPENDED) delete || rest ;;
      *) rest ;; # it waits for capacity, is being made, or is being taken away
    esac
  done
}

spend() { # a try, or give up
  [ "$left" -gt 0 ] || end 1 "$1, and --retries are used up"
  left=$((left - 1))
  say "$1; $left tries are left"
  rest
}

# ---- a run ------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
GOOD_SECONDS=1800
left=$retries # of them
reached=false # whether there has been a pod
packed=''     # a folder with what is copied to the workers
statuses=''

pack() {
  packed=$(mktemp -d)
  trap 'rm -rf "$packed"' EXIT
  cp "$root/scripts/launch/tpu_worker.sh" "$packed"
  [ "$source" = checkout ] || return 0
  git -C "$root" diff --quiet HEAD || say "changes of this checkout that are not committed stay here"
  git -C "$root" archive --format=tar.gz --output="$packed/source.tar.gz" HEAD
  git -C "$root" rev-parse HEAD >"$packed/source.sum"
}

install_once() {
  tpus tpu-vm ssh "$name" "${here[@]}" --worker=all --quiet "${ssh_flags[@]}" --command="mkdir -p $pod" &&
    copy "$packed"/* "$name:$pod/" --worker=all &&
    on all install "$source" "$extras" ${setup:+"$setup"}
}

install() { # a new pod may not take connections at once
  local patience=3
  say "installing on all workers"
  until install_once; do
    patience=$((patience - 1))
    [ "$(state)" = ACTIVE ] || return 1
    [ $patience != 0 ] || end 1 "the installation has failed"
    rest
  done
}

begin() {
  local said
  if said=$(on all start "${command[@]}" 2>&1); then
    say "running: dpojax ${command[*]}"
    return
  fi
  if [[ $said == *'another command runs here'* ]]; then
    keep=true
    end 2 "$(grep -m 1 'another command' <<<"$said"); wait for it, or --stop it"
  fi
  say "not started: $said"
  return 1
}

follow() { # worker 0's output, over broken connections, until all workers have ended
  local line next=1 silent=5
  while true; do
    while IFS= read -r line; do
      [ "${line%% *}" = "$next" ] || continue # gcloud has connected anew, and asked for the same lines again
      echo "${line#* }"
      next=$((next + 1))
    done < <(on 0 follow "$next")
    if statuses=$(ANSWER='dpojax: 0' on all status); then
      $dry || [[ $statuses == *'dpojax: running'* ]] || return 0
    else
      silent=$((silent - 1))
      [ $silent != 0 ] || return 0
    fi
    if $dry || [ "$(state)" != ACTIVE ]; then return; fi
    rest
  done
}

some() { grep -qx "dpojax: $1" <<<"$statuses"; } # a worker's status

fetch() {
  if [ -n "$collect" ] && [[ $output != *://* ]]; then
    say "copying $output to $collect"
    $dry || mkdir -p "$collect"
    copy "$name:$output" "$collect" --recurse --worker=0 || keep=true
  fi
}

end() { # STATUS SENTENCE
  trap - INT TERM
  if $keep; then
    say "the pod is kept; --delete deletes it"
  else
    say "deleting the pod"
    delete || say "IT MAY STILL BE THERE, AND COST: see gcloud compute tpus queued-resources list"
  fi
  say "$2"
  exit "$1"
}

interrupted() {
  trap - INT TERM
  say "the pod goes on; the same call follows it again, --stop stops its run, --delete deletes it"
  exit 130
}

run() {
  check_run
  pack
  trap interrupted INT TERM
  if $dry; then create; fi
  while true; do
    await
    statuses=''
    if install && begin; then
      began=$SECONDS
      follow
      [ $((SECONDS - began)) -lt "$GOOD_SECONDS" ] || left=$retries
      grep '^last line of' <<<"$statuses" || true
    fi
    if some 2; then end 2 "dpojax refused the command or its data, as its output says"; fi
    if some stopped; then
      fetch
      end 130 "stopped; the same call continues the run"
    fi
    if some 0 && ! some '[^0].*'; then
      fetch
      end 0 "done${output:+: $output}"
    fi
    rest # a pod that is being taken away says so with a delay
    if [ "$(state)" != ACTIVE ]; then
      say "the pod was taken away; the run continues on the next"
    elif some 130; then
      spend "the machines asked the run to stop"
    else
      spend "the run has failed, or its workers do not answer"
    fi
  done
}

case $task in
  run) run ;;
  stop) on 0 stop ;;
  delete) delete ;;
esac
