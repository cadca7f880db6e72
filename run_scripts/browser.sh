#!/usr/bin/env bash
# Installs what the tests of the dashboard in a real browser need: Playwright's Python package, and Debian's Chromium
# where there is no browser yet. Without them those tests skip, and say so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment data,train,test
"$PYTHON" -c 'import playwright' 2>/dev/null ||
    "$PYTHON" -m pip install -q -c "$REPO/constraints.txt" playwright || fail "pip could not install playwright"
for name in "${MEGAFORGE_BROWSER:-chromium}" chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && { say "the browser is $(command -v "$name")"; exit 0; }
done
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "there is no browser: install chromium, or name one in MEGAFORGE_BROWSER"
say "installing Chromium"
export DEBIAN_FRONTEND=noninteractive
timeout 300 apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1 ||
    { timeout 120 apt-get update -qq && timeout 300 apt-get install -qq -y --no-install-recommends chromium >/dev/null; } ||
    fail "apt-get could not install chromium"
say "the browser is $(command -v chromium)"
