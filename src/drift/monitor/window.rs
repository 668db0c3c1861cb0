//! The open window of one model version: counts per bin, and what the counts are compared with.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::drift::ColumnEvidence;
use crate::drift::prediction::PredictionRows;
use crate::drift::profile::{ColumnProfile, Profile};
use crate::drift::statistics::{jensen_shannon, kolmogorov_smirnov, kolmogorov_smirnov_p, psi, wasserstein};
use crate::drift::verdict::{ColumnVerdict, Rule, Sample};

/// What is watched of a model version: its profile, and which column of the predictions goes with which of the profile.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    profile: Arc<Profile>,
    /// Column of the predictions, column of the profile.
    places: Vec<(usize, usize)>,
    /// Tells this reference from any other.
    pub(super) digest: String,
}

impl Watched {
    /// Watches those of `columns` (the predictions' columns, in order) that the profile knows. Answers also with the names
    /// of the others.
    pub(super) fn new(profile: Arc<Profile>, columns: &[String]) -> (Self, Vec<String>) {
        let mut places = Vec::new();
        let mut unknown = Vec::new();
        for (place, name) in columns.iter().enumerate() {
            match profile.columns().iter().position(|column| column.name() == name) {
                Some(known) => places.push((place, known)),
                None => unknown.push(name.clone()),
            }
        }
        let digest = hex::encode(&Sha256::digest(profile.to_json())[..8]);
        (Self { profile, places, digest }, unknown)
    }

    pub(super) fn columns(&self) -> impl ExactSizeIterator<Item = &ColumnProfile> {
        self.places.iter().map(|(_, known)| &self.profile.columns()[*known])
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.columns().map(|column| column.name().to_owned()).collect()
    }
}

/// Counts of a window that has not closed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OpenWindow {
    pub(super) rows: u64,
    /// Smallest and largest event time so far; meaningless without rows.
    pub(super) from: i64,
    pub(super) to: i64,
    /// For windows of event time: where it ends (exclusive), once it has a row.
    until: Option<i64>,
    /// Partition → first and last offset.
    pub(super) evidence: BTreeMap<i32, (i64, i64)>,
    /// Per watched column: a count a bin.
    counts: Vec<Vec<u64>>,
    missing: Vec<u64>,
}

impl OpenWindow {
    pub(super) fn new(watched: &Watched) -> Self {
        Self {
            rows: 0,
            from: i64::MAX,
            to: i64::MIN,
            until: None,
            evidence: BTreeMap::new(),
            counts: watched.columns().map(|column| vec![0; column.counts().len()]).collect(),
            missing: vec![0; watched.places.len()],
        }
    }

    /// End of the window (exclusive), which its first row decides: windows lie at multiples of their length.
    pub(super) fn until(&mut self, event_time: i64, length: i64) -> i64 {
        *self.until.get_or_insert(event_time.div_euclid(length).saturating_add(1).saturating_mul(length))
    }

    /// Counts rows of this model version.
    pub(super) fn count(&mut self, watched: &Watched, rows: &PredictionRows, range: Range<usize>) {
        let columns = watched.columns().zip(&watched.places).zip(self.counts.iter_mut().zip(&mut self.missing));
        for ((column, &(place, _)), (counts, missing)) in columns {
            for value in &rows.columns[place][range.clone()] {
                if value.is_finite() {
                    counts[column.bin(*value)] += 1;
                } else {
                    *missing += 1;
                }
            }
        }
        for row in range.clone() {
            let event_time = rows.event_times[row];
            self.from = self.from.min(event_time);
            self.to = self.to.max(event_time);
            let offset = rows.offsets[row];
            let seen = self.evidence.entry(rows.partitions[row]).or_insert((offset, offset));
            *seen = (seen.0.min(offset), seen.1.max(offset));
        }
        self.rows += range.len() as u64;
    }

    /// The verdict's samples, one a watched column.
    pub(super) fn samples(&self, watched: &Watched, rule: &Rule) -> Vec<Sample> {
        let columns = watched.columns().zip(&self.counts).zip(&self.missing);
        let sample = |((column, counts), missing): ((&ColumnProfile, &Vec<u64>), &u64)| {
            let cells = column.to_cells(counts, *missing);
            Sample::new(rule, watched.places.len(), &watched.profile, column, &cells)
        };
        columns.map(sample).collect()
    }

    /// What each watched column showed, in the order of the samples.
    pub(super) fn evidence(
        &self,
        watched: &Watched,
        samples: &[Sample],
        verdicts: &[ColumnVerdict],
    ) -> Vec<ColumnEvidence> {
        let columns = watched.columns().zip(self.counts.iter().zip(&self.missing)).zip(samples.iter().zip(verdicts));
        let share = |missing: u64, rows: u64| if rows == 0 { 0.0 } else { missing as f64 / rows as f64 };
        columns
            .map(|((column, (counts, &missing)), (sample, verdict))| {
                let cells = column.to_cells(counts, missing);
                let ks = kolmogorov_smirnov(column.counts(), counts);
                let (reference, window) = (total(column.counts()), total(counts));
                let effective_size = reference * window / (reference + window).max(1.0) / sample.design_effect;
                ColumnEvidence {
                    name: column.name().to_owned(),
                    drifted: verdict.drifted,
                    psi: psi(column.cells(), &cells),
                    ks,
                    ks_p_value: kolmogorov_smirnov_p(ks, effective_size),
                    jensen_shannon: jensen_shannon(column.cells(), &cells),
                    wasserstein: wasserstein(column.edges(), column.counts(), counts),
                    tolerance: sample.tolerance,
                    p_value: verdict.ln_p_value.exp(),
                    e_value: verdict.ln_e_value.exp().min(1e300),
                    missing: (share(column.missing(), watched.profile.rows()), share(missing, self.rows)),
                    median: (column.median(column.counts()), column.median(counts)),
                    since: verdict.since,
                }
            })
            .collect()
    }

    /// True if the counts are of these bins.
    pub(super) fn fits(&self, watched: &Watched) -> bool {
        let bins = watched.columns().map(|column| column.counts().len());
        self.missing.len() == watched.places.len() && bins.eq(self.counts.iter().map(Vec::len))
    }
}

fn total(counts: &[u64]) -> f64 {
    counts.iter().sum::<u64>() as f64
}
