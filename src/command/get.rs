//! `get`: one entity's newest features.

use std::io::Write;

use super::{Failure, Outcome, load, printed, runtime};
use crate::cli::GetArgs;
use crate::runtime::clock;
use crate::store;

pub(super) fn run(args: &GetArgs) -> Outcome {
    let plan = load(&args.pipeline)?;
    let plan = match &args.entity {
        None => plan.as_ref(),
        Some(entity) => plan.about(entity).ok_or_else(|| {
            let known: Vec<&str> = std::iter::once(plan.as_ref())
                .chain(plan.others.iter().map(AsRef::as_ref))
                .map(|p| &*p.entity.name)
                .collect();
            Failure::Usage(format!("nothing is computed of entity '{entity}', but of {}", known.join(", ")))
        })?,
    };
    let runtime = runtime()?;
    let key = store::key_from_text(&plan.entity, &args.key).map_err(|e| Failure::Usage(e.to_string()))?;
    let online = store::open_online(plan, runtime.handle().clone()).map_err(Failure::failed)?;
    let row = store::lookup(plan, online.as_ref(), &key, clock::now_ms()).map_err(Failure::failed)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let text = serde_json::to_string_pretty(&row).map_err(Failure::failed)?;
        return printed(writeln!(out, "{text}"));
    }
    printed(writeln!(out, "{row}"))
}
