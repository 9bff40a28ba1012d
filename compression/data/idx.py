"""IDX files (the format of MNIST), plain or gzipped."""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from compression.errors import DataError

_UNSIGNED_BYTE = 0x08


def idx_path(root: Path, stem: str) -> Path | None:
    """Return ``root/stem.gz`` or ``root/stem``, whichever exists, or None."""
    return next((path for path in (root / f"{stem}.gz", root / stem) if path.is_file()), None)


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Return the array of an IDX file of unsigned bytes with ``ndim`` dimensions.

    The header is a magic number (two zero bytes, type, rank) and one big-endian 32-bit size per dimension.

    Raises:
        DataError: unreadable or truncated file, another magic number, or more or fewer bytes than the header says.
    """
    way_out = "The file is damaged or of another kind: fetch it again."
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"File '{path}' cannot be read ({error}), expected a whole IDX file. {way_out}") from error
    header = 4 + 4 * ndim
    magic = (_UNSIGNED_BYTE << 8) | ndim
    found = int.from_bytes(raw[:4], "big")
    if len(raw) < header or found != magic:
        raise DataError(
            f"File '{path}' has {len(raw)} bytes and magic number {found}, expected {magic} "
            f"(unsigned bytes, {ndim} dimensions). {way_out}"
        )
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    if len(raw) - header != prod(shape):
        raise DataError(
            f"File '{path}' has {len(raw) - header} bytes of data, expected {prod(shape)} for the shape {list(shape)} "
            f"in its header. {way_out}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
