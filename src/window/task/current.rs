//! The rows of all entities as they are now, for an online store that has those of another definition.

use super::{AsOf, Output, States, Task};
use crate::window::entities::EntityId;
use crate::window::rows::{Origin, RowBuffer};
use crate::window::{Failures, FeatureRows, WindowError};

impl Task {
    /// Rows of at most `limit` entities, those of number `from` and after it, and where to go on; `None` after the last.
    ///
    /// A row has its entity's newest event time, and newer events of the entity win over it. Its values are as of the
    /// watermark where that is later: what an entity that is quiet no longer needs is forgotten.
    ///
    /// # Errors
    /// A column of features cannot be built.
    pub fn current_rows(&mut self, from: u32, limit: usize) -> Result<(FeatureRows, Option<u32>), WindowError> {
        let mut ids: Vec<EntityId> = self.entities.ids().filter(|id| *id >= from).take(limit + 1).collect();
        let next = if ids.len() > limit { ids.pop() } else { None };
        let quiet = self.time.quiet();
        let sequence = self.applied.iter().sum::<i64>() + self.reordered;
        let mut rows = RowBuffer::new(&self.engine);
        let source = self.engine.on.unwrap_or(0);
        let Output { empty, reader, .. } = &mut self.output;
        for entity in ids {
            if let Some(cold) = &mut self.cold {
                cold.awake(&self.engine, &mut self.entities, &mut self.texts, entity);
            }
            let newest = self.entities.get(entity).newest;
            let time = newest.max(quiet);
            let offset = self.applied[source] - 1;
            let origin =
                Origin { entity, source, offset, sequence, event_time: newest, watermark: self.time.watermark };
            let as_of = AsOf { time, source: self.engine.sources() };
            let states = States::new(&mut self.entities, &mut self.texts, &mut self.cold);
            reader.read(&self.engine, states, as_of, &mut rows, origin, empty);
        }
        let mut failures = Failures::default();
        let rows = rows.build(&self.engine, &self.entities, &self.texts, self.partition, &mut failures)?;
        if let Some(first) = failures.first {
            tracing::warn!(rows = failures.rows, "features could not be computed, they are null: {first}");
        }
        self.settle()?;
        Ok((rows, next))
    }
}
