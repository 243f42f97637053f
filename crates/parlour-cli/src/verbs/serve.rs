//! `parlour serve`: keeps a room until a signal ends it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use parlour_host::{Config, Host};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::runtime::{self, Runtime};
use tokio::sync::oneshot;

use crate::args::Serve;
use crate::config::Settings;
use crate::data;
use crate::exit::{Code, Failure};
use crate::log;
use crate::output::Output;
use crate::room;
use crate::signals::Signals;

pub(crate) fn run(args: &Serve, output: &Output) -> Result<Code, Failure> {
    let settings = settings(args)?;
    for warning in &settings.warnings {
        output.warn(warning);
    }
    log::start(&settings.config.server.log, settings.origin("server.log"))?;
    raise_open_files();
    let runtime = runtime(settings.config.server.threads)?;
    let code = runtime.block_on(keep_room(settings.config, args, output));
    // Nothing that still runs is worth waiting for: the host has drained, or was told not to.
    runtime.shutdown_background();
    code
}

async fn keep_room(config: Config, args: &Serve, output: &Output) -> Result<Code, Failure> {
    // Before the address is said, so that whoever reads it can already end the program well.
    let mut signals = Signals::install()?;
    Signals::survive_long_files()?;
    let has_names = !config.server.allowed_hosts.is_empty();
    let listener = listen(&config, args.insecure).await?;
    let keeps = if args.memory { None } else { Some(data::open(&config)?) };
    let mut host = host(config)?;
    if let Some(backbone) = keeps {
        host = host.keep(Arc::new(backbone));
    }
    let address = listener
        .local_addr()
        .map_err(|error| Failure::new(Code::Failed, format!("cannot tell the address: {error}")))?;
    if address.ip().is_unspecified() && !has_names {
        output.note(
            "requests that name this machine by anything but a loopback address are refused: \
             list its names in server.allowed_hosts",
        );
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let host = serve(host, listener, async move {
        let _ = stopped.await;
    });
    tokio::pin!(host);
    output.announce(&format!("listening on http://{address}"));
    tokio::select! {
        ended = &mut host => return ended,
        _ = signals.next() => {}
    }
    output.note("draining; a second signal ends it at once");
    let _ = stop.send(());
    tokio::select! {
        ended = host => ended,
        code = signals.next() => Ok(code),
    }
}

/// Serves on this listener until `shutdown`, then lets calls in flight end.
async fn serve(
    host: Host,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<Code, Failure> {
    match host.serve(listener, shutdown).await {
        Ok(()) => Ok(Code::Ok),
        Err(error) => Err(Failure::new(Code::Failed, format!("the host ended: {error}"))),
    }
}

fn host(config: Config) -> Result<Host, Failure> {
    if config.server.token_file.is_empty() {
        return Ok(Host::new(config));
    }
    let token = room::read_token(Path::new(&config.server.token_file), Code::BadConfig)?;
    Ok(Host::with_token(config, &token))
}

fn settings(args: &Serve) -> Result<Settings, Failure> {
    let mut flags = Vec::new();
    if let Some(address) = &args.listen {
        flags.push(("--listen", "server.listen", address.clone()));
    }
    flags.extend(data::flag(args.data.as_deref())?);
    if let Some(file) = &args.token_file {
        let file = file
            .to_str()
            .ok_or_else(|| Failure::new(Code::Usage, "the name of the token file is not UTF-8"))?;
        flags.push(("--token-file", "server.token_file", file.to_owned()));
    }
    Settings::load(&args.sources, &flags)
}

async fn listen(config: &Config, insecure: bool) -> Result<TcpListener, Failure> {
    let text = &config.server.listen;
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host(text)
        .await
        .map_err(|error| {
            Failure::new(Code::BadConfig, format!("`{text}` is not an address: {error}"))
                .hint("an address looks like 127.0.0.1:9000; port 0 takes a free one")
        })?
        .collect();
    let is_loopback = |address: &SocketAddr| address.ip().to_canonical().is_loopback();
    if !addresses.iter().all(is_loopback) && config.server.token_file.is_empty() && !insecure {
        return Err(Failure::new(
            Code::BadConfig,
            format!("{text} can be reached from other machines, and no token is asked for"),
        )
        .hint("give --token-file FILE, or --insecure to let everyone in, or listen on 127.0.0.1"));
    }
    TcpListener::bind(&*addresses).await.map_err(|error| refused(text, &error))
}

/// Why a host may not have an address.
pub(crate) fn refused(address: &str, error: &io::Error) -> Failure {
    let port = address.rsplit(':').next().unwrap_or_default();
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            Failure::new(Code::AlreadyRunning, format!("{address} is in use by another program"))
                .hint(format!(
                    "if that is a host, `parlour status --url http://{address}` tells; else see \
                     `ss -ltnp 'sport = :{port}'`, or take another port with --listen"
                ))
        }
        io::ErrorKind::AddrNotAvailable => {
            Failure::new(Code::BadConfig, format!("this machine does not have {address}"))
                .hint("`ip address` lists what it has; 0.0.0.0 is all of them")
        }
        io::ErrorKind::PermissionDenied => {
            Failure::new(Code::Denied, format!("this user may not listen on {address}"))
                .hint("take a port above 1023 with --listen")
        }
        _ => Failure::new(Code::Failed, format!("cannot listen on {address}: {error}")),
    }
}

fn runtime(threads: usize) -> Result<Runtime, Failure> {
    let mut builder = match threads {
        1 => runtime::Builder::new_current_thread(),
        _ => runtime::Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    builder
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Failed, format!("cannot start threads: {error}")))
}

/// Lets the host have as many connections as the system allows, not as many as a shell is given.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        // A refusal changes nothing, and `limits.connections` still holds.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}
