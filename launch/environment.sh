# Sourced by quickstart.sh, test.sh and worker.sh: makes or reuses the environment, then $python is its interpreter.
# The caller stands in the project's root.
# JAXLM_VENV: where the environment stands (default: .venv in the project's root).
# JAXLM_PYTHON: the interpreter to build it from (default: the newest of python3.12, python3.11, python3 that runs).
# JAXLM_EXTRAS: what is installed beside jaxlm, as setup.py names it (default: dev,report).
# shellcheck shell=bash

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# A name on PATH proves nothing: a version manager's shim may be there for a version that is not active.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name candidate
  if [ -n "${JAXLM_PYTHON:-}" ]; then
    usable "$JAXLM_PYTHON" ||
      fail "JAXLM_PYTHON=$JAXLM_PYTHON does not run, is older than 3.11, or lacks the venv module"
    printf '%s\n' "$JAXLM_PYTHON"
    return
  fi
  for name in python3.12 python3.11 python3; do
    while IFS= read -r candidate; do
      if usable "$candidate"; then
        printf '%s\n' "$candidate"
        return
      fi
    done < <(type -aP "$name")
  done
  fail "found no Python >= 3.11 with the venv module (looked for python3.12, python3.11, python3);" \
    "install one (on Debian or Ubuntu: apt install python3.12 python3.12-venv), or set JAXLM_PYTHON=/path/to/python"
}

identity() {
  "$1" -c 'import platform, sys; print(platform.python_implementation(), platform.python_version(), platform.machine())'
}

make_environment() {
  local root="$1" extras="${JAXLM_EXTRAS:-dev,report}" base venv stamp wanted
  venv="${JAXLM_VENV:-$root/.venv}"
  stamp="$venv/jaxlm.stamp"
  base="$(find_python)" || exit $?
  python="$venv/bin/python"
  wanted="$(identity "$base") $root $extras $("$base" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$root/setup.py")"
  if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null; then
    return
  fi

  if [ -e "$venv" ] && ! { [ "$(identity "$python" 2>/dev/null)" = "$(identity "$base")" ] &&
    "$python" -c 'import pip' 2>/dev/null; }; then
    # Another Python, or a set-up that was interrupted. Only what these scripts made may be thrown away.
    if [ -e "$stamp" ] || [ -z "${JAXLM_VENV:-}" ] || [ -z "$(ls -A "$venv")" ]; then
      rm -rf "$venv"
    else
      fail "$venv exists, but is no environment of $(identity "$base"); remove it, or set JAXLM_VENV to another folder"
    fi
  fi
  echo "Making the environment in $venv with $("$base" --version); this takes a minute or two, once."
  if [ ! -x "$python" ]; then
    { mkdir -p "$venv" && : >"$stamp" && "$base" -m venv "$venv"; } || fail "could not make an environment in $venv"
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off \
    --editable ".[$extras]" || fail "pip could not install jaxlm into $venv; its message stands above"
  printf '%s\n' "$wanted" >"$stamp"
}
