"""Reads a pipeline's offline files as they lie with pyarrow and DuckDB, and compares them with what was written.

Usage: arrow_read.py FOLDER EXPECTED. EXPECTED is an Arrow IPC stream of all rows in order of source_offset.
"""

import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

folder, expected = sys.argv[1:]
with pa.OSFile(expected) as file:
    expected = pa.ipc.open_stream(file).read_all()

dataset = ds.dataset(str(Path(folder) / "features"), format="ipc", partitioning="hive")
partitions = sorted(p.name for p in (Path(folder) / "features").iterdir())
assert partitions == ["partition=0", "partition=1"], partitions
table = dataset.to_table()
assert set(table["partition"].to_pylist()) == {0, 1}
table = table.drop_columns(["partition"]).sort_by("source_offset")
assert table.schema.equals(expected.schema), f"{table.schema}\n{expected.schema}"
assert table.combine_chunks().equals(expected.combine_chunks())
assert table.schema.field("event_time").type == pa.timestamp("ms", tz="UTC")

# DuckDB pushes the filter down into the Arrow dataset.
query = "select count(*), sum(spend_count_1h), count(city_last_lifetime), sum(ratio) from {} where source_offset >= 700"
got, want = (duckdb.sql(query.format(name)).fetchall() for name in ("dataset", "expected"))
assert got == want and got[0][0] == expected.num_rows - 700, (got, want)

# The files lend themselves to memory mapping: no compression, no dictionaries.
files = dataset.files
mapped = pa.memory_map(files[0])
before = pa.total_allocated_bytes()
batch = pa.ipc.open_file(mapped).get_batch(0)
assert batch.num_rows > 0 and pa.total_allocated_bytes() - before < 65536
print(f"{table.num_rows} rows in {len(files)} files: pyarrow and DuckDB agree with what was written")
