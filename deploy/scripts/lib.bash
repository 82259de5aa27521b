# What the scripts of this directory share: messages, options, and the admin API of a replica. Sourced, not run.
# shellcheck shell=bash

self=${0##*/}

# The same order of names and the same way to write numbers everywhere.
export LC_ALL=C

# What ends a script unexpectedly is never silent.
set -o errtrace
trap 'complain "\`$BASH_COMMAND\` failed in line $LINENO"' ERR

# How replicas are reached; `admin_option` fills these in.
admins=()
curl_options=()
timeout=10
token_file=

say() { printf '%s\n' "$*"; }

complain() { printf '%s: %s\n' "$self" "$*" >&2; }

# Ends the script: die CODE MESSAGE.
die() {
  complain "${*:2}"
  exit "$1"
}

# Prints the comment at the head of a script, which is its manual.
manual() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Ends the script if an option lacks its value: needs_value "$@".
needs_value() { (($# >= 2)) || die "$usage_code" "$1 needs a value (--help says more)"; }

# Ends the script unless a value has the form that an option wants: expect OPTION VALUE REGEX.
expect() { [[ $2 =~ ^($3)$ ]] || die "$usage_code" "$1 cannot be \`$2\` (--help says more)"; }

# The exit code for a command line that cannot be understood.
usage_code=2

# Forms of values, for `expect`; each script uses some of them. A name of the configuration needs no escape in a URL, in
# JSON or in PromQL.
# shellcheck disable=SC2034
a_name='[A-Za-z0-9._-]+'
# shellcheck disable=SC2034
a_number='[0-9]{1,9}'
# shellcheck disable=SC2034
a_ratio='0|1|0?\.[0-9]+|1\.0+'
# shellcheck disable=SC2034
a_duration='[0-9]+(\.[0-9]+)?[smhd]?'
# shellcheck disable=SC2034
a_url='(https?://)?[^/ ]+(/[^ ]*)?'

# Takes an option that says how replicas are reached; false if it is none of these.
admin_option() {
  case $1 in
    --admin | --token-file | --timeout | --cacert | --cert | --key) needs_value "$@" ;;
    *) return 1 ;;
  esac
  case $1 in
    --admin)
      expect "$1" "$2" "$a_url"
      admins+=("$(as_url "$2")")
      ;;
    --token-file) token_file=$2 ;;
    --timeout)
      expect "$1" "$2" "$a_number"
      timeout=$2
      ;;
    --cacert | --cert | --key) curl_options+=("$1" "$2") ;;
  esac
}

# A URL with its scheme, and without a slash at its end.
as_url() {
  local url=${1%/}
  [[ $url == http*://* ]] || url=http://$url
  printf '%s' "$url"
}

# Asks for something: request METHOD URL [OPTION OF CURL]... Prints the body, and the status in a line of its own.
# False, with curl's complaint, where nobody answers.
request() {
  curl --silent --show-error --max-time "$timeout" --request "$1" "${curl_options[@]}" \
    --write-out '\n%{http_code}' "${@:3}" "$2"
}

# Asks with the token, which is kept off the command line, where every user of the machine could read it.
authorized() {
  if [[ -n $token_file ]]; then
    request "$@" --header @<(printf 'Authorization: Bearer %s\n' "$(< "$token_file")")
  else
    request "$@"
  fi
}

status_of() { printf '%s' "${1##*$'\n'}"; }

# An answer in one line, for people.
told() {
  printf 'HTTP %s, %s' "$(status_of "$1")" "$(tr -s ' \n' ' ' <<< "${1%$'\n'*}")"
}

# A text as JSON writes it, with its quotes.
json_text() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$(tr -d '\000-\037' <<< "$text")"
}

# The text under a key of an answer. Within a text a quote is escaped, so `"key":"` cannot be part of one.
text_in() { tr -d ' \n' <<< "$2" | sed -n "s/.*\"$1\":\"\\([^\"]*\\)\".*/\\1/p"; }

# The object `weights` of an answer, as lines of a backend and its weight.
weights_in() {
  tr -d ' \n' <<< "$1" | sed -n 's/.*"weights":{\([^}]*\)}.*/\1/p' | tr ',' '\n' \
    | sed -n 's/^"\([^"]*\)":\([0-9]*\)$/\1 \2/p'
}

# The weights of a route on a replica, as `weights_in` gives them, with a first line `etag TAG`.
read_weights() {
  local url=$1 route=$2 answer
  answer=$(request GET "$url/api/v1/routes/$route/weights") || {
    complain "$url does not answer"
    return 1
  }
  [[ $(status_of "$answer") == 200 ]] || {
    complain "$url: $(told "$answer")"
    return 1
  }
  printf 'etag %s\n%s\n' "$(text_in etag "$answer")" "$(weights_in "$answer")"
}

# The weight of one backend in such lines; empty if there is none.
weight_of() { awk -v backend="$1" 'NR > 1 && $1 == backend { print $2 }' <<< "$2"; }

tag_of() { awk 'NR == 1 { print $2 }' <<< "$1"; }

# Such lines in one, for people.
written() { awk 'NR > 1 { printf "%s%s %s", sep, $1, $2; sep = ", " }' <<< "$1"; }

# The same as the body that sets them: order LINES REASON.
order() {
  printf '{"weights":{%s},"reason":%s}' \
    "$(awk 'NR > 1 { printf "%s\"%s\":%s", sep, $1, $2; sep = "," }' <<< "$1")" "$(json_text "$2")"
}

# Has each replica read its files again, and says what came of it.
reload() {
  local url answer failed=0
  for url in "$@"; do
    if ! answer=$(request POST "$url/api/v1/reload"); then
      complain "$url does not answer; it follows its files by itself"
      failed=1
    elif [[ $(status_of "$answer") == 200 ]]; then
      say "$url has taken the files over"
    else
      complain "$url: $(told "$answer")"
      failed=1
    fi
  done
  return "$failed"
}
