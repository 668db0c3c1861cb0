//! Statistics of two histograms over the same bins, and the distributions that their p-values need.
//!
//! Counts go in, numbers come out: nothing here knows of windows, columns or time. Probabilities that may be far smaller
//! than the smallest double are answered as natural logarithms.

use std::f64::consts::PI;

use statrs::function::gamma::ln_gamma;

/// Shares below this count as this in [`psi`], so that an empty bin costs much and not everything.
pub const PSI_FLOOR: f64 = 1e-4;

/// Least expected count of a cell of [`chi_square`], in either sample: Cochran's rule.
const LEAST_EXPECTED: f64 = 5.0;

/// Result of a two-sample χ² test of homogeneity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Homogeneity {
    /// The statistic; 0 where no two cells are left to compare.
    pub statistic: f64,
    /// Degrees of freedom: cells after pooling, less one.
    pub degrees: u32,
}

/// Population stability index of two histograms, natural logarithm: Σ (p − q) ln(p / q). Symmetric, at least 0.
///
/// Shares are floored at [`PSI_FLOOR`]. 0 where either histogram is empty.
pub fn psi(a: &[u64], b: &[u64]) -> f64 {
    let (total_a, total_b) = (total(a), total(b));
    if total_a == 0.0 || total_b == 0.0 {
        return 0.0;
    }
    a.iter().zip(b).map(|(&a, &b)| (a as f64 / total_a, b as f64 / total_b)).map(psi_term).sum()
}

fn psi_term((p, q): (f64, f64)) -> f64 {
    let (p, q) = (p.max(PSI_FLOOR), q.max(PSI_FLOOR));
    (p - q) * (p / q).ln()
}

/// Jensen-Shannon distance of two histograms: the square root of the divergence in base 2, so between 0 and 1.
///
/// Equals `scipy.spatial.distance.jensenshannon(a, b, base=2)`. 0 where either histogram is empty.
pub fn jensen_shannon(a: &[u64], b: &[u64]) -> f64 {
    let (total_a, total_b) = (total(a), total(b));
    if total_a == 0.0 || total_b == 0.0 {
        return 0.0;
    }
    let towards = |p: f64, middle: f64| if p > 0.0 { p * (p / middle).log2() } else { 0.0 };
    let divergence: f64 = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| {
            let (p, q) = (a as f64 / total_a, b as f64 / total_b);
            let middle = (p + q) / 2.0;
            towards(p, middle) + towards(q, middle)
        })
        .sum();
    (divergence / 2.0).max(0.0).sqrt()
}

/// Wasserstein distance (earth mover's, order 1) of two histograms over `edges`, in the unit of the edges.
///
/// `counts[i]` lies in (`edges[i − 1]`, `edges[i]`]; the last one above all edges. Each bin's mass stands at its upper
/// edge, the last one's at the last edge: exact where the edges are the distinct values, a lower bound where mass lies
/// beyond them. 0 where either histogram is empty.
pub fn wasserstein(edges: &[f64], a: &[u64], b: &[u64]) -> f64 {
    let (total_a, total_b) = (total(a), total(b));
    if total_a == 0.0 || total_b == 0.0 {
        return 0.0;
    }
    let (mut below_a, mut below_b) = (0, 0);
    edges
        .windows(2)
        .zip(a.iter().zip(b))
        .map(|(edge, (a, b))| {
            below_a += a;
            below_b += b;
            (below_a as f64 / total_a - below_b as f64 / total_b).abs() * (edge[1] - edge[0])
        })
        .sum()
}

/// Kolmogorov-Smirnov distance of two histograms: the largest difference of their distribution functions at the bins'
/// edges. 0 where either histogram is empty.
pub fn kolmogorov_smirnov(a: &[u64], b: &[u64]) -> f64 {
    let (total_a, total_b) = (total(a), total(b));
    if total_a == 0.0 || total_b == 0.0 {
        return 0.0;
    }
    let (mut below_a, mut below_b) = (0, 0);
    a.iter().zip(b).fold(0.0, |largest: f64, (a, b)| {
        below_a += a;
        below_b += b;
        largest.max((below_a as f64 / total_a - below_b as f64 / total_b).abs())
    })
}

/// Two-sample p-value of a Kolmogorov-Smirnov distance, for samples whose sizes have the harmonic combination
/// `effective_size` = N M / (N + M).
///
/// Kolmogorov's limiting distribution at √`effective_size` · distance, as `scipy.stats.kstwobign.sf`. Ties, and a
/// distance that is taken at bin edges only, make it too large: it errs towards no difference.
pub fn kolmogorov_smirnov_p(distance: f64, effective_size: f64) -> f64 {
    let t = effective_size.sqrt() * distance;
    if t <= 0.0 {
        return 1.0;
    }
    // Two series for one function: each converges within a few terms on its side of the change-over.
    if t < 1.18 {
        let base = (-PI * PI / (8.0 * t * t)).exp();
        let below: f64 = (0..6).map(|k| base.powi((2 * k + 1) * (2 * k + 1))).sum();
        1.0 - (2.0 * PI).sqrt() / t * below
    } else {
        let base = -2.0 * t * t;
        2.0 * (1..=6).map(|k: i32| f64::from(1 - 2 * ((k + 1) % 2)) * (base * f64::from(k * k)).exp()).sum::<f64>()
    }
}

/// Two-sample χ² test of homogeneity: did both histograms come from one distribution?
///
/// Neighbouring cells are pooled, from the first on, until each expects at least five counts in both samples; what is
/// left at the end joins the last cell. Without pooling it equals `scipy.stats.chi2_contingency([a, b], correction=False)`.
pub fn chi_square(a: &[u64], b: &[u64]) -> Homogeneity {
    let (total_a, total_b) = (total(a), total(b));
    let mut none = Homogeneity { statistic: 0.0, degrees: 0 };
    if total_a == 0.0 || total_b == 0.0 {
        return none;
    }
    let least = LEAST_EXPECTED * (total_a + total_b) / total_a.min(total_b);
    let (to_a, to_b) = ((total_b / total_a).sqrt(), (total_a / total_b).sqrt());
    let term = |(a, b): (u64, u64)| {
        let difference = to_a * a as f64 - to_b * b as f64;
        difference * difference / (a + b) as f64
    };

    // The newest full cell is held back, because the remainder may still join it.
    let mut open = (0, 0);
    let mut last = None;
    for (&a, &b) in a.iter().zip(b) {
        open = (open.0 + a, open.1 + b);
        if (open.0 + open.1) as f64 >= least {
            if let Some(last) = last.replace(open) {
                none.statistic += term(last);
                none.degrees += 1;
            }
            open = (0, 0);
        }
    }
    match last {
        Some(last) if none.degrees > 0 => {
            none.statistic += term((last.0 + open.0, last.1 + open.1));
            none
        }
        _ => Homogeneity { statistic: 0.0, degrees: 0 },
    }
}

/// Natural logarithm of the survival function of the noncentral χ² distribution: ln P(X > x).
///
/// Poisson(λ/2) mixture of central χ² distributions (Johnson, Kotz and Balakrishnan 1995, chapter 29). All terms are
/// positive and are added relative to the first, so the far tail keeps its relative precision. `degrees` > 0,
/// `noncentrality` ≥ 0.
pub fn noncentral_chi_square_ln_sf(x: f64, degrees: f64, noncentrality: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let (y, mean) = (x / 2.0, noncentrality / 2.0);
    if mean == 0.0 {
        return ln_upper_gamma(degrees / 2.0, y);
    }
    // Terms grow up to the Poisson's mean at least, and those below this start are smaller than 1e-30 of that one.
    let start = (mean - 12.0 * mean.sqrt() - 40.0).max(0.0).floor();
    let mut shape = degrees / 2.0 + start;
    let ln_q = ln_upper_gamma(shape, y);
    // Q(a + 1, y) = Q(a, y) + y^a e^−y / Γ(a + 1); `step` is that increment relative to Q(a, y).
    let mut step = (ln_poisson(shape, y) - ln_q).exp();
    let (mut term, mut sum, mut ln_scale, mut index) = (1.0_f64, 1.0_f64, 0.0_f64, start);
    loop {
        index += 1.0;
        let ratio = mean / index * (1.0 + step);
        step *= y / (shape + 1.0) / (1.0 + step);
        shape += 1.0;
        term *= ratio;
        sum += term;
        if sum > 1e250 {
            ln_scale += sum.ln();
            term /= sum;
            sum = 1.0;
        }
        // Ratios fall from here on, so a geometric series bounds what is left out.
        if ratio < 1.0 && term * ratio < 1e-17 * sum * (1.0 - ratio) {
            break;
        }
    }
    (ln_poisson(start, mean) + ln_q + sum.ln() + ln_scale).min(0.0)
}

/// Natural logarithm of the density of the noncentral χ² distribution. `x` > 0, `degrees` > 0, `noncentrality` > 0.
///
/// The same mixture as [`noncentral_chi_square_ln_sf`], summed from its largest term to both sides.
pub fn noncentral_chi_square_ln_pdf(x: f64, degrees: f64, noncentrality: f64) -> f64 {
    let (y, mean, half) = (x / 2.0, noncentrality / 2.0, degrees / 2.0);
    let product = y * mean;
    // The ratio of neighbouring terms, product / ((j + 1)(half + j)), passes 1 here.
    let mode = ((((half - 1.0) * (half - 1.0) + 4.0 * product).sqrt() - half - 1.0) / 2.0).max(0.0).ceil();
    let ratio = |index: f64| product / ((index + 1.0) * (half + index));
    let mut sum = 1.0;
    let (mut term, mut index) = (1.0, mode);
    while term > 1e-18 * sum {
        term *= ratio(index);
        index += 1.0;
        sum += term;
    }
    let (mut term, mut index) = (1.0, mode);
    while index > 0.0 && term > 1e-18 * sum {
        index -= 1.0;
        term /= ratio(index);
        sum += term;
    }
    ln_poisson(mode, mean) + ln_poisson(half - 1.0 + mode, y) + sum.ln() - std::f64::consts::LN_2
}

/// Quantile of the central χ² distribution from its upper tail: the x with P(X > x) = `tail`.
pub fn chi_square_upper_quantile(tail: f64, degrees: f64) -> f64 {
    let target = tail.ln();
    let sf = |x: f64| ln_upper_gamma(degrees / 2.0, x / 2.0);
    let mut high = degrees + 1.0;
    while sf(high) > target {
        high *= 2.0;
    }
    let mut low = 0.0;
    // Bisection to the last bit: monotone, and called once a profile.
    loop {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            return middle;
        }
        if sf(middle) > target { low = middle } else { high = middle }
    }
}

/// ln of the regularised upper incomplete gamma function Q(a, y), a > 0, y > 0.
fn ln_upper_gamma(a: f64, y: f64) -> f64 {
    // y^a e^−y / Γ(a + 1)
    let front = ln_poisson(a, y);
    if y < a + 1.0 {
        let (mut term, mut sum, mut shape) = (1.0_f64, 1.0_f64, a);
        while term > 1e-18 * sum {
            shape += 1.0;
            term *= y / shape;
            sum += term;
        }
        return (-(front + sum.ln()).exp()).ln_1p();
    }
    // Legendre's continued fraction, by the modified Lentz method.
    let tiny = f64::MIN_POSITIVE / f64::EPSILON;
    let mut b = y + 1.0 - a;
    let mut c = 1.0 / tiny;
    let mut d = 1.0 / b;
    let mut fraction = d;
    for i in 1..100_000 {
        let i = f64::from(i);
        let numerator = -i * (i - a);
        b += 2.0;
        d = numerator * d + b;
        d = 1.0 / if d.abs() < tiny { tiny } else { d };
        c = b + numerator / c;
        c = if c.abs() < tiny { tiny } else { c };
        fraction *= d * c;
        if (d * c - 1.0).abs() < 1e-16 {
            break;
        }
    }
    front + a.ln() + fraction.ln()
}

/// ln of the Poisson mass `mean`^n e^−`mean` / Γ(n + 1) at a real n > −1.
///
/// For large n the saddle-point form of Loader (2000), which keeps the precision that powers and factorials of large
/// numbers would cancel away.
fn ln_poisson(n: f64, mean: f64) -> f64 {
    if n == 0.0 {
        return -mean;
    }
    if n < 15.0 {
        return n * mean.ln() - mean - ln_gamma(n + 1.0);
    }
    let square = n * n;
    let stirling_error = (1.0 / 12.0
        - (1.0 / 360.0 - (1.0 / 1260.0 - (1.0 / 1680.0 - 1.0 / (1188.0 * square)) / square) / square) / square)
        / n;
    -stirling_error - deviance(n, mean) - (2.0 * PI * n).ln() / 2.0
}

/// n ln(n / mean) + mean − n without cancellation where the two are close.
fn deviance(n: f64, mean: f64) -> f64 {
    let difference = n - mean;
    let v = difference / (n + mean);
    if v.abs() > 0.1 {
        return n * (n / mean).ln() - difference;
    }
    // ln(n / mean) = 2 artanh v, whose first term is taken together with −difference.
    let square = v * v;
    let (mut power, mut sum, mut k) = (2.0 * n * v * square, difference * v, 3.0);
    loop {
        let next = sum + power / k;
        if next == sum {
            return sum;
        }
        sum = next;
        power *= square;
        k += 2.0;
    }
}

fn total(counts: &[u64]) -> f64 {
    counts.iter().sum::<u64>() as f64
}

#[cfg(test)]
mod tests;
