"""Photographs in a column of Parquet files, as Hugging Face datasets keep them.

The column is a struct with the fields `bytes` and `path`, or plain binary.  A file's key is its `path` where every row
has another one, so that the same photographs have the same keys as in a folder; else the shard's name and the row's
number.  Parquet has no way to a single value: its whole row group is read and unpacked to get it.  The groups used last
are kept, KEPT_BYTES of them.  So reading in the order of the rows costs each group once, and reading in no order one
group a photograph: what trains without a cache of decoded images is better packed first (launch/prepare.py pack).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import DataError
from pipeline.sources import DamagedMember, Listed, member_key, one_line, shown

KEPT_BYTES = 256 << 20
"""Unpacked row groups that a process keeps; one is kept even where it is larger."""
MAX_GROUP_BYTES = 1 << 30
"""A row group whose photographs take more is refused: it would have to be in memory as a whole."""
SNIFFED_ROWS = 64
"""Rows that are looked at for the ending of the keys, where the file has no paths."""
USUAL_NAMES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo")
"""Where several columns could be the photographs, one of these is meant."""
ENDINGS = ((0, b"\xff\xd8", ".jpg"), (0, b"\x89PNG", ".png"), (8, b"WEBP", ".webp"), (0, b"GIF8", ".gif"))
"""Offset, first bytes, ending."""


def image_ending(first_bytes: bytes) -> str:
    """The ending of a file that begins so; .jpg for all that is not known."""
    return next((ending for at, magic, ending in ENDINGS if first_bytes.startswith(magic, at)), ".jpg")


class Group(NamedTuple):
    """A row group of one shard."""

    shard: int
    number: int
    """Within its shard."""
    first: int
    """Row of the shard that it begins with."""
    rows: int


class ParquetSource(Listed):
    """Parquet files with one column of photographs, all with the same name.  Thread-safe.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file is not Parquet, is cut short, has no such column or several, or too large row groups.
    """

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        self.path = path
        self._arrow, self._parquet = _pyarrow(path)
        self._shards = list(shards)
        self._stats = [_size_and_time(shard) for shard in self._shards]
        self._metadata = [self._open(shard).metadata for shard in self._shards]
        schemas = [metadata.schema.to_arrow_schema() for metadata in self._metadata]
        self._column = _image_column(self._arrow, self._shards[0], schemas[0])
        for shard, schema in zip(self._shards, schemas, strict=True):
            if self._column.name not in schema.names or _leaf(self._arrow, schema.field(self._column.name)) is None:
                raise DataError(
                    f"{shown(shard)}: has no image column {shown(self._column.name)}, unlike {self._shards[0].name}"
                )
        self._groups = [group for number in range(len(self._shards)) for group in self._groups_of(number)]
        self._firsts = np.cumsum([0, *(group.rows for group in self._groups)])
        """Row of the whole set with which each group begins, and the number of all rows."""
        if not self._firsts[-1]:
            raise DataError(f"{shown(path)}: has no rows")
        self._sizes = np.full(int(self._firsts[-1]), -1, np.int64)
        """Bytes of each row's photograph; -1 until its group has been unpacked."""
        keys = self._paths() or self._numbered()
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._keys = [keys[row] for row in order]
        self._rows = np.array(order, np.int64)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._gates: dict[int, threading.Lock] = {}

    def size(self, item: int) -> int:
        """Bytes of the photograph, 0 where it cannot be had; costs unpacking its row group, once."""
        row = int(self._rows[item])
        if self._sizes[row] < 0:
            self._column_of(self._group_of(row))
        return int(self._sizes[row])

    def read(self, item: int) -> np.ndarray:
        row = int(self._rows[item])
        number = self._group_of(row)
        column = self._column_of(number)
        if isinstance(column, str):
            raise DamagedMember(self._shards[self._groups[number].shard], self._keys[item], column)
        # A copy: a view would keep its whole row group in memory.
        content = column[row - int(self._firsts[number])].as_py()
        if content is None:
            raise DamagedMember(
                self._shards[self._groups[number].shard], self._keys[item], "has no bytes in its row (null)"
            )
        return np.frombuffer(content, np.uint8)

    def stamp(self) -> str:
        listing = [(shard.name, *stat) for shard, stat in zip(self._shards, self._stats, strict=True)]
        return hashlib.sha256(ascii((listing, self._column.name)).encode()).hexdigest()

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, "right")) - 1

    def _column_of(self, number: int) -> Any:
        """The photographs of a row group as an Arrow array of binary values, or why they cannot be unpacked.

        Threads that want the same group wait for the one that unpacks it.
        """
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            gate = self._gates.setdefault(number, threading.Lock())
        with gate:
            with self._lock:
                if number in self._kept:
                    return self._kept[number]
            column = self._unpack(self._groups[number])
            first, last = self._firsts[number : number + 2]
            self._sizes[first:last] = 0 if isinstance(column, str) else _lengths(self._arrow, column)
            with self._lock:
                self._kept[number] = column
                self._gates.pop(number, None)
                held = sum(_num_bytes(kept) for kept in self._kept.values())
                while held > KEPT_BYTES and len(self._kept) > 1:
                    held -= _num_bytes(self._kept.popitem(last=False)[1])
        return column

    def _unpack(self, group: Group) -> Any:
        shard = self._shards[group.shard]
        if _size_and_time(shard) != self._stats[group.shard]:
            raise DataError(f"{shown(shard)}: has changed since it was opened")
        arrow = self._arrow
        try:
            file = self._open(shard, self._metadata[group.shard])
            table = file.read_row_group(group.number, columns=[self._column.leaf], use_threads=False)
        except (arrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise DataError(f"{shown(shard)}: cannot be read ({error.strerror})") from error
            return f"lies in row group {group.number}, which does not unpack ({one_line(error)})"
        column = table.column(0)
        return arrow.compute.struct_field(column, "bytes") if self._column.name != self._column.leaf else column

    def _groups_of(self, shard: int) -> Iterator[Group]:
        metadata, first = self._metadata[shard], 0
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        if self._column.leaf not in leaves:
            raise DataError(f"{shown(self._shards[shard])}: keeps no values of {shown(self._column.leaf)}")
        leaf = leaves.index(self._column.leaf)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            num_bytes = group.column(leaf).total_uncompressed_size
            if group.num_rows < 0 or num_bytes < 0:
                raise DataError(f"{shown(self._shards[shard])}: is damaged: row group {number} has a negative size")
            if num_bytes > MAX_GROUP_BYTES:
                raise DataError(
                    f"{shown(self._shards[shard])}: row group {number} holds {num_bytes} bytes of photographs,"
                    f" more than {MAX_GROUP_BYTES}; write the file with smaller ones (pyarrow: row_group_size=1000)"
                )
            yield Group(shard, number, first, group.num_rows)
            first += group.num_rows

    def _paths(self) -> list[str] | None:
        """The `path` of every row as a key; None unless all have one, all different and all fit to be one."""
        if self._column.path_leaf is None:
            return None
        keys: list[str] = []
        try:
            for shard, metadata in zip(self._shards, self._metadata, strict=True):
                table = self._open(shard, metadata).read(columns=[self._column.path_leaf], use_threads=False)
                for path in chain.from_iterable(chunk.field("path").to_pylist() for chunk in table.column(0).chunks):
                    key = member_key(path, shard) if path else None
                    if key is None:
                        return None
                    keys.append(key)
        except (self._arrow.ArrowException, OSError, DataError, UnicodeDecodeError):
            return None  # paths of another machine, or no readable ones: the rows have numbers
        return keys if len(set(keys)) == len(keys) else None

    def _numbered(self) -> list[str]:
        """Shard and row as a key, with an ending that says what the first photographs are."""
        ending = image_ending(self._first_bytes())
        base = Path(os.path.commonpath([shard.parent for shard in self._shards]))
        names = [shard.relative_to(base).as_posix() for shard in self._shards]
        digits = max(6, *(len(str(metadata.num_rows)) for metadata in self._metadata))
        return [
            f"{names[group.shard]}/{row:0{digits}d}{ending}"
            for group in self._groups
            for row in range(group.first, group.first + group.rows)
        ]

    def _first_bytes(self) -> bytes:
        for group in self._groups:
            if group.rows:
                try:
                    file = self._open(self._shards[group.shard], self._metadata[group.shard])
                    options = {"row_groups": [group.number], "columns": [self._column.leaf], "use_threads": False}
                    (batch, *_) = file.iter_batches(batch_size=SNIFFED_ROWS, **options)
                except (self._arrow.ArrowException, OSError):
                    return b""  # each of its rows will be named with the reason
                column = batch.column(0)
                values = column.field("bytes") if self._column.name != self._column.leaf else column
                return next((value[:16] for value in values.to_pylist() if value), b"")
        return b""

    def _open(self, shard: Path, metadata: Any = None) -> Any:
        # Not mapped: a file cut short in place is then an error and no SIGBUS.  Opened anew for each row group, because
        # one reader is not for several threads.
        arrow = self._arrow
        try:
            return self._parquet.ParquetFile(shard, metadata=metadata, page_checksum_verification=True)
        except arrow.ArrowException as error:
            raise DataError(f"{shown(shard)}: is not a whole Parquet file ({one_line(error)})") from error
        except OSError as error:
            if error.errno:
                raise DataError(f"{shown(shard)}: cannot be read ({error.strerror})") from error
            raise DataError(f"{shown(shard)}: is not a whole Parquet file ({one_line(error)})") from error


class Column(NamedTuple):
    """Where the photographs are."""

    name: str
    leaf: str
    """Path of the binary values in the file's schema."""
    path_leaf: str | None
    """Of the names, where there are any."""


def _image_column(arrow: Any, shard: Path, schema: Any) -> Column:
    """The one column that can be photographs: structs with `bytes` before plain binary, usual names before others."""
    found = [column for column in (_leaf(arrow, field) for field in schema) if column is not None]
    if not found:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300]
        raise DataError(
            f"{shown(shard)}: has no image column, which would be binary or a struct with bytes and path; it has "
            f"{shown(columns) or 'none at all'}"
        )
    chosen = [column for column in found if column.name != column.leaf] or found
    if len(chosen) > 1:
        chosen = [column for column in chosen if column.name.lower() in USUAL_NAMES] or chosen
    if len(chosen) > 1:
        names = ", ".join(shown(column.name) for column in chosen)
        raise DataError(
            f"{shown(shard)}: {len(chosen)} columns could be the photographs: {names}; call the one that is meant image"
        )
    return chosen[0]


def _leaf(arrow: Any, field: Any) -> Column | None:
    """The column that a field of the schema is; None for what cannot hold photographs."""
    kind, types = field.type, arrow.types
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" in fields and _is_binary(types, fields["bytes"]):
            named = "path" in fields and (types.is_string(fields["path"]) or types.is_large_string(fields["path"]))
            return Column(field.name, f"{field.name}.bytes", f"{field.name}.path" if named else None)
        return None
    return Column(field.name, field.name, None) if _is_binary(types, kind) else None


def _is_binary(types: Any, kind: Any) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _lengths(arrow: Any, column: Any) -> np.ndarray:
    lengths = arrow.compute.fill_null(arrow.compute.binary_length(column), 0)
    return np.asarray(lengths.to_numpy(), np.int64)


def _num_bytes(column: Any) -> int:
    return 0 if isinstance(column, str) else int(column.nbytes)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"data.dataroot {shown(path)} is Parquet, and the package for it is missing ({error.name}):"
            " pip install -e '.[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet
