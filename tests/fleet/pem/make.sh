#!/usr/bin/env bash
# Makes the throw-away certificates of tests/fleet/test_transport.py, good from 2020 to 2120; they protect nothing.
#   ca.pem      the authority             other-ca.pem  another one, that signed nothing
#   server.pem  sglang.test and localhost client.pem    for servers that ask for one   (each with its key)
#   locked.pem  the client's, with its key under a pass phrase
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > config <<CONFIG
[ca]
default_ca = throw_away
[throw_away]
new_certs_dir = .
database = index
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
subjectAltName = DNS:sglang.test, DNS:localhost
extendedKeyUsage = serverAuth
[client]
subjectAltName = DNS:client.test
extendedKeyUsage = clientAuth
CONFIG
: > index
make() { # name, section, how it is signed
  local name=$1 section=$2
  shift 2
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$name.key" \
    -subj "/CN=streamsyn test $name" -out "$name.csr" 2> /dev/null
  openssl ca -batch -notext -config config -extensions "$section" -in "$name.csr" -out "$name.crt" \
    -startdate 20200101000000Z -enddate 21200101000000Z "$@" 2> /dev/null
}
make ca authority -selfsign -keyfile ca.key
make other-ca authority -selfsign -keyfile other-ca.key
make server server -cert ca.crt -keyfile ca.key
make client client -cert ca.crt -keyfile ca.key
cp ca.crt "$here/ca.pem"
cp other-ca.crt "$here/other-ca.pem"
cat server.crt server.key > "$here/server.pem"
cat client.crt client.key > "$here/client.pem"
openssl pkcs8 -topk8 -in client.key -passout pass:geese -out locked.key
cat client.crt locked.key > "$here/locked.pem"
