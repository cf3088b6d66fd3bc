//! Opens the connections of tonic's channel: TCP, then TLS with the files as they are at that time. It remembers why the last
//! connection could not be used, because HTTP/2 reports only that it broke.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::rustls::{self, AlertDescription};
use tonic::transport::{Channel, Uri};
use tower::{ServiceExt as _, service_fn};

use super::{
    error::with_causes,
    server::Server,
    tls::{Refusal, Tls, TlsFiles},
};
use crate::store::StoreError;

/// Time for a TCP connection and the TLS handshake.
pub(super) const CONNECT: Duration = Duration::from_secs(3);
/// Interval of HTTP/2 pings on a connection without traffic. etcd closes connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);
/// A connection that does not answer a ping for this long is dead.
const PONG: Duration = Duration::from_secs(5);

/// Opens connections to one server.
#[derive(Clone)]
pub(super) struct Connector {
    server: Server,
    files: TlsFiles,
    failure: Failure,
}

/// Why the last connection could not be used.
#[derive(Clone, Default)]
struct Failure(Arc<Mutex<Option<StoreError>>>);

impl Connector {
    pub(super) fn new(server: Server, files: TlsFiles) -> Self {
        Self { server, files, failure: Failure::default() }
    }

    /// Connects. The channel connects again by itself after the connection breaks.
    pub(super) async fn channel(&self) -> Result<Channel, StoreError> {
        let connector = self.clone();
        let connect = service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move { connector.open().await.map_err(|error| connector.failure.remember(error)) }
        });
        // TLS is the connector's, so that tonic must see no https here.
        let endpoint = Channel::builder(Uri::from_static("http://etcd"))
            .origin(self.server.uri().clone())
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            // etcd closes connections that ping while no request is open.
            .keep_alive_while_idle(false);
        endpoint.connect_with_connector(connect).await.map_err(|error| {
            let why = with_causes(error.to_string(), std::error::Error::source(&error));
            self.failure().unwrap_or_else(|| self.away(why))
        })
    }

    /// Why the last connection could not be used, if that is known better than from the request that it carried.
    pub(super) fn failure(&self) -> Option<StoreError> {
        self.failure.take()
    }

    async fn open(&self) -> Result<TokioIo<Watched>, StoreError> {
        let deadline = Instant::now() + CONNECT;
        let late = |what: &str| self.away(format!("no {what} within {} s", CONNECT.as_secs()));
        let tls = if self.server.is_tls() { Some(Tls::load(&self.files)?) } else { None };
        let tcp = timeout_at(deadline, self.tcp()).await.map_err(|_| late("TCP connection"))??;
        let (stream, reason): (_, Reason) = match tls {
            None => (Box::pin(tcp) as Pin<Box<dyn Stream>>, Box::new(reason_without_tls)),
            Some(tls) => {
                let handshake = timeout_at(deadline, tls.connect(&self.server, tcp)).await;
                let handshake = handshake.map_err(|_| late("answer to the TLS handshake"))?;
                let stream = handshake.map_err(|refusal| self.unusable(refusal))?;
                let alerts = tls.alerts();
                (Box::pin(stream) as Pin<Box<dyn Stream>>, Box::new(move |end| reason_with_tls(end, &alerts)))
            }
        };
        let connector = self.clone();
        let report = Box::new(move |end: End<'_>| {
            if let Some(refusal) = reason(end) {
                connector.failure.remember(connector.unusable(refusal));
            }
        });
        Ok(TokioIo::new(Watched { stream, has_answered: false, write_error: None, report }))
    }

    async fn tcp(&self) -> Result<TcpStream, StoreError> {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        match connector.oneshot(self.server.uri().clone()).await {
            Ok(stream) => Ok(stream.into_inner()),
            Err(error) => Err(self.away(with_causes(error.to_string(), std::error::Error::source(&error)))),
        }
    }

    fn away(&self, why: impl ToString) -> StoreError {
        StoreError::away(format!("connect to etcd at {}", self.server), why)
    }

    fn unusable(&self, refusal: Refusal) -> StoreError {
        let Refusal { why, heals } = refusal;
        StoreError::Unusable { endpoints: self.server.to_string(), why, heals }
    }
}

impl Failure {
    /// Remembers an error and returns its text, for the channel.
    fn remember(&self, error: StoreError) -> io::Error {
        let text = error.to_string();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        io::Error::other(text)
    }

    fn take(&self) -> Option<StoreError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A TCP or TLS connection.
trait Stream: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

/// What shows that a connection cannot be used.
enum End<'a> {
    /// The first bytes that the server sends; none when it closes the connection instead.
    Answer(&'a [u8]),
    /// Reading or writing failed.
    Error(&'a io::Error),
}

type Reason = Box<dyn Fn(End<'_>) -> Option<Refusal> + Send + Sync>;

fn reason_without_tls(end: End<'_>) -> Option<Refusal> {
    match end {
        // What etcd does with TLS.
        End::Answer([]) => Some(Refusal::healing(
            "the server closes the connection without an answer: if etcd runs with TLS there, write https:// in \
             --etcd-endpoints",
        )),
        // The header of a TLS record: an alert, or a handshake message.
        End::Answer([0x15 | 0x16, 3, ..]) => {
            Some(Refusal::permanent("the server speaks TLS: write https:// in --etcd-endpoints"))
        }
        End::Answer(first) => reason_of_http1(first),
        End::Error(_) => None,
    }
}

fn reason_with_tls(end: End<'_>, alerts: impl Fn(AlertDescription) -> Refusal) -> Option<Refusal> {
    match end {
        End::Answer([]) => Some(Refusal::healing(
            "the server closes the connection after the TLS handshake without an answer: etcd does so when the client \
             certificate is revoked",
        )),
        End::Answer(first) => reason_of_http1(first),
        End::Error(error) => match error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => Some(alerts(*alert)),
            _ => None,
        },
    }
}

fn reason_of_http1(first: &[u8]) -> Option<Refusal> {
    let why = "the server answers with HTTP/1, which etcd's client URLs do not: check host, port and scheme in --etcd-endpoints";
    first.starts_with(b"HTTP/").then(|| Refusal::healing(why))
}

/// A connection that reports how the server begins and why the connection ends.
struct Watched {
    stream: Pin<Box<dyn Stream>>,
    has_answered: bool,
    /// Why writing failed, until everything that the server sent before is read.
    write_error: Option<io::Error>,
    report: Box<dyn Fn(End<'_>) + Send + Sync>,
}

impl Watched {
    /// A server that refuses us sends an alert and closes the connection. Writing may fail before the alert is read, so that
    /// an error of writing waits until reading ends, which it does soon.
    fn write<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut dyn Stream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.write_error.is_none() {
            match ready!(write(self.stream.as_mut(), cx)) {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(error) => self.write_error = Some(error),
            }
        }
        loop {
            let mut last = [0; 1024];
            let mut last = ReadBuf::new(&mut last);
            match ready!(self.stream.as_mut().poll_read(cx, &mut last)) {
                Ok(()) if !last.filled().is_empty() => {}
                Ok(()) => break,
                Err(error) => {
                    (self.report)(End::Error(&error));
                    break;
                }
            }
        }
        Poll::Ready(Err(self.write_error.take().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())))
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = ready!(this.stream.as_mut().poll_read(cx, buffer));
        match &read {
            Err(error) => (this.report)(End::Error(error)),
            Ok(()) if !this.has_answered => {
                this.has_answered = true;
                (this.report)(End::Answer(buffer.filled().get(before..).unwrap_or_default()));
            }
            Ok(()) => {}
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A server that closed the connection after an alert, which arrives after writing has failed.
    struct Refusing {
        has_arrived: bool,
    }

    impl AsyncRead for Refusing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if !std::mem::replace(&mut self.has_arrived, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
            Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, alert)))
        }
    }

    impl AsyncWrite for Refusing {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn an_alert_is_reported_even_when_writing_fails_before_it_arrives() {
        let failure = Arc::new(Mutex::new(None));
        let reported = Arc::clone(&failure);
        let mut watched = Watched {
            stream: Box::pin(Refusing { has_arrived: false }),
            has_answered: false,
            write_error: None,
            report: Box::new(move |end| {
                let alerts = |alert| Refusal::permanent(format!("{alert:?}"));
                *reported.lock().unwrap() = reason_with_tls(end, alerts);
            }),
        };
        let error = watched.write_all(b"PRI").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(failure.lock().unwrap().take(), Some(Refusal::permanent("UnknownCA")));
    }

    #[test]
    fn the_servers_first_bytes_show_what_it_is() {
        let alerts = |_| Refusal::permanent("an alert");
        let plain = |bytes| reason_without_tls(End::Answer(bytes));
        let tls = |bytes| reason_with_tls(End::Answer(bytes), alerts);
        // The header of an HTTP/2 SETTINGS frame.
        let settings = [0, 0, 18, 4, 0, 0, 0, 0, 0];
        assert_eq!((plain(&settings), tls(&settings)), (None, None));
        assert!(plain(&[0x15, 3, 3, 0, 2]).unwrap().why.contains("https://"));
        assert!(plain(&[]).unwrap().why.contains("https://"));
        assert!(tls(&[]).unwrap().why.contains("revoked"));
        assert!(plain(b"HTTP/1.1 400").is_some() && tls(b"HTTP/1.1 400").is_some());
    }
}
