"""The one tar header that SHARDS.md allows, and what is wrong with any other. No tarfile in it."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)

# USTAR: the fields of a header with the value that every member of a shard has.
_OWNER = b"0000644\x000000000\x000000000\0"  # mode, uid, gid
_MTIME = b"00000000000\0"
_BLANK = b" " * 8  # the checksum field, while the checksum is being summed
_AFTER = (b"0".ljust(101, b"\0") + b"ustar\x0000").ljust(BLOCK - 156, b"\0")  # type, magic
_CONSTANT_SUM = sum(_OWNER) + sum(_MTIME) + sum(_BLANK) + sum(_AFTER)
_FIELDS = (
    ("name", 0, 100),
    ("mode", 100, 108),
    ("uid", 108, 116),
    ("gid", 116, 124),
    ("size", 124, 136),
    ("mtime", 136, 148),
    ("type", 156, 157),
    ("link name", 157, 257),
    ("magic", 257, 265),
    ("user name", 265, 297),
    ("group name", 297, 329),
    ("device", 329, 345),
    ("name's prefix", 345, 500),
    ("last 12 bytes", 500, 512),
)


class HeaderCheck(NamedTuple):
    """The member's size in bytes, -1 when nothing after this header can be trusted; the faults."""

    size: int
    faults: list[str]


def make_header(name: bytes, size: int) -> bytes:
    """The header, 512 bytes, of a member of a shard."""
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(100, b"\0"), _OWNER, digits, _MTIME, checksum, _AFTER))


def read_header(found: bytes) -> tuple[str, int] | None:
    """The name and the size in bytes of the member that this header opens; None for any other."""
    name, size = found[:100].rstrip(b"\0"), _size(found)
    if not name.isascii() or size < 0 or found != make_header(name, size):
        return None
    return name.decode("ascii"), size


def check_header(found: bytes, name: bytes) -> HeaderCheck:
    """Compare the block where the header of member `name` should be with the only right one."""
    if len(found) < BLOCK:
        where = "inside the header of" if found else "before"
        return HeaderCheck(-1, [f"the file ends {where} {name.decode()}"])
    size = _size(found)
    if size >= 0 and found == make_header(name, size):
        return HeaderCheck(size, [])
    if not any(found):
        return HeaderCheck(-1, [f"the archive ends before {name.decode()}"])
    summed = sum(found[:148]) + sum(_BLANK) + sum(found[156:])
    if found[148:156] != b"%06o\0 " % summed:
        return HeaderCheck(
            -1, [f"header where {name.decode()} should be: its checksum does not fit"]
        )
    if size < 0:
        return HeaderCheck(-1, [f"header: size {found[124:136]!r} is not eleven octal digits"])
    faults = []
    right = make_header(name, size)
    for field, start, stop in _FIELDS:
        if found[start:stop] != right[start:stop]:
            faults.append(
                f"header: {field} expected {_shown(right[start:stop])}, "
                f"found {_shown(found[start:stop])}"
            )
            if field in ("name", "type", "magic"):  # another member, or not a plain file
                return HeaderCheck(-1, faults)
    return HeaderCheck(size, faults)


def _size(header: bytes) -> int:
    digits = header[124:135]
    return int(digits, 8) if digits.isdigit() and not digits.translate(None, b"01234567") else -1


def _shown(field: bytes) -> str:
    return repr(field.rstrip(b"\0").decode("ascii", "replace"))[:60]
