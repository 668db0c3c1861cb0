use std::path::Path;

use proptest::prelude::*;
use rstest::rstest;

use super::*;

#[derive(Deserialize)]
struct Vectors {
    window_rows: u64,
    times: Vec<i64>,
    values: indexmap::IndexMap<String, Vec<Option<f64>>>,
    profile: Profile,
}

fn vectors() -> Vectors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/profile/vectors.json");
    sonic_rs::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn build(vectors: &Vectors) -> Profile {
    let mut builder = ProfileBuilder::new(vectors.values.keys(), vectors.window_rows);
    for (row, time) in vectors.times.iter().enumerate() {
        let values: Vec<f64> = vectors.values.values().map(|column| column[row].unwrap_or(f64::NAN)).collect();
        builder.push(*time, &values);
    }
    builder.finish()
}

#[test]
fn the_builder_makes_what_the_python_rule_makes() {
    let vectors = vectors();
    let mut built = build(&vectors);
    built.check().unwrap();
    for (built, expected) in built.columns.iter_mut().zip(&vectors.profile.columns) {
        let (actual, wanted) = (built.design_effect, expected.design_effect);
        assert!((actual - wanted).abs() <= 1e-9 * wanted, "{}: design effect {actual}, not {wanted}", built.name);
        built.design_effect = wanted;
    }
    assert_eq!(built, vectors.profile);
}

#[test]
fn a_profile_survives_its_file_to_the_last_bit() {
    let profile = build(&vectors());
    let read = Profile::parse(profile.to_json().as_bytes(), "test").unwrap();
    assert_eq!(read, profile);
}

#[test]
fn values_beyond_a_discrete_reference_have_bins_of_their_own() {
    let profile = build(&vectors());
    let constant = profile.column("constant").unwrap();
    assert_eq!((constant.bin(0.1), constant.bin(0.0), constant.bin(0.2)), (1, 0, 2));
    assert_eq!(constant.to_cells(&[3, 5, 7], 1), [3, 5, 7, 1]);
}

#[test]
fn medians_are_upper_edges() {
    let column = build(&vectors()).column("counts").unwrap().clone();
    assert_eq!(column.median(column.counts()), Some(1.0));
    let mut above = vec![0; column.counts().len()];
    assert_eq!(column.median(&above), None);
    *above.last_mut().unwrap() = 9;
    assert_eq!(column.median(&above), column.edges().last().copied());
}

const GOOD: &str = r#"{"format":1,"rows":10,"from":5,"to":9,"window_rows":2,"columns":[
    {"name":"a","edges":[1.0,2.0],"counts":[3,4,2],"missing":1,"psi_edges":[0,1],"design_effect":1.0}]}"#;

#[rstest]
#[case::format(r#""format":1"#, r#""format":2"#, "format: 2 is unknown")]
#[case::nothing(r#""rows":10"#, r#""rows":0"#, "rows: an empty reference")]
#[case::range(r#""to":9"#, r#""to":4"#, "from: 5 is after 'to', 4")]
#[case::order("[1.0,2.0]", "[1.0,1.0]", "columns[0] 'a'.edges[1]: 1 is not above the edge before it, 1")]
#[case::count("[3,4,2]", "[3,6]", "columns[0] 'a'.counts: 2 of them; 2 edges make 3 bins")]
#[case::sum("[3,4,2]", "[3,4,3]", "columns[0] 'a'.counts: with the missing ones they add up to 11, not to 'rows', 10")]
#[case::overflow("[3,4,2]", "[18446744073709551615,4,2]", "add up to more than 2^64")]
#[case::cell("[0,1]", "[0,2]", "columns[0] 'a'.psi_edges[1]: 2 is not the index of one of 2 edges")]
#[case::cell_order("[0,1]", "[1,0]", "columns[0] 'a'.psi_edges[1]: 0 does not follow")]
#[case::effect(r#""design_effect":1.0"#, r#""design_effect":0.5"#, "columns[0] 'a'.design_effect: 0.5 is not")]
#[case::field(r#""missing":1,"#, "", "missing field `missing`")]
#[case::text("10,", "10", "is not a profile")]
fn a_bad_profile_is_refused_with_its_place(#[case] part: &str, #[case] by: &str, #[case] message: &str) {
    Profile::parse(GOOD.as_bytes(), "p.json").unwrap();
    let error = Profile::parse(GOOD.replacen(part, by, 1).as_bytes(), "p.json").unwrap_err().to_string();
    assert!(error.contains("p.json") && error.contains(message), "{error}");
}

#[test]
fn two_columns_of_one_name_are_refused() {
    let column = GOOD.split_once("[\n").unwrap().1.trim_end_matches("]}");
    let twice = GOOD.replace("}]}", &format!("}},{column}]}}"));
    let error = Profile::parse(twice.as_bytes(), "p.json").unwrap_err().to_string();
    assert!(error.contains("columns[1] 'a': another column has the same name"), "{error}");
}

#[test]
fn profiles_with_other_edges_are_not_merged() {
    let mut profile = Profile::parse(GOOD.as_bytes(), "a").unwrap();
    let other = Profile::parse(GOOD.replace("2.0]", "3.0]").as_bytes(), "b").unwrap();
    let before = profile.clone();
    assert_eq!(
        profile.merge(&other).unwrap_err().to_string(),
        "profiles cannot be merged: edges of 'a'; only profiles with the same frozen edges can"
    );
    assert_eq!(profile, before);
}

proptest! {
    #[test]
    fn a_bin_is_the_number_of_edges_below(
        mut edges in proptest::collection::vec(-100.0..100.0_f64, 0..40), value in -110.0..110.0_f64,
    ) {
        edges.sort_by(f64::total_cmp);
        edges.dedup();
        for value in edges.iter().copied().chain([value]) {
            prop_assert_eq!(bin(&edges, value), edges.iter().filter(|edge| **edge < value).count());
        }
    }

    #[test]
    fn merging_is_symmetric_and_counts_every_row_once(
        a in proptest::collection::vec(0..6_i32, 1..200), b in proptest::collection::vec(0..6_i32, 1..200),
    ) {
        // All six values in both, so that both have the same edges; cells taken over, as frozen ones are.
        let of = |values: &[i32]| {
            let mut builder = ProfileBuilder::new(["x"], 1);
            for (time, value) in (0..6).chain(values.iter().copied()).enumerate() {
                builder.push(time as i64, &[f64::from(value)]);
            }
            builder.finish()
        };
        let (left, mut right) = (of(&a), of(&b));
        let column = &mut right.columns[0];
        column.cell_ends.clone_from(&left.columns[0].cell_ends);
        column.cells = merge_bins(&column.cell_ends, &column.counts, column.missing);
        let (mut ab, mut ba) = (left.clone(), right.clone());
        ab.merge(&right).unwrap();
        ba.merge(&left).unwrap();
        prop_assert!((ab.columns[0].design_effect - ba.columns[0].design_effect).abs() < 1e-12);
        ba.columns[0].design_effect = ab.columns[0].design_effect;
        prop_assert_eq!(&ab, &ba);
        prop_assert!(ab.check().is_ok());
        prop_assert_eq!(ab.rows, (a.len() + b.len() + 12) as u64);
    }

    #[test]
    fn any_column_has_a_profile_that_holds(
        values in proptest::collection::vec(prop_oneof![Just(f64::NAN), Just(0.0), -1e6..1e6_f64, Just(f64::INFINITY)], 1..600),
    ) {
        let mut builder = ProfileBuilder::new(["x"], 50);
        for (time, value) in values.iter().enumerate() {
            builder.push(time as i64, &[*value]);
        }
        let profile = builder.finish();
        prop_assert!(profile.check().is_ok(), "{:?}", profile.check());
        let read = Profile::parse(profile.to_json().as_bytes(), "test").unwrap();
        prop_assert_eq!(read, profile);
    }
}
