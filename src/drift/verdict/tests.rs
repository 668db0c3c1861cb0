use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Binomial, Distribution, StandardNormal};
use rstest::rstest;

use super::super::profile::ProfileBuilder;
use super::*;

const RULE: Rule = Rule { alpha: 0.05, horizon_windows: 200, tolerance: 0.02, resolve_after: 3 };
const COLUMNS: usize = 50;
const WINDOWS: u64 = 200;

type Draw = fn(&mut ChaCha8Rng) -> f64;

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(rng)
}

fn skewed(rng: &mut ChaCha8Rng) -> f64 {
    (1.5 * normal(rng)).exp()
}

fn heavy_tailed(rng: &mut ChaCha8Rng) -> f64 {
    normal(rng) / normal(rng)
}

fn discrete(rng: &mut ChaCha8Rng) -> f64 {
    rand_distr::Poisson::new(1.3).unwrap().sample(rng)
}

/// A profile of `COLUMNS` columns whose rows come from `row`.
fn reference(rows: u64, window_rows: u64, mut row: impl FnMut(&mut [f64])) -> Profile {
    let mut builder = ProfileBuilder::new((0..COLUMNS).map(|column| format!("f{column}")), window_rows);
    let mut values = vec![0.0; COLUMNS];
    for time in 0..rows {
        row(&mut values);
        builder.push(time as i64, &values);
    }
    builder.finish()
}

/// Probability of each cell of a column, from a large sample.
fn shares(rng: &mut ChaCha8Rng, column: &ColumnProfile, draw: impl Fn(&mut ChaCha8Rng) -> f64) -> Vec<f64> {
    const DRAWS: u32 = 100_000;
    let mut counts = vec![0; column.counts().len()];
    for _ in 0..DRAWS {
        counts[column.bin(draw(rng))] += 1;
    }
    column.to_cells(&counts, 0).iter().map(|count| *count as f64 / f64::from(DRAWS)).collect()
}

fn multinomial(rng: &mut ChaCha8Rng, rows: u64, shares: &[f64]) -> Vec<u64> {
    let (mut left, mut share_left) = (rows, 1.0_f64);
    let last = shares.iter().rposition(|share| *share > 0.0).unwrap();
    let draw = |(cell, share): (usize, &f64)| {
        let p = if cell == last { 1.0 } else { (share / share_left.max(1e-12)).clamp(0.0, 1.0) };
        let count = Binomial::new(left, p).unwrap().sample(rng);
        left -= count;
        share_left -= share;
        count
    };
    shares.iter().enumerate().map(draw).collect()
}

/// Number of the first window that raises an alarm.
fn first_alarm(windows: u64, mut samples: impl FnMut() -> Vec<Sample>) -> Option<u64> {
    let mut judge = Judge::new(COLUMNS);
    (1..=windows).find(|window| judge.window(&RULE, &samples(), *window as i64).iter().any(|verdict| verdict.joined))
}

/// A run over independent rows: the first column is shifted by `shift`.
fn run(rng: &mut ChaCha8Rng, rows: u64, window: u64, draw: Draw, shift: f64) -> Option<u64> {
    let profile = reference(rows, window, |row| row.iter_mut().for_each(|value| *value = draw(rng)));
    let columns = profile.columns().iter().enumerate();
    let shares: Vec<Vec<f64>> = columns
        .map(|(place, column)| shares(rng, column, |rng| draw(rng) + if place == 0 { shift } else { 0.0 }))
        .collect();
    first_alarm(WINDOWS, || {
        let columns = profile.columns().iter().zip(&shares);
        columns
            .map(|(column, shares)| Sample::new(&RULE, COLUMNS, &profile, column, &multinomial(rng, window, shares)))
            .collect()
    })
}

/// A run over an autoregressive process of order 1.
fn run_autocorrelated(rng: &mut ChaCha8Rng, rows: u64, window: u64, correlation: f64) -> Option<u64> {
    let spread = (1.0 - correlation * correlation).sqrt();
    let mut state: Vec<f64> = (0..COLUMNS).map(|_| normal(rng)).collect();
    let mut step = |state: &mut [f64]| state.iter_mut().for_each(|x| *x = correlation * *x + spread * normal(rng));
    let profile = reference(rows, window, |row| {
        step(&mut state);
        row.copy_from_slice(&state);
    });
    first_alarm(WINDOWS, || {
        let mut counts: Vec<Vec<u64>> = profile.columns().iter().map(|column| vec![0; column.counts().len()]).collect();
        for _ in 0..window {
            step(&mut state);
            for ((value, column), counts) in state.iter().zip(profile.columns()).zip(&mut counts) {
                counts[column.bin(*value)] += 1;
            }
        }
        let columns = profile.columns().iter().zip(&counts);
        columns
            .map(|(column, counts)| Sample::new(&RULE, COLUMNS, &profile, column, &column.to_cells(counts, 0)))
            .collect()
    })
}

#[rstest]
#[case::small_reference(normal, 5_000, 5_000)]
#[case::large_window(skewed, 2_000, 20_000)]
#[case::small_window(heavy_tailed, 5_000, 200)]
#[case::discrete_values(discrete, 10_000, 1_000)]
fn runs_without_drift_raise_no_alarm(#[case] draw: Draw, #[case] rows: u64, #[case] window: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(rows + window);
    for _ in 0..4 {
        assert_eq!(run(&mut rng, rows, window, draw, 0.0), None);
    }
}

#[test]
fn autocorrelated_runs_without_drift_raise_no_alarm() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    assert_eq!(run_autocorrelated(&mut rng, 10_000, 1_000, 0.9), None);
    assert_eq!(run_autocorrelated(&mut rng, 10_000, 500, 0.7), None);
}

/// The budget itself, over enough runs to tell 5 % from less. Takes minutes: `cargo test --release -- --ignored budget`.
#[test]
#[ignore = "takes minutes"]
fn the_budget_holds_over_many_runs() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let draws: [Draw; 4] = [normal, skewed, heavy_tailed, discrete];
    for (rows, window) in
        [(5_000, 5_000), (2_000, 20_000), (20_000, 2_000), (10_000, 1_000), (5_000, 100), (1_000, 1_000)]
    {
        let alarms = (0..100).filter(|run_of| run(&mut rng, rows, window, draws[run_of % 4], 0.0).is_some()).count();
        assert!(alarms <= 5, "{alarms} of 100 runs with {rows} reference rows and windows of {window}");
    }
    for (rows, window, correlation) in
        [(10_000, 1_000, 0.5), (10_000, 1_000, 0.9), (20_000, 1_000, 0.9), (5_000, 1_000, 0.7)]
    {
        let alarms = (0..60).filter(|_| run_autocorrelated(&mut rng, rows, window, correlation).is_some()).count();
        assert!(alarms <= 3, "{alarms} of 60 runs with {rows} rows, windows of {window}, correlation {correlation}");
    }
}

#[test]
fn a_shift_of_0_3_sigma_is_found_within_three_windows() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let found: Vec<_> = (0..6).map(|_| run(&mut rng, 20_000, 1_000, normal, 0.3)).collect();
    assert!(found.iter().all(|window| window.is_some_and(|window| window <= 3)), "found in windows {found:?}");
}

#[test]
fn a_shift_within_the_tolerance_is_no_drift_however_large_the_windows() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    assert_eq!(run(&mut rng, 10_000, 100_000, normal, 0.05), None);
}

fn sample(statistic: f64, degrees: u32) -> Sample {
    Sample { test: Homogeneity { statistic, degrees }, effective_size: 1000.0, tolerance: 0.02, design_effect: 1.0 }
}

#[test]
fn evidence_starts_a_drift_and_quiet_windows_end_it() {
    let mut judge = Judge::new(2);
    let mut window = |first: f64, from: i64| judge.window(&RULE, &[sample(first, 19), sample(20.0, 19)], from);
    assert!(window(20.0, 10).iter().all(|verdict| !verdict.drifted && verdict.quiet && verdict.since.is_none()));

    let found = window(300.0, 20);
    assert!(found[0].joined && found[0].drifted && !found[1].drifted);
    assert_eq!((found[0].since, found[1].since), (Some(20), None));
    let goes_on = window(300.0, 30);
    assert!(goes_on[0].drifted && !goes_on[0].joined);

    // Two quiet windows, a loud one, then three quiet ones.
    assert!(window(20.0, 40)[0].drifted && window(20.0, 50)[0].drifted && window(300.0, 60)[0].drifted);
    assert!(window(20.0, 70)[0].drifted && window(20.0, 80)[0].drifted);
    let cleared = window(20.0, 90)[0];
    assert!(cleared.cleared && !cleared.drifted);
    assert_eq!((cleared.ln_e_value, cleared.since), (f64::NEG_INFINITY, None));
    assert!(window(300.0, 100)[0].joined);
}

#[test]
fn with_nothing_to_compare_no_evidence_gathers() {
    let mut judge = Judge::new(1);
    for from in 0..1000 {
        let verdict = judge.window(&RULE, &[sample(0.0, 0)], from)[0];
        assert!(!verdict.drifted && verdict.quiet && verdict.ln_e_value == f64::NEG_INFINITY);
    }
}

#[test]
fn evidence_stays_finite_and_survives_its_json() {
    let mut judge = Judge::new(1);
    for from in 0..50 {
        judge.window(&RULE, &[sample(1e6, 19)], from);
    }
    let json = sonic_rs::to_string(&judge).unwrap();
    assert_eq!(sonic_rs::from_str::<Judge>(&json).unwrap(), judge);
    assert!(judge.window(&RULE, &[sample(1e6, 19)], 50)[0].ln_e_value.is_finite());
}

/// The integral of each likelihood ratio against the density of the statistic under a true PSI, by the trapezoid rule.
fn expectations(degrees: u32, psi: f64) -> [f64; ALTERNATIVES.len()] {
    let mut sums = [0.0; ALTERNATIVES.len()];
    let step = 0.5;
    for i in 1..4000 {
        let x = f64::from(i) * step;
        let density = noncentral_chi_square_ln_pdf(x, f64::from(degrees), 1000.0 * psi);
        for (sum, ln_ratio) in sums.iter_mut().zip(sample(x, degrees).ln_ratios()) {
            *sum += (density + ln_ratio).exp() * step;
        }
    }
    sums
}

#[rstest]
#[case(9)]
#[case(19)]
fn likelihood_ratios_are_e_values(#[case] degrees: u32) {
    for at_border in expectations(degrees, 0.02) {
        assert!((at_border - 1.0).abs() < 1e-6, "{at_border}");
    }
    for inside in expectations(degrees, 0.01) {
        assert!(inside < 1.0, "{inside}");
    }
    assert!(expectations(degrees, 0.04)[1] > 2.0);
}

#[rstest]
#[case::none(&[1.0, 2.0, 3.0], &[])]
#[case::one_needs_k_over_alpha(&[61.0, 2.0, 3.0], &[0])]
#[case::just_below(&[59.0, 2.0, 3.0], &[])]
#[case::two_help_each_other(&[31.0, 2.0, 30.5], &[0, 2])]
#[case::all(&[20.0, 20.0, 20.0], &[0, 1, 2])]
fn e_bh_rejects_the_largest(#[case] e_values: &[f64], #[case] rejected: &[usize]) {
    let ln: Vec<f64> = e_values.iter().map(|e| e.ln() + 1e-12).collect();
    let mut found = e_bh(&ln, 0.05);
    found.sort_unstable();
    assert_eq!(found, rejected);
}
