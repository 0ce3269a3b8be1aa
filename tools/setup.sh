#!/bin/sh
# Make .venv and install everything into it: torch first and alone (a range may pull gigabytes of CUDA), then the rest.
# Installs nothing when setup.py has not changed since the last complete run.
# PYTHON= chooses the interpreter; without it, that of .venv, else Python 3.11 or 3.12.
set -eu
fail() { echo "error: $*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

python=${PYTHON:-}
if [ -z "$python" ]; then
	for python in .venv/bin/python python3.11 python3.12 python3; do
		case "$(version_of "$python")" in 3.11 | 3.12) break ;; esac
	done
fi
version=$(version_of "$python") || fail "$python does not run; install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.11 setup"
case "$version" in
3.11 | 3.12) ;;
*) fail "$python is Python $version, but DGL has wheels for 3.11 and 3.12 only; name one of these: make PYTHON=/path/to/python3.11 setup" ;;
esac

native=dist_egnn/ops/native
want="$version $(cat setup.py tools/setup.sh tools/build_native.py $native/message_mlp.cpp | cksum)"
[ "$(cat .venv/.complete 2>/dev/null || true)" = "$want" ] && exit 0

echo "setup: making .venv (Python $version); a minute or two and 2.9 GB"
[ -x .venv/bin/python ] && [ "$(version_of .venv/bin/python)" = "$version" ] || {
	rm -rf .venv
	"$python" -m venv .venv || fail "could not make .venv with $python; is its venv module installed (python$version-venv)?"
}
rm -f .venv/.complete
log=.venv/setup.log
: >"$log"
pip() {
	.venv/bin/python -m pip install --disable-pip-version-check --only-binary=:all: --no-input "$@" >>"$log" 2>&1 ||
		fail "pip could not install '$*': $(grep -i '^error' "$log" | tail -n 1) (whole log: $log)"
}
pip "torch==2.13.0"
pip "setuptools<81" wheel
# MDAnalysisTests, the offline input of recipes/protein, comes as a source archive only: Python and data, nothing to compile
pip --no-build-isolation --no-binary=MDAnalysisTests -e ".[dev,protein]"
# pip does not show why kernels were not compiled; without them, models run on torch's operations
[ -e $native/message_mlp.base.so ] || .venv/bin/python tools/build_native.py >>"$log" 2>&1 || echo "setup: $(tail -n 1 "$log")" >&2
printf '%s' "$want" >.venv/.complete
echo "setup: done"
