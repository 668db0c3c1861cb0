//! What expressions may call: DataFusion's scalar functions, collected once for the process.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};

use arrow::datatypes;
use datafusion_common::config::ConfigOptions;
use datafusion_common::{DataFusionError, TableReference};
use datafusion_expr::planner::{ContextProvider, ExprPlanner};
use datafusion_expr::{AggregateUDF, HigherOrderUDF, ScalarUDF, TableSource, WindowUDF};

/// Functions and planners by name; no tables, no variables.
pub(super) struct Catalog {
    /// Scalar functions by name and alias, in lower case.
    pub(super) functions: HashMap<String, Arc<ScalarUDF>>,
    /// Names of aggregates, to say why they are refused.
    pub(super) aggregates: HashSet<String>,
    /// Names of window functions, to say why they are refused.
    pub(super) windows: HashSet<String>,
    planners: Vec<Arc<dyn ExprPlanner>>,
    /// DataFusion's own settings, all at their defaults.
    pub(super) config: Arc<ConfigOptions>,
}

/// SQL's functions over a window of rows that are no aggregates.
const WINDOW_FUNCTIONS: [&str; 11] = [
    "row_number",
    "rank",
    "dense_rank",
    "percent_rank",
    "cume_dist",
    "ntile",
    "lag",
    "lead",
    "first_value",
    "last_value",
    "nth_value",
];

/// The catalog.
pub(super) static CATALOG: LazyLock<Catalog> = LazyLock::new(|| {
    let mut functions = HashMap::new();
    for udf in datafusion_functions::all_default_functions() {
        for alias in udf.aliases() {
            functions.insert(alias.clone(), udf.clone());
        }
        functions.insert(udf.name().to_owned(), udf);
    }
    let aggregates = datafusion_functions_aggregate::all_default_aggregate_functions()
        .iter()
        .flat_map(|udf| udf.aliases().iter().cloned().chain([udf.name().to_owned()]))
        .collect();
    let windows = WINDOW_FUNCTIONS.into_iter().map(str::to_owned).collect();
    let planners: Vec<Arc<dyn ExprPlanner>> = vec![
        Arc::new(datafusion_functions::core::planner::CoreFunctionPlanner::default()),
        Arc::new(datafusion_functions::datetime::planner::DatetimeFunctionPlanner),
        Arc::new(datafusion_functions::unicode::planner::UnicodeFunctionPlanner),
    ];
    Catalog { functions, aggregates, windows, planners, config: Arc::new(ConfigOptions::default()) }
});

impl ContextProvider for Catalog {
    fn get_table_source(&self, name: TableReference) -> datafusion_common::Result<Arc<dyn TableSource>> {
        Err(DataFusionError::Plan(format!("there are no tables here, not even `{name}`")))
    }

    fn get_expr_planners(&self) -> &[Arc<dyn ExprPlanner>] {
        &self.planners
    }

    fn get_function_meta(&self, name: &str) -> Option<Arc<ScalarUDF>> {
        self.functions.get(name).cloned()
    }

    fn get_higher_order_meta(&self, _name: &str) -> Option<Arc<HigherOrderUDF>> {
        None
    }

    fn get_aggregate_meta(&self, _name: &str) -> Option<Arc<AggregateUDF>> {
        None
    }

    fn get_window_meta(&self, _name: &str) -> Option<Arc<WindowUDF>> {
        None
    }

    fn get_variable_type(&self, _variable_names: &[String]) -> Option<datatypes::DataType> {
        None
    }

    fn options(&self) -> &ConfigOptions {
        &self.config
    }

    fn udf_names(&self) -> Vec<String> {
        self.functions.keys().cloned().collect()
    }

    fn higher_order_function_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn udaf_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn udwf_names(&self) -> Vec<String> {
        Vec::new()
    }
}
