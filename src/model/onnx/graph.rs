//! One ONNX graph in a session: made on a set of providers, its names, shapes and types checked.

use ort::environment::Environment;
use ort::ep::ExecutionProvider;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{HasSelectedOutputs, OutputSelector, RunOptions, Session};
use ort::value::{Outlet, TensorElementType, ValueType};

use super::{Provider, SessionOptions};
use crate::model::ModelError;
use crate::model::bundle::PREPROCESSOR;

/// Why a model could not be made with a set of providers.
pub(super) enum Build {
    Provider(Provider, String),
    Model(ModelError),
}

impl From<ModelError> for Build {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

pub(super) struct Maker<'a> {
    pub(super) environment: &'a Environment,
    pub(super) options: &'a SessionOptions,
    pub(super) accelerators: &'a [Provider],
}

impl Maker<'_> {
    pub(super) fn graph(
        &self,
        file: &'static str,
        bytes: &[u8],
        [input, output]: [&'static str; 2],
        width: Option<usize>,
    ) -> Result<Graph, Build> {
        let refused = |reason: String| ModelError::Session { file, reason };
        let mut builder = self.builder().map_err(|e| refused(e.to_string()))?;
        for accelerator in self.accelerators {
            let shape = |rows: usize| format!("{input}:{rows}x{}", width.unwrap_or(1));
            register(*accelerator, &mut builder, &shape, self.options.batch_rows)
                .map_err(|reason| Build::Provider(*accelerator, reason))?;
        }
        let session = builder.commit_from_memory(bytes).map_err(|e| refused(e.to_string()))?;
        let options = RunOptions::new().map_err(|e| refused(e.to_string()))?;
        let options = options.with_outputs(OutputSelector::no_default().with(output));
        let graph = Graph { session, options, file, input, output };
        graph.check(width)?;
        Ok(graph)
    }

    fn builder(&self) -> ort::Result<SessionBuilder> {
        // One batch runs at a time and other threads want the processor: no second pool, no spinning. Batches differ in
        // size, so memory patterns of one do not fit the next.
        let builder = Session::builder(self.environment)?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_parallel_execution(false)?
            .with_inter_threads(1)?
            .with_intra_threads(self.options.threads.max(1))?
            .with_intra_op_spinning(false)?
            .with_memory_pattern(false)?;
        Ok(builder)
    }
}

/// Adds a provider to a session that is about to be made.
#[cfg_attr(
    not(feature = "tensorrt"),
    expect(unused_variables, reason = "only TensorRT wants to know shapes beforehand")
)]
fn register(
    provider: Provider,
    builder: &mut SessionBuilder,
    shape: &dyn Fn(usize) -> String,
    batch_rows: usize,
) -> Result<(), String> {
    match provider {
        #[cfg(feature = "tensorrt")]
        Provider::Tensorrt => ort::ep::TensorRT::default()
            // Without a profile the first batch of every new size would build an engine in the middle of the traffic.
            .with_profile_min_shapes(shape(1))
            .with_profile_opt_shapes(shape(batch_rows))
            .with_profile_max_shapes(shape(batch_rows))
            .register(builder)
            .map_err(|e| e.to_string()),
        #[cfg(feature = "cuda")]
        Provider::Cuda => ort::ep::CUDA::default().register(builder).map_err(|e| e.to_string()),
        Provider::Cpu => Ok(()),
        #[cfg(not(all(feature = "cuda", feature = "tensorrt")))]
        other => Err(format!("this build of driftline was made without the cargo feature '{}'", other.name())),
    }
}

/// A session that takes one matrix and gives one.
pub(super) struct Graph {
    pub(super) session: Session,
    pub(super) options: RunOptions<HasSelectedOutputs>,
    pub(super) file: &'static str,
    pub(super) input: &'static str,
    pub(super) output: &'static str,
}

impl Graph {
    pub(super) fn wrong(&self, problem: String) -> ModelError {
        ModelError::Graph { file: self.file, problem }
    }

    pub(super) fn refused(&self, error: &ort::Error) -> ModelError {
        ModelError::Session { file: self.file, reason: error.to_string() }
    }

    pub(super) fn failed(&self, rows: usize) -> impl Fn(ort::Error) -> ModelError + use<> {
        let file = self.file;
        move |error| ModelError::Run { file, rows, reason: error.to_string() }
    }

    fn check(&self, width: Option<usize>) -> Result<(), ModelError> {
        let [input] = self.session.inputs() else {
            let names = names(self.session.inputs());
            return Err(self.wrong(format!("it has the inputs {names}, and must have '{}' alone", self.input)));
        };
        if input.name() != self.input {
            return Err(self.wrong(format!("its input is '{}', and must be '{}'", input.name(), self.input)));
        }
        let columns = self.columns("input", input)?;
        if let (Some(columns), Some(width)) = (columns, width)
            && columns != width
        {
            let from = if self.file == PREPROCESSOR { "bundle.toml lists" } else { "preprocessor.onnx gives" };
            return Err(self.wrong(format!("input '{}' has {columns} columns, and {from} {width}", self.input)));
        }
        self.output_width().map(|_| ())
    }

    /// Columns of the output, where the graph says.
    pub(super) fn output_width(&self) -> Result<Option<usize>, ModelError> {
        let outputs = self.session.outputs();
        match outputs.iter().find(|output| output.name() == self.output) {
            Some(output) => self.columns("output", output),
            None => Err(self.wrong(format!("it gives {}, and no '{}'", names(outputs), self.output))),
        }
    }

    /// Columns of a float32 matrix with a free number of rows.
    fn columns(&self, what: &str, outlet: &Outlet) -> Result<Option<usize>, ModelError> {
        let wrong = |problem: &str| self.wrong(format!("{what} '{}' {problem}", outlet.name()));
        let ValueType::Tensor { ty, shape, .. } = outlet.dtype() else {
            return Err(wrong("is no tensor; export classifiers without zipmap"));
        };
        if *ty != TensorElementType::Float32 {
            return Err(wrong(&format!("is {ty}, and must be float32")));
        }
        let [rows, columns] = shape[..] else {
            return Err(wrong(&format!("has {} dimensions, and must have 2", shape.len())));
        };
        if rows >= 0 {
            return Err(wrong(&format!("is fixed to {rows} rows; export it with a free first dimension")));
        }
        Ok(usize::try_from(columns).ok())
    }
}

fn names(outlets: &[Outlet]) -> String {
    let names: Vec<String> = outlets.iter().map(|outlet| format!("'{}'", outlet.name())).collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}
