use arrow::array::{Float64Array, Int64Array, StringArray, TimestampMillisecondArray};
use arrow::datatypes::Float64Type;
use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn columns() -> Vec<Column> {
    [
        ("amount", DataType::Float64),
        ("quantity", DataType::Int64),
        ("channel", DataType::String),
        ("premium", DataType::Boolean),
        ("purchased_at", DataType::Timestamp),
        ("customerId", DataType::Int64),
    ]
    .map(|(name, data_type)| Column { name: name.into(), data_type })
    .into()
}

/// 2024-02-29T12:30:00Z.
const INSTANT: i64 = 1_709_209_800_000;

fn batch(rows: &[(Option<f64>, Option<i64>, Option<&str>)]) -> RecordBatch {
    let fields: Vec<Field> = columns().iter().map(|c| Field::new(&*c.name, c.data_type.to_arrow(), true)).collect();
    let n = rows.len();
    RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        vec![
            Arc::new(rows.iter().map(|r| r.0).collect::<Float64Array>()),
            Arc::new(rows.iter().map(|r| r.1).collect::<Int64Array>()),
            Arc::new(rows.iter().map(|r| r.2).collect::<StringArray>()),
            Arc::new((0..n).map(|i| Some(i % 2 == 0)).collect::<BooleanArray>()),
            Arc::new(TimestampMillisecondArray::from(vec![INSTANT; n]).with_timezone("UTC")),
            Arc::new(Int64Array::from(vec![7; n])),
        ],
    )
    .unwrap()
}

fn one(sql: &str) -> String {
    let expression = Expression::compile(sql, &columns()).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let values = expression.evaluate(&batch(&[(Some(12.5), Some(5), Some("web"))])).unwrap();
    assert_eq!(values.data_type(), &expression.data_type().to_arrow());
    format!("{}:{}", expression.data_type(), arrow::util::display::array_value_to_string(&values, 0).unwrap())
}

#[rstest]
#[case("amount / quantity", "float64:2.5")]
#[case("quantity / 2", "int64:2")]
#[case("quantity * 1.0 / 2", "float64:2.5")]
#[case("amount / nullif(quantity - 5, 0)", "float64:")]
#[case("amount / (amount - 12.5)", "float64:")]
#[case("-amount / 0.0", "float64:")]
#[case("coalesce(null, amount, 1)", "float64:12.5")]
#[case("case when quantity > 3 and premium then 'many' else 'few' end", "string:many")]
#[case("channel in ('web', 'app')", "boolean:true")]
#[case("upper(channel) || '!'", "string:WEB!")]
#[case("length(channel)", "int64:3")]
#[case("substring(channel from 1 for 2)", "string:we")]
#[case("regexp_like(channel, '^w.b$')", "boolean:true")]
#[case("extract(hour from purchased_at)", "int64:12")]
#[case("date_trunc('month', purchased_at)", "timestamp:2024-02-01T00:00:00Z")]
#[case("date_part('dow', purchased_at)", "int64:4")]
#[case("purchased_at + interval '1 day'", "timestamp:2024-03-01T12:30:00Z")]
#[case("cast(purchased_at as date)", "timestamp:2024-02-29T00:00:00Z")]
#[case("extract(epoch from purchased_at) > 0", "boolean:true")]
#[case("cast(quantity as real)", "float64:5.0")]
#[case("cast('7' as int)", "int64:7")]
#[case("customerId + 1", "int64:8")]
#[case("\"customerId\" = 7", "boolean:true")]
#[case("GREATEST(amount, 20)", "float64:20.0")]
#[case("1 = 1", "boolean:true")]
#[case("quantity -- the pieces\n + 1", "int64:6")]
#[case("amount is not null and not (amount between 13 and 20)", "boolean:true")]
#[case("cast(null as double)", "float64:")]
fn evaluates(#[case] sql: &str, #[case] expected: &str) {
    assert_eq!(one(sql), expected);
}

#[rstest]
#[case("amonut + 1", "unknown column `amonut`", "amonut", Some("did you mean `amount`?"))]
#[case("customerid + 1", "unknown column `customerid`", "customerid", Some("did you mean `customerId`?"))]
#[case("nulif(amount, 0)", "unknown function `nulif`", "nulif", Some("did you mean `nullif`?"))]
#[case(
    "sum(amount)",
    "`sum` is an aggregate: an expression sees one row",
    "sum",
    Some("aggregate with a feature group: its functions and windows")
)]
#[case(
    "amount - now()",
    "`now` gives another value each time: features must be deterministic",
    "now",
    Some("use the event's own fields; the event time is the instant that a row is as of")
)]
#[case(
    "purchased_at < current_timestamp",
    "`current_timestamp` gives another value each time: features must be deterministic",
    "current_timestamp",
    Some("use the event's own fields; the event time is the instant that a row is as of")
)]
#[case(
    "row_number() over ()",
    "`row_number` is a window function: an expression sees one row",
    "row_number",
    Some("aggregate over time with a feature group: its functions and windows")
)]
#[case("amount > (select 1)", "a subquery is not allowed: an expression sees one row", "select 1", None)]
#[case(
    "purchases.amount",
    "`purchases.amount` names a table, and there are none here",
    "purchases.amount",
    Some("write `amount`, or quote a name that has a dot")
)]
#[case("amount + ", "expected: an expression, found: EOF", " ", None)]
#[case("amount +\n  )", "expected: an expression, found: )", ")", None)]
#[case("amount quantity", "unexpected `quantity` after the end of the expression", "quantity", None)]
#[case(
    "amount > 'a' + premium",
    "cannot coerce arithmetic expression Utf8 + Boolean to valid types",
    "'a' + premium",
    None
)]
#[case(
    "null",
    "the result is of type Null, which a column cannot have",
    "null",
    Some("give null a type: cast(null as double)")
)]
#[case(
    "purchased_at - purchased_at",
    "the result is of type Duration(ms), which a column cannot have",
    "purchased_at - purchased_at",
    Some("take its seconds, or those of each timestamp: extract(epoch from …)")
)]
#[case(
    "random() * amount",
    "`random` gives another value each time: features must be deterministic",
    "random",
    Some("use the event's own fields; the event time is the instant that a row is as of")
)]
#[case("amount > $1", "placeholder `$1` has no value here", "$1", None)]
#[case("", "the expression is empty", "", None)]
#[case("'web", "unterminated string literal", "'", None)]
fn refuses(#[case] sql: &str, #[case] message: &str, #[case] at: &str, #[case] help: Option<&str>) {
    let error = Expression::compile(sql, &columns()).unwrap_err();
    assert_eq!((error.message.as_str(), &sql[error.span.clone()], error.help.as_deref()), (message, at, help), "{sql}");
}

#[test]
fn reports_every_unknown_name() {
    let errors = Expression::compile_all("amonut + quantty * sqrtt(3)", &columns()).unwrap_err();
    let messages: Vec<_> = errors.iter().map(|e| e.message.as_str()).collect();
    assert_eq!(messages, ["unknown column `amonut`", "unknown column `quantty`", "unknown function `sqrtt`"]);
}

#[test]
fn a_condition_has_to_be_boolean() {
    let errors = Expression::compile_condition("amount", &columns()).unwrap_err();
    assert_eq!(errors[0].message, "a condition has to be true or false, but this is of type float64");
    let amount = Expression::compile("amount", &columns()).unwrap();
    assert!(matches!(amount.as_filter(&batch(&[])), Err(EvaluationError::NotACondition { .. })));
}

#[test]
fn knows_its_columns_whatever_the_batch_looks_like() {
    let expression = Expression::compile("quantity * amount", &columns()).unwrap();
    assert_eq!(expression.columns().map(|c| &**c).collect::<Vec<_>>(), ["amount", "quantity"]);

    let wide = batch(&[(Some(2.0), Some(3), None)]);
    let shuffled = wide.project(&[3, 1, 0]).unwrap();
    assert_eq!(expression.evaluate(&shuffled).unwrap().as_primitive::<Float64Type>().value(0), 6.0);

    let missing = expression.evaluate(&wide.project(&[0]).unwrap()).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "expression `quantity * amount` needs column `quantity`, which the batch does not have"
    );
    let renamed =
        RecordBatch::try_from_iter([("amount", wide.column(2).clone()), ("quantity", wide.column(1).clone())]);
    assert!(matches!(expression.evaluate(&renamed.unwrap()), Err(EvaluationError::WrongType { .. })));
}

#[test]
fn a_bad_row_does_not_poison_its_batch() {
    let rows = batch(&[
        (Some(1.0), Some(1), Some("10")),
        (Some(1.0), Some(0), Some("11")),
        (Some(1.0), None, Some("12")),
        (Some(1.0), Some(4), Some("x")),
        (Some(1.0), Some(5), Some("20")),
    ]);
    let expression = Expression::compile("cast(channel as bigint) / quantity", &columns()).unwrap();
    assert!(expression.evaluate(&rows).is_err());
    let Rows { values, failed } = expression.evaluate_rows(&rows).unwrap();
    let values: Vec<_> = values.as_primitive::<datatypes::Int64Type>().iter().collect();
    assert_eq!(values, [Some(10), None, None, None, Some(4)]);
    assert_eq!(failed.iter().map(|f| f.row).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(failed[0].reason, "expression `cast(channel as bigint) / quantity`: divide by zero error");
    assert!(failed[1].reason.contains("Cannot cast string 'x'") || failed[1].reason.contains("cannot cast string 'x'"));
}

#[test]
fn integers_do_not_wrap_around() {
    let rows = batch(&[(None, Some(i64::MAX), None), (None, Some(1), None)]);
    let expression = Expression::compile("quantity + 1", &columns()).unwrap();
    let Rows { values, failed } = expression.evaluate_rows(&rows).unwrap();
    assert_eq!(values.as_primitive::<datatypes::Int64Type>().iter().collect::<Vec<_>>(), [None, Some(2)]);
    assert_eq!(failed.len(), 1);
}

#[test]
fn a_filter_keeps_what_is_true() {
    let rows = batch(&[
        (Some(1.0), Some(1), None),
        (None, Some(1), None),
        (Some(-1.0), Some(1), None),
        (Some(1.0), Some(0), None),
    ]);
    let filter = Expression::compile_condition("amount > 0 and 10 / quantity > 5", &columns()).unwrap();
    let kept = filter.as_filter(&rows).unwrap();
    assert_eq!(kept.keep, BooleanArray::from(vec![true, false, false, false]));
    assert_eq!(kept.failed.iter().map(|f| f.row).collect::<Vec<_>>(), [3]);
    assert_eq!(filter.as_filter(&batch(&[])).unwrap().keep.len(), 0);
}

#[test]
fn constants_and_empty_batches_keep_their_length() {
    let constant = Expression::compile("1 + 1", &columns()).unwrap();
    assert_eq!(constant.evaluate(&batch(&[])).unwrap().len(), 0);
    assert_eq!(constant.evaluate(&batch(&[(None, None, None); 3])).unwrap().len(), 3);
    let broken = Expression::compile("1 / 0", &columns()).unwrap();
    assert_eq!(broken.evaluate_rows(&batch(&[])).unwrap().values.len(), 0);
    assert_eq!(broken.evaluate_rows(&batch(&[(None, None, None); 2])).unwrap().failed.len(), 2);
}

#[test]
fn deep_and_long_texts_are_refused_or_evaluated() {
    let long = vec!["quantity"; 250].join(" + ");
    assert_eq!(one(&long), "int64:1250");
    let deep = format!("{}1{}", "(".repeat(100), ")".repeat(100));
    assert_eq!(Expression::compile(&deep, &columns()).unwrap_err().message, "the expression is nested too deeply");
    let endless = Expression::compile(&"1 + ".repeat(3000), &columns()).unwrap_err();
    assert_eq!(endless.message, "the expression has more than 512 words and operators");
}

#[test]
fn syntax_is_checked_without_columns() {
    assert_eq!(Expression::check_syntax("anything > 1"), []);
    assert_eq!(Expression::check_syntax("random() > 1").len(), 1);
    assert_eq!(Expression::check_syntax("a >").len(), 1);
    assert_eq!(Expression::names_in("a + b * a"), BTreeSet::from(["a".to_owned(), "b".to_owned()]));
}

#[rstest]
#[case("abs(-amount)", "float64:12.5")]
#[case("abs(quantity - 9)", "int64:4")]
#[case("ln(amount)", "float64:2.5257286443082556")]
#[case("log10(quantity * 20)", "float64:2.0")]
#[case("log(2, 8.0)", "float64:3.0")]
#[case("exp(0)", "float64:1.0")]
#[case("sqrt(amount * 2)", "float64:5.0")]
#[case("power(amount, 2)", "float64:156.25")]
#[case("power(quantity, 3)", "float64:125.0")]
#[case("round(amount)", "float64:13.0")]
#[case("round(-amount)", "float64:-13.0")]
#[case("round(amount / 3, 2)", "float64:4.17")]
#[case("trunc(-amount)", "float64:-12.0")]
#[case("floor(-amount)", "float64:-13.0")]
#[case("ceil(amount)", "float64:13.0")]
#[case("signum(-amount)", "float64:-1.0")]
#[case("round(-amount / 100)", "float64:0.0")]
#[case("sin(pi() / 2)", "float64:1.0")]
#[case("ln(amount - 12.5)", "float64:")]
#[case("ln(-amount)", "float64:")]
#[case("exp(amount * 1000)", "float64:")]
#[case("power(-amount, 0.5)", "float64:")]
#[case("asin(amount)", "float64:")]
#[case("sqrt(nullif(amount, 12.5))", "float64:")]
#[case("power(nullif(quantity, 5), 2)", "float64:")]
#[case("coalesce(ln(-amount), -1)", "float64:-1.0")]
#[case("coalesce(amount / (amount - 12.5), -1)", "float64:-1.0")]
#[case("ln(-amount) > 0", "boolean:")]
#[case("ln(-amount) is null", "boolean:true")]
#[case("-(amount - 12.5) < 0.0", "boolean:false")]
#[case("quantity % 3", "int64:2")]
fn computes(#[case] sql: &str, #[case] expected: &str) {
    assert_eq!(one(sql), expected);
}

#[test]
fn a_function_outside_its_domain_fails_that_row_alone() {
    let rows = batch(&[(Some(-4.0), Some(0), None), (Some(4.0), Some(2), None), (None, None, None)]);
    let reason = |sql: &str| {
        let found = Expression::compile(sql, &columns()).unwrap().evaluate_rows(&rows).unwrap();
        assert_eq!(found.failed.iter().map(|f| f.row).collect::<Vec<_>>(), [0], "{sql}");
        assert!(found.values.is_valid(1) && found.values.is_null(2), "{sql}");
        found.failed[0].reason.clone()
    };
    assert!(reason("sqrt(amount)").ends_with("cannot take square root of a negative number"));
    assert!(reason("power(quantity, -1)").ends_with("zero raised to a negative power is undefined"));
}

#[test]
fn a_condition_over_a_logarithm_keeps_no_row_without_one() {
    let rows = batch(&[(Some(9.0), None, None), (Some(0.0), None, None), (Some(-9.0), None, None), (None, None, None)]);
    for (sql, expected) in [
        ("ln(amount) > 1", [true, false, false, false]),
        ("ln(amount) < 1", [false; 4]),
        ("not (ln(amount) > 1)", [false; 4]),
        ("power(amount, 0.5) <> 0", [true, false, false, false]),
    ] {
        let kept = Expression::compile_condition(sql, &columns()).unwrap().as_filter(&rows).unwrap();
        assert_eq!(kept.keep, BooleanArray::from(expected.to_vec()), "{sql}");
        assert!(kept.failed.is_empty(), "{sql}");
    }
}

/// An expression as a tree, with its SQL and its value by the plainest of evaluations.
#[derive(Debug, Clone)]
enum Tree {
    Amount,
    Quantity,
    Number(i32),
    Sum(Box<Tree>, Box<Tree>),
    Difference(Box<Tree>, Box<Tree>),
    Product(Box<Tree>, Box<Tree>),
    Quotient(Box<Tree>, Box<Tree>),
    NullIf(Box<Tree>, Box<Tree>),
    Coalesce(Box<Tree>, Box<Tree>),
    IfLess(Box<Tree>, Box<Tree>, Box<Tree>),
}

impl Tree {
    fn sql(&self) -> String {
        match self {
            Self::Amount => "amount".into(),
            Self::Quantity => "cast(quantity as double)".into(),
            Self::Number(n) => format!("({n}.0)"),
            Self::Sum(a, b) => format!("({} + {})", a.sql(), b.sql()),
            Self::Difference(a, b) => format!("({} - {})", a.sql(), b.sql()),
            Self::Product(a, b) => format!("({} * {})", a.sql(), b.sql()),
            Self::Quotient(a, b) => format!("({} / {})", a.sql(), b.sql()),
            Self::NullIf(a, b) => format!("nullif({}, {})", a.sql(), b.sql()),
            Self::Coalesce(a, b) => format!("coalesce({}, {})", a.sql(), b.sql()),
            Self::IfLess(a, b, c) => format!("case when {} < {} then {} end", a.sql(), b.sql(), c.sql()),
        }
    }

    fn value(&self, amount: Option<f64>, quantity: Option<i64>) -> Option<f64> {
        let of = |tree: &Tree| tree.value(amount, quantity);
        match self {
            Self::Amount => amount,
            Self::Quantity => quantity.map(|q| q as f64),
            Self::Number(n) => Some(f64::from(*n)),
            Self::Sum(a, b) => plain(of(a)? + of(b)?),
            Self::Difference(a, b) => plain(of(a)? - of(b)?),
            Self::Product(a, b) => plain(of(a)? * of(b)?),
            Self::Quotient(a, b) => plain(of(a)? / of(b)?),
            Self::NullIf(a, b) => of(a).filter(|a| of(b).is_none_or(|b| a.total_cmp(&b).is_ne())),
            Self::Coalesce(a, b) => of(a).or_else(|| of(b)),
            Self::IfLess(a, b, c) => {
                if of(a)?.total_cmp(&of(b)?).is_lt() {
                    of(c)
                } else {
                    None
                }
            }
        }
    }
}

/// A float as a column holds it.
fn plain(value: f64) -> Option<f64> {
    value.is_finite().then_some(value + 0.0)
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![Just(Tree::Amount), Just(Tree::Quantity), (-3..4i32).prop_map(Tree::Number)];
    leaf.prop_recursive(4, 24, 3, |inner| {
        let pair = (inner.clone(), inner.clone()).prop_map(|(a, b)| (Box::new(a), Box::new(b)));
        prop_oneof![
            pair.clone().prop_map(|(a, b)| Tree::Sum(a, b)),
            pair.clone().prop_map(|(a, b)| Tree::Difference(a, b)),
            pair.clone().prop_map(|(a, b)| Tree::Product(a, b)),
            pair.clone().prop_map(|(a, b)| Tree::Quotient(a, b)),
            pair.clone().prop_map(|(a, b)| Tree::NullIf(a, b)),
            pair.clone().prop_map(|(a, b)| Tree::Coalesce(a, b)),
            (pair, inner).prop_map(|((a, b), c)| Tree::IfLess(a, b, Box::new(c))),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn agrees_with_the_plainest_evaluation(
        tree in tree(),
        rows in prop::collection::vec((prop::option::of(-4..4i32), prop::option::of(-3..4i64)), 1..12),
    ) {
        let rows: Vec<_> = rows.into_iter().map(|(a, q)| (a.map(|a| f64::from(a) / 2.0), q, None)).collect();
        let expression = Expression::compile(&tree.sql(), &columns()).unwrap();
        let found = expression.evaluate_rows(&batch(&rows)).unwrap();
        prop_assert!(found.failed.is_empty());
        let found: Vec<_> = found.values.as_primitive::<Float64Type>().iter().collect();
        let expected: Vec<_> = rows.iter().map(|r| tree.value(r.0, r.1)).collect();
        prop_assert_eq!(found, expected, "{}", tree.sql());
    }

    #[test]
    fn no_text_panics(sql in "[ -~äß\n]{0,60}") {
        if let Err(errors) = Expression::compile_all(&sql, &columns()) {
            prop_assert!(!errors.is_empty());
            for error in errors {
                prop_assert!(sql.get(error.span).is_some());
            }
        }
    }
}
