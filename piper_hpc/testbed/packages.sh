#!/bin/sh
# Install what `python -m piper_hpc.testbed up` needs, on Debian or Ubuntu, as root. May be repeated: it does
# nothing when everything is there. Services of the packages are not started, neither now nor at the next boot.
# Exit codes: 0 all present, 3 something is missing and cannot be installed from here, else apt's own.
set -eu

PACKAGES="slurm-wlm slurmdbd munge mariadb-server iproute2"
SERVICES="slurmctld slurmd slurmdbd munge mariadb"

missing=""
for package in $PACKAGES; do
    # `dpkg-query` exists on Debian alone; elsewhere every package counts as missing, and we say so below.
    state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$state" = "install ok installed" ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "testbed packages: all present ($PACKAGES)"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "testbed packages: missing$missing; they are installed by root on Debian or Ubuntu:" >&2
    echo "  apt-get update && apt-get install --no-install-recommends$missing" >&2
    exit 3
fi

# policy-rc.d is Debian's switch against service starts by maintainer scripts. One that is there already is the
# administrator's: it is put back as it was.
policy=/usr/sbin/policy-rc.d
saved=""
if [ -e "$policy" ]; then
    saved=$(mktemp)
    cp -p "$policy" "$saved"
fi
restore() {
    rm -f "$policy"
    [ -z "$saved" ] || mv "$saved" "$policy"
}
trap restore EXIT
trap 'exit 130' INT TERM
rm -f "$policy"
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

before=""
for service in $SERVICES; do
    [ ! -e "/lib/systemd/system/$service.service" ] || before="$before $service "
done

export DEBIAN_FRONTEND=noninteractive
known() { apt-get install --simulate --no-install-recommends $missing >/dev/null 2>&1; }
install() { apt-get -o DPkg::Lock::Timeout=300 install -q -y --no-install-recommends $missing >&2; }
{ known && install; } || { apt-get -q update >&2 && install; }

# Units that just came stay off at boot; those that were here before are left as they were.
if command -v systemctl >/dev/null 2>&1; then
    for service in $SERVICES; do
        case "$before" in
            *" $service "*) ;;
            *) systemctl disable "$service" >/dev/null 2>&1 || true ;;
        esac
    done
fi
echo "testbed packages: installed$missing"
