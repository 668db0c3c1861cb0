use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn close(actual: f64, expected: f64, relative: f64) {
    let error = (actual - expected).abs();
    assert!(error <= relative * expected.abs().max(f64::MIN_POSITIVE), "{actual} is not {expected}");
}

/// x, degrees, noncentrality, ln of the survival function, ln of the density. A difference of 1e-9 between logarithms is
/// one of 1e-9, relative, between the values.
///
/// 60-digit mpmath: the sf as the sum over j of exp(−h) h^j/j! · gammainc(k/2 + j, x/2, inf, regularized=True) with
/// h = λ/2; the density as log(besseli(k/2 − 1, sqrt(λ x))) − (x + λ)/2 + (k/4 − 1/2) log(x/λ) − log(2).
/// `scipy.stats.ncx2.logsf` agrees wherever it is finite.
const NONCENTRAL: [(f64, f64, f64, f64, f64); 17] = [
    (1.0, 1.0, 0.5, -0.8469909317303637, -1.4373572109963269),
    (19.0, 19.0, 18.2, -0.023485887930604347, -4.848870241082584),
    (37.0, 19.0, 18.2, -0.7468536128786739, -3.276499831967392),
    (101.0, 19.0, 18.2, -12.392271181933182, -13.780551412076704),
    (60.0, 9.0, 20.0, -5.373109933796696, -6.9966404170621646),
    (5.0, 2.0, 0.001, -2.4987507025959452, -3.192397570968071),
    (300.0, 19.0, 100.0, -24.915025279543563, -26.523548216575502),
    (1200.0, 19.0, 1000.0, -5.804863276741549, -8.924440318144855),
    (800.0, 19.0, 1000.0, -0.00013667218381356713, -11.571618004513043),
    (2500.0, 19.0, 1000.0, -168.5838279913056, -170.28474589053306),
    (10400.0, 19.0, 10000.0, -3.5303637524545546, -8.02487612489259),
    (0.01, 3.0, 4.0, -3.603050515139903e-05, -5.219865825913492),
    (2000.0, 4.0, 50.0, -710.5538553909387, -711.4192990704441),
    (900.0, 19.0, 18.2, -317.9997390731475, -318.85681635484127),
    (25000.0, 19.0, 200.0, -10348.108921714662, -10348.896115219743),
    (1000000.0, 19.0, 100000.0, -233769.319016466, -233770.392305078),
    (1.0, 40.0, 3.0, -5.631461647746556e-26, -55.165361204679485),
];

#[test]
fn noncentral_chi_square_equals_the_reference_even_in_the_far_tail() {
    for (x, degrees, noncentrality, ln_sf, ln_pdf) in NONCENTRAL {
        let sf = noncentral_chi_square_ln_sf(x, degrees, noncentrality);
        assert!((sf - ln_sf).abs() <= 1e-9, "ln sf({x}, {degrees}, {noncentrality}) = {sf}, not {ln_sf}");
        let pdf = noncentral_chi_square_ln_pdf(x, degrees, noncentrality);
        assert!((pdf - ln_pdf).abs() <= 1e-9, "ln pdf({x}, {degrees}, {noncentrality}) = {pdf}, not {ln_pdf}");
    }
}

/// mpmath: log(gammainc(k/2, x/2, inf, regularized=True)).
#[rstest]
#[case(1.0, 1.0, -1.1478744644493182)]
#[case(30.0, 19.0, -2.9603948812591976)]
#[case(400.0, 19.0, -166.6104355172517)]
#[case(2000.0, 3.0, -996.4248404973332)]
#[case(5.0, 40.0, -3.480448752122335e-12)]
#[case(100000.0, 19.0, -49919.72104799226)]
fn without_noncentrality_it_is_the_central_distribution(#[case] x: f64, #[case] degrees: f64, #[case] ln_sf: f64) {
    let actual = noncentral_chi_square_ln_sf(x, degrees, 0.0);
    assert!((actual - ln_sf).abs() <= 1e-9, "{actual} is not {ln_sf}");
}

/// `scipy.stats.chi2.isf(p, k)`.
#[rstest]
#[case(1e-3, 19.0, 43.82019596451753)]
#[case(1e-4, 19.0, 50.795489665621886)]
#[case(0.05, 1.0, 3.8414588206941285)]
#[case(1e-3, 9.0, 27.877164871256575)]
fn upper_quantiles_equal_scipy(#[case] tail: f64, #[case] degrees: f64, #[case] expected: f64) {
    close(chi_square_upper_quantile(tail, degrees), expected, 1e-9);
}

/// `scipy.stats.kstwobign.sf(t)`.
#[rstest]
#[case(0.3, 0.9999906941986655)]
#[case(0.5, 0.9639452436648751)]
#[case(0.8, 0.5441424115741981)]
#[case(1.0, 0.26999967167735456)]
#[case(1.17, 0.12939004218561884)]
#[case(1.19, 0.11774229287977166)]
#[case(1.5, 0.022217962616525127)]
#[case(2.5, 7.453306344157342e-06)]
#[case(5.0, 3.8574996959278356e-22)]
#[case(10.0, 2.767793053473475e-87)]
fn kolmogorovs_distribution_equals_scipy(#[case] t: f64, #[case] expected: f64) {
    close(kolmogorov_smirnov_p(t / 10.0, 100.0), expected, 1e-9);
}

const A: [u64; 5] = [120, 80, 200, 60, 40];
const B: [u64; 5] = [30, 25, 60, 10, 25];

#[test]
fn distances_equal_scipy() {
    // scipy.stats.chi2_contingency([A, B], correction=False)[0]
    assert_eq!(chi_square(&A, &B).degrees, 4);
    close(chi_square(&A, &B).statistic, 12.546031746031744, 1e-9);
    // p = A / 500, q = B / 150: sum((p − q) log(p / q)); max |cumsum(p) − cumsum(q)|
    close(psi(&A, &B), 0.10252429287029025, 1e-9);
    close(kolmogorov_smirnov(&A, &B), 0.08666666666666667, 1e-9);
    // scipy.spatial.distance.jensenshannon(A, B, base=2)
    close(jensen_shannon(&A, &B), 0.13474546157508388, 1e-9);
    // scipy.stats.wasserstein_distance(e, e, A, B), e = [1, 2.5, 4, 7, 7]
    close(wasserstein(&[1.0, 2.5, 4.0, 7.0], &A, &B), 0.21000000000000002, 1e-9);
}

#[test]
fn empty_bins_are_floored_in_psi_and_skipped_in_jensen_shannon() {
    let (a, b) = ([120, 80, 0, 0, 40], [30, 25, 60, 0, 25]);
    // The same expressions with p, q floored at 1e-4 for PSI.
    close(psi(&a, &b), 3.922826528557555, 1e-9);
    close(jensen_shannon(&a, &b), 0.5234235818260091, 1e-9);
}

#[rstest]
#[case::nothing_to_compare(&[100, 100], &[0, 0], 0)]
#[case::one_cell(&[100], &[100], 0)]
#[case::all_too_sparse(&[3, 4], &[4, 3], 0)]
#[case::sparse_ends_are_pooled(&[1, 100, 100, 2], &[1, 100, 100, 1], 1)]
#[case::empty_in_both(&[100, 0, 100], &[100, 0, 100], 1)]
#[case::unseen_in_the_reference(&[100, 100, 0], &[90, 90, 20], 2)]
fn sparse_cells_are_pooled(#[case] a: &[u64], #[case] b: &[u64], #[case] degrees: u32) {
    let result = chi_square(a, b);
    assert_eq!(result.degrees, degrees);
    assert!(result.statistic.is_finite());
}

#[test]
fn pooled_cells_give_the_statistic_of_the_pooled_table() {
    assert_eq!(
        chi_square(&[1, 119, 80, 200, 1, 1], &[1, 29, 25, 60, 1, 1]),
        chi_square(&[120, 80, 202], &[30, 25, 62])
    );
}

fn histograms() -> impl Strategy<Value = (Vec<u64>, Vec<u64>)> {
    (1..24_usize).prop_flat_map(|bins| {
        (proptest::collection::vec(0..5000_u64, bins), proptest::collection::vec(0..5000_u64, bins))
    })
}

proptest! {
    #[test]
    fn distances_are_symmetric_and_within_their_bounds((a, b) in histograms()) {
        prop_assert!(psi(&a, &b) >= 0.0);
        prop_assert!((psi(&a, &b) - psi(&b, &a)).abs() < 1e-9);
        prop_assert!((0.0..=1.0 + 1e-12).contains(&jensen_shannon(&a, &b)));
        prop_assert!((jensen_shannon(&a, &b) - jensen_shannon(&b, &a)).abs() < 1e-9);
        prop_assert!((0.0..=1.0).contains(&kolmogorov_smirnov(&a, &b)));
        let edges: Vec<f64> = (0..a.len().saturating_sub(1)).map(|i| i as f64).collect();
        prop_assert!((wasserstein(&edges, &a, &b) - wasserstein(&edges, &b, &a)).abs() < 1e-9);
        let (ab, ba) = (chi_square(&a, &b), chi_square(&b, &a));
        prop_assert_eq!(ab.degrees, ba.degrees);
        prop_assert!((ab.statistic - ba.statistic).abs() <= 1e-9 * ab.statistic.abs().max(1.0));
    }

    #[test]
    fn equal_shares_are_no_distance(a in proptest::collection::vec(1..5000_u64, 1..24), times in 1..9_u64) {
        let b: Vec<u64> = a.iter().map(|count| count * times).collect();
        prop_assert!(psi(&a, &b) < 1e-9);
        prop_assert!(jensen_shannon(&a, &b) < 1e-7);
        prop_assert!(kolmogorov_smirnov(&a, &b) < 1e-9);
        prop_assert!(chi_square(&a, &b).statistic < 1e-6);
    }

    #[test]
    fn survival_falls_with_x_and_rises_with_noncentrality(
        x in 0.0..3000.0_f64, more in 0.0..500.0_f64, degrees in 1..40_u32, noncentrality in 0.0..1000.0_f64,
    ) {
        let k = f64::from(degrees);
        let here = noncentral_chi_square_ln_sf(x, k, noncentrality);
        prop_assert!(here <= 0.0 && here.is_finite());
        prop_assert!(noncentral_chi_square_ln_sf(x + more, k, noncentrality) <= here + 1e-9);
        prop_assert!(noncentral_chi_square_ln_sf(x, k, noncentrality + more) >= here - 1e-9);
    }
}
