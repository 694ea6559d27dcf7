# SPDX-License-Identifier: MIT
"""What a hostile client may send, as tables: name, what is sent, what the answer must say."""
import os
import struct

from . import raw
from .raw import ADMIN, ALL, FETCH, HELLO, MODEL, PLAN_REQUEST, REGION, REGION_CLOSE, REGION_IMPORT, REPLY
from .raw import SEQ_CLOSE, SEQ_INFO, SEQ_OPEN, SEQ_TRUNCATE, U64, layout, message
from .world import E_INVAL, E_MODEL, E_NOENT, E_NOSPC, E_PERM, E_STALE

Q, QII = struct.Struct("<Q"), struct.Struct("<QII")
REGION_BODY = Q.pack(4096)


def admin(*argv, argc=None, nbytes=None, tail=b"\0"):
    text = b"\0".join(argv) + tail
    return struct.pack("<II", len(argv) if argc is None else argc, len(text) if nbytes is None else nbytes) + text


# Packets that end the connection: the daemon's log must name the reason.
MALFORMED = [
    ("a short packet", b"KVT1" + b"\0" * 4, (), r"message: 8 bytes, must be 16\.\.65536"),
    ("a packet of one byte", b"K", (), r"message: 1 bytes"),
    ("a packet over 64 KiB", message(REGION, bytes(70000)), (), r"cut short"),
    ("a wrong magic", message(REGION, REGION_BODY, magic=0x31545654), (), r"magic: 0x31545654, must be 0x3154564b"),
    ("length field too small", message(REGION, REGION_BODY, length=16), (), r"len: 16, the packet has 24 bytes"),
    ("length field too large", message(REGION, REGION_BODY, length=4096), (), r"len: 4096, the packet has 24"),
    ("length field 2^32-1", message(REGION, REGION_BODY, length=ALL), (), r"len: 4294967295, the packet"),
    ("type 0", message(0, b""), (), r"type: 0, not a known request"),
    ("type 16", message(16, REGION_BODY), (), r"type: 16, not a known"),
    ("a reply as request", message(REGION | REPLY, REGION_BODY), (), r"type: 32771, not a known"),
    ("type 65535", message(0xFFFF, b""), (), r"type: 65535"),
    ("region: a byte too many", message(REGION, REGION_BODY + b"\0"), (), r"region: 25 bytes, must be 24"),
    ("region: a byte missing", message(REGION, REGION_BODY[:-1]), (), r"region: 23 bytes"),
    ("hello: half of it", message(HELLO, raw.hello()[:40]), (), r"hello: 56 bytes, must be 104"),
    ("close: header only", message(SEQ_CLOSE, b""), (), r"seq-close: 16 bytes"),
    ("open: fixed part cut", message(SEQ_OPEN, raw.seq_open(region=1)[:100]), (), r"seq-open: 116 bytes, must be at le"),
    ("model: more layers than it has", message(MODEL, raw.model(n_layers=200)), (), r"n_layers: 200, does not fit"),
    ("open: more layers than it has", message(SEQ_OPEN, raw.seq_open(region=1, n_layers=255)), (), r"n_layers: 255"),
    ("open: a budget table that is not there",
     message(SEQ_OPEN, raw.seq_open(region=1, b=raw.budget(kind=1, table_n=2))), (), r"table_n: 2"),
    ("plan: a table that is not there", message(PLAN_REQUEST, Q.pack(1) + raw.budget(kind=2, table_n=1000)), (),
     r"budget.table_n: 1000, does not fit"),
    ("admin: argv_bytes lies", message(ADMIN, admin(b"status", nbytes=4000)), (), r"argv_bytes: 4000"),
    ("admin: argc lies", message(ADMIN, admin(b"status", argc=3)), (), r"argc: 3, the message holds 1"),
    ("admin: unterminated", message(ADMIN, admin(b"status", tail=b"")), (), r"argc: 1, the message holds 0"),
    ("admin: control bytes", message(ADMIN, admin(b"sta\x1btus")), (), r"argv: control byte 0x1b"),
    ("hello: unterminated name", message(HELLO, raw.hello(name=b"x" * 64)), (), r"name: not terminated within 64"),
    ("hello: escape sequences in the name", message(HELLO, raw.hello(name=b"\x1b[2J")), (), r"control byte 0x1b"),
    ("model: unterminated name", message(MODEL, raw.model(name=b"y" * 64)), (), r"name: not terminated"),
    ("budget: unterminated policy", message(PLAN_REQUEST, Q.pack(1) + raw.budget(policy=b"z" * 32)), (),
     r"policy: not terminated within 32"),
    ("reserved words", message(MODEL, raw.model(pad=1)), (), r"pad: 1, reserved"),
    ("a second hello", message(HELLO, raw.hello()), (), r"hello: the second one"),
    ("one descriptor", message(REGION, REGION_BODY), 1, r"with descriptors"),
    ("eight descriptors", message(REGION, REGION_BODY), 8, r"with descriptors"),
    ("two hundred descriptors", message(REGION, REGION_BODY), 200, r"with descriptors"),
    ("an import without a descriptor", message(REGION_IMPORT, REGION_BODY), (),
     r"region-import with descriptors: 0, must be 1"),
    ("an import with two descriptors", message(REGION_IMPORT, REGION_BODY), 2, r"region-import with descriptors: 2"),
    ("an import with a byte too many", message(REGION_IMPORT, REGION_BODY + b"\0"), 1, r"region-import: 25 bytes"),
    ("descriptors on a malformed packet", b"junk", 4, r"with descriptors"),
]

# Well-formed messages with impossible values: refused by field, value and limit; the client is served on.
def windowed(r, window=(0, 65536, 65536, 65536), flags=1, k_off=0, **kw):
    """A sequence whose rows the daemon never sees: a layout says nothing of where they are."""
    return raw.seq_open(region=r.region_handle, flags=flags, window=window,
                        layouts=[raw.LAYOUT.pack(k_off, 0, 0, 0, 0, 0, 0, 0, 256, 64)] * 2, **kw)


REFUSED = [
    ("a window without its flag", SEQ_OPEN, lambda r: windowed(r, flags=0), E_INVAL, r"^window\.out_bytes: 65536"),
    ("published memory without a window", SEQ_OPEN, lambda r: windowed(r, window=(0,) * 4, flags=2), E_INVAL,
     r"^flags: 2, DIRECT only with WINDOW"),
    ("flags of a later version", SEQ_OPEN, lambda r: windowed(r, flags=1 << 31), E_INVAL, r"^flags: 2147483648"),
    ("rings that lie over each other", SEQ_OPEN, lambda r: windowed(r, window=(0, 65536, 61440, 65536)), E_INVAL,
     r"^window\.in_off: 61440"),
    ("rings of 2^64 bytes", SEQ_OPEN, lambda r: windowed(r, window=(0, 65536, 65536, (1 << 64) - 4096)), E_INVAL,
     r"^window\.in_bytes"),
    ("a ring past the region", SEQ_OPEN, lambda r: windowed(r, window=(0, 65536, (1 << 20) - 4096, 65536)), E_INVAL,
     r"^window\.in_off: 1044480, its 65536 bytes end past"),
    ("a ring smaller than a page", SEQ_OPEN, lambda r: windowed(r, window=(0, 16384, 65536, 65536)), E_INVAL,
     r"^window\.out_bytes: 16384, must be at least 16512"),
    ("rows of a window", SEQ_OPEN, lambda r: windowed(r, k_off=4096), E_INVAL, r"^layout\[0\]\.k_off: 4096"),
    ("a scorer of nobody", SEQ_OPEN, lambda r: windowed(r, scorer=ALL), E_STALE, r"^scorer: 00000000ffffffff"),
    ("a fork with a window", SEQ_OPEN, lambda r: windowed(r, op=2, parent=r.s), E_INVAL, r"^op: fork"),
    ("an enum: op 3", SEQ_OPEN, lambda r: raw.seq_open(op=3, region=r.region_handle), E_INVAL, r"^op: 3"),
    ("an enum: lifetime 2", SEQ_OPEN, lambda r: raw.seq_open(lifetime=2, region=r.region_handle), E_INVAL, "^lifetime"),
    ("an enum: granularity", SEQ_OPEN, lambda r: raw.seq_open(granularity=ALL, region=r.region_handle), E_INVAL, "^gran"),
    ("an enum: budget kind", PLAN_REQUEST, lambda r: Q.pack(r.s) + raw.budget(kind=77), E_INVAL, r"budget.kind: 77"),
    ("an enum: dtype", MODEL, lambda r: raw.model(dtype=9), E_INVAL, r"^dtype: 9"),
    ("an enum: rope", MODEL, lambda r: raw.model(rope=9), E_INVAL, r"^rope: 9"),
    ("an enum: layer kind", MODEL, lambda r: raw.model(layers=[(9, 2, 64, 64, 0, 0)] * 2), E_INVAL, r"kind: 9"),
    ("no layers", MODEL, lambda r: raw.model(n_layers=0, layers=[]), E_INVAL, r"n_layers: 0, must be 1\.\.256"),
    ("2^32-1 layers", MODEL, lambda r: raw.model(n_layers=ALL), E_INVAL, r"n_layers: 4294967295"),
    ("more lanes than there may be", MODEL, lambda r: raw.model(n_layers=200, layers=[(0, 256, 64, 64, 0, 0)] * 200),
     E_INVAL, r"lanes \(layers x heads\): 51200"),
    ("rows of 4 GiB", MODEL, lambda r: raw.model(layers=[(0, 2, ALL, ALL, 0, 0)] * 2), E_INVAL, r"k_bytes: 4294967295"),
    ("a model named as a path", MODEL, lambda r: raw.model(name=b"../../etc/passwd"), E_INVAL, r"name: .*must be"),
    ("rope_theta not a number", MODEL, lambda r: raw.model(rope=1, theta=float("nan")), E_INVAL, r"rope_theta: -?nan"),
    ("a region of 2^64-1", REGION, lambda r: Q.pack(U64), E_INVAL, r"bytes: 18446744073709551615"),
    ("a region of 0", REGION, lambda r: Q.pack(0), E_INVAL, r"bytes: 0"),
    ("max_rows 2^32-1", SEQ_OPEN, lambda r: raw.seq_open(max_rows=ALL, region=r.region_handle), E_INVAL, "^max_rows"),
    ("a model never registered", SEQ_OPEN, lambda r: raw.seq_open(model=99, region=r.region_handle), E_STALE, "^model: 99"),
    ("a region never made", SEQ_OPEN, lambda r: raw.seq_open(region=0x700000123), E_STALE, r"^region: "),
    ("another number of layers", SEQ_OPEN, lambda r: raw.seq_open(region=r.region_handle, layouts=raw.plain()[:1]),
     E_MODEL, r"n_layers: 1, the model has 2"),
    ("plan tables larger than its memory", SEQ_OPEN, lambda r: raw.seq_open(max_rows=1 << 20, region=r.region_handle),
     E_NOSPC, r"plan_bytes: "),
    ("resume with no such key", SEQ_OPEN, lambda r: raw.seq_open(op=1, region=r.region_handle), E_NOENT, "^key: "),
    ("a fork of nothing", SEQ_OPEN, lambda r: raw.seq_open(op=2, parent=0x900000001, region=r.region_handle), E_STALE,
     r"^parent: "),
    ("a fork past the parent's end", SEQ_OPEN, lambda r: raw.seq_open(op=2, parent=r.s, prefix=900,
                                                                      region=r.region_handle), E_INVAL, r"^prefix: 900"),
    ("truncate past the end", SEQ_TRUNCATE, lambda r: QII.pack(r.s, 500, 0), E_INVAL, r"^rows: 500"),
    ("fetch past the end", FETCH, lambda r: QII.pack(r.s, 0, 100), E_INVAL, r"^pos: 0, n: 100"),
    ("fetch that wraps", FETCH, lambda r: QII.pack(r.s, 1 << 19, ALL), E_INVAL, r"^n: 4294967295"),
    ("an unknown policy", PLAN_REQUEST, lambda r: Q.pack(r.s) + raw.budget(policy=b"oracle"), E_INVAL, r'"oracle"'),
    ("a table for other lanes", PLAN_REQUEST, lambda r: Q.pack(r.s) + raw.budget(kind=2, table_n=3) + bytes(12), E_INVAL,
     r"table_n: 3, must be 4"),
    ("a stale sequence", SEQ_INFO, lambda r: Q.pack(r.s + (1 << 32)), E_STALE, r"^seq: "),
    ("a stale region", REGION_CLOSE, lambda r: Q.pack(r.region_handle + (1 << 32)), E_STALE, r"^handle: "),
    ("its sequence as a region", REGION_CLOSE, lambda r: Q.pack(r.s + 12345), E_STALE, r"^handle: "),
    ("an admin verb it may not use", ADMIN, lambda r: admin(b"drain"), E_PERM, r"."),
]


def bad_layouts():
    """Each one reaches outside a 1 MiB region or makes no sense; with the line that must say so."""
    mib, top = 1 << 20, 1 << 63
    fine = raw.plain()[1]
    return [(name, [bad, fine], pattern) for name, bad, pattern in (
        ("K past the region", layout(k_off=mib), r"layout\[0\].k_off: 1048576, its rows end at byte"),
        ("K at 2^64-64", layout(k_off=U64 - 63, v_off=0), r"layout\[0\].k_off: 18446744073709551552"),
        ("V at 2^63", layout(v_off=top), r"layout\[0\].v_off: 9223372036854775808"),
        ("head stride 2^63", layout(head=top, v_off=0), r"k_off: 0, its rows end"),
        ("head stride that wraps to the start", layout(k_off=mib, head=U64 - mib + 1, v_off=0), r"k_off: "),
        ("row stride 2^32-1", layout(row=ALL, head=64, v_off=0), r"k_off: 0, its rows end at byte"),
        ("row stride 0", layout(row=0, head=64, v_off=0), r"k_row_stride: 0, must be at least"),
        ("row stride below the row", layout(row=63, head=64), r"k_row_stride: 63"),
        ("head stride 0", layout(head=0, v_off=0), r"k_head_stride: 0, must be at least"),
        ("a million slots", layout(cap=1 << 20, head=64, v_off=0), r"k_off: 0, its rows end at"),
        ("stage slots past the end", layout(head=64, v_off=0, stage=1 << 20), r"k_off: 0"),
        ("cap 0", layout(cap=0), r"cap: 0"),
        ("cap 2^32-1", layout(cap=ALL, head=64, v_off=0), r"cap: 4294967295"),
        ("scores past the region", layout(score=mib - 64, score_head=1 << 13), r"score_off: 1048512"),
        ("scores at 2^64-4", layout(score=U64 - 3, score_head=1 << 13), r"score_off: 18446744073709551612"),
        ("scores misaligned", layout(score=81921, score_head=1 << 13), r"score_off: 81921, .*multiples of 4"),
    )]


def handles_of(d, name):
    """Handles of the sequences that clients of this name have open."""
    return [int(s["handle"], 16) for s in d.seqs() if name in s["client"]]


def garbage(n):
    return os.urandom(n)

