#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
The Debian packages: lintian has nothing to say; and under a real systemd, in a container over the host's root, they are
installed, work, are upgraded under a client that lives, removed and purged without a trace.

The container is that of the torture test of the units (tests/torture/t22_systemd.py). Inside, this file runs again and
drives dpkg and systemctl; the Python package that its clients use is the installed one.
"""
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[0 if len(sys.argv) > 1 else 2]
DEBS = ROOT / "build/deb"
NAMES = ("libkvtier0", "libkvtier-dev", "python3-kvtier", "kvtierd", "kvtierd-bpf", "kvtier-tools")
INSIDE = len(sys.argv) > 1
sys.path[:0] = ["/kvt"] if INSIDE else [str(HERE.parent), str(ROOT / "tests/torture")]

RUNTIME = """#include <kvtier.h>
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	struct kvtier *kvt = NULL;
	int r = kvtier_open(NULL, &kvt);

	printf("open %d, pid %d\\n", r, (int)getpid());
	kvtier_close(kvt);
	return r != 0;
}
"""
SERVICE = f"""[Unit]
After=sysinit.target systemd-journald.service
Requires=sysinit.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /kvt/{HERE.name} inside
StandardOutput=file:/kvt/out
StandardError=file:/kvt/err
TimeoutStartSec=250
"""


def sh(*cmd, check=True, **kw):
    r = subprocess.run(cmd, capture_output=True, text=True, **kw)
    if check and r.returncode:
        raise RuntimeError(f"{' '.join(map(str, cmd))}: exit {r.returncode}: {r.stdout[-600:]} {r.stderr[-1200:]}")
    return r


# ---- outside ------------------------------------------------------------------------------------

def packages():
    return {p.name.split("_")[0]: p for p in DEBS.glob("*.deb")}


def version(deb):
    return sh("dpkg-deb", "-f", deb, "Version").stdout.strip()


def next_version(deb, out):
    """The same package, a revision further."""
    old = version(deb)
    new = re.sub(r"\d+$", lambda m: str(int(m.group()) + 1), old)
    tree = out / "tree"
    sh("dpkg-deb", "-R", deb, tree)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(old, new))
    sh("dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, out)
    shutil.rmtree(tree)


def build():
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    t = time.monotonic()
    sh("make", "-s", "deb", "NVCC=", "BUILD=build", cwd=ROOT, env=env)
    print(f"# make deb: {time.monotonic() - t:.1f} s")
    if set(packages()) != set(NAMES):
        raise RuntimeError(f"built: {sorted(packages())}, must be {sorted(NAMES)}")


def case_lintian():
    from lib.world import Skip, equal
    if not shutil.which("lintian"):
        raise Skip("no lintian here")
    r = sh("lintian", *(["--allow-root"] if os.geteuid() == 0 else []), "--fail-on", "error,warning",
           "--tag-display-limit", "0", *packages().values(), check=False)
    equal((r.returncode, r.stdout), (0, ""), "lintian")


def case_contents():
    """What must run where only Debian is: no CUDA, no BLAS for the daemon, everything it links named."""
    from lib.world import expect, matches
    p = packages()
    depends = sh("dpkg-deb", "-f", p["kvtierd"], "Depends").stdout
    expect("cuda" not in depends and "blas" not in depends, depends)
    for lib in ("liburing2", "libnuma1", "libisal2", "libsystemd0", "libc6"):
        matches(depends, rf"\b{lib}\b", "kvtierd's Depends")
    matches(sh("dpkg-deb", "-f", p["kvtierd"], "Recommends").stdout, "kvtierd-bpf", "Recommends")
    conf = sh("dpkg-deb", "--info", p["kvtierd"], "conffiles").stdout
    matches(conf, "^/etc/kvtier/kvtierd.conf\n$", "conffiles")


def furnish(t22, top):
    """The overlay at top/m with the packages beside it, nothing of them installed."""
    m = top / "m"
    for d in ("/run", str(top)):
        sh("mount", "-t", "tmpfs", "-o", "mode=755", "none", d)
    for d in ("up", "work", "m"):
        (top / d).mkdir()
    sh("mount", "-t", "overlay", "ov", "-o", f"lowerdir=/,upperdir={top}/up,workdir={top}/work", m)
    (m / "kvt/old").mkdir(parents=True)
    (m / "kvt/new").mkdir()
    for deb in packages().values():
        shutil.copy(deb, m / "kvt/old")
        next_version(deb, m / "kvt/new")
    shutil.copy(HERE, m / "kvt" / HERE.name)
    shutil.copytree(HERE.parent / "lib", m / "kvt/lib")
    (m / "kvt/out").touch()
    (m / "usr/sbin/policy-rc.d").unlink(missing_ok=True)  # containers' hosts forbid dpkg to start anything
    (m / "var/lib/man-db/auto-update").unlink(missing_ok=True)  # else each dpkg reads every page of the host again
    etc = m / "etc/systemd/system"
    (etc / "kvt.target").write_text(t22.TARGET)
    (etc / "kvt-test.service").write_text(SERVICE)
    return m


def outside():
    namespaced = os.environ.get("KVT_NAMESPACED") == "1"
    if not namespaced:
        for tool in ("dpkg-buildpackage", "dh"):
            if not shutil.which(tool):
                print(f"ok 1 - Debian packages # SKIP no {tool} here\n1..1")
                return 0
        build()
    import t22_systemd as t22
    if namespaced:
        out, console, err = t22.boot(furnish(t22, t22.place()), 280)
        print(out, end="")
        if "\n1.." not in "\n" + out:
            print("not ok 99 - the container did not come to its end")
            for line in (console[-3000:] + "\n" + err[-2000:]).splitlines():
                print("# " + line)
            return 1
        return 1 if re.search(r"^not ok", out, re.M) else 0
    from lib.world import Tap
    tap = Tap()
    tap.case("what is in the packages, and what they need", case_contents)
    tap.case("lintian has nothing to say", case_lintian)
    reason = t22.why_not()
    if reason:
        print(f"ok {tap.n + 1} - installed, upgraded, purged # SKIP {reason}\n1..{tap.n + 1}")
        return 1 if tap.bad else 0
    sys.stdout.flush()
    env = dict(os.environ, KVT_NAMESPACED="1")
    # Whoever kills this process ends the namespace's first one, and with it everything in there.
    p = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
                        sys.executable, str(HERE)], env=env, stdout=subprocess.PIPE, text=True)
    text = re.sub(r"^(ok|not ok) (\d+)", lambda m: f"{m.group(1)} {int(m.group(2)) + tap.n}", p.stdout, flags=re.M)
    print(re.sub(r"^1\.\.(\d+)", lambda m: f"1..{int(m.group(1)) + tap.n}", text, flags=re.M), end="")
    return 1 if p.returncode or tap.bad else 0


# ---- inside -------------------------------------------------------------------------------------

SOCK = "/run/kvtier/kvtierd.sock"
CONF = Path("/etc/kvtier/kvtierd.conf")
STORE = Path("/var/lib/kvtier")
UNITS = ("kvtierd.service", "kvtierd.socket", "kvtierd-admin.socket")
before = {}


def dpkg(*args):
    return sh("dpkg", *args, env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"), timeout=60)


def show(prop, unit="kvtierd.service"):
    return sh("systemctl", "show", "-P", prop, unit).stdout.strip()


def journal():
    return sh("journalctl", "-u", "kvtierd.service", "--no-pager", "-o", "cat", "-n", "20").stdout


def as_runner(*cmd):
    return ["setpriv", "--reuid=kvt-run", "--regid=kvt-run", "--init-groups", *cmd]


def traces():
    """Everything on this host that could be of the packages: files, users, groups, units."""
    found = set()
    for top in ("/etc", "/lib/systemd", "/usr/bin", "/usr/sbin", "/usr/lib/systemd", "/usr/lib/sysusers.d",
                "/usr/lib/tmpfiles.d", "/usr/lib/python3", "/usr/lib/x86_64-linux-gnu", "/usr/include", "/usr/share/kvtier",
                "/usr/share/doc", "/usr/share/man", "/usr/share/bash-completion", "/usr/share/zsh", "/usr/share/fish",
                "/var/lib/kvtier", "/var/lib/systemd", "/run"):
        found |= {os.path.join(d, n) for d, dirs, files in os.walk(top) for n in dirs + files if "kvtier" in n}
        if top.endswith("kvtier") and os.path.exists(top):
            found.add(top)
    found -= {p for p in found if "/journal/" in p or p.startswith("/run/systemd/units/")}
    for db in ("passwd", "group"):
        found |= {f"{db}:{line.split(':')[0]}" for line in sh("getent", db).stdout.splitlines() if line.startswith("kvtier")}
    return found | {f"unit:{u}" for u in re.findall(r"^kvtier\S+", sh("systemctl", "list-unit-files", "--no-legend").stdout,
                                                  re.M)}


def client_hold(tag):
    """A leased sequence, most of its rows in DRAM. When the daemon is another one, all of those come back."""
    from kvtier import ROWS_ALL, Client
    from lib.rows import LANES, Rows
    from lib.victims import leased, resume
    r = Rows(Client(SOCK, name=tag, timeout_ms=20000), tag, ttl_s=300, **leased(tag))
    r.append(400)
    r.plan(device=40, dram=ROWS_ALL)
    lower = r.rows * LANES - sum(len(r.seq.resident(lane)) for lane in range(LANES))
    print("ready", flush=True)
    sys.stdin.readline()
    r = resume(None, tag, Client(SOCK, name=tag, timeout_ms=20000), seconds=15)
    r.gens = [0] * r.seq.rows
    r.plan(device=ROWS_ALL, dram=0, nvme=0)
    print(lower, r.check(), 400 * LANES, flush=True)
    r.close(drop=True)


def client_work(tag):
    from kvtier import ROWS_ALL, Client
    from lib.rows import Rows
    r = Rows(Client(SOCK, name=tag, timeout_ms=20000), tag)
    r.append(400)
    r.plan(device=64, dram=200, nvme=ROWS_ALL)
    r.append(64)
    r.plan(device=ROWS_ALL, dram=0, nvme=0)
    print(r.rows, flush=True)


def case_install():
    before["traces"] = traces()
    dpkg("-i", *map(str, Path("/kvt/old").glob("*.deb")))
    for u in UNITS:
        assert (show("ActiveState", u), show("UnitFileState", u)) == ("active", "enabled"), \
            f"{u}: {show('ActiveState', u)}, {show('UnitFileState', u)}\n{journal()}"
    assert show("UnitFileState", "kvtierd-metrics.socket") == "disabled", "the metrics' socket is the operator's choice"
    assert show("UnitFileState", "kvtierd-bpf.socket") == "enabled", "kvtierd-bpf.socket"
    assert STORE.owner() == "kvtier" and STORE.stat().st_mode & 0o777 == 0o700, STORE.owner()
    assert "device" in sh("kvtierctl", "status").stdout
    # What comes with the development package is enough for a runtime.
    Path("/kvt/x.c").write_text(RUNTIME)
    flags = sh("pkg-config", "--cflags", "--libs", "libkvtier").stdout.split()
    sh("gcc", "-o", "/kvt/x", "/kvt/x.c", *flags)
    assert re.fullmatch(r"open 0, pid \d+\n", sh("/kvt/x").stdout), "what a runtime built against the package says"
    assert sh("/usr/bin/python3", "-c", "import kvtier; print(kvtier.__file__)", cwd="/").stdout == \
        "/usr/lib/python3/dist-packages/kvtier/__init__.py\n", "the Python package"
    for page in ("1/kvtierctl.1", "5/kvtierd.conf.5", "8/kvtierd.8"):
        assert Path(f"/usr/share/man/man{page}.gz").exists(), page


def case_work():
    text = CONF.read_text().replace("#size = 4G", "size = 64M").replace("#segment = 256M", "segment = 4M")
    CONF.write_text(text.replace("#huge_pages = yes", "huge_pages = no"))
    before["conf"] = CONF.read_text()
    sh("systemctl", "restart", "kvtierd.service")
    sh("useradd", "--system", "--user-group", "--no-create-home", "-G", "kvtier", "kvt-run")
    assert int(sh(*as_runner("/usr/bin/python3", str(HERE), "work", "first"), timeout=30).stdout) == 464


def case_upgrade():
    p = subprocess.Popen(as_runner("/usr/bin/python3", str(HERE), "hold", "kept"), stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ready\n", journal()
    old, socket = show("MainPID"), show("ActiveEnterTimestampMonotonic", "kvtierd.socket")
    t = time.monotonic()
    dpkg("-i", *map(str, Path("/kvt/new").glob("*.deb")))
    print(f"# dpkg -i of the next version: {time.monotonic() - t:.1f} s")
    assert show("ActiveState") == "active" and show("MainPID") != old, f"not restarted\n{journal()}"
    assert show("ActiveEnterTimestampMonotonic", "kvtierd.socket") == socket, "the socket was away meanwhile"
    assert CONF.read_text() == before["conf"], "the edited configuration"
    out, _ = p.communicate("go\n", timeout=40)
    lower, found, total = map(int, out.split())
    assert lower > total // 2 and found >= lower, f"{found} rows came back of {lower} in DRAM\n{journal()}"
    print(f"# across the upgrade: {found} of {total} rows came back, {lower} had been in DRAM alone")


def case_remove():
    CONF.write_text(CONF.read_text().replace("#enabled = no", "enabled = yes").replace("#size = 16G", "size = 64M")
                    .replace("#segment = 64M", "segment = 1M").replace("#staging = 32M", "staging = 4M"))
    sh("systemctl", "stop", "kvtierd.service")
    sh("systemctl", "start", "kvtierd-metrics.socket", "kvtierd.service")
    sh(*as_runner("/usr/bin/python3", str(HERE), "work", "last"), timeout=30)
    stores = sorted(STORE.iterdir())
    assert stores, "no store of the NVMe tier"
    pid = show("MainPID")
    dpkg("-r", *NAMES)
    assert not Path(f"/proc/{pid}").exists(), "the daemon goes on"
    assert CONF.exists() and sorted(STORE.iterdir()) == stores, "configuration and stores stay until purge"
    assert not Path(SOCK).exists() and not Path("/usr/sbin/kvtierd").exists(), "remove left programs or sockets"


def case_purge():
    sh("userdel", "kvt-run")
    dpkg("-P", *NAMES)
    left = traces() - before["traces"]
    assert not left, f"left behind: {sorted(left)}"


def inside():
    """Not lib.world's Tap: that needs the Python package, which is not there yet and not there at the end."""
    cases = (("dpkg -i: enabled, running, and enough to build against", case_install),
             ("a client demotes rows and has them back", case_work),
             ("an upgrade under a client that lives", case_upgrade),
             ("remove keeps configuration and stores", case_remove), ("purge leaves nothing", case_purge))
    for i, (name, fn) in enumerate(cases, 1):
        try:
            t = time.monotonic()
            fn()
            print(f"ok {i} - {name}\n# {time.monotonic() - t:.1f} s", flush=True)
        except Exception:  # noqa: BLE001: whatever it is, the next case runs
            print(f"not ok {i} - {name}", flush=True)
            for line in traceback.format_exc().splitlines()[-14:]:
                print(f"#   {line}", flush=True)
    print(f"1..{len(cases)}", flush=True)


if __name__ == "__main__":
    if INSIDE and sys.argv[1] == "inside":
        inside()
    elif INSIDE:
        {"work": client_work, "hold": client_hold}[sys.argv[1]](sys.argv[2])
    else:
        sys.exit(outside())
