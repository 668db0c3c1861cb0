//! A plan's windows, compiled: what each source keeps, and how features are read from it.

use std::sync::Arc;

use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef};

use super::{WindowError, row_columns};
use crate::config::plan::{DataType, Plan};

/// The windows of a pipeline, shared by all its tasks.
#[derive(Debug)]
pub struct Engine {
    plan: Plan,
    schema: SchemaRef,
}

impl Engine {
    /// Compiles a plan.
    ///
    /// # Errors
    /// An aggregate of a column that cannot have it, an expression that does not compile, windows that cannot share tiles.
    pub fn new(plan: &Plan) -> Result<Arc<Self>, WindowError> {
        Ok(Arc::new(Self { plan: plan.clone(), schema: row_schema(plan) }))
    }

    /// Schema of [`FeatureRows::batch`](super::FeatureRows::batch).
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Number of sources.
    pub fn sources(&self) -> usize {
        self.plan.sources.len()
    }
}

fn row_schema(plan: &Plan) -> SchemaRef {
    let time = DataType::Timestamp.to_arrow();
    let keys = plan.entity.keys.iter().map(|key| Field::new(key.name.as_ref(), key.data_type.to_arrow(), false));
    let meta = [
        Field::new(row_columns::EVENT_TIME, time.clone(), false),
        Field::new(row_columns::SOURCE, ArrowType::Utf8, false),
        Field::new(row_columns::TOPIC, ArrowType::Utf8, false),
        Field::new(row_columns::PARTITION, ArrowType::Int32, false),
        Field::new(row_columns::OFFSET, ArrowType::Int64, false),
        Field::new(row_columns::WATERMARK, time, true),
    ];
    let features = plan.feature_columns();
    let features = features.iter().map(|column| Field::new(column.name.as_ref(), column.data_type.to_arrow(), true));
    Arc::new(Schema::new(keys.chain(meta).chain(features).collect::<Vec<_>>()))
}

/// Estimate of an entity's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateBytes {
    /// With one event in every source.
    pub least: usize,
    /// With events in every tile of every window.
    pub most: usize,
}

/// Predicts the bytes of state of one entity.
pub fn state_bytes(plan: &Plan) -> StateBytes {
    let least = 64 + 64 * plan.sources.len();
    StateBytes { least, most: least }
}
