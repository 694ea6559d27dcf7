#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
torture 23: what the unit leaves open, by systemd-analyze security
pass: exposure at most 1.1, no root, no CAP_SYS_ADMIN; kvtierd-bpf.service at most 1.5, CAP_BPF and CAP_PERFMON alone
quick: the units as they ship
full: the same
plants: UNIT_MUTANT=root UNIT_MUTANT=sysadmin UNIT_MUTANT=plus UNIT_MUTANT=open UNIT_MUTANT=suid UNIT_MUTANT=loader

That the unit still works like this is t22_systemd.py's matter.

systemd-analyze judges a copy of the unit. A key that it does not know, or anything else that `verify` has to say, fails too: a
misspelt restriction restricts nothing. UNIT_MUTANT changes the copy.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("KVT_BUILD", ROOT / "build"))
LIMIT, LOADER_LIMIT = 1.1, 1.5

# What a hand that slips may do to the unit.
MUTANTS = {
    "root": lambda s: re.sub(r"^(User|Group)=.*\n", "", s, flags=re.M),
    "sysadmin": lambda s: s.replace("CapabilityBoundingSet=\n", "CapabilityBoundingSet=CAP_SYS_ADMIN\n"),
    "plus": lambda s: s.replace("ExecStart=", "ExecStart=+"),
    "open": lambda s: re.sub(r"^(SystemCallFilter|Protect\w+|Private\w+)=.*\n", "", s, flags=re.M),
    "suid": lambda s: s.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"),
    "loader": lambda s: s.replace("=CAP_BPF CAP_PERFMON\n", "=CAP_SYS_ADMIN\n"),
}


def unit_text(name="kvtierd.service"):
    text = (ROOT / "systemd" / name).read_text()
    mutant = os.environ.get("UNIT_MUTANT", "")
    if not mutant or (mutant == "loader") != (name == "kvtierd-bpf.service"):
        return text
    changed = MUTANTS[mutant](text)
    assert changed != text, f"UNIT_MUTANT={mutant} changes nothing"
    return changed


def settings(text, key):
    return re.findall(rf"^{key}=(.*)$", text, re.M)


def check_loader(check, unit, env):
    """kvtierd-bpf.service, alike; returns its exposure."""
    r = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], env=env, capture_output=True, text=True)
    check("kvtierd-bpf: every key is known", r.returncode == 0 and not r.stderr, r.stderr)
    r = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--no-pager", unit], env=env, capture_output=True,
                       text=True)
    level = re.search(r"exposure level for \S+: ([\d.]+)", r.stdout)
    exposure = float(level.group(1)) if level else 99.0
    check(f"kvtierd-bpf: exposure {exposure} is at most {LOADER_LIMIT}", exposure <= LOADER_LIMIT, r.stdout[-300:])
    text = Path(unit).read_text()
    check("kvtierd-bpf: two capabilities, a user that exists only meanwhile",
          settings(text, "CapabilityBoundingSet") == settings(text, "AmbientCapabilities") == ["CAP_BPF CAP_PERFMON"] and
          settings(text, "DynamicUser") == ["yes"] and settings(text, "NoNewPrivileges") == ["yes"])
    return exposure


def main():
    if not shutil.which("systemd-analyze"):
        print("ok 1 - exposure # SKIP no systemd-analyze here\n1..1")
        return 0
    text, results = unit_text(), []

    def check(name, good, why=""):
        results.append(good)
        print(f"{'ok' if good else 'not ok'} {len(results)} - {name}")
        if not good and why:
            print("# " + why.strip().replace("\n", "\n# "))

    with tempfile.TemporaryDirectory(prefix="kvt-unit.") as d:
        # The programs that the units name are installed ones; only their being there is of interest.
        for u in (ROOT / "systemd").glob("kvtierd*"):
            if u.suffix in (".service", ".socket"):
                body = unit_text(u.name) if u.suffix == ".service" else u.read_text()
                body = re.sub(r"/usr/sbin/kvtierd\S*", str(BUILD / "kvtierd"), body)
                Path(d, u.name).write_text(body.replace("/usr/bin/kvtierctl", str(BUILD / "kvtierctl")))
        unit = str(Path(d, "kvtierd.service"))
        env = dict(os.environ, SYSTEMD_UNIT_PATH=f"{d}:")
        r = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], env=env, capture_output=True, text=True)
        check("every key is known", r.returncode == 0 and not r.stderr, r.stderr)
        r = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={round(LIMIT * 10)}",
                            unit], env=env, capture_output=True, text=True)
        level = re.search(r"exposure level for \S+: ([\d.]+)", r.stdout)
        exposure = float(level.group(1)) if level else 99.0
        check(f"exposure {exposure} is at most {LIMIT}", r.returncode == 0 and exposure <= LIMIT, r.stdout[-300:])
        r = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--json=short", unit], env=env,
                           capture_output=True, text=True)
        tests = json.loads(r.stdout or "[]")
        broad = [t["name"] for t in tests if t.get("name", "").startswith(("CapabilityBoundingSet", "AmbientCap")) and
                 not t["set"]]
        check("no capability at all", len(tests) > 50 and not broad, ", ".join(broad))
        loader = check_loader(check, str(Path(d, "kvtierd-bpf.service")), env)
    check("no root: a user of its own, and no new privileges",
          settings(text, "User") == ["kvtier"] and settings(text, "Group") == ["kvtier"] and
          settings(text, "NoNewPrivileges") == ["yes"] and not settings(text, "SupplementaryGroups"))
    lines = re.findall(r"^Exec\w+=(.*)$", text, re.M)
    check("no command runs with more than the unit allows", lines and all(x.startswith("/") for x in lines), str(lines))
    print(f"1..{len(results)}\n# figure: exposure {exposure}, with the BPF loader's unit {loader} (systemd {version()}), user kvtier, no capability")
    return 0 if all(results) else 1


def version():
    return subprocess.run(["systemctl", "--version"], capture_output=True, text=True).stdout.split()[1]


if __name__ == "__main__":
    sys.exit(main())
