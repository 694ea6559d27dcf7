#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write measured sensitivities of the lanes into the calibration table of a .kvp file (policy/calibrate.h).

    sensitivity.py IN.kvp build/loop/prepare/sensitivity-knock.pt OUT.kvp

loop.py prepare measures them: what the model's output loses (KL) per unit of attention that a lane loses.
"""
import hashlib
import os
import struct
import sys

import numpy as np

MAGIC, CALIB_MAGIC, DIGEST, DIGESTED, CALIB = b"KVTIERWT", 4407628.0, 24, 56, 200


def patched(image, values):
    """The file's bytes with sensitivity values [lanes], scaled to mean 1, and a new digest."""
    image = bytearray(image)
    if image[:8] != MAGIC:
        raise ValueError("not a .kvp file")
    at, size = struct.unpack_from("<QQ", image, CALIB)
    if not size:
        raise ValueError("the file has no calibration section: calibrate first")
    table = np.frombuffer(image, "<f4", size // 4, at)
    magic, _, lanes, knots, lengths, distances = table[:6]
    if magic != CALIB_MAGIC or lanes != len(values):
        raise ValueError(f"calibration: {lanes:g} lanes of magic {magic:.0f}, sensitivities of {len(values)} lanes")
    head, stride = int(6 + lengths - 1 + distances - 1), int(1 + lengths * distances * 2 * knots)
    if head + len(values) * stride != len(table):
        raise ValueError(f"calibration: {len(table)} values, its shape needs {head + len(values) * stride}")
    table = table.copy()
    table[head::stride] = np.asarray(values, np.float64) / np.mean(values)
    image[at:at + size] = table.tobytes()
    image[DIGEST:DIGESTED] = hashlib.sha256(image[DIGESTED:]).digest()
    return bytes(image)


def main():
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    import torch
    source, values, target = sys.argv[1:]
    with open(source, "rb") as f:
        image = patched(f.read(), torch.load(values).flatten().tolist())
    with open(target + ".tmp", "wb") as f:
        f.write(image)
    os.replace(target + ".tmp", target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
