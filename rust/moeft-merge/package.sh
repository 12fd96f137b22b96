#!/usr/bin/env bash
# package.sh BINARY DIR: packs moeft-merge with its manual page and completion scripts into
# DIR/moeft-merge-VERSION-SYSTEM.tar.gz. The same binary gives the same bytes.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 BINARY DIR" >&2; exit 2; }
binary=$1 out=$2
version=$("$binary" --version | cut -d ' ' -f 2)
system=$(rustc -vV | sed -n 's/^host: //p')
name=moeft-merge-$version-$system
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

mkdir -p "$stage/$name/completions" "$out"
install -m 755 "$binary" "$stage/$name/moeft-merge"
strip -S "$stage/$name/moeft-merge"
install -m 644 "$(dirname "$0")/../../LICENSE" "$stage/$name/LICENSE"
"$binary" --man > "$stage/$name/moeft-merge.1"
for shell in bash elvish fish powershell zsh; do
    "$binary" --completions "$shell" > "$stage/$name/completions/moeft-merge.$shell"
done
tar --create --directory "$stage" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner "$name" |
    gzip --no-name > "$out/$name.tar.gz.partial"
mv "$out/$name.tar.gz.partial" "$out/$name.tar.gz"
echo "$out/$name.tar.gz"
