//! SQL scalar expressions over a set of columns: compiled once, evaluated by batch.
//!
//! The same expression on the same row always gives the same value, whatever batch the row is in and whenever it is
//! evaluated, because features have to be reproducible. So everything that looks beyond the row is refused: subqueries,
//! aggregates, window functions, and functions such as `now()` or `random()`.
//!
//! Names are case-sensitive as written; functions are not. Null in, null out, as in SQL. A float that is not finite (division
//! by zero, the logarithm of zero) is null at the step that computes it, and −0.0 is 0.0, so that `ln(x) > 0` is not true for
//! a negative x, and parts of an expression may be columns of their own without changing its value. Integer division
//! truncates, as in SQL. Dividing an integer by zero, an integer that does not fit 64 bits, a text that cannot be cast, the
//! square root of a negative number and zero to a negative power are errors of that row alone. `round` takes halves away
//! from zero.

mod catalog;
mod finite;
mod syntax;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{self, Field, Schema, SchemaRef};
use datafusion_common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion_common::{DFSchema, DataFusionError};
use datafusion_expr::execution_props::ExecutionProps;
use datafusion_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion_expr::simplify::SimplifyContext;
use datafusion_expr::{Cast, Expr, ExprSchemable};
use datafusion_optimizer::simplify_expressions::ExprSimplifier;
use datafusion_physical_expr::expressions::BinaryExpr;
use datafusion_physical_expr::{PhysicalExpr, create_physical_expr};
use datafusion_sql::planner::{ParserOptions, PlannerContext, SqlToRel};
use datafusion_sql::sqlparser::ast::{self, Spanned, Visit, Visitor};
use datafusion_sql::sqlparser::tokenizer::Span;

use self::catalog::CATALOG;
use self::finite::Finite;
use self::syntax::{byte_span, check, first_lower, parse};
use crate::config::plan::{Column, DataType};

/// What is wrong with an expression's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExpressionError {
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Where in the SQL text, in bytes; never empty unless the text is.
    pub span: Range<usize>,
}

/// Why a batch could not be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluationError {
    /// The batch lacks a column that the expression uses.
    #[error("expression `{sql}` needs column `{column}`, which the batch does not have")]
    MissingColumn {
        /// The expression.
        sql: Arc<str>,
        /// The column.
        column: Arc<str>,
    },
    /// The batch's column has another type than the expression was compiled for.
    #[error("expression `{sql}` needs column `{column}` as {expected}, but the batch has it as {found}")]
    WrongType {
        /// The expression.
        sql: Arc<str>,
        /// The column.
        column: Arc<str>,
        /// Type at compilation.
        expected: Box<datatypes::DataType>,
        /// Type in the batch.
        found: Box<datatypes::DataType>,
    },
    /// A value could not be computed.
    #[error("expression `{sql}`: {reason}")]
    Failed {
        /// The expression.
        sql: Arc<str>,
        /// Why.
        reason: String,
    },
    /// Only a condition can filter.
    #[error("expression `{sql}` is of type {data_type}, not a condition")]
    NotACondition {
        /// The expression.
        sql: Arc<str>,
        /// Its type.
        data_type: DataType,
    },
}

/// A row that has no value because computing it failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFailure {
    /// Index in the batch.
    pub row: usize,
    /// Why, for a person; names the expression.
    pub reason: String,
}

/// Values of a batch, where some rows may have failed.
#[derive(Debug, Clone)]
pub struct Rows {
    /// One value a row; null where the row failed.
    pub values: ArrayRef,
    /// The failed rows, in order.
    pub failed: Vec<RowFailure>,
}

/// Which rows of a batch a condition keeps.
#[derive(Debug, Clone)]
pub struct Kept {
    /// True where the condition is true; false where it is false, null or failed. No nulls.
    pub keep: BooleanArray,
    /// The failed rows, in order.
    pub failed: Vec<RowFailure>,
}

/// A compiled SQL scalar expression. Cheap to clone; can be shared between threads.
#[derive(Clone)]
pub struct Expression {
    sql: Arc<str>,
    columns: Vec<Column>,
    schema: SchemaRef,
    physical: Arc<dyn PhysicalExpr>,
    data_type: DataType,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expression").field("sql", &self.sql).field("data_type", &self.data_type).finish_non_exhaustive()
    }
}

impl Expression {
    /// Compiles `sql` over the columns of `input`.
    ///
    /// # Errors
    /// The first of what [`Expression::compile_all`] finds.
    pub fn compile(sql: &str, input: &[Column]) -> Result<Self, ExpressionError> {
        Self::compile_all(sql, input).map_err(|mut errors| errors.remove(0))
    }

    /// Compiles `sql` and, where it has faults, reports as many as can be told apart.
    ///
    /// # Errors
    /// At least one: malformed SQL, unknown columns or functions, what is refused (see the module), types that do not fit,
    /// a result that is not a number, boolean, text or timestamp.
    pub fn compile_all(sql: &str, input: &[Column]) -> Result<Self, Vec<ExpressionError>> {
        let parsed = parse(sql).map_err(|error| vec![error])?;
        let used = check(sql, &parsed, Some(input))?;
        let columns: Vec<Column> = input.iter().filter(|c| used.contains(&*c.name)).cloned().collect();
        let fields: Vec<Field> = columns.iter().map(|c| Field::new(&*c.name, c.data_type.to_arrow(), true)).collect();
        let schema = Arc::new(Schema::new(fields));
        let whole = |message: String, help: Option<&str>| {
            vec![ExpressionError { message, help: help.map(str::to_owned), span: 0..sql.len() }]
        };
        let dfschema = DFSchema::try_from(Schema::clone(&schema)).map_err(|e| whole(reason(&e), None))?;
        let planned = plan(&parsed, &dfschema).map_err(|error| vec![locate(sql, &parsed, &dfschema, &error)])?;

        let found = planned.get_type(&dfschema).map_err(|e| vec![locate(sql, &parsed, &dfschema, &e)])?;
        let Some(data_type) = from_arrow(&found) else {
            let help = match found {
                datatypes::DataType::Null => "give null a type: cast(null as double)",
                datatypes::DataType::Interval(_) | datatypes::DataType::Duration(_) => {
                    "take its seconds, or those of each timestamp: extract(epoch from …)"
                }
                _ => "cast it to bigint, double, boolean, varchar or timestamp",
            };
            return Err(whole(format!("the result is of type {found}, which a column cannot have"), Some(help)));
        };
        let target = data_type.to_arrow();
        let planned = if found == target { planned } else { Expr::Cast(Cast::new(Box::new(planned), target)) };
        let physical =
            create_physical_expr(&planned, &dfschema, &ExecutionProps::new(), &PhysicalPlanningContext::default())
                .and_then(|physical| checked_arithmetic(physical, &schema))
                .map_err(|error| vec![locate(sql, &parsed, &dfschema, &error)])?;
        Ok(Self { sql: sql.into(), columns, schema, physical, data_type })
    }

    /// Compiles a condition: an expression that is true, false or null.
    ///
    /// # Errors
    /// As [`Expression::compile_all`], and where the result is not a boolean.
    pub fn compile_condition(sql: &str, input: &[Column]) -> Result<Self, Vec<ExpressionError>> {
        let expression = Self::compile_all(sql, input)?;
        if expression.data_type != DataType::Boolean {
            return Err(vec![ExpressionError {
                message: format!("a condition has to be true or false, but this is of type {}", expression.data_type),
                help: Some("compare it with something: … > 0".into()),
                span: 0..sql.len(),
            }]);
        }
        Ok(expression)
    }

    /// Checks what can be checked without knowing the columns: the syntax, the functions, and what is refused.
    pub fn check_syntax(sql: &str) -> Vec<ExpressionError> {
        match parse(sql) {
            Err(error) => vec![error],
            Ok(parsed) => check(sql, &parsed, None).err().unwrap_or_default(),
        }
    }

    /// The names that look like columns in `sql`, sorted; empty where it cannot be parsed.
    pub fn names_in(sql: &str) -> BTreeSet<String> {
        parse(sql).ok().and_then(|parsed| check(sql, &parsed, None).ok()).unwrap_or_default()
    }

    /// The SQL text.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// Type of the values.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// The columns used, in the order in which they were given to the compiler.
    pub fn columns(&self) -> impl Iterator<Item = &Arc<str>> {
        self.columns.iter().map(|c| &c.name)
    }

    /// Evaluates a batch, which may have more columns than are used, in any order. One value a row, of the Arrow type of
    /// [`Expression::data_type`]; floats are finite or null.
    ///
    /// # Errors
    /// The batch lacks a column or has it in another type, or the value of any one row could not be computed.
    pub fn evaluate(&self, batch: &RecordBatch) -> Result<ArrayRef, EvaluationError> {
        self.evaluate_input(&self.project(batch)?)
    }

    /// Evaluates a batch so that a row whose value cannot be computed is null and reported, and the others are as if it
    /// were not there.
    ///
    /// # Errors
    /// Only where the batch lacks a column or has it in another type.
    pub fn evaluate_rows(&self, batch: &RecordBatch) -> Result<Rows, EvaluationError> {
        let input = self.project(batch)?;
        let mut parts = Vec::new();
        let mut failed = Vec::new();
        self.evaluate_parts(&input, 0, &mut parts, &mut failed);
        let values = match &parts[..] {
            [whole] => whole.clone(),
            _ => {
                let parts: Vec<&dyn Array> = parts.iter().map(AsRef::as_ref).collect();
                arrow::compute::concat(&parts).expect("all parts have the expression's type")
            }
        };
        Ok(Rows { values, failed })
    }

    /// Evaluates a condition: which rows it keeps. Null is not true; a row that fails is not kept and is reported.
    ///
    /// # Errors
    /// The expression is not boolean, or the batch lacks a column or has it in another type.
    pub fn as_filter(&self, batch: &RecordBatch) -> Result<Kept, EvaluationError> {
        if self.data_type != DataType::Boolean {
            return Err(EvaluationError::NotACondition { sql: self.sql.clone(), data_type: self.data_type });
        }
        let Rows { values, failed } = self.evaluate_rows(batch)?;
        let values = values.as_boolean();
        let keep = match values.nulls() {
            Some(nulls) if nulls.null_count() > 0 => BooleanArray::new(values.values() & nulls.inner(), None),
            _ => BooleanArray::new(values.values().clone(), None),
        };
        Ok(Kept { keep, failed })
    }

    fn project(&self, batch: &RecordBatch) -> Result<RecordBatch, EvaluationError> {
        let mut arrays = Vec::with_capacity(self.columns.len());
        for (column, field) in self.columns.iter().zip(self.schema.fields()) {
            let array = batch
                .column_by_name(&column.name)
                .ok_or_else(|| EvaluationError::MissingColumn { sql: self.sql.clone(), column: column.name.clone() })?;
            if array.data_type() != field.data_type() {
                return Err(EvaluationError::WrongType {
                    sql: self.sql.clone(),
                    column: column.name.clone(),
                    expected: Box::new(field.data_type().clone()),
                    found: Box::new(array.data_type().clone()),
                });
            }
            arrays.push(array.clone());
        }
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        Ok(RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)
            .expect("the columns come from one batch and have the schema's types"))
    }

    fn evaluate_input(&self, input: &RecordBatch) -> Result<ArrayRef, EvaluationError> {
        let values = self
            .physical
            .evaluate(input)
            .and_then(|values| values.into_array(input.num_rows()))
            .map_err(|error| EvaluationError::Failed { sql: self.sql.clone(), reason: reason(&error) })?;
        // A column that is passed through as it is may hold anything.
        Ok(finite::plain(values))
    }

    /// Halves a failing batch until the failing rows stand alone: a few bad rows cost a few more evaluations, not one a row.
    fn evaluate_parts(
        &self,
        input: &RecordBatch,
        first: usize,
        parts: &mut Vec<ArrayRef>,
        failed: &mut Vec<RowFailure>,
    ) {
        let rows = input.num_rows();
        match self.evaluate_input(input) {
            Ok(values) => parts.push(values),
            Err(error) if rows <= 1 => {
                // An empty batch can fail only where a constant part does; it has no row to report.
                if rows == 1 {
                    failed.push(RowFailure { row: first, reason: error.to_string() });
                }
                parts.push(arrow::array::new_null_array(&self.data_type.to_arrow(), rows));
            }
            Err(_) => {
                let half = rows / 2;
                self.evaluate_parts(&input.slice(0, half), first, parts, failed);
                self.evaluate_parts(&input.slice(half, rows - half), first + half, parts, failed);
            }
        }
    }
}

/// The column type that holds an Arrow type's values, if one does.
fn from_arrow(data_type: &datatypes::DataType) -> Option<DataType> {
    use datatypes::DataType as A;
    Some(match data_type {
        A::Int8 | A::Int16 | A::Int32 | A::Int64 | A::UInt8 | A::UInt16 | A::UInt32 | A::UInt64 => DataType::Int64,
        A::Float16 | A::Float32 | A::Float64 | A::Decimal128(..) | A::Decimal256(..) => DataType::Float64,
        A::Boolean => DataType::Boolean,
        A::Utf8 | A::LargeUtf8 | A::Utf8View => DataType::String,
        A::Date32 | A::Date64 | A::Timestamp(..) => DataType::Timestamp,
        _ => return None,
    })
}

/// Arrow's plain operators wrap around where an integer does not fit, and floats become infinite: a wrong number is worse
/// than none.
fn checked_arithmetic(
    physical: Arc<dyn PhysicalExpr>,
    schema: &Schema,
) -> datafusion_common::Result<Arc<dyn PhysicalExpr>> {
    physical
        .transform_up(|node| {
            let node = match node.downcast_ref::<BinaryExpr>() {
                Some(binary) => Arc::new(binary.clone().with_fail_on_overflow(true)) as _,
                None => node,
            };
            Finite::of(node, schema).map(Transformed::yes)
        })
        .data()
}

/// Names, types and operators resolved, constants folded.
fn plan(expr: &ast::Expr, schema: &DFSchema) -> datafusion_common::Result<Expr> {
    let (planned, simplifier) = coerce(expr, schema)?;
    simplifier.simplify(planned)
}

fn coerce(expr: &ast::Expr, schema: &DFSchema) -> datafusion_common::Result<(Expr, ExprSimplifier)> {
    let options = ParserOptions::new().with_enable_ident_normalization(false).with_map_string_types_to_utf8view(false);
    let planner = SqlToRel::new_with_options(&*CATALOG, options);
    let planned = planner.sql_to_expr(expr.clone(), schema, &mut PlannerContext::new())?;
    let context = SimplifyContext::builder()
        .with_schema(Arc::new(schema.clone()))
        .with_config_options(CATALOG.config.clone())
        .build();
    let simplifier = ExprSimplifier::new(context);
    let planned = simplifier.coerce(planned, schema)?;
    planned.get_type(schema)?;
    Ok((planned, simplifier))
}

/// The planner does not say where an error is, so the smallest part that fails by itself is looked for.
fn locate(sql: &str, expr: &ast::Expr, schema: &DFSchema, error: &DataFusionError) -> ExpressionError {
    struct Smallest<'a> {
        schema: &'a DFSchema,
        found: Option<(Span, String)>,
    }
    impl Visitor for Smallest<'_> {
        type Break = ();

        fn post_visit_expr(&mut self, part: &ast::Expr) -> ControlFlow<()> {
            match coerce(part, self.schema) {
                Ok(_) => ControlFlow::Continue(()),
                Err(error) => {
                    self.found = Some((part.span(), reason(&error)));
                    ControlFlow::Break(())
                }
            }
        }
    }
    let mut smallest = Smallest { schema, found: None };
    let _ = expr.visit(&mut smallest);
    let (span, message) = smallest.found.unwrap_or_else(|| (Span::empty(), reason(error)));
    ExpressionError { message, help: None, span: byte_span(sql, span) }
}

/// DataFusion's words without its prefixes and candidate lists.
fn reason(error: &DataFusionError) -> String {
    let root = match error.find_root() {
        DataFusionError::ArrowError(arrow, _) => arrow.to_string(),
        root => root.message().into_owned(),
    };
    let first = root.split("\n\n").next().unwrap_or_default();
    let line = first.lines().next().unwrap_or_default().trim();
    let line = line.split(" No function matches").next().unwrap_or(line);
    first_lower(line.trim_end_matches(['.', ' ']))
}

#[cfg(test)]
mod tests;
