//! What can go wrong while scoring.

use crate::model::ModelError;

/// What can go wrong between feature rows and predictions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A batch is no batch of feature rows of this pipeline.
    #[error("feature rows: column '{name}' {problem}")]
    Column {
        /// Column.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}
