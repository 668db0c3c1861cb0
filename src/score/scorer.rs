//! Scoring feature rows, so that one bad row fails alone.

use std::sync::Arc;

use arrow::array::RecordBatch;

use crate::config::plan::ScorePlan;
use crate::model::{
    Bundle, FeatureColumns, FeatureMatrix, Model, ModelError, ModelSlot, ServingModel, SessionOptions, Version,
};

/// What a model says about the rows of a batch. All of it comes from one version.
#[derive(Debug, Clone)]
pub struct Scores {
    /// One score a row; NaN for the rows in `failed`.
    pub scores: Vec<f64>,
    /// Classes, for classifiers; none for the rows in `failed`.
    pub labels: Vec<Option<i64>>,
    /// Model name.
    pub model: Arc<str>,
    /// Version.
    pub version: Arc<str>,
    /// Rows that could not be scored, rising, and why.
    pub failed: Vec<(usize, String)>,
}

/// Scores the batches of one thread.
#[derive(Debug)]
pub struct Scorer {
    slot: ModelSlot,
    columns: FeatureColumns,
    matrix: FeatureMatrix,
    batch_rows: usize,
}

impl Scorer {
    /// Scores with whatever version the slot holds.
    pub fn new(plan: &ScorePlan, slot: ModelSlot) -> Self {
        Self {
            slot,
            columns: FeatureColumns::new(&plan.features),
            matrix: FeatureMatrix::default(),
            batch_rows: plan.batch_rows.max(1),
        }
    }

    /// Scores with one bundle for ever: for gates, backfills and tests. The features are the bundle's own.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn of_bundle(bundle: &Bundle, version: Version, options: &SessionOptions) -> Result<Self, ModelError> {
        let model = Model::load(bundle, options)?;
        let features: Vec<String> = bundle.manifest.signature.inputs.iter().map(|input| input.name.clone()).collect();
        let serving = ServingModel {
            name: bundle.manifest.name.as_str().into(),
            version,
            manifest: Arc::new(bundle.manifest.clone()),
            model,
        };
        Ok(Self {
            slot: ModelSlot::fixed(serving),
            columns: FeatureColumns::new(&features),
            matrix: FeatureMatrix::default(),
            batch_rows: options.batch_rows.max(1),
        })
    }

    /// Scores all rows, in micro-batches of at most `batch_rows`, with the newest version that is ready now. A row that the
    /// model refuses, or answers with NaN or an infinity, is listed as failed; the others have their scores.
    ///
    /// # Errors
    /// A missing feature column, or a model that fails on rows that it could score when it was loaded: no row is to blame.
    pub fn score(&mut self, rows: &RecordBatch) -> Result<Scores, ModelError> {
        let serving = self.slot.current();
        let columns = self.columns.of(rows)?;
        let count = rows.num_rows();
        let mut scores = Vec::with_capacity(count);
        let mut failed = Vec::new();
        for start in (0..count).step_by(self.batch_rows) {
            let end = count.min(start + self.batch_rows);
            self.matrix.fill(&columns, start, end);
            score_batch(&mut serving.model, self.matrix.values(), start, &mut scores, &mut failed)?;
        }
        for (row, score) in scores.iter_mut().enumerate().filter(|(_, score)| !score.is_finite()) {
            // Rows that failed as such are in the list already, and their placeholders are NaN.
            if let Err(place) = failed.binary_search_by_key(&row, |(failed, _)| *failed) {
                failed.insert(place, (row, format!("the model answered {score}")));
            }
            *score = f64::NAN;
        }
        let label = |score: &f64| if score.is_nan() { None } else { serving.manifest.label(*score) };
        Ok(Scores {
            labels: scores.iter().map(label).collect(),
            scores,
            model: serving.name.clone(),
            version: serving.version.0.clone(),
            failed,
        })
    }

    /// The version that the next batch would be scored with.
    pub fn version(&mut self) -> Version {
        self.slot.current().version.clone()
    }

    /// Features that a row must have, in the model's order.
    pub fn features(&self) -> &[String] {
        self.columns.names()
    }
}

/// Scores a micro-batch, whose first row is row `first` of the whole.
fn score_batch(
    model: &mut Model,
    values: &[f32],
    first: usize,
    scores: &mut Vec<f64>,
    failed: &mut Vec<(usize, String)>,
) -> Result<(), ModelError> {
    let before = scores.len();
    let Err(error) = model.run(values, scores) else { return Ok(()) };
    scores.truncate(before);
    // A lost device fails on every row. Then no row is to blame, and none may be given up.
    if model.probe().is_err() {
        return Err(error);
    }
    find_bad_rows(model, values, first, error, scores, failed);
    Ok(())
}

/// Halves a batch that failed as a whole until the rows that make it fail stand alone.
fn find_bad_rows(
    model: &mut Model,
    values: &[f32],
    first: usize,
    error: ModelError,
    scores: &mut Vec<f64>,
    failed: &mut Vec<(usize, String)>,
) {
    let rows = values.len() / model.width();
    if rows <= 1 {
        scores.push(f64::NAN);
        failed.push((first, error.to_string()));
        return;
    }
    let (left, right) = values.split_at(rows / 2 * model.width());
    for (half, first) in [(left, first), (right, first + rows / 2)] {
        let before = scores.len();
        if let Err(error) = model.run(half, scores) {
            scores.truncate(before);
            find_bad_rows(model, half, first, error, scores, failed);
        }
    }
}
