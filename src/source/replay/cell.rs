//! One cell of an Arrow column as a JSON value.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, Date64Type, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::array_value_to_string;
use serde_json::{Map, Value};

use crate::source::event_time::{is_plausible, to_iso};

/// The value of `array` at `row`. Instants and dates become RFC 3339 text, decimals numbers, NaN and infinities null.
/// What JSON has no kind for becomes text, as Arrow displays it.
///
/// # Errors
/// An instant outside of the years 1 to 9999, bytes that are not UTF-8.
pub(super) fn cell(array: &dyn Array, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => get::<Int8Type>(array, row).into(),
        DataType::Int16 => get::<Int16Type>(array, row).into(),
        DataType::Int32 => get::<Int32Type>(array, row).into(),
        DataType::Int64 => get::<Int64Type>(array, row).into(),
        DataType::UInt8 => get::<UInt8Type>(array, row).into(),
        DataType::UInt16 => get::<UInt16Type>(array, row).into(),
        DataType::UInt32 => get::<UInt32Type>(array, row).into(),
        DataType::UInt64 => get::<UInt64Type>(array, row).into(),
        DataType::Float16 => f64::from(get::<Float16Type>(array, row)).into(),
        DataType::Float32 => f64::from(get::<Float32Type>(array, row)).into(),
        DataType::Float64 => get::<Float64Type>(array, row).into(),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Binary => text(array.as_binary::<i32>().value(row))?,
        DataType::LargeBinary => text(array.as_binary::<i64>().value(row))?,
        DataType::BinaryView => text(array.as_binary_view().value(row))?,
        DataType::FixedSizeBinary(_) => text(array.as_fixed_size_binary().value(row))?,
        DataType::Date32 => instant(i64::from(get::<Date32Type>(array, row)).saturating_mul(86_400_000))?,
        DataType::Date64 => instant(get::<Date64Type>(array, row))?,
        DataType::Timestamp(unit, _) => match unit {
            TimeUnit::Second => instant(get::<TimestampSecondType>(array, row).saturating_mul(1_000))?,
            TimeUnit::Millisecond => instant(get::<TimestampMillisecondType>(array, row))?,
            TimeUnit::Microsecond => instant(get::<TimestampMicrosecondType>(array, row).div_euclid(1_000))?,
            TimeUnit::Nanosecond => instant(get::<TimestampNanosecondType>(array, row).div_euclid(1_000_000))?,
        },
        DataType::Decimal32(..) | DataType::Decimal64(..) | DataType::Decimal128(..) | DataType::Decimal256(..) => {
            let text = display(array, row)?;
            text.parse::<f64>().map_or(Value::String(text), Value::from)
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            return cell(dictionary.values(), dictionary.normalized_keys()[row]);
        }
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let values = fields.iter().zip(columns).map(|(field, column)| {
                let value = cell(column, row).map_err(|reason| format!("{}: {reason}", field.name()))?;
                Ok((field.name().clone(), value))
            });
            Value::Object(values.collect::<Result<Map<_, _>, String>>()?)
        }
        DataType::List(_) => list(&array.as_list::<i32>().value(row))?,
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row))?,
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row))?,
        _ => display(array, row)?.into(),
    })
}

fn get<T: ArrowPrimitiveType>(array: &dyn Array, row: usize) -> T::Native {
    array.as_primitive::<T>().value(row)
}

fn display(array: &dyn Array, row: usize) -> Result<String, String> {
    array_value_to_string(array, row).map_err(|error| error.to_string())
}

fn list(values: &dyn Array) -> Result<Value, String> {
    (0..values.len()).map(|row| cell(values, row)).collect()
}

fn text(bytes: &[u8]) -> Result<Value, String> {
    std::str::from_utf8(bytes).map(Value::from).map_err(|_| "its bytes are not UTF-8".into())
}

fn instant(ms: i64) -> Result<Value, String> {
    if is_plausible(ms) {
        Ok(to_iso(ms).into())
    } else {
        Err(format!("{ms} ms since 1970 is not within the years 1 to 9999"))
    }
}
