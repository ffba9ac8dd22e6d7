//! Connections: taken, limited, timed, and let finish when the server ends.

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// After a failure to accept (too many open files, mostly).
const PAUSE: Duration = Duration::from_millis(50);

/// Bounds of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most at a time; further ones wait to be accepted.
    pub connections: usize,
    /// Time for the head of a request.
    pub patience: Duration,
}

/// Serve until `stop` changes; then take nothing new and let what runs finish, for at most the
/// time that `stop` then holds.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    mut stop: watch::Receiver<Duration>,
) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accept = async {
            let place = room.clone().acquire_owned().await.expect("never closed");
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            accepted = accept => accepted,
            _ = stop.changed() => break,
        };
        let Ok((stream, _)) = stream else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // Tokens are small and must not wait for more.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.patience)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // A connection's failure is its client's affair.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    let grace = *stop.borrow();
    // What is not done by then is cut off by the caller.
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
}
