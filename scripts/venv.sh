# Sourced by the other scripts: makes .venv where it is missing and installs into it what is asked for, once.
#   install NAME EXTRAS [PIP ARGUMENT ...]     EXTRAS of this project, then further packages without their needs

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local python
  for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "no Python of version 3.11 or later is on the PATH; install one" >&2
  exit 2
}

install() {
  local name=$1 extras=$2 stamp=".venv/installed-$1"
  shift 2
  [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
  # What is installed is what pyproject.toml and this call asked for; where they changed, install again.
  local wanted
  wanted=$(cat pyproject.toml; echo "$name $extras $*")
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "Installing into .venv (once)"
  # Python compiles what is imported; pip would compile all there is, mostly for nobody.
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
  local further=
  if [ $# != 0 ]; then  # they need nothing of the others, so their download need not wait
    "${pip[@]}" --no-deps "$@" &
    further=$!
  fi
  "${pip[@]}" --editable ".[$extras]"
  [ -z "$further" ] || wait "$further"
  echo "$wanted" >"$stamp"
}
