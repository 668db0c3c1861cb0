//! A pipeline's definition: [`spec`](self) as written, [`plan`] as validated.

pub mod names;
pub mod plan;
