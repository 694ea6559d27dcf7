#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What needs a machine of its own: Debian's kernel under qemu, two memory nodes, an NVMe disk. One boot for all checks.

tests/qemu/init is the guest's first process; it runs every tests/qemu/guest_*.sh and prints TAP on the serial console.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvtier.daemon import build_dir

HERE = Path(__file__).resolve().parent.parent / "qemu"
PROGRAMS = ("kvtierd", "kvtierctl", "tests/integration/ctl_client")
OPTIONAL = ("kvtierd-bpf",)  # what not every host can build
BOOT_SECONDS = 90
TRIES = 2  # a boot hangs now and then without hardware virtualisation


def skip(why):
    print(f"1..0 # SKIP {why}")
    sys.exit(0)


def kernel():
    found = sorted((build_dir() / "unpacked/linux-image-cloud-amd64/boot").glob("vmlinuz-*"))
    return found[-1] if found else None


def libraries(program):
    """Files that the loader needs for it, the loader included."""
    out = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return {Path(p) for p in re.findall(r"(/\S+) \(0x", out)}


def initramfs(top):
    root = top / "root"
    for d in ("bin", "dev", "proc", "sys", "tmp", "run", "etc", "guest"):
        (root / d).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    shutil.copy(HERE / "init", root / "init")
    for script in HERE.glob("guest_*.sh"):
        shutil.copy(script, root / "guest")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    needed = set()
    for name in PROGRAMS + OPTIONAL:
        program = build_dir() / name
        if name in OPTIONAL and not program.exists():
            continue
        stripped = root / "bin" / program.name
        subprocess.run(["strip", "-o", str(stripped), str(program)], check=True)
        needed |= libraries(program)
    for lib in needed:
        # As the loader finds it without its cache: in the directories that it knows by itself.
        where = root / "lib64" if lib.name.startswith("ld-linux") else root / "lib/x86_64-linux-gnu"
        where.mkdir(parents=True, exist_ok=True)
        shutil.copy(lib, where / lib.name)
    names = "\n".join(sorted(str(p.relative_to(root)) for p in root.rglob("*")))
    with open(top / "initramfs", "wb") as f:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=f, check=True)
    return top / "initramfs"


def boot(image, initrd, disk):
    """What the guest printed, and whether it came to its end."""
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2",
            "-object", "memory-backend-ram,id=m0,size=512M", "-object", "memory-backend-ram,id=m1,size=512M",
            "-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1",
            "-drive", f"file={disk},if=none,id=d0,format=raw", "-device", "nvme,serial=kvt,drive=d0",
            "-nic", "none", "-nographic", "-no-reboot", "-kernel", str(image), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"]
    p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        out, _ = p.communicate(timeout=BOOT_SECONDS)
    except subprocess.TimeoutExpired:
        p.kill()
        out, _ = p.communicate()
    lines = out.decode(errors="replace").replace("\r", "").splitlines()
    return lines, any(re.match(r"1\.\.\d+$", x) for x in lines)


def main():
    for tool in ("qemu-system-x86_64", "busybox", "cpio", "ldd", "strip"):
        if not shutil.which(tool):
            skip(f"{tool} is not installed")
    image = kernel()
    if not image:
        skip("no Debian kernel is unpacked in build/unpacked (.ci/deps does)")
    with tempfile.TemporaryDirectory(prefix="kvt.") as t:
        top = Path(t)
        initrd = initramfs(top)
        for _ in range(TRIES):
            with open(top / "disk", "wb") as f:
                f.truncate(256 << 20)
            lines, ended = boot(image, initrd, top / "disk")
            if ended:
                break
            print(f"# a boot did not come to its end within {BOOT_SECONDS} s")
    results = [x for x in lines if re.match(r"(not )?ok \d|1\.\.\d+$|#", x)]
    print("\n".join(results if ended else lines[-40:]), flush=True)
    sys.exit(1 if not ended or any(x.startswith("not ok") for x in results) else 0)


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C")
    main()
