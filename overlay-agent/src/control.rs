//! The agent's control socket, for root and the agent's user only.
//!
//! A client sends one request, `{"version":1,"query":"status"}`, and reads responses, `{"version":1,"data":...}` or
//! `{"version":1,"error":"..."}`, until the server closes the connection: one response, or with `"watch":true` one now and one
//! for every change. Each message is one line of JSON.

use std::{
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        signal::kill,
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tempfile::TempPath;
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::warn;

use crate::datapath::Request as RungRequest;
use crate::handover::{self, Channel};

/// Version of the protocol. A change that an older client or agent would misread increments it.
const VERSION: u32 = 1;

/// Size limit of a request in bytes.
const MAX_REQUEST: u64 = 1024;

/// How long either side waits for a message that is due.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long either side waits for the end of a change: it may load programs.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a watched query is answered again, to see whether the answer changed.
const WATCH_INTERVAL: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });

/// A query that the agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Query {
    /// The answer is a [`crate::report::Status`].
    Status,
    /// The answer is a [`crate::report::RouteList`].
    Routes,
    /// The answer is a [`crate::report::CounterList`].
    Counters,
    /// The answer is a [`crate::service::traffic::Traffic`].
    Traffic,
    /// The answer is a [`crate::report::Datapath`].
    Datapath,
    /// Asks for another rung; the answer is a [`crate::report::Datapath`], once the change is made.
    #[serde(rename = "set_datapath")]
    SetDatapath(RungRequest),
}

impl Query {
    /// Whether it changes something, and so is made once.
    fn is_change(self) -> bool {
        match self {
            Self::Status | Self::Routes | Self::Counters | Self::Traffic | Self::Datapath => false,
            Self::SetDatapath(_) => true,
        }
    }

    /// How long either side waits for the answer.
    fn timeout(self) -> Duration {
        if self.is_change() { CHANGE_TIMEOUT } else { TIMEOUT }
    }
}

/// The answer to a query, or an error text.
pub(crate) type Answer<T = Value> = Result<T, String>;

/// A query for the agent's main loop, with the channel for its answer.
pub(crate) type QueryRequest = (Query, oneshot::Sender<Answer>);

/// A client's message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    version: u32,
    query: Query,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    watch: bool,
}

/// The agent's message.
#[derive(Debug, Serialize, Deserialize)]
struct Response<T> {
    version: u32,
    #[serde(flatten)]
    body: Body<T>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Body<T> {
    Data(T),
    Error(String),
}

/// The part of every message that all versions share.
#[derive(Debug, Deserialize)]
struct Versioned {
    version: u32,
}

/// The socket of the agent that runs the overlay device `device`.
pub(crate) fn path(run_dir: &Path, device: &str) -> PathBuf {
    run_dir.join(format!("{device}.sock"))
}

/// The listening socket; dropping it removes its file.
pub(crate) struct Control {
    listener: UnixListener,
    _file: TempPath,
}

impl Control {
    /// Listens at `path`, for root and this user, and replaces a socket that a killed agent left. Fails when another agent answers there.
    pub(crate) fn listen(path: PathBuf) -> Result<Self> {
        let directory = path.parent().context("the control socket has no directory")?;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("create {}", directory.display()))?;
        if let Some(pid) = listener(&path)? {
            bail!(
                "an agent (process {pid}) answers at {} already: stop it first, or choose another --run-dir",
                path.display()
            );
        }
        remove(&path)?;
        let listener = UnixListener::bind(&path).with_context(|| format!("listen at {}", path.display()))?;
        let file = TempPath::try_from_path(path)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("protect {}", file.display()))?;
        Ok(Self { listener, _file: file })
    }

    /// Serves clients until the receiver of `queries`, the main loop, is gone. Agents that want to take over from this one get to it through
    /// `successors`.
    pub(crate) async fn serve(self, queries: mpsc::Sender<QueryRequest>, successors: mpsc::Sender<Channel>) {
        loop {
            let stream = tokio::select! {
                stream = self.listener.accept() => stream,
                () = queries.closed() => return,
            };
            match stream {
                Ok((stream, _)) => {
                    let (queries, successors) = (queries.clone(), successors.clone());
                    // A failed connection concerns only its client.
                    tokio::spawn(async move { drop(serve_client(stream, queries, successors).await) });
                }
                Err(error) => {
                    warn!("accept on the control socket: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// Removes the socket that a killed agent left; `false` when there is none.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove the stale socket {}", path.display())),
    }
}

async fn serve_client(
    stream: UnixStream,
    queries: mpsc::Sender<QueryRequest>,
    successors: mpsc::Sender<Channel>,
) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST));
    let mut line = Vec::new();
    timeout(TIMEOUT, reader.read_until(b'\n', &mut line)).await??;
    if line == handover::REQUEST.as_bytes() {
        let channel = Channel::new(reader.into_inner().into_inner().reunite(writer)?);
        let (_, user) = channel.peer()?;
        if user == 0 || user == rustix::process::geteuid().as_raw() {
            successors.send(channel).await?;
        }
        return Ok(());
    }
    let request = match parse_request(&line) {
        Ok(request) => request,
        Err(error) => return send(&mut writer, Err(error)).await,
    };
    let mut sent = None;
    loop {
        let answer = ask_main_loop(&queries, request.query).await?;
        if sent.as_ref() != Some(&answer) {
            send(&mut writer, answer.clone()).await?;
            sent = Some(answer);
        }
        if !request.watch {
            return Ok(());
        }
        tokio::select! {
            () = sleep(WATCH_INTERVAL) => {}
            // The client closed the connection: it sends only one request.
            _ = reader.read_u8() => return Ok(()),
            () = queries.closed() => return Ok(()),
        }
    }
}

fn parse_request(line: &[u8]) -> Result<Request, String> {
    match serde_json::from_slice::<Versioned>(line) {
        Ok(Versioned { version }) if version != VERSION => Err(format!(
            "unsupported version {version} of the control protocol: this agent ({}) speaks version {VERSION}",
            env!("CARGO_PKG_VERSION")
        )),
        _ => match serde_json::from_slice(line) {
            Ok(Request { query, watch: true, .. }) if query.is_change() => {
                Err("invalid request: a change cannot be watched".to_owned())
            }
            parsed => parsed.map_err(|error| format!("invalid request: {error}")),
        },
    }
}

/// An error of the main loop is an answer; a main loop that is gone ends the connection.
async fn ask_main_loop(queries: &mpsc::Sender<QueryRequest>, query: Query) -> Result<Answer> {
    let (sender, receiver) = oneshot::channel();
    let exchange = async {
        queries.send((query, sender)).await?;
        anyhow::Ok(receiver.await?)
    };
    let limit = query.timeout();
    timeout(limit, exchange)
        .await
        .unwrap_or_else(|_| Ok(Err(format!("the main loop does not answer within {limit:?}"))))
}

async fn send(writer: &mut OwnedWriteHalf, answer: Answer) -> Result<()> {
    let body = answer.map_or_else(Body::Error, Body::Data);
    let line = line(&Response { version: VERSION, body })?;
    Ok(timeout(TIMEOUT, writer.write_all(line.as_bytes())).await??)
}

fn line(message: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(message)? + "\n")
}

/// Whether connecting failed because no process listens.
pub(crate) fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}

/// The process that listens at `path`, as the kernel knows it; `None` when there is none. Fails when it runs in another PID
/// namespace.
pub(crate) fn listener(path: &Path) -> Result<Option<i32>> {
    let stream = match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if is_absent(&error) => return Ok(None),
        stream => stream.with_context(|| format!("connect to the agent at {}", path.display()))?,
    };
    let peer = getsockopt(&stream, PeerCredentials)
        .with_context(|| format!("identify the process at {}", path.display()))?;
    match peer.pid() {
        0 => bail!("the agent at {} runs in another PID namespace: end it there", path.display()),
        // A child that an agent was about to start when it was killed holds the socket for another moment.
        pid if kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) => Ok(None),
        pid => Ok(Some(pid)),
    }
}

/// Queries the agent at `path` once. Fails when no agent answers there, or it answers with an error.
pub(crate) async fn query<T: DeserializeOwned>(path: &Path, query: Query) -> Result<T> {
    let attempt = async {
        let mut responses = Responses::open(path, query, false).await?;
        let answer = responses.next().await?.context("the agent closed the connection without an answer")?;
        answer.map_err(|error| anyhow::anyhow!("the agent reports: {error}"))
    };
    timeout(query.timeout(), attempt)
        .await
        .with_context(|| format!("the agent at {} does not answer", path.display()))?
}

/// No agent answers at the socket `path`.
#[derive(Debug, Error)]
#[error(
    "no agent answers at {}: is it running, and are --device and --run-dir the ones it was started with?",
    path.display()
)]
pub(crate) struct NoAgent {
    path: PathBuf,
}

/// The responses to one request, in the order in which the agent sends them.
#[derive(Debug)]
pub(crate) struct Responses(Lines<BufReader<UnixStream>>);

impl Responses {
    /// Queries the agent at `path`: the responses are the answer now and, with `watch`, each change of it. Fails when no agent
    /// answers there.
    pub(crate) async fn open(path: &Path, query: Query, watch: bool) -> Result<Self> {
        let mut stream = match UnixStream::connect(path).await {
            Err(error) if is_absent(&error) => return Err(NoAgent { path: path.to_owned() }.into()),
            stream => stream.with_context(|| format!("connect to the agent at {}", path.display()))?,
        };
        stream.write_all(line(&Request { version: VERSION, query, watch })?.as_bytes()).await?;
        Ok(Self(BufReader::new(stream).lines()))
    }

    /// Waits for the next response; `None` once the agent has closed the connection. Fails when the connection carries
    /// something else than responses of this version of the protocol.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<Answer<T>>> {
        let Some(line) = self.0.next_line().await.context("read from the agent")? else { return Ok(None) };
        match serde_json::from_str::<Versioned>(&line) {
            Ok(Versioned { version: VERSION }) => {}
            Ok(Versioned { version }) => bail!(
                "the agent speaks version {version} of the control protocol, this program ({}) version {VERSION}: use the \
                 agent's own binary",
                env!("CARGO_PKG_VERSION")
            ),
            Err(_) => bail!(
                "the agent does not speak version {VERSION} of the control protocol: use its own binary"
            ),
        }
        let response: Response<T> = serde_json::from_str(&line).context("read the agent's response")?;
        Ok(Some(match response.body {
            Body::Data(data) => Ok(data),
            Body::Error(error) => Err(error),
        }))
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    async fn server() -> (TempDir, PathBuf, mpsc::Receiver<QueryRequest>) {
        let directory = tempfile::tempdir().unwrap();
        let path = path(directory.path(), "ovl0");
        // A socket that no process listens at is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let control = Control::listen(path.clone()).unwrap();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(control.serve(sender, mpsc::channel(1).0));
        (directory, path, receiver)
    }

    /// Sends `request` as it is and reads until the server closes the connection.
    async fn raw(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut responses = String::new();
        stream.read_to_string(&mut responses).await.unwrap();
        responses
    }

    /// Answers this many queries with `state`, as the main loop does.
    async fn answer(queries: &mut mpsc::Receiver<QueryRequest>, state: Answer, count: usize) {
        for _ in 0..count {
            let (_, sender) = queries.recv().await.unwrap();
            drop(sender.send(state.clone()));
        }
    }

    #[tokio::test]
    async fn a_query_gets_one_answer_and_an_invalid_request_an_error() {
        let (_directory, path, mut queries) = server().await;
        tokio::spawn(async move {
            while let Some((query, sender)) = queries.recv().await {
                drop(sender.send(Ok(serde_json::json!(format!("{query:?}")))));
            }
        });
        assert_eq!(query::<String>(&path, Query::Routes).await.unwrap(), "Routes");
        let change = query::<String>(&path, Query::SetDatapath(RungRequest::Tc)).await.unwrap();
        assert_eq!(change, "SetDatapath(Tc)");
        let response = raw(&path, b"{\"version\":1,\"query\":\"status\"}\n").await;
        assert_eq!(response, "{\"version\":1,\"data\":\"Status\"}\n");
        // Without the limit, the server would wait for the end of this line.
        let long = [b'x'; MAX_REQUEST as usize];
        let watched = b"{\"version\":1,\"query\":{\"set_datapath\":\"tc\"},\"watch\":true}\n";
        let unknown = b"{\"version\":1,\"query\":{\"set_datapath\":\"fast\"}}\n";
        for invalid in [
            &b"\xff{{{\n"[..],
            b"\"status\"\n",
            b"{\"version\":1,\"query\":\"x\"}\n",
            watched,
            unknown,
            &long,
        ] {
            let response = raw(&path, invalid).await;
            assert!(response.starts_with("{\"version\":1,\"error\":\"invalid request: "), "{response}");
        }
    }

    #[test]
    fn a_typed_answer_is_read_back() {
        let status = crate::report::Status {
            network: Some("10.244.0.0/16".parse().unwrap()),
            subnet: Some("10.244.1.0/24".parse().unwrap()),
            public_ip: Some("192.168.77.1".parse().unwrap()),
            drops: u64::MAX,
            ..crate::report::Status::starting()
        };
        let line = serde_json::to_string(&Response { version: VERSION, body: Body::Data(&status) }).unwrap();
        let read: Response<crate::report::Status> = serde_json::from_str(&line).unwrap();
        assert_eq!(format!("{:?}", read.body), format!("{:?}", Body::Data(status)));
    }

    #[tokio::test]
    async fn another_version_is_refused_by_either_side_with_both_versions() {
        let (directory, path, _queries) = server().await;
        let response = raw(&path, b"{\"version\":7,\"request\":{\"kind\":\"status\"}}\n").await;
        assert!(response.contains("version 7") && response.contains("version 1"), "{response}");

        let path = directory.path().join("other.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            for response in ["{\"version\":2,\"body\":{}}\n", "{\"Ok\":{}}\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(response.as_bytes()).await.unwrap();
            }
        });
        for words in ["version 2", "does not speak version 1"] {
            let error = query::<Value>(&path, Query::Status).await.unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("version 1"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_watch_carries_every_change_and_ends_with_the_agent() {
        let (_directory, path, mut queries) = server().await;
        let mut responses = Responses::open(&path, Query::Status, true).await.unwrap();
        for (state, count) in [
            (Err("starting".to_owned()), 1),
            (Ok(Value::from("running")), 3),
            (Ok(Value::from("degraded")), 1),
        ] {
            answer(&mut queries, state.clone(), count).await;
            assert_eq!(responses.next::<Value>().await.unwrap(), Some(state));
        }
        drop(queries);
        assert_eq!(responses.next::<Value>().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_client_that_disconnects_ends_its_watch_and_no_other() {
        let (_directory, path, mut queries) = server().await;
        let leaving = Responses::open(&path, Query::Status, true).await.unwrap();
        answer(&mut queries, Ok(Value::from(1)), 1).await;
        let mut staying = Responses::open(&path, Query::Routes, true).await.unwrap();
        drop(leaving);
        let mut of_leaving = 0;
        for count in 0..5 {
            let (query, sender) = queries.recv().await.unwrap();
            of_leaving += u32::from(query == Query::Status);
            drop(sender.send(Ok(Value::from(count))));
        }
        assert!(of_leaving <= 1, "at most one query of the first client was pending: {of_leaving}");
        assert!(staying.next::<Value>().await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_main_loop_that_hangs_is_an_error() {
        let (_directory, path, _queries) = server().await;
        let mut responses = Responses::open(&path, Query::Status, true).await.unwrap();
        let error = responses.next::<Value>().await.unwrap().unwrap().unwrap_err();
        assert!(error.contains("main loop"), "{error}");
    }

    #[tokio::test]
    async fn a_path_has_at_most_one_agent_and_without_one_the_error_names_it() {
        let (_directory, path, _queries) = server().await;
        let error = Control::listen(path.clone()).err().unwrap().to_string();
        assert!(error.contains("already"), "{error}");
        let error = query::<String>(&path.with_file_name("ovl7.sock"), Query::Status).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("ovl7.sock"), "{error}");
    }
}
