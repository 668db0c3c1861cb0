//! A step of an expression that computes floats: they are finite or null, and zero has no sign.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float32Array, Float64Array, RecordBatch};
use arrow::datatypes::{DataType, Float32Type, Float64Type, Schema};
use datafusion_common::{Result, ScalarValue};
use datafusion_expr::ColumnarValue;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::expressions::{Column, Literal};

/// Passes on what a step computes, its floats made plain: so an expression has the same value whether its parts are
/// columns of their own or not, and `ln(x) > 0` is not true where there is no logarithm (NaN is greater than all numbers).
#[derive(Debug, Eq)]
pub(super) struct Finite {
    step: Arc<dyn PhysicalExpr>,
}

impl Finite {
    /// The step itself where its result is no float, or is plain already.
    pub(super) fn of(step: Arc<dyn PhysicalExpr>, schema: &Schema) -> Result<Arc<dyn PhysicalExpr>> {
        let float = matches!(step.data_type(schema)?, DataType::Float32 | DataType::Float64);
        if !float || step.is::<Column>() {
            return Ok(step);
        }
        if let Some(literal) = step.downcast_ref::<Literal>() {
            return Ok(Arc::new(Literal::new(plain_scalar(literal.value().clone()))));
        }
        Ok(Arc::new(Self { step }))
    }
}

/// Floats that are not finite become null, and −0.0 becomes 0.0. Other values stay as they are.
pub(super) fn plain(values: ArrayRef) -> ArrayRef {
    // Adding zero turns −0.0 into 0.0 and leaves all else as it is.
    macro_rules! plain {
        ($type:ty, $array:ty) => {{
            let floats = values.as_primitive::<$type>();
            if floats.values().iter().all(|v| v.is_finite() && (*v != 0.0 || v.is_sign_positive())) {
                return values;
            }
            Arc::new(floats.iter().map(|v| v.filter(|v| v.is_finite()).map(|v| v + 0.0)).collect::<$array>())
        }};
    }
    match values.data_type() {
        DataType::Float32 => plain!(Float32Type, Float32Array),
        DataType::Float64 => plain!(Float64Type, Float64Array),
        _ => values,
    }
}

fn plain_scalar(value: ScalarValue) -> ScalarValue {
    match value {
        ScalarValue::Float32(float) => ScalarValue::Float32(float.filter(|v| v.is_finite()).map(|v| v + 0.0)),
        ScalarValue::Float64(float) => ScalarValue::Float64(float.filter(|v| v.is_finite()).map(|v| v + 0.0)),
        other => other,
    }
}

impl PartialEq for Finite {
    fn eq(&self, other: &Self) -> bool {
        self.step.eq(&other.step)
    }
}

impl Hash for Finite {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.step.hash(state);
    }
}

impl fmt::Display for Finite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.step, f)
    }
}

impl PhysicalExpr for Finite {
    fn data_type(&self, schema: &Schema) -> Result<DataType> {
        self.step.data_type(schema)
    }

    fn nullable(&self, _: &Schema) -> Result<bool> {
        Ok(true)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        Ok(match self.step.evaluate(batch)? {
            ColumnarValue::Array(values) => ColumnarValue::Array(plain(values)),
            ColumnarValue::Scalar(value) => ColumnarValue::Scalar(plain_scalar(value)),
        })
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.step]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn PhysicalExpr>>) -> Result<Arc<dyn PhysicalExpr>> {
        Ok(Arc::new(Self { step: children.remove(0) }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.step.fmt_sql(f)
    }
}
