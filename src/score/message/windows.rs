//! Rows of emitted windows as records.

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::TimestampMillisecondType;

use super::{Encoded, cell, cell_or_list, field, json, write_key};
use crate::config::plan::{EmittedPlan, Plan};
use crate::score::ScoreError;
use crate::score::rows::Cells;
use crate::window::emitted_columns::{END, FINAL, START};

/// Writes the rows of one table `[windows.NAME]`: `{"customer_id": …, "window_start": …, "window_end": …, "count": …, "final": true}`.
#[derive(Debug)]
pub struct WindowEncoder {
    keys: usize,
    /// `{"name":` of the first column, `,"name":` of the others; but for the offset.
    names: Vec<Vec<u8>>,
}

impl WindowEncoder {
    /// For the windows of a plan.
    pub fn new(plan: &Plan, windows: &EmittedPlan) -> Self {
        let keys = plan.entity.keys.iter().map(|key| &*key.name);
        let functions = windows.functions.iter().map(|(_, column)| &*column.name);
        let names = keys.chain([START, END]).chain(functions).chain([FINAL]);
        let mut names: Vec<Vec<u8>> = names.enumerate().map(|(at, name)| field(at, name)).collect();
        names[0].insert(0, b'{');
        Self { keys: plan.entity.keys.len(), names }
    }

    /// Appends a record for each row.
    ///
    /// # Errors
    /// A batch with other columns.
    pub fn encode(&self, batch: &RecordBatch, out: &mut Encoded) -> Result<(), ScoreError> {
        let schema = batch.schema_ref();
        let columns = schema.fields().iter().zip(batch.columns()).take(self.names.len());
        let columns = columns.map(|(field, column)| Cells::of(field.name(), column)).collect::<Result<Vec<_>, _>>()?;
        let (keys, values) = columns.split_at(self.keys);
        let (starts, ends) = (batch.column(self.keys), batch.column(self.keys + 1));
        let instants = [starts, ends].map(|column| column.as_primitive::<TimestampMillisecondType>().values());
        // Windows come in runs of the same bounds.
        let (mut bounds, mut written) = ([i64::MIN; 2], Vec::new());
        for row in 0..batch.num_rows() {
            let value = &mut out.values;
            for (name, cells) in self.names.iter().zip(keys) {
                value.extend_from_slice(name);
                cell(value, cells.cell(row));
            }
            let now = instants.map(|instants| instants[row]);
            if written.is_empty() || now != bounds {
                bounds = now;
                written.clear();
                for (name, instant) in self.names[self.keys..].iter().zip(now) {
                    written.extend_from_slice(name);
                    json(&mut written, &instant);
                }
            }
            value.extend_from_slice(&written);
            for (name, cells) in self.names[self.keys + 2..].iter().zip(&values[2..]) {
                value.extend_from_slice(name);
                cell_or_list(value, cells, row);
            }
            value.push(b'}');
            write_key(keys, row, &mut out.keys);
            out.end(row);
        }
        Ok(())
    }
}
