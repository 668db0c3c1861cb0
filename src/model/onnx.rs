//! Models in ONNX Runtime. Only this module knows the `ort` crate.

mod environment;
mod graph;

use std::str::FromStr;

use ort::environment::Environment;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::IoBinding;
use ort::value::{DynValue, Tensor, TensorRef};

use self::environment::environment;
use self::graph::{Build, Graph, Maker};
use super::ModelError;
use super::bundle::{Bundle, MODEL, PREPROCESSOR, Task};
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
