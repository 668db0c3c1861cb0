//! Feature rows as the matrix that a preprocessor takes.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef};

use super::ModelError;

/// Where the features of a list are in batches of one schema.
#[derive(Debug, Clone)]
pub struct FeatureColumns {
    names: Vec<String>,
    /// The schema that `indexes` belong to.
    schema: Option<SchemaRef>,
    indexes: Vec<usize>,
}

impl FeatureColumns {
    /// Looks for these features, in this order.
    pub fn new(names: &[String]) -> Self {
        Self { names: names.to_vec(), schema: None, indexes: Vec::new() }
    }

    /// Names, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The features' columns in a batch, in order.
    ///
    /// # Errors
    /// A feature without a column, or one of a type that models do not take.
    pub fn of<'a>(&mut self, batch: &'a RecordBatch) -> Result<Vec<&'a ArrayRef>, ModelError> {
        let schema = batch.schema_ref();
        if !self.schema.as_ref().is_some_and(|known| SchemaRef::ptr_eq(known, schema) || known == schema) {
            self.indexes = self.names.iter().map(|name| find(schema, name)).collect::<Result<_, _>>()?;
            self.schema = Some(schema.clone());
        }
        Ok(self.indexes.iter().map(|&index| batch.column(index)).collect())
    }
}

fn find(schema: &SchemaRef, name: &str) -> Result<usize, ModelError> {
    let refuse = |problem: String| ModelError::Feature { feature: name.to_owned(), problem };
    let index = schema.index_of(name).map_err(|_| refuse("the feature rows have no such column".to_owned()))?;
    match schema.field(index).data_type() {
        DataType::Int64 | DataType::Float64 | DataType::Boolean => Ok(index),
        other => Err(refuse(format!("it is {other}, and models take int64, float64 and boolean features"))),
    }
}

/// Rows of float32 values, row after row, in one buffer that is used again and again.
#[derive(Debug, Default, Clone)]
pub struct FeatureMatrix {
    values: Vec<f32>,
    columns: usize,
}

impl FeatureMatrix {
    /// Fills the matrix with rows `start` (inclusive) to `end` (exclusive) of the columns. Nulls become NaN; integers beyond
    /// 2²⁴ and floats are rounded to float32, true is 1 and false is 0.
    pub fn fill(&mut self, columns: &[&ArrayRef], start: usize, end: usize) {
        let (width, rows) = (columns.len(), end - start);
        self.columns = width;
        // Every cell is written below: only growth has to be initialised.
        self.values.resize(rows * width, f32::NAN);
        for (position, column) in columns.iter().enumerate() {
            let cells = self.values[position.min(rows * width)..].iter_mut().step_by(width.max(1));
            let nulls = column.nulls().filter(|nulls| nulls.null_count() > 0);
            match column.data_type() {
                DataType::Float64 => {
                    let values = &column.as_primitive::<Float64Type>().values()[start..end];
                    cells.zip(values).for_each(|(cell, value)| *cell = *value as f32);
                }
                DataType::Int64 => {
                    let values = &column.as_primitive::<Int64Type>().values()[start..end];
                    cells.zip(values).for_each(|(cell, value)| *cell = *value as f32);
                }
                DataType::Boolean => {
                    let values = column.as_boolean().values().slice(start, rows);
                    cells.zip(&values).for_each(|(cell, value)| *cell = f32::from(u8::from(value)));
                }
                other => unreachable!("FeatureColumns lets no {other} through"),
            }
            if let Some(nulls) = nulls {
                for row in 0..rows {
                    if nulls.is_null(start + row) {
                        self.values[row * width + position] = f32::NAN;
                    }
                }
            }
        }
    }

    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{BooleanArray, Float64Array, Int64Array, StringArray};
    use arrow::datatypes::{Field, Schema};

    use super::*;

    fn batch() -> RecordBatch {
        let schema = Schema::new(vec![
            Field::new("id", DataType::Utf8, false),
            Field::new("flag", DataType::Boolean, true),
            Field::new("amount", DataType::Float64, true),
            Field::new("count", DataType::Int64, true),
        ]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec!["a", "b", "c"])),
            Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
            Arc::new(Float64Array::from(vec![Some(1.5), Some(-2.25), None])),
            Arc::new(Int64Array::from(vec![None, Some(7), Some(-1)])),
        ];
        RecordBatch::try_new(Arc::new(schema), columns).unwrap()
    }

    fn names(names: &[&str]) -> FeatureColumns {
        FeatureColumns::new(&names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>())
    }

    /// NaN as a value that equals itself.
    fn comparable(values: &[f32]) -> Vec<Option<f32>> {
        values.iter().map(|v| (!v.is_nan()).then_some(*v)).collect()
    }

    #[test]
    fn takes_the_list_in_its_own_order_and_nulls_as_nan() {
        let batch = batch();
        let mut matrix = FeatureMatrix::default();
        matrix.fill(&names(&["count", "flag", "amount"]).of(&batch).unwrap(), 0, 3);
        let expected = [None, Some(1.0), Some(1.5), Some(7.0), None, Some(-2.25), Some(-1.0), Some(0.0), None];
        assert_eq!(comparable(matrix.values()), expected);
        assert_eq!(matrix.columns(), 3);
    }

    #[test]
    fn a_part_of_a_sliced_batch_keeps_its_nulls_and_no_old_values() {
        let batch = batch();
        let mut matrix = FeatureMatrix::default();
        let mut columns = names(&["flag", "count", "amount"]);
        matrix.fill(&columns.of(&batch).unwrap(), 0, 3);
        let tail = batch.slice(1, 2);
        matrix.fill(&columns.of(&tail).unwrap(), 1, 2);
        assert_eq!(comparable(matrix.values()), [Some(0.0), Some(-1.0), None]);
        matrix.fill(&columns.of(&tail).unwrap(), 0, 1);
        assert_eq!(comparable(matrix.values()), [None, Some(7.0), Some(-2.25)]);
    }

    #[test]
    fn nothing_is_a_matrix_too() {
        let mut matrix = FeatureMatrix::default();
        matrix.fill(&names(&["flag", "count"]).of(&batch()).unwrap(), 2, 2);
        assert!(matrix.values().is_empty());
    }

    #[test]
    fn names_the_feature_that_cannot_be_taken() {
        let missing = names(&["count", "nowhere"]).of(&batch()).unwrap_err();
        assert_eq!(missing.to_string(), "feature 'nowhere': the feature rows have no such column");
        let text = names(&["id"]).of(&batch()).unwrap_err();
        assert_eq!(text.to_string(), "feature 'id': it is Utf8, and models take int64, float64 and boolean features");
    }
}
