#!/usr/bin/env bash
# Starts the upper-case server, talks to it with pf, and stops it; `make demo` runs this.
#
# usage: tools/demo.sh [DIRECTORY]    where pf, twistd and python are; by default wherever PATH finds them
#
# Exits with 0 if each command did what is written below, and leaves nothing running and no file behind.
set -euo pipefail

if [ $# -gt 0 ]; then
    PATH=$(cd "$1" && pwd):$PATH
fi
unset PROTOFRAME_TIMEOUT PROTOFRAME_JSON PROTOFRAME_QUIET

scratch=$(mktemp -d "${TMPDIR:-/tmp}/protoframe-demo.XXXXXX")
: >"$scratch/ping"
server=

stop() {
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=
}

cleanup() {
    stop
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    printf '\ndemo: %s\n' "$*" >&2
    if [ -s "$scratch/twistd.log" ]; then
        printf 'The end of the log of the server:\n' >&2
        tail -n 20 "$scratch/twistd.log" >&2
    fi
    exit 1
}

# expect STATUS TEXT COMMAND...: shows the command and what it prints, which must hold TEXT.
expect() {
    local status=$1 text=$2 output actual=0 word
    shift 2
    printf '\n$'
    for word in "$@"; do
        case $word in
            *[[:space:]]*) printf ' "%s"' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    output=$("$@" 2>&1) || actual=$?
    [ -z "$output" ] || printf '%s\n' "$output"
    [ "$actual" -eq 0 ] || printf '(exit status %s)\n' "$actual"
    [ "$actual" -eq "$status" ] || fail "expected exit status $status"
    case $output in
        *"$text"*) ;;
        *) fail "expected to read: $text" ;;
    esac
}

cd "$scratch"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
where=tcp:127.0.0.1:$port

printf '$ twistd -n pf-upper --listen tcp:%s:interface=127.0.0.1 &\n' "$port"
twistd -n --pidfile="$scratch/twistd.pid" --logfile="$scratch/twistd.log" \
    pf-upper --listen "tcp:$port:interface=127.0.0.1" >"$scratch/output" 2>&1 &
server=$!

answers=
for _ in $(seq 100); do
    kill -0 "$server" 2>/dev/null || break
    if pf ping --timeout 1 "$where" >"$scratch/ping" 2>&1; then
        answers=yes
        break
    fi
    sleep 0.1
done
if [ -z "$answers" ]; then
    cat "$scratch/output" "$scratch/ping" >&2
    fail "the server does not answer at $where"
fi

expect 0 "" pf ping "$where"
expect 0 "upper(text: str) -> str" pf list "$where"
expect 0 "text" pf describe "$where" Speech.upper
expect 0 '"HELLO, WORLD"' pf call "$where" Speech.upper "text=hello, world"
expect 0 '"longest_word"' pf call "$where" Speech.count "text=the quick brown fox"

printf '\nA text that is too long is an error that the method declares, with a field of its own:\n'
head -c 100001 /dev/zero | tr '\0' 'a' >long.txt
expect 66 "TooLong" pf call "$where" Speech.upper text@long.txt

printf '\nA number is no text; the error says where the fault is:\n'
expect 67 "text" pf call "$where" Speech.upper text:=3

printf '\n$ kill %s\n' "$server"
stop
expect 7 "$where" pf ping --timeout 5 "$where"

printf '\nThe demo is over; all went as it should, and the server is gone.\n'
