//! ONNX Runtime: its library, its sessions. The only file that knows the `ort` crate.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock};

use ort::environment::Environment;
use ort::ep::ExecutionProvider;
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{HasSelectedOutputs, IoBinding, OutputSelector, RunOptions, Session};
use ort::value::{DynValue, Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use super::bundle::{Bundle, MODEL, PREPROCESSOR, Task};
use super::library::{self, Candidate};
use super::{ModelError, library::VARIABLE};
use crate::config::plan::ScorePlan;

/// Name of the preprocessor's input.
const FEATURES: &str = "features";
/// Name of the preprocessor's output and of the model's input.
const INPUTS: &str = "inputs";
/// Name of a classifier's output.
const PROBABILITIES: &str = "probabilities";
/// Name of a regression's output.
const SCORE: &str = "score";

/// What computes a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// NVIDIA TensorRT.
    Tensorrt,
    /// NVIDIA CUDA.
    Cuda,
    /// The processor.
    Cpu,
}

impl Provider {
    /// Its name in `pipeline.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensorrt => "tensorrt",
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }
}

impl FromStr for Provider {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let known = [Self::Tensorrt, Self::Cuda, Self::Cpu].into_iter().find(|provider| provider.name() == name);
        known.ok_or_else(|| ModelError::UnknownProvider { name: name.to_owned() })
    }
}

/// How sessions are made.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Providers in order of preference. The processor is always the last resort.
    pub providers: Vec<Provider>,
    /// Threads within one operator.
    pub threads: usize,
    /// Most rows of a batch.
    pub batch_rows: usize,
}

impl SessionOptions {
    /// The options of a pipeline.
    ///
    /// # Errors
    /// An unknown provider.
    pub fn of(plan: &ScorePlan) -> Result<Self, ModelError> {
        let providers = plan.providers.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
        Ok(Self { providers, threads: plan.threads, batch_rows: plan.batch_rows })
    }
}

/// A preprocessor and a model, loaded, checked and warm. Belongs to one thread at a time.
pub struct Model {
    preprocessor: Graph,
    model: Graph,
    /// How tensors travel where a device computes: bound, and padded to a few sizes so that shapes repeat.
    bound: Option<Bound>,
    width: usize,
    /// Batch sizes that were tried out, rising; the last is the largest batch that one run takes.
    sizes: Vec<usize>,
    provider: Provider,
    passed_over: Vec<(Provider, String)>,
}

impl Model {
    /// Makes sessions of a bundle's graphs on the first provider that works, checks names, shapes and types, and runs them
    /// once at each of several batch sizes.
    ///
    /// # Errors
    /// No library; a graph that ONNX Runtime refuses or that is not what the bundle format asks for.
    pub fn load(bundle: &Bundle, options: &SessionOptions) -> Result<Self, ModelError> {
        let environment = environment()?;
        // The processor always works, so nothing after it in the list is ever reached.
        let accelerators = options.providers.iter().copied().take_while(|provider| *provider != Provider::Cpu);
        let mut accelerators: Vec<Provider> = accelerators.collect();
        let mut passed_over = Vec::new();
        loop {
            match Self::build(environment, bundle, options, &accelerators) {
                Ok(model) => return Ok(Self { passed_over, ..model }),
                Err(Build::Provider(provider, reason)) => {
                    accelerators.retain(|accelerator| *accelerator != provider);
                    passed_over.push((provider, reason));
                }
                // A device may only turn out to be missing when the first session is made or run on it.
                Err(Build::Model(error)) if !accelerators.is_empty() => {
                    passed_over.push((accelerators.remove(0), error.to_string()));
                }
                Err(Build::Model(error)) => return Err(error),
            }
        }
    }

    fn build(
        environment: &Environment,
        bundle: &Bundle,
        options: &SessionOptions,
        accelerators: &[Provider],
    ) -> Result<Self, Build> {
        let signature = &bundle.manifest.signature;
        let width = signature.inputs.len();
        let output = match signature.output.task {
            Task::BinaryClassification => PROBABILITIES,
            Task::Regression => SCORE,
        };
        let maker = Maker { environment, options, accelerators };
        let preprocessor = maker.graph(PREPROCESSOR, bundle.preprocessor(), [FEATURES, INPUTS], Some(width))?;
        let model = maker.graph(MODEL, bundle.model(), [INPUTS, output], preprocessor.output_width()?)?;
        if let Some(columns) = model.output_width()?
            && (columns == 0 || columns > signature.output.task.widest())
        {
            let widest = signature.output.task.widest();
            return Err(model.wrong(format!("output '{output}' has {columns} columns, and 1 to {widest} are known")))?;
        }
        let provider = accelerators.first().copied().unwrap_or(Provider::Cpu);
        let bound = match provider {
            Provider::Cpu => None,
            _ => Some(Bound::new(&preprocessor, &model, AllocationDevice::CUDA).map_err(|e| model.refused(&e))?),
        };
        let sizes = sizes(options.batch_rows);
        let mut model = Self { preprocessor, model, bound, width, sizes, provider, passed_over: Vec::new() };
        model.warm_up()?;
        Ok(model)
    }

    /// Runs every batch size once: allocations, kernels and engines are there before the first real batch, and a graph that
    /// only works for one batch size is found out.
    fn warm_up(&mut self) -> Result<(), ModelError> {
        self.sizes.clone().into_iter().try_for_each(|rows| self.try_out(rows))
    }

    /// Runs one row that worked when the model was loaded: tells a bad row from a model that has stopped working.
    ///
    /// # Errors
    /// ONNX Runtime's.
    pub fn probe(&mut self) -> Result<(), ModelError> {
        self.try_out(1)
    }

    /// A first row of missing values, zeros after it.
    fn try_out(&mut self, rows: usize) -> Result<(), ModelError> {
        let mut values = vec![0.0; rows * self.width];
        values[..self.width].fill(f32::NAN);
        self.run(&values, &mut Vec::with_capacity(rows))
    }

    /// Scores a matrix of float32 values, row after row, missing = NaN, and appends one score a row: the last column of
    /// the model's output. A score may be NaN or infinite; that is the caller's to judge.
    ///
    /// # Errors
    /// ONNX Runtime's. Nothing, or a part of the scores, is appended then.
    ///
    /// # Panics
    /// Where `values` is no whole number of rows.
    pub fn run(&mut self, values: &[f32], scores: &mut Vec<f64>) -> Result<(), ModelError> {
        assert!(values.len().is_multiple_of(self.width), "values come in whole rows");
        let most = self.sizes.last().copied().unwrap_or(1);
        for part in values.chunks(most * self.width) {
            match &mut self.bound {
                None => run_direct(&mut self.preprocessor, &mut self.model, self.width, part, scores)?,
                Some(bound) => {
                    let rows = part.len() / self.width;
                    let padded = self.sizes.iter().copied().find(|size| *size >= rows).unwrap_or(most);
                    bound.run(&mut self.preprocessor, &mut self.model, part, [rows, padded, self.width], scores)?;
                }
            }
        }
        Ok(())
    }

    /// Number of features of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What computes it.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// Preferred providers that could not be used, and why.
    pub fn passed_over(&self) -> &[(Provider, String)] {
        &self.passed_over
    }

    /// Makes tensors travel as on a device, bound and padded, so that this is tested where there is none.
    ///
    /// # Errors
    /// ONNX Runtime's.
    #[cfg(feature = "failpoints")]
    pub fn bind_on_host(&mut self) -> Result<(), ModelError> {
        let bound = Bound::new(&self.preprocessor, &self.model, AllocationDevice::CPU);
        self.bound = Some(bound.map_err(|e| self.model.refused(&e))?);
        Ok(())
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("width", &self.width).field("provider", &self.provider).finish_non_exhaustive()
    }
}

impl Task {
    /// Most columns of the model's output: classifiers may give both classes.
    fn widest(self) -> usize {
        match self {
            Self::BinaryClassification => 2,
            Self::Regression => 1,
        }
    }
}

/// Batch sizes to warm up and to pad to: 1, 8, 32, 128, 512, … and the largest.
fn sizes(batch_rows: usize) -> Vec<usize> {
    let steps = std::iter::successors(Some(8_usize), |size| size.checked_mul(4));
    let steps = steps.take_while(|size| *size < batch_rows);
    let mut sizes: Vec<usize> = std::iter::once(1).chain(steps).chain([batch_rows.max(1)]).collect();
    sizes.dedup();
    sizes
}

/// Why a model could not be made with a set of providers.
enum Build {
    Provider(Provider, String),
    Model(ModelError),
}

impl From<ModelError> for Build {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

struct Maker<'a> {
    environment: &'a Environment,
    options: &'a SessionOptions,
    accelerators: &'a [Provider],
}

impl Maker<'_> {
    fn graph(
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
struct Graph {
    session: Session,
    options: RunOptions<HasSelectedOutputs>,
    file: &'static str,
    input: &'static str,
    output: &'static str,
}

impl Graph {
    fn wrong(&self, problem: String) -> ModelError {
        ModelError::Graph { file: self.file, problem }
    }

    fn refused(&self, error: &ort::Error) -> ModelError {
        ModelError::Session { file: self.file, reason: error.to_string() }
    }

    fn failed(&self, rows: usize) -> impl Fn(ort::Error) -> ModelError + use<> {
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
    fn output_width(&self) -> Result<Option<usize>, ModelError> {
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

/// Both graphs on borrowed memory: the matrix is not copied, and the inputs pass from one session to the other as they are.
fn run_direct(
    preprocessor: &mut Graph,
    model: &mut Graph,
    width: usize,
    values: &[f32],
    scores: &mut Vec<f64>,
) -> Result<(), ModelError> {
    let rows = values.len() / width;
    let failed = preprocessor.failed(rows);
    let features = TensorRef::from_array_view(([rows, width], values)).map_err(&failed)?;
    let inputs =
        preprocessor.session.run_with_options(ort::inputs![features], &preprocessor.options).map_err(failed)?;
    let (failed, file) = (model.failed(rows), model.file);
    let outputs = model.session.run_with_options(ort::inputs![&inputs[0]], &model.options).map_err(failed)?;
    take_scores(&outputs[0], file, [rows, rows], scores)
}

/// Appends the last column of the first `rows` of what came back for `padded` rows.
fn take_scores(
    output: &DynValue,
    file: &'static str,
    [rows, padded]: [usize; 2],
    scores: &mut Vec<f64>,
) -> Result<(), ModelError> {
    let failed = |reason: String| ModelError::Run { file, rows, reason };
    let (shape, data) = output.try_extract_tensor::<f32>().map_err(|e| failed(e.to_string()))?;
    let columns = data.len() / padded.max(1);
    if columns == 0 || shape[..] != [padded as i64, columns as i64] {
        return Err(failed(format!("it gave the shape {:?} for {padded} rows", &shape[..])));
    }
    scores.extend(data.chunks_exact(columns).take(rows).map(|row| f64::from(row[columns - 1])));
    Ok(())
}

/// Tensors bound to sessions, so that what passes between the two graphs stays on the device.
struct Bound {
    preprocessor: IoBinding,
    model: IoBinding,
    /// Where the inputs stay between the two graphs.
    device: MemoryInfo<'static>,
    host: MemoryInfo<'static>,
    /// One tensor for each batch size, filled again and again.
    features: Vec<Tensor<f32>>,
}

impl Bound {
    fn new(preprocessor: &Graph, model: &Graph, device: AllocationDevice<'static>) -> ort::Result<Self> {
        Ok(Self {
            preprocessor: preprocessor.session.create_binding()?,
            model: model.session.create_binding()?,
            device: MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default)?,
            host: MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)?,
            features: Vec::new(),
        })
    }

    /// Scores `rows` rows, padded with missing values to `padded` rows.
    fn run(
        &mut self,
        preprocessor: &mut Graph,
        model: &mut Graph,
        values: &[f32],
        [rows, padded, width]: [usize; 3],
        scores: &mut Vec<f64>,
    ) -> Result<(), ModelError> {
        let failed = preprocessor.failed(rows);
        let position = self.tensor([padded, width]).map_err(&failed)?;
        let (_, cells) = self.features[position].try_extract_tensor_mut::<f32>().map_err(&failed)?;
        cells[..values.len()].copy_from_slice(values);
        cells[values.len()..].fill(f32::NAN);
        // Binding copies to the device, and a run leaves its output bound: both are done again for every batch.
        self.preprocessor.bind_input(preprocessor.input, &self.features[position]).map_err(&failed)?;
        self.preprocessor.bind_output_to_device(preprocessor.output, &self.device).map_err(&failed)?;
        let inputs = preprocessor.session.run_binding(&self.preprocessor).map_err(&failed)?;

        let failed = model.failed(rows);
        self.model.bind_input(model.input, &inputs[0]).map_err(&failed)?;
        self.model.bind_output_to_device(model.output, &self.host).map_err(&failed)?;
        let outputs = model.session.run_binding(&self.model).map_err(&failed)?;
        take_scores(&outputs[0], model.file, [rows, padded], scores)
    }

    /// Index of the tensor of a shape.
    fn tensor(&mut self, shape: [usize; 2]) -> ort::Result<usize> {
        let wanted = shape.map(|size| size as i64);
        let known = self.features.iter().position(|tensor| tensor.shape()[..] == wanted);
        match known {
            Some(position) => Ok(position),
            None => {
                self.features.push(Tensor::new(&Allocator::default(), shape)?);
                Ok(self.features.len() - 1)
            }
        }
    }
}

/// ONNX Runtime, loaded once for the whole process.
fn environment() -> Result<&'static Environment, ModelError> {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    // A second thread waits for the first one's answer instead of loading beside it.
    let _loading = LOADING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match ENVIRONMENT.get() {
        Some(environment) => Ok(environment),
        None => load_environment().map(|environment| ENVIRONMENT.get_or_init(|| environment)),
    }
}

fn load_environment() -> Result<Environment, ModelError> {
    let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    let program = std::env::current_exe().ok().and_then(|exe| exe.parent().map(PathBuf::from));
    let starts: Vec<PathBuf> = std::env::current_dir().ok().into_iter().chain(program).collect();
    let mut looked = Vec::new();
    for candidate in library::candidates(variable.as_deref(), &starts) {
        match candidate {
            Candidate::Absent(path) => looked.push((path, "the Python package onnxruntime is not there".to_owned())),
            Candidate::Library(path) => match open(&path) {
                Ok(environment) => {
                    tracing::info!(library = %path.display(), build = ort::info(), "loaded ONNX Runtime");
                    return Ok(environment);
                }
                Err(reason) => looked.push((path, reason)),
            },
        }
    }
    Err(ModelError::Library { needed: ort::MINOR_VERSION, looked })
}

fn open(path: &std::path::Path) -> Result<Environment, String> {
    let builder = ort::init_from(path).map_err(|e| e.to_string())?;
    // What matters comes back as errors from calls. The rest, as graphs that promise one row and give many, would be said
    // once a batch.
    let builder = builder.with_name("driftline").with_telemetry(false).with_logger(Arc::new(
        |level: LogLevel, _category: &str, _id: &str, location: &str, message: &str| match level {
            LogLevel::Verbose | LogLevel::Info => tracing::trace!(target: "onnxruntime", location, "{message}"),
            _ => tracing::debug!(target: "onnxruntime", location, "{message}"),
        },
    ));
    let environment = builder.build().map_err(|e| e.to_string())?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_rise_to_the_largest_batch() {
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(8), [1, 8]);
        assert_eq!(sizes(100), [1, 8, 32, 100]);
        assert_eq!(sizes(1024), [1, 8, 32, 128, 512, 1024]);
        assert_eq!(sizes(0), [1]);
    }

    #[test]
    fn providers_are_read_by_name() {
        for provider in [Provider::Tensorrt, Provider::Cuda, Provider::Cpu] {
            assert_eq!(provider.name().parse::<Provider>().unwrap(), provider);
        }
        let unknown = "gpu".parse::<Provider>().unwrap_err();
        assert_eq!(unknown.to_string(), "[score] providers: 'gpu' is not known; known are tensorrt, cuda and cpu");
    }
}
