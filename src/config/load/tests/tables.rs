//! Tables in pipeline.toml.

use super::*;
use crate::config::plan::{RecordKey, TablePlan};

const TABLE: &str = r#"
[tables.profile]
topic = "churn.customers"
format = "json"
fields = { user = "string", age = "int64", "home.city" = "string", vip = "boolean", since = "timestamp" }
key = { customer_id = "user" }
event_time = { field = "since", unit = "ms" }
derive = { old = "age > 65" }
"#;

fn with_table(table: &str) -> Result<Plan, Faults> {
    load_text(&PIPELINE.replace("[derived]", &format!("{table}\n[derived]\nwise = \"not profile_vip or profile_old\"")))
}

#[test]
fn columns_are_features_before_those_of_the_groups() {
    let plan = with_table(TABLE).unwrap();
    assert_eq!(plan.sources.iter().map(|source| &*source.name).collect::<Vec<_>>(), ["profile", "purchases", "logins"]);
    let features = plan.feature_columns();
    assert_eq!(
        names(&features)[..5],
        ["profile_age", "profile_home_city", "profile_vip", "profile_old", "spend_sum_1h"]
    );
    assert_eq!(
        (plan.groups[0].name.as_str(), plan.groups[0].source, plan.score.as_ref().unwrap().on),
        ("profile", 0, 1)
    );
    assert_eq!(plan.groups.iter().map(|group| group.source).collect::<Vec<_>>(), [0, 1, 2]);
    let columns = |names: &[&str]| {
        let all = features.iter().map(|feature| feature.data_type);
        names.iter().zip(all).map(|(name, data_type)| Column { name: (*name).into(), data_type }).collect::<Vec<_>>()
    };
    let table = TablePlan {
        columns: columns(&["age", "home.city", "vip", "old"]),
        record_time: false,
        record_key: RecordKey::Text,
    };
    assert_eq!(plan.sources[0].table.as_ref(), Some(&table));
    assert_ne!(plan.definition, load_text(PIPELINE).unwrap().definition);

    let some = with_table(&TABLE.replace("derive", "columns = [\"vip\", \"old\"]\nderive")).unwrap();
    assert_eq!(names(&some.feature_columns())[..3], ["profile_vip", "profile_old", "spend_sum_1h"]);
    let by_record = with_table(&TABLE.replace("event_time = { field = \"since\", unit = \"ms\" }", "")).unwrap();
    assert!(by_record.sources[0].event_time.is_empty() && by_record.sources[0].table.as_ref().unwrap().record_time);
    assert!(names(&by_record.feature_columns()).contains(&"profile_since"), "it is a fact like any other");
}

#[rstest]
#[case("columns = [\"age\", \"aeg\", \"age\", \"user\"]", &[
    "`profile` has no field `aeg` (did you mean `age`?)",
    "`age` is listed twice",
    "`user` is no fact but the table's key or event time (a row has its entity's keys and its event time anyway)",
])]
#[case("record_key = \"long\"", &[
    "such a key is an integer, and the join key is not (with record_key = \"json\" it is an object with the fields of the join keys)",
])]
#[case("where = \"age\"", &["a condition has to be true or false, but this is of type int64 (compare it with something: … > 0)"])]
#[case("idle_after = \"0s\"", &["the duration has to be longer than nothing"])]
fn faults_within_a_table(#[case] line: &str, #[case] expected: &[&str]) {
    let found = lines(with_table(&format!("{TABLE}{line}\n")));
    assert_eq!(found.iter().map(|line| line.split_once(' ').unwrap().1).collect::<Vec<_>>(), expected);
}

#[rstest]
#[case(
    "topic = \"churn.customers\"",
    "topic = \"churn.purchases\"",
    "topic `churn.purchases` is read twice (table `profile` reads it already; give that one what both need)"
)]
#[case("[tables.profile]", "[tables.spend]", "`spend` is the name of a table, whose columns are features, too")]
#[case("[tables.profile]", "[tables.logins]", "`logins` is the name of a source, too")]
fn names_and_topics_are_taken_once(#[case] from: &str, #[case] to: &str, #[case] expected: &str) {
    let text = PIPELINE.replace("[derived]", &format!("{}\n[derived]", TABLE.replace(from, to)));
    assert!(lines(load_text(&text)).iter().any(|line| line.ends_with(expected)), "{:?}", lines(load_text(&text)));
}

#[test]
fn tables_have_no_windows() {
    let text = PIPELINE
        .replace("source = \"logins\"", "source = \"profile\"")
        .replace("[derived]", &format!("{TABLE}\n[derived]"));
    let found = lines(load_text(&text));
    assert!(
        found[0].ends_with(
            "`profile` is a table: it has no windows (its columns are features already: `profile_<column>`)"
        ),
        "{found:?}"
    );
    let asking =
        PIPELINE.replace("on = \"purchases\"", "on = \"profile\"").replace("[derived]", &format!("{TABLE}\n[derived]"));
    assert!(lines(load_text(&asking))[0].contains("unknown source `profile`"));
}
