//! A pipeline's definition: [`spec`] as written, [`plan`] as validated.
//!
//! ```text
//!  pipeline.toml ──> document ──> interpolate ──> schema ──> spec ──> validate ──> plan
//!  --set a.b=c        keys, values  ${ENV}          keys,      types     names, SQL,  no options,
//!                     and places                    types                files, rules  no defaults
//! ```
//!
//! Every stage reports all that it finds, and puts stand-ins in the place of what is wrong, so that one run of `driftline
//! check` shows every fault.

pub mod defaults;
mod definition;
mod document;
mod explain;
pub mod faults;
mod function;
mod interpolate;
mod load;
pub mod names;
pub mod plan;
mod schema;
mod schema_file;
pub mod spec;
pub mod units;
mod validate;

pub use faults::{Fault, Faults};
pub use interpolate::Environment;
pub use load::{FILE_NAME, load, load_with};
pub use plan::Plan;
pub use schema::json_schema;
