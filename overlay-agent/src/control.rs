//! The agent's control socket: one question per connection, one line of JSON each way.

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
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::warn;

/// Longest question. Longer ones are not ours.
const LONGEST_QUESTION: u64 = 1024;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Question {
    /// Who the agent is and how it fares: [`crate::report::Status`].
    Status,
    /// Where packets go: [`crate::report::RouteList`].
    Routes,
    /// What was counted: [`crate::report::CounterList`].
    Counters,
}

/// A question with the way back for its answer, a JSON value or an error text.
pub type Asked = (Question, oneshot::Sender<Result<serde_json::Value, String>>);

/// The socket of the agent that runs the overlay device `device`.
pub fn path(run_dir: &Path, device: &str) -> PathBuf {
    run_dir.join(format!("{device}.sock"))
}

/// The listening socket; its file goes when it is dropped.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens at `path`, for root only. A socket that a killed agent left is replaced; one that answers is not.
    ///
    /// # Errors
    ///
    /// When another agent answers there, or the directory cannot be made.
    pub fn listen(path: PathBuf) -> Result<Self> {
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
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("remove the stale socket {}", path.display()));
            }
        }
        let listener = UnixListener::bind(&path).with_context(|| format!("listen at {}", path.display()))?;
        let control = Self { listener, path };
        std::fs::set_permissions(&control.path, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("protect {}", control.path.display()))?;
        Ok(control)
    }

    /// Passes questions on and answers back, until `questions` is closed.
    pub async fn serve(self, questions: mpsc::Sender<Asked>) {
        loop {
            let stream = tokio::select! {
                stream = self.listener.accept() => stream,
                () = questions.closed() => return,
            };
            match stream {
                Ok((stream, _)) => {
                    let questions = questions.clone();
                    tokio::spawn(async move {
                        // A client that talks nonsense or goes away harms only itself.
                        let _ = timeout(PATIENCE, answer(stream, questions)).await;
                    });
                }
                Err(error) => {
                    warn!("accept on the control socket: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn answer(stream: UnixStream, questions: mpsc::Sender<Asked>) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    BufReader::new(reader.take(LONGEST_QUESTION)).read_until(b'\n', &mut line).await?;
    let answer = match serde_json::from_slice::<Question>(&line) {
        Ok(question) => {
            let (sender, receiver) = oneshot::channel();
            questions.send((question, sender)).await?;
            receiver.await?
        }
        Err(error) => Err(format!("not a question: {error}")),
    };
    let mut answer = serde_json::to_vec(&answer)?;
    answer.push(b'\n');
    Ok(writer.write_all(&answer).await?)
}

/// The process that listens at `path`, as the kernel knows it; `None` when there is none.
///
/// # Errors
///
/// When it cannot be found out.
pub fn listener(path: &Path) -> Result<Option<i32>> {
    let stream = match std::os::unix::net::UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => {
            return Err(error).with_context(|| format!("connect to the agent at {}", path.display()));
        }
    };
    let peer = getsockopt(&stream, PeerCredentials)
        .with_context(|| format!("ask who listens at {}", path.display()))?;
    match peer.pid() {
        0 => bail!("the agent at {} runs in another PID namespace: end it there", path.display()),
        // A child that an agent was about to start when it was killed holds the socket for another moment.
        pid if kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) => Ok(None),
        pid => Ok(Some(pid)),
    }
}

/// Asks the agent at `path`.
///
/// # Errors
///
/// When no agent answers there, or it answers with an error.
pub async fn ask<T: DeserializeOwned>(path: &Path, question: Question) -> Result<T> {
    let attempt = async {
        let mut stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                bail!(
                    "no agent answers at {}: is it running, and are --device and --run-dir the ones it was started with?",
                    path.display()
                )
            }
            Err(error) => {
                return Err(error).with_context(|| format!("connect to the agent at {}", path.display()));
            }
        };
        let mut line = serde_json::to_vec(&question)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let answer: Result<T, String> =
            serde_json::from_slice(&answer).context("the agent closed the connection without an answer")?;
        answer.map_err(|error| anyhow::anyhow!("the agent says: {error}"))
    };
    timeout(PATIENCE, attempt)
        .await
        .with_context(|| format!("the agent at {} does not answer", path.display()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn server(directory: &Path) -> (PathBuf, mpsc::Receiver<Asked>) {
        let path = path(directory, "ovl0");
        let control = Control::listen(path.clone()).unwrap();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(control.serve(sender));
        (path, receiver)
    }

    #[tokio::test]
    async fn a_question_gets_its_answer_and_nonsense_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut questions) = server(directory.path()).await;
        tokio::spawn(async move {
            while let Some((question, back)) = questions.recv().await {
                let _ = back.send(Ok(serde_json::json!(format!("{question:?}"))));
            }
        });
        assert_eq!(ask::<String>(&path, Question::Routes).await.unwrap(), "Routes");
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"\xff{{{\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("not a question"), "{answer}");
        assert_eq!(ask::<String>(&path, Question::Status).await.unwrap(), "Status");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = path(directory.path(), "ovl0");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (_, _questions) = server(directory.path()).await;
        let error = Control::listen(path).err().unwrap().to_string();
        assert!(error.contains("already"), "{error}");
    }

    #[tokio::test]
    async fn without_an_agent_the_error_says_where_it_was_looked_for() {
        let directory = tempfile::tempdir().unwrap();
        let error =
            ask::<String>(&path(directory.path(), "ovl7"), Question::Status).await.unwrap_err().to_string();
        assert!(error.contains("ovl7.sock"), "{error}");
    }
}
