//! The endpoints of this node's files, in the states that their checks find.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::NamedEndpoints;
use crate::{
    service::{
        health::{VerdictReceiver, Verdicts},
        record::Endpoints,
    },
    store::OwnRecords,
};

/// How long endpoints wait for the first verdicts: before, one that an earlier run found down would look ready.
const FIRST_VERDICTS: Duration = Duration::from_secs(5);

/// Keeps the records in step with both. Returns when one of them ends.
pub(super) async fn keep(
    own: &OwnRecords<Endpoints>,
    mut wanted: watch::Receiver<Arc<NamedEndpoints>>,
    mut verdicts: VerdictReceiver,
) {
    // An error is late or the end, which the loop meets, too.
    let _ = timeout(FIRST_VERDICTS, verdicts.wait_for(Option::is_some)).await;
    loop {
        let known = verdicts.borrow_and_update().clone().unwrap_or_default();
        let endpoints = in_state(&wanted.borrow_and_update(), &known);
        own.set(&endpoints);
        let changed = tokio::select! {
            changed = wanted.changed() => changed,
            changed = verdicts.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn in_state(wanted: &NamedEndpoints, verdicts: &Verdicts) -> NamedEndpoints {
    let mut endpoints = wanted.clone();
    for (name, endpoint) in &mut endpoints {
        if let Some(verdict) = verdicts.get(name) {
            endpoint.state = verdict.state(endpoint.state);
        }
    }
    endpoints
}
