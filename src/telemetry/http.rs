//! A small HTTP server for operators: `/metrics`, `/health`, `/ready`, `/status`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;

use super::board::Board;

/// Serves until the runtime ends. Returns the address it listens on.
///
/// `/health` says 200 as long as the process runs; `/ready` says 200 once partitions are assigned and, where the pipeline
/// scores, a model is in use, else 503.
///
/// # Errors
/// Where the address cannot be bound: says which, and what to change.
pub async fn serve(
    listen: SocketAddr,
    metrics: PrometheusHandle,
    board: Arc<Board>,
    pipeline: String,
    ready: impl Fn() -> bool + Clone + Send + Sync + 'static,
) -> Result<SocketAddr, String> {
    let listener = tokio::net::TcpListener::bind(listen).await.map_err(|e| {
        format!("cannot listen on {listen}: {e}; choose another address with --listen, or --listen none")
    })?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let status = Arc::clone(&board);
    let router = Router::new()
        .route(
            "/metrics",
            get(move || {
                let text = metrics.render();
                async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
            }),
        )
        .route("/health", get(|| async { "ok\n" }))
        .route(
            "/ready",
            get(move || {
                let answer = if ready() {
                    (StatusCode::OK, "ready\n")
                } else {
                    (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
                };
                async move { answer.into_response() }
            }),
        )
        .route(
            "/status",
            get(move || {
                let mut answer = status.to_json();
                answer["pipeline"] = pipeline.clone().into();
                async move { Json(answer) }
            }),
        );
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::warn!(%error, "the operators' HTTP server ended");
        }
    });
    Ok(address)
}
