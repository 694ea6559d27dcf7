#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
torture 22: the installed units under a real systemd, in a container
pass: start, notify, watchdog kill and restart, socket activation, fd store across restart, reload, stop: all pass
quick: one boot, every case once
full: one boot, every case, 10 restarts and 10 kills
plants: UNIT_MUTANT=nowatchdog UNIT_MUTANT=nostore UNIT_MUTANT=noreload UNIT_MUTANT=filter UNIT_MUTANT=norestart

`make install` goes into an overlay of the host's root, its upper layer in memory; systemd-nspawn boots that. Inside, sysusers and
tmpfiles have made user and directories, and a target runs this file again, which drives systemctl and
clients of three users: one in group kvtier, one in kvtier-admin, one in neither. The
unit is the shipped one but for WatchdogSec=, which is shortened. SystemCallFilter= answers a denied call with EPERM, which
nobody would notice: so one case runs the same work with a drop-in that kills the daemon instead. UNIT_MUTANT changes the
installed unit.

Mounts and processes are in namespaces of their own and end with this process, however it ends.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
FULL = os.environ.get("KVT_TORTURE") == "full"
INSIDE = len(sys.argv) > 1
UNIT = "usr/lib/systemd/system/kvtierd.service"
WATCHDOG_S = 3

if INSIDE:
    sys.path.insert(0, "/kvt")
    from kvtier import ROWS_ALL, Client
    from lib.rows import LANES, Rows
    from lib.victims import leased, resume
    from lib.world import Skip, Tap, equal, expect, matches, until

MUTANTS = {
    "nowatchdog": lambda s: re.sub(r"^WatchdogSec=.*\n", "", s, flags=re.M),
    "nostore": lambda s: re.sub(r"^FileDescriptorStoreMax=.*$", "FileDescriptorStoreMax=0", s, flags=re.M),
    "noreload": lambda s: re.sub(r"^ExecReload=.*$", "ExecReload=/usr/bin/true", s, flags=re.M),
    "filter": lambda s: s.replace("[Install]", "SystemCallFilter=~io_uring_setup\n\n[Install]"),
    "norestart": lambda s: s.replace("Restart=on-failure", "Restart=no"),
}

TARGET = "[Unit]\nRequires=kvt-test.service\nAllowIsolate=yes\n"
SERVICE = f"""[Unit]
After=sysinit.target systemd-journald.service
Requires=sysinit.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
Environment=PYTHONPATH=/usr/share/kvtier/python KVT_TORTURE={"full" if FULL else "quick"}
ExecStart=/usr/bin/python3 /kvt/{HERE.name} inside
StandardOutput=file:/kvt/out
StandardError=file:/kvt/err
TimeoutStartSec={400 if FULL else 100}
"""


# ---- outside ------------------------------------------------------------------------------------

def why_not():
    if os.geteuid():
        return "needs root"
    for tool in ("systemd-nspawn", "unshare", "make", "useradd", "setpriv"):
        if not shutil.which(tool):
            return f"no {tool} here"
    with tempfile.TemporaryDirectory(prefix="kvt-try.") as d:
        probe = f"mount -t tmpfs none {d} && mkdir {d}/u {d}/w {d}/m && " \
                f"mount -t overlay ov -o lowerdir=/,upperdir={d}/u,workdir={d}/w {d}/m"
        r = subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, text=True)
    return f"no overlay mounts here: {r.stderr.strip()}" if r.returncode else ""


def build_dir():
    """A whole build: the trial build and others lack programs that are installed."""
    root = HERE.parents[2]
    given = Path(os.environ.get("KVT_BUILD", root / "build"))
    return given if (given / "kvtier-train").exists() else root / "build"


def place():
    """A directory that every host has, so that none is left behind: in this namespace something lies over it."""
    root = HERE.parents[2]
    for d in ("/media", "/mnt", "/srv", "/opt"):
        if os.path.isdir(d) and not os.path.ismount(d) and Path(d) not in root.parents:
            return Path(d)
    raise RuntimeError("no directory to mount on: /media, /mnt, /srv and /opt are in use")


def furnish(top):
    """The overlay at top/m, with everything installed."""
    root, m = HERE.parents[2], top / "m"
    for d in ("/run", str(top)):  # nspawn keeps things of its own in /run
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", d], check=True)
    for d in ("up", "work", "m"):
        (top / d).mkdir()
    subprocess.run(["mount", "-t", "overlay", "ov", "-o", f"lowerdir=/,upperdir={top}/up,workdir={top}/work", str(m)],
                   check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    r = subprocess.run(["make", "-s", "install", "NVCC=", f"BUILD={build_dir()}", f"DESTDIR={m}", "PREFIX=/usr",
                        "SYSCONFDIR=/etc"], cwd=root, env=env, capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError("make install: " + r.stderr[-1000:])
    text = (m / UNIT).read_text()
    text = re.sub(r"^WatchdogSec=.*$", f"WatchdogSec={WATCHDOG_S}s", text, flags=re.M)
    mutant = os.environ.get("UNIT_MUTANT", "")
    if mutant:
        text = MUTANTS[mutant](text)
    (m / UNIT).write_text(text)
    (m / "kvt").mkdir(mode=0o755)
    shutil.copy(HERE, m / "kvt" / HERE.name)
    shutil.copytree(root / "tests/integration/lib", m / "kvt/lib")
    (m / "kvt/out").touch()
    etc = m / "etc/systemd/system"
    (etc / "kvt.target").write_text(TARGET)
    (etc / "kvt-test.service").write_text(SERVICE)
    return m


def boot(m, seconds=460 if FULL else 130):
    """Boot, wait for the end, return what the inside said and the console."""
    env = dict(os.environ, SYSTEMD_SECCOMP="0")
    cmd = ["systemd-nspawn", "--register=no", "--keep-unit", "-D", str(m), "--capability=all", "--console=pipe",
           "--link-journal=no", "-b", "systemd.unit=kvt.target"]
    with open(m / "kvt/console", "wb") as console:
        p = subprocess.Popen(cmd, env=env, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        try:
            p.wait(seconds)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
    return [(m / "kvt" / f).read_text(errors="replace") if (m / "kvt" / f).exists() else ""
            for f in ("out", "console", "err")]


def outside():
    reason = why_not()
    if reason:
        print(f"ok 1 - the units under systemd # SKIP {reason}\n1..1")
        return 0
    if os.environ.get("KVT_NAMESPACED") != "1":
        # Whoever kills this process ends the namespace's first one, and with it everything in there.
        os.environ["KVT_NAMESPACED"] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation",
                              "private", sys.executable, str(HERE)])
    out, console, err = boot(furnish(place()))
    print(out, end="")
    if "\n1.." not in "\n" + out:
        print("not ok 99 - the container did not come to its end")
        for line in (console[-3000:] + "\n" + err[-2000:]).splitlines():
            print("# " + line)
        return 1
    return 1 if re.search(r"^not ok", out, re.M) else 0


# ---- inside -------------------------------------------------------------------------------------

CONF = Path("/etc/kvtier/kvtierd.conf")
SOCK = "/run/kvtier/kvtierd.sock"
DROPIN = Path("/run/systemd/system/kvtierd.service.d")


def configure(nvme, extra=""):
    CONF.write_text("[kvtierd]\nworkers = 2\n[dram]\nsize = 64M\nsegment = 4M\nhuge_pages = no\n[nvme]\n"
                    f"enabled = {'yes' if nvme else 'no'}\nsize = 64M\nsegment = 1M\nstaging = 4M\n"
                    f"[policy]\ndefault = random\nfallback = streaming\n{extra}")


def ctl(*args, check=True):
    r = subprocess.run(["systemctl", *args], capture_output=True, text=True)
    expect(not check or not r.returncode, f"systemctl {' '.join(args)}: {r.stderr.strip()}\n{journal(12)}")
    return r


def show(prop, unit="kvtierd.service"):
    return ctl("show", "-P", prop, unit).stdout.strip()


def journal(lines=40, **kw):
    cmd = ["journalctl", "-u", "kvtierd.service", "--no-pager", "-o", "cat", "-n", str(lines)]
    return subprocess.run(cmd, capture_output=True, text=True, **kw).stdout


def pid():
    return int(show("MainPID") or 0)


def active():
    return show("ActiveState") == "active" and show("SubState") == "running"


def as_user(user, *cmd, **kw):
    return subprocess.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *cmd], capture_output=True,
                          text=True, **kw)


def program(what, user, tag):
    """This file again, as a client of another user."""
    r = as_user(user, sys.executable, str(HERE), what, tag, timeout=30)
    expect(not r.returncode, f"client of {user}: {r.stdout} {r.stderr[-800:]}\n{journal(12)}")
    return r.stdout.split()


def client_work(tag):
    """Rows through every tier that there is, all of them back and compared."""
    c = Client(SOCK, name=tag, timeout_ms=20000)
    r = Rows(c, tag)
    r.append(400)
    for _ in range(3):
        r.plan(device=64, dram=100, nvme=ROWS_ALL)
        r.append(64)
    r.whole()
    print(r.rows)
    r.close()
    c.close()


def client_leave(tag):
    """Leased rows, most of them in DRAM when this process ends."""
    r = Rows(Client(SOCK, name=tag, timeout_ms=20000), tag, ttl_s=300, **leased(tag))
    r.append(400)
    r.plan(device=40, dram=ROWS_ALL)
    print(sum(len(r.seq.resident(lane)) for lane in range(LANES)), r.rows * LANES)


def client_find(tag):
    """How many rows come back; those that do are right."""
    r = resume(None, tag, Client(SOCK, name=tag, timeout_ms=20000), seconds=10)
    r.gens = [0] * r.seq.rows
    r.plan(device=ROWS_ALL, dram=0)
    print(r.check())
    r.close(drop=True)


def case_made():
    subprocess.run(["systemd-sysusers"], check=True)
    subprocess.run(["systemd-tmpfiles", "--create"], capture_output=True)
    for path, mode in (("/run/kvtier", 0o755), ("/var/lib/kvtier", 0o700)):
        st = os.stat(path)
        equal(st.st_mode & 0o777, mode, path)
        expect(st.st_uid and Path(path).owner() == "kvtier", f"{path}: {Path(path).owner()}")
    for user, group in (("kvt-run", "kvtier"), ("kvt-op", "kvtier-admin"), ("kvt-none", None)):
        subprocess.run(["useradd", "--system", "--user-group", "--no-create-home", *(["-G", group] if group else []), user],
                       check=True)


def case_activation():
    configure(nvme=True)
    ctl("start", "kvtierd.socket", "kvtierd-admin.socket")
    equal(show("ActiveState"), "inactive", "before the first client")
    equal(os.stat(SOCK).st_mode & 0o777, 0o660, SOCK)
    equal(Path("/run/kvtier/admin.sock").group(), "kvtier-admin", "admin.sock")
    program("work", "kvt-run", "first")
    expect(active(), "a client did not start the service")


def case_start():
    ctl("stop", "kvtierd.service")
    t = time.monotonic()
    ctl("start", "kvtierd.service")
    print(f"# from start to READY {time.monotonic() - t:.2f} s")
    expect(active(), "started, and not active")
    equal(show("Type"), "notify", "Type")
    until(lambda: show("StatusText"), lambda: re.match(r"clients \d+, sequences \d+", show("StatusText")), 5)
    status = Path(f"/proc/{pid()}/status").read_text()
    uids = re.search(r"^Uid:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", status, re.M).groups()
    expect("0" not in uids, f"it runs as {uids}")
    equal(set(re.findall(r"^Cap(?:Prm|Eff|Bnd|Amb):\s+(\w+)", status, re.M)), {"0" * 16}, "capabilities")
    matches(status, r"NoNewPrivs:\s+1", "no new privileges")
    matches(status, r"Seccomp:\s+2", "system call filter")


def case_users():
    rows = int(program("work", "kvt-run", "runner")[0])
    expect(rows > 400, f"{rows} rows")
    r = as_user("kvt-none", sys.executable, str(HERE), "work", "stranger", timeout=30)
    expect(r.returncode and "ermission" in r.stderr, f"a stranger got in: {r.stdout} {r.stderr[-300:]}")
    r = as_user("kvt-op", "kvtierctl", "status", "--json")
    equal(r.returncode, 0, "kvtierctl of an administrator: " + r.stderr)
    json.loads(r.stdout)
    for user in ("kvt-run", "kvt-none"):
        r = as_user(user, "kvtierctl", "freeze")
        expect(r.returncode, f"{user} froze the daemon")


def case_uring():
    fds = []
    for fd in Path(f"/proc/{pid()}/fd").iterdir():
        try:
            fds.append(os.readlink(fd))
        except OSError:
            pass
    status = as_user("kvt-op", "kvtierctl", "status").stdout
    expect(any("io_uring" in f for f in fds), f"no io_uring among its descriptors\n{status}\n{journal(10)}")
    expect("thread" not in journal(200) or "io_uring is refused" not in journal(200), journal(20))


def case_no_denied_call():
    """A call that the filter denies kills the daemon, here."""
    DROPIN.mkdir(parents=True, exist_ok=True)
    (DROPIN / "kill.conf").write_text("[Service]\nSystemCallErrorNumber=kill\n")
    ctl("daemon-reload")
    try:
        ctl("restart", "kvtierd.service")
        before = pid()
        program("work", "kvt-run", "strict")
        ctl("reload", "kvtierd.service")
        as_user("kvt-op", "kvtierctl", "verify")
        as_user("kvt-op", "kvtierctl", "ls")
        program("work", "kvt-run", "stricter")
        equal(pid(), before, "main process")
        ctl("stop", "kvtierd.service")
        equal(show("Result"), "success", "result of the stop")
        expect("SYS" not in journal(60), journal(20))
    finally:
        (DROPIN / "kill.conf").unlink()
        ctl("daemon-reload")
    ctl("start", "kvtierd.service")


def case_reload():
    before = pid()
    configure(nvme=True, extra="hysteresis = 7.0\n")
    ctl("reload", "kvtierd.service")
    matches(journal(10), "configuration reloaded from /etc/kvtier/kvtierd.conf", "journal")
    configure(nvme=True, extra="hysteresis = lots\n")
    r = ctl("reload", "kvtierd.service", check=False)
    expect(r.returncode, "a reload of nonsense succeeded")
    matches(journal(10), r"kvtierd.conf:\d+: .*hysteresis", "journal names file, line and key")
    expect(active(), "after a failed reload")
    equal(pid(), before, "main process")
    program("work", "kvt-run", "reloaded")
    configure(nvme=True)


def case_watchdog():
    before, restarts = pid(), int(show("NRestarts"))
    os.kill(before, signal.SIGSTOP)
    t = time.monotonic()
    until(lambda: f"{show('ActiveState')}/{show('SubState')} {journal(5)}", lambda: active() and pid() != before,
          WATCHDOG_S * 2 + 8)
    print(f"# stopped by SIGSTOP to serving again {time.monotonic() - t:.2f} s, WatchdogSec={WATCHDOG_S}")
    matches(journal(60), "Watchdog timeout", "journal")
    equal(int(show("NRestarts")), restarts + 1, "restarts")
    program("work", "kvt-run", "after-dog")


def survive(how, times):
    for i in range(times):
        tag = f"{how}{i}"
        device, total = map(int, program("leave", "kvt-run", tag))
        expect(total - device > total // 2, f"{device} of {total} rows on the device")
        until(lambda: show("NFileDescriptorStore"), lambda: int(show("NFileDescriptorStore")) > 0, 5)
        before = pid()
        if how == "restart":
            ctl("restart", "kvtierd.service")
        else:
            # Its client is gone, but what only the region held may still be on its way to DRAM: then more comes back.
            os.kill(before, signal.SIGKILL)
            until(lambda: show("SubState"), lambda: active() and pid() != before, 10)
        found = int(program("find", "kvt-run", tag)[0])
        expect(found >= total - device, f"{found} rows of {total} came back, {total - device} were in DRAM")
    print(f"# {times} times {how}: every row that was in DRAM came back ({total - device} of {total} each)")


def case_store():
    """DRAM alone: what comes back was in the fd store."""
    configure(nvme=False)
    ctl("restart", "kvtierd.service")
    survive("restart", 10 if FULL else 1)
    survive("kill", 10 if FULL else 1)


def case_bad_config():
    good = CONF.read_text()
    CONF.write_text(good + "\n[dram]\nsise = 1G\n")
    r = ctl("restart", "kvtierd.service", check=False)
    expect(r.returncode, "it started with a configuration that has an unknown key")
    equal(show("ExecMainStatus"), "2", "exit status")
    status = ctl("status", "kvtierd.service", check=False).stdout
    matches(status + journal(20), r"/etc/kvtier/kvtierd.conf:\d+: .*sise", "one line names file, line and key")
    CONF.write_text(good)
    until(lambda: show("SubState"), active, 8)  # no start limit: it comes by itself
    program("work", "kvt-run", "repaired")


def case_loader():
    """kvtierd-bpf.service: a user of its own, two capabilities, and the daemon has its maps."""
    if not os.path.exists("/usr/sbin/kvtierd-bpf"):
        raise Skip("kvtierd-bpf was not built")
    status = lambda: json.loads(subprocess.run(["kvtierctl", "--json", "status"], capture_output=True, text=True,  # noqa: E731
                                               check=True).stdout)["probes"]
    until(lambda: f"what is missing is said: {status()}",
          lambda: status()["why_off"].startswith("kvtierd-bpf: /run/kvtier-bpf/probes.sock: "), 5)
    ctl("start", "kvtierd-bpf.socket")
    equal(os.stat("/run/kvtier-bpf/probes.sock").st_mode & 0o777, 0o600, "its socket")
    until(lambda: f"the socket starts it: {status()}", lambda: status()["on"], 10)
    text = Path(f"/proc/{show('MainPID', 'kvtierd-bpf.service')}/status").read_text(encoding="ascii")
    expect(not re.search(r"^Uid:.*\b0\b", text, re.M), f"it is root: {text}")
    equal(int(re.search(r"^CapEff:\s+(\w+)", text, re.M).group(1), 16), 1 << 38 | 1 << 39, "CAP_PERFMON and CAP_BPF alone")
    off = {p["name"]: p["why_off"] for p in status()["programs"] if not p["on"]}
    print(f"# off in a container: {off}")
    equal(off.get("sched"), "kvtierd is not in the host's PID namespace", "why sched is off in a container")
    ctl("stop", "kvtierd-bpf.socket", "kvtierd-bpf.service")
    until("off", lambda: not status()["on"], 5)
    expect(active(), "the daemon went with it")


def case_stop():
    p = pid()
    ctl("stop", "kvtierd.service")
    equal(show("Result"), "success", "result")
    equal(show("ActiveState"), "inactive", "state")
    equal(show("NFileDescriptorStore"), "0", "descriptors left with systemd")
    expect(not Path(f"/proc/{p}").exists(), "the process is still there")
    expect(os.path.exists(SOCK), "the socket went with the service")
    ctl("stop", "kvtierd.socket", "kvtierd-admin.socket")
    expect(not os.path.exists(SOCK), "the socket stays behind")
    equal([f.name for f in Path("/dev/shm").iterdir() if "kvt" in f.name], [], "/dev/shm")
    expect("traceback" not in journal(200).lower() and "SYS" not in journal(200), journal(20))


def inside():
    tap = Tap()
    for name, fn in (("sysusers and tmpfiles", case_made), ("socket activation", case_activation),
                     ("start, notify, and what the process may", case_start), ("clients of other users, kvtierctl", case_users),
                     ("io_uring is in use", case_uring), ("reload, good and bad", case_reload),
                     ("no system call is denied", case_no_denied_call), ("watchdog kill and restart", case_watchdog),
                     ("fd store across restart and kill", case_store), ("a configuration that fails", case_bad_config),
                     ("the BPF loader's unit", case_loader), ("stop", case_stop)):
        tap.case(name, fn)
    print(f"# figure: {tap.n - tap.bad} of {tap.n} cases pass under systemd "
          f"{subprocess.run(['systemctl', '--version'], capture_output=True, text=True).stdout.split()[1]}")
    tap.done()


if __name__ == "__main__":
    if INSIDE and sys.argv[1] == "inside":
        inside()
    elif INSIDE:
        {"work": client_work, "leave": client_leave, "find": client_find}[sys.argv[1]](sys.argv[2])
    else:
        sys.exit(outside())
