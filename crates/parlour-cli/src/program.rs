//! A program as an agent: payload on its stdin, reply on its stdout.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use parlour_core::{ByteString, Bytes, Payload};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::body;

/// Each program holds three pipes, and a shell usually allows 1024 open files. Calls beyond this many
/// wait for a program to end, within their deadlines.
const AT_ONCE: usize = 256;
/// How much output is taken at all. The host allows less as a rule: `limits.payload_bytes`.
const OUTPUT_BYTES: usize = 64 << 20;
/// How much of a failing program's stderr its caller is told: the end, where the reason stands.
const COMPLAINT_BYTES: usize = 8 * 1024;

/// Whether a program of this name is there to be started: at this path, or in a directory of `PATH`.
pub(crate) fn is_found(name: &OsStr) -> bool {
    if name.as_encoded_bytes().contains(&b'/') {
        return Path::new(name).is_file();
    }
    std::env::var_os("PATH").is_none_or(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
    })
}

/// A program that is run once for each call.
#[derive(Debug)]
pub(crate) struct Program {
    words: Vec<OsString>,
    content_type: Option<String>,
    places: Semaphore,
}

impl Program {
    /// `words` are the program and its arguments, `content_type` that of its output.
    pub(crate) fn new(words: Vec<OsString>, content_type: Option<String>) -> Self {
        Self { words, content_type, places: Semaphore::new(AT_ONCE) }
    }

    /// Runs it with these variables. The error is a sentence for the caller.
    ///
    /// Dropping the future kills the program, and what it started unless that left its process group.
    pub(crate) async fn answer(
        &self,
        variables: Vec<(String, String)>,
        input: Bytes,
    ) -> Result<Payload, String> {
        let _place = self.places.acquire().await.map_err(|error| error.to_string())?;
        let name = self.name();
        let failed = |error: io::Error| format!("`{name}` cannot be talked to: {error}");
        let mut child = self
            .command(variables)
            .spawn()
            .map_err(|error| format!("cannot start `{name}`: {error}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stderr = child.stderr.take();
        let mut group = Group(Some(child));
        let write = async {
            if let Some(mut stdin) = stdin {
                // A program may end, or close its stdin, without having read it all.
                let _ = stdin.write_all(&input).await;
            }
            Ok(())
        };
        let read = async { self.output(stdout).await };
        let complaint = async { tail(stderr).await.map_err(failed) };
        let ((), output, complaint) = tokio::try_join!(write, read, complaint)?;
        // Only now: until it is waited for, nobody else can have its process id.
        let status = group.wait().await.map_err(failed)?;
        if !status.success() {
            return Err(failure(name.as_ref(), status, &complaint));
        }
        Ok(Payload {
            content_type: body::content_type(self.content_type.as_deref(), &output),
            data_type: ByteString::new(),
            bytes: output.into(),
            ..Payload::default()
        })
    }

    fn name(&self) -> String {
        self.words.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn command(&self, variables: Vec<(String, String)>) -> Command {
        let mut command = Command::new(self.words.first().cloned().unwrap_or_default());
        command
            .args(self.words.iter().skip(1))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        for (name, _) in std::env::vars_os() {
            // What this worker itself was called with is no business of its programs.
            if name.to_string_lossy().starts_with("PARLOUR_META_") {
                command.env_remove(name);
            }
        }
        // No variable can hold a NUL, and a data type may.
        command.envs(variables.into_iter().map(|(name, value)| (name, value.replace('\0', ""))));
        command
    }

    async fn output(&self, stream: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, String> {
        let mut output = Vec::new();
        if let Some(stream) = stream {
            let mut stream = stream.take(OUTPUT_BYTES as u64 + 1);
            let read = stream.read_to_end(&mut output).await;
            read.map_err(|error| format!("the output of `{}` is lost: {error}", self.name()))?;
        }
        if output.len() > OUTPUT_BYTES {
            return Err(format!(
                "`{}` wrote more than {} MiB; what a host takes is `limits.payload_bytes`",
                self.name(),
                OUTPUT_BYTES >> 20
            ));
        }
        Ok(output)
    }
}

/// A program and what it starts, ended together when this is dropped before the program has ended.
struct Group(Option<Child>);

impl Group {
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.0 {
            Some(child) => child.wait().await,
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // A program that has been waited for has no id, and another may have its old one.
        let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)) else {
            return;
        };
        // It has ended by itself if there is no such group.
        let _ = kill_process_group(pid, Signal::KILL);
        // Somebody has to wait for it, or it stays in the system's list of processes.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move { child.wait().await });
        }
    }
}

/// The end of what a stream says.
async fn tail(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut tail = VecDeque::with_capacity(COMPLAINT_BYTES);
    let mut piece = [0; 4096];
    if let Some(mut stream) = stream {
        loop {
            let length = stream.read(&mut piece).await?;
            if length == 0 {
                break;
            }
            tail.extend(&piece[..length]);
            tail.drain(..tail.len().saturating_sub(COMPLAINT_BYTES));
        }
    }
    Ok(tail.into())
}

fn failure(name: &str, status: ExitStatus, complaint: &[u8]) -> String {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => format!("ended: {status}"),
    };
    let complaint = String::from_utf8_lossy(complaint);
    match complaint.trim() {
        "" => format!("`{name}` {how}"),
        complaint => format!("`{name}` {how}: {complaint}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_long_complaint_is_kept() {
        let text = "a".repeat(20_000) + "the reason";
        let kept = tail(Some(text.as_bytes())).await.unwrap();
        assert_eq!(kept.len(), COMPLAINT_BYTES);
        assert!(kept.ends_with(b"the reason"));
    }
}
