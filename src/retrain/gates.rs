//! Gates: is the candidate good enough? Metrics on held-out rows, and the decision.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::plan::GatesPlan;

/// Number of equal-mass bins of the calibration error.
const CALIBRATION_BINS: usize = 10;
/// Probabilities are kept this far from 0 and 1 in the log loss, as scikit-learn does for double precision.
const LOG_LOSS_MARGIN: f64 = f64::EPSILON;

/// How good scores are. Classifier metrics are absent where the labels are not all 0 or 1, or are all the same.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Rows.
    pub rows: usize,
    /// Mean label.
    pub base_rate: f64,
    /// Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.
    pub auc: Option<f64>,
    /// Brier score: mean (p − y)².
    pub brier: Option<f64>,
    /// Mean −(y ln p + (1 − y) ln(1 − p)).
    pub log_loss: Option<f64>,
    /// Expected calibration error over ten equal-mass bins: Σ (n_b/n) |mean y − mean p|.
    pub ece: Option<f64>,
    /// Root of the mean squared error.
    pub rmse: f64,
    /// Mean absolute error.
    pub mae: f64,
}

impl Metrics {
    /// Of scores against labels, pairwise. `None` without rows.
    ///
    /// # Panics
    /// Where the lengths differ.
    pub fn of(scores: &[f64], labels: &[f64]) -> Option<Self> {
        assert_eq!(scores.len(), labels.len(), "one label a score");
        if scores.is_empty() {
            return None;
        }
        let n = scores.len() as f64;
        let mean = |f: &dyn Fn(f64, f64) -> f64| scores.iter().zip(labels).map(|(s, y)| f(*s, *y)).sum::<f64>() / n;
        let squared = mean(&|s, y| (s - y) * (s - y));
        let base_rate = mean(&|_, y| y);
        let binary = labels.iter().all(|y| *y == 0.0 || *y == 1.0) && base_rate > 0.0 && base_rate < 1.0;
        let log_loss = |s: f64, y: f64| {
            let p = s.clamp(LOG_LOSS_MARGIN, 1.0 - LOG_LOSS_MARGIN);
            -(y * p.ln() + (1.0 - y) * (1.0 - p).ln())
        };
        Some(Self {
            rows: scores.len(),
            base_rate,
            auc: binary.then(|| auc(scores, labels)),
            brier: binary.then_some(squared),
            log_loss: binary.then(|| mean(&log_loss)),
            ece: binary.then(|| calibration_error(scores, labels)),
            rmse: squared.sqrt(),
            mae: mean(&|s, y| (s - y).abs()),
        })
    }

    /// A metric by the name that `[retraining] gates.metric` uses, and whether greater is better.
    pub fn named(&self, name: &str) -> Option<(f64, bool)> {
        match name {
            "auc" => self.auc.map(|v| (v, true)),
            "brier" => self.brier.map(|v| (v, false)),
            "log_loss" => self.log_loss.map(|v| (v, false)),
            "rmse" => Some((self.rmse, false)),
            "mae" => Some((self.mae, false)),
            _ => None,
        }
    }
}

/// Mann-Whitney U over the number of pairs, by ranks; tied scores share their mean rank.
fn auc(scores: &[f64], labels: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let (mut rank_sum, mut positives) = (0.0, 0.0);
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && scores[order[end]] == scores[order[start]] {
            end += 1;
        }
        let rank = (start + 1 + end) as f64 / 2.0;
        let tied = order[start..end].iter().map(|i| labels[*i]).sum::<f64>();
        rank_sum += rank * tied;
        positives += tied;
        start = end;
    }
    let negatives = scores.len() as f64 - positives;
    (rank_sum - positives * (positives + 1.0) / 2.0) / (positives * negatives)
}

fn calibration_error(scores: &[f64], labels: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let n = order.len();
    let gap = |bin: &[usize]| bin.iter().map(|i| labels[*i] - scores[*i]).sum::<f64>().abs();
    (0..CALIBRATION_BINS).map(|b| gap(&order[b * n / CALIBRATION_BINS..(b + 1) * n / CALIBRATION_BINS])).sum::<f64>()
        / n as f64
}

/// What the gates say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// True where all gates passed.
    pub passed: bool,
    /// A line a gate: what was asked, what was found.
    pub reasons: Vec<String>,
    /// The candidate on the held-out rows.
    pub candidate: Metrics,
    /// The champion on the same rows, where it can score them.
    pub champion: Option<Metrics>,
}

/// Decides. `latency` is the candidate's p99 for one row, where it was measured.
pub fn judge(plan: &GatesPlan, candidate: Metrics, champion: Option<Metrics>, latency: Option<Duration>) -> Verdict {
    let mut passed = true;
    let mut reasons = Vec::new();
    let mut gate = |good: bool, text: String| {
        passed &= good;
        reasons.push(format!("{}: {text}", if good { "passed" } else { "failed" }));
    };
    let metric = plan.metric.as_str();
    match candidate.named(metric) {
        None => gate(
            false,
            format!(
                "{metric} cannot be computed on {} held-out rows with base rate {:.4}",
                candidate.rows, candidate.base_rate
            ),
        ),
        Some((value, greater)) => {
            let better = |a: f64, b: f64| if greater { a - b } else { b - a };
            if let Some((old, _)) = champion.as_ref().and_then(|c| c.named(metric)) {
                let gain = better(value, old);
                gate(
                    gain >= plan.min_gain,
                    format!(
                        "{metric} {value:.4} against the champion's {old:.4}: gain {gain:+.4}, asked for at least {:+.4}",
                        plan.min_gain
                    ),
                );
            }
            if let Some(threshold) = plan.threshold {
                gate(
                    better(value, threshold) >= 0.0,
                    format!(
                        "{metric} {value:.4}, asked for at {} {threshold:.4}",
                        if greater { "least" } else { "most" }
                    ),
                );
            }
        }
    }
    if let Some(most) = plan.max_ece {
        match candidate.ece {
            Some(ece) => gate(ece <= most, format!("calibration error {ece:.4}, asked for at most {most:.4}")),
            None => gate(false, "the calibration error cannot be computed".into()),
        }
    }
    if let (Some(most), Some(latency)) = (plan.max_latency, latency) {
        gate(
            latency <= most,
            format!(
                "one row takes {:.2} ms at p99, asked for at most {:.2} ms",
                latency.as_secs_f64() * 1e3,
                most.as_secs_f64() * 1e3
            ),
        );
    }
    Verdict { passed, reasons, candidate, champion }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn plan(metric: &str, min_gain: f64) -> GatesPlan {
        GatesPlan { metric: metric.into(), min_gain, threshold: None, max_ece: None, max_latency: None }
    }

    /// scikit-learn 1.9.1 on p = [.1, .4, .35, .8, .8, .2], y = [0, 0, 1, 1, 0, 0]: roc_auc_score, brier_score_loss, log_loss,
    /// mean_squared_error ** .5, mean_absolute_error.
    #[test]
    fn metrics_are_those_of_scikit_learn() {
        let m = Metrics::of(&[0.1, 0.4, 0.35, 0.8, 0.8, 0.2], &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).unwrap();
        for (got, want) in [
            (m.auc.unwrap(), 0.6875),
            (m.brier.unwrap(), 0.218_750_000_000_000_03),
            (m.log_loss.unwrap(), 0.620_288_879_830_835_8),
            (m.rmse, 0.467_707_173_346_742_67),
            (m.mae, 0.391_666_666_666_666_7),
        ] {
            assert!((got - want).abs() < 1e-12, "{got} is not {want}");
        }
    }

    #[test]
    fn calibration_error_is_the_gap_of_equal_mass_bins() {
        let scores: Vec<f64> = (0..100).map(|i| if i < 50 { 0.2 } else { 0.9 }).collect();
        let labels: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i % 2 == 0))).collect();
        // Every bin of ten has half positives: gaps of 0.3 and 0.4.
        assert!((Metrics::of(&scores, &labels).unwrap().ece.unwrap() - 0.35).abs() < 1e-12);
    }

    #[rstest]
    #[case::better("auc", 0.0, true)]
    #[case::not_enough_better("auc", 0.2, false)]
    #[case::lower_is_better("brier", 0.0, true)]
    #[case::unknown_metric("gini", 0.0, false)]
    fn the_champion_must_be_beaten(#[case] metric: &str, #[case] min_gain: f64, #[case] passed: bool) {
        let labels: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i >= 50))).collect();
        let good: Vec<f64> = (0..100).map(|i| f64::from(i) / 100.0).collect();
        let worse: Vec<f64> =
            (0..100).map(|i| f64::from((i * 37) % 100) / 200.0 + f64::from(u8::from(i >= 50)) / 4.0).collect();
        let verdict =
            judge(&plan(metric, min_gain), Metrics::of(&good, &labels).unwrap(), Metrics::of(&worse, &labels), None);
        assert_eq!(verdict.passed, passed, "{verdict:?}");
    }

    #[test]
    fn one_class_only_cannot_pass_an_auc_gate() {
        let verdict = judge(&plan("auc", -1.0), Metrics::of(&[0.1, 0.2], &[0.0, 0.0]).unwrap(), None, None);
        assert!(!verdict.passed);
        assert!(verdict.reasons[0].contains("base rate"), "{:?}", verdict.reasons);
    }

    proptest! {
        #[test]
        fn auc_counts_pairs(rows in prop::collection::vec((0u8..8, any::<bool>()), 2..60)) {
            let scores: Vec<f64> = rows.iter().map(|(s, _)| f64::from(*s)).collect();
            let labels: Vec<f64> = rows.iter().map(|(_, y)| f64::from(u8::from(*y))).collect();
            let (mut wins, mut pairs) = (0.0, 0.0);
            for (s, y) in &rows {
                for (t, z) in &rows {
                    if *y && !*z {
                        pairs += 1.0;
                        wins += match s.cmp(t) { std::cmp::Ordering::Greater => 1.0, std::cmp::Ordering::Equal => 0.5, std::cmp::Ordering::Less => 0.0 };
                    }
                }
            }
            let got = Metrics::of(&scores, &labels).unwrap().auc;
            prop_assert_eq!(got.is_some(), pairs > 0.0);
            if let Some(got) = got {
                prop_assert!((got - wins / pairs).abs() < 1e-12);
            }
        }
    }
}
