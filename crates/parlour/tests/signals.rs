//! A worker and the signals that end it. One test, since the process has one of each signal.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use parlour::{Client, Error, ErrorKind, FaultKind, Payload, Worker};
use parlour_host::{Config, Host};
use rustix::process::{Signal, getpid, kill_process};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A worker with one call that runs until it is told to end.
struct Busy {
    client: Client,
    worker: JoinHandle<Result<(), Error>>,
    call: JoinHandle<Result<Payload, Error>>,
    proceed: Arc<Notify>,
}

async fn busy(url: &str) -> Busy {
    let [connected, begun, proceed] = std::array::from_fn(|_| Arc::new(Notify::new()));
    let (begins, gate, connects) = (begun.clone(), proceed.clone(), connected.clone());
    let slow = move || {
        let (begins, gate) = (begins.clone(), gate.clone());
        async move {
            begins.notify_one();
            gate.notified().await;
            "done"
        }
    };
    let worker = Worker::builder(url).agent("slow", slow);
    let worker = worker.on_connected(move || connects.notify_one()).run_until_signal();
    let worker = tokio::spawn(worker);
    connected.notified().await;
    let client = Client::connect(url).await.unwrap();
    let call = tokio::spawn(client.call("slow", "").into_future());
    begun.notified().await;
    Busy { client, worker, call, proceed }
}

impl Busy {
    /// Sends the process a signal, and returns once the worker is given nothing new because of it.
    async fn signal(&self, signal: Signal) {
        kill_process(getpid(), signal).unwrap();
        let refused = loop {
            let describe = self.client.call("slow", "").data_type("parlour.describe");
            if let Err(error) = describe.await {
                break error;
            }
        };
        assert_eq!(refused.kind(), ErrorKind::Fault(FaultKind::UnknownAgent));
    }
}

#[tokio::test]
async fn a_signal_lets_what_runs_end_and_a_second_one_does_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(Host::new(Config::default()).serve(listener, std::future::pending()));

    for signal in [Signal::TERM, Signal::INT] {
        let busy = busy(&url).await;
        busy.signal(signal).await;
        assert!(!busy.worker.is_finished(), "its call runs");
        busy.proceed.notify_one();
        assert_eq!(busy.call.await.unwrap().unwrap(), Payload::text("done"));
        busy.worker.await.unwrap().unwrap();
    }

    let busy = busy(&url).await;
    busy.signal(Signal::TERM).await;
    kill_process(getpid(), Signal::TERM).unwrap();
    let error = busy.worker.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Interrupted, true));
    let error = busy.call.await.unwrap().unwrap_err();
    assert!(error.may_have_run(), "{error:?}");
}
