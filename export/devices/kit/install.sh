#!/bin/sh
# Sets this machine up as a device: the agent, its keys, and its services where systemd runs. Run it as root.
# Variables: PREFIX and ROOT say where things go; PYTHON, a Python 3.9 or newer that has what requirements.txt names,
# saves a virtual environment; PORT is where the model answers, on this machine alone; NO_SERVICES=1 starts nothing.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-/opt/stillhouse-agent}
root=${ROOT:-/var/lib/stillhouse-agent}
port=${PORT:-8080}
python=${PYTHON:-}

mkdir -p "$prefix" "$root"
rm -rf "$prefix/stillhouse_agent"
cp -R "$here/stillhouse_agent" "$prefix/"
if [ -z "$python" ]; then
    python3 -m venv "$prefix/venv"
    python="$prefix/venv/bin/python"
    "$python" -m pip install --quiet --requirement "$here/requirements.txt"
fi
printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" -m stillhouse_agent --root "%s" "$@"\n' "$prefix" "$python" "$root" > "$prefix/agent"
chmod 755 "$prefix/agent"

if [ -e "$root/trust.json" ]; then
    echo "The device in $root is kept; the agent was renewed."
else
    set -- --config "$here/config.json" --trust "$here/trust.json"
    if [ -e "$here/root.json" ]; then set -- "$@" --repository-root "$here/root.json"; fi
    "$prefix/agent" init "$@"
fi

if [ -n "${NO_SERVICES:-}" ] || [ ! -d /run/systemd/system ]; then
    echo "No services were started. By hand: $prefix/agent serve --port $port, and $prefix/agent poll --every 60"
    exit 0
fi
id stillhouse-agent > /dev/null 2>&1 || useradd --system --home-dir "$root" --shell /bin/sh stillhouse-agent
chown -R stillhouse-agent: "$root"
for name in serve poll; do
    unit="stillhouse-agent-$name.service"
    [ -e "$here/$unit" ] || continue
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@ROOT@|$root|g" -e "s|@PORT@|$port|g" "$here/$unit" > "/etc/systemd/system/$unit"
    systemctl daemon-reload
    systemctl enable --now "$unit"
done
if [ -e "$here/authorized_keys" ]; then
    mkdir -p "$root/.ssh"
    sed -e "s|@PREFIX@|$prefix|g" "$here/authorized_keys" > "$root/.ssh/authorized_keys"
    chown -R stillhouse-agent: "$root/.ssh"
    chmod 700 "$root/.ssh"
    chmod 600 "$root/.ssh/authorized_keys"
fi
